"""The linear scan on TPU: hₜ = aₜ hₜ₋₁ + bₜ, forward and backward.

Nothing is shared between channels, so the memory's bandwidth is the bound and
the arithmetic has only to stay below it. Channels lie along lanes and time
along sublanes, as the arrays come. One row at a time would fill one of eight
sublanes; instead each group of eight steps is scanned in registers by
doubling (Hillis & Steele 1986): three shifts by 1, 2 and 4 rows, and one
product with the state before the group. The grid runs over rows, tiles of
channels and, in sequence, tiles of time; the state stays in scratch memory.

The backward pass reads a, b and ȳ and writes ā and b̄, once each. It scans a
tile forward again from the state that the forward pass kept at the tile's
start, and then the adjoint wₜ = aₜ (ȳₜ + wₜ₊₁), from the other end:
b̄ₜ = ȳₜ + wₜ₊₁ and āₜ = b̄ₜ hₜ₋₁. Keeping y instead would read as much, be
rounded where y is bfloat16, and be 0 at padding.

Padding and restarts come as one number for each step, see `_codes`. The tail
of the last time tile is padding too.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.costs import linear_scan_cost
from kernels_pallas.linear_scan_tpu_tiling import (
  GROUP,
  LANES,
  Tiling,
  default_tiling,
)

__all__ = ["Tiling", "backward", "default_tiling", "forward"]

_SUBLANES = 8


def forward(
  a, b, state, valid, restart, *, reverse, keep, tiling=None, interpret=False
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
    interpret: as in `pl.pallas_call`.

  Returns:
    y `[R, T, D]` in b's dtype, the final state `[R, D]` float32, and the
    states before each time tile `[R, tiles, 1, D]`, None unless `keep`.
  """
  tiles = _Tiles(tiling or default_tiling(*b.shape[1:]), *b.shape, reverse)
  codes = _codes(valid, restart, b, tiles, reverse)
  outputs = {"y": (b.shape, b.dtype, tiles.whole()), "final": tiles.state()}
  if keep:
    shape = (b.shape[0], tiles.count, 1, b.shape[2])
    outputs["starts"] = (shape, jnp.float32, tiles.starts())
  y, final, *states = _call(
    functools.partial(_forward_kernel, reverse=reverse),
    "linear_scan_forward",
    tiles, codes,
    [(a, tiles.decays(a)), (b, tiles.whole()),
     (state[:, None], tiles.state()[2])],
    outputs,
    [tiles.carry()],
    flops=2 * b.size, interpret=interpret,
  )  # fmt: skip
  return y, final[:, 0], states[0] if keep else None


def backward(
  a, b, states, valid, restart, dy, dfinal, *, reverse, tiling=None,
  interpret=False,
):  # fmt: skip
  """Pull cotangents back through `forward`.

  Args:
    a: as in `forward`, and so b, valid, restart, reverse, tiling, interpret.
    b: inputs.
    states: the third result of `forward`, made with the same tiling.
    valid: False at padding, or None.
    restart: True where the state is forgotten, or None.
    dy: cotangent of y, `[R, T, D]`.
    dfinal: cotangent of the final state, `[R, D]`.
    reverse: the direction of `forward`.
    tiling: that of `forward`.
    interpret: as in `pl.pallas_call`.

  Returns:
    The cotangents of a for each row, `[R, T, D]` in a's dtype or `[R, 1, D]`
    float32 where a is constant, of b in b's dtype, and of the initial state
    `[R, D]` float32.
  """
  tiles = _Tiles(tiling or default_tiling(*b.shape[1:]), *b.shape, not reverse)
  codes = _codes(valid, restart, b, tiles, reverse)
  constant = a.shape[1] == 1
  da = tiles.state() if constant else (b.shape, a.dtype, tiles.whole())
  scratch = [tiles.carry(), tiles.float32_tile()]
  da, db, dstate = _call(
    functools.partial(_backward_kernel, reverse=reverse),
    "linear_scan_backward",
    tiles, codes,
    [(a, tiles.decays(a)), (b, tiles.whole()), (states, tiles.starts()),
     (dy, tiles.whole()), (dfinal[:, None], tiles.state()[2])],
    {"a": da, "b": (b.shape, b.dtype, tiles.whole()), "state": tiles.state()},
    scratch + [tiles.carry()] * constant,
    flops=7 * b.size, interpret=interpret,
  )  # fmt: skip
  return da, db, dstate[:, 0]


