"""The recall experiment's table and plot, drawn from its JSON alone."""

import collections
import functools
import json
import math
import os
import pathlib
from typing import Any

from experiments import recall_figure, recall_zoo_report
from experiments.compare import deviation, gain, mean
from experiments.recall_settings import PAPER_TABLE, Setting, identity
from experiments.recall_verdicts import sentences, verdicts
from experiments.results import write_json, write_text

__all__ = ["report", "verdict"]

_COLORS = {
  "default": "#7f7f7f",
  "one": "#1f77b4",
  "zero": "#ff7f0e",
  "both": "#2ca02c",
  "transformer": "#9467bd",
}


def report(out: pathlib.Path, made: Setting, preset: str) -> None:
  """Collect the finished seeds of `made`'s rows; print and write the report.

  Writes `results.json` (everything needed to redraw), `table.md` and
  `recall.png` under `out`. Results of another setting are left out, and said
  to be.
  """
  rows = _collect(out, made)
  if not rows:
    print(f"recall: no finished row under {out} yet.")
    return
  pairs = [config.num_pairs for config, _ in made.test.segments]
  found = verdicts(rows)
  write_json(
    out / "results.json",
    {"label": made.label, "preset": preset, "pairs": pairs, "rows": rows},
  )
  if preset == "zoo":
    text = recall_zoo_report.table(rows, pairs, made.label)
  else:
    effects = sentences(found) or verdict(rows, pairs)
    text = _table(rows, pairs, made.label, effects, preset.startswith("paper"))
  write_text(out / "table.md", text)
  if found:
    write_json(out / "verdicts.json", found)
  print("\n" + text)
  if preset == "zoo":
    chance = 200 / made.vocab_size
    recall_zoo_report.plot(rows, pairs, made.label, chance, out / "recall.png")
  elif preset == "cpu":
    recall_figure.plot(rows, made, out / "recall.png")
  else:
    _plot(rows, pairs, made.label, out / "recall.png", preset)
  print(f"Written: {out}/table.md, {out}/recall.png, {out}/results.json")


def _collect(out: pathlib.Path, made: Setting) -> list[dict[str, Any]]:
  """The finished seeds of each row, in the preset's order."""
  rows = []
  for row in made.rows:
    results = []
    for path in (out / row.name).glob("seed-*.json"):
      result = json.loads(path.read_text())
      if result["setting"] == identity(made, row):
        results.append(result)
      else:
        print(f"recall: {path} is of another setting and left out.")
    if not results:
      continue
    results.sort(key=lambda result: result["seed"])
    keys = [
      "seed",
      "steps",
      "accuracy",
      "distance",
      "curve",
      "commit",
      "device",
      "versions",
      "zoo",
    ]
    rows.append(
      {
        "row": row.name,
        "layers": row.layers,
        "polarized": row.polarization is not None,
        "parameters": results[0]["parameters"],
        "runs": [
          {key: result[key] for key in keys if key in result}
          for result in results
        ],
      }
    )
  return rows


def _table(rows, pairs, label, effects, theirs) -> str:
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
    columns = _columns(row, pairs)
    columns.append(_means(columns))
    cells = [row["row"], *map(_mean, columns), str(len(row["runs"]))]
    if theirs:
      paper = PAPER_TABLE.get(row["row"])
      cells.append(
        " / ".join(f"{x:.1f}" for x in paper) if paper else "not reported"
      )
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join([*lines, "", *effects, ""])


def verdict(rows: list[dict[str, Any]], pairs: list[int]) -> list[str]:
  """Say of each polarized row whether it beats the default of its depth.

  From three seeds on: a difference is an effect where it exceeds its 95 %
  confidence interval (Student's t, pooled degrees of freedom).
  """
  lines, few = [], False
  depths = {row["row"]: row for row in rows}
  for row in rows:
    base = depths.get(f"default-{row['layers']}")
    if base is None or not row["polarized"]:
      continue
    few |= min(len(row["runs"]), len(base["runs"])) < 3
    points = functools.partial(
      gain, unit="points", digits=1, more_is_better=True
    )
    at_most = points(*(_columns(r, pairs[-1:])[0] for r in (row, base)))
    overall = points(*(_means(_columns(r, pairs)) for r in (row, base)))
    lines.append(
      f"- {row['row']} against {base['row']}: {at_most} at {pairs[-1]} pairs;"
      f" {overall} in the mean"
    )
  if few:
    lines.append(
      "- n < 3: a difference between single seeds is not an effect; run"
      " more with --seeds 0 1 2."
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
    columns = _columns(row, pairs)
    means = [mean(c) for c in columns]
    deviations = [deviation(c) for c in columns]
    left.errorbar(
      pairs, means, deviations, capsize=3, label=row["row"], **style
    )
    paper = PAPER_TABLE.get(row["row"])
    if preset.startswith("paper") and paper:
      left.plot(pairs, paper, color=style["color"], linestyle=":", alpha=0.6)
    distances, accuracy = _over_distance(row["runs"], pairs[-1])
    right.plot(distances, accuracy, **style)
  left.set_xlabel("key-value pairs")
  left.set_xscale("log", base=2)
  left.set_xticks(pairs, [str(k) for k in pairs])
  right.set_xlabel(
    f"distance from key to query, tokens (with {pairs[-1]} pairs)"
  )
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
  temporary = path.with_suffix(f".{os.getpid()}.png")
  figure.savefig(temporary, dpi=150)
  os.replace(temporary, path)
  plt.close(figure)


def _over_distance(runs, pairs):
  """Accuracy by octave of distance over all seeds, at one number of pairs."""
  right: collections.Counter = collections.Counter()
  asked: collections.Counter = collections.Counter()
  for run in runs:
    for entry in run["distance"][str(pairs)]:
      right[entry["from"]] += entry["right"]
      asked[entry["from"]] += entry["asked"]
  # An octave with a handful of queries is noise.
  octaves = [o for o in sorted(asked) if asked[o] >= 50]
  middle = [o * math.sqrt(2) for o in octaves]
  return middle, [100 * right[o] / asked[o] for o in octaves]


def _columns(row, pairs) -> list[list[float]]:
  """Accuracy in per cent, for each number of pairs a list over seeds."""
  return [[100 * run["accuracy"][str(k)] for run in row["runs"]] for k in pairs]


def _means(columns) -> list[float]:
  """Of each seed, over the numbers of pairs."""
  return [mean(values) for values in zip(*columns, strict=True)]


def _mean(values) -> str:
  text = f"{mean(values):.1f}"
  if len(values) > 1:
    text += f" ± {deviation(values):.1f}"
  return text
