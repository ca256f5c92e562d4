"""The recall experiment's table and plot, drawn from its JSON alone."""

import collections
import json
import math
import os
import pathlib
from typing import Any

from experiments.recall_settings import PAPER_TABLE, Setting
from experiments.results import write_json

__all__ = ["report"]

_COLORS = {
  "default": "#7f7f7f",
  "one": "#1f77b4",
  "zero": "#ff7f0e",
  "both": "#2ca02c",
  "transformer": "#9467bd",
}


def report(out: pathlib.Path, made: Setting, preset: str) -> None:
  """Collect the finished rows under `out`; print and write table and plot.

  Writes `results.json` (everything needed to redraw), `table.md` and
  `recall.png`. Rows of another label than `made`'s are left out.
  """
  rows = _collect(out, made)
  if not rows:
    print(f"recall: no finished row under {out} yet.")
    return
  pairs = [config.num_pairs for config, _ in made.test.segments]
  write_json(
    out / "results.json",
    {"label": made.label, "preset": preset, "pairs": pairs, "rows": rows},
  )
  text = _table(rows, pairs, made.label, theirs=preset.startswith("paper"))
  _write_text(out / "table.md", text)
  print("\n" + text)
  _plot(rows, pairs, made.label, out / "recall.png", preset)
  print(f"Written: {out}/table.md, {out}/recall.png, {out}/results.json")


def _collect(out: pathlib.Path, made: Setting) -> list[dict[str, Any]]:
  """The finished rows in the preset's order, seeds of a row together."""
  order = {row.name: i for i, row in enumerate(made.rows)}
  found: dict[str, list] = collections.defaultdict(list)
  for path in sorted(out.glob("*/seeds-*/result.json")):
    result = json.loads(path.read_text())
    if result["label"] == made.label and result["row"] in order:
      found[result["row"]].append(result)
  rows = []
  for name in sorted(found, key=order.__getitem__):
    results = found[name]
    rows.append(
      {
        "row": name,
        "layers": results[0]["layers"],
        "parameters": results[0]["parameters"],
        "steps": [r["steps"] for r in results],
        "commits": sorted({r["commit"] for r in results}),
        "device": sorted({r["device"] for r in results}),
        "seeds": [s for r in results for s in r["seeds"]],
        "accuracy": [a for r in results for a in r["accuracy"]],
        "distance": [d for r in results for d in r["distance"]],
      }
    )
  return rows


def _table(rows, pairs, label, theirs) -> str:
  """Markdown: accuracy in per cent, mean ± standard deviation over seeds."""
  heads = ["row", *(f"{k} pairs" for k in pairs), "mean", "n"]
  if theirs:
    heads += ["Wang et al. 2025, Table 2/5"]
  lines = [
    f"Accuracy in per cent ({label})",
    "",
    "| " + " | ".join(heads) + " |",
    "|" + " --- |" * len(heads),
  ]
  for row in rows:
    columns = [[a[str(k)] for a in row["accuracy"]] for k in pairs]
    columns.append([sum(a.values()) / len(a) for a in row["accuracy"]])
    cells = [row["row"], *map(_mean, columns), str(len(row["seeds"]))]
    if theirs:
      paper = PAPER_TABLE.get(row["row"])
      cells.append(
        " / ".join(f"{x:.1f}" for x in paper) if paper else "not reported"
      )
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join([*lines, "", *verdict(rows, pairs), ""])