@dataclasses.dataclass(frozen=True)
class _Tiles:
  """Block specs of a call; `flip` runs the time tiles from the last."""

  tiling: Tiling
  rows: int
  length: int
  channels: int
  flip: bool

  @property
  def count(self):
    return pl.cdiv(self.length, self.tiling.time)

  @property
  def grid(self):
    return (self.rows, pl.cdiv(self.channels, self.tiling.channels), self.count)

  def whole(self, each=1):
    """A tile of `[R, T, D]`, or of groups of `each` rows."""
    # Not //: its rounding towards minus infinity asks which chip this is.
    return pl.BlockSpec(
      (None, self.tiling.time, self.tiling.channels),
      lambda r, d, i: (lax.div(r, each), self._time(i), d),
    )

  def decays(self, a):
    each = self.rows // a.shape[0]
    if a.shape[1] > 1:
      return self.whole(each)
    block = (None, 1, self.tiling.channels)
    return pl.BlockSpec(block, lambda r, d, i: (lax.div(r, each), 0, d))

  def state(self):
    """Shape, dtype and block of one state for each row."""
    block = (None, 1, self.tiling.channels)
    spec = pl.BlockSpec(block, lambda r, d, i: (r, 0, d))
    return (self.rows, 1, self.channels), jnp.float32, spec

  def starts(self):
    """`[R, tiles, 1, D]`: the state before each time tile."""
    return pl.BlockSpec(
      (None, None, 1, self.tiling.channels),
      lambda r, d, i: (r, self._time(i), 0, d),
    )

  def codes(self):
    """`[R, 1, T]`, with T in whole tiles and whole registers."""
    block = (None, 1, _whole_lanes(self.tiling.time))
    return pl.BlockSpec(block, lambda r, d, i: (r, 0, self._time(i)))

  def carry(self):
    return pltpu.VMEM((_SUBLANES, self.tiling.channels), jnp.float32)

  def float32_tile(self):
    return pltpu.VMEM((self.tiling.time, self.tiling.channels), jnp.float32)

  def code_columns(self):
    return pltpu.VMEM((_whole_lanes(self.tiling.time), LANES), jnp.int32)

  def _time(self, i):
    return self.count - 1 - i if self.flip else i


def _whole_lanes(steps):
  return pl.cdiv(steps, LANES) * LANES


def _call(
  kernel, name, tiles, codes, inputs, outputs, scratch, *, flops, interpret
):
  """`pl.pallas_call` with and without codes, typed for `shard_map`."""
  masked = codes is not None
  if masked:
    inputs = [(codes, tiles.codes()), *inputs]
    scratch = [*scratch, tiles.code_columns()]
  arrays, in_specs = zip(*inputs, strict=True)
  varying = jax.typeof(arrays[-1]).manual_axis_type
  shapes = [
    jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)
    for shape, dtype, _ in outputs.values()
  ]
  return pl.pallas_call(
    functools.partial(kernel, masked=masked),
    grid=tiles.grid,
    in_specs=in_specs,
    out_specs=[spec for *_, spec in outputs.values()],
    out_shape=shapes,
    scratch_shapes=scratch,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary")
    ),
    cost_estimate=linear_scan_cost(
      *arrays,
      results=sum(x.size * x.dtype.itemsize for x in shapes),
      flops=flops,
    ),
    interpret=interpret,
    name=name,
  )(*arrays)


def _codes(valid, restart, b, tiles, reverse):
  """One int32 for each step `[R, 1, steps]`, or None if none is masked.

  Bit 0: the step is no padding. Bits 1-4: steps since the last restart in
  the scan's direction; bits 5-8: steps until the next one. Both are 0 at the
  restart itself and stop at 8, as no more than a group is looked at.
  """
  length = b.shape[1]
  steps = tiles.count * tiles.tiling.time
  if valid is None:
    if length == steps:
      return None
    # Made of b, to vary over the same axes of a mesh.
    restart = jnp.zeros_like(b[:, :, 0], bool)
    valid = ~restart
  # Steps past the end are padding.
  tail = ((0, 0), (0, _whole_lanes(steps) - length))
  valid, restart = jnp.pad(valid, tail), jnp.pad(restart, tail)
  time = jnp.arange(valid.shape[1], dtype=jnp.int32)[None]
  far = time.size + _SUBLANES
  last = lax.cummax(jnp.where(restart, time, -_SUBLANES), axis=1)
  following = lax.cummin(jnp.where(restart, time, far), axis=1, reverse=True)
  since, until = time - last, following - time
  if reverse:
    since, until = until, since
  since, until = jnp.minimum(since, 8), jnp.minimum(until, 8)
  return (valid.astype(jnp.int32) | since << 1 | until << 5)[:, None]


