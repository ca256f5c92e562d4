"""One token of the selective scan on TPU.

XLA makes several programs of a step, and inside a loop over layers, where the
state is a slice of a stack, it reads that slice and forms its decays twice:
for y, and for the new slice. Here a grid step has a few rows of a range of
channels, reads their state once and leaves with both.

A state is `[N, D]` with channels on lanes: so the chip keeps `[B, D, N]` of N
below 128 by itself, and no copy is made. XLA may fuse what makes an input,
such as the slice from the stack, into the kernel (`allow_input_fusion`).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.costs import selective_scan_cost
from kernels_pallas.selective_scan_tpu_tiles import (
  LANES,
  LOG2E,
  sigmoid,
  softplus,
)

__all__ = ["default_tiling", "forward"]


def default_tiling(rows: int, channels: int, states: int) -> tuple[int, int]:
  """Rows and channels of a block, whose state takes a megabyte.

  Larger ones leave no copy to overlap with, smaller ones cost their start each;
  two blocks of the state going in and two going out must fit in 16 MiB.
  """
  block = min(rows, 8)
  most = max(1, (1 << 20) // (4 * LANES * block * _ceil(states, 8) * 8))
  tiles = _ceil(_ceil(channels, LANES), most)
  lanes = _ceil(_ceil(channels, LANES), tiles) * LANES
  return block, min(channels, lanes)


def forward(
  rows,
  shared,
  *,
  delta_softplus: bool,
  ones: int,
  zeros: int,
  tiling: tuple[int, int] | None = None,
  interpret=False,
):
  """Advance every row's state by one token.

  Args:
    rows: u, delta, z `[R, D]`, B, C `[R, N]`, valid `[R]`, state `[R, N, D]`
      float32, by name; z and valid may be None.
    shared: A `[N, D]`, of which rows of one- and zero-channels are not used,
      and D, delta_bias `[D]` or None.
    delta_softplus: pass delta (with its bias) through softplus.
    ones: channels whose decay is 1, the first ones.
    zeros: channels whose decay is 0, the last ones.
    tiling: rows and channels of a block; None asks `default_tiling`.
    interpret: run on a CPU.

  Returns:
    y `[R, D]` of u's dtype and the new state `[R, N, D]`, which may take the
    old one's place in memory.
  """
  batch, width = rows["u"].shape
  states = rows["B"].shape[-1]
  block, lanes = tiling or default_tiling(batch, width, states)
  column = None if rows["valid"] is None else rows["valid"][:, None]
  vector = lambda x: None if x is None else x.astype(jnp.float32)[None]
  by_row = pl.BlockSpec((block, lanes), lambda r, d: (r, d))
  of_row = lambda n: pl.BlockSpec((block, n), lambda r, d: (r, 0))
  by_channel = lambda n: pl.BlockSpec((n, lanes), lambda r, d: (0, d))
  by_state = pl.BlockSpec((block, states, lanes), lambda r, d: (r, 0, d))
  inputs = dict(
    u=(rows["u"], by_row),
    delta=(rows["delta"], by_row),
    z=(rows["z"], by_row),
    B=(rows["B"], of_row(states)),
    C=(rows["C"], of_row(states)),
    valid=(None if column is None else column.astype(jnp.float32), of_row(1)),
    A=(shared["A"].astype(jnp.float32), by_channel(states)),
    D=(vector(shared["D"]), by_channel(1)),
    delta_bias=(vector(shared["delta_bias"]), by_channel(1)),
    state=(rows["state"], by_state),
  )
  inputs = {name: x for name, x in inputs.items() if x[0] is not None}
  names = (*inputs, "y", "new_state", "dt", "dtu", "y_rows")
  varying = jax.typeof(rows["u"]).manual_axis_type
  out = lambda x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, manual_axis_type=varying
  )
  kernel = functools.partial(
    _kernel, delta_softplus=delta_softplus, ones=ones, zeros=zeros
  )
  return pl.pallas_call(
    lambda *refs: kernel(dict(zip(names, refs, strict=True))),
    grid=(_ceil(batch, block), _ceil(width, lanes)),
    in_specs=[spec for _, spec in inputs.values()],
    out_specs=[by_row, by_state],
    out_shape=[out(rows["u"]), out(rows["state"])],
    scratch_shapes=[pltpu.VMEM((block, lanes), jnp.float32)] * 3,
    # Interpreted, an alias of an array that blocks do not fill is an error.
    input_output_aliases={} if interpret else {len(inputs) - 1: 1},
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel"),
      allow_input_fusion=[True] * len(inputs),
    ),
    cost_estimate=_cost(rows, shared, ones=ones),
    interpret=interpret,
    name="selective_step_tpu",
  )(*(x for x, _ in inputs.values()))


def _kernel(refs, *, delta_softplus, ones, zeros):
  wide = lambda name: refs[name][...].astype(jnp.float32)
  u, delta = wide("u"), wide("delta")
  if "delta_bias" in refs:
    delta = delta + refs["delta_bias"][...]
  dt = softplus(delta) if delta_softplus else delta
  refs["dt"][...], refs["dtu"][...] = dt, dt * u
  # Numbers of a row lie on lanes; on sublanes, each meets its row of a state.
  B, C = wide("B").T, wide("C").T
  # So many channels at a time that what is formed of them stays in registers.
  some = min(u.shape[1], _channels_at_once(B.shape[0]))
  for start in range(0, u.shape[1], some):
    at = pl.ds(start, min(some, u.shape[1] - start))
    A = refs["A"][:, at] * LOG2E
    n = lax.broadcasted_iota(jnp.int32, A.shape, 0)
    for r in range(u.shape[0]):
      row = lambda name, r=r, at=at: refs[name][pl.ds(r, 1), at]
      before = refs["state"][r, :, at]
      decay = jnp.exp2(row("dt") * A)
      if ones:
        decay = jnp.where(n < ones, 1.0, decay)
      kept = decay * before
      if zeros:
        # A product with 0 would let an infinite state through.
        kept = jnp.where(n >= A.shape[0] - zeros, 0.0, kept)
      state = kept + row("dtu") * B[:, r : r + 1]
      if "valid" in refs:
        valid = refs["valid"][pl.ds(r, 1), :]
        valid = jnp.broadcast_to(valid, state.shape) > 0.5
        state = jnp.where(valid, state, before)
      refs["new_state"][r, :, at] = state
      y = (state * C[:, r : r + 1]).sum(0, keepdims=True)
      refs["y_rows"][pl.ds(r, 1), at] = y
  y = refs["y_rows"][...]
  if "D" in refs:
    y = y + refs["D"][...] * u
  if "z" in refs:
    z = wide("z")
    y = y * (z * sigmoid(z))
  if "valid" in refs:
    valid = jnp.broadcast_to(refs["valid"][...], y.shape) > 0.5
    y = jnp.where(valid, y, 0.0)
  refs["y"][...] = y.astype(refs["y"].dtype)


def _channels_at_once(states):
  """Channels whose states are eight registers, at least one register's."""
  return LANES * max(1, 8 // _ceil(states, 8))


def _cost(rows, shared, *, ones):
  """That of a scan over one token; the old state is among its arguments."""
  token = lambda x: jax.ShapeDtypeStruct((x.shape[0], 1, *x.shape[1:]), x.dtype)
  rows = {k: v if k == "state" else jax.tree.map(token, v)
          for k, v in rows.items()}  # fmt: skip
  return selective_scan_cost(rows, shared, ones=ones)


def _ceil(a, b):
  return -(-a // b)
