"""What one block of the selective scan on GPU does in both passes.

Where it is, what it copies, how it loads and stores registers, and the parts
of a token that need no state.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import selective_scan_gpu_chip as chip
from kernels_pallas import selective_scan_gpu_plan as planning
from kernels_pallas.jax_versions import gpu_store
from kernels_pallas.selective_scan_gpu_plan import Plan
from ssmjax.types import Array

__all__ = [
  "blank_before",
  "block_place",
  "blocks_of_rows",
  "chunk_first",
  "chunk_refs",
  "chunk_specs",
  "copy_rows",
  "forget",
  "kernel_inputs",
  "load_rates",
  "load_states",
  "load_vector",
  "load_wide",
  "meet",
  "reset_at",
  "sigmoid",
  "softplus",
  "spread",
  "step_sizes",
  "store_rows",
  "store_states",
  "token_direct",
  "token_map",
  "token_valid",
  "unrolled_loop",
  "zero_states",
]

_LOG2E = 1.4426950408889634
# log(1 + e) / e on [0, 1], least relative error (3e-8) with value 1 at 0, so
# that a small Δ keeps its relative precision.
_LOG1P = (
  1.0, -0.49999648, 0.333213226, -0.248571633, 0.191536534, -0.137537988,
  0.079204491, -0.0300657631, 0.0053648166,
)  # fmt: skip


def kernel_inputs(plan: Plan, rows, shared) -> dict[str, Array]:
  """The arrays that both passes read, padded and packed, by name."""
  inputs = {}
  for name in ("u", "delta", "z", "d_y"):
    if rows.get(name) is not None:
      inputs[name] = plan.pad(rows[name])
  inputs["tokens"] = plan.tokens(rows)
  for name, x in plan.rates(shared["A"]).items():
    inputs[f"rates {name}"] = x
  for name in ("D", "delta_bias"):
    if shared[name] is not None:
      inputs[name] = plan.pad_channels(shared[name])
  return inputs


def meet() -> None:
  """Wait for the block's other threads; see what they stored.

  `commit_smem` is that, with a fence for the copies to come that chips before
  Hopper neither need nor have. There, waiting for all but so many copies that
  it waits for none leaves just the barrier.
  """
  if chip.before_hopper():
    plgpu.wait_gmem_to_smem(32)
  else:
    plgpu.commit_smem()


def block_place(plan: Plan):
  """This block's row, its group and its first channel.

  The last tile is moved back to end with the last channel: what it shares
  with the tile before is computed twice, alike.
  """
  block = lax.axis_index("block")
  row = lax.div(block, jnp.int32(plan.tiles))
  tile = lax.rem(block, jnp.int32(plan.tiles))
  group = lax.div(row, jnp.int32(plan.rows // plan.groups))
  start = jnp.minimum(
    tile * plan.tiling.width, jnp.int32(plan.depth - plan.tiling.width)
  )
  return row, tile, group, start


def chunk_specs(plan: Plan, names, which):
  """Block specs of the arrays that a chunk copies; chunk = which(step)."""
  chunk = plan.tiling.chunk
  last = plan.time - chunk

  def at(step):
    return jnp.minimum(which(step) * chunk, jnp.int32(last)), 0

  widths = dict(tokens=plan.columns["end"])
  return [
    plgpu.BlockSpec(
      (pl.Element(chunk), widths.get(name, plan.tiling.width)),
      at,
      oob_fill_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
    )
    for name in names
  ]


def chunk_refs(plan: Plan, refs, names, row, start):
  """This block's part of the arrays that a chunk copies."""
  channels = pl.ds(start, plan.tiling.width)
  return [
    refs[name].at[row] if name == "tokens" else refs[name].at[row, :, channels]
    for name in names
  ]


def chunk_first(plan: Plan, chunk):
  """Steps of a chunk's copy that belong to the chunk before."""
  first = chunk * plan.tiling.chunk
  return first - jnp.minimum(first, jnp.int32(plan.time - plan.tiling.chunk))


def load_wide(ref, layout) -> Array:
  """A float32 register array."""
  return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)


def spread(x, shape, axis):
  """Broadcast a vector that runs along `axis`."""
  return lax.broadcast_in_dim(x, shape, (axis,))


def softplus(x):
  """log(1 + exp(x)) to full relative precision, and its slope."""
  e = jnp.exp2(jnp.abs(x) * -_LOG2E)
  log1p = jnp.full_like(x, _LOG1P[-1])
  for factor in _LOG1P[-2::-1]:
    log1p = log1p * e + factor
  r = lax.rsqrt(1 + e)
  r = r * r
  return jnp.maximum(x, 0) + log1p * e, jnp.where(x < 0, e * r, r)


def sigmoid(x):
  """1 / (1 + exp(-x)); the square of rsqrt avoids a division."""
  r = lax.rsqrt(1 + jnp.exp2(x * -_LOG2E))
  return r * r


def step_sizes(plan: Plan, softplus_on, bias, slots, block, valid):
  """Δ, its slope and u of a block of rows, 0 at padding."""
  layout = plan.block_layout
  u = load_wide(slots["u"].at[block], layout)
  dt = load_wide(slots["delta"].at[block], layout)
  if bias is not None:
    dt = dt + spread(bias, dt.shape, 1)
  slope = None
  if softplus_on:
    dt, slope = softplus(dt)
  if valid is not None:
    zero = jnp.zeros_like(dt)
    u, dt = jnp.where(valid, u, zero), jnp.where(valid, dt, zero)
    slope = None if slope is None else jnp.where(valid, slope, zero)
  return dt, slope, u


