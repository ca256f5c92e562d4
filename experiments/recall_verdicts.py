"""Judge the paper's claims by the rows of the recall experiment.

Every claim is a difference between two rows over seeds, with an interval. It
is *shown* where the interval is on the claimed side of zero and a permutation
of the seeds says so too, *contradicted* where both are on the other side, and
otherwise *not shown*.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from experiments.plateau import (
  Difference,
  difference_of_means,
  left_at,
  log_rank,
  restricted_difference,
)

__all__ = [
  "HELD",
  "Claim",
  "remembers_at",
  "sentences",
  "solves_at",
  "verdicts",
]

# A value is held where one pair alone is answered so often.
HELD = 0.9
# Fewer seeds a row say nothing.
_SEEDS = 3


@dataclasses.dataclass(frozen=True)
class Claim:
  """A claim about one row against another.

  Attributes:
    text: the claim.
    row: that it is about.
    base: what it is compared with.
    measure: of a row's runs, one number a seed.
    unit: of the effect.
    sign: of the effect that the claim predicts.
    times: the measure gives steps, None for a run that never gets there.
  """

  text: str
  row: str
  base: str
  measure: Callable[[dict[str, Any]], Any]
  unit: str
  sign: int
  times: bool = False


def remembers_at(run: dict[str, Any]) -> int | None:
  """Find the step from which a run answers where one pair is shown."""
  curve = run["curve"]
  return left_at(curve["steps"], curve[_fewest(run)], HELD)


def solves_at(run: dict[str, Any]) -> int | None:
  """Find the step at which a run leaves the guess among the values shown.

  At the largest number of pairs K, where guessing is right once in K; to have
  left is to be right more than twice as often.
  """
  curve = run["curve"]
  most = max(_numbers(run))
  return left_at(curve["steps"], curve[str(most)], min(2 / most, HELD))


def far_accuracy(run: dict[str, Any]) -> float:
  """Accuracy in per cent, one pair shown, at the largest octave of distance."""
  far = max(run["distance"][_fewest(run)], key=lambda entry: entry["from"])
  return 100 * far["right"] / far["asked"]


def _claims() -> list[Claim]:
  """The claims, in the order in which they are told."""
  default = "default-2"

  def sooner(text: str, row: str, base: str = default) -> Claim:
    return Claim(text, row, base, remembers_at, "steps", -1, times=True)

  def farther(text: str, row: str) -> Claim:
    return Claim(text, row, default, far_accuracy, "points", 1)

  found = []
  for row, words in (
    ("one-2", "one channel at decay 1"),
    ("zero-2", "one channel at decay 0 alone"),
    ("both-2", "both"),
    ("both-matched-2", "both in place of learned channels"),
  ):
    found += [
      sooner(f"With {words} a model remembers sooner", row),
      farther(f"With {words} a model remembers what is farthest back", row),
    ]
  own = "default-own-steps-2"
  return [
    *found,
    Claim(
      "With both a model tells pairs apart sooner",
      "both-2",
      default,
      solves_at,
      "steps",
      -1,
      times=True,
    ),
    sooner("With Mamba's own step sizes a model remembers sooner", own),
    sooner(
      "With both it remembers sooner under Mamba's own step sizes, too",
      "both-own-steps-2",
      own,
    ),
  ]


def verdicts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Judge every claim whose two rows are there with three seeds or more.

  Args:
    rows: as in `results.json`.

  Returns:
    For each claim its text, `verdict` ("shown", "not shown", "contradicted"),
    `effect` (the row less its base), `interval` (95 %), `unit`, `p`, the rows
    and the seeds of both; of steps also `log_rank_p`.
  """
  by_name = {row["row"]: row["runs"] for row in rows}
  found = []
  for claim in _claims():
    mine, base = by_name.get(claim.row, []), by_name.get(claim.base, [])
    if min(len(mine), len(base)) < _SEEDS or "curve" not in mine[0]:
      continue
    first = [claim.measure(run) for run in mine]
    second = [claim.measure(run) for run in base]
    if claim.times:
      horizon = max(run["curve"]["steps"][-1] for run in (*mine, *base))
      difference = restricted_difference(first, second, horizon)
    else:
      difference = difference_of_means(first, second)
    entry: dict[str, Any] = {
      "claim": claim.text,
      "verdict": _verdict(difference, claim.sign),
      "effect": round(difference.effect, 2),
      "interval": [round(difference.low, 2), round(difference.high, 2)],
      "unit": claim.unit,
      "p": round(difference.p, 4),
      "row": claim.row,
      "base": claim.base,
      "seeds": sorted({run["seed"] for run in mine}),
      "base_seeds": sorted({run["seed"] for run in base}),
    }
    if claim.times:
      entry["log_rank_p"] = round(log_rank(first, second), 4)
    found.append(entry)
  return found


def _verdict(difference: Difference, sign: int) -> str:
  low, high = sorted((sign * difference.low, sign * difference.high))
  if difference.p >= 0.05 or low <= 0 <= high:
    return "not shown"
  return "shown" if low > 0 else "contradicted"


def sentences(found: Sequence[dict[str, Any]]) -> list[str]:
  """Say the verdicts in words."""
  return [
    f"- {v['claim']}: **{v['verdict']}** ({v['effect']:+g} {v['unit']}, 95 %"
    f" interval {v['interval'][0]:+g} to {v['interval'][1]:+g}; {v['row']}"
    f" against {v['base']}, {len(v['seeds'])} and {len(v['base_seeds'])} seeds)"
    for v in found
  ]


def _numbers(run: dict[str, Any]) -> list[int]:
  return [int(k) for k in run["accuracy"]]


def _fewest(run: dict[str, Any]) -> str:
  return str(min(_numbers(run)))
