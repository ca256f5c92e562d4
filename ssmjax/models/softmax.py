"""Causal softmax attention over keys at hand, in blocks of queries.

Queries are `[B, T, H, K]`, keys `[B, S, G, K]`: head h of the queries looks at
head ⌊h·G/H⌋ of the keys. A query sees valid keys of its own segment, not after
it; those of an earlier call, `old`, belong to segment 0.
"""

import math

import jax
import jax.numpy as jnp

from ssmjax.types import Array, Bool

__all__ = ["attend", "attend_window"]

# Queries attended to at once: bounds the scores in memory to B·H·256·T.
_QUERY_BLOCK = 256


def attend(q, k, v, segment, valid, old):
  """Mix values by softmax(q · k / √K), of the state and of this call.

  Args:
    q: queries, `[B, T, H, K]`.
    k: keys of the same tokens, `[B, T, G, K]`.
    v: values of them, `[B, T, G, K]`.
    segment: each token's segment, counted from 0, `[B, T]` int.
    valid: which tokens are no padding, `[B, T]` bool.
    old: keys and values `[B, S, G, K]` of tokens 0 to length - 1 of segment 0,
      and length `[B]`; None for none.

  Returns:
    `[B, T, H, K]` of v's dtype; of no meaning at padding.
  """
  batch, length, heads, width = q.shape
  time = jnp.arange(length, dtype=jnp.int32)
  key_side = (k, v, segment, valid, time)

  def block(q, segment, time):
    return _attend_block(q, segment, time, key_side, old)

  if length <= _QUERY_BLOCK:
    return block(q, segment, time)
  count = -(-length // _QUERY_BLOCK)
  padding = count * _QUERY_BLOCK - length
  split = lambda x: jnp.moveaxis(
    jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)).reshape(
      batch, count, _QUERY_BLOCK, *x.shape[2:]
    ),
    1,
    0,
  )
  times = jnp.pad(time, (0, padding), mode="edge").reshape(count, -1)
  y = jax.lax.map(
    jax.checkpoint(lambda xs: block(*xs)), (split(q), split(segment), times)
  )
  y = jnp.moveaxis(y, 0, 1).reshape(batch, -1, heads, width)
  return y[:, :length]


