"""How large the TPU's tiles of a selective scan are, known without Pallas."""

import dataclasses

import jax
import jax.numpy as jnp

__all__ = ["GROUP", "LANES", "Tiling", "default_tiling", "saved", "sizes"]

LANES, GROUP = 128, 8  # A register's lanes; tokens that are handled together.


@dataclasses.dataclass(frozen=True)
class Tiling:
  """What one step of the grid works on.

  Attributes:
    time: tokens, a multiple of 16.
    sublanes: channels / 128, at most 8: fewer leave a register part empty.
    states: how many n are scanned together; more than 16 spill registers.
  """

  time: int
  sublanes: int
  states: int


def default_tiling(
  length: int,
  channels: int,
  states: int,
  *,
  backward: bool = False,
  vmem: int = 12 << 20,
) -> Tiling:
  """Choose tiles for a scan of T, D, N, within `vmem` bytes of scratch.

  The default fits the 16 MiB that a kernel gets on every TPU since v5e.
  """
  tiles = ceil(channels, 8 * LANES)
  sublanes = ceil(ceil(channels, LANES), tiles)
  blocks = ceil(states, 16)
  block = ceil(states, blocks)
  # Bytes for each token: B and C spread over lanes; rows of Δ and the like;
  # the blocks of inputs and outputs, each twice, of which those of numbers
  # take 128 lanes; and for the adjoint of every state.
  register, row = 4 * 8 * LANES, 4 * LANES
  per_token = 2 * block * row + 3 * register + 8 * register
  per_token += (4 * blocks + 6) * row
  if backward:
    per_token += 9 * register + (2 * blocks + 2) * row + block * register
  fits = (vmem - 12 * register * blocks * block) // per_token // 16 * 16
  time = max(16, min(fits, 64 if backward else 128, ceil(length, 16) * 16))
  return Tiling(time, sublanes, block)


def sizes(rows, tiling: Tiling) -> tuple[int, tuple[int, ...]]:
  """Count the tiles of time; give the shape that a state has in memory.

  That is `[R, N, tiles of D, sublanes, 128]`, with N in whole blocks.
  """
  batch, length, width = rows["u"].shape
  count = rows["B"].shape[-1]
  blocks = ceil(count, tiling.states)
  tiles = ceil(width, tiling.sublanes * LANES)
  state = (batch, blocks * tiling.states, tiles, tiling.sublanes, LANES)
  return ceil(length, tiling.time), state


def saved(rows, shared, **static) -> jax.ShapeDtypeStruct:
  """Give the shape of the states that the forward pass keeps.

  They are those at the starts of the backward pass's tiles.
  """
  _, length, width = rows["u"].shape
  tiling = default_tiling(length, width, rows["B"].shape[-1], backward=True)
  times, (batch, *state) = sizes(rows, tiling)
  return jax.ShapeDtypeStruct((batch, times, *state), jnp.float32)


def ceil(a: int, b: int) -> int:
  """Divide, rounding up."""
  return -(-a // b)
