"""Chunks of tokens without padding: what the time-invariant scans share."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ssmjax.types import Array, Float, Inexact, Int

__all__ = ["last_chunk", "taps"]


def taps(
  x: Float[Array, "B K S D"],
  kernel: Float[Array, "D S"],
  ids: Int[Array, "B K S"] | None,
) -> Float[Array, "B K S D"]:
  """Σⱼ kernelⱼ xₜ₋ⱼ within a chunk, and within a segment."""
  size = x.shape[2]
  # Fused with the matrix, the sum over states would be formed for each entry.
  kernel = lax.optimization_barrier(kernel)
  if ids is None:
    lag = np.arange(size)[:, None] - np.arange(size)[None]
    matrix = jnp.where(lag >= 0, kernel[:, np.maximum(lag, 0)], 0)
    return jnp.einsum(
      "bksd,dts->bktd", x, matrix, precision=lax.Precision.HIGHEST
    )
  # A matrix of its own for each chunk would be D times as large as its ids.
  zeros = ((0, 0), (0, 0), (size, 0))
  before, ids_before = jnp.pad(x, (*zeros, (0, 0))), jnp.pad(ids, zeros)

  @jax.checkpoint
  def add(y, tap):
    lag, weight = tap
    slide = lambda x: lax.dynamic_slice_in_dim(x, size - lag, size, 2)
    inside = jnp.arange(size, dtype=jnp.int32) >= lag
    same = (slide(ids_before) == ids) & inside[None, None]
    met = jnp.where(same[..., None], slide(before), 0)
    return y + weight[None, None, None] * met, None

  lags = jnp.arange(size, dtype=jnp.int32)
  return lax.scan(add, jnp.zeros_like(x), (lags, kernel.T))[0]


def last_chunk(
  x: Float[Array, "B T D"],
  states: Inexact[Array, "B K D N"],
  segment: Int[Array, "B T"] | None,
  count: Int[Array, " B"] | None,
  size: int,
) -> tuple[Inexact[Array, "B D N"], Float[Array, "B S D"], Int[Array, " B"]]:
  """What the state after the last token is made of.

  Args:
    x: tokens without padding between them, `[B, T, D]`.
    states: before each chunk, `[B, K, D, N]`.
    segment: see `compacted`; None where all is one.
    count: tokens of each row; all if None.
    size: S, tokens of a chunk.

  Returns:
    The state before the chunk of the last token (0 if of another segment), the
    inputs since then, the last first (0 if of another segment), and the number
    of tokens since then, 0 to S.
  """
  rows, length, _ = x.shape
  if count is None:
    count = jnp.full(rows, length, jnp.int32)
  chunk = jnp.maximum(count - 1, 0) // size
  inside = count - chunk * size
  # The tokens of that chunk, the last first.
  place = count[:, None] - 1 - jnp.arange(size, dtype=jnp.int32)[None]
  row = jnp.arange(rows, dtype=jnp.int32)
  at = (row[:, None], jnp.maximum(place, 0))
  keep = place >= (chunk * size)[:, None]
  state = states[row, chunk]
  if segment is not None:
    own = segment[row, jnp.maximum(count - 1, 0)]
    keep &= segment[at] == own[:, None]
    first = chunk * size - 1
    before = jnp.where(first < 0, 0, segment[row, jnp.maximum(first, 0)])
    state = jnp.where((before == own)[:, None, None], state, 0)
  return state, jnp.where(keep[..., None], x[at], 0), inside