def token_valid(plan: Plan, slots, block, shape):
  """Whether each token of a block of rows is none of padding, or None."""
  if "valid" not in plan.flags:
    return None
  first = plan.columns["direct"]
  four = load_wide(
    slots["tokens"].at[block, pl.ds(first, 4)], plan.scalar_layout
  )
  index = plgpu.broadcasted_iota(
    jnp.int32, four.shape, 1, layout=plan.scalar_layout
  )
  wanted = index == plan.columns["valid"] - first
  valid = jnp.sum(jnp.where(wanted, four, jnp.zeros_like(four)), axis=1)
  return spread(valid, shape, 0) > 0


def token_direct(plan: Plan, slots, t):
  """A token's own channel of decay 0, one number for all channels."""
  if "direct" not in plan.flags:
    return None
  channels = 128 // plan.tiling.lanes
  direct = slots["tokens"][t, plan.columns["direct"]]
  return jnp.broadcast_to(direct, (channels,))


def blocks_of_rows(plan: Plan):
  """Slices of a chunk's rows, eight elements per thread at the most."""
  rows = plan.block_rows
  while rows * 2 * plan.tiling.width <= 1024 and (
    plan.tiling.chunk % (rows * 2) == 0
  ):
    rows *= 2
  return [pl.ds(i, rows) for i in range(0, plan.tiling.chunk, rows)], rows


def reset_at(plan: Plan, slots, t, first):
  """Whether the state is forgotten before step t, 0 or 1; None if never."""
  if "restart" not in plan.flags:
    return None
  reset = slots["tokens"][t, plan.columns["restart"]] > 0
  if plan.ragged:
    reset = reset & (t >= first)
  return reset.astype(jnp.int32)


def forget(h, reset):
  """Zeros, even for an infinite state, if `reset`."""
  if reset is None:
    return h
  return {
    name: jnp.where(jnp.broadcast_to(reset, x.shape) > 0, jnp.zeros_like(x), x)
    for name, x in h.items()
  }


def token_map(plan: Plan, slots, t, array, part):
  """B or C of step t, for a part of the state."""
  own = pl.ds(plan.columns[f"{array} {part}"], plan.parts[part])
  return load_wide(slots["tokens"].at[t, own], plan.layout(part).reduce(0))


def load_states(plan: Plan, refs, prefix, place, start):
  """The parts of every copy's state, from global memory."""
  channels = 128 // plan.tiling.lanes

  def load(name, j):
    own = pl.ds(start + j * channels, channels)
    x = load_wide(refs[f"{prefix} {name}"].at[(*place, own)], plan.layout(name))
    # Under shard_map a load has varying axes, which sums in a kernel do not
    # have; times 1 for a loop whose carry is both.
    return x * 1.0

  return tuple(
    {name: load(name, j) for name in plan.parts}
    for j in range(plan.tiling.copies)
  )


def store_states(plan: Plan, refs, prefix, place, start, h):
  """The parts of every copy's state, to global memory."""
  channels = 128 // plan.tiling.lanes
  for j in range(plan.tiling.copies):
    for name in plan.parts:
      at = (*place, pl.ds(start + j * channels, channels))
      gpu_store(refs[f"{prefix} {name}"].at[at], h[j][name], optimized=False)


def zero_states(plan: Plan):
  """A state of zeros for every copy."""
  channels = 128 // plan.tiling.lanes
  return tuple(
    {
      name: plgpu.layout_cast(
        jnp.zeros((channels, size), jnp.float32), plan.layout(name)
      )
      for name, size in plan.parts.items()
    }
    for _ in range(plan.tiling.copies)
  )


def load_rates(plan: Plan, refs, group, start):
  """Every copy's A, by part."""
  channels = 128 // plan.tiling.lanes
  return [
    {
      name: load_wide(
        refs[f"rates {name}"].at[group, pl.ds(start + j * channels, channels)],
        plan.layout(name),
      )
      for name in plan.parts
      if planning.decays(name)
    }
    for j in range(plan.tiling.copies)
  ]


def load_vector(plan: Plan, refs, name, group, start):
  """D or the bias of a tile, or None."""
  if name not in refs:
    return None
  channels = pl.ds(start, plan.tiling.width)
  return load_wide(refs[name].at[group, channels], plan.block_layout.reduce(0))


def copy_rows(plan: Plan, ref, t):
  """One number per channel of step t, for every copy."""
  channels = 128 // plan.tiling.lanes
  return [
    load_wide(ref.at[t, pl.ds(j * channels, channels)], plan.row_layout)
    for j in range(plan.tiling.copies)
  ]


def store_rows(plan: Plan, ref, t, values):
  """The reverse of `copy_rows`."""
  channels = 128 // plan.tiling.lanes
  for j, x in enumerate(values):
    at = (t, pl.ds(j * channels, channels))
    gpu_store(ref.at[at], x, optimized=False)


def blank_before(plan: Plan, first, *scratch):
  """Make the steps of the chunk before do nothing."""
  if not plan.ragged:
    return
  channels = 128 // plan.tiling.lanes
  zero = plgpu.layout_cast(jnp.zeros((channels,), jnp.float32), plan.row_layout)

  @pl.loop(jnp.int32(0), first)
  def _(t):
    for ref in scratch:
      store_rows(plan, ref, t, [zero] * plan.tiling.copies)


def unrolled_loop(plan: Plan, body, carry):
  """`body(t, carry)` over a chunk's steps, a few in each trip."""
  unroll = plan.tiling.unroll

  def trip(i, carry):
    for k in range(unroll):
      carry = body(i * unroll + k, carry)
    return carry

  trips = plan.tiling.chunk // unroll
  return lax.fori_loop(jnp.int32(0), jnp.int32(trips), trip, carry)
