"""Tensors into the stacks of layers that parameters are."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["cut", "insert"]

# See `Tensor.part`.
Part = tuple[int, int, int] | None


def cut(
  fill: Callable[[np.ndarray, tuple[slice, ...]], None],
  index: tuple[slice, ...],
  size: tuple[int, ...],
  part: Part,
  dtype,
) -> np.ndarray:
  """Make a device's piece of a layer's parameter.

  Args:
    fill: copies the tensor's piece at an index into an array.
    index: the piece of the parameter.
    size: the parameter's shape.
    part: where in the parameter the tensor is; the rest is zero.
    dtype: the parameter's.
  """
  shape = [len(range(*s.indices(n))) for s, n in zip(index, size, strict=True)]
  piece = np.zeros(shape, dtype)
  if part is None:
    fill(piece, index)
    return piece
  axis, start, stop = part
  low, high, _ = index[axis].indices(size[axis])
  first, last = max(low, start), min(high, stop)
  if first < last:
    there, here = list(index), [slice(None)] * len(size)
    there[axis] = slice(first - start, last - start)
    here[axis] = slice(first - low, last - low)
    fill(piece[tuple(here)], tuple(there))
  return piece


@functools.cache
def insert(sharding, part: Part) -> Callable[..., jax.Array]:
  """A layer, or a part of it, into its stack, whose memory is used again."""

  def put(stack, array, layer):
    if part is not None:
      # Chosen place by place: a slice of divided axes would gather them.
      axis, start, stop = part
      at = jax.lax.broadcasted_iota(np.int32, array.shape, axis)
      old = jax.lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False)
      array = jnp.where((at >= start) & (at < stop), array, old)
    return jax.lax.dynamic_update_index_in_dim(stack, array, layer, 0)

  return jax.jit(put, donate_argnums=0, out_shardings=sharding)
