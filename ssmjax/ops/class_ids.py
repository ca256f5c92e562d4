"""Numbers of classes, tokens and places, of any integer type."""

import jax.numpy as jnp

from ssmjax.types import Array, Int

__all__ = ["known_ids"]


def known_ids(ids: Int[Array, "..."], size: int) -> Int[Array, "..."]:
  """Ids as int32, `size` for one outside 0 … size - 1.

  A type that cannot hold `size` is widened first, and a wide one is compared
  before it is narrowed: no id becomes another's.
  """
  if ids.dtype.itemsize < 4:
    ids = ids.astype(jnp.int32)
  wrong = (ids < 0) | (ids >= size)
  return jnp.where(wrong, size, ids).astype(jnp.int32)
