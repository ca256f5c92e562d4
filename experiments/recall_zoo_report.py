"""The zoo's table and plot, drawn from its JSON alone."""

import os
import pathlib
from typing import Any

from experiments.compare import deviation, mean

__all__ = ["plot", "table"]

# Below it, a line is not what the curve of influence is.
_LINE = 0.9


def table(rows: list[dict[str, Any]], pairs: list[int], label: str) -> str:
  """Give the table in Markdown, a line for each kind, polarized beside plain.

  Args:
    rows: as `recall_report` collects them.
    pairs: numbers of pairs.
    label: of the setting.
  """
  counts = " / ".join(map(str, pairs))
  heads = [
    "kind", "parameters", "state", "tokens/s", f"{counts} pairs, %", "mean",
    "slope", "sharpness", f"both: {counts} pairs, %", "mean", "slope",
    "sharpness",
  ]  # fmt: skip
  lines = [
    f"Every kind of mixer ({label})",
    "",
    "| " + " | ".join(heads) + " |",
    "|" + " --- |" * len(heads),
  ]
  for kind, (plain, both) in _kinds(rows).items():
    sizes = [_sizes(row) for row in (plain, both) if row]
    # The polarized model's beside the plain one's.
    cells = [" / ".join(values) for values in zip(*sizes, strict=True)]
    cells += [*_cells(plain, pairs), *_cells(both, pairs)]
    lines.append(f"| {kind} | " + " | ".join(cells) + " |")
  return "\n".join([*lines, "", *_notes(rows, pairs), ""])


def plot(
  rows: list[dict[str, Any]],
  pairs: list[int],
  label: str,
  chance: float,
  path: pathlib.Path,
) -> None:
  """Draw accuracy by kind and number of pairs, and against the state's size.

  Args:
    rows: as for the table.
    pairs: numbers of pairs.
    label: of the setting.
    chance: accuracy of a guess, from 0 to 100.
    path: of the PNG.
  """
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  kinds = _kinds(rows)
  best = lambda kind: max(_mean(row, pairs) for row in kinds[kind] if row)
  order = sorted(kinds, key=best)
  height = max(4.0, 0.3 * len(order) + 1.5)
  figure, (left, right) = plt.subplots(1, 2, figsize=(12, height))
  shades = plt.get_cmap("viridis")
  for place, kind in enumerate(order):
    for row, sign, marker in zip(kinds[kind], (1, -1), "os", strict=True):
      if row is None:
        continue
      for i, count in enumerate(pairs):
        values = _accuracies(row, count)
        left.errorbar(
          mean(values), place + 0.15 * sign, xerr=deviation(values) or None,
          color=shades(0.85 * i / max(1, len(pairs) - 1)), marker=marker,
          markersize=6, linestyle="none", capsize=2,
          markerfacecolor=None if row is kinds[kind][0] else "white",
        )  # fmt: skip
  for i, count in enumerate(pairs):
    color = shades(0.85 * i / max(1, len(pairs) - 1))
    left.plot([], [], "o", color=color, label=f"{count} pairs")
    left.axvline(100 / count, color=color, linestyle="--", linewidth=0.8)
  left.plot([], [], "s", color="black", markerfacecolor="white", label="both")
  left.set_yticks(range(len(order)), order)
  left.set_xlabel("accuracy, %")
  left.set_xlim(0, 102)
  right.set_xscale("log", base=2)
  right.xaxis.set_major_formatter("{x:,.0f}")
  right.set_xlabel("state, numbers")
  right.set_ylabel("accuracy, mean over pairs, %")
  right.set_ylim(0, 102)
  seen = mean([100 / count for count in pairs])
  right.axhline(seen, color="grey", linestyle="--", linewidth=0.8)
  left.axvline(chance, color="grey", linestyle=":", label="chance")
  right.axhline(chance, color="grey", linestyle=":")
  left.plot([], [], "--", color="grey", label="one of the values shown")
  left.legend(fontsize=8, loc="lower right")
  for axes in (left, right):
    axes.grid(alpha=0.3)
  figure.suptitle(label, fontsize=10)
  figure.tight_layout()
  _points(right, kinds, pairs)
  temporary = path.with_suffix(f".{os.getpid()}.png")
  figure.savefig(temporary, dpi=130)
  os.replace(temporary, path)
  plt.close(figure)


