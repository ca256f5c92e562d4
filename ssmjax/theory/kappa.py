"""What remains of Theorem 4.2 where its premise A + Δ ≤ 1 fails."""

from typing import NamedTuple

import jax.numpy as jnp

from ssmjax.theory.eq1 import canonical, states
from ssmjax.theory.extremes import largest
from ssmjax.theory.smoothing import (
  first_state,
  least_decay,
  one_minus_power,
  outside,
  spread,
)
from ssmjax.types import Array, Bool, Float, Recurrence, gathered

__all__ = ["KappaSmoothing", "kappa", "kappa_smoothing"]


class KappaSmoothing(NamedTuple):
  """Both sides of the κ bound, channel by channel.

  Attributes:
    kappa: the least κ, `[B, *S]`; infinite where there is none, NaN where an
      A or Δ is.
    factor: κ(1 - a_min^(T-1)), `[B, *S]`; the paper's factor is that with
      κ = 1.
    state_spread: left: max over t, s of |hₜₙ - hₛₙ|, `[B, *S]`.
    bound: right: factor · max over t, s of |bₜₙ - bₛₙ|, `[B, *S]`.
    applies: whether κ is finite, b is centred (or Δ = κ(1 - A) throughout)
      and h₁ ∈ κK, the premises that are left, `[B, *S]`; if h₀ = 0 the last
      follows from the second. Never where an A, Δ or b is not finite.
    hull_bound: right, without any premise on b and h₀:
      (1 - Π_{t≥2} Aₜ) · diam of the hull of h₁, 0 and κ'bₜ for t ≥ 2, where
      κ' leaves Δ₁ out, `[B, *S]`.
    measured: left: max over the channels, `[B]`.
    joint_bound: right: max over the channels of `bound`, `[B]`.
  """

  kappa: Float[Array, "B *S"]
  factor: Float[Array, "B *S"]
  state_spread: Float[Array, "B *S"]
  bound: Float[Array, "B *S"]
  applies: Bool[Array, "B *S"]
  hull_bound: Float[Array, "B *S"]
  measured: Float[Array, " B"]
  joint_bound: Float[Array, " B"]


@gathered
def kappa(recurrence: Recurrence) -> Float[Array, "B *S"]:
  """Find the least κ of each channel with Δₜ ≤ κ(1 - Aₜ).

  κₙ = max(Δ₁, max_{t≥2} Δₜ / (1 - (Aₜ)ₙₙ))

  A₁ decays h₀ = 0 alone, so the first step asks for Δ₁ ≤ κ only. κ ≤ 1 is the
  paper's premise. κ = Δ/(1 - A) by model:

    S6, Mamba-2         Δ/(1 - e^(-nΔ)), between max(Δ, 1/n) and Δ + 1/n:
                        above 1 for n = 1, near 1/n for small nΔ
    exact ZOH           1/n, for every Δ; there Δ̄ = κ(1 - A) throughout
    RWKV-4, HGRN2, minGRU, minLSTM    1
    Mega                1/δ, again throughout
    RetNet              1/(1 - γ);  GLA, RWKV-5/6, mLSTM: likewise, of the
                        largest decay
    RG-LRU, LRU         √((1 + a)/(1 - a)), of the largest
    linear attention    infinite, as is any channel of decay 1 and Δ > 0:
                        its state is a sum and grows with T

  Args:
    recurrence: of real decays; for others see `rotating_frame`.

  Returns:
    κ, `[B, *S]`; infinite where an A lies outside [0, 1], a Δ is negative, or
    A = 1 with Δ > 0; NaN where one of them is. Where Δ = 0 nothing is asked.

  Raises:
    ValueError: complex decays or steps.
  """
  a, dt, _, _ = canonical("kappa", recurrence, real_decay=True)
  later, _ = _later(a, dt, _rounding(a))
  return jnp.maximum(later, _only_positive(dt[:, 0]))


