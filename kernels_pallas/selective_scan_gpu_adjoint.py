"""What one block of the selective scan on GPU does in the backward pass.

It goes back through time with the cotangent of its state in registers. It
walks each chunk twice. First forward from the state that the forward pass
kept, leaving the state every few steps in shared memory; then, a few steps at
a time from the last, forward again with all states and decays in registers
and back through them.

The cotangents of B and C are sums over channels, which lie across threads.
The products of a few steps go to shared memory, where each thread adds up one
column, (step, array, n), in a fixed order: no atomics, and the same bits in
every run. One float32 partial per tile is left to add.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import selective_scan_gpu_block as on
from kernels_pallas import selective_scan_gpu_plan as planning
from kernels_pallas.jax_versions import gpu_store
from kernels_pallas.selective_scan_gpu_plan import Plan

__all__ = ["go_back", "offsets", "scratch_arrays"]

_LN2 = 0.6931471805599453


def scratch_arrays(plan: Plan, softplus_on: bool, gated: bool):
  """Shared memory by name."""
  tiling, f32 = plan.tiling, jnp.float32
  block = plgpu.SMEM((tiling.chunk, tiling.width), f32)
  scratch = dict.fromkeys(("dt", "dx", "d_out", "d_rate"), block)
  if softplus_on:
    scratch["slope"] = block
  if gated:
    scratch["y"] = block
  for name, size in plan.parts.items():
    starts = (tiling.chunk // tiling.unroll, tiling.width, size)
    scratch[f"start {name}"] = plgpu.SMEM(starts, f32)
  columns = tiling.unroll * plan.pairs
  products = (128 // tiling.lanes, columns)
  scratch["products"] = plgpu.SMEM(products, f32)
  return scratch


def offsets(plan: Plan) -> dict[str, int]:
  """Name -> first column of its products in a step's pairs."""
  at, offsets = 0, {}
  for array in ("B", "C"):
    for name, size in plan.parts.items():
      offsets[f"{array} {name}"] = at
      at += size
  return offsets


