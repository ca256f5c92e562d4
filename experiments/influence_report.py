"""The influence experiment's table, verdict and plots, from its JSON alone."""

import json
import math
import pathlib
from typing import Any

import numpy as np

from experiments import influence_plots
from experiments.results import write_json, write_text
from ssmjax import diagnostics

__all__ = ["ratio_fits", "report", "slope_words", "verdict", "write_results"]

# Below it, a line is not what the curve is.
LINE = 0.98

# What Fig. 7 (b) of the paper calls near.
NEAR = 64


def write_results(
  out: pathlib.Path, setting: dict[str, Any], results: list[dict[str, Any]]
) -> None:
  """Write `results.json`, everything that table and plots are drawn from."""
  kept = [{k: v for k, v in r.items() if k != "setting"} for r in results]
  write_json(out / "results.json", {"setting": setting, "models": kept})


def report(out: pathlib.Path) -> None:
  """Print and write the table and the verdict; draw the figures.

  Raises:
    SystemExit: there are no results.
  """
  path = out / "results.json"
  if not path.exists():
    raise SystemExit(
      f"influence: there is no {path}, expected results. Run the command"
      " without --report-only."
    )
  found = json.loads(path.read_text())
  models, setting = found["models"], found["setting"]
  fits = ratio_fits(models)
  text = "\n".join(
    [
      "Influence on later tokens against distance: natural logarithm per"
      f" token, {setting['rows']} rows of {setting['length']} tokens,"
      f" {setting['times']} times each, {setting['probes']} probes",
      "",
      *_table(models),
      "",
      *verdict(models),
      *map(_ratio_words, fits),
      "",
      *_LIMITS,
      "",
    ]
  )
  write_text(out / "table.md", text)
  print("\n" + text)
  influence_plots.draw_lags(models, out / "fig1.png")
  names = "table.md, fig1.png"
  if influence_plots.draw_last_token(models, fits, out / "fig7.png"):
    names += ", fig7.png"
  print(f"Written in {out}: results.json, {names}")


def verdict(models: list[dict[str, Any]]) -> list[str]:
  """Say of each model how its influence falls and what the bound allows."""
  return [
    f"- {m['title']}" + _seed(m, models) + f": {slope_words(m)}" for m in models
  ]


def slope_words(model: dict[str, Any]) -> str:
  """Say how influence falls with distance and what is known of its bound."""
  slope = model["slope"]
  if slope is None:
    return "too few lags within float32's range to fit a line"
  words = f"{_interval(slope)} per token (95 %)"
  words += f" over lags {slope['first']} to {slope['last']}"
  if slope["low"] <= 0 <= slope["high"]:
    words += ", flat: no fall that can be told from none"
  elif slope["r_squared"] >= LINE:
    words += f", a line (R² {slope['r_squared']:.3f})"
  else:
    words += (
      f", not a line (R² {slope['r_squared']:.2f}): {slope['near']:+.2g} in"
      f" the near half, {slope['far']:+.2g} in the far one"
    )
  return words + "; " + _bound_words(model)


