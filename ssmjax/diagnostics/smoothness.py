"""How far apart the tokens of a sequence lie, before and after a layer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ssmjax.diagnostics.norms import norm
from ssmjax.theory import (
  KappaSmoothing,
  OverSmoothing,
  kappa_smoothing,
  oversmoothing,
  rotating_frame,
  states,
)
from ssmjax.theory.extremes import largest, smallest
from ssmjax.theory.smoothing import one_minus_power
from ssmjax.types import (
  Array,
  Bool,
  Float,
  Inexact,
  Recurrence,
  check_inexact,
  check_shapes,
  gathered,
  real_dtype,
)

__all__ = [
  "LayerSmoothness",
  "Sharpness",
  "channel_spread",
  "layer_smoothness",
  "sharpness",
]


class Sharpness(NamedTuple):
  """Four measures 𝓔 of how much tokens differ, `[B]` each.

  Attributes:
    maximum: max over t, s of ‖xₜ - xₛ‖_∞, what Theorem 4.2 bounds.
    mean: mean over t ≠ s of ‖xₜ - xₛ‖₂.
    relative: `mean` over the mean of ‖xₜ‖₂: free of scale; NaN if all are 0.
    cosine: 1 - mean over t ≠ s of cos(xₜ, xₛ): of directions alone; a zero
      vector's cosine with another is taken as 0.
  """

  maximum: Float[Array, " B"]
  mean: Float[Array, " B"]
  relative: Float[Array, " B"]
  cosine: Float[Array, " B"]


class LayerSmoothness(NamedTuple):
  """The sharpness along a layer, against what the theorems allow.

  Attributes:
    b: of the inputs bₜ(xₜ).
    h: of the states hₜ.
    mixer: of the mixer's output; None where it was not given.
    block: of the block's output; None where it was not given.
    ratio: each measure of h over that of b; the first is the theorem's.
    factor: 1 - A_min^(T-1), the most that `ratio.maximum` may be by Theorem
      4.2 where `premise` is 1, `[B]`.
    kappa_factor: its repair: max over n of κₙ(1 - a_min^(T-1))·E(bₙ), over
      E(b), `[B]`; a bound where b is centred.
    hull_factor: the same of the hull bound, which holds always.
    premise: share of (t, n) with 0 ≤ A, 0 ≤ Δ, A + Δ ≤ 1.
    channel_ratio: E(hₙ)/E(bₙ) by extremes, `[B, *S]`; where E(bₙ) = 0, 0 if
      the state does not move either and else infinite; NaN where not finite.
    theorem: both sides of Theorem 4.2, channel by channel, with its premises.
    kappa: both sides of the κ bound.
  """

  b: Sharpness
  h: Sharpness
  mixer: Sharpness | None
  block: Sharpness | None
  ratio: Sharpness
  factor: Float[Array, " B"]
  kappa_factor: Float[Array, " B"]
  hull_factor: Float[Array, " B"]
  premise: Float[Array, ""]
  channel_ratio: Float[Array, "B *S"]
  theorem: OverSmoothing
  kappa: KappaSmoothing


@gathered
def sharpness(
  x: Inexact[Array, "B T *S"],
  *,
  mask: Bool[Array, "B T"] | None = None,
  block: int = 8,
) -> Sharpness:
  """Measure how much the tokens of each row differ, in four ways.

  The caption's "average pairwise differences among tokens" leaves its formula
  open; these are those that fit it, and the one that the theorem has. The
  maximum is exact channel by channel from the extremes, in O(T); of complex
  channels, and for the mean, in O(T²) time and O(T) memory, `block` tokens at
  a time: from the differences themselves, as a Gram matrix would lose those
  of tokens that lie close together. The cosine takes O(T):

    1 - mean_{t≠s} uₜ·uₛ = Σₜ‖uₜ - ū‖²/(n-1) + 1 - Σₜ‖uₜ‖²/n,  u = x/‖x‖,

  for ‖Σu‖² = n Σ‖u‖² - n Σ‖u - ū‖²; nothing cancels for unit vectors.

  Args:
    x: `[B, T, *S]`; the axes *S together are a token's vector. Real or
      complex (as vectors of twice as many real numbers, except for the
      maximum, which takes moduli).
    mask: tokens that count, `[B, T]`; None for all. What the others hold, NaN
      too, is without effect.
    block: tokens compared at once with all others; memory grows with it if
      the compiler does not fuse.

  Returns:
    The measures, of float32 or wider. Fewer than two tokens: 0, and NaN for
    `relative` without one.

  Raises:
    ValueError: shapes or dtypes that do not fit.

  >>> sharpness(jnp.array([[[0.0, 1.0], [1.0, 0.0]]])).cosine
  Array([1.], dtype=float32)
  """
  check_inexact("sharpness", x=x)
  if x.ndim < 2 or 0 in x.shape:
    raise ValueError(
      f"sharpness: x has shape {x.shape}, expected (B, T, *S), none empty."
    )
  if block < 1:
    raise ValueError(f"sharpness: block is {block}, expected 1 or more.")
  maximum = channel_spread(x, mask=mask, block=block)
  maximum = largest(maximum.reshape(x.shape[0], -1), -1)
  mask = _full_mask("sharpness", x, mask)
  count = mask.sum(1).astype(maximum.dtype)
  x = x.reshape(*x.shape[:2], -1)
  if jnp.iscomplexobj(x):
    x = jnp.concatenate([x.real, x.imag], -1)
  x = jnp.where(mask[..., None], x, jnp.zeros_like(x)).astype(maximum.dtype)
  # Sizes near the ends of the exponent have squares beyond them; a power of
  # two divides without rounding, which differences would magnify. Those of
  # 1e38 have no reciprocal, by which XLA may multiply.
  down = jnp.where(largest(jnp.abs(x), (1, 2)) > 1e37, 1 / 16, 1.0)
  down = down.astype(x.dtype)
  x = x * down[:, None, None]
  scale = largest(jnp.abs(x), (1, 2))
  some = (scale > 0) & jnp.isfinite(scale)
  mantissa = 2 * jnp.frexp(jnp.where(some, scale, jnp.ones_like(scale)))[0]
  scale = jnp.where(some, scale, jnp.ones_like(scale)) / mantissa
  unit = x / scale[:, None, None]
  length = norm(unit).sum(1) / jnp.maximum(count, 1)

  pairs = jnp.maximum(count * (count - 1), 1)
  mean = _pair_distances(unit, mask, block) / pairs

  # Each token by its own size: beside a large one, its squares would be 0.
  sizes = largest(jnp.abs(x), -1, keepdims=True)
  some = (sizes > 0)[..., 0]
  turned = x / jnp.where(sizes > 0, sizes, jnp.ones_like(sizes))
  norms = jnp.where(some, norm(turned), jnp.ones_like(sizes[..., 0]))
  turned = turned / norms[..., None]
  middle = turned.sum(1) / jnp.maximum(count, 1)[:, None]
  away = jnp.square(turned - middle[:, None]).sum(-1)
  away = jnp.where(mask, away, jnp.zeros_like(away)).sum(1)
  missing = (mask & ~some).sum(1).astype(count.dtype)
  cosine = away / jnp.maximum(count - 1, 1) + missing / jnp.maximum(count, 1)
  return Sharpness(
    maximum=maximum,
    mean=scale * mean / down,
    relative=mean / length,
    cosine=jnp.where(count > 1, cosine, jnp.zeros_like(cosine)),
  )


@gathered
def channel_spread(
  x: Inexact[Array, "B T *S"],
  *,
  mask: Bool[Array, "B T"] | None = None,
  block: int = 8,
) -> Float[Array, "B *S"]:
  """Measure max over t, s of |xₜₙ - xₛₙ| for each channel, exactly.

  Args:
    x: `[B, T, *S]`. Real: the extremes' difference, O(T); complex: by pairs.
    mask: as in `sharpness`.
    block: as in `sharpness`, for complex x.

  Returns:
    The diameters, `[B, *S]`; 0 for fewer than two tokens.
  """
  mask = _full_mask("channel_spread", x, mask)
  mask = mask.reshape(mask.shape + (1,) * (x.ndim - 2))
  some = mask.any(1)
  if not jnp.iscomplexobj(x):
    x = x.astype(real_dtype(x))
    high = largest(jnp.where(mask, x, -jnp.inf), 1)
    low = smallest(jnp.where(mask, x, jnp.inf), 1)
    return jnp.where(some, high - low, jnp.zeros_like(high))
  # A token that does not count is put where another is.
  first = jnp.take_along_axis(x, mask.argmax(1, keepdims=True), 1)
  x = jnp.where(mask, x, jnp.where(some[:, None], first, jnp.zeros_like(first)))
  farthest = lambda one: largest(jnp.abs(x - one[:, None]), 1)
  each = jax.lax.map(farthest, jnp.moveaxis(x, 1, 0), batch_size=block)
  return largest(each, 0)


@gathered
def layer_smoothness(
  recurrence: Recurrence,
  mixer: Inexact[Array, "B T M"] | None = None,
  block: Inexact[Array, "B T M"] | None = None,
  *,
  tolerance: float | None = None,
) -> LayerSmoothness:
  """Follow the sharpness of tokens through one layer.

  𝓔(b) → 𝓔(h) → 𝓔(mixer's output) → 𝓔(block's output)

  Theorem 4.2 bounds the first step: 𝓔(h) ≤ (1 - A_min^(T-1)) 𝓔(b) if
  A + Δ ≤ 1 and b is centred; where the first of these fails κ takes its
  place, and the hull where both do. Of the other steps it says nothing.

  Args:
    recurrence: the layer's own Eq. 1 on an input. One of complex decays is
      looked at in its rotating frame, where alone the theorem holds: by an
      observer who turns with the states.
    mixer: the mixer's output on the same input, `[B, T, M]`.
    block: the block's output, residual included, `[B, T, M]`.
    tolerance: of the premises, as in `theory.smoothing_premises`.

  Returns:
    Measures, ratios and bounds.

  Raises:
    ValueError: shapes that do not fit.
  """
  if jnp.iscomplexobj(recurrence.a):
    recurrence = rotating_frame(recurrence)
  theorem = oversmoothing(recurrence, tolerance=tolerance)
  ours = kappa_smoothing(recurrence, tolerance=tolerance)
  b, h = sharpness(recurrence.b), sharpness(states(recurrence))
  every = lambda v: v.reshape(v.shape[0], -1)
  joint = largest(every(theorem.input_spread), -1)
  length = recurrence.b.shape[1]
  return LayerSmoothness(
    b=b,
    h=h,
    mixer=None if mixer is None else sharpness(mixer),
    block=None if block is None else sharpness(block),
    ratio=Sharpness(*map(_ratio, h, b)),
    factor=one_minus_power(smallest(every(theorem.a_min), -1), length - 1),
    kappa_factor=_ratio(ours.joint_bound, joint),
    hull_factor=_ratio(largest(every(ours.hull_bound), -1), joint),
    premise=theorem.premises.contraction.fraction,
    channel_ratio=_ratio(theorem.state_spread, theorem.input_spread),
    theorem=theorem,
    kappa=ours,
  )


def _pair_distances(x, mask, block):
  """Σ_{t,s} ‖xₜ - xₛ‖₂ over the tokens that count, `[B]`."""
  # In units of the largest difference: tokens may be large and lie close
  # together, and squares of differences be 0.
  widest = largest(channel_spread(x, mask=mask), -1)
  some = (widest > 0) & jnp.isfinite(widest)
  widest = jnp.where(some, widest, jnp.ones_like(widest))

  def row(token):
    one, counts = token
    apart = (x - one[:, None]) / widest[:, None, None]
    apart = jnp.sqrt(jnp.square(apart).sum(-1))
    both = mask & counts[:, None]
    return jnp.where(both, apart, jnp.zeros_like(apart)).sum(1)

  tokens = jnp.moveaxis(x, 1, 0), jnp.moveaxis(mask, 1, 0)
  return widest * jax.lax.map(row, tokens, batch_size=block).sum(0)


def _full_mask(function, x, mask):
  if mask is None:
    return jnp.ones(x.shape[:2], bool)
  check_shapes(function, {"mask": (mask, f"B={x.shape[0]} T={x.shape[1]}")})
  return mask.astype(bool)


def _ratio(part, whole):
  """part/whole; 0/0 is 0, for what has not moved is smooth."""
  still = whole == 0
  ratio = part / jnp.where(still, jnp.ones_like(whole), whole)
  beyond = jnp.where(part > 0, jnp.full_like(ratio, jnp.inf), ratio)
  return jnp.where(still, beyond, ratio)