def verdict(rows, pairs) -> list[str]:
  """Say of each polarized row whether it beats the default of its depth."""
  lines = []
  most = str(pairs[-1])
  scores = {
    row["row"]: [a[most] for a in row["accuracy"]] for row in rows
  }  # fmt: skip
  for row in rows:
    base = scores.get(f"default-{row['layers']}")
    if base is None or row["row"].startswith("default"):
      continue
    mine = scores[row["row"]]
    gain = 100 * (_average(mine) - _average(base))
    noise = 100 * 2 * math.hypot(_error(mine), _error(base))
    if gain > max(noise, 1.0):
      word = "better"
    elif gain < -max(noise, 1.0):
      word = "worse"
    else:
      word = "no effect seen at this scale"
    lines.append(
      f"- {row['row']} against default-{row['layers']} at {most} pairs:"
      f" {gain:+.1f} points, {word}"
    )
  few = min(len(row["seeds"]) for row in rows)
  if few < 3:
    lines.append(
      f"- n = {few} seed{'s' * (few > 1)}: run more with --seeds 0 1 2 …;"
      " a difference of one seed is not an effect."
    )
  return lines


def _plot(rows, pairs, label, path: pathlib.Path, preset) -> None:
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt
  from matplotlib.ticker import FuncFormatter, NullFormatter

  plain = FuncFormatter(lambda x, _: f"{x:g}")
  figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
  for row in rows:
    kind = row["row"].split("-")[0]
    style = {
      "color": _COLORS.get(kind, "black"),
      "linestyle": "--" if "matched" in row["row"] else "-",
      "marker": {2: "o", 4: "s"}.get(row["layers"], "^"),
      "markersize": 5,
    }
    columns = [[100 * a[str(k)] for a in row["accuracy"]] for k in pairs]
    means = [_average(c) for c in columns]
    deviations = [_deviation(c) for c in columns]
    left.errorbar(
      pairs, means, deviations, capsize=3, label=row["row"], **style
    )
    paper = PAPER_TABLE.get(row["row"])
    if preset.startswith("paper") and paper:
      left.plot(pairs, paper, color=style["color"], linestyle=":", alpha=0.6)
    distances, accuracy = _over_distance(row["distance"])
    right.plot(distances, accuracy, **style)
  left.set_xlabel("key-value pairs")
  left.set_xscale("log", base=2)
  left.set_xticks(pairs, [str(k) for k in pairs])
  right.set_xlabel("distance from key to query, tokens")
  right.set_xscale("log", base=2)
  right.xaxis.set_major_formatter(plain)
  right.xaxis.set_minor_formatter(NullFormatter())
  for axes in (left, right):
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(-2, 102)
    axes.grid(alpha=0.3)
  left.legend(fontsize=8)
  title = label
  if preset.startswith("paper"):
    title += " (dotted: Wang et al. 2025)"
  figure.suptitle(title, fontsize=10)
  figure.tight_layout()
  temporary = path.with_suffix(".tmp.png")
  figure.savefig(temporary, dpi=150)
  os.replace(temporary, path)
  plt.close(figure)


def _over_distance(distances):
  """Accuracy by octave of distance over all numbers of pairs and seeds."""
  right: collections.Counter = collections.Counter()
  asked: collections.Counter = collections.Counter()
  for seed in distances:
    for bins in seed.values():
      for entry in bins:
        right[entry["from"]] += entry["right"]
        asked[entry["from"]] += entry["asked"]
  # An octave with a handful of queries is noise.
  octaves = [o for o in sorted(asked) if asked[o] >= 50]
  middle = [o * math.sqrt(2) for o in octaves]
  return middle, [100 * right[o] / asked[o] for o in octaves]


def _mean(values) -> str:
  text = f"{100 * _average(values):.1f}"
  if len(values) > 1:
    text += f" ± {100 * _deviation(values):.1f}"
  return text


def _average(values) -> float:
  return sum(values) / len(values)


def _deviation(values) -> float:
  if len(values) < 2:
    return 0.0
  mean = _average(values)
  return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def _error(values) -> float:
  """Standard error of the mean; nothing is known of it from one seed."""
  return _deviation(values) / math.sqrt(len(values))


def _write_text(path: pathlib.Path, text: str) -> None:
  temporary = path.with_suffix(path.suffix + ".tmp")
  temporary.write_text(text)
  os.replace(temporary, path)
