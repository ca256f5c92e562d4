"""The language models' table and plot, drawn from their JSON alone."""

import json
import os
import pathlib
from typing import Any

from experiments.compare import deviation, gain, mean
from experiments.lm_measure import baselines
from experiments.lm_runs import Text
from experiments.lm_settings import Setting, identity, result_file
from experiments.results import write_json, write_text

__all__ = ["report", "verdict", "write_baselines"]

_COLORS = {
  "default": "#7f7f7f",
  "one": "#1f77b4",
  "zero": "#ff7f0e",
  "both": "#2ca02c",
  "both-matched": "#17becf",
  "attention": "#9467bd",
}

_CODES = {
  "unigram": "unigram code of the bytes",
  "zlib": "zlib",
  "lzma": "lzma",
  "lzma_after_train": "lzma that has read the training text",
}


def write_baselines(out: pathlib.Path, text: Text) -> None:
  """Measure the baselines of a text, once: `baselines.json` under `out`."""
  about = {
    "train": text.train.fingerprint,
    "held_out": text.held_out.fingerprint,
  }
  path = out / "baselines.json"
  if path.exists() and json.loads(path.read_text())["text"] == about:
    return
  write_json(path, {"text": about, "bits_per_byte": baselines(text)})


def report(out: pathlib.Path, made: Setting, text: Text, preset: str) -> None:
  """Collect the finished seeds of `made`'s rows; print and write the report.

  Writes `results.json` (everything needed to redraw), `table.md` and `lm.png`
  under `out`. Results of another setting are left out, and said to be.
  """
  rows = _collect(out, made, text)
  if not rows:
    print(f"lm: no finished row under {out} yet.")
    return
  about = {
    "data": made.text.data or "sources of Python's standard library",
    "tokens": "bytes" if made.text.tokenizer is None else "tokenizer",
    "bytes_per_token": text.train.bytes_per_token,
    "train_bytes": text.train.num_bytes,
    "held_out_bytes": text.held_out.num_bytes,
    "train": text.train.fingerprint,
    "held_out": text.held_out.fingerprint,
  }
  found = json.loads((out / "baselines.json").read_text())
  results = {
    "label": made.label,
    "preset": preset,
    "text": about,
    "baselines": found["bits_per_byte"],
    "rows": rows,
  }
  write_json(out / "results.json", results)
  table = _table(results)
  write_text(out / "table.md", table)
  print("\n" + table)
  _plot(results, out / "lm.png")
  print(f"Written: {out}/table.md, {out}/lm.png, {out}/results.json")


def verdict(results: dict[str, Any]) -> list[str]:
  """Say what the figures show, and what they do not.

  Each row against the default of its depth; from three seeds on a difference
  is an effect where it exceeds its 95 % confidence interval (Student's t,
  pooled degrees of freedom). Then the best row against codes without a model.
  """
  rows = {row["row"]: row for row in results["rows"]}
  lines, few = [], False
  for row in results["rows"]:
    base = rows.get(f"default-{row['layers']}")
    if base is None or row is base:
      continue
    few |= min(len(row["runs"]), len(base["runs"])) < 3
    text = gain(
      _bits(row), _bits(base), "bits per byte", digits=3, more_is_better=False
    )
    lines.append(f"- {row['row']} against {base['row']}: {text}")
  if few:
    lines.append(
      "- n < 3: a difference between single seeds is not an effect, neither"
      " its size nor its sign; run more with --seeds 0 1 2."
    )
  best = min(results["rows"], key=lambda row: mean(_bits(row)))
  bits = mean(_bits(best))
  lines.append(f"- best is {best['row']} with {bits:.3f} bits per byte")
  for name, code in results["baselines"].items():
    if code is not None:
      word = "fewer" if bits < code else "more"
      lines[-1] += (
        f", {abs(bits - code):.2f} {word} than {_CODES[name]} ({code:.2f})"
      )
  lines[-1] += "."
  return lines


def _collect(out: pathlib.Path, made: Setting, text: Text):
  """The finished seeds of each row, in the preset's order."""
  rows = []
  for row in made.rows:
    found = []
    for path in (out / row.name).glob("seed-*.json"):
      result = json.loads(path.read_text())
      seed = result["seed"]
      if path != result_file(out, row, seed):
        continue
      if result["setting"] == identity(made, row, text, seed):
        found.append(result)
      else:
        print(f"lm: {path} is of another setting and left out.")
    if not found:
      continue
    found.sort(key=lambda result: result["seed"])
    keys = [
      *("seed", "steps", "held_out", "curve", "tokens_per_second", "sample"),
      *("commit", "device", "num_devices", "host", "python", "versions"),
    ]
    rows.append(
      {
        "row": row.name,
        "kind": row.kind,
        "layers": row.layers,
        "parameters": found[0]["parameters"],
        "setting": found[0]["setting"],
        "runs": [{key: result[key] for key in keys} for result in found],
      }
    )
  return rows


