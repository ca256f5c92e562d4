"""The linear scan on GPUs of sm_80 and newer: hₜ = aₜ hₜ₋₁ + bₜ.

Nothing is shared between channels, so the memory's bandwidth is the bound. A
block of threads takes one row and 128 channels (or more), one for each
thread, and goes through time with the state in a register; a pipeline of
asynchronous copies keeps the next tiles of a and b on their way, which is
what hides the memory's latency. Results are stored directly, a row of
channels at a time. What is left of T after whole tiles is read directly too.

The backward pass reads a, b and ȳ and writes ā and b̄, once each. In steps of
16 it runs forward again in registers, from the state that the forward pass
kept there, and back: b̄ₜ = gₜ = ȳₜ + wₜ₊₁, āₜ = gₜ hₜ₋₁, wₜ = aₜ gₜ. Keeping y
instead would read as much, be rounded where y is bfloat16, and be 0 at
padding.

Channels that do not fill a tile are padded in memory; 128 divides most
widths, and copies need rows of a multiple of 16 bytes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as gpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.costs import linear_scan_cost
from kernels_pallas.jax_versions import gpu_kernel
from kernels_pallas.linear_scan_gpu_tiling import (
  THREADS,
  Tiling,
  default_tiling,
)

__all__ = ["Tiling", "backward", "default_tiling", "forward"]


def forward(
  a, b, state, valid, restart, *, reverse, keep, tiling=None, interpret=None
):
  """Scan rows of channels.

  Args:
    a: decays `[G, T, D]`, or `[G, 1, D]` where constant; row r takes group
      r // (R // G).
    b: inputs `[R, T, D]`; a and b are float32 or bfloat16.
    state: `[R, D]`, float32.
    valid: `[R, T]` bool, False at padding, or None.
    restart: `[R, T]` bool, True where the state is forgotten, or None.
    reverse: from the last step to the first.
    keep: also return what `backward` needs.
    tiling: tile sizes; `default_tiling` if None.
    interpret: as in `plgpu.kernel`.

  Returns:
    y `[R, T, D]` in b's dtype, the final state `[R, D]` float32, and the
    states that `backward` starts from `[R, ⌈T / tiling.kept⌉, D]`, None
    unless `keep`.
  """
  tiling = tiling or default_tiling(a.dtype, b.dtype)
  plan = _Plan(tiling, *b.shape, a.shape[0], a.shape[1] == 1, reverse)
  outputs = [(b.shape, b.dtype), (state.shape, jnp.float32)]
  if keep:
    outputs.append((plan.states, jnp.float32))
  y, final, *states = _call(
    functools.partial(_forward_kernel, plan=plan),
    "linear_scan_forward",
    plan, _codes(valid, restart, plan), (a, b, state), outputs,
    flops=2 * b.size, interpret=interpret,
  )  # fmt: skip
  return y, final, states[0] if keep else None


def backward(
  a, b, states, valid, restart, dy, dfinal, *, reverse, tiling=None,
  interpret=None,
):  # fmt: skip
  """Pull cotangents back through `forward`.

  Args:
    a: as in `forward`, and so all arguments of the same name.
    b: inputs.
    states: the third result of `forward`, made with the same tiling.
    valid: False at padding, or None.
    restart: True where the state is forgotten, or None.
    dy: cotangent of y, `[R, T, D]`.
    dfinal: cotangent of the final state, `[R, D]`.
    reverse: the direction of `forward`.
    tiling: that of `forward`.
    interpret: as in `plgpu.kernel`.

  Returns:
    The cotangents of a for each row, `[R, T, D]` in a's dtype or `[R, 1, D]`
    float32 where a is constant, of b in b's dtype, and of the initial state
    `[R, D]` float32.
  """
  tiling = tiling or default_tiling(a.dtype, b.dtype)
  constant = a.shape[1] == 1
  plan = _Plan(tiling, *b.shape, a.shape[0], constant, reverse)
  R, _, D = b.shape
  da = ((R, D), jnp.float32) if constant else (b.shape, a.dtype)
  da, db, dstate = _call(
    functools.partial(_backward_kernel, plan=plan),
    "linear_scan_backward",
    plan, _codes(valid, restart, plan), (a, b, states, dy, dfinal),
    [da, (b.shape, b.dtype), ((R, D), jnp.float32)],
    flops=7 * b.size, interpret=interpret,
  )  # fmt: skip
  return da[:, None] if constant else da, db, dstate


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Sizes of a call, and the order in which time is gone through."""

  tiling: Tiling
  rows: int
  length: int
  channels: int
  groups: int
  constant: bool
  reverse: bool

  @property
  def states(self):
    return (self.rows, pl.cdiv(self.length, self.tiling.kept), self.channels)

  @property
  def pieces(self):
    return pl.cdiv(self.channels, self.tiling.channels)