def _forward_kernel(*refs, masked, reverse):
  code_ref, refs, columns_ref = _split(refs, masked)
  a_ref, b_ref, state_ref, y_ref, final_ref, *starts_ref, carry_ref = refs

  @pl.when(pl.program_id(2) == 0)
  def _():
    carry_ref[...] = _spread(state_ref[...])

  if masked:
    _turn(code_ref, columns_ref)
  for ref in starts_ref:
    ref[...] = carry_ref[:1]
  scan = _Scan(a_ref, columns_ref, reverse)

  def group(at, carry):
    a, b, rows = _read(a_ref, at), _read(b_ref, at), []
    for part in _parts(reverse):
      mask = scan.mask(at, part)
      h, carry = scan(mask.decay(a[part]), mask.clear(b[part]), carry, mask)
      rows.append(mask.clear(h))
    _write(y_ref, at, rows, reverse)
    return carry

  carry_ref[...] = _groups(b_ref, group, carry_ref[...], reverse)
  final_ref[...] = carry_ref[:1]


def _backward_kernel(*refs, masked, reverse):
  code_ref, refs, columns_ref = _split(refs, masked)
  (a_ref, b_ref, start_ref, dy_ref, dfinal_ref, da_ref, db_ref, dstate_ref,
   carry_ref, before_ref, *sum_ref) = refs  # fmt: skip

  @pl.when(pl.program_id(2) == 0)
  def _():
    carry_ref[...] = _spread(dfinal_ref[...])
    for ref in sum_ref:
      ref[...] = jnp.zeros_like(ref)

  if masked:
    _turn(code_ref, columns_ref)
  scan = _Scan(a_ref, columns_ref, reverse)

  def states(at, carry):
    a, b, rows = _read(a_ref, at), _read(b_ref, at), []
    for part in _parts(reverse):
      mask = scan.mask(at, part)
      h, after = scan(mask.decay(a[part]), mask.clear(b[part]), carry, mask)
      rows.append(mask.forget(_delay(h, carry, mask)))
      carry = after
    _write(before_ref, at, rows, reverse)
    return carry

  _groups(b_ref, states, _spread(start_ref[...]), reverse)
  back = not reverse
  adjoint = _Scan(a_ref, columns_ref, back, adjoint=True)

  def cotangents(at, carry):
    a, dy, before = _read(a_ref, at), _read(dy_ref, at), _read(before_ref, at)
    da, db = [], []
    for part in _parts(back):
      mask = adjoint.mask(at, part)
      decay, dh = mask.decay(a[part]), mask.clear(dy[part])
      w, after = adjoint(decay, mask.forget(decay * dh), carry, mask)
      g = dh + _delay(w, carry, mask)
      carry = after
      db.append(mask.clear(g))
      da.append(mask.clear(g * before[part]))
    _write(db_ref, at, db, back)
    if sum_ref:
      sum_ref[0][...] += da[0] + da[1]
    else:
      _write(da_ref, at, da, back)
    return carry

  carry_ref[...] = _groups(b_ref, cotangents, carry_ref[...], back)
  dstate_ref[...] = carry_ref[:1]
  if sum_ref:
    da_ref[...] = jnp.sum(sum_ref[0][...], axis=0, keepdims=True)


def _split(refs, masked):
  """The codes are the first argument, their columns the last scratch."""
  return (refs[0], refs[1:-1], refs[-1]) if masked else (None, refs, None)


