"""TTT-linear in windows as long as a mini-batch, each a few matrix products.

With gᵢ = ∂ℓᵢ/∂z of token i at the mini-batch's (W, b), a token t of it has

  yₜ = f at z = qₜW + b - τₜ Σ_{i<=t} rateᵢ (qₜ·kᵢ + 1) gᵢ

A mini-batch counts the tokens of a document, so it begins anywhere in a
window. But of the tokens in a window of its length, those before any end of a
mini-batch take (W, b) from the state; those after the first restart have
(W₀, b₀), for the rest of the window is not longer than a mini-batch; and those
after an end, of which there is one at most, have what that end leaves. So two
sets of gradients are enough, the second only where windows and mini-batches
are not known to coincide.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ssmjax.ops.quarantine import reached, take_out
from ssmjax.types import Array, Float, Int

__all__ = ["TTTState", "inner_output", "inner_slope", "windows"]

_EPSILON = 1e-6  # Of the inner norm, as in the published code.


class TTTState(NamedTuple):
  """What `ttt_linear` carries from token to token.

  Attributes:
    weight: W - W₀ before the unfinished mini-batch, `[B, H, P, P]`, float32.
    bias: b - b₀, `[B, H, P]`.
    weight_sum: Σ rate ∇ℓ by W over the unfinished mini-batch, `[B, H, P, P]`.
    bias_sum: Σ rate ∇ℓ by b, `[B, H, P]`.
    position: tokens in the unfinished mini-batch, `[B]` int32.
  """

  weight: Float[Array, "B H P P"]
  bias: Float[Array, "B H P"]
  weight_sum: Float[Array, "B H P P"]
  bias_sum: Float[Array, "B H P"]
  position: Int[Array, " B"]


def inner_output(x, z, scale, bias):
  """x + LN(z), `[…, P]`."""
  normal, _ = _normalised(z)
  return x + scale * normal + bias


def inner_slope(z, target, scale, bias):
  """The gradient of ½‖LN(z) - target‖² by z."""
  normal, inverse = _normalised(z)
  slope = (scale * normal + bias - target) * scale
  along = jnp.mean(slope * normal, -1, keepdims=True)
  return (slope - slope.mean(-1, keepdims=True) - normal * along) * inverse


def _normalised(z):
  z = z - z.mean(-1, keepdims=True)
  inverse = lax.rsqrt(jnp.mean(jnp.square(z), -1, keepdims=True) + _EPSILON)
  return z * inverse, inverse


def windows(
  q, k, v, rate, learner, state, position, valid, restart, *, aligned
):
  """Run `ops.ttt`'s rule; `aligned` if all mini-batches begin at windows."""
  y_dtype, dtype, length = v.dtype, state.weight.dtype, v.shape[1]
  size = learner.token_scale.shape[0]
  tokens, sick = _clean((q, k, v, rate), valid)
  state, lost = _sound(state)
  never = jnp.zeros_like(position, bool)
  valid = ~never if valid is None else valid
  masks = (valid, never if restart is None else restart, position)
  split = lambda x: _split(x, min(size, length))
  xs = jax.tree.map(split, (tuple(x.astype(dtype) for x in tokens), masks))
  fresh = restart is not None

  @jax.checkpoint
  def body(learner, state, xs):
    return _window(learner, state, *xs, fresh=fresh, aligned=aligned)

  *sums, last = state
  sums, y = lax.scan(lambda sums, xs: body(learner, sums, xs), tuple(sums), xs)
  y = jnp.moveaxis(y, 0, 1)
  y = y.reshape(y.shape[0], -1, *y.shape[3:])[:, :length]
  # The first token of all has what the state had, finite or not.
  first = jnp.arange(length, dtype=jnp.int32)[None, :, None] == 0
  sick = sick | (first & lost[:, None])
  spoiled = reached(sick, masks[1])
  y = jnp.where(spoiled[..., None], jnp.nan, y)
  y = jnp.where(valid[..., None, None], y, 0)
  end = spoiled[:, -1]
  spoil = lambda x: jnp.where(
    lax.expand_dims(end, range(2, x.ndim)), jnp.nan, x
  )
  # Places of padding are those of the token before.
  last = (position[:, -1] + 1) % size
  return y.astype(y_dtype), TTTState(*map(spoil, sums), last)