def _points(axes, kinds, pairs) -> None:
  """Put a named point for each row; a name that finds no room goes down."""
  points = [
    (kind, row, row["runs"][0]["zoo"]["state"], _mean(row, pairs))
    for kind, both in kinds.items()
    for row in both
    if row
  ]
  for kind, row, *at in points:
    plain = row is kinds[kind][0]
    face = None if plain else "white"
    axes.plot(*at, "os"[not plain], color="#1f77b4", markerfacecolor=face)
  low, high = axes.get_xlim()
  axes.set_xlim(low, 1.4 * high)
  # In points of the page, so that room is where the reader sees it.
  scale = 72 / axes.figure.dpi
  taken: list[tuple[float, float]] = []
  for kind, row, *at in sorted(points, key=lambda point: -point[-1]):
    name = kind if row is kinds[kind][0] else f"{kind}-both"
    x, y = scale * axes.transData.transform(at)
    place = y
    while any(
      abs(x - left) < _NAME[0] and abs(place - low) < _NAME[1]
      for left, low in taken
    ):
      place -= 1
    taken.append((x, place))
    axes.annotate(
      name, at, xytext=(7, place - y - 2), textcoords="offset points",
      fontsize=6, arrowprops=dict(arrowstyle="-", color="grey", linewidth=0.3),
    )  # fmt: skip


# Width and height of a name, in points.
_NAME = (52, 7)


def _notes(rows, pairs) -> tuple[str, ...]:
  counts = {len(row["runs"]) for row in rows}
  seeds = " or ".join(map(str, sorted(counts)))
  seeds += " seed" if counts == {1} else " seeds"
  shown = " / ".join(f"{100 / count:.3g}" for count in pairs)
  return (
    f"Accuracy at 32 tokens, mean over {seeds} (± standard deviation where"
    " there are more than one); a guess is right in one of half the vocabulary,"
    " a model that knows which values were shown but not with which key in"
    f" about {shown} %. State: numbers carried from token to token by all"
    " layers, convolutions included; attention's and Hyena's are for 32"
    " tokens. Tokens/s: of training, the median of the run's later half, all"
    " seeds together. Parameters, state and tokens/s of the plain model / of"
    " the polarized one: held heads and channels are added to the learned.",
    "Slope: of the logarithm of influence, per token, fresh → trained, fitted"
    " on 128 random tokens between the lags that convolutions reach and 64; ~"
    f" where it is no line (R² below {_LINE}). Sharpness: relative sharpness"
    " (mean pairwise distance over mean norm) of the trained blocks' outputs,"
    " first → last layer.",
  )


def _kinds(rows):
  """By kind: its plain row and its polarized one, or None."""
  kinds: dict[str, list] = {}
  for row in rows:
    kind = row["runs"][0]["zoo"]["kind"]
    kinds.setdefault(kind, [None, None])[row["polarized"]] = row
  return {kind: tuple(found) for kind, found in kinds.items()}


def _cells(row, pairs) -> list[str]:
  """Accuracies, their mean, slope and sharpness of a row."""
  if row is None:
    return ["", "", "", ""]
  every = [_accuracies(row, count) for count in pairs]
  middle = [mean(values) for values in zip(*every, strict=True)]
  zoo = [run["zoo"] for run in row["runs"]]
  ends = [mean([z["trained"]["block"][i] for z in zoo]) for i in (0, -1)]
  return [
    " / ".join(_spread(values) for values in every),
    _spread(middle),
    " → ".join(_slope(zoo, stage) for stage in ("fresh", "trained")),
    " → ".join(f"{end:.2f}" for end in ends),
  ]


def _sizes(row) -> list[str]:
  """Parameters, state and speed of a row."""
  speed = mean([run["zoo"]["tokens_per_second"] for run in row["runs"]])
  state = row["runs"][0]["zoo"]["state"]
  return [f"{row['parameters']:,}", f"{state:,}", f"{speed:,.0f}"]


def _slope(zoo, stage) -> str:
  slopes = [z[stage]["slope"] for z in zoo if z[stage]["slope"]]
  if not slopes:
    return "too few lags"
  straight = mean([s["r_squared"] for s in slopes]) >= _LINE
  slope = mean([s["slope"] for s in slopes])
  return ("" if straight else "~") + f"{slope:+.3f}"


def _accuracies(row, count) -> list[float]:
  return [100 * run["accuracy"][str(count)] for run in row["runs"]]


def _mean(row, pairs) -> float:
  return mean([mean(_accuracies(row, count)) for count in pairs])


def _spread(values) -> str:
  text = f"{mean(values):.1f}"
  if len(values) > 1:
    text += f" ± {deviation(values):.1f}"
  return text