def _turn(code_ref, columns_ref):
  """Codes lie along lanes; here each gets a row of its own, on all lanes."""

  def piece(i, _):
    at = pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
    codes = jnp.broadcast_to(code_ref[:, at], (LANES, LANES))
    columns_ref[at, :] = codes.T

  lax.fori_loop(0, columns_ref.shape[0] // LANES, piece, None)


class _Scan:
  """h of eight steps from decays, inputs and the state before them."""

  def __init__(self, a_ref, columns_ref, reverse, adjoint=False):
    self.columns_ref = columns_ref
    self.channels = a_ref.shape[1]
    self.reverse = reverse
    self.adjoint = adjoint
    row = lax.broadcasted_iota(jnp.int32, (_SUBLANES, self.channels), 0)
    self.position = _SUBLANES - 1 - row if reverse else row
    # A constant decay's powers are formed once, outside of the loop.
    self.powers = None
    if a_ref.shape[0] == 1 and columns_ref is None:
      plain = _Mask(self.position, None, None, reverse)
      self.powers = _powers(_read(a_ref, 0)[:_SUBLANES], plain)

  def mask(self, at, part):
    if self.columns_ref is None:
      return _Mask(self.position, None, None, self.reverse)
    start = pl.multiple_of(at + part.start, _SUBLANES)
    code = self.columns_ref[pl.ds(start, _SUBLANES), :]
    code = jnp.concatenate([code] * (self.channels // LANES), axis=1)
    near = (code >> (5 if self.adjoint else 1)) & 15
    return _Mask(self.position, (code & 1) == 1, near, self.reverse)

  def __call__(self, a, b, carry, mask):
    """h `[8, D]`, and its last step on all sublanes."""
    powers = self.powers or _powers(a, mask)
    for distance, power in zip(_DISTANCES, powers[:-1], strict=True):
      earlier = power * mask.shift(b, distance)
      b = b + jnp.where(mask.reaches(distance), earlier, 0.0)
    h = b + mask.unless_cut(powers[-1] * carry)
    end = 0 if self.reverse else _SUBLANES - 1
    return h, _spread(h[end : end + 1])


_DISTANCES = (1, 2, 4)


def _powers(a, mask):
  """Products of the last 1, 2, 4 and 8 decays, within the group."""
  powers = [a]
  for distance in _DISTANCES:
    earlier = mask.shift(powers[-1], distance)
    inside = mask.position >= distance
    powers.append(powers[-1] * jnp.where(inside, earlier, 1.0))
  return powers


@dataclasses.dataclass(frozen=True)
class _Mask:
  """What eight steps may see, `[8, D]` each; None where nothing is masked."""

  position: jax.Array  # steps of the group before each
  valid: jax.Array | None
  near: jax.Array | None  # steps since the last restart
  reverse: bool

  def clear(self, x):
    """0 at padding."""
    return x if self.valid is None else jnp.where(self.valid, x, 0.0)

  def decay(self, a):
    """1 at padding."""
    return a if self.valid is None else jnp.where(self.valid, a, 1.0)

  def forget(self, x):
    """0 at restarts."""
    return x if self.near is None else jnp.where(self.near > 0, x, 0.0)

  def reaches(self, distance):
    """Whether the step so far before is in the group and the document."""
    inside = self.position >= distance
    return inside if self.near is None else inside & (self.near >= distance)

  def unless_cut(self, x):
    """0 where a restart lies between the group's start and the step."""
    if self.near is None:
      return x
    return jnp.where(self.near > self.position, x, 0.0)

  def shift(self, x, distance):
    """x of earlier steps; what comes round the end is not to be used."""
    amount = _SUBLANES - distance if self.reverse else distance
    return pltpu.roll(x, amount, 0)


def _delay(x, carry, mask):
  """x of the step before, the carry at the first."""
  return jnp.where(mask.position == 0, carry, mask.shift(x, 1))


def _groups(ref, body, carry, reverse):
  """carry = body(first step, carry) for each 16 steps of a tile."""
  groups = ref.shape[0] // GROUP

  def step(i, carry):
    i = groups - 1 - i if reverse else i
    return body(pl.multiple_of(i * GROUP, GROUP), carry)

  return lax.fori_loop(0, groups, step, carry)


def _parts(reverse):
  """The two halves of a group, each a register high, in the scan's order."""
  parts = (slice(0, _SUBLANES), slice(_SUBLANES, GROUP))
  return parts[::-1] if reverse else parts


def _read(ref, at):
  """16 steps in float32; one that is constant as often."""
  if ref.shape[0] == 1:
    row = ref[...].astype(jnp.float32)
    return jnp.broadcast_to(row, (GROUP, row.shape[1]))
  return ref[pl.ds(at, GROUP), :].astype(jnp.float32)


def _write(ref, at, rows, reverse):
  rows = jnp.concatenate(rows[::-1] if reverse else rows, axis=0)
  ref[pl.ds(at, GROUP), :] = rows.astype(ref.dtype)


def _spread(row):
  """A row `[1, D]` on all sublanes."""
  return jnp.broadcast_to(row, (_SUBLANES, row.shape[1]))
