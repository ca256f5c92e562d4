"""The tile of the TPU's selective scan: its sizes, its memory, its units.

What both passes share: how arrays are cut into blocks around the kernel, and
how a kernel finds tokens, channels and numbers in its scratch.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.selective_scan_tpu_tiling import (
  GROUP,
  LANES,
  Tiling,
  ceil,
  default_tiling,
  sizes,
)

__all__ = [
  "GROUP",
  "LANES",
  "Call",
  "Tiles",
  "Tiling",
  "default_tiling",
  "sigmoid",
  "softplus",
]

LOG2E = float(np.log2(np.e))


class Tiles:
  """The sizes of a scan's tiles, and how a kernel finds its way in one."""

  def __init__(
    self, rows, shared, delta_softplus, ones, tiling, *, backward, reverse=False
  ):
    self.reverse = reverse
    self.batch, self.length, self.width = rows["u"].shape
    self.count = rows["B"].shape[-1]
    self.groups_of_rows = shared["A"].shape[0]
    self.delta_softplus, self.ones = delta_softplus, ones
    tiling = tiling or default_tiling(
      self.length, self.width, self.count, backward=backward
    )
    self.time, self.sublanes, self.block = (
      tiling.time, tiling.sublanes, tiling.states,
    )  # fmt: skip
    self.blocks = ceil(self.count, self.block)
    self.times, self.state_shape = sizes(rows, tiling)
    self.lanes = self.sublanes * LANES
    self.tiles = ceil(self.width, self.lanes)
    self.groups = self.time // GROUP
    self.ragged_time = self.length % self.time != 0
    self.columns = [k for k in ("restart", "direct") if rows[k] is not None]
    if rows["valid"] is not None or self.ragged_time:
      self.columns.append("valid")
    self.ragged_width = self.width % self.lanes != 0

  # What surrounds the kernel: arrays as it wants them, and their blocks.

  @property
  def grid(self):
    """Rows, tiles of channels, tiles of time; the last in sequence."""
    return self.batch, self.tiles, self.times

  def time_index(self, t):
    """Which tile of time the grid's step t works on."""
    return self.times - 1 - t if self.reverse else t

  @property
  def by_token(self):
    """Blocks of arrays `[R, T, D]`."""
    index = lambda r, d, t: (r, self.time_index(t), d)
    return pl.BlockSpec((1, self.time, self.lanes), index)

  @property
  def by_row(self):
    """Blocks of `state_shape`, the same for all tiles of time."""
    shape = (1, self.blocks * self.block, 1, self.sublanes, LANES)
    return pl.BlockSpec(shape, lambda r, d, t: (r, 0, d, 0, 0))

  @property
  def by_time_and_row(self):
    """Blocks of states with an axis of tiles of time after R."""
    shape = (1, 1, self.blocks * self.block, 1, self.sublanes, LANES)
    index = lambda r, d, t: (r, self.time_index(t), 0, d, 0, 0)
    return pl.BlockSpec(shape, index)

  def add_inputs(self, call, rows, shared, tokens):
    """What both passes read."""
    per_group = self.batch // self.groups_of_rows
    group = lambda r: lax.div(r, np.int32(per_group))
    for name in tokens:
      if rows[name] is not None:
        call.input(name, rows[name], self.by_token)
    for name in ("B", "C"):
      index = lambda r, d, t: (r, 0, self.time_index(t), 0)
      shape = (1, self.blocks, self.time, self.block)
      x = self._filled(rows[name].astype(jnp.float32), rows["valid"])
      call.input(name, self._blocked(x), pl.BlockSpec(shape, index))
    # A number for each token lies on all lanes: in memory it takes as much.
    for name in self.columns:
      x = rows[name] if name != "valid" else self._valid(rows)
      x = x.astype(jnp.float32)[..., None]
      x = jnp.broadcast_to(x, (*x.shape[:2], LANES))
      index = lambda r, d, t: (r, self.time_index(t), 0)
      spec = pl.BlockSpec((1, self.time, LANES), index)
      call.input(name, self._filled(x, rows["valid"]), spec)
    # One-channels have rate 0, and so have the channels that fill a block.
    below = self.blocks * self.block - self.count
    A = jnp.pad(shared["A"] * LOG2E, ((0, 0), (self.ones, below), (0, 0)))
    spec = pl.BlockSpec(
      (1, self.blocks * self.block, 1, self.sublanes, LANES),
      lambda r, d, t: (group(r), 0, d, 0, 0),
    )
    call.input("A", self._tiled(A), spec)
    for name in ("D", "delta_bias"):
      if shared[name] is not None:
        spec = pl.BlockSpec(
          (1, 1, self.lanes), lambda r, d, t: (group(r), 0, d)
        )
        call.input(name, shared[name].astype(jnp.float32)[:, None], spec)

  def add_scratch(self, call, dense):
    """Numbers of a block, and registers of a token for each name."""
    # One more than there are: the last has none to prepare.
    groups = self.groups + 1
    shapes = dict.fromkeys("bc", (groups, self.block, GROUP, LANES))
    for name in ("dt", "dtu", *(f"{name}_rows" for name in dense)):
      shapes[name] = (groups, self.sublanes * GROUP, LANES)
    for name, shape in shapes.items():
      call.scratch(name, shape)

  def state(self, x):
    """`[R, N, D]` as the kernel has it, and its blocks."""
    below = self.blocks * self.block - self.count
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, below), (0, 0)))
    return self._tiled(x), self.by_row

  def unstate(self, x):
    """The way back, `[R, N, D]`."""
    x = x.reshape(*x.shape[:2], -1)
    return x[:, : self.count, : self.width]

  def _valid(self, rows):
    if rows["valid"] is not None:
      return rows["valid"]
    return jnp.ones_like(rows["u"], bool, shape=rows["u"].shape[:2])

  def _filled(self, x, valid):
    """Small rows `[R, T, N]` with 0 at padding and past the end."""
    if valid is not None:
      x = jnp.where(valid[..., None], x, jnp.zeros_like(x))
    after = self.times * self.time - self.length
    return jnp.pad(x, ((0, 0), (0, after), (0, 0)))

  def _tiled(self, x):
    """`[..., D]` to `[..., tiles, sublanes, 128]`."""
    missing = self.tiles * self.lanes - self.width
    x = jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, missing),))
    return x.reshape(*x.shape[:-1], self.tiles, self.sublanes, LANES)

  def _blocked(self, x):
    """`[R, T, N]` to `[R, blocks, T, N of a block]`."""
    if self.blocks == 1:
      return x[:, None]
    below = self.blocks * self.block - self.count
    x = jnp.pad(x, ((0, 0), (0, 0), (0, below)))
    x = x.reshape(*x.shape[:2], self.blocks, self.block)
    return jnp.swapaxes(x, 1, 2)

  # Inside the kernel.

  def for_blocks(self, body):
    """`body(k, first)` for each block; those with one-channels unrolled."""
    unrolled = max(1, ceil(self.ones, self.block))
    for k in range(unrolled):
      body(k, k == 0)
    if unrolled < self.blocks:
      lax.fori_loop(unrolled, self.blocks, lambda k, _: body(k, False), None)

  def prepare(self, refs, k, first, g, to):
    """Write what scanning group g in block k reads, to place `to`."""
    valid = self.valid(refs, g)
    for name in ("B", "C"):
      x = refs[name][0, k, self.at(g), :]
      for n in range(self.block):
        number = jnp.broadcast_to(x[:, n : n + 1], (GROUP, LANES))
        refs[name.lower()][to, n] = number
    if not first:
      return
    for c in range(self.sublanes):
      dt, _ = self.step_size(refs, g, c, valid)
      self.put_rows(refs["dt"], to, c, dt)
      u = self.tokens(refs, "u", g, c, valid)
      self.put_rows(refs["dtu"], to, c, dt * u)

  def valid(self, refs, g):
    """Which of the eight tokens are not padding, `[8, 128]`; None if all."""
    if "valid" not in self.columns:
      return None
    return self.column(refs, "valid", g) > 0.5

  def tokens(self, refs, name, g, c, valid=None):
    """Eight tokens of 128 channels, `[8, 128]`, 0 outside the array."""
    x = refs[name][0, self.at(g), pl.ds(c * LANES, LANES)]
    x = x.astype(jnp.float32)
    if valid is not None:
      x = jnp.where(valid, x, 0.0)
    if self.ragged_width:
      lane = lax.broadcasted_iota(jnp.int32, (GROUP, LANES), 1)
      start = pl.program_id(1) * self.lanes + c * LANES
      x = jnp.where(lane < self.width - start, x, 0.0)
    return x

  def put_tokens(self, ref, g, c, x):
    """The inverse of `tokens`."""
    ref[0, self.at(g), pl.ds(c * LANES, LANES)] = x.astype(ref.dtype)

  def step_size(self, refs, g, c, valid):
    """Δ and its derivative by delta, `[8, 128]`; 0 at padding."""
    x = self.tokens(refs, "delta", g, c, valid)
    if "delta_bias" in refs:
      x = x + self.per_channel(refs["delta_bias"], c)
    if self.delta_softplus:
      dt, slope = softplus(x), sigmoid(x)
    else:
      dt, slope = x, jnp.ones_like(x)
    if valid is not None:
      dt, slope = jnp.where(valid, dt, 0.0), jnp.where(valid, slope, 0.0)
    return dt, slope

  def skip(self, refs, g, c):
    """What multiplies u in y without the state, or None: D + direct Δ."""
    skip = self.per_channel(refs["D"], c) if "D" in refs else None
    if "direct" in self.columns:
      dt = self.rows_of(refs["dt"], g, c)
      direct = self.column(refs, "direct", g) * dt
      skip = direct if skip is None else skip + direct
    return skip

  def per_channel(self, ref, c):
    """128 channels of a vector over D, `[1, 128]`."""
    x = ref[0, :, pl.ds(c * LANES, LANES)]
    if self.ragged_width:
      lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
      start = pl.program_id(1) * self.lanes + c * LANES
      x = jnp.where(lane < self.width - start, x, 0.0)
    return x

  def rows_of(self, ref, g, c):
    """A group's eight tokens of 128 channels from scratch, `[8, 128]`."""
    return ref[g, pl.ds(c * GROUP, GROUP), :]

  def put_rows(self, ref, g, c, x):
    """The inverse of `rows_of`."""
    ref[g, pl.ds(c * GROUP, GROUP), :] = x

  def channels_of(self, ref, g, j):
    """Token j of a group as one register `[sublanes, 128]`."""
    return ref[g, pl.ds(j, self.sublanes, GROUP), :]

  def put_channels(self, ref, g, j, x):
    """The inverse of `channels_of`."""
    ref[g, pl.ds(j, self.sublanes, GROUP), :] = x

  def number(self, ref, g, n, j):
    """B or C of token j and state n, on every lane."""
    x = ref[g, n, pl.ds(j, 1), :]
    return jnp.broadcast_to(x, (self.sublanes, LANES))

  def decay(self, refs, k, n, dt):
    """exp(ΔA) of state n in block k, or None where it is 1."""
    # Blocks with one-channels are unrolled, their k is no tracer.
    if isinstance(k, int) and k * self.block + n < self.ones:
      return None
    return jnp.exp2(dt * refs["A"][0, k * self.block + n, 0])

  def before(self, refs, g, j, x):
    """The state before token j, or what flows back to it: 0 at a restart."""
    if "restart" not in self.columns:
      return x
    restart = refs["restart"][0, pl.ds(g * GROUP + j, 1), :]
    return jnp.where(jnp.broadcast_to(restart, x.shape) > 0.5, 0.0, x)

  def column(self, refs, name, g):
    """A token's number, such as `valid`, over the lanes, `[8, 128]`."""
    return refs[name][0, self.at(g), :]

  def at(self, g):
    """The eight tokens of group g in a block."""
    start = g * GROUP
    if not isinstance(start, int):
      start = pl.multiple_of(start, GROUP)
    return pl.ds(start, GROUP)


