"""How a selective scan is laid out on a GPU: tiles, lanes, packed arrays.

A block is one warpgroup of 128 threads. It owns one batch row and a tile of
channels and walks through time in chunks. The state of a channel is spread
over `lanes` neighbouring threads, so that each holds a few of its N elements
in registers; `copies` more tiles may share the block, which then reads B and
C once for all of them.

Sizes are known without Pallas, which is imported where a layout is asked for.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import selective_scan_gpu_chip as chip
from ssmjax.types import Array

__all__ = ["Plan", "Tiling", "decays", "plan", "vary_like"]

_THREADS = 128
_LOG2E = 1.4426950408889634
# Columns of the tokens after B and C.
_SCALARS = ("direct", "valid", "restart")


@dataclasses.dataclass(frozen=True)
class Tiling:
  """What a caller may choose of a selective scan on GPU.

  Attributes:
    lanes: threads that share a channel's state: 1, 2, 4, 8 or 16.
    states: state elements of a channel that one backward pass takes; what N
      has more is taken by further passes, whose cotangents are added in order.
    copies: tiles of 128 / lanes channels that one block carries.
    chunk: time steps brought to shared memory at once, a multiple of 8; the
      forward pass keeps the state at the start of each chunk.
    unroll: time steps in one trip of the innermost loop; divides `chunk`.
    stages: chunks in flight.
  """

  lanes: int = 2
  states: int = 128
  copies: int = 1
  chunk: int = 16
  unroll: int = 2
  stages: int = 2

  def __post_init__(self):
    if self.lanes not in (1, 2, 4, 8, 16):
      raise ValueError(
        f"Tiling: lanes is {self.lanes}, expected 1, 2, 4, 8 or 16."
      )
    for name in ("states", "copies", "chunk", "unroll", "stages"):
      if getattr(self, name) < 1:
        raise ValueError(
          f"Tiling: {name} is {getattr(self, name)}, expected 1 or more."
        )
    unit = max(8, 128 // self.width)
    if self.chunk % unit or self.chunk % self.unroll:
      raise ValueError(
        f"Tiling: chunk is {self.chunk}, expected a multiple of {unit} that"
        f" unroll={self.unroll} divides."
      )

  @property
  def width(self) -> int:
    """Channels of one block."""
    return self.copies * _THREADS // self.lanes


@dataclasses.dataclass(frozen=True)
class Plan:
  """One scan's sizes, after padding, and the layouts of its registers.

  Attributes:
    tiling: the caller's choice.
    rows, groups, length, channels: R, G, T and D as the caller has them.
    ones, learned: state channels without and with an exponential.
    flags: which of "direct", "valid" and "restart" there are.
    align: channels are padded to a multiple of this many: a copy into shared
      memory moves whole 16 bytes, before Hopper 32.
    align_time: the same of time steps; 1 from Hopper on.
  """

  tiling: Tiling
  rows: int
  groups: int
  length: int
  channels: int
  ones: int
  learned: int
  flags: tuple[str, ...]
  align: int
  align_time: int

  @property
  def time(self) -> int:
    """T, padded if it is shorter than one chunk, or to `align_time`."""
    time = max(self.length, self.tiling.chunk)
    return -(-time // self.align_time) * self.align_time

  @property
  def chunks(self) -> int:
    """Chunks of time, the last of which may overlap the one before."""
    return -(-self.time // self.tiling.chunk)

  @property
  def ragged(self) -> bool:
    """Whether the last chunk overlaps the one before."""
    return bool(self.time % self.tiling.chunk)

  @property
  def depth(self) -> int:
    """D, padded."""
    depth = max(self.channels, self.tiling.width)
    return -(-depth // self.align) * self.align

  @property
  def tiles(self) -> int:
    """Blocks to a row, the last of which may overlap the one before."""
    return -(-self.depth // self.tiling.width)

  @property
  def spans(self) -> dict[str, tuple[int, int, int]]:
    """Name -> columns, padded, and first and last + 1 of N, of a part.

    What decays and what does not is kept apart, what one backward pass takes
    from the next, and each split in at most two so that a part's columns are
    lanes · 2^k: the sizes that vector loads and swizzled shared memory are
    made for.
    """
    end, each = self.ones + self.learned, self.tiling.states
    spans: dict[str, tuple[int, int, int]] = {}
    for i, first in enumerate(range(0, end, each)):
      last = min(first + each, end)
      middle = min(max(first, self.ones), last)
      number = f" {i}" if i else ""
      spans |= self._halves(f"learned{number}", middle, last)
      spans |= self._halves(f"ones{number}", first, middle)
    return spans

  def _halves(self, name, start, stop):
    """The spans of a part, with the least padding that a power of two has."""
    if start == stop:
      return {}
    lanes = self.tiling.lanes
    # An array of one column has no layout that the compiler would find.
    least = -(-2 // lanes)
    each = max(least, -(-(stop - start) // lanes))
    size = 1 << (each.bit_length() - 1)
    rest = each - size
    if rest and 1 << (rest - 1).bit_length() == size:
      size, rest = 2 * size, 0
    middle = min(stop, start + size * lanes)
    spans = {name: (size * lanes, start, middle)}
    if rest:
      rest = lanes << (max(least, rest) - 1).bit_length()
      spans[f"{name} rest"] = (rest, middle, stop)
    return spans

  @property
  def passes(self) -> "list[tuple[slice, Plan]]":
    """The parts of N that the backward pass takes, each with its plan."""
    end, each = self.ones + self.learned, self.tiling.states
    found = []
    for first in range(0, end, each):
      last = min(first + each, end)
      ones = min(max(self.ones - first, 0), last - first)
      own = dataclasses.replace(self, ones=ones, learned=last - first - ones)
      found.append((slice(first, last), own))
    return found

  @property
  def parts(self) -> dict[str, int]:
    """Name -> columns of the parts of a state."""
    return {name: span[0] for name, span in self.spans.items()}

  @property
  def columns(self) -> dict[str, int]:
    """Name -> first column in the tokens; all start at whole 16 bytes."""
    at, columns = 0, {}
    for name, size in self.parts.items():
      for array in ("B", "C"):
        columns[f"{array} {name}"] = at
        at += -(-size // 4) * 4
    for name in _SCALARS:
      columns[name] = at
      at += 1
    # Not a multiple of 8: such an array is never swizzled, which a copy
    # before Hopper would not support and columns of 4 do not need.
    columns["end"] = at + 1 + (4 if (at + 1) % 8 == 0 else 0)
    return columns

  @property
  def pairs(self) -> int:
    """Columns of a step's products, for B and C, in whole threads per trip."""
    used = 2 * sum(self.parts.values())
    unit = max(1, _THREADS // self.tiling.unroll)
    return -(-used // unit) * unit

  def layout(self, part: str):
    """Registers of a part of the state, `[128 / lanes, columns]`."""
    return self.layout_of(self.parts[part])

  def layout_of(self, columns: int):
    """Registers of `[128 / lanes, columns]`, a multiple of lanes."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    lanes = self.tiling.lanes
    each = columns // lanes
    vector = next(v for v in (4, 2, 1) if each % v == 0)
    channels = _THREADS // lanes
    if lanes == 1:
      rows = plgpu.Tiling(((channels, vector), (channels // 4, vector)))
      return plgpu.Layout.TILED(rows, (-4,), (-2,), -1)
    whole = lanes * vector
    tiles = ((channels, whole), (channels // 4, whole), (vector,))
    return plgpu.Layout.TILED(plgpu.Tiling(tiles), (-5,), (-3, -2), -1)

  @property
  def row_layout(self):
    """Registers of one number per channel, `[128 / lanes]`."""
    return self.layout(next(iter(self.parts))).reduce(1)

  @property
  def block_layout(self):
    """Registers of `[4 n, width]`: a warp has whole rows of channels."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    width = self.tiling.width
    if width < 32:
      # Two or four rows to a warp.
      rows = 32 // width
      tiles = ((4 * rows, width), (rows, width), (1,))
      return plgpu.Layout.TILED(plgpu.Tiling(tiles), (-5,), (-3, -2), -1)
    vector = next(v for v in (4, 2, 1) if width % (32 * v) == 0)
    tiles = ((4, 32 * vector), (vector,))
    return plgpu.Layout.TILED(plgpu.Tiling(tiles), (-3,), (-2,), -1)

  @property
  def scalar_layout(self):
    """Registers of `[4 n, 4]`, the tokens' scalars beside a block's rows."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    rows = self.block_rows // 4
    every = plgpu.Replicated(32 // rows)
    if rows == 1:
      tiles = plgpu.Tiling(((4, 4),))
      return plgpu.Layout.TILED(tiles, (-2,), (every,), -1)
    tiles = plgpu.Tiling(((4 * rows, 4), (rows, 4)))
    return plgpu.Layout.TILED(tiles, (-4,), (-2, every), -1)

  @property
  def block_rows(self) -> int:
    """Rows of a block layout's smallest array."""
    return 4 * max(1, 32 // self.tiling.width)

  def pad(self, x: Array) -> Array:
    """Bring `[R, T, D]` to the padded T and D, where these differ."""
    more = (self.time - self.length, self.depth - self.channels)
    if more == (0, 0):
      return x
    return jnp.pad(x, ((0, 0), (0, more[0]), (0, more[1])))

  def pad_channels(self, x: Array) -> Array:
    """Bring `[G, D]` to the padded D, in float32."""
    x = x.astype(jnp.float32)
    return jnp.pad(x, ((0, 0), (0, self.depth - self.channels)))

  def tokens(self, rows) -> Array:
    """Pack what has no channel axis, padding blanked: `[R, T, columns]`.

    One array that is one copy per chunk, aligned whatever N is. B and C are
    small beside u, so that float32 here costs less than to widen them anew in
    every tile.
    """
    valid = rows["valid"]

    def clean(x):
      x = x.astype(jnp.float32)
      if valid is None:
        return x
      mask = valid if x.ndim == 2 else valid[..., None]
      return jnp.where(mask, x, jnp.zeros_like(x))

    pieces = []
    for size, start, stop in self.spans.values():
      for array in ("B", "C"):
        x = clean(rows[array][..., start:stop])
        more = -(-size // 4) * 4 - (stop - start)
        pieces.append(jnp.pad(x, ((0, 0), (0, 0), (0, more))))
    like = pieces[0][..., 0]
    scalars = dict(
      direct=None if rows["direct"] is None else clean(rows["direct"]),
      valid=None if valid is None else valid.astype(jnp.float32),
      restart=None
      if rows["restart"] is None
      else rows["restart"].astype(jnp.float32),
    )
    if valid is None and "valid" in self.flags:
      scalars["valid"] = jnp.ones_like(like)
    for name in _SCALARS:
      x = scalars[name]
      pieces.append((jnp.zeros_like(like) if x is None else x)[..., None])
    columns = self.columns
    more = columns["end"] - columns["restart"] - 1
    pieces.append(jnp.zeros((*like.shape, more), jnp.float32))
    tokens = jnp.concatenate(pieces, -1)
    return jnp.pad(tokens, ((0, 0), (0, self.time - self.length), (0, 0)))

  def rates(self, A: Array) -> dict[str, Array]:
    """A in powers of two, parts `[G, D, columns]`, of `[G, learned, D]`."""
    A = A.astype(jnp.float32) * _LOG2E
    return {
      name: self._columns(size, A[:, start - self.ones : stop - self.ones])
      for name, (size, start, stop) in self.spans.items()
      if decays(name)
    }

  def split_state(self, state: Array) -> dict[str, Array]:
    """The parts of `[R, N, D]`, each `[R, D, columns]`."""
    state = state.astype(jnp.float32)
    return {
      name: self._columns(size, state[:, start:stop])
      for name, (size, start, stop) in self.spans.items()
    }

  def join_state(self, parts: dict[str, Array]) -> Array:
    """`[R, N, D]` of parts `[R, D, columns]`, those that are given."""
    return jnp.concatenate(
      [
        jnp.swapaxes(parts[name][:, : self.channels, : stop - start], 1, 2)
        for name, (_, start, stop) in self.in_order
        if name in parts
      ],
      1,
    )

  @property
  def in_order(self) -> list[tuple[str, tuple[int, int, int]]]:
    """The spans as they follow each other in N."""
    return sorted(self.spans.items(), key=lambda item: item[1][1])

  def _columns(self, size, x):
    x = jnp.swapaxes(x, 1, 2)
    more = (self.depth - self.channels, size - x.shape[2])
    return jnp.pad(x, ((0, 0), (0, more[0]), (0, more[1])))


def decays(part: str) -> bool:
  """Whether a part of the state has an exponential."""
  return part.startswith("learned")


def plan(
  rows: dict[str, Array | None],
  shared: dict[str, Array | None],
  ones: int,
  tiling: Tiling,
) -> Plan:
  """Fit a tiling to the arrays of one scan."""
  u, A = rows["u"], shared["A"]
  assert u is not None
  assert A is not None
  count, length, channels = u.shape
  old = chip.before_hopper()
  if length < tiling.chunk and not old:
    unit = max(8, 128 // tiling.width)
    chunk = unit * max(1, length // unit)
    unroll = max(n for n in range(1, tiling.unroll + 1) if chunk % n == 0)
    tiling = dataclasses.replace(tiling, chunk=chunk, unroll=unroll)
  flags = [name for name in _SCALARS if rows[name] is not None]
  narrow = any(
    x is not None and x.dtype.itemsize < 4
    for x in (rows.get(name) for name in ("u", "delta", "z", "d_y"))
  )
  made = Plan(
    tiling=tiling,
    rows=count,
    groups=A.shape[0],
    length=length,
    channels=channels,
    ones=ones,
    learned=A.shape[1],
    flags=tuple(flags),
    align=(8 if narrow else 4) * (2 if old else 1),
    align_time=8 if old else 1,
  )
  if made.time > length and "valid" not in flags:
    return dataclasses.replace(made, flags=(*flags, "valid"))
  return made


def vary_like(like: Array, outputs: list[Array]) -> list[Array]:
  """Give a kernel's outputs the varying axes under shard_map of `like`.

  A Mosaic GPU kernel is traced without such types and its outputs have none.
  """
  axes = jax.typeof(like).manual_axis_type.varying

  def cast(x):
    missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
    return lax.pcast(x, missing, to="varying") if missing else x

  return [cast(x) for x in outputs]
