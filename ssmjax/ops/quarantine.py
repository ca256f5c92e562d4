"""What is not finite stays in its own document.

A product of matrices adds 0 · x for every token that a mask excludes, and
0 · inf is no number: an overflow in one document of a packed row would reach
all documents that share a chunk with it. So chunked matrix forms take such
tokens out before their products and write NaN afterwards where the recurrence
would have carried them.
"""

import jax.numpy as jnp
from jax import lax

from ssmjax.types import Array, Bool, Int

__all__ = [
  "after",
  "before",
  "document_of",
  "finite_states",
  "reached",
  "take_out",
]


def take_out(x, *, decay: bool = False):
  """x with tokens zeroed that are not finite in axis -1, and which they are.

  A `decay` may be -inf in logarithm: it is a decay of exactly zero.
  """
  fine = jnp.isfinite(x)
  if decay:
    fine = fine | (x == -jnp.inf)
  fine = fine.all(-1)
  return jnp.where(fine[..., None], x, jnp.zeros_like(x)), ~fine


def finite_states(states):
  """States, zero where one is not finite, and where that is."""
  fine = jnp.isfinite(states).all((-1, -2))
  return jnp.where(fine[..., None, None], states, 0), ~fine


def reached(
  sick: Bool[Array, "B T H"], restart: Bool[Array, "B T"]
) -> Bool[Array, "B T H"]:
  """The sick tokens and those after them in the same document."""
  time = jnp.arange(sick.shape[1], dtype=jnp.int32)[None, :, None]
  start = lax.cummax(jnp.where(restart[..., None], time, 0), axis=1)
  return after(sick, start, 1)


def document_of(
  sick: Bool[Array, "B T H"], restart: Bool[Array, "B T"]
) -> Bool[Array, "B T H"]:
  """All tokens of the documents that have a sick one."""
  size = sick.shape[1]
  time = jnp.arange(size, dtype=jnp.int32)[None, :, None]
  # A document ends where the next one restarts.
  ends = jnp.pad(restart[:, 1:], ((0, 0), (0, 1)))[..., None]
  end = lax.cummin(jnp.where(ends, time, size - 1), axis=1, reverse=True)
  return before(sick, end, 1) | reached(sick, restart)


def after(sick: Bool[Array, "..."], start: Int[Array, "..."], axis: int):
  """Whether a token, of a part from index `start` on, is sick or after one."""
  time = lax.broadcasted_iota(jnp.int32, sick.shape, axis)
  return lax.cummax(jnp.where(sick, time, -1), axis=axis) >= start


def before(sick: Bool[Array, "..."], end: Int[Array, "..."], axis: int):
  """Whether a token, of a part up to index `end`, is sick or before one."""
  size = sick.shape[axis]
  time = lax.broadcasted_iota(jnp.int32, sick.shape, axis)
  first = lax.cummin(jnp.where(sick, time, size), axis=axis, reverse=True)
  return first <= end
