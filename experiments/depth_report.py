"""The table of depths, from its JSON alone."""

import json
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

from experiments.results import write_json, write_text

__all__ = ["report", "table", "write_results"]

# Below it, a line is not what the curve of influence is.
LINE = 0.98


def write_results(
  out: pathlib.Path, setting: dict[str, Any], results: list[dict[str, Any]]
) -> None:
  """Write `results.json`, everything that the table is made of.

  The curves, and what else is known of a layer, are in the models' own files.
  """
  kept = []
  for result in results:
    short = {k: v for k, v in result.items() if k != "setting"}
    influence, smoothing = short["influence"], short["smoothing"]
    short["influence"] = _only(influence, ("slope", "log_a_max"))
    short["influence"]["eq1"] = [
      _only(layer, ("learned_log_a_max",)) for layer in influence["eq1"]
    ]
    short["smoothing"] = {
      "eq1": [_only(layer, _EQ1) for layer in smoothing["eq1"]],
      **{
        name: [_only(layer, ("relative",)) for layer in smoothing[name]]
        for name in ("mixer", "block")
      },
    }
    kept.append(short)
  write_json(out / "results.json", {"setting": setting, "models": kept})


def report(out: pathlib.Path) -> None:
  """Print and write the table and what it says.

  Raises:
    SystemExit: there are no results.
  """
  path = out / "results.json"
  if not path.exists():
    raise SystemExit(
      f"depth: there is no {path}, expected results. Run the command without"
      " --report-only."
    )
  found = json.loads(path.read_text())
  text = "\n".join([*table(found["models"], found["setting"]), ""])
  write_text(out / "table.md", text)
  print("\n" + text)
  print(f"Written in {out}: results.json, table.md")


def table(models: list[dict[str, Any]], setting: dict[str, Any]) -> list[str]:
  """Give the table in Markdown: mean ± standard deviation over seeds."""
  groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
  for model in models:
    groups.setdefault((model["title"], model["step"]), []).append(model)
  heads = (
    "model", "layers", "slope", "R²", "log A_max", "A + Δ ≤ 1", "κ median",
    "κ max", "E(h)/E(b)", "mixer", "block", "n",
  )  # fmt: skip
  lines = [
    f"By depth: {setting['rows']} rows of {setting['length']} tokens;"
    " influence's fitted slope per token, natural logarithm; relative"
    " sharpness (mean pairwise distance over mean norm) of the mixer's and the"
    " block's output, first → last layer; mean ± standard deviation over n"
    " seeds",
    "",
    "| " + " | ".join(heads) + " |",
    "|" + " --- |" * len(heads),
  ]
  for group in groups.values():
    cells = [group[0]["title"], str(group[0]["layers"]), *_slope(group)]
    cells += _eq1(group)
    cells += [_ends(group, name) for name in ("mixer", "block")]
    lines.append("| " + " | ".join([*cells, str(len(group))]) + " |")
  return [*lines, "", *_NOTES]


_NOTES = (
  "Slopes are fitted between the lags that convolutions reach (3 a layer) and"
  f" half of the text. Where R² is below {LINE}, it is no line: the slope is a"
  " mean over lags then, and depends on their range. Flat: no seed's 95 %"
  " interval leaves 0 out.",
  "log A_max is the largest over layers and tokens, and the slope's bound in"
  ' the limit of far lags. "0, vacuous": a channel of decay 1 makes it 0, and'
  " Theorem 3.1 says nothing; in brackets, of the learned channels alone.",
  "A + Δ ≤ 1: share of (t, n), fixed channels included; a mean over layers. κ"
  " is of learned channels: the median channel's, and the largest of all; of a"
  " channel of decay 1 it is infinite. E(h)/E(b): of learned channels, by"
  " extremes, mean over layers.",
  '"none": attention has no A and no state, hence no bound and no κ.',
)


_EQ1 = ("premise", "kappa_median", "kappa_max", "learned_ratio")


def _only(found, names):
  return found and {name: found[name] for name in names}


def _slope(group) -> list[str]:
  slopes = [m["influence"]["slope"] for m in group]
  if None in slopes:
    return ["too few lags", ""]
  line = statistics.fmean(s["r_squared"] for s in slopes)
  words = _spread([s["slope"] for s in slopes], "{:+.5f}")
  if all(s["low"] <= 0 <= s["high"] for s in slopes):
    words += ", flat"
  elif line < LINE:
    words += ", no line"
  return [words, f"{line:.3f}"]


def _eq1(group) -> list[str]:
  layers = lambda m, part: [layer for layer in m[part]["eq1"] if layer]
  if not layers(group[0], "smoothing"):
    return ["none"] * 5
  over: Callable[[str, str, Callable], list[float]]
  over = lambda part, name, reduce: [
    reduce(layer[name] for layer in layers(m, part)) for m in group
  ]
  bound = [m["influence"]["log_a_max"] for m in group]
  learned = over("influence", "learned_log_a_max", max)
  words = _spread(learned, "{:+.2g}")
  if not any(bound):
    words = f"0, vacuous ({words})"
  premise = [100 * v for v in over("smoothing", "premise", statistics.fmean)]
  return [
    words,
    _spread(premise, "{:.1f}") + " %",
    _spread(over("smoothing", "kappa_median", statistics.median), "{:.2f}"),
    _spread(over("smoothing", "kappa_max", max), "{:.2f}"),
    _spread(over("smoothing", "learned_ratio", statistics.fmean), "{:.2f}"),
  ]


def _ends(group, name) -> str:
  at = lambda i: _spread(
    [m["smoothing"][name][i]["relative"] for m in group], "{:.2f}"
  )
  return f"{at(0)} → {at(-1)}"


def _spread(values, form) -> str:
  values = list(values)
  text = form.format(statistics.fmean(values))
  if len(values) > 1:
    text += " ± " + form.replace("+", "").format(statistics.stdev(values))
  return text
