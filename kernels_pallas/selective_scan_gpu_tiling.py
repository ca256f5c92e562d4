"""Which tiles the selective scan on GPU takes, and whether they fit."""

import dataclasses

import jax
import jax.numpy as jnp

from kernels_pallas import selective_scan_gpu_chip as chip
from kernels_pallas.selective_scan_gpu_plan import Plan, Tiling, plan
from ssmjax.types import Array

__all__ = ["check_size", "default_tiling", "saved", "shared_bytes", "widest"]

# Each array in shared memory starts at whole 1024 bytes, for swizzles; barriers
# and the start itself take two such units (Mosaic's own account of a kernel).
_UNIT = 1024
_OWN = 2 * _UNIT


def default_tiling(
  states: int, *, ones: int = 0, itemsize: int = 4, backward: bool = False
) -> Tiling:
  """Choose a tiling by shape and chip.

  A thread holds at most 8 state elements of the backward pass (16 of the
  forward pass), so that nothing spills and several warps share a scheduler;
  then as much is in flight as shared memory allows. What is kept between the
  passes is one for both: their lanes, chunk and states agree. Where shared
  memory is small, first more threads share a channel, so that a block has
  fewer channels, then a backward pass takes less of N.

  Args:
    states: N.
    ones: the state channels without an exponential.
    itemsize: bytes of an element of the widest of u, delta and z.
    backward: for the backward pass, which keeps more in shared memory.
  """
  chunk, limit = 32 if chip.before_hopper() else 16, chip.shared_memory()

  def need(tiling, backward):
    return shared_bytes(_sized(tiling, ones, states), itemsize, backward)

  tilings: list[Tiling] = []
  for lanes, part in _divisions(states):
    both = dict(lanes=lanes, states=part, chunk=chunk)
    tilings = [
      Tiling(unroll=unroll, stages=stages, **both)
      for stages in (2, 1)
      for unroll in (4, 8, 2)
    ]
    tilings = [t for t in tilings if need(t, True) <= limit] or tilings[-1:]
    if need(tilings[0], True) <= limit:
      break
  if backward:
    return tilings[0]
  tilings = [
    dataclasses.replace(tilings[0], unroll=4, stages=stages)
    for stages in (2, 1)
  ]
  return tilings[need(tilings[0], False) > limit]


def saved(rows, shared, *, ones: int, **static) -> tuple:
  """Give the shapes of the parts of the states that the forward pass keeps."""
  states, itemsize = rows["B"].shape[-1], widest(rows)
  tiling = default_tiling(states, ones=ones, itemsize=itemsize)
  sizes = plan(rows, shared, ones, tiling)
  return tuple(
    jax.ShapeDtypeStruct(
      (sizes.rows, sizes.chunks, sizes.depth, columns), jnp.float32
    )
    for columns in sizes.parts.values()
  )


def widest(rows) -> int:
  """Bytes of an element of the widest of the arrays that have channels."""
  named = (rows.get(name) for name in ("u", "delta", "z", "d_y"))
  return max(x.dtype.itemsize for x in named if x is not None)


def check_size(plan: Plan, x: Array, itemsize: int, backward: bool) -> Array:
  """`x`, or the error of a program that would not run, when it is lowered."""
  which = "backward" if backward else "forward"
  # Addresses are of 64 bits, but what counts along one axis is of 32.
  counts = {"blocks": plan.rows * plan.tiles}
  if backward:
    pairs = max(own.pairs for _, own in plan.passes)
    counts["sums of B's and C's cotangents along T"] = plan.time * pairs
  for what, count in counts.items():
    if count >= 2**31:
      return chip.refuse(
        x,
        f"selective_scan: u has B={plan.rows}, T={plan.length},"
        f" D={plan.channels}, for which the {which} kernel has {count} {what};"
        " expected less than 2³¹. Scan parts of T one after the other, each"
        " from the final_state before it, or pass implementation='chunked'.",
      )
  need, limit = shared_bytes(plan, itemsize, backward), chip.shared_memory()
  if need <= limit:
    return x
  major, minor = chip.capability()
  return chip.refuse(
    x,
    f"selective_scan: B has N={plan.ones + plan.learned}, for which a block of"
    f" the {which} kernel takes {-(-need // 1024)} KiB of shared memory with"
    f" {plan.tiling}; expected at most {limit // 1024} KiB, as GPUs of compute"
    f" capability {major}.{minor} have. Pass implementation='chunked' or"
    " 'associative', or to the kernel a Tiling of more lanes, fewer copies, a"
    " smaller chunk or fewer states.",
  )


def shared_bytes(plan: Plan, itemsize: int, backward: bool) -> int:
  """Shared memory that a block takes, gate and softplus counted in."""
  if backward and len(plan.passes) > 1:
    return max(shared_bytes(own, itemsize, True) for _, own in plan.passes)
  tiling = plan.tiling
  tokens = 4 * tiling.chunk * plan.columns["end"]
  block = tiling.chunk * tiling.width
  copies = [tokens, *[block * itemsize] * (4 if backward else 3)]
  arrays = [x * tiling.stages for x in copies]
  arrays += [4 * block] * (6 if backward else 3)
  if not backward:
    return _total(arrays)
  starts = tiling.chunk // tiling.unroll * tiling.width
  arrays += [4 * starts * columns for columns in plan.parts.values()]
  arrays.append(4 * 128 // tiling.lanes * tiling.unroll * plan.pairs)
  return _total(arrays)


def _divisions(states):
  """Lanes, and states of a backward pass, the wanted ones first."""
  lanes = 2
  while lanes < 16 and states > lanes * 8:
    lanes *= 2
  while lanes <= 16:
    yield lanes, 128
    lanes *= 2
  yield from ((16, 64), (16, 32))


def _sized(tiling, ones, states):
  """A plan that has a scan's sizes in shared memory, and no others."""
  return Plan(
    tiling=tiling, rows=1, groups=1, length=1, channels=1, ones=ones,
    learned=states - ones, flags=(), align=1, align_time=1,
  )  # fmt: skip


def _total(arrays):
  return _OWN + sum(-(-x // _UNIT) * _UNIT for x in arrays)