def _table(results) -> str:
  """Markdown: held-out bits per byte, mean ± standard deviation over seeds."""
  about = results["text"]
  heads = ["row", "parameters", "held-out bits per byte", "next token, %"]
  heads += ["tokens/s", "n"]
  lines = [
    f"Held-out bits per byte ({results['label']}; {about['data']},"
    f" {about['train_bytes'] / 1e6:.1f} MB, held out"
    f" {about['held_out_bytes'] / 1e6:.2f} MB, {about['tokens']})",
    "",
    "| " + " | ".join(heads) + " |",
    "|" + " --- |" * len(heads),
  ]
  for row in results["rows"]:
    runs = row["runs"]
    bits = f"{mean(_bits(row)):.3f}"
    if len(runs) > 1:
      bits += f" ± {deviation(_bits(row)):.3f}"
    accuracy = mean([100 * run["held_out"]["accuracy"] for run in runs])
    speed = mean([run["tokens_per_second"] for run in runs])
    cells = [row["row"], f"{row['parameters']:,}", bits, f"{accuracy:.1f}"]
    cells += [f"{speed:,.0f}", str(len(runs))]
    lines.append("| " + " | ".join(cells) + " |")
  for name, code in results["baselines"].items():
    if code is not None:
      cells = [_CODES[name], "", f"{code:.3f}", "", "", ""]
      lines.append("| " + " | ".join(cells) + " |")
  length = results["rows"][0]["setting"]["train"]["length"]
  note = (
    f"A model sees at most {length} tokens of what came before, zlib and lzma"
    " as much as they can hold. All rows have one learning rate."
  )
  return "\n".join([*lines, "", note, "", *verdict(results), ""])


def _plot(results, path: pathlib.Path) -> None:
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt
  from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

  figure, (left, right) = plt.subplots(
    1, 2, figsize=(11, 4.4), width_ratios=(3, 2)
  )
  depths = sorted({row["layers"] for row in results["rows"]})
  kinds: dict[str, list] = {}
  for row in results["rows"]:
    color = _COLORS[row["kind"]]
    # What is drawn first shows beside what lies on it.
    width = 3 if row["kind"] == "default" else 1.5
    line = ["-", "--", ":", "-."][depths.index(row["layers"]) % 4]
    for index, run in enumerate(row["runs"]):
      label = row["row"] if index == 0 else None
      tokens, bits = zip(*run["curve"]["train"], strict=True)
      left.plot(tokens, bits, line, color=color, alpha=0.4, linewidth=0.8)
      tokens, bits = zip(*run["curve"]["held_out"], strict=True)
      left.plot(
        tokens,
        bits,
        line,
        color=color,
        linewidth=width,
        marker="o",
        markersize=2 + width,
        label=label,
      )
    points = kinds.setdefault(row["kind"], [])
    place = depths.index(row["layers"]) + 0.08 * [*kinds].index(row["kind"])
    points += [(place, bits) for bits in _bits(row)]
  for kind, points in kinds.items():
    right.plot(
      *zip(*sorted(points), strict=True), "o-", color=_COLORS[kind], label=kind
    )
  for name, code in results["baselines"].items():
    if code is not None:
      for axes in (left, right):
        axes.axhline(code, color="black", linewidth=0.6, linestyle=":")
      right.annotate(
        name.replace("_", " "), (1, code), fontsize=7, va="bottom", ha="right",
        xycoords=("axes fraction", "data"),
      )  # fmt: skip
  left.set_xscale("log")
  left.set_xlabel("tokens of training")
  left.set_title("held out (points) and training (thin)", fontsize=9)
  right.set_xlabel("layers")
  right.set_xticks(range(len(depths)), [str(depth) for depth in depths])
  right.set_xlim(-0.5, len(depths) - 0.2)
  right.set_title("held out, at the end", fontsize=9)
  for axes in (left, right):
    axes.set_ylabel("bits per byte")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
  figure.suptitle(results["label"], fontsize=10)
  figure.tight_layout()
  temporary = path.with_suffix(f".{os.getpid()}.png")
  figure.savefig(temporary, dpi=150)
  os.replace(temporary, path)
  plt.close(figure)


def _bits(row) -> list[float]:
  """Held-out bits per byte of each seed."""
  return [run["held_out"]["bits_per_byte"] for run in row["runs"]]
