"""Means over seeds, and whether two of them differ."""

import math
from collections.abc import Sequence

from scipy import stats

__all__ = ["deviation", "gain", "mean"]


def mean(values: Sequence[float]) -> float:
  """The mean."""
  return sum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
  """The standard deviation of a sample; 0 for a single value."""
  if len(values) < 2:
    return 0.0
  middle = mean(values)
  square = sum((v - middle) ** 2 for v in values)
  return math.sqrt(square / (len(values) - 1))


def gain(
  mine: Sequence[float],
  base: Sequence[float],
  unit: str,
  *,
  digits: int,
  more_is_better: bool,
) -> str:
  """Say by how much the mean of `mine` is above that of `base`.

  From three seeds each on with the 95 % interval of the difference (Student's
  t with as many degrees of freedom as there are runs, less two) and a verdict.
  """
  difference = mean(mine) - mean(base)
  if min(len(mine), len(base)) < 3:
    return f"{difference:+.{digits}f} {unit}"
  error = math.hypot(
    deviation(mine) / math.sqrt(len(mine)),
    deviation(base) / math.sqrt(len(base)),
  )
  noise = stats.t.ppf(0.975, len(mine) + len(base) - 2) * error
  word = "better" if (difference > 0) == more_is_better else "worse"
  if abs(difference) <= noise:
    word = "no effect shown at this scale"
  return f"{difference:+.{digits}f} ± {noise:.{digits}f} {unit} ({word})"