def go_back(plan, softplus_on, inputs, outputs, *refs, **scratch):
  """The kernel: the cotangents of one block."""
  out = dict(zip(outputs, refs[len(inputs) :], strict=True))
  refs = dict(zip(inputs, refs[: len(inputs)], strict=True))
  place = on.block_place(plan)
  row, _, group, start = place
  rates = on.load_rates(plan, refs, group, start)
  bias = on.load_vector(plan, refs, "delta_bias", group, start)
  skip = on.load_vector(plan, refs, "D", group, start)
  names = [n for n in ("u", "delta", "z", "d_y", "tokens") if n in refs]
  blocks, block_rows = on.blocks_of_rows(plan)
  unroll = plan.tiling.unroll
  pieces = plan.tiling.chunk // unroll

  def chunk(index, *slots_and_carry):
    chunk = plan.chunks - 1 - index[0]
    *slots, (g, d_rates, sums) = slots_and_carry
    slots = dict(zip(names, slots, strict=True))
    first = on.chunk_first(plan, chunk)
    at = jnp.minimum(
      chunk * plan.tiling.chunk, jnp.int32(plan.time - plan.tiling.chunk)
    )
    _prepare(plan, softplus_on, bias, slots, blocks, scratch, out, place, at)
    if plan.ragged:
      on.meet()
      own = (scratch[k] for k in ("dt", "dx", "d_out"))
      on.blank_before(plan, first, *own)
    on.meet()
    state = lambda h, k, p: _state_step(plan, slots, scratch, rates, first, h,
                                        p * unroll + k)  # fmt: skip

    def leave(p, h):
      _store_start(plan, scratch, p, h)
      for k in range(unroll):
        h = state(h, k, p)[0]
      return h

    h = on.load_states(plan, refs, "states", (row, chunk), start)
    h = lax.fori_loop(jnp.int32(0), jnp.int32(pieces - 1), leave, h)
    _store_start(plan, scratch, jnp.int32(pieces - 1), h)

    def piece(i, carry):
      g, d_rates = carry
      p = pieces - 1 - i
      h = _load_start(plan, scratch, p)
      steps = []
      for k in range(unroll):
        h, *rest = state(h, k, p)
        steps.append((h, *rest))
      for k in reversed(range(unroll)):
        g, d_rates = _step_back(
          plan, slots, scratch, rates, place, g, d_rates, steps[k], k,
          p * unroll + k,
        )  # fmt: skip
      on.meet()
      _add_up(plan, scratch, out, place, at + p * unroll)
      on.meet()
      return g, d_rates

    carry = (g, d_rates)
    g, d_rates = lax.fori_loop(jnp.int32(0), jnp.int32(pieces), piece, carry)
    for block in blocks:
      sums = _finish(
        plan, skip, slots, scratch, out, place, block, at, first, sums
      )
    # Nobody may still read what the next copies overwrite.
    on.meet()
    return g, d_rates, sums

  shape = (block_rows, plan.tiling.width)
  zero = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plan.block_layout)
  sums = {k: zero for k in ("D", "delta_bias") if f"sum {k}" in out}
  g = on.load_states(plan, refs, "d_final", (row,), start)
  d_rates = [
    {name: x for name, x in h.items() if planning.decays(name)}
    for h in on.zero_states(plan)
  ]
  g, d_rates, sums = plgpu.emit_pipeline(
    chunk,
    grid=(plan.chunks,),
    in_specs=on.chunk_specs(plan, names, lambda i: plan.chunks - 1 - i),
    max_concurrent_steps=plan.tiling.stages,
    init_carry=(g, d_rates, sums),
  )(*on.chunk_refs(plan, refs, names, row, start))
  on.store_states(plan, out, "initial", (row,), start, g)
  channels = 128 // plan.tiling.lanes
  for j, x in enumerate(d_rates):
    own = pl.ds(start + j * channels, channels)
    for name in x:
      to = out[f"rates {name}"].at[row, own]
      gpu_store(to, x[name], optimized=False)
  for name, x in sums.items():
    to = out[f"sum {name}"].at[row, :, pl.ds(start, plan.tiling.width)]
    gpu_store(to, x, optimized=False)


def _prepare(plan, softplus_on, bias, slots, blocks, scratch, out, place, at):
  """Everything about a chunk that needs no state, for all threads at once."""
  for block in blocks:
    shape = (block.size, plan.tiling.width)
    valid = on.token_valid(plan, slots, block, shape)
    dt, slope, u = on.step_sizes(plan, softplus_on, bias, slots, block, valid)
    d_out = on.load_wide(slots["d_y"].at[block], plan.block_layout)
    if "z" in slots:
      z = on.load_wide(slots["z"].at[block], plan.block_layout)
      d_out = d_out * (z * on.sigmoid(z))
    if valid is not None:
      d_out = jnp.where(valid, d_out, jnp.zeros_like(d_out))
    named = dict(dt=dt, dx=dt * u, d_out=d_out)
    if slope is not None:
      named["slope"] = slope
    for name, x in named.items():
      gpu_store(scratch[name].at[block], x, optimized=False)
    if "direct" in out:
      row, tile, _, start = place
      product = d_out * named["dx"]
      if plan.depth % plan.tiling.width:
        index = plgpu.broadcasted_iota(
          jnp.int32, shape, 1, layout=plan.block_layout
        )
        new = index >= tile * plan.tiling.width - start
        product = jnp.where(new, product, jnp.zeros_like(product))
      to = out["direct"].at[tile, row, pl.ds(at + block.start, block.size)]
      gpu_store(to, jnp.sum(product, axis=1), optimized=False)


