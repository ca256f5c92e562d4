"""Theorem 3.1 / D.2: influence dies away exponentially with distance."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from ssmjax.theory.eq1 import canonical
from ssmjax.theory.extremes import largest, smallest
from ssmjax.theory.influence import Factors, influence_factors, influence_sum
from ssmjax.theory.parallel import parallel_weights
from ssmjax.theory.premises import Premise, measure_premise
from ssmjax.types import Array, Bool, Float, Inexact, Recurrence, gathered

__all__ = [
  "PolarizedRecency",
  "Recency",
  "RecencyPremises",
  "polarized_recency",
  "recency",
  "recency_premises",
]


class RecencyPremises(NamedTuple):
  """The premises of Theorem 3.1 / D.2 that one input can show.

  Attributes:
    below_one: (iii), upper half: |A| < 1, entry by entry (t, n), t ≥ 2 (A₁
      decays h₀ alone); excess |A| - 1. This half makes the theorem: where it
      fails, the bound says nothing.
    above_zero: (iii), lower half: |A| > 0; excess -|A|. The paper's proof
      takes logarithms and needs it; the theorem does not.
    local: that Aₜ, Δₜ, bₜ and cₜ depend on the window's tokens alone, as
      `locality_premise` finds it; where it fails, neither the Jacobian nor the
      bound are those of the layer. None where no layer was seen.
  """

  below_one: Premise
  above_zero: Premise
  local: Premise | None = None


class Recency(NamedTuple):
  """Both sides of Theorem 3.1 / D.2. "At [t, s]" is for t ≥ s + W only.

  Elsewhere the theorem says nothing: influences are 0 there, bounds infinite.

  Attributes:
    jacobian: the exact ∂yₜ/∂xₛ at [t, s, output, input], `[B, T, T, D, M]`.
    score: left: its largest entry by size, at [t, s], `[B, T, T]`.
    bound: right: C · A_max^(t-s-W+1); C · A_max^(t-s) where A_max > 1.
    product_bound: C · Π_{r=s+W}^t maxₙ|(Aᵣ)ₙₙ|, between the two: one token of
      tiny Δ puts A_max next to 1 for all, this for itself only. (Where factors
      are above 1: the largest of the products from s + 1, …, s + W on.)
    constant: C along this input, `[B]`.
    a_priori_constant: the paper's, of suprema and 1/(1 - A_max) only, never
      below C; infinite where A_max ≥ 1 and A depends on the input.
    a_max: max |(Aₜ)ₙₙ| over n and t ≥ 2, `[B]` (A₁ decays h₀ alone).
    rate: log(1/A_max), the paper's κ; 0 makes the bound flat, hence vacuous.
    premises: with their shares and worst offenders.
    applies: whether the theorem speaks of the row, `[B]`: |A| < 1 at every
      t ≥ 2, every part within the window, and C finite.
    window: W.
  """

  jacobian: Inexact[Array, "B T T D M"]
  score: Float[Array, "B T T"]
  bound: Float[Array, "B T T"]
  product_bound: Float[Array, "B T T"]
  constant: Float[Array, " B"]
  a_priori_constant: Float[Array, " B"]
  a_max: Float[Array, " B"]
  rate: Float[Array, " B"]
  premises: RecencyPremises
  applies: Bool[Array, " B"]
  window: int


class PolarizedRecency(NamedTuple):
  """A polarized layer's influence: what stays, what decays, and both bounds.

  Attributes:
    jacobian: as in `Recency`, the sum of the next two.
    kept: Σ over one-channels of ∇cₜₙ gₛₙ: no decay in it, `[B, T, T, D, M]`.
    decaying: the other channels' part.
    remainder: C_rest · ρ^(t-s-W+1), which bounds every entry of `decaying`,
      `[B, T, T]`; infinite where t < s + W.
    lower: max(0, |kept| - remainder) ≤ |jacobian|, entry by entry.
    upper: |kept| + remainder ≥ |jacobian|.
    floor: least over all pairs [t, s] of the largest entry of |kept|, `[B]`;
      0 without a one-channel, infinite where no pair has t ≥ s + W.
    horizon: from any lag above this on, influence is surely not 0: the
      remainder is below the floor, `[B]`; infinite if the floor is 0.
    ones: which channels have decay exactly 1 at every t ≥ 2, `[B, *S]`.
    rho: max |(Aₜ)ₙₙ| over t ≥ 2 and the channels not among `ones`, `[B]`.
    constant: C_rest, that of `Recency` over the channels not among `ones`.
    premises: those of `Recency`, where a one-channel's decays count as met:
      what is left of the theorem is about the others.
    applies: whether they hold and C_rest is finite, `[B]`. Where |A| ≥ 1 alone
      is what fails, both bounds still hold, but the remainder does not die.
    window: W.
  """

  jacobian: Inexact[Array, "B T T D M"]
  kept: Inexact[Array, "B T T D M"]
  decaying: Inexact[Array, "B T T D M"]
  remainder: Float[Array, "B T T"]
  lower: Float[Array, "B T T D M"]
  upper: Float[Array, "B T T D M"]
  floor: Float[Array, " B"]
  horizon: Float[Array, " B"]
  ones: Bool[Array, "B *S"]
  rho: Float[Array, " B"]
  constant: Float[Array, " B"]
  premises: RecencyPremises
  applies: Bool[Array, " B"]
  window: int


@gathered
def recency_premises(recurrence: Recurrence) -> RecencyPremises:
  """Check 0 < |(Aₜ)ₙₙ| < 1 for every n and t ≥ 2.

  Premises (i), a compact space of inputs, and (ii), maps with continuous
  derivatives, can't be seen on one input. What can go wrong with them:
  unbounded inputs make C infinite; the paper lists "continuous" in D.2, but
  its proof bounds derivatives, so C¹ (as in 3.1) is meant.

  Args:
    recurrence: of real or complex decays.

  Returns:
    The two halves, each with its share of (t, n) and its worst offender;
    `local` is None, for it needs the layer: see `locality_premise`.
  """
  return _premises(canonical("recency_premises", recurrence)[0])


@gathered
def recency(
  layer: Callable[[Array], Recurrence],
  x: Float[Array, "B T M"],
  *,
  window: int | None = None,
) -> Recency:
  """Hold a layer against Theorem 3.1 / D.2.

  |∂yₜ/∂xₛ| ≤ C exp(-κ(t-s)) = C A_max^(t-s),  κ = log(1/A_max),  s < t

  Derivation. Where Aₛ, Δₛ, bₛ depend on xₛ alone and cₜ on xₜ alone, xₛ
  enters hₛ = Aₛhₛ₋₁ + Δₛbₛ directly and every later state only through hₛ.
  By Lemma D.1, exactly,

    ∂yₜ/∂xₛ = ∇cₜ(hₜ)ᵀ (Π_{r=s+1}^t Aᵣ) gₛ,
    gₛ = ∂(Δₛbₛ)/∂xₛ + (∂Aₛ/∂xₛ) hₛ₋₁.

  Hölder's inequality gives |∂yₜ/∂xₛ| ≤ ‖∇cₜ‖₁ A_max^(t-s) ‖gₛ‖_∞, hence
  C = maxₜ‖∇cₜ(hₜ)‖₁ · maxₛ‖gₛ‖_∞. A priori, with the geometric series
  ‖h‖_∞ ≤ ‖h₀‖_∞ + max|Δb|/(1 - A_max),

    C ≤ max‖∇c‖₁ · (max|∂(Δb)/∂x| + max|∂A/∂x| (‖h₀‖ + max|Δb|/(1-A_max))),

  independent of s and t: the paper's constant (its Eqs. 6-13). Equality: one
  channel (or equal decays and signs) that does not depend on its input.

  Complex case: A, b, c and y may be complex. Where y is not holomorphic in h,
  as y = Re(cᵀh) is not, ∇c acts as v ↦ pᵀv + qᵀv̄ and ‖∇c‖₁ = Σₙ|pₙ| + |qₙ|.

  Convolutions before the recurrence: where Aₛ, Δₛ, bₛ depend on
  xₛ₋W₊₁, …, xₛ, each xₛ has W ways in, and with gⱼₛ = ∂hⱼ/∂xₛ at fixed hⱼ₋₁

    |∂yₜ/∂xₛ| = |Σ_{j=s}^{s+W-1} ∇cₜᵀ (Π_{r=j+1}^t Aᵣ) gⱼₛ|
              ≤ max‖∇c‖₁ · maxₛ Σⱼ‖gⱼₛ‖_∞ · A_max^(t-s-W+1),  t ≥ s + W,

  if A_max ≤ 1; else the first way in has the largest factor, A_max^(t-s).

  Where the paper is loose: A > 0 is needed for its logarithms only (decay 0
  keeps the theorem true); A₁ need not enter A_max; a channel of decay 1 makes
  κ = 0 and the bound vacuous (see `polarized_recency`); a decay that depends
  on its history, as RWKV-4's normalised one, is not of Eq. 1
  (`locality_premise` finds it); and |A| < 1 must hold of a diagonal A, not of
  the eigenvalues of another, whose powers may first grow.

  Args:
    layer: maps x to the layer's recurrence on it, such as a mixer's
      `recurrence`; each row for itself. It is differentiated in reverse mode
      only, as fused layers can be.
    x: real inputs, `[B, T, M]`. For complex ones pass real and imaginary
      parts side by side.
    window: W, tokens back (itself included) on which a token's Aₜ, Δₜ, bₜ and
      cₜ depend: 1 for the paper's Eq. 1, d_conv for a mixer with a short
      convolution. None measures it by `dependence_window`, which takes values:
      under `jax.jit` it has to be given. One that is too small makes
      `premises.local` fail.

  Returns:
    The exact Jacobian and its bounds. Memory O(T²(D + N)M): for small layers.

  Raises:
    ValueError: x is not real of shape `[B, T, M]`, window is not between 1 and
      T, or it is None and none can be measured (`dependence_window`).

  Source: Wang et al. 2025, Theorems 3.1 and D.2.
  """
  factors = influence_factors("recency", layer, x, window)
  jacobian = influence_sum(factors)
  readout, entry = _readout_size(factors), _entry_size(factors)
  constant = readout * entry
  a_max = _largest(jnp.abs(factors.a), 0.0)
  per_token = largest(jnp.abs(factors.a), -1, keepdims=True)
  products = parallel_weights(per_token)[..., 0]
  far = _reached(factors)
  column = constant[:, None, None]
  ways = [_shift_back(products, j) for j in range(factors.window)]
  product = functools.reduce(jnp.maximum, ways)
  premises = _premises(
    factors.a.reshape(*x.shape[:2], *factors.channels), factors.local
  )
  return Recency(
    jacobian=jacobian,
    score=largest(jnp.abs(jacobian), (-1, -2)),
    bound=_geometric(constant, a_max, factors),
    product_bound=jnp.where(far, column * product, jnp.inf),
    constant=constant,
    a_priori_constant=_a_priori(factors, a_max),
    a_max=a_max,
    rate=-jnp.log(a_max),
    premises=premises,
    applies=_applies(factors, a_max, constant),
    window=factors.window,
  )


@gathered
def polarized_recency(
  layer: Callable[[Array], Recurrence],
  x: Float[Array, "B T M"],
  *,
  window: int | None = None,
) -> PolarizedRecency:
  """Bound a polarized layer's influence from both sides.

  |P_ts| - C_rest ρ^(t-s) ≤ |∂yₜ/∂xₛ| ≤ |P_ts| + C_rest ρ^(t-s)

  Theorem 3.1 has nothing to say of a layer with a channel of decay 1: A_max
  is 1. But its exact Jacobian is a sum over channels, and splits into

    P_ts = Σ_{n: Aₙ≡1} ∇cₜₙ ∂(Δₛbₛₙ)/∂xₛ   and
    R_ts = Σ_{other n} ∇cₜₙ (Π_{r=s+1}^t (Aᵣ)ₙₙ) gₛₙ.

  In P the product of decays is 1 and ∂A/∂x is 0: it depends on what token s
  writes and what token t reads, never on how far they are apart. R is bounded
  by the theorem over the other channels, with ρ < 1 their largest decay.
  The triangle inequality, entry by entry, gives both sides. Hence influence
  from lag t - s > log(C_rest/p)/log(1/ρ) is bounded below by the positive
  p - C_rest ρ^(t-s), where p = min |P_ts| is the `floor`: the far past is not
  forgotten unless token t reads 0 or s writes 0 into every one-channel.
  Zero-channels belong to R and add nothing at any lag ≥ 1.

  Args:
    layer: as in `recency`; its one-channels are found by their decays being
      exactly 1 at every t ≥ 2.
    x: as in `recency`.
    window: as in `recency`; lags count from t - s - W + 1.

  Returns:
    Both parts and both bounds; without a one-channel the lower bound is 0 and
    the upper one Theorem 3.1's.

  Raises:
    ValueError: as in `recency`.

  Source: this library's; the split follows the channels of Wang et al. 2025,
  §6.
  """
  factors = influence_factors("polarized_recency", layer, x, window)
  if factors.a.shape[1] > 1:
    ones = (factors.a[:, 1:] == 1).all(1)
  else:
    ones = jnp.zeros_like(factors.a[:, 0], bool)
  kept = influence_sum(factors, ones)
  decaying = influence_sum(factors, ~ones)
  rest = ~ones[:, None]
  others = jnp.where(rest, factors.a, 0.0)
  rho = _largest(jnp.abs(others), 0.0)
  constant = _readout_size(factors, ~ones) * _entry_size(factors, ~ones)
  remainder = _geometric(constant, rho, factors)
  wide = remainder[..., None, None]
  strength = jnp.abs(kept)
  strongest = largest(strength, (-1, -2))
  floor = smallest(jnp.where(_reached(factors), strongest, jnp.inf), (1, 2))
  lags = (jnp.log(constant) - jnp.log(floor)) / -jnp.log(rho)
  lags = jnp.where(rho > 0, lags, 0.0)
  lags = jnp.where(rho < 1, jnp.maximum(lags, 0.0), jnp.inf)
  lags = jnp.where(constant > 0, lags, 0.0)
  return PolarizedRecency(
    jacobian=kept + decaying,
    kept=kept,
    decaying=decaying,
    remainder=remainder,
    lower=jnp.maximum(strength - wide, 0.0),
    upper=strength + wide,
    floor=floor,
    horizon=jnp.where(floor > 0, lags + (factors.window - 1), jnp.inf),
    ones=ones.reshape(ones.shape[0], *factors.channels),
    rho=rho,
    constant=constant,
    premises=_premises(
      # Any decay between the two limits meets the premises.
      jnp.where(rest, factors.a, 0.5).reshape(*x.shape[:2], *factors.channels),
      factors.local,
    ),
    applies=_applies(factors, rho, constant),
    window=factors.window,
  )


def _premises(a, local=None):
  size = jnp.abs(a[:, 1:])
  return RecencyPremises(
    measure_premise(size < 1, size - 1, 2, first=1),
    measure_premise(size > 0, -size, 2, first=1),
    local,
  )


def _applies(factors, ratio, constant):
  return (ratio < 1) & factors.local.holds & jnp.isfinite(constant)


def _readout_size(factors: Factors, mask=None):
  """maxₜ ‖∇cₜ‖₁ over the channels of the mask, the largest output's."""
  size = jnp.abs(factors.p)
  if factors.q is not None:
    size = size + jnp.abs(factors.q)
  if mask is not None:
    size = jnp.where(mask[:, None, None], size, 0.0)
  return largest(size.sum(-1), (1, 2))


