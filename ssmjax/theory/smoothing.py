"""Theorem 4.2 / D.5 and Lemma D.6: states lie closer together than inputs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ssmjax.theory.eq1 import canonical, states
from ssmjax.theory.extremes import largest, smallest
from ssmjax.theory.premises import Premise, measure_premise
from ssmjax.types import (
  Array,
  Bool,
  Float,
  Inexact,
  Recurrence,
  gathered,
  state_dtype,
)

__all__ = [
  "OverSmoothing",
  "SmoothingPremises",
  "StateEnvelope",
  "first_state",
  "least_decay",
  "one_minus_power",
  "outside",
  "oversmoothing",
  "smoothing_premises",
  "spread",
  "state_envelope",
]


class SmoothingPremises(NamedTuple):
  """The premises of Theorem 4.2 / D.5, as written and as needed.

  Attributes:
    contraction: 0 ≤ A, 0 ≤ Δ and A + Δ ≤ 1, at each (t, n) with t ≥ 2;
      excess is the largest of -A, -Δ and A + Δ - 1. The paper's (ii), first
      half. At t = 1 the theorem asks for `start` alone.
    conservative: A + Δ = 1 in place of the last. The paper's (i).
    centred: minₜ bₜₙ ≤ 0 ≤ maxₜ bₜₙ, at each n; excess is the distance of 0
      from that interval. The paper's (ii), second half. Of complex b: 0 lies
      in their convex hull; excess is π short of the widest angle they leave.
    start: h₁ lies between the least and the greatest bₜₙ (in their hull), at
      each n; excess likewise. The paper leaves it out. It follows from (ii)
      if h₀ = 0, but not from (i), unless A₁ = 0 and Δ₁ = 1.
    case_i: channels of rows to which the theorem applies by (i), `[B, *S]`.
    case_ii: by (ii).
    applies: by either. Never where an A, Δ or b is not finite.
  """

  contraction: Premise
  conservative: Premise
  centred: Premise
  start: Premise
  case_i: Bool[Array, "B *S"]
  case_ii: Bool[Array, "B *S"]
  applies: Bool[Array, "B *S"]


class OverSmoothing(NamedTuple):
  """Both sides of Theorem 4.2 / D.5, channel by channel and as stated.

  Attributes:
    state_spread: max over t, s of |hₜₙ - hₛₙ|, `[B, *S]`.
    input_spread: max over t, s of |bₜₙ - bₛₙ|, `[B, *S]`.
    a_min: min over t ≥ 2 of (Aₜ)ₙₙ, `[B, *S]`; 1 for a single token.
    factor: 1 - a_min^(T-1), `[B, *S]`: state_spread ≤ factor · input_spread
      wherever `premises.applies`.
    measured: left: max over t, s of ‖hₜ - hₛ‖_∞, `[B]`.
    bound: right: (1 - A_min^(T-1)) · max ‖bₜ - bₛ‖_∞, `[B]`.
    applies: whether the premises hold in every channel of the row, `[B]`.
    premises: and where they do not.
  """

  state_spread: Float[Array, "B *S"]
  input_spread: Float[Array, "B *S"]
  a_min: Float[Array, "B *S"]
  factor: Float[Array, "B *S"]
  measured: Float[Array, " B"]
  bound: Float[Array, " B"]
  applies: Bool[Array, " B"]
  premises: SmoothingPremises


class StateEnvelope(NamedTuple):
  """The three sides of Lemma D.6, `[B, T, *S]`, real.

  Attributes:
    lower: m + λₜ(h₁ - m), λₜ = a_min^(t-1).
    states: hₜ.
    upper: M - λₜ(M - h₁).
    sharp_lower: the same with λₜ = Π_{r=2}^t Aᵣ, which is no smaller.
    sharp_upper: likewise.
    applies: channels of rows to which the lemma applies, `[B, *S]`: those of
      `smoothing_premises`.
  """

  lower: Float[Array, "B T *S"]
  states: Float[Array, "B T *S"]
  upper: Float[Array, "B T *S"]
  sharp_lower: Float[Array, "B T *S"]
  sharp_upper: Float[Array, "B T *S"]
  applies: Bool[Array, "B *S"]


@gathered
def smoothing_premises(
  recurrence: Recurrence, *, tolerance: float | None = None
) -> SmoothingPremises:
  """Check the premises of Theorem 4.2 / D.5.

  The paper finds that prevalent models "can easily achieve" them. In Eq.-1
  form they do not, with h₀ = 0:

    S6, Mamba-2     A = exp(-nΔ): e^(-Δ) + Δ > 1 for every Δ > 0, so n = 1
                    never; n = 2 for Δ ≤ 0.797, 3: 0.940, 4: 0.980, 8:
                    0.9997; none for Δ ≥ 1. `zero_order_hold` restores it.
    linear attention, RetNet, GLA, RWKV-5/6, mLSTM
                    Δ = 1 (or an input gate of its own) and A > 0: never.
    RG-LRU, LRU     a + √(1 - a²) ≥ 1, with equality at a ∈ {0, 1} only.
    Mega            1 - αδ + α > 1, unless δ = 1.
    RWKV-4          A + Δ = 1, A₁ = 0, Δ₁ = 1: case (i), start included.
    HGRN, HGRN2, minGRU, minLSTM
                    A + Δ = 1, but h₁ = Δ₁b₁ starts from 0: case (i) as the
                    paper has it holds, the start does not.

  Channels of decay 1 with Δ > 0 break it; of decay 0 they need Δ ≤ 1. S6's
  n = 1 misses by Δ²/2, which float32 cannot tell from rounding for Δ below
  1.4e-3: there it is counted as met.

  Args:
    recurrence: of real decays; for others see `rotating_frame`.
    tolerance: how far A + Δ may be from 1, and h₁ relative to the size of b
      out of its interval; by default 8 units of rounding.

  Returns:
    Each premise, with its share and its worst offender.

  Raises:
    ValueError: complex decays or steps.

  Source: Wang et al. 2025, Theorems 4.2 and D.5; the table, this library.
  """
  a, dt, b, h0 = canonical("smoothing_premises", recurrence, real_decay=True)
  return _premises(a, dt, b, first_state(a, dt, b, h0), tolerance)


@gathered
def oversmoothing(
  recurrence: Recurrence, *, tolerance: float | None = None
) -> OverSmoothing:
  """Hold a layer against Theorem 4.2 / D.5.

  max_{t,s}‖hₜ - hₛ‖_∞ ≤ (1 - A_min^(T-1)) max_{t,s}‖bₜ(xₜ) - bₛ(xₛ)‖_∞

  if h₁ ∈ K, A and Δ are not negative, and either
    (i)  Aₜ + Δₜ = 1 for t ≥ 2, with K the hull of the bₜ, or
    (ii) Aₜ + Δₜ ≤ 1 for t ≥ 2, with K the hull of the bₜ, where 0 ∈ K.

  Proof (shorter than the paper's, and for any convex K, so for complex b
  too). Let Λₜ = Π_{r=2}^t Aᵣ. Then hₜ ∈ Λₜh₁ + (1 - Λₜ)K: true of t = 1, and
  if hₜ₋₁ = Λₜ₋₁h₁ + (1 - Λₜ₋₁)k, then

    hₜ = Λₜh₁ + Aₜ(1 - Λₜ₋₁)k + Δₜbₜ + (1 - Aₜ - Δₜ)·0,

  where the last three weights are not negative and add up to 1 - Λₜ; the 0 is
  in K in case (ii) and has weight 0 in case (i). For s < t, Λₛ ≥ Λₜ and
  h₁ ∈ K, so hₛ = Λₜh₁ + (Λₛ - Λₜ)h₁ + (1 - Λₛ)k' lies in Λₜh₁ + (1 - Λₜ)K as
  well. Hence |hₜ - hₛ| ≤ (1 - Λₜ) diam K, and Λₜ ≥ Λ_T ≥ A_min^(T-1). ∎

  Equality in both cases: A constant, Δ = 1 - A, b = (0, 1, 1, …, 1).

  Where the paper errs. Its Lemma D.6 needs h₁ ∈ [m, M]. In case (i) it starts
  from h₀ = 0, whence h₁ = (1 - A₁)b₁ may lie outside: a constant b ≠ 0 has no
  spread, but h moves. The claim holds if the first step is conservative too,
  A₁ = 0 and Δ₁ = 1 (h₁ = b₁), as in RWKV-4. A₁ decays h₀ alone and need not
  enter A_min: else RWKV-4's A₁ = 0 made the factor 1. The rate
  (1 - A_min^(T-1))^L that its App. C gives for L layers would need maps
  between the layers that spread no tokens, which nothing guarantees. A
  channel of decay 0 makes the joint factor 1, hence the joint bound vacuous
  as a contraction; the other channels are still smoothed, each by its own.

  Args:
    recurrence: of real decays; for others see `rotating_frame`. b may be
      complex, at a cost of O(T²) time.
    tolerance: as in `smoothing_premises`.

  Returns:
    Both sides, also where the premises fail: there the bound is only the
    paper's claim. `kappa_smoothing` has one that holds.

  Raises:
    ValueError: complex decays or steps.

  Source: Wang et al. 2025, Theorems 4.2 and D.5.
  """
  a, dt, b, h0 = canonical("oversmoothing", recurrence, real_decay=True)
  premises = _premises(a, dt, b, first_state(a, dt, b, h0), tolerance)
  power = b.shape[1] - 1
  a_min = least_decay(a)
  state_spread, input_spread = spread(states(recurrence)), spread(b)
  every = lambda v: v.reshape(v.shape[0], -1)
  joint = one_minus_power(smallest(every(a_min), -1), power)
  return OverSmoothing(
    state_spread=state_spread,
    input_spread=input_spread,
    a_min=a_min,
    factor=one_minus_power(a_min, power),
    measured=largest(every(state_spread), -1),
    bound=joint * largest(every(input_spread), -1),
    applies=every(premises.applies).all(-1),
    premises=premises,
  )


@gathered
def state_envelope(
  recurrence: Recurrence, *, tolerance: float | None = None
) -> StateEnvelope:
  """Evaluate the three sides of Lemma D.6.

  m + α_min^(t-1)(h₁ - m) ≤ hₜ ≤ M - α_min^(t-1)(M - h₁),  t ≥ 1

  for hₜ = αₜhₜ₋₁ + βₜxₜ with m ≤ xₜ ≤ M, 0 ≤ αₜ, 0 ≤ βₜ and m ≤ h₁ ≤ M, if
  either (i) αₜ + βₜ = 1, or (ii) αₜ + βₜ ≤ 1 and m ≤ 0 ≤ M.

  Proof of the right side; the left one is its mirror image. It is an equality
  at t = 1. With λ = α_min^(t-2),

    hₜ ≤ αₜ(M - λ(M - h₁)) + βₜM = (αₜ + βₜ)M - αₜλ(M - h₁)
       ≤ M - αₜλ(M - h₁) ≤ M - α_min λ(M - h₁):

  the second step by (i), or by (ii) as M ≥ 0; the last one as M - h₁ ≥ 0,
  which is what the paper does not say. Without the last step the same is
  shown with Π_{r=2}^t αᵣ in place of α_min^(t-1): the sharp sides. ∎

  Args:
    recurrence: of real decays and inputs, each channel a dynamics of its own.
    tolerance: as in `smoothing_premises`.

  Returns:
    All sides, also where the premises do not hold, and whether they do.

  Raises:
    ValueError: complex decays, steps or inputs.

  Source: Wang et al. 2025, Lemma D.6 (after Wu et al. 2024, Lemma 3).
  """
  a, dt, b, h0 = canonical("state_envelope", recurrence, real_decay=True)
  if jnp.iscomplexobj(b) or jnp.iscomplexobj(h0):
    raise ValueError(
      "state_envelope: b or the initial state is complex, expected real ones."
      " Pass their real and imaginary parts, one after the other."
    )
  h = states(recurrence)
  first = h[:, :1]
  low, high = smallest(b, 1, keepdims=True), largest(b, 1, keepdims=True)
  after = jnp.concatenate([jnp.ones_like(a[:, :1]), a[:, 1:]], 1)
  least = jnp.broadcast_to(least_decay(a)[:, None], after[:, 1:].shape)
  least = jnp.concatenate([after[:, :1], least], 1)

  def sides(decay):
    kept = _running_product(decay)
    return low + kept * (first - low), high - kept * (high - first)

  lower, upper = sides(least)
  sharp_lower, sharp_upper = sides(after)
  premises = _premises(a, dt, b, first[:, 0], tolerance)
  return StateEnvelope(
    lower, h, upper, sharp_lower, sharp_upper, premises.applies
  )


@gathered
def spread(points: Inexact[Array, "B T *S"]) -> Float[Array, "B *S"]:
  """Measure the largest distance of two times, max_{t,s} |pₜ - pₛ|.

  Of real points in O(T); of complex ones in O(T²), a row at a time.
  """
  if not jnp.iscomplexobj(points):
    return largest(points, 1) - smallest(points, 1)
  farthest = lambda point: largest(jnp.abs(points - point[:, None]), 1)
  return largest(jax.lax.map(farthest, jnp.moveaxis(points, 1, 0)), 0)


def least_decay(a: Float[Array, "B T *S"]) -> Float[Array, "B *S"]:
  """Find the smallest decay of t ≥ 2, 1 if there is none."""
  if a.shape[1] == 1:
    return jnp.ones_like(a[:, 0])
  return smallest(a[:, 1:], 1)


def one_minus_power(a: Float[Array, "*S"], power: int) -> Float[Array, "*S"]:
  """Evaluate 1 - a^n to full precision, where a^n is next to 1 too.

  1 - aⁿ = -expm1(n log1p(a - 1)): the difference itself would leave float32 no
  digit where n(1 - a) is below 10⁻⁷, and a - 1 is exact for a ≥ 1/2.
  """
  positive = a > 0
  safe = jnp.where(positive, a, jnp.ones_like(a))
  return jnp.where(
    positive, -jnp.expm1(power * jnp.log1p(safe - 1)), 1 - a**power
  )


def first_state(a: Array, dt: Array, b: Array, h0: Array) -> Array:
  """Return h₁ = A₁h₀ + Δ₁b₁, `[B, *S]`."""
  drive = dt[:, 0].astype(h0.dtype) * b[:, 0].astype(h0.dtype)
  return a[:, 0].astype(h0.dtype) * h0 + drive


def _premises(a, dt, b, first, tolerance):
  if tolerance is None:
    tolerance = 8 * float(jnp.finfo(a.dtype).eps)
  # A₁ and Δ₁ are in h₁ alone, which `start` is about.
  later_a, later_dt = a[:, 1:], dt[:, 1:]
  negative = jnp.maximum(-later_a, -later_dt)
  gap = later_a + later_dt - 1
  contraction = jnp.maximum(negative, gap - tolerance)
  conservative = jnp.maximum(negative, jnp.abs(gap) - tolerance)
  centred = outside(b, jnp.zeros_like(first), tolerance)
  start = outside(b, first, tolerance)
  ok_i = (conservative <= 0).all(1) & (start <= 0)
  ok_ii = (contraction <= 0).all(1) & (start <= 0) & (centred <= 0)
  later = lambda v: measure_premise(v <= 0, v, 2, first=1)
  whole = lambda v: measure_premise(v <= 0, v, 1)
  return SmoothingPremises(
    later(contraction), later(conservative), whole(centred), whole(start),
    ok_i, ok_ii, ok_i | ok_ii,
  )  # fmt: skip


def _running_product(decay):
  """Π_{r≤t} of each t by logarithms, whose sum drifts less than a product."""
  inside = (decay > 0) & (decay <= 1)
  logs = jnp.log1p(jnp.where(inside, decay, jnp.ones_like(decay)) - 1)
  zero = jnp.cumsum(decay == 0, 1) > 0
  kept = jnp.where(zero, jnp.zeros_like(decay), jnp.exp(jnp.cumsum(logs, 1)))
  usual = (inside | (decay == 0)).all(1, keepdims=True)
  return jnp.where(usual, kept, jnp.cumprod(decay, 1))


def outside(
  points: Inexact[Array, "B T *S"],
  point: Inexact[Array, "B *S"],
  tolerance: float,
) -> Float[Array, "B *S"]:
  """Measure how far a point is out of the convex hull of others.

  Real: its distance from their interval (negative inside). Complex: seen from
  the point, the widest angle that holds none of them, less π: a point is in
  the hull if and only if no half-plane at it is free of them.

  Args:
    points: `[B, T, *S]`.
    point: `[B, *S]`.
    tolerance: rounding allowed, relative to the largest of all; an angle too.

  Returns:
    The distance; NaN where not all of them are finite.
  """
  size = jnp.maximum(largest(jnp.abs(points), 1), jnp.abs(point))
  if not (jnp.iscomplexobj(points) or jnp.iscomplexobj(point)):
    apart = jnp.maximum(smallest(points, 1) - point, point - largest(points, 1))
    return jnp.where(jnp.isfinite(size), apart - tolerance * size, jnp.nan)
  dtype = state_dtype(points, point)
  seen = points.astype(dtype) - point.astype(dtype)[:, None]
  angles = jnp.sort(jnp.angle(seen), axis=1)
  around = angles[:, :1] + 2 * jnp.pi
  gaps = jnp.diff(jnp.concatenate([angles, around], 1), axis=1)
  met = (jnp.abs(seen) <= tolerance * size[:, None]).any(1)
  widest = jnp.where(met, -jnp.pi, gaps.max(1) - jnp.pi - tolerance)
  return jnp.where(jnp.isfinite(size), widest, jnp.nan)
