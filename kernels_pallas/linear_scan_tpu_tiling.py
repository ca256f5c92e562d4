"""How large the TPU's tiles of a linear scan are, known without Pallas."""

import dataclasses

import jax
import jax.numpy as jnp

__all__ = ["GROUP", "LANES", "Tiling", "default_tiling", "saved"]

LANES = 128
# bfloat16 packs two steps into a sublane, so 16 steps fill its registers.
GROUP = 16


@dataclasses.dataclass(frozen=True)
class Tiling:
  """Steps (a multiple of 16, of 128 if T has several tiles) and channels."""

  time: int
  channels: int


def default_tiling(T: int, D: int) -> Tiling:
  """Return tiles of up to 512 steps × 512 channels, as even as they can be.

  In float32 the backward pass then holds two buffers of five such tiles and
  one of scratch, 11 MiB, which fits the 16 MiB that every TPU since v4 grants
  a kernel; a smaller tile would move too little per step of the grid to hide
  the step's own cost. bfloat16 takes the same tiles: its scratch is float32.
  """
  steps = _even(T, 512, LANES if T > 512 else GROUP)
  return Tiling(steps, _even(D, 512, LANES))


def saved(a, b, *rest, **static) -> jax.ShapeDtypeStruct:
  """Give the shape of the states that the forward pass keeps.

  They are those before each tile of time, `[R, tiles, 1, D]`.
  """
  rows, length, channels = b.shape
  tiles = _ceil(length, default_tiling(length, channels).time)
  return jax.ShapeDtypeStruct((rows, tiles, 1, channels), jnp.float32)


def _even(size, limit, multiple):
  """Pieces as even as multiples can be, no more of them than limit asks."""
  pieces = _ceil(size, limit)
  return _ceil(_ceil(size, pieces), multiple) * multiple


def _ceil(a, b):
  return -(-a // b)
