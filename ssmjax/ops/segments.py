"""Padding and restarts: what `segment_ids` means, once for every op.

Ids are 1-based, 0 is padding. Padding leaves the state untouched and its
output is 0. The state restarts where a non-padding id differs from the
previous non-padding id of the same call; the first non-padding token goes on
from `initial_state`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from ssmjax.types import Array, Bool, Float, Int

__all__ = ["compacted", "last_valid", "permute", "segment_masks"]


def segment_masks(
  segment_ids: Int[Array, "B T"] | None, *, reverse: bool = False
) -> tuple[Bool[Array, "B T"] | None, Bool[Array, "B T"] | None]:
  """Return (valid, restart), both `[B, T]`, or (None, None) without ids.

  `valid` is False at padding; `restart` is True at the tokens before which
  the state is cleared. With `reverse`, time runs from the last token back.
  """
  if segment_ids is None:
    return None, None
  if reverse:
    valid, restart = _masks(segment_ids[:, ::-1])
    return valid[:, ::-1], restart[:, ::-1]
  return _masks(segment_ids)


def last_valid(
  valid: Bool[Array, "B T"],
) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
  """Index of the last non-padding token of each row, and whether one exists."""
  length = valid.shape[1]
  index = length - 1 - jnp.argmax(valid[:, ::-1], axis=1).astype(jnp.int32)
  return index, valid.any(axis=1)


def compacted(
  x: Float[Array, "B T D"],
  valid: Bool[Array, "B T"],
  restart: Bool[Array, "B T"],
) -> tuple[Array, Int[Array, "B T"], Int[Array, " B"], Int[Array, "B T"]]:
  """Tokens first, padding behind them, so that lags count tokens.

  Returns:
    x in that order, the number of its segment for each token (0 for the one
    that goes on from the initial state), how many tokens there are, and the
    order that undoes it.
  """
  order = jnp.argsort(~valid, axis=1, stable=True)
  back = jnp.argsort(order, axis=1)
  starts = jnp.take_along_axis(restart, order, 1)
  segment = jnp.cumsum(starts.astype(jnp.int32), 1)
  return permute(x, order), segment, valid.sum(1, dtype=jnp.int32), back


@functools.partial(jax.vmap, in_axes=(0, 0))
def permute(x: Array, order: Int[Array, " T"]) -> Array:
  """x[order], told that it is a permutation: its transpose is no sum."""
  return x.at[order].get(
    unique_indices=True, mode="promise_in_bounds", wrap_negative_indices=False
  )


def _masks(segment_ids):
  valid = segment_ids > 0
  time = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
  seen = lax.cummax(jnp.where(valid, time, -1), axis=1)
  # The last non-padding token strictly before each token; -1 for none.
  before = jnp.pad(seen[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  previous = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), 1)
  return valid, valid & (before >= 0) & (previous != segment_ids)
