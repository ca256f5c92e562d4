"""How large the GPU's tiles of a linear scan are, known without Pallas."""

import dataclasses

import jax
import jax.numpy as jnp

__all__ = ["THREADS", "Tiling", "default_tiling", "saved"]

THREADS = 128


@dataclasses.dataclass(frozen=True)
class Tiling:
  """How a block of threads goes through its row.

  Attributes:
    time: steps of a tile, a multiple of `kept`.
    channels: channels of a tile, a multiple of 128.
    kept: steps between two states that the backward pass starts from.
    stages: tiles that are on their way at once.
  """

  time: int = 32
  channels: int = THREADS
  kept: int = 16
  stages: int = 3


def default_tiling(a_dtype, b_dtype) -> Tiling:
  """Return tiles of about 32 KiB of a and b, three of them under way.

  To saturate its memory an H200 must have some 25 KiB on the way to each
  multiprocessor (4.8 TB/s times about 0.7 µs over 132 of them); three tiles
  of 32 KiB (48 with ȳ) are more, and less than the 163 KiB of shared memory
  of an A100, the smallest of the chips. Channels stay at one a thread: more
  would leave multiprocessors without work before any is short of it.
  """
  wide = a_dtype.itemsize + b_dtype.itemsize
  return Tiling(time=32 if wide > 4 else 64)


def saved(a, b, *rest, **static) -> jax.ShapeDtypeStruct:
  """Give the shape of the states that the forward pass keeps.

  They are those before every so many tokens, `[R, pieces, D]`.
  """
  rows, length, channels = b.shape
  pieces = _ceil(length, default_tiling(a.dtype, b.dtype).kept)
  return jax.ShapeDtypeStruct((rows, pieces, channels), jnp.float32)


def _ceil(a, b):
  return -(-a // b)