def attend_window(q, k, v, segment, valid, old, window, padded):
  """Mix values as `attend` does, over the last `window` tokens only.

  The window's keys before this call stand before its own, and padding before
  both, so that what a query sees are the `window` keys up to its own place:
  a block of queries needs one slice.

  Args:
    q: as in `attend`, like what follows.
    k: keys.
    v: values.
    segment: segments.
    valid: which tokens are no padding.
    old: as in `attend`, but S = window, token n in slot n mod window.
    window: tokens that a query sees, its own included.
    padded: whether there may be padding; without it nothing is moved.

  Returns:
    As `attend`.
  """
  length = q.shape[1]
  keys, values, key_segment, key_valid = (
    jnp.concatenate(pair, 1)
    for pair in zip(_held(old, k, window), (k, v, segment, valid), strict=True)
  )
  back = None
  if padded:
    order = jnp.argsort(key_valid, axis=1, stable=True)
    keys, values, key_segment, key_valid = (
      _permute(x, order) for x in (keys, values, key_segment, key_valid)
    )
    order = jnp.argsort(valid, axis=1, stable=True)
    back = jnp.argsort(order, axis=1)
    q, segment = _permute(q, order), _permute(segment, order)
  size = min(length, _QUERY_BLOCK)
  count = -(-length // size)
  # Key i + window stands at query i's own place.
  pad = lambda x: jnp.pad(
    x, ((0, 0), (0, count * size - length)) + ((0, 0),) * (x.ndim - 2)
  )
  keys, values, key_segment, key_valid, q, segment = map(
    pad, (keys, values, key_segment, key_valid, q, segment)
  )
  place = jnp.arange(size, dtype=jnp.int32)[:, None]
  key_place = jnp.arange(window + size, dtype=jnp.int32)[None]
  seen = (key_place > place) & (key_place <= place + window)

  def block(start):
    cut = lambda x, n: jax.lax.dynamic_slice_in_dim(x, start, n, 1)
    near = lambda x: cut(x, window + size)
    mask = cut(segment, size)[:, :, None] == near(key_segment)[:, None]
    mask &= near(key_valid)[:, None] & seen[None]
    scores = _scores(cut(q, size), near(keys), mask)
    return _mix(jax.nn.softmax(scores, -1), near(values))

  if count == 1:
    y = block(0)
  else:
    starts = size * jnp.arange(count, dtype=jnp.int32)
    y = jax.lax.map(jax.checkpoint(block), starts)
    y = jnp.moveaxis(y, 0, 1).reshape(q.shape)
  y = y[:, :length]
  return y if back is None else _permute(y, back)


def _attend_block(q, segment, time, key_side, old):
  k, v, key_segment, key_valid, key_time = key_side
  mask = (segment[:, :, None] == key_segment[:, None]) & key_valid[:, None]
  mask &= time[None, :, None] >= key_time[None, None]
  scores = _scores(q, k, mask)
  if old is None:
    weights = jax.nn.softmax(scores, -1)
    return _mix(weights, v)
  old_keys, old_values, old_length = old
  slot = jnp.arange(old_keys.shape[1], dtype=jnp.int32)
  held = slot[None, None] < old_length[:, None, None]
  old_mask = (segment == 0)[:, :, None] & held
  scores = jnp.concatenate([_scores(q, old_keys, old_mask), scores], -1)
  weights = jax.nn.softmax(scores, -1)
  split = old_keys.shape[1]
  return _mix(weights[..., :split], old_values) + _mix(weights[..., split:], v)


def _held(old, like, window):
  """The ring in the order of time: keys, values, segments and which are."""
  # Zeros made of what is there lie on the same devices.
  repeat = lambda x: jnp.broadcast_to(x, (x.shape[0], window, *x.shape[2:]))
  first = like[:, :1]
  segment = repeat(jnp.zeros_like(first[..., 0, 0], jnp.int32))
  if old is None:
    zeros = repeat(jnp.zeros_like(first))
    return zeros, zeros, segment, segment > 0
  keys, values, length = old
  place = jnp.arange(window, dtype=jnp.int32)[None]
  slot = (length[:, None] + place) % window
  held = place >= window - length[:, None]
  return _permute(keys, slot), _permute(values, slot), segment, held


def _permute(x, order):
  """x `[B, T, …]` in another order of time, `[B, T]`."""
  order = order.reshape(*order.shape, *(1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, order, 1)


def _scores(q, k, mask: Bool[Array, "B Q S"]):
  heads = k.shape[2]
  if q.shape[2] == heads:
    scores = jnp.einsum(
      "bqhk,bshk->bhqs", q, k, preferred_element_type=jnp.float32
    )
  else:
    # A head of keys serves the queries of a group.
    scores = jnp.einsum(
      "bqhgk,bshk->bhgqs", q.reshape(*q.shape[:2], heads, -1, q.shape[3]), k,
      preferred_element_type=jnp.float32,
    )  # fmt: skip
    scores = scores.reshape(q.shape[0], q.shape[2], *scores.shape[3:])
  scores = scores / math.sqrt(q.shape[-1])
  # Finite, so that a padding query with no key at all is not a NaN.
  return jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)


def _mix(weights, v):
  heads, width = v.shape[2:]
  weights = weights.astype(v.dtype)
  if weights.shape[1] == heads:
    return jnp.einsum(
      "bhqs,bshk->bqhk", weights, v, preferred_element_type=jnp.float32
    ).astype(v.dtype)
  batch, all_heads, length, keys = weights.shape
  y = jnp.einsum(
    "bhgqs,bshk->bqhgk", weights.reshape(batch, heads, -1, length, keys), v,
    preferred_element_type=jnp.float32,
  ).astype(v.dtype)  # fmt: skip
  return y.reshape(batch, length, all_heads, width)
