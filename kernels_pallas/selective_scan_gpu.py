"""The selective scan on GPU (Mosaic): forward pass.

One block of 128 threads carries a tile of channels through time, its state in
registers. A chunk of time steps is brought to shared memory while the one
before is worked on. It is worked on thrice: all threads form Δ and Δu for the
whole chunk, then go through it step by step, then finish y (skip, gate) for
the whole chunk and store it. What needs no state is thereby done once per
element, however many threads share a channel.

The one form serves sm_80, sm_90 and sm_100: inputs through `emit_pipeline`,
outputs stored from registers.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import selective_scan_gpu_block as on
from kernels_pallas import selective_scan_gpu_plan as planning
from kernels_pallas.costs import selective_scan_cost
from kernels_pallas.jax_versions import gpu_kernel, gpu_store
from kernels_pallas.selective_scan_gpu_plan import Plan, Tiling
from kernels_pallas.selective_scan_gpu_tiling import (
  check_size,
  default_tiling,
  widest,
)
from ssmjax.types import Array

__all__ = ["Tiling", "default_tiling", "forward"]


def forward(
  rows: dict[str, Array | None],
  shared: dict[str, Array | None],
  *,
  delta_softplus: bool,
  ones: int,
  keep: bool,
  tiling: Tiling | None = None,
  interpret=False,
) -> tuple[Array, Array, tuple[Array, ...] | None]:
  """Run the scan over all rows.

  Δₜ = softplus(deltaₜ + delta_bias)   (or deltaₜ + delta_bias)
  hₜ = exp(Δₜ A) ∘ hₜ₋₁ + Δₜ Bₜ uₜ
  yₜ = (Σₙ Cₜₙ hₜₙ + D uₜ + directₜ Δₜ uₜ) · silu(zₜ)

  Args:
    rows: arrays that lead with R: u, delta, z `[R, T, D]`, B, C `[R, T, N]`,
      direct, valid, restart `[R, T]`, initial_state `[R, N, D]`; z, direct,
      valid, restart and initial_state may be None.
    shared: arrays that lead with G, R % G = 0: A `[G, N - ones, D]`, D and
      delta_bias `[G, D]` or None. Row r takes group r // (R // G).
    delta_softplus: pass delta (with its bias) through softplus.
    ones: the first channels of the state, whose decay is exactly 1.
    keep: also return the states at the chunks' starts.
    tiling: the division of work; `default_tiling` if None.
    interpret: False, or `plgpu.InterpretGPUParams()`.

  Returns:
    y `[R, T, D]` of u's dtype, the final state `[R, N, D]` float32 and, with
    `keep`, the parts of the state at the start of each chunk.
  """
  u, B = rows["u"], rows["B"]
  assert u is not None
  assert B is not None
  itemsize = widest(rows)
  if tiling is None:
    tiling = default_tiling(B.shape[2], ones=ones, itemsize=itemsize)
  plan = planning.plan(rows, shared, ones, tiling)
  inputs = on.kernel_inputs(plan, rows, shared)
  if rows["initial_state"] is not None:
    for name, x in plan.split_state(rows["initial_state"]).items():
      inputs[f"initial {name}"] = x
  if interpret is False:
    inputs["u"] = check_size(plan, inputs["u"], itemsize, backward=False)
  time, depth = plan.time, plan.depth
  f32 = jnp.dtype("float32")
  shapes: dict[str, tuple[tuple[int, ...], jnp.dtype]] = dict(
    y=((plan.rows, time, depth), u.dtype)
  )
  for name, size in plan.parts.items():
    shapes[f"final {name}"] = ((plan.rows, depth, size), f32)
    if keep:
      starts = (plan.rows, plan.chunks, depth, size)
      shapes[f"states {name}"] = (starts, f32)
  block = (plan.tiling.chunk, plan.tiling.width)
  out = gpu_kernel(
    functools.partial(
      _forward_body, plan, delta_softplus, tuple(inputs), tuple(shapes)
    ),
    out_type=[jax.ShapeDtypeStruct(*shape) for shape in shapes.values()],
    scratch_types=[plgpu.SMEM(block, f32)] * 3,
    grid=(plan.rows * plan.tiles,),
    grid_names=("block",),
    kernel_name="selective_scan_gpu_forward",
    cost_estimate=selective_scan_cost(rows, shared, ones=ones),
    compiler_params=plgpu.CompilerParams(
      approx_math=True, unsafe_no_auto_barriers=True
    ),
    interpret=interpret,
  )(*inputs.values())
  named = dict(zip(shapes, planning.vary_like(u, out), strict=True))
  y = named["y"][:, : plan.length, : plan.channels]
  final = plan.join_state({k: named[f"final {k}"] for k in plan.parts})
  states = tuple(named[f"states {k}"] for k in plan.parts) if keep else None
  return y, final, states


def _advance(plan: Plan, slots, t, h, rates, dt, dx, first):
  """One step of every copy's state, and Cₜ hₜ of each."""
  channels = 128 // plan.tiling.lanes
  reset = on.reset_at(plan, slots, t, first)
  maps = {
    name: [on.token_map(plan, slots, t, array, name) for array in ("B", "C")]
    for name in plan.parts
  }
  direct = on.token_direct(plan, slots, t)
  new, y = [], []
  for j in range(plan.tiling.copies):
    parts, total = {}, None
    for name, old in on.forget(h[j], reset).items():
      shape = (channels, plan.parts[name])
      if planning.decays(name):
        old = jnp.exp2(on.spread(dt[j], shape, 0) * rates[j][name]) * old
      B, C = (on.spread(x, shape, 1) for x in maps[name])
      parts[name] = old + on.spread(dx[j], shape, 0) * B
      read = jnp.sum(parts[name] * C, axis=1)
      total = read if total is None else total + read
    new.append(parts)
    y.append(total if direct is None else total + direct * dx[j])
  return tuple(new), y