def _call(kernel, name, plan, codes, arrays, outputs, *, flops, interpret):
  """`plgpu.kernel` with channels padded to tiles, typed for `shard_map`."""
  width = plan.pieces * plan.tiling.channels
  varying = jax.typeof(arrays[1]).manual_axis_type
  shapes = [
    jax.ShapeDtypeStruct((*shape[:-1], width), dtype, manual_axis_type=varying)
    for shape, dtype in outputs
  ]

  def pad(x):
    gap = [(0, 0)] * (x.ndim - 1) + [(0, width - plan.channels)]
    return jnp.pad(x, gap) if width > plan.channels else x

  arrays = [pad(x) for x in arrays]
  if codes is not None:
    arrays = [codes, *arrays]
  results = gpu_kernel(
    functools.partial(kernel, masked=codes is not None),
    out_type=shapes,
    # One axis: the other two of a CUDA grid end at 65,535.
    grid=(plan.rows * plan.pieces,),
    grid_names=("block",),
    # The one hazard that automatic barriers guard against is met by a
    # barrier at the end of each tile.
    # Lanes: every layout is said below, and the search for them that the
    # default makes takes minutes in a loop that is written out.
    compiler_params=plgpu.CompilerParams(
      unsafe_no_auto_barriers=True,
      lowering_semantics=plgpu.LoweringSemantics.Lane,
    ),
    cost_estimate=linear_scan_cost(
      *arrays,
      results=sum(x.size * x.dtype.itemsize for x in shapes),
      flops=flops,
    ),
    interpret=interpret,
    kernel_name=name,
  )(*arrays)
  return [_vary(x[..., : plan.channels], varying) for x in results]


def _vary(x, wanted):
  """x of the manual axis type that `plgpu.kernel` was told of, and drops."""
  missing = wanted.varying - jax.typeof(x).manual_axis_type.varying
  return lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def _codes(valid, restart, plan):
  """Bit 0: no padding; bit 1: restart. `[R, tiles · whole warps]` or None."""
  if valid is None:
    return None
  time = plan.tiling.time
  codes = valid.astype(jnp.int32) | restart.astype(jnp.int32) << 1
  codes = jnp.pad(codes, ((0, 0), (0, -plan.length % time)))
  tiles = codes.reshape(plan.rows, -1, time)
  # Copies on sm_80 take multiples of 128 elements.
  tiles = jnp.pad(tiles, ((0, 0), (0, 0), (0, -time % THREADS)))
  return tiles.reshape(plan.rows, -1)


def _forward_kernel(*refs, plan, masked):
  codes_g, refs = (refs[0], refs[1:]) if masked else (None, refs)
  a_g, b_g, state_g, y_g, final_g, *states_g = refs
  walk = _Walk(plan, codes_g, a_g, [b_g])

  def body(piece, h):
    for ref in states_g:
      ref[walk.row, piece.index, walk.channels] = h
    for j in piece.order(plan.reverse):
      mask, (b,) = piece.mask(j), piece.inputs(j)
      h = mask.decay(piece.decay(j)) * mask.forget(h) + mask.clear(b)
      y = mask.clear(h).astype(y_g.dtype)
      y_g[walk.row, piece.start + j, walk.channels] = y
    return h

  h = _untyped(state_g[walk.row, walk.channels])
  final_g[walk.row, walk.channels] = walk(body, h, plan.reverse)