def _window(learner, sums, tokens, masks, *, fresh, aligned):
  """The tokens of a window, `[B, C, H, …]`, and the state after it."""
  weight, bias, weight_sum, bias_sum = sums
  q, k, v, rate = (jnp.moveaxis(x, 1, 2) for x in tokens)
  valid, restart, position = masks
  size = learner.token_scale.shape[0]
  batch, length = valid.shape
  row = lambda x: jnp.broadcast_to(x[None], (batch, *x.shape))
  start_weight, start_bias = row(learner.weight), row(learner.bias)
  norm = [row(x)[..., None, :] for x in (learner.norm_scale, learner.norm_bias)]
  down = learner.token_scale[size - 1]
  # Which documents, and which mini-batches of the first, the tokens are in.
  document = jnp.cumsum(restart, 1, dtype=jnp.int32)
  done = valid & (position == size - 1)
  ends = jnp.cumsum(done, 1, dtype=jnp.int32) - done.astype(jnp.int32)
  second = (ends > 0) & (document == 0)
  group = 2 * document + second.astype(jnp.int32)
  new, going_on = document > 0, group == 0

  def read(x, weight, bias):
    return _dot("tp,pr->tr", x, weight) + bias[..., None, :]

  def total(members, slope, weight_sum, bias_sum):
    part = jnp.where(_tokens(members), rate[..., None] * slope, 0)
    return weight_sum + _dot("tp,tr->pr", k, part), bias_sum + part.sum(-2)

  def from_base(x):
    z = read(x, start_weight + weight, start_bias + bias)
    if fresh:
      z = jnp.where(_tokens(new), read(x, start_weight, start_bias), z)
    return z

  slope = inner_slope(from_base(k), v - k, *norm)
  if aligned:
    after = weight, bias
  else:
    sums = total(going_on & valid, slope, weight_sum, bias_sum)
    after = weight - down * sums[0], bias - down * sums[1]
    z = read(k, start_weight + after[0], start_bias + after[1])
    slope = jnp.where(_tokens(second), inner_slope(z, v - k, *norm), slope)

  mask = group[:, :, None] == group[:, None, :]
  mask &= valid[:, None, :] & np.tri(length, dtype=bool)[None]
  match = rate[..., None, :] * (_dot("tp,ip->ti", q, k) + 1)
  step = _dot("ti,ip->tp", jnp.where(mask[:, None], match, 0), slope)
  base = from_base(q)
  if not aligned:
    z = read(q, start_weight + after[0], start_bias + after[1])
    base = jnp.where(_tokens(second), z, base)
    step += jnp.where(_tokens(going_on), read(q, weight_sum, bias_sum), 0)
  scale = learner.token_scale[position][:, None, :, None]
  y = inner_output(q, base - scale * step, *norm)

  # What the last token's mini-batch began with, its sums, and if it is done.
  members = (group == group[:, -1:]) & valid
  at_end = lambda mask, x: lax.expand_dims(mask[:, -1], range(1, x.ndim))
  keep = lambda mask, x: jnp.where(at_end(mask, x), x, 0)
  sums = total(
    members, slope, keep(going_on, weight_sum), keep(going_on, bias_sum)
  )
  complete = (members & done).any(1, keepdims=True)

  def finish(old, after, total):
    old = jnp.where(at_end(second, old), after, keep(~new, old))
    old = old - keep(complete, down * total)
    return old, keep(~complete, total)

  weight, weight_sum = finish(weight, after[0], sums[0])
  bias, bias_sum = finish(bias, after[1], sums[1])
  return (weight, bias, weight_sum, bias_sum), jnp.moveaxis(y, 2, 1)


def _clean(tokens, valid):
  """Tokens without padding and what is not finite, and where that was."""
  if valid is not None:
    at = lambda x: lax.expand_dims(valid, range(2, x.ndim))
    tokens = [jnp.where(at(x), x, jnp.zeros_like(x)) for x in tokens]
  *wide, rate = tokens
  cleaned, sick = zip(*map(take_out, (*wide, rate[..., None])), strict=True)
  sick = sick[0] | sick[1] | sick[2] | sick[3]
  *wide, rate = cleaned
  return (*wide, rate[..., 0]), sick


def _sound(state):
  """The state, 0 where a head's is not finite, and where, `[B, H]`."""
  *sums, position = state
  fine = jnp.ones(state.bias.shape[:2], bool)
  for x in sums:
    fine &= jnp.isfinite(x).all(range(2, x.ndim))
  at = lambda x: lax.expand_dims(fine, range(2, x.ndim))
  sums = [jnp.where(at(x), x, jnp.zeros_like(x)) for x in sums]
  return TTTState(*sums, position), ~fine


def _split(x, size):
  """`[windows, B, size, …]`; the last one filled up with padding."""
  tail = -x.shape[1] % size
  x = jnp.pad(x, ((0, 0), (0, tail)) + ((0, 0),) * (x.ndim - 2))
  x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
  return jnp.moveaxis(x, 1, 0)


def _tokens(mask):
  """`[B, C]` as `[B, 1, C, 1]`."""
  return mask[:, None, :, None]


def _dot(axes, x, y):
  """Multiply matrices of every row and head."""
  x_axes, rest = axes.split(",")
  y_axes, out = rest.split("->")
  return jnp.einsum(
    f"bh{x_axes},bh{y_axes}->bh{out}", x, y, precision=lax.Precision.HIGHEST
  )
