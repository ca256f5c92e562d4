"""When runs leave a plateau: times that may be censored, and their tests.

A run of the recall task guesses among the values shown for hundreds of steps
and then, suddenly, has the answers. Final accuracies mix those who left with
those who did not; the step at which a run leaves says more, and is known for a
run that has not left by the end only to be later ("censored").
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = [
  "Difference",
  "difference_of_means",
  "left_at",
  "log_rank",
  "restricted_difference",
  "share_that_left",
]

# Resamples of a bootstrap, and permutations drawn where there are too many.
_DRAWS = 20_000


class Difference(NamedTuple):
  """A difference of two groups' means, with its 95 % interval.

  Attributes:
    effect: mean of the first group less that of the second.
    low: lower end of the interval.
    high: upper end.
    p: two-sided probability, among all ways to deal the runs into the two
      groups, of a difference at least as large.
  """

  effect: float
  low: float
  high: float
  p: float


def left_at(
  steps: Sequence[int], accuracy: Sequence[float], threshold: float
) -> int | None:
  """Find the step from which on accuracy stays above the threshold.

  Args:
    steps: at which a run was measured, ascending.
    accuracy: at those steps.
    threshold: what counts as having left.

  Returns:
    The step, or None for a run that is not above it at the end.
  """
  left = None
  for step, value in zip(steps, accuracy, strict=True):
    if value <= threshold:
      left = None
    elif left is None:
      left = step
  return left


def share_that_left(
  times: Sequence[int | None], steps: Sequence[int]
) -> list[float]:
  """Give the share of runs that have left the plateau by each step.

  All runs are of one length, so that 1 less this is the Kaplan-Meier curve.
  """
  return [
    sum(t is not None and t <= step for t in times) / len(times)
    for step in steps
  ]


def restricted_difference(
  first: Sequence[int | None], second: Sequence[int | None], horizon: int
) -> Difference:
  """Compare the steps that runs spend on the plateau, up to a horizon.

  A run that has not left counts with the whole horizon (the restricted mean
  survival time, Royston & Parmar 2013).
  """

  def spent(times):
    return [horizon if t is None else min(t, horizon) for t in times]

  return difference_of_means(spent(first), spent(second))


def difference_of_means(
  first: Sequence[float], second: Sequence[float]
) -> Difference:
  """Compare two groups of runs.

  The interval is the percentile bootstrap's, runs of each group drawn with
  replacement and their deviations enlarged by √(n/(n - 1)), without which it
  is too narrow for few runs. The generator has a fixed seed.
  """
  rng = np.random.default_rng(0)
  a, b = np.asarray(first, float), np.asarray(second, float)
  effect = float(a.mean() - b.mean())

  def resampled(x):
    drawn = rng.choice(x, (_DRAWS, len(x))).mean(1) - x.mean()
    return drawn * math.sqrt(len(x) / max(len(x) - 1, 1))

  low, high = np.percentile(effect + resampled(a) - resampled(b), (2.5, 97.5))
  p = _permuted(a, b, _means_apart)
  return Difference(effect, float(low), float(high), p)


def log_rank(
  first: Sequence[int | None], second: Sequence[int | None]
) -> float:
  """Compare the times of two groups by the log-rank test.

  Returns:
    The two-sided probability by permutation of the groups: exact where there
    are at most 20,000 ways to deal the runs, else from as many draws.
  """
  times = np.array([math.inf if t is None else t for t in (*first, *second)])

  def statistic(times, chosen):
    """Observed less expected leavings of the chosen group."""
    total = 0.0
    for t in np.unique(times[np.isfinite(times)]):
      at_risk, leave = times >= t, times == t
      total += (leave & chosen).sum()
      total -= leave.sum() * (at_risk & chosen).sum() / at_risk.sum()
    return total

  return _permuted(times[: len(first)], times[len(first) :], statistic)


def _means_apart(values, chosen):
  return values[chosen].mean() - values[~chosen].mean()


def _permuted(first, second, statistic) -> float:
  """How often dealt groups differ as much as the given ones, two-sided."""
  values, size = np.concatenate([first, second]), len(first)
  whole = np.arange(len(values))
  observed = abs(statistic(values, whole < size))
  deals: Iterable[Any] = itertools.combinations(whole, size)
  if math.comb(len(values), size) > _DRAWS:
    rng = np.random.default_rng(0)
    deals = (rng.permutation(whole)[:size] for _ in range(_DRAWS // 10))
  found = [
    abs(statistic(values, np.isin(whole, deal))) >= observed - 1e-9
    for deal in deals
  ]
  return float(np.mean(found))