def _backward_kernel(*refs, plan, masked):
  codes_g, refs = (refs[0], refs[1:]) if masked else (None, refs)
  a_g, b_g, states_g, dy_g, dfinal_g, da_g, db_g, dstate_g = refs
  walk = _Walk(plan, codes_g, a_g, [b_g, dy_g], states_g)

  def body(piece, carry):
    w, *total = carry
    h, decays, before = piece.state(), {}, {}
    for j in piece.order(plan.reverse):
      mask, (b, _) = piece.mask(j), piece.inputs(j)
      decays[j], before[j] = mask.decay(piece.decay(j)), mask.forget(h)
      h = decays[j] * before[j] + mask.clear(b)
    for j in piece.order(not plan.reverse):
      mask, (_, dy) = piece.mask(j), piece.inputs(j)
      g = mask.clear(dy) + w
      db = mask.clear(g).astype(db_g.dtype)
      db_g[walk.row, piece.start + j, walk.channels] = db
      da = mask.clear(g * before[j])
      if plan.constant:
        total = [total[0] + da]
      else:
        da = da.astype(da_g.dtype)
        da_g[walk.row, piece.start + j, walk.channels] = da
      w = mask.forget(decays[j] * g)
    return (w, *total)

  carry = (_untyped(dfinal_g[walk.row, walk.channels]),)
  if plan.constant:
    carry = (*carry, _row(jnp.zeros((plan.tiling.channels,), jnp.float32)))
  w, *total = walk(body, carry, not plan.reverse)
  dstate_g[walk.row, walk.channels] = w
  if plan.constant:
    da_g[walk.row, walk.channels] = total[0]


