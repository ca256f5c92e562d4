"""The first figure: when models begin to remember, and how far back."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from experiments.plateau import share_that_left
from experiments.recall_settings import Setting
from experiments.recall_verdicts import HELD, remembers_at

__all__ = ["plot"]

# Rows that are drawn, with what they are called and their colours.
_ROWS = {
  "default-2": ("default", "#4d4d4d"),
  "zero-2": ("one channel at 0", "#e07b00"),
  "one-2": ("one channel at 1", "#1f6fb4"),
  "both-2": ("both", "#2a9134"),
  "both-matched-2": ("both, in place of two", "#a05195"),
}


def plot(
  rows: Sequence[dict[str, Any]], made: Setting, path: pathlib.Path
) -> None:
  """Draw the share of seeds that remember, and accuracy by distance.

  Args:
    rows: as in `results.json`, with the curves of every run.
    made: their setting.
    path: of the PNG, written whole or not at all.
  """
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.0))
  drawn = [row for row in rows if row["row"] in _ROWS and _has_curve(row)]
  for place, row in enumerate(drawn):
    name, color = _ROWS[row["row"]]
    steps = row["runs"][0]["curve"]["steps"]
    share = share_that_left([remembers_at(run) for run in row["runs"]], steps)
    # Equal curves lie beside each other, not on each other.
    shifted = [100 * s + 0.6 * (place - 2) for s in share]
    left.step([0, *steps], [0.6 * (place - 2), *shifted], where="post",
              color=color, label=name, linewidth=2)  # fmt: skip
    curves = [_by_distance(run) for run in row["runs"]]
    for distances, accuracy in curves:
      right.plot(distances, accuracy, color=color, linewidth=0.7, alpha=0.5)
    mean = [sum(v) / len(v) for v in zip(*(c[1] for c in curves), strict=True)]
    right.plot(curves[0][0], mean, color=color, linewidth=2.2, label=name)
  left.set_xlabel("training steps")
  left.set_ylabel(f"seeds that answer {100 * HELD:.0f} % right, %")
  left.set_title("One pair: when is its value remembered?", fontsize=10)
  right.set_xscale("log", base=2)
  right.xaxis.set_major_formatter("{x:g}")
  right.set_xlabel("tokens between key and query")
  right.set_ylabel("answers right, %")
  right.set_title("One pair, after training: how far back?", fontsize=10)
  chance = 100 / (made.vocab_size - made.vocab_size // 2)
  right.axhline(chance, color="black", linestyle=":", linewidth=1)
  right.text(0.99, chance + 1.5, "chance", ha="right", fontsize=8,
             transform=right.get_yaxis_transform())  # fmt: skip
  for axes in (left, right):
    axes.set_ylim(-4, 104)
    axes.grid(alpha=0.25)
  left.legend(fontsize=8, loc="upper left")
  seeds = len(drawn[0]["runs"]) if drawn else 0
  figure.suptitle(
    f"{made.label}; {seeds} seeds a row (thin lines), mean thick", fontsize=9
  )
  figure.tight_layout()
  temporary = path.with_suffix(f".{os.getpid()}.png")
  figure.savefig(temporary, dpi=150)
  os.replace(temporary, path)
  plt.close(figure)


def _has_curve(row: dict[str, Any]) -> bool:
  return all("curve" in run for run in row["runs"])


def _by_distance(run: dict[str, Any]) -> tuple[list[float], list[float]]:
  """Middle of each range of distances, and accuracy in per cent."""
  fewest = min(run["distance"], key=int)
  entries = [e for e in run["distance"][fewest] if e["asked"]]
  middle = [(e["from"] + e["below"]) / 2 for e in entries]
  return middle, [100 * e["right"] / e["asked"] for e in entries]