def _state_step(plan, slots, scratch, rates, first, h, t):
  """The states after step t, those before it that count, and the decays."""
  channels = 128 // plan.tiling.lanes
  reset = on.reset_at(plan, slots, t, first)
  dt, dx = (on.copy_rows(plan, scratch[k], t) for k in ("dt", "dx"))
  maps = {name: on.token_map(plan, slots, t, "B", name) for name in plan.parts}
  after, before, decays = [], [], []
  for j in range(plan.tiling.copies):
    old, new, decay = on.forget(h[j], reset), {}, {}
    for name, size in plan.parts.items():
      shape = (channels, size)
      write = on.spread(dx[j], shape, 0) * on.spread(maps[name], shape, 1)
      if planning.decays(name):
        decay[name] = jnp.exp2(on.spread(dt[j], shape, 0) * rates[j][name])
        new[name] = decay[name] * old[name] + write
      else:
        new[name] = old[name] + write
    after.append(new)
    before.append(old)
    decays.append(decay)
  return tuple(after), before, decays, reset


def _step_back(
  plan, slots, scratch, rates, place, g, d_rates, step, k, t
):  # fmt: skip
  """Go back through step t, the kth of its piece."""
  after, before, decays, reset = step
  channels = 128 // plan.tiling.lanes
  dt, dx, d_out = (
    on.copy_rows(plan, scratch[name], t) for name in ("dt", "dx", "d_out")
  )
  new = _new_channels(plan, place)
  new_dx = [x * n for x, n in zip(dx, new, strict=True)] if new else dx
  new_out = [x * n for x, n in zip(d_out, new, strict=True)] if new else d_out
  maps = {
    (array, name): on.token_map(plan, slots, t, array, name)
    for name in plan.parts
    for array in ("B", "C")
  }
  direct = on.token_direct(plan, slots, t)
  d_dx: list = [0] * plan.tiling.copies
  y: list = [0] * plan.tiling.copies
  if direct is not None:
    d_dx = [direct * x for x in d_out]
    y = [direct * x for x in dx]
  g_new: list = [{} for _ in g]
  products = {}
  for j in range(plan.tiling.copies):
    for name, size in plan.parts.items():
      shape = (channels, size)
      down = lambda x, shape=shape: on.spread(x, shape, 0)
      B, C = (on.spread(maps[a, name], shape, 1) for a in ("B", "C"))
      now = g[j][name] + C * down(d_out[j])
      g_new[j][name] = now
      d_dx[j] = d_dx[j] + jnp.sum(now * B, axis=1)
      if "z" in slots:
        y[j] = y[j] + jnp.sum(after[j][name] * C, axis=1)
      for array, x in (
        ("B", now * down(new_dx[j])),
        ("C", after[j][name] * down(new_out[j])),
      ):
        key = f"{array} {name}"
        products[key] = products[key] + x if key in products else x
  base, first = k * plan.pairs, offsets(plan)
  for key, x in products.items():
    own = pl.ds(base + first[key], x.shape[1])
    to = scratch["products"].at[:, own]
    gpu_store(to, x, optimized=False)
  d_rate, d_rates = [], [dict(x) for x in d_rates]
  for j in range(plan.tiling.copies):
    for name, decay in decays[j].items():
      g_new[j][name] = g_new[j][name] * decay
    g_new[j] = on.forget(g_new[j], reset)
    total: list = []
    if not decays[j]:
      total = [jnp.zeros_like(dt[j])]
    for name in decays[j]:
      through = g_new[j][name] * before[j][name]
      total.append(jnp.sum(through * rates[j][name], axis=1))
      d_rates[j][name] = d_rates[j][name] + through * on.spread(
        dt[j], through.shape, 0
      )
    d_rate.append(functools.reduce(jnp.add, total))
  # Δu of this step has been read for the last time.
  on.store_rows(plan, scratch["dx"], t, d_dx)
  on.store_rows(plan, scratch["d_rate"], t, d_rate)
  if "z" in slots:
    on.store_rows(plan, scratch["y"], t, y)
  return tuple(g_new), d_rates