def ratio_fits(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Fit the influence on the last token of Mambas over attention's.

  ratio(ℓ) ≈ ratio(0) exp(slope ℓ) up to lag 64, each influence as a share of
  its whole; between models of one size and as long trained.
  """
  fits = []
  for stage in ("after", "init"):
    group = [m for m in models if m["stage"] == stage and m["seed"] == 0]
    for other in (m for m in group if m["kind"] == "attention"):
      for one in group:
        same = ("layers", "width", "step", "trained_length")
        alike = all(one[k] == other[k] for k in same)
        if one["kind"] == "attention" or not alike:
          continue
        lags = np.asarray(one["lags"])
        # Before, there are the convolutions.
        first = one["slope"]["first"] if one["slope"] else 1
        as_array = lambda m: np.asarray(m["last"], float)
        logs = as_array(one) - as_array(other)
        if len(lags) != len(logs) or other["lags"] != one["lags"]:
          continue
        try:
          line = diagnostics.fit_log_slope(lags, logs, first=first, last=NEAR)
        except ValueError:
          continue
        fits.append(
          {"mamba": one, "attention": other, "lags": lags, "logs": logs}
          | {"first": first}
          | line._asdict()
        )
  return fits


def _bound_words(model) -> str:
  if model["log_a_max"] is None:
    return "it has no A, so no bound"
  if model["log_a_max"] == 0:
    rest = max(layer["learned_log_a_max"] for layer in model["eq1"] if layer)
    words = (
      "log A_max is 0 by its channel of decay 1, so Theorem 3.1 is vacuous"
      f" (its learned channels: {rest:+.2g})"
    )
    return words + _two_sided_words(model["two_sided"])
  bound = model["log_a_max"]
  words = f"log A_max {bound:+.3g}"
  slope = model["slope"]
  if not slope["within_bound"]:
    # With L layers the bound has a slope of its own at finite lags.
    rise = math.log(slope["last"] / slope["first"])
    rise *= (model["layers"] - 1) / (slope["last"] - slope["first"])
    if slope["low"] <= bound + rise:
      return words + f", {bound + rise:+.3g} at these lags with lag^(L-1)"
    return words + ", steeper than what was measured at these lags"
  share = slope["slope"] / bound
  if share > 1.5:
    words += f", a bound that falls {share:.0f} times as slowly"
  else:
    words += f", and the slope is {share:.2f} times that"
  return words


def _two_sided_words(found) -> str:
  if not found:
    return ""
  words = (
    f"; from below, first layer, {found['tokens']} tokens: |∂y/∂x| ≥"
    f" {found['lower']:.1e}"
  )
  if found["lower"] == 0:
    words += " (nothing yet)"
  words += (
    f", its kept part {found['kept']:.1e} less what the others leave,"
    f" {found['remainder']:.1e}"
  )
  if found["horizon"] is not None:
    words += (
      f"; positive for any two tokens {found['horizon']:.0f} or more apart"
    )
  return words


def _ratio_words(fit) -> str:
  one, other = fit["mamba"], fit["attention"]
  words = (
    f"- {one['title']} over {other['title']}, influence on the last token:"
    f" ratio ∝ exp(({_interval(fit)}) ℓ), lags"
    f" {fit['first']} to {NEAR}, R² {fit['r_squared']:.2f}"
  )
  if fit["r_squared"] < LINE:
    words += ", not an exponential"
  return words


_LIMITS = (
  "Not shown: whether a model uses what it could still see; other norms of the"
  " Jacobian than Frobenius's; influence through logits. Intervals are of the"
  " fitted line on this text, not of seeds. log A_max takes the largest decay"
  " of any token, channel and layer; with L layers the bound is"
  " lag^(L-1) A_max^lag. Runs saw rows of fewer tokens in training than are"
  " looked at here (dotted in the figure).",
)


def _table(models) -> list[str]:
  heads = (
    "model", "slope", "R²", "near / far", "lags", "log A_max", "slowest",
    "A < 1", "A + Δ ≤ 1", "κ median, max",
  )  # fmt: skip
  lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
  for model in models:
    cells = [model["title"] + _seed(model, models), *_slope_cells(model)]
    cells += layer_cells(model)
    lines.append("| " + " | ".join(cells) + " |")
  return lines


def _slope_cells(model) -> list[str]:
  slope = model["slope"]
  if slope is None:
    return ["too few lags", "", "", ""]
  return [
    _interval(slope),
    f"{slope['r_squared']:.3f}",
    f"{slope['near']:+.2g} / {slope['far']:+.2g}",
    f"{slope['first']}–{slope['last']}",
  ]


def _interval(fit) -> str:
  """A slope with half its interval, to two digits of the latter."""
  half = (fit["high"] - fit["low"]) / 2
  digits = 4
  if half > 0:
    digits = min(max(1 - math.floor(math.log10(half)), 2), 7)
  return f"{fit['slope']:+.{digits}f} ± {half:.{digits}f}"


def layer_cells(model) -> list[str]:
  """What Eq. 1 says of a model: "none" where there is none."""
  layers = [layer for layer in model["eq1"] if layer]
  if not layers:
    return ["none"] * 5
  mean = lambda name: sum(layer[name] for layer in layers) / len(layers)
  bound = f"{model['log_a_max']:+.2g}"
  if model["log_a_max"] == 0:
    bound = "0, vacuous"
  kappas = [layer["kappa_median"] for layer in layers]
  largest = [layer["kappa_max"] for layer in layers]
  return [
    bound,
    f"{model['slowest']:+.2g}",
    f"{100 * mean('recency_premise'):.1f} %",
    f"{100 * mean('smoothing_premise'):.1f} %",
    f"{_median(kappas)}, {_largest(largest)}",
  ]


def _median(values) -> str:
  return "∞" if None in values else f"{sorted(values)[len(values) // 2]:.2f}"


def _largest(values) -> str:
  return "∞" if None in values else f"{max(values):.2f}"


def _seed(model, models) -> str:
  several = len({m["seed"] for m in models}) > 1
  return f", seed {model['seed']}" if several else ""
