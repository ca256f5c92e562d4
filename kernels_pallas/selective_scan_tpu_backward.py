"""The selective scan on TPU: the backward pass.

Tiles of time are visited from the last to the first. In a tile the scan runs
forward again from the state that the forward pass kept, and leaves every
token's hₜ₋₁ in scratch; then the adjoint runs back over the tokens:

    gₜ = ȳₜ Cₜ + qₜ₊₁        qₜ = exp(ΔₜA) gₜ        pₜ = qₜ hₜ₋₁
    C̄ₜ = Σ_d ȳₜ hₜ           B̄ₜ = Σ_d gₜ Δₜuₜ
    (Δu)‾ₜ = Σ_n gₜ Bₜ       Δ̄ₜ ∋ Σ_n pₜ A           Ā = Σ_t pₜ Δₜ

Sums over n are sums of registers. Sums over channels are sums in a register:
its rows go to scratch, from where those of all n with the same sublane come
back together; what is left is one sum over lanes a token, for a unit that is
idle.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.costs import selective_scan_cost
from kernels_pallas.selective_scan_tpu import (
  GROUP,
  LANES,
  LOG2E,
  Call,
  Tiles,
  Tiling,
  sigmoid,
)

__all__ = ["backward"]

# Adjoint steps in one trip of the loop. At eight the scheduler starts so much
# at once that a third of the registers' traffic is spills.
STEPS = 4


def backward(
  rows,
  shared,
  *,
  delta_softplus: bool,
  ones: int,
  tiling: Tiling | None = None,
  interpret=False,
):
  """The backward pass of `ssmjax.ops.selective_fused.fused`.

  `tiling` must be the forward pass's, which kept the states of its tiles.
  """
  tiles = Tiles(
    rows, shared, delta_softplus, ones, tiling, backward=True, reverse=True
  )
  call = Call(tiles, "selective_scan_tpu_backward")
  tiles.add_inputs(call, rows, shared, ("u", "delta", "z", "d_y"))
  call.input("states", rows["states"], tiles.by_time_and_row)
  call.input("d_final", *tiles.state(rows["d_final"]))

  for name in ("u", "delta", "z"):
    if rows[name] is not None:
      x = rows[name]
      call.output(f"d_{name}", x.shape, x.dtype, tiles.by_token)
  batch, times = tiles.batch, tiles.times
  shape = (batch, tiles.tiles, times, tiles.blocks, tiles.block, tiles.time)
  spec = pl.BlockSpec(
    (1, 1, 1, *shape[3:]),
    lambda r, d, t: (r, d, tiles.time_index(t), 0, 0, 0),
  )
  for name in ("B", "C"):
    call.output(f"d_{name}", shape, jnp.float32, spec)
  for name in ("A", "initial_state"):
    call.output(f"d_{name}", tiles.state_shape, jnp.float32, tiles.by_row)
  for name in ("D", "delta_bias"):
    if shared[name] is not None:
      shape = (batch, 1, tiles.tiles * tiles.lanes)
      spec = pl.BlockSpec((1, 1, tiles.lanes), lambda r, d, t: (r, 0, d))
      call.output(f"d_{name}", shape, jnp.float32, spec)
      call.scratch(f"sum_{name}", (GROUP, tiles.lanes))
  if rows["direct"] is not None:
    shape = (batch, tiles.tiles, times * tiles.time, LANES)
    spec = pl.BlockSpec(
      (1, 1, tiles.time, LANES),
      lambda r, d, t: (r, d, tiles.time_index(t), 0),
    )
    call.output("d_direct", shape, jnp.float32, spec)

  tiles.add_scratch(call, ("dy", "d_dtu", "d_rate", "y"))
  per_n = (tiles.blocks, tiles.block, tiles.sublanes, LANES)
  call.scratch("q", per_n)
  call.scratch("sum_A", per_n)
  call.scratch("h", (tiles.time, *per_n[1:]))
  call.scratch("parts", (GROUP, tiles.block * tiles.sublanes, LANES))
  out = call(
    functools.partial(_backward_kernel, tiles),
    selective_scan_cost(rows, shared, ones=ones, backward=True),
    interpret,
    like=rows["u"],
  )
  return _gradients(tiles, out)


def _gradients(tiles, out):
  """What the kernel wrote, as the contract wants it."""
  grads = {
    name: out[f"d_{name}"] for name in ("u", "delta", "z") if f"d_{name}" in out
  }
  for name in ("B", "C"):
    # [R, tiles, times, blocks, block, time] to [R, T, N], in fixed order.
    x = jnp.moveaxis(out[f"d_{name}"].sum(1), -1, 2)
    x = x.reshape(tiles.batch, tiles.times * tiles.time, -1)
    grads[name] = x[:, : tiles.length, : tiles.count]
  grads["A"] = tiles.unstate(out["d_A"])[:, tiles.ones :]
  grads["initial_state"] = tiles.unstate(out["d_initial_state"])
  for name in ("D", "delta_bias"):
    if f"d_{name}" in out:
      grads[name] = out[f"d_{name}"][:, 0, : tiles.width]
  if "d_direct" in out:
    grads["direct"] = out["d_direct"].sum((1, 3))[:, : tiles.length]
  return grads


def _backward_kernel(tiles, refs):
  time = pl.program_id(2)

  @pl.when(time == 0)
  def _start():
    refs["q"][...] = refs["d_final"][...].reshape(refs["q"].shape)
    for name in ("sum_A", "sum_D", "sum_delta_bias"):
      if name in refs:
        refs[name][...] = jnp.zeros_like(refs[name])

  single = tiles.blocks == 1
  last = tiles.groups - 1

  def block(k, first):
    def forward(g, carry):
      carry = _scan_group(tiles, refs, k, g, carry, first)
      # Past the end there is nothing to prepare: do the last group again.
      _prepare(tiles, refs, k, first, jnp.minimum(g + 1, last), g + 1)
      return carry

    def reverse(i, carry):
      g = last - i
      step = lambda s, carry: _adjoint_steps(
        tiles, refs, k, g, GROUP - STEPS - s * STEPS, carry, first
      )
      carry = lax.fori_loop(0, GROUP // STEPS, step, carry)
      if single:
        _finish_group(tiles, refs, jnp.minimum(g + 1, last), i > 0)
      return carry

    _prepare(tiles, refs, k, first, 0, 0)
    of_tile = range(tiles.block)
    h = tuple(refs["states"][0, 0, k * tiles.block + n, 0] for n in of_tile)
    sums = jnp.zeros((tiles.block, tiles.time), jnp.float32)
    _, d_c = lax.fori_loop(0, tiles.groups, forward, (h, sums))
    refs["d_C"][0, 0, 0, k] = d_c
    q = tuple(refs["q"][k, n] for n in of_tile)
    q, d_b = lax.fori_loop(0, tiles.groups, reverse, (q, sums))
    refs["d_B"][0, 0, 0, k] = d_b
    for n in of_tile:
      refs["q"][k, n] = q[n]

  tiles.for_blocks(block)
  if single:
    _finish_group(tiles, refs, 0, True)
  else:
    finish = lambda g, _: _finish_group(tiles, refs, g, True)
    lax.fori_loop(0, tiles.groups, finish, None)

  @pl.when(time == tiles.times - 1)
  def _end():
    shape = refs["d_A"].shape
    refs["d_A"][...] = refs["sum_A"][...].reshape(shape)
    refs["d_initial_state"][...] = refs["q"][...].reshape(shape)
    for name in ("D", "delta_bias"):
      if f"d_{name}" in refs:
        total = refs[f"sum_{name}"][...].sum(0, keepdims=True)
        refs[f"d_{name}"][0] = total


def _prepare(tiles, refs, k, first, g, to):
  """What both passes over group g read, to place `to`."""
  tiles.prepare(refs, k, first, g, to)
  if first:
    for c in range(tiles.sublanes):
      tiles.put_rows(refs["dy_rows"], to, c, _gated(tiles, refs, g, c))


def _gated(tiles, refs, g, c):
  """The cotangent of y before the gate, `[8, 128]`."""
  valid = tiles.valid(refs, g)
  dy = tiles.tokens(refs, "d_y", g, c, valid)
  if "z" not in refs:
    return dy
  z = tiles.tokens(refs, "z", g, c, valid)
  return dy * (z * sigmoid(z))


def _scan_group(tiles, refs, k, g, carry, first):
  """Eight tokens forward: hₜ₋₁ to scratch, and what needs hₜ itself."""
  h, d_c = carry
  for j in range(GROUP):
    dt, dtu, dy = (
      tiles.channels_of(refs[name], g, j) for name in ("dt", "dtu", "dy_rows")
    )
    new, terms = [], []
    for n in range(tiles.block):
      before = tiles.before(refs, g, j, h[n])
      refs["h"][g * GROUP + j, n] = before
      decay = tiles.decay(refs, k, n, dt)
      after = before if decay is None else decay * before
      new.append(after + dtu * tiles.number(refs["b"], g, n, j))
      terms.append(dy * new[n])
    d_c = _sum_channels(tiles, refs, g, j, terms, d_c, j)
    if "z" in refs:
      y = functools.reduce(
        jnp.add,
        [new[n] * tiles.number(refs["c"], g, n, j) for n in range(tiles.block)],
      )
      _accumulate(tiles, refs["y_rows"], g, j, y, first)
    h = tuple(new)
  return h, d_c


def _adjoint_steps(tiles, refs, k, g, start, carry, first):
  """`STEPS` tokens back, to the one at `start` in the group."""
  q, d_b = carry
  d_a = [None] * tiles.block
  for step in reversed(range(STEPS)):
    j = start + step
    dt, dtu, dy = (
      tiles.channels_of(refs[name], g, j) for name in ("dt", "dtu", "dy_rows")
    )
    new, terms, writes, rates = [], [], [], []
    for n in range(tiles.block):
      adjoint = dy * tiles.number(refs["c"], g, n, j) + q[n]
      terms.append(adjoint * dtu)
      writes.append(adjoint * tiles.number(refs["b"], g, n, j))
      decay = tiles.decay(refs, k, n, dt)
      back = tiles.before(refs, g, j, adjoint)
      if decay is not None:
        back = decay * back
        p = back * refs["h"][g * GROUP + j, n]
        rates.append(p * refs["A"][0, k * tiles.block + n, 0])
        d_a[n] = p * dt if d_a[n] is None else d_a[n] + p * dt
      new.append(back)
    d_b = _sum_channels(tiles, refs, g, j, terms, d_b, step)
    total = lambda x: functools.reduce(jnp.add, x)
    _accumulate(tiles, refs["d_dtu_rows"], g, j, total(writes), first)
    if rates:
      _accumulate(tiles, refs["d_rate_rows"], g, j, total(rates), first)
    elif first:
      tiles.put_channels(refs["d_rate_rows"], g, j, jnp.zeros_like(dt))
    q = tuple(new)
  for n in range(tiles.block):
    if d_a[n] is not None:
      refs["sum_A"][k, n] += d_a[n]
  return q, d_b


def _accumulate(tiles, ref, g, j, x, first):
  """Add to what the blocks of states before have left at token j."""
  if not first:
    x = x + tiles.channels_of(ref, g, j)
  tiles.put_channels(ref, g, j, x)


def _sum_channels(tiles, refs, g, j, terms, sums, slot):
  """Put the sums over channels of one term for each n at token j of `sums`.

  Steps that the scheduler may interleave have their own `slot` of scratch.
  """
  parts, sublanes = refs["parts"], tiles.sublanes
  for n, term in enumerate(terms):
    parts[slot, pl.ds(n * sublanes, sublanes), :] = term
  rows = functools.reduce(
    jnp.add,
    [parts[slot, pl.ds(c, tiles.block, sublanes), :] for c in range(sublanes)],
  )
  total = rows.sum(1, keepdims=True)
  token = lax.broadcasted_iota(jnp.int32, sums.shape, 1)
  here = token == g * GROUP + j
  return jnp.where(here, jnp.broadcast_to(total, sums.shape), sums)


def _finish_group(tiles, refs, g, new):
  """The gradients of eight tokens that have no state axis.

  Unless `new`, this group was done before, and is not added to sums again.
  """
  valid = tiles.valid(refs, g)
  if "direct" in refs:
    direct = tiles.column(refs, "direct", g)
    d_direct = jnp.zeros((GROUP, LANES), jnp.float32)
  for c in range(tiles.sublanes):
    dt = tiles.rows_of(refs["dt"], g, c)
    dy = tiles.rows_of(refs["dy_rows"], g, c)
    d_dtu = tiles.rows_of(refs["d_dtu_rows"], g, c)
    d_dt = tiles.rows_of(refs["d_rate_rows"], g, c) * (1 / LOG2E)
    u = tiles.tokens(refs, "u", g, c, valid)
    _, slope = tiles.step_size(refs, g, c, valid)
    skip = tiles.skip(refs, g, c)
    d_u = dt * d_dtu
    if skip is not None:
      d_u = d_u + skip * dy
    d_dt = d_dt + u * d_dtu
    if "direct" in refs:
      d_dt = d_dt + direct * (dy * u)
      d_direct = d_direct + dy * (dt * u)
    d_delta = d_dt * slope
    tiles.put_tokens(refs["d_u"], g, c, d_u)
    tiles.put_tokens(refs["d_delta"], g, c, d_delta)
    if "z" in refs:
      y = tiles.rows_of(refs["y_rows"], g, c)
      if skip is not None:
        y = y + skip * u
      z = tiles.tokens(refs, "z", g, c, valid)
      s = sigmoid(z)
      d_gate = tiles.tokens(refs, "d_y", g, c, valid) * y
      tiles.put_tokens(refs["d_z"], g, c, d_gate * (s * (1.0 + z * (1.0 - s))))
    at = pl.ds(c * LANES, LANES)
    for name, x in (("D", dy * u), ("delta_bias", d_delta)):
      if f"sum_{name}" in refs:
        refs[f"sum_{name}"][:, at] += jnp.where(new, x, 0.0)
  if "direct" in refs:
    refs["d_direct"][0, 0, tiles.at(g), :] = d_direct