def _new_channels(plan, place):
  """1 for channels that no tile before has, 0 for the rest; per copy."""
  if plan.depth % plan.tiling.width == 0:
    return None
  _, tile, _, start = place
  channels = 128 // plan.tiling.lanes
  iota = plgpu.broadcasted_iota(
    jnp.int32, (channels,), 0, layout=plan.row_layout
  )
  first = tile * plan.tiling.width - start
  return [
    jnp.where(iota + j * channels >= first, 1.0, 0.0).astype(jnp.float32)
    for j in range(plan.tiling.copies)
  ]


def _add_up(plan, scratch, out, place, t):
  """Sum the products of a piece over channels, a column to a thread."""
  row, tile, _, _ = place
  pairs = plan.pairs
  columns = plan.tiling.unroll * pairs
  tiles = plgpu.Tiling(((1, 128), (32,), (1,)))
  layout = plgpu.Layout.TILED(tiles, (-3,), (-2,), -1)
  products = on.load_wide(scratch["products"], layout)
  to = out["tokens"].at[tile, row, pl.ds(t * pairs, columns)]
  gpu_store(to, jnp.sum(products, axis=0), optimized=False)


def _store_start(plan, scratch, p, h):
  """Leave the state at the start of piece p."""
  channels = 128 // plan.tiling.lanes
  for j, parts in enumerate(h):
    for name, x in parts.items():
      to = scratch[f"start {name}"].at[p, pl.ds(j * channels, channels)]
      gpu_store(to, x, optimized=False)


def _load_start(plan, scratch, p):
  """The reverse of `_store_start`."""
  channels = 128 // plan.tiling.lanes
  return tuple(
    {
      name: on.load_wide(
        scratch[f"start {name}"].at[p, pl.ds(j * channels, channels)],
        plan.layout(name),
      )
      for name in plan.parts
    }
    for j in range(plan.tiling.copies)
  )


def _finish(plan, skip, slots, scratch, out, place, block, at, first, sums):
  """The cotangents of a block of rows, and their sums over time."""
  row, _, _, start = place
  shape = (block.size, plan.tiling.width)
  load = lambda ref: on.load_wide(ref.at[block], plan.block_layout)
  u, dt, d_dx, d_out = (
    load(x)
    for x in (slots["u"], scratch["dt"], scratch["dx"], scratch["d_out"])
  )
  use = on.token_valid(plan, slots, block, shape)
  if use is not None:
    u = jnp.where(use, u, jnp.zeros_like(u))
  if plan.ragged:
    # Steps of the chunk before are added, and overwritten, with that chunk.
    index = plgpu.broadcasted_iota(
      jnp.int32, shape, 0, layout=plan.block_layout
    )
    own = index + block.start >= first
    use = own if use is None else use & own
  factor = None if skip is None else on.spread(skip, shape, 1)
  d_dt = d_dx * u + load(scratch["d_rate"]) * _LN2
  d_u = d_dx * dt
  if factor is not None:
    d_u = d_u + factor * d_out
  if "slope" in scratch:
    d_dt = d_dt * load(scratch["slope"])
  columns = dict(u=d_u, delta=d_dt)
  if "z" in slots:
    z, d_y, y = load(slots["z"]), load(slots["d_y"]), load(scratch["y"])
    if factor is not None:
      y = y + factor * u
    s = on.sigmoid(z)
    columns["z"] = d_y * s * (1 + z * (1 - s)) * y
  if use is not None:
    columns = {
      name: jnp.where(use, x, jnp.zeros_like(x)) for name, x in columns.items()
    }
  to = (row, pl.ds(at + block.start, block.size))
  channels = pl.ds(start, plan.tiling.width)
  for name, x in columns.items():
    ref = out[name].at[(*to, channels)]
    gpu_store(ref, x.astype(ref.dtype), optimized=False)
  added = dict(D=d_out * u, delta_bias=columns["delta"])
  return {name: x + added[name] for name, x in sums.items()}
