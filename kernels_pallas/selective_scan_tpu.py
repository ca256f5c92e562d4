"""The selective scan on TPU: the forward pass.

The chip computes on registers of 8 sublanes × 128 lanes. A tile is `time`
tokens of 8 · 128 channels, and its state is one register per n: at each
token Δ, u and y are one register too, B and C are numbers, and nothing is
broadcast or reduced across a register. Only memory has tokens on sublanes:

    in memory   [8 tokens, 1024 channels] = 8 registers [8 tokens, 128]
    computed on  8 tokens x 1 register [8 · 128 channels]

so eight tokens are written to scratch as they come, and read with a stride of
eight sublanes. B and C are spread over the lanes when they are written there,
and read with a stride of zero.

The loop over groups of eight tokens prepares one group while it scans the one
before: spreading is work for units that the scan leaves idle.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.costs import selective_scan_cost
from kernels_pallas.selective_scan_tpu_tiles import (
  GROUP,
  LANES,
  Call,
  Tiles,
  Tiling,
  sigmoid,
)

__all__ = ["forward"]


def forward(
  rows,
  shared,
  *,
  delta_softplus: bool,
  ones: int,
  keep: bool,
  tiling: Tiling | None = None,
  interpret=False,
):
  """The forward pass of `ssmjax.ops.selective_fused.fused`.

  With `keep`, the states at the starts of the *backward* pass's tiles come
  back too, `[R, tiles of time, N, tiles of D, sublanes, 128]`.
  """
  tiles = Tiles(rows, shared, delta_softplus, ones, tiling, backward=keep)
  call = Call(tiles, "selective_scan_tpu_forward")
  tiles.add_inputs(call, rows, shared, ("u", "delta", "z"))
  if rows["initial_state"] is not None:
    call.input("initial_state", *tiles.state(rows["initial_state"]))
  call.output("y", rows["u"].shape, rows["u"].dtype, tiles.by_token)
  call.output("final_state", tiles.state_shape, jnp.float32, tiles.by_row)
  if keep:
    shape = (tiles.batch, tiles.times, *tiles.state_shape[1:])
    call.output("states", shape, jnp.float32, tiles.by_time_and_row)
  tiles.add_scratch(call, ("y",))
  call.scratch("h", (tiles.blocks, tiles.block, tiles.sublanes, LANES))
  out = call(
    functools.partial(_forward_kernel, tiles),
    selective_scan_cost(rows, shared, ones=ones),
    interpret,
    like=rows["u"],
  )
  return out["y"], tiles.unstate(out["final_state"]), out.get("states")


def _forward_kernel(tiles, refs):
  time = pl.program_id(2)

  @pl.when(time == 0)
  def _start():
    if "initial_state" in refs:
      refs["h"][...] = refs["initial_state"][...].reshape(refs["h"].shape)
    else:
      refs["h"][...] = jnp.zeros_like(refs["h"])

  if "states" in refs:
    refs["states"][...] = refs["h"][...].reshape(refs["states"].shape)

  scan = functools.partial(_scan_group, tiles, refs)
  single = tiles.blocks == 1

  def block(k, first):
    def body(g, h):
      # The scan first, and nothing of the rest before it, not even an index:
      # the scheduler would start on it and keep what the scan needs from
      # staying in registers.
      h = scan(k, g, h, first)
      # Past the end there is nothing to prepare: do the last group again.
      tiles.prepare(refs, k, first, jnp.minimum(g + 1, tiles.groups - 1), g + 1)
      if single:
        _finish_group(tiles, refs, jnp.maximum(g - 1, 0))
      return h

    tiles.prepare(refs, k, first, 0, 0)
    h = tuple(refs["h"][k, n] for n in range(tiles.block))
    h = lax.fori_loop(0, tiles.groups, body, h)
    for n in range(tiles.block):
      refs["h"][k, n] = h[n]

  tiles.for_blocks(block)
  if single:
    _finish_group(tiles, refs, tiles.groups - 1)
  else:
    finish = lambda g, _: _finish_group(tiles, refs, g)
    lax.fori_loop(0, tiles.groups, finish, None)

  @pl.when(time == tiles.times - 1)
  def _end():
    refs["final_state"][...] = refs["h"][...].reshape(refs["final_state"].shape)


def _scan_group(tiles, refs, k, g, h, first):
  """Eight tokens of block k: y to scratch, the new state as registers."""
  for j in range(GROUP):
    dt, dtu = (tiles.channels_of(refs[name], g, j) for name in ("dt", "dtu"))
    new, terms = [], []
    for n in range(tiles.block):
      before = tiles.before(refs, g, j, h[n])
      decay = tiles.decay(refs, k, n, dt)
      after = before if decay is None else decay * before
      new.append(after + dtu * tiles.number(refs["b"], g, n, j))
      terms.append(new[n] * tiles.number(refs["c"], g, n, j))
    y = functools.reduce(jnp.add, terms)
    if not first:
      y = y + tiles.channels_of(refs["y_rows"], g, j)
    tiles.put_channels(refs["y_rows"], g, j, y)
    h = tuple(new)
  return h


def _finish_group(tiles, refs, g):
  """Skip, gate and padding of eight tokens of y, on their way out."""
  valid = tiles.valid(refs, g)
  for c in range(tiles.sublanes):
    y = tiles.rows_of(refs["y_rows"], g, c)
    skip = tiles.skip(refs, g, c)
    if skip is not None:
      y = y + skip * tiles.tokens(refs, "u", g, c)
    if "z" in refs:
      z = tiles.tokens(refs, "z", g, c)
      y = y * (z * sigmoid(z))
    if valid is not None:
      y = jnp.where(valid, y, 0.0)
    tiles.put_tokens(refs["y"], g, c, y)
