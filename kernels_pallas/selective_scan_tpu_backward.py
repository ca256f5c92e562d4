"""The selective scan on TPU: the backward pass.

Tiles of time are visited from the last to the first. In a tile the adjoint
runs back over the tokens and leaves gₜ in scratch,

    gₜ = ȳₜ Cₜ + qₜ₊₁        qₜ = exp(ΔₜA) gₜ

and then the scan runs forward again, from the state that the forward pass
kept, with gₜ at hand when hₜ is:

    pₜ = gₜ exp(ΔₜA) hₜ₋₁    Ā = Σ_t pₜ Δₜ        Δ̄ₜ ∋ Σ_n pₜ A
    C̄ₜ = Σ_d ȳₜ hₜ           B̄ₜ = Σ_d gₜ Δₜuₜ     (Δu)‾ₜ = Σ_n gₜ Bₜ

Sums over n are sums of registers. Sums over channels are sums in a register:
its rows go to scratch, from where those of all n with the same sublane come
back together; what is left is one sum over lanes a token, for a unit that is
idle.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.costs import selective_scan_cost
from kernels_pallas.selective_scan_tpu_tiles import (
  GROUP,
  LANES,
  LOG2E,
  Call,
  Tiles,
  Tiling,
  sigmoid,
)

__all__ = ["backward"]


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
  # dB and dC of a token share a row of lanes, from lane 0 and lane 64.
  shape = (batch, tiles.tiles, tiles.blocks, times * tiles.time, LANES)
  spec = pl.BlockSpec(
    (1, 1, tiles.blocks, tiles.time, LANES),
    lambda r, d, t: (r, d, 0, tiles.time_index(t), 0),
  )
  call.output("d_numbers", shape, jnp.float32, spec)
  for name in ("A", "initial_state"):
    call.output(f"d_{name}", tiles.state_shape, jnp.float32, tiles.by_row)
  for name in ("D", "delta_bias"):
    if shared[name] is not None:
      vector = (batch, 1, tiles.tiles * tiles.lanes)
      spec = pl.BlockSpec((1, 1, tiles.lanes), lambda r, d, t: (r, 0, d))
      call.output(f"d_{name}", vector, jnp.float32, spec)
      call.scratch(f"sum_{name}", (GROUP, tiles.lanes))
  if rows["direct"] is not None:
    of_tokens = (batch, tiles.tiles, times * tiles.time, LANES)
    spec = pl.BlockSpec(
      (1, 1, tiles.time, LANES),
      lambda r, d, t: (r, d, tiles.time_index(t), 0),
    )
    call.output("d_direct", of_tokens, jnp.float32, spec)

  tiles.add_scratch(call, ("dy", "d_dtu", "d_rate", "y"))
  per_n = (tiles.blocks, tiles.block, tiles.sublanes, LANES)
  call.scratch("q", per_n)
  call.scratch("sum_A", per_n)
  call.scratch("g", (tiles.time, *per_n[1:]))
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
  # [R, tiles, blocks, T, lanes]: the sum over tiles has a fixed order.
  numbers = out["d_numbers"].sum(1)[:, :, : tiles.length]
  for name, start in (("B", 0), ("C", LANES // 2)):
    x = numbers[..., start : start + tiles.block]
    x = jnp.swapaxes(x, 1, 2).reshape(tiles.batch, tiles.length, -1)
    grads[name] = x[..., : tiles.count]
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
    def adjoint(i, q):
      g = last - i
      q = _adjoint_group(tiles, refs, k, g, q)
      # Past the end there is nothing to prepare: do the first group again.
      _prepare(tiles, refs, k, first, jnp.maximum(g - 1, 0))
      return q

    def scan(g, h):
      h = _scan_group(tiles, refs, k, g, h, first)
      if single:
        _finish_group(tiles, refs, jnp.maximum(g - 1, 0), g > 0)
      return h

    _prepare(tiles, refs, k, first, last)
    of_tile = range(tiles.block)
    q = tuple(refs["q"][k, n] for n in of_tile)
    q = lax.fori_loop(0, tiles.groups, adjoint, q)
    for n in of_tile:
      refs["q"][k, n] = q[n]
    h = tuple(refs["states"][0, 0, k * tiles.block + n, 0] for n in of_tile)
    lax.fori_loop(0, tiles.groups, scan, h)

  tiles.for_blocks(block)
  if single:
    _finish_group(tiles, refs, last, True)
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


def _prepare(tiles, refs, k, first, g):
  """What both passes over group g read."""
  tiles.prepare(refs, k, first, g, g)
  if first:
    for c in range(tiles.sublanes):
      tiles.put_rows(refs["dy_rows"], g, c, _gated(tiles, refs, g, c))


def _gated(tiles, refs, g, c):
  """The cotangent of y before the gate, `[8, 128]`."""
  valid = tiles.valid(refs, g)
  dy = tiles.tokens(refs, "d_y", g, c, valid)
  if "z" not in refs:
    return dy
  z = tiles.tokens(refs, "z", g, c, valid)
  return dy * (z * sigmoid(z))


def _adjoint_group(tiles, refs, k, g, q):
  """Eight tokens back: gₜ to scratch."""
  for j in reversed(range(GROUP)):
    dt, dy = (tiles.channels_of(refs[x], g, j) for x in ("dt", "dy_rows"))
    new = []
    for n in range(tiles.block):
      adjoint = dy * tiles.number(refs["c"], g, n, j) + q[n]
      refs["g"][g * GROUP + j, n] = adjoint
      back = tiles.before(refs, g, j, adjoint)
      decay = tiles.decay(refs, k, n, dt)
      new.append(back if decay is None else decay * back)
    q = tuple(new)
  return q


def _scan_group(tiles, refs, k, g, h, first):
  """Eight tokens forward, and all that needs both gₜ and hₜ."""
  d_a = [None] * tiles.block
  total = lambda x: functools.reduce(jnp.add, x)
  for j in range(GROUP):
    dt, dtu, dy = (
      tiles.channels_of(refs[x], g, j) for x in ("dt", "dtu", "dy_rows")
    )
    new, d_b, d_c, writes, rates, y = [], [], [], [], [], []
    for n in range(tiles.block):
      b = tiles.number(refs["b"], g, n, j)
      adjoint = refs["g"][g * GROUP + j, n]
      decayed = tiles.before(refs, g, j, h[n])
      decay = tiles.decay(refs, k, n, dt)
      if decay is not None:
        decayed = decay * decayed
        p = adjoint * decayed
        rates.append(p * refs["A"][0, k * tiles.block + n, 0])
        d_a[n] = p * dt if d_a[n] is None else d_a[n] + p * dt
      new.append(decayed + dtu * b)
      writes.append(adjoint * b)
      d_b.append(adjoint * dtu)
      d_c.append(dy * new[n])
      if "z" in refs:
        y.append(new[n] * tiles.number(refs["c"], g, n, j))
    _sum_channels(tiles, refs, k, g, j, d_b, d_c)
    _accumulate(tiles, refs["d_dtu_rows"], g, j, total(writes), first)
    if rates:
      _accumulate(tiles, refs["d_rate_rows"], g, j, total(rates), first)
    elif first:
      tiles.put_channels(refs["d_rate_rows"], g, j, jnp.zeros_like(dt))
    if y:
      _accumulate(tiles, refs["y_rows"], g, j, total(y), first)
    h = tuple(new)
  for n in range(tiles.block):
    if d_a[n] is not None:
      refs["sum_A"][k, n] += d_a[n]
  return h


def _accumulate(tiles, ref, g, j, x, first):
  """Add to what the blocks of states before have left at token j."""
  if not first:
    x = x + tiles.channels_of(ref, g, j)
  tiles.put_channels(ref, g, j, x)


def _sum_channels(tiles, refs, k, g, j, d_b, d_c):
  """Sum each term over the channels: one row, n along lanes, for token j.

  The sum of a register over its lanes keeps the lane unit busy for long, and
  comes out on all lanes, of which a select keeps one. The halves of a full
  register are therefore folded first, one of B on one of C: half the sums.
  """
  shape = (tiles.sublanes, LANES)
  lane = lax.broadcasted_iota(jnp.int32, shape, 1)
  sums = jnp.zeros(shape, jnp.float32)
  if tiles.sublanes == 8:
    upper = lax.broadcasted_iota(jnp.int32, shape, 0) < 4
    lane = jnp.where(upper, lane, lane - LANES // 2)
    terms = [
      (n, _fold(upper, b, c))
      for n, (b, c) in enumerate(zip(d_b, d_c, strict=True))
    ]
  else:
    terms = [*enumerate(d_b), *enumerate(d_c, LANES // 2)]
  for at, term in terms:
    total = jnp.broadcast_to(term.sum(1, keepdims=True), shape)
    sums = jnp.where(lane == at, total, sums)
  row = sums.sum(0, keepdims=True)
  refs["d_numbers"][0, 0, k, pl.ds(g * GROUP + j, 1), :] = row


def _fold(upper, x, y):
  """x on itself in the upper four sublanes, y in the lower ones."""
  swapped = pltpu.roll(jnp.where(upper, y, x), 4, 0)
  return jnp.where(upper, x, y) + swapped


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