class Call:
  """Collects a `pallas_call`'s arrays by name."""

  def __init__(self, tiles, name):
    self.tiles, self.name = tiles, name
    self.inputs, self.in_specs = {}, []
    self.outputs, self.out_specs = {}, []
    self.scratches = {}

  def input(self, name, array, spec):
    """Add an array that the kernel reads."""
    self.inputs[name] = array
    self.in_specs.append(spec)

  def output(self, name, shape, dtype, spec):
    """Add an array that the kernel writes."""
    self.outputs[name] = (shape, dtype)
    self.out_specs.append(spec)

  def scratch(self, name, shape):
    """Add float32 memory that lasts from one tile to the next."""
    self.scratches[name] = pltpu.VMEM(shape, jnp.float32)

  def __call__(self, kernel, cost, interpret, like):
    """Run `kernel(refs)`, refs by name; the outputs by name."""
    names = (*self.inputs, *self.outputs, *self.scratches)
    varying = jax.typeof(like).manual_axis_type
    out_shape = [
      jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)
      for shape, dtype in self.outputs.values()
    ]
    out = pl.pallas_call(
      lambda *refs: kernel(dict(zip(names, refs, strict=True))),
      grid=self.tiles.grid,
      in_specs=self.in_specs,
      out_specs=self.out_specs,
      out_shape=out_shape,
      scratch_shapes=list(self.scratches.values()),
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary")
      ),
      cost_estimate=cost,
      interpret=interpret,
      name=self.name,
    )(*self.inputs.values())
    return dict(zip(self.outputs, out, strict=True))


def sigmoid(x):
  """1 / (1 + exp(-x)), without overflow."""
  e = jnp.exp(-jnp.abs(x))
  return jnp.where(x < 0, e, 1.0) * _inverse(1.0 + e)


def softplus(x):
  """log(1 + exp(x)), relatively exact for very negative x too."""
  e = jnp.exp(-jnp.abs(x))
  # The minimax polynomial of log(1 + e) / e up to 1/8, to 3e-7: below it the
  # logarithm of 1 + e has lost the digits of e.
  series = jnp.full_like(e, _POLYNOMIAL[0])
  for coefficient in _POLYNOMIAL[1:]:
    series = series * e + coefficient
  return jnp.maximum(x, 0.0) + jnp.where(
    e < 0.125, e * series, jnp.log(1.0 + e)
  )


_POLYNOMIAL = (
  -0.20644628, 0.33008613, -0.49992062, 0.99999969,
)  # fmt: skip


def _inverse(x):
  """1 / x for x in [1, 2]."""
  return pltpu.reciprocal(x, full_range=False)
