"""What is not finite stays in its own document.

A product of matrices adds 0 · x for every token that a mask excludes, and
0 · inf is no number: an overflow in one document of a packed row would reach
all documents that share a chunk with it. So chunked matrix forms take such
tokens out before their products and write NaN afterwards where the recurrence
would have carried them.
"""

import jax.numpy as jnp
from jax import lax

from ssmjax.types import Array, Bool

__all__ = ["document_of", "reached", "take_out"]


def take_out(x, *, decay: bool = False):
  """x with tokens zeroed that are not finite in axis -1, and which they are.

  A `decay` may be -inf in logarithm: it is a decay of exactly zero.
  """
  fine = jnp.isfinite(x)
  if decay:
    fine = fine | (x == -jnp.inf)
  fine = fine.all(-1)
  return jnp.where(fine[..., None], x, jnp.zeros_like(x)), ~fine


def reached(
  sick: Bool[Array, "B T H"], restart: Bool[Array, "B T"]
) -> Bool[Array, "B T H"]:
  """The sick tokens and those after them in the same document."""
  time = jnp.arange(sick.shape[1], dtype=jnp.int32)[None, :, None]
  since = lax.cummax(jnp.where(restart[..., None], time, 0), axis=1)
  last = lax.cummax(jnp.where(sick, time, -1), axis=1)
  return last >= since


def document_of(
  sick: Bool[Array, "B T H"], restart: Bool[Array, "B T"]
) -> Bool[Array, "B T H"]:
  """All tokens of the documents that have a sick one."""
  # Backwards, a document begins where the next one restarts.
  ends = jnp.pad(restart[:, 1:], ((0, 0), (0, 1)))
  flip = lambda x: jnp.flip(x, 1)
  before = flip(reached(flip(sick), flip(ends)))
  return before | reached(sick, restart)
