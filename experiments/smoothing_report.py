"""The smoothing experiment's table and verdict, from its JSON alone."""

import json
import pathlib
from typing import Any

import numpy as np

from experiments import smoothing_plots
from experiments.results import write_json, write_text
from experiments.smoothing_measure import GRID

__all__ = ["report", "smoothing_words", "spread_share", "verdict"]


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
      f"smoothing: there is no {path}, expected results. Run the command"
      " without --report-only."
    )
  found = json.loads(path.read_text())
  models, setting = found["models"], found["setting"]
  text = "\n".join(
    [
      f"Sharpness along the layers, {setting['rows']} rows of"
      f" {setting['length']} tokens; E by the theorem's measure,"
      " max over t, s of ‖·‖_∞, unless said otherwise",
      "",
      *_table(models),
      "",
      *verdict(models),
      "",
      *_LIMITS,
      "",
    ]
  )
  write_text(out / "table.md", text)
  print("\n" + text)
  smoothing_plots.draw_sharpness(models, out / "fig5.png")
  names = "table.md, fig5.png"
  if smoothing_plots.draw_spread(models, out / "fig6.png"):
    names += ", fig6.png"
  print(f"Written in {out}: results.json, {names}")


def verdict(models: list[dict[str, Any]]) -> list[str]:
  """Say of each model whether its states are smoothed and what bounds it."""
  several = len({m["seed"] for m in models}) > 1
  return [
    f"- {m['title']}"
    + (f", seed {m['seed']}" if several else "")
    + f": {smoothing_words(m)}"
    for m in models
  ]


def smoothing_words(model: dict[str, Any]) -> str:
  """Say what happens to sharpness in a model, against the bounds."""
  along = (
    f"the block's output has {_change(model['block'], model['input'])} the"
    " mean relative distance of what enters the model"
  )
  layers = [layer for layer in model["eq1"] if layer]
  if not layers:
    return f"no A, so no bound; {along}"
  low, high = _range(layers, "learned_ratio")
  words = f"E(h)/E(b) is {low:.2g} to {high:.2g}"
  if any(layer["kappa"] is None for layer in layers):
    low, high = _range([{"r": x["ratio"]["maximum"]} for x in layers], "r")
    words += (
      f" in the learned channels, {low:.2g} to {high:.2g} with the channel of"
      " decay 1, a sum over all tokens: κ is ∞ and nothing bounds it; the"
      " channel of decay 0 makes the theorem's joint factor 1, vacuous"
    )
  _, factor = _range(layers, "learned_factor")
  shown = "1, no contraction promised" if factor > 0.9995 else f"{factor:.3f}"
  words += f"; Theorem 4.2's factor is {shown}"
  if any(layer["learned_ratio"] > layer["learned_factor"] for layer in layers):
    words += ", and exceeded"
  low, _ = _range(layers, "learned_premise")
  words += (
    f", its A + Δ ≤ 1 met at {100 * _mean(layers, 'learned_premise'):.0f} %"
  )
  words += f" of learned (t, n) ({100 * low:.0f} % in the worst layer)"
  words += f", whole at {100 * _mean(layers, 'applies'):.0f} % of channels"
  fails = _mean(layers, "theorem_fails")
  words += (
    f"; its inequality by channel fails in {100 * fails:.1f} %"
    if fails
    else "; its inequality holds in every channel all the same"
  )
  fails = max(layer["kappa_fails"] for layer in layers)
  words += (
    f"; κ's holds in every channel that is centred"
    f" ({100 * _mean(layers, 'kappa_applies'):.0f} %)"
    if not fails
    else f"; κ's fails in {100 * fails:.1f} % of channels, a fault of ours"
  )
  low, high = _range(layers, "channel_ratio")
  _, kappa = _range(layers, "channel_kappa_factor")
  words += (
    f"; the median channel's ratio is {low:.2g} to {high:.2g} where κ allows"
    f" {kappa:.2g} at most, if centred"
  )
  if model["spread"]:
    words += (
      f"; A_max - A_min is below ½ in {100 * spread_share(model):.0f} % of"
      " channels over all t and n,"
      f" {100 * spread_share(model, 'token_spread'):.0f} % at one t"
    )
  return f"{words}; {along}"


def spread_share(
  model: dict[str, Any], name: str = "spread", below: float = 0.5
) -> float:
  """The share of the channels whose A_max - A_min is at most a half."""
  return float(np.interp(below, GRID, np.asarray(model[name], float)))


_LIMITS = (
  "Not shown: that what is smoothed was of use. E(h) < E(b) in a layer bounds"
  " nothing of the next, whose b is made anew; b and h are what Eq. 1 has, the"
  " mixer's output is behind gate, skip and projection. κ and E(h)/E(b) are of"
  " this text. Where n = 1 misses A + Δ ≤ 1 by Δ²/2, float32 counts it as met"
  " for Δ below 0.0014.",
)


def _table(models) -> list[str]:
  heads = (
    "model", "E(h)/E(b)", "Thm 4.2 factor", "κ form", "A + Δ ≤ 1", "applies",
    "κ median, max", "A_max - A_min < ½", "mixer, rel.", "block, rel.",
  )  # fmt: skip
  lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
  several = len({m["seed"] for m in models}) > 1
  for model in models:
    title = model["title"] + (f", seed {model['seed']}" if several else "")
    cells = [title, *_eq1_cells(model)]
    cells += [
      "→".join(f"{layer['relative']:.2f}" for layer in _ends(model[name]))
      for name in ("mixer", "block")
    ]
    lines.append("| " + " | ".join(cells) + " |")
  return lines


def _eq1_cells(model) -> list[str]:
  layers = [layer for layer in model["eq1"] if layer]
  if not layers:
    return ["none"] * 7
  low, high = _range(layers, "learned_ratio")
  _, factor = _range(layers, "theorem_factor")
  _, kappa = _range(layers, "learned_kappa_factor")
  medians = sorted(layer["kappa_median"] for layer in layers)
  held = any(layer["kappa"] is None for layer in layers)
  return [
    f"{low:.2g}–{high:.2g}",
    "1" if factor > 0.9995 else f"{factor:.3f}",
    f"{kappa:.2g}" + (" (one-channel ∞)" if held else ""),
    f"{100 * _mean(layers, 'premise'):.1f} %",
    f"{100 * _mean(layers, 'applies'):.1f} %",
    f"{medians[len(medians) // 2]:.2f}, {_range(layers, 'kappa_max')[1]:.2f}"
    + (", ∞" if held else ""),
    f"{100 * spread_share(model):.0f} %",
  ]


def _ends(layers):
  """The first and the last layer."""
  return layers if len(layers) == 1 else (layers[0], layers[-1])


def _range(layers, name) -> tuple[float, float]:
  values = [layer[name] for layer in layers if layer[name] is not None]
  return (min(values), max(values)) if values else (np.nan, np.inf)


def _mean(layers, name) -> float:
  return sum(layer[name] for layer in layers) / len(layers)


def _change(block, start) -> str:
  ratio = block[-1]["relative"] / start["relative"]
  return f"{ratio:.2f} times"