class _Walk:
  """One block's way through time, piece by piece of `kept` steps."""

  def __init__(self, plan, codes_g, a_g, inputs_g, states_g=None):
    block = lax.axis_index("block")
    self.plan = plan
    self.row = lax.div(block, plan.pieces)
    width = plan.tiling.channels
    self.channels = pl.ds(lax.rem(block, plan.pieces) * width, width)
    group = lax.div(self.row, plan.rows // plan.groups)
    here = lambda ref, row: ref.at[row, :, self.channels]
    self.refs = {
      f"input {i}": here(ref, self.row) for i, ref in enumerate(inputs_g)
    }
    self.decay = None
    if plan.constant:
      self.decay = _row(a_g[group, 0, self.channels]).astype(jnp.float32)
    else:
      self.refs["a"] = here(a_g, group)
    if codes_g is not None:
      self.refs["codes"] = codes_g.at[self.row]
    if states_g is not None:
      self.refs["states"] = here(states_g, self.row)

  def __call__(self, body, carry, reverse):
    """carry = body(piece, carry) from the first step to the last, or back."""
    length, time = self.plan.length, self.plan.tiling.time
    whole = length // time

    def tile(index, read, count, carry):
      return self._tile(body, read, index, count, carry, reverse)

    def pipelined(carry):
      def step(indices, *refs):
        *refs, carry = refs
        index = whole - 1 - indices[0] if reverse else indices[0]
        refs = dict(zip(self.refs, refs, strict=True))
        carry = tile(index, lambda name, at: refs[name][at], time, carry)
        _meet()
        return carry

      return plgpu.emit_pipeline(
        step,
        grid=(whole,),
        in_specs=[
          self._spec(name, ref, whole, reverse)
          for name, ref in self.refs.items()
        ],
        max_concurrent_steps=self.plan.tiling.stages,
        init_carry=carry,
      )(
        *(
          ref.at[pl.ds(0, whole * self._steps(n))]
          for n, ref in self.refs.items()
        )
      )

    def direct(carry):
      def read(name, at):
        base = whole * (self._steps(name))
        return self.refs[name][base + at]

      return tile(whole, read, length - whole * time, carry)

    ways = [pipelined] * (whole > 0) + [direct] * (length > whole * time)
    for way in reversed(ways) if reverse else ways:
      carry = way(carry)
    return carry

  def _steps(self, name):
    """Entries of a time tile."""
    time, kept = self.plan.tiling.time, self.plan.tiling.kept
    special = dict(states=time // kept, codes=-(-time // THREADS) * THREADS)
    return special.get(name, time)

  def _spec(self, name, ref, whole, reverse):
    at = lambda i: whole - 1 - i if reverse else i
    steps = self._steps(name)
    if ref.ndim == 1:
      return plgpu.BlockSpec((steps,), lambda i: (at(i),))
    return plgpu.BlockSpec(
      (steps, self.plan.tiling.channels), lambda i: (at(i), 0)
    )

  def _tile(self, body, read, index, count, carry, reverse):
    """The pieces of a tile: those of full size in a loop, and what is left."""
    kept = self.plan.tiling.kept
    full, rest = divmod(count, kept)

    def piece(i, carry, count=kept):
      return body(_Piece(self, read, index, i, count), carry)

    def loop(carry):
      step = lambda i, c: piece(full - 1 - i if reverse else i, c)
      return lax.fori_loop(0, full, step, carry)

    last = functools.partial(piece, full, count=rest)
    ways = [loop] * (full > 0) + [last] * (rest > 0)
    for way in reversed(ways) if reverse else ways:
      carry = way(carry)
    return carry


class _Piece:
  """Steps of a tile that are written out, without a loop."""

  def __init__(self, walk, read, tile, i, count):
    tiling = walk.plan.tiling
    self._walk, self._read = walk, read
    self._i, self._at, self._count = i, i * tiling.kept, count
    self.start = tile * tiling.time + self._at
    self.index = tile * (tiling.time // tiling.kept) + i

  def order(self, reverse):
    steps = range(self._count)
    return reversed(steps) if reverse else steps

  def decay(self, j):
    known = self._walk.decay
    return self._float32("a", j) if known is None else known

  def inputs(self, j):
    names = [name for name in self._walk.refs if name.startswith("input")]
    return [self._float32(name, j) for name in names]

  def state(self):
    return _row(self._read("states", self._i))

  def mask(self, j):
    if "codes" not in self._walk.refs:
      return _Mask()
    code = self._read("codes", self._at + j)
    wide = lambda x: _row(jnp.full((self._walk.plan.tiling.channels,), x))
    return _Mask(wide(code & 1) == 1, wide(code) < 2, wide(0.0), wide(1.0))

  def _float32(self, name, j):
    return _row(self._read(name, self._at + j)).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class _Mask:
  """What a step's code says, on all channels; None where all steps count."""

  valid: jax.Array | None = None
  goes_on: jax.Array | None = None
  zero: jax.Array | None = None
  one: jax.Array | None = None

  def clear(self, x):
    """0 at padding."""
    return x if self.valid is None else lax.select(self.valid, x, self.zero)

  def decay(self, a):
    """1 at padding."""
    return a if self.valid is None else lax.select(self.valid, a, self.one)

  def forget(self, h):
    """0 at restarts."""
    return h if self.valid is None else lax.select(self.goes_on, h, self.zero)


def _untyped(x):
  """x without the axes of a mesh that it varies over.

  Inside a kernel JAX does not follow them: what is read has them, what is
  computed has not, and a loop's carry must be one or the other.
  """
  return _row(x) * 1.0


def _meet():
  """Wait until no thread of the block reads the tile that is copied over next.

  `commit_smem` is a barrier with a fence for copies by another engine, which
  chips before Hopper do not have and must not be asked for. There, to wait
  for all copies but more than there are leaves the barrier alone.
  """
  if gpu_utils._infer_arch() < (9, 0):
    plgpu.wait_gmem_to_smem(32)
  else:
    plgpu.commit_smem()


def _row(x):
  """A row of channels, in the layout in which rows are read and written."""
  layout = plgpu.Layout.WG_STRIDED(x.shape, vec_size=x.size // THREADS)
  return plgpu.layout_cast(x, layout)