def _forward_body(plan, softplus_on, inputs, outputs, *refs):
  count = len(inputs) + len(outputs)
  dt_s, dx_s, y_s = refs[count:]
  refs = dict(zip((*inputs, *outputs), refs[:count], strict=True))
  row, _, group, start = on.block_place(plan)
  rates = on.load_rates(plan, refs, group, start)
  bias = on.load_vector(plan, refs, "delta_bias", group, start)
  skip = on.load_vector(plan, refs, "D", group, start)
  if any(name.startswith("initial ") for name in refs):
    h = on.load_states(plan, refs, "initial", (row,), start)
  else:
    h = on.zero_states(plan)
  names = [n for n in ("u", "delta", "z", "tokens") if n in refs]
  keep = any(name.startswith("states ") for name in refs)
  blocks, block_rows = on.blocks_of_rows(plan)
  shape = (block_rows, plan.tiling.width)

  def chunk(index, *slots_and_carry):
    (index,) = index
    *slots, h = slots_and_carry
    slots = dict(zip(names, slots, strict=True))
    first = on.chunk_first(plan, index)
    if keep:
      on.store_states(plan, refs, "states", (row, index), start, h)
    for block in blocks:
      valid = on.token_valid(plan, slots, block, shape)
      dt, _, u = on.step_sizes(plan, softplus_on, bias, slots, block, valid)
      gpu_store(dt_s.at[block], dt, optimized=False)
      gpu_store(dx_s.at[block], dt * u, optimized=False)
    if plan.ragged:
      on.meet()
      on.blank_before(plan, first, dt_s, dx_s)
    on.meet()

    def step(t, h):
      dt, dx = (on.copy_rows(plan, ref, t) for ref in (dt_s, dx_s))
      h, y = _advance(plan, slots, t, h, rates, dt, dx, first)
      on.store_rows(plan, y_s, t, y)
      return h

    h = on.unrolled_loop(plan, step, h)
    on.meet()

    at = jnp.minimum(
      index * plan.tiling.chunk, jnp.int32(plan.time - plan.tiling.chunk)
    )

    def finish_blocks():
      for block in blocks:
        load = lambda ref, block=block: on.load_wide(
          ref.at[block], plan.block_layout
        )
        skip_now = None if skip is None else on.spread(skip, shape, 1)
        valid = on.token_valid(plan, slots, block, shape)
        y = _output(load, slots, y_s, skip_now, valid)
        to = pl.ds(at + block.start, block.size)
        channels = pl.ds(start, plan.tiling.width)
        y = y.astype(refs["y"].dtype)
        gpu_store(refs["y"].at[row, to, channels], y, optimized=False)

    def finish_steps():
      width = 128 // plan.tiling.lanes

      @pl.loop(first, jnp.int32(plan.tiling.chunk))
      def _(t):
        for j in range(plan.tiling.copies):
          own = pl.ds(j * width, width)
          channels = pl.ds(start + j * width, width)
          load = lambda ref, own=own: on.load_wide(
            ref.at[t, own], plan.row_layout
          )
          skip_now = None
          if skip is not None:
            skip_now = on.load_wide(
              refs["D"].at[group, channels], plan.row_layout
            )
          valid = None
          if "valid" in plan.flags:
            scalar = slots["tokens"][t, plan.columns["valid"]]
            valid = jnp.broadcast_to(scalar, (width,)) > 0
          y = _output(load, slots, y_s, skip_now, valid)
          y = y.astype(refs["y"].dtype)
          to = refs["y"].at[row, at + t, channels]
          gpu_store(to, y, optimized=False)

    if plan.ragged:
      # The steps of the chunk before have their y already.
      lax.cond(first > 0, finish_steps, finish_blocks)
    else:
      finish_blocks()
    # Nobody may still read what the next copies overwrite.
    on.meet()
    return h

  h = plgpu.emit_pipeline(
    chunk,
    grid=(plan.chunks,),
    in_specs=on.chunk_specs(plan, names, lambda step: step),
    max_concurrent_steps=plan.tiling.stages,
    init_carry=h,
  )(*on.chunk_refs(plan, refs, names, row, start))
  on.store_states(plan, refs, "final", (row,), start, h)


def _output(load, slots, y_s, skip, valid):
  """y of some rows from what the recurrence left, `load`ed in one layout."""
  y = load(y_s)
  if skip is not None:
    y = y + skip * load(slots["u"])
  if "z" in slots:
    z = load(slots["z"])
    y = y * (z * on.sigmoid(z))
  if valid is not None:
    y = jnp.where(valid, y, jnp.zeros_like(y))
  return y
