"""The decays that a layer really uses: how they are spread, how long they last.

Eq. 1's Aₜ on a given input. The axes *S of a recurrence are channels, and in
most layers the last of them numbers the states of one channel (S6: D and N).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from ssmjax.theory.eq1 import canonical
from ssmjax.theory.extremes import largest, smallest
from ssmjax.types import (
  Array,
  Bool,
  Float,
  Recurrence,
  check_shapes,
  gathered,
  real_dtype,
)

__all__ = ["Spectrum", "cumulative_share", "memory_length", "spectrum"]


class Spectrum(NamedTuple):
  """The distribution of |Aₜ| in one layer; *C are its channels.

  Attributes:
    edges: of the histogram's bins, over [0, 1], `[bins + 1]`.
    histogram: share of all (row, t, n) in each bin, `[bins]`; the last one
      holds decays of 1 and above too. NaN is in none, so that the shares add
      up to less than 1.
    levels: of the quantiles, `[Q]`.
    quantiles: of |A| over rows, t and a channel's states, `[Q, *C]`; here and
      below, NaN of a channel or state that has a NaN among those that count.
    a_min: smallest |A| of each channel, over rows, t and states, `*C`.
    a_max: largest, `*C`.
    spread: a_max - a_min, what the paper's Fig. 6 shows, `*C`.
    token_spread: the mean over t of what the states of a channel span at that
      t, `*C`: without the spread that Δₜ makes over time; 0 where a channel
      has one state.
    mean_decay: geometric mean over rows and t of |A| of each state, `*S`.
    memory: effective memory in tokens of each state, `*S`, see
      `memory_length`.
    thresholds: `[K]`.
    share_above: share of the states whose `mean_decay` is above each
      threshold, `[K]`.
    share_below: share below it; at equality neither.
  """

  edges: Float[Array, " E"]
  histogram: Float[Array, " H"]
  levels: Float[Array, " Q"]
  quantiles: Float[Array, "Q ..."]
  a_min: Float[Array, "*C"]
  a_max: Float[Array, "*C"]
  spread: Float[Array, "*C"]
  token_spread: Float[Array, "*C"]
  mean_decay: Float[Array, "*S"]
  memory: Float[Array, "*S"]
  thresholds: Float[Array, " K"]
  share_above: Float[Array, " K"]
  share_below: Float[Array, " K"]


@gathered
def spectrum(
  recurrence: Recurrence,
  *,
  mask: Bool[Array, "B T"] | None = None,
  state_axes: int | None = None,
  bins: int = 50,
  levels: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95),
  thresholds: Sequence[float] = (0.01, 0.1, 0.5, 0.9, 0.99, 0.999),
) -> Spectrum:
  """Describe the decays that a layer uses on an input.

  Args:
    recurrence: of real or complex decays, on one or more rows.
    mask: tokens that count, `[B, T]`, at least one; None for all.
    state_axes: how many of the last axes of *S number the states of one
      channel, whose decays are pooled; by default 1, or 0 where *S is a
      single axis (a scalar state per channel, as in RG-LRU).
    bins: of the histogram.
    levels: of the quantiles, in [0, 1].
    thresholds: on the mean decay.

  Returns:
    The distribution. A_min and A_max are over every t that counts, t = 1 too,
    which theorems leave out.

  Raises:
    ValueError: shapes or numbers that do not fit.

  Source: Wang et al. 2025, Fig. 6, whose way of reducing over t and n is not
  given: `spread` and `token_spread` are the two readings.
  """
  a, mask = _decays("spectrum", recurrence, mask)
  kinds = a.ndim - 2
  pooled = min(1, max(kinds - 1, 0)) if state_axes is None else state_axes
  if not 0 <= pooled <= kinds:
    raise ValueError(
      f"spectrum: state_axes is {state_axes}, expected 0 to the {kinds} axes of"
      f" a state of shape {a.shape[2:]}."
    )
  if bins < 1:
    raise ValueError(f"spectrum: bins is {bins}, expected 1 or more.")
  channels = range(2, a.ndim - pooled)
  states = tuple(range(a.ndim - pooled, a.ndim))
  over = (0, 1, *states)
  # Rows, times and states of a channel together: [samples, *C].
  samples = jnp.transpose(jnp.where(mask, a, jnp.nan), (*over, *channels))
  samples = samples.reshape(-1, *(a.shape[axis] for axis in channels))
  low = smallest(jnp.where(mask, a, jnp.inf), over)
  high = largest(jnp.where(mask, a, -jnp.inf), over)
  per_token = jnp.zeros_like(a)
  if pooled:
    per_token = largest(a, states) - smallest(a, states)
  log_mean = _token_mean(jnp.log(a), mask)
  at_levels = jnp.asarray(levels, a.dtype)
  at = jnp.asarray(thresholds, a.dtype)
  mean_decay = jnp.exp(log_mean)
  compared = mean_decay.reshape(-1, 1)
  return Spectrum(
    edges=jnp.linspace(0, 1, bins + 1, dtype=a.dtype),
    histogram=_histogram(a, mask, bins),
    levels=at_levels,
    # What does not count is NaN; what counts and is NaN is not left out.
    quantiles=jnp.where(
      jnp.isnan(high), jnp.nan, jnp.nanquantile(samples, at_levels, axis=0)
    ),
    a_min=low,
    a_max=high,
    spread=high - low,
    token_spread=_token_mean(
      per_token, mask.reshape(*mask.shape[:2], *(1,) * len(channels))
    ),
    mean_decay=mean_decay,
    memory=_memory(log_mean),
    thresholds=at,
    share_above=(compared > at[None]).mean(0, dtype=a.dtype),
    share_below=(compared < at[None]).mean(0, dtype=a.dtype),
  )


@gathered
def memory_length(
  recurrence: Recurrence, *, mask: Bool[Array, "B T"] | None = None
) -> Float[Array, "*S"]:
  """Measure for how many tokens a state remembers.

  τₙ = -1 / mean over rows and t of log |(Aₜ)ₙₙ|

  After τ tokens of average decay, what a token wrote is down to 1/e: over the
  sequence Π A is exactly exp(-T/τ). Constant A = exp(-ΔN) has τ = 1/(ΔN).

  Args:
    recurrence: of real or complex decays.
    mask: tokens that count, `[B, T]`; None for all.

  Returns:
    Tokens, `*S`: 0 where a decay is exactly 0, infinite where it is 1 (and
    where the state does not shrink), NaN where one that counts is NaN.
  """
  a, mask = _decays("memory_length", recurrence, mask)
  return _memory(_token_mean(jnp.log(a), mask))


@gathered
def cumulative_share(
  values: Float[Array, "..."], grid: Float[Array, " G"]
) -> Float[Array, " G"]:
  """Tell the share of the values that are at most each of a grid's: Fig. 6.

  Args:
    values: such as `Spectrum.spread`, of one layer or of all.
    grid: `[G]`.

  Returns:
    Shares in [0, 1], `[G]`.

  >>> cumulative_share(jnp.array([0.1, 0.5, 0.5, 0.9]), jnp.array([0.5, 1.0]))
  Array([0.75, 1.  ], dtype=float32)
  """
  values = jnp.sort(values.ravel())
  below = jnp.searchsorted(values, grid, side="right")
  # bfloat16 could not count them.
  return below.astype(real_dtype(values)) / max(values.size, 1)


def _decays(function, recurrence, mask):
  """|A| and the mask with its rank."""
  a = jnp.abs(canonical(function, recurrence)[0])
  if mask is None:
    mask = jnp.ones(a.shape[:2], bool)
  check_shapes(function, {"mask": (mask, f"B={a.shape[0]} T={a.shape[1]}")})
  return a, mask.astype(bool).reshape(*a.shape[:2], *(1,) * (a.ndim - 2))


def _token_mean(v, mask):
  """The mean over the rows and times that count."""
  total = jnp.where(mask, v, jnp.zeros_like(v)).sum((0, 1))
  return total / mask.sum().astype(v.dtype)


def _memory(log_mean):
  endless = log_mean >= 0
  rate = jnp.where(endless, -jnp.ones_like(log_mean), log_mean)
  return jnp.where(endless, jnp.full_like(rate, jnp.inf), -1 / rate)


def _histogram(a, mask, bins):
  index = jnp.floor(a * bins).astype(jnp.int32)
  index = jnp.clip(index, 0, bins - 1).reshape(*a.shape[:2], -1)
  counted = mask.reshape(*a.shape[:2], 1)
  counted = counted & ~jnp.isnan(a).reshape(index.shape)
  # Counted by the token: a float32 count of all would stop at 2²⁴.
  rows = jnp.arange(a.shape[0])[:, None, None]
  times = jnp.arange(a.shape[1])[None, :, None]
  counts = jnp.zeros((*a.shape[:2], bins), jnp.int32)
  counts = counts.at[rows, times, index].add(counted.astype(jnp.int32))
  shares = counts.astype(a.dtype) / index.shape[2]
  return shares.sum((0, 1)) / mask.sum().astype(a.dtype)