@gathered
def kappa_smoothing(
  recurrence: Recurrence, *, tolerance: float | None = None
) -> KappaSmoothing:
  """Bound the spread of states where A + Δ ≤ 1 need not hold.

  max_{t,s}|hₜₙ - hₛₙ| ≤ κₙ (1 - A_min^(T-1)) max_{t,s}|bₜₙ - bₛₙ|

  if 0 ≤ A ≤ 1, 0 ≤ Δₜ ≤ κ(1 - Aₜ), minₜ bₜ ≤ 0 ≤ maxₜ bₜ and h₀ = 0.

  Proof. Put Δ' = Δ/κ and b' = κb. Then Δ'b' = Δb, so the states are the same,
  and A + Δ' ≤ 1: Theorem 4.2 (ii) applies to A, Δ', b'. Its b' is centred as
  b is, its h₁ = Δ₁'b'₁ lies in the hull of the b', for Δ₁' ≤ 1, and the
  spread of b' is κ times that of b. ∎ The theorem's own (κ = 1) is improved
  where κ < 1: S6's channel n is smoothed to about 1/n of it.

  Equality: Δ = κ(1 - A) with A constant, and b = (0, 1, 1, …, 1).

  The same without centring and from any h₀. Let K be a convex set that holds
  0, h₁ and κbₜ for t ≥ 2 (so Δ₁ may be of any size). The proof of
  `oversmoothing`, with Δₜbₜ = Δₜ'(κbₜ), gives hₜ ∈ Λₜh₁ + (1 - Λₜ)K and

    max_{t,s}|hₜ - hₛ| ≤ (1 - Π_{t=2}^T Aₜ) diam K,

  the `hull_bound`: only 0 ≤ A ≤ 1 and 0 ≤ Δ are left of the premises. Where
  Δₜ = κ(1 - Aₜ) for all t ≥ 2, 0 has weight nothing and is left out of K;
  this is case (i), with h₁ in place of the paper's b₁. For real b the hull is
  the interval [min(h₁, 0, κbₜ), max(h₁, 0, κbₜ)].

  Not to be had: a bound for decay 1. κ is infinite, and rightly, for a sum
  over T tokens has no bound that is free of T. Nor one for A > 1.

  Args:
    recurrence: of real decays; for others see `rotating_frame`.
    tolerance: how far, relative to κ, Δ may be from κ(1 - A) to count as
      equal to it; by default 8 units of rounding.

  Returns:
    Both sides; `state_spread ≤ bound` wherever `applies`, and
    `state_spread ≤ hull_bound` of all that is finite.

  Raises:
    ValueError: complex decays or steps.

  Source: this library's; it repairs Wang et al. 2025, Theorem 4.2.
  """
  a, dt, b, h0 = canonical("kappa_smoothing", recurrence, real_decay=True)
  if tolerance is None:
    tolerance = _rounding(a)
  first = first_state(a, dt, b, h0)
  later, steady = _later(a, dt, tolerance)
  least = jnp.maximum(later, _only_positive(dt[:, 0]))
  finite = jnp.isfinite(least)
  # One κ for all steps, the first included: Δ₁ may have raised it.
  raised = jnp.where(finite, least, 0.0)
  apart = jnp.abs(dt[:, 1:] - raised[:, None] * (1 - a[:, 1:]))
  alike = steady & (apart <= tolerance * raised[:, None]).all(1)
  factor = raised * one_minus_power(least_decay(a), b.shape[1] - 1)
  factor = jnp.where(finite, factor, least)
  input_spread = spread(b)
  # κK, drawn in units of κ: a κ of 0 has no state but 0.
  some = finite & (least > 0)
  unit = jnp.where(some, least, 1.0).astype(first.dtype)
  away = outside(b, first / unit, tolerance)
  started = jnp.where(some, away <= 0, (first == 0) & ~jnp.isnan(away))
  centred = outside(b, jnp.zeros_like(first), tolerance) <= 0
  bound = jnp.where(finite, factor * input_spread, least)

  measured = spread(states(recurrence))
  every = lambda v: v.reshape(v.shape[0], -1)
  return KappaSmoothing(
    kappa=least,
    factor=factor,
    state_spread=measured,
    bound=bound,
    applies=finite & started & (centred | alike),
    hull_bound=_hull_bound(a, b, first, later, steady),
    measured=largest(every(measured), -1),
    joint_bound=largest(every(bound), -1),
  )


def _hull_bound(a, b, first, least, steady):
  """(1 - Π A) diam of h₁, κbₜ and, unless every step is conservative, 0."""
  anchor = jnp.where(steady, first, jnp.zeros_like(first))
  finite = jnp.isfinite(least)
  scale = jnp.where(finite, least, 0.0)[:, None].astype(first.dtype)
  points = scale * b[:, 1:].astype(first.dtype)
  points = jnp.concatenate([first[:, None], anchor[:, None], points], 1)
  # 1 - Π A by logarithms, as in `one_minus_power`; all A are in [0, 1] here.
  lost = -jnp.expm1(jnp.log1p(a[:, 1:] - 1).sum(1))
  return jnp.where(finite, lost * spread(points), least)


def _later(a, dt, tolerance):
  """The largest Δₜ/(1 - Aₜ) of t ≥ 2, and whether all of them are equal."""
  if a.shape[1] == 1:
    return jnp.zeros_like(a[:, 0]), jnp.ones_like(a[:, 0], bool)
  a, dt = a[:, 1:], dt[:, 1:]
  # 1 - A is exact for A ≥ 1/2, so this is the κ of the decays in use.
  room = 1 - a
  ratio = _ratio(dt, room)
  ratio = jnp.where((dt < 0) | (a < 0) | (a > 1), jnp.inf, ratio)
  ratio = jnp.where(jnp.isnan(a) | jnp.isnan(dt), jnp.nan, ratio)
  ratio = largest(ratio, 1)
  # Rounding of A alone moves a ratio much where A is next to 1; if they are
  # all equal, their weighted mean is what they are equal to.
  mean = _ratio(dt.sum(1), room.sum(1))
  finite = jnp.isfinite(ratio) & jnp.isfinite(mean)
  value = jnp.where(finite, mean, 0.0)
  apart = largest(jnp.abs(dt - value[:, None] * room), 1)
  steady = finite & (apart <= tolerance * value)
  return jnp.where(steady, value, ratio), steady


def _ratio(step, room):
  """Δ/(1 - A); nothing is asked where Δ = 0, and no κ is enough at A = 1."""
  ratio = jnp.where(room > 0, step / jnp.where(room > 0, room, 1.0), jnp.inf)
  return jnp.where(step == 0, jnp.zeros_like(ratio), ratio)


def _rounding(a):
  return 8 * float(jnp.finfo(a.dtype).eps)


def _only_positive(step):
  return jnp.where(step < 0, jnp.inf, step)