def _entry_size(factors: Factors, mask=None):
  """maxₛ Σⱼ ‖gⱼₛ‖_∞ over the channels of the mask, the largest input's."""
  size = jnp.abs(factors.g)
  if mask is not None:
    size = jnp.where(mask[:, None, None, :, None], size, 0.0)
  return largest(largest(size, (-1, -2)).sum(1), 1)


def _a_priori(factors, a_max):
  """C from suprema: no trajectory but through 1/(1 - A_max)."""
  peak = lambda v: largest(jnp.abs(v), tuple(range(1, v.ndim)))
  start = jnp.maximum(peak(factors.h0), peak(factors.a[:, 0] * factors.h0))
  gap = jnp.where(a_max < 1, 1 - a_max, 1.0)
  reach = start + peak(factors.drive) / gap
  reach = jnp.where(a_max >= 1, jnp.inf, reach + 0 * a_max)
  d_a, d_drive = peak(factors.d_a), peak(factors.d_drive)
  # A decay that no input moves needs no bound on the state: 0 · ∞ is 0 here.
  carried = jnp.where(d_a == 0, 0.0, d_a * reach)
  return _readout_size(factors) * factors.window * (d_drive + carried)


def _geometric(constant, ratio, factors):
  """C ratio^(t-s-W+1) where the theorem speaks, else infinity."""
  times = jnp.arange(factors.a.shape[1])
  constant, ratio = constant[:, None, None], ratio[:, None, None]
  # Of the W ways in, the last is weighed most; the first, if decays grow.
  lag = times[:, None] - times[None] - (factors.window - 1)
  lag = jnp.where(ratio > 1, lag + (factors.window - 1), lag[None])
  # 0⁰ never comes up: lags are at least 1 here.
  lag = jnp.maximum(lag, 1)
  # In halves: the power alone may underflow where C times it does not.
  half = lag // 2
  power = lambda n: ratio ** n.astype(ratio.dtype)
  bound = constant * power(half) * power(lag - half)
  return jnp.where(_reached(factors), bound, jnp.inf)


def _reached(factors):
  times = jnp.arange(factors.a.shape[1])
  return (times[:, None] >= times[None] + factors.window)[None]


def _shift_back(weights, by):
  """weights[t, s + by] at [t, s], 0 past the end."""
  moved = weights[:, :, by:]
  return jnp.pad(moved, ((0, 0), (0, 0), (0, by)))


def _largest(size, otherwise):
  """The largest over t ≥ 2 and n of each row."""
  if size.shape[1] == 1:
    return jnp.full(size.shape[:1], otherwise, size.dtype)
  return largest(size[:, 1:], (1, 2))
