"""Products of decays over pieces of a chunk, without a division.

What a token j has left at a token i is the product of the decays of the tokens
between them. As a quotient of two running products it would be no number next
to a decay of zero, and exp of a difference of running sums of logarithms loses
its digits next to a strong one. So a chunk is halved again and again: between
the halves of a block, the way from j to i is the way from j to the end of the
first half and from there to i. Both are products of numbers of at most 1, and
the two factors go into a matrix product where decays differ by key channel.

A product of rounded decays is off by half a unit in the last place for each of
them, which within a chunk is little. From chunk to chunk it would add up: what
a decay just below 1 leaves after thousands of tokens is the product of the
chunks' own decays, and those are exponentials of sums.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = ["by_halves", "by_products", "halvings", "keywise_scores"]

# Halves smaller than this share one masked product of blocks of this size.
_BASE = 16


def halvings(log_a, *, before):
  """(levels, into, out, total) of `[..., c, K]`, c a power of two.

  Into token t are the decays up to and with t, or without it if `before`; out
  of it those after t; in a level, those of its half of a block only. The level
  of halves of h tokens is the h-th power of two. The total, `[..., K]`, is the
  exponential of the sum.
  """
  decay, shape = jnp.exp(log_a), log_a.shape
  bits = shape[-2].bit_length() - 1
  # An axis for each bit of the time in the chunk: all is broadcast, not moved.
  block = decay.reshape(*shape[:-2], *(2,) * bits, shape[-1])
  into, out = block, jnp.ones_like(block)
  if before:
    into = out
  levels = []
  for axis in range(block.ndim - 2, block.ndim - 2 - bits, -1):
    levels.append((into.reshape(shape), out.reshape(shape)))
    first, second = jnp.split(block, 2, axis)
    one = jnp.ones_like(first)
    into = into * jnp.concatenate([one, first], axis)
    out = out * jnp.concatenate([second, one], axis)
    block = first * second
  total = jnp.exp(log_a.sum(-2))
  # Fused with what reads them, the products would be formed again by each.
  return lax.optimization_barrier(
    (levels, into.reshape(shape), out.reshape(shape), total)
  )


def by_halves(log_a, *, before):
  """(between, into, out, total) of decays by head, `[..., c, 1]`.

  `between` any j and i, `[..., c, c]`, is 0 for j > i and 1 on i; the others as
  of `halvings`.
  """
  levels, *others = halvings(log_a, before=before)
  between = jnp.ones((*log_a.shape, 1), log_a.dtype)
  for into, out in levels:
    half = between.shape[-1]
    blocks = lambda x, half=half: x.reshape(*x.shape[:-2], -1, half, 1)
    low = blocks(into)[..., 1::2, :, :] * jnp.swapaxes(
      blocks(out)[..., 0::2, :, :], -1, -2
    )
    between = _quarters(between, 0, low)
  return between[..., 0, :, :], *others


def by_products(log_a, *, before):
  """As `by_halves`, from sums that are products with a matrix of ones.

  A matrix unit has them at once where the small axes of halves leave it idle:
  on a TPU the gradient of all takes less than half the time.
  """
  # No number is times 0 there, and its exponential still is 0.
  log_a = jnp.maximum(log_a[..., 0], -1e4)
  size = log_a.shape[-1]
  i, j = np.arange(size)[:, None], np.arange(size)[None]
  up_to, later = (j < i) if before else (j <= i), j > i
  product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
  ones = jnp.asarray(np.concatenate([up_to, later]), log_a.dtype)
  sums = jnp.exp(product("sl,...l->...s", ones, log_a))
  parts = jnp.where(jnp.asarray(i > j), log_a[..., None], 0)
  ones = jnp.asarray(up_to, log_a.dtype)
  between = jnp.exp(product("il,...lj->...ij", ones, parts))
  between = jnp.where(jnp.asarray(j <= i), between, 0)
  into, out = sums[..., :size, None], sums[..., size:, None]
  return between, into, out, jnp.exp(log_a.sum(-1, keepdims=True))


def keywise_scores(q, k, levels, product):
  """Σₖ qᵢ kⱼ decay between j and i, `[..., c, c]`; 0 for j ≥ i.

  q, k and `levels` are `[..., c, K]`; `product(x, y)` contracts last axes.
  """
  length = q.shape[-2]
  base = min(_BASE, length)
  blocks = lambda x, size: x.reshape(*x.shape[:-2], -1, size, x.shape[-1])
  scores = jnp.zeros((*q.shape[:-2], length // base, base, base), q.dtype)
  for n, (into, out) in enumerate(levels):
    half = 1 << n
    # A token is asked in second halves and is met in first ones.
    asks = (np.arange(length) // half % 2 == 1)[:, None]
    asks = jnp.asarray(asks.reshape((1,) * (q.ndim - 2) + asks.shape))
    x = jnp.where(asks, q, k) * jnp.where(asks, into, out)
    if half < base:
      x = blocks(x, base)
      mask = _across(base, half, scores.ndim)
      scores = jnp.where(mask, product(x, x), scores)
    else:
      x = blocks(x, half)
      low = product(x[..., 1::2, :, :], x[..., 0::2, :, :])
      scores = _quarters(scores, 0, low)
  return scores[..., 0, :, :]


def _quarters(blocks, upper, lower):
  """Square blocks twice as large, of pairs on the diagonal and what is off."""
  first, second = blocks[..., 0::2, :, :], blocks[..., 1::2, :, :]
  top = jnp.concatenate([first, jnp.full_like(lower, upper)], -1)
  return jnp.concatenate([top, jnp.concatenate([lower, second], -1)], -2)


def _across(size, half, ndim):
  """Whether i is in the second and j in the first half of one block."""
  block = np.arange(size) // half
  pairs = (block[:, None] == block[None] + 1) & (block[None] % 2 == 0)
  return jnp.asarray(pairs.reshape((1,) * (ndim - 2) + pairs.shape))
