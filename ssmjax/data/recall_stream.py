"""Recall batches on the device: the training step makes its own data."""

import bisect
import dataclasses
import functools
import itertools
import operator
from collections.abc import Iterable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssmjax.data.recall import Integer, RecallBatch, as_uint32, recall_examples
from ssmjax.data.recall_mixes import RecallMix
from ssmjax.types import Size, check_fields


class RecallKind(NamedTuple):
  """Say which segment a step's batch is from and how many rows it has.

  With `RecallStream.one_shape` every step is of one kind, and segment is -1.
  """

  segment: int
  rows: int


@dataclasses.dataclass(frozen=True)
class RecallStream:
  """Make the batch of any training step inside that step.

  `kind(step)` is a host-side function: steps of equal kind have equal shapes
  and can share a compilation and a dispatch. `batch(kind, step, seed)` is
  traced. Both are pure functions of the step: resuming needs no state.

  Order "sequential" is the authors': in each epoch all segments one after the
  other, batch by batch, the last batch of each with the remaining rows (a kind
  of its own). Order "shuffled" visits batches of all segments in an order that
  is pseudo-random, anew in each epoch, and the same for every seed. All its
  batches are full: an epoch takes ⌊n/B⌋ batches of a segment with n examples,
  and the next epoch goes on where it stopped, around the segment's end to its
  start, so that in the long run every example is seen equally often.

  Args:
    mix: the segments.
    batch_size: B, rows of the global batch.
    order: "shuffled" or "sequential".
    fresh: draw examples that were never seen in each epoch, instead of the
      same finite set.
    run_length: shuffle runs of this many batches of one kind instead of
      single batches, for a trainer that dispatches several steps at once. The
      batches of a segment that fill no run end the epoch, segment by segment.
    one_shape: give the batches of all segments one shape, so that a trainer
      compiles one program in place of one for each segment. Batches have as
      many queries as the segment with the most: `weights [B, Q]` are 1 for a
      query and 0 for what fills up, which stands at position 0. Shuffled
      order only, and segments of one length.

  Raises:
    ValueError: if an argument is out of range, a segment is smaller than a
      shuffled batch, run_length is given for the sequential order, or
      one_shape for segments of several lengths.

  >>> from ssmjax.data import AUTHORS_MIX
  >>> RecallStream(AUTHORS_MIX, 128, order="sequential").steps_per_epoch
  2352
  """

  mix: RecallMix
  batch_size: Size
  order: Literal["shuffled", "sequential"] = "shuffled"
  fresh: bool = False
  run_length: Size = 1
  one_shape: bool = False

  def __post_init__(self):
    check_fields(self)
    if self.one_shape:
      lengths = sorted({config.length for config, _ in self.mix.segments})
      if self.order == "sequential" or len(lengths) > 1:
        raise ValueError(
          f"RecallStream: one_shape=True with order={self.order!r} and lengths"
          f" {lengths}, expected the shuffled order and segments of one length."
          " Leave it out."
        )
    if self.order == "sequential":
      if self.run_length != 1:
        raise ValueError(
          f"RecallStream: run_length={self.run_length} with the sequential "
          "order, whose runs are whole segments. Leave it out."
        )
      return
    for number, (_, size) in enumerate(self.mix.segments):
      if size < self.batch_size:
        raise ValueError(
          f"RecallStream: segment {number} has {size} examples, expected at "
          f"least batch_size={self.batch_size}: shuffled batches are full. "
          "Use a smaller batch or the sequential order."
        )

  @functools.cached_property
  def steps_per_epoch(self) -> int:
    """Batches in an epoch."""
    return sum(self._batches)

  def kind(self, step: int) -> RecallKind:
    """Say, on the host, which kind of batch `step` (from 0) has."""
    step = operator.index(step)
    if step < 0:
      raise ValueError(f"RecallStream.kind: step={step}, expected 0 or more.")
    epoch, place = divmod(step, self.steps_per_epoch)
    if self.order == "sequential":
      segment = _segment(self._first_steps, place)
      done = (place - self._first_steps[segment]) * self.batch_size
      left = self.mix.segments[segment][1] - done
      return RecallKind(segment, min(self.batch_size, left))
    if place < self._shuffled_steps:
      run = int(_epoch_order(epoch, sum(self._runs))[place // self.run_length])
      segment = _segment(self._first_runs, run)
    else:
      segment = _segment(self._first_left, place - self._shuffled_steps)
    return RecallKind(_ANY if self.one_shape else segment, self.batch_size)

  def batch(
    self, kind: RecallKind, step: Integer, seed: Integer
  ) -> RecallBatch:
    """Make the whole batch of `step`, on the device; `kind` is static.

    Args:
      kind: `self.kind(step)`.
      step: integer in [0, 2³²), may be traced.
      seed: names the set of examples, likewise.

    Returns:
      A dict of int32 arrays as from `recall_batch`.

    Raises:
      ValueError: if `kind` is not that of a concrete step.
    """
    if isinstance(step, int | np.integer) and kind != self.kind(int(step)):
      raise ValueError(
        f"RecallStream.batch: kind={kind} for step {step}, expected "
        f"{self.kind(int(step))}."
      )
    if not self.one_shape:
      config, _ = self.mix.segments[kind[0]]
      return recall_examples(config, seed, self.indices(kind, step))
    queries = max(config.queries for config, _ in self.mix.segments)
    step = jnp.asarray(as_uint32("RecallStream.batch", "step", step))

    def make(segment):
      config, _ = self.mix.segments[segment]
      indices = self.indices(RecallKind(segment, kind[1]), step)
      return _padded(recall_examples(config, seed, indices), queries)

    branches = [
      functools.partial(make, i) for i in range(len(self.mix.segments))
    ]
    return jax.lax.switch(self._segment_of(step), branches)

  def indices(self, kind: RecallKind, step: Integer) -> jax.Array:
    """Number the examples [B], uint32, that are the batch of `step`."""
    segment, rows = kind
    step = jnp.asarray(as_uint32("RecallStream.indices", "step", step))
    epoch, place = jnp.divmod(step, np.uint32(self.steps_per_epoch))
    number = self._number(segment, epoch, place)
    at = number * np.uint32(self.batch_size) + jnp.arange(rows, dtype=np.uint32)
    if self.fresh:
      at = at + epoch * np.uint32(self.mix.num_examples)
    elif self.order == "shuffled":
      rows_per_epoch = np.uint32(self._batches[segment] * self.batch_size)
      size = np.uint32(self.mix.segments[segment][1])
      at = (at + epoch * rows_per_epoch) % size
    return at + np.uint32(self.mix.offsets[segment])

  def _segment_of(self, step: jax.Array) -> jax.Array:
    """Find, on the device, the segment of a step of the shuffled order."""
    epoch, place = jnp.divmod(step, np.uint32(self.steps_per_epoch))
    after = lambda starts, at: (
      sum((at >= np.uint32(first)).astype(jnp.int32) for first in starts[1:])
      + jnp.int32(0)
    )
    shuffled = np.uint32(self._shuffled_steps)
    left = after(self._first_left, place - shuffled)
    runs = sum(self._runs)
    if not runs:
      return left
    run = _shuffle(place // np.uint32(self.run_length), epoch, runs, jnp)
    return jnp.where(place < shuffled, after(self._first_runs, run), left)

  def _number(
    self, segment: int, epoch: jax.Array, place: jax.Array
  ) -> jax.Array:
    """Count the segment's batches of this epoch that come before."""
    if self.order == "sequential":
      return place - np.uint32(self._first_steps[segment])
    length = np.uint32(self.run_length)
    runs = sum(self._runs)
    left = place - np.uint32(self._shuffled_steps + self._first_left[segment])
    left = left + np.uint32(self._runs[segment]) * length
    if not runs:
      return left
    run = _shuffle(place // length, epoch, runs, jnp)
    run = run - np.uint32(self._first_runs[segment])
    number = run * length + place % length
    return jnp.where(place < np.uint32(self._shuffled_steps), number, left)

  @functools.cached_property
  def _batches(self) -> tuple[int, ...]:
    """Batches of each segment in an epoch."""
    sizes = [size for _, size in self.mix.segments]
    if self.order == "sequential":
      return tuple(-(-size // self.batch_size) for size in sizes)
    return tuple(size // self.batch_size for size in sizes)

  @functools.cached_property
  def _first_steps(self) -> tuple[int, ...]:
    return _starts(self._batches)

  @functools.cached_property
  def _runs(self) -> tuple[int, ...]:
    """Full runs of each segment in an epoch."""
    return tuple(batches // self.run_length for batches in self._batches)

  @functools.cached_property
  def _first_runs(self) -> tuple[int, ...]:
    return _starts(self._runs)

  @functools.cached_property
  def _shuffled_steps(self) -> int:
    return sum(self._runs) * self.run_length

  @functools.cached_property
  def _first_left(self) -> tuple[int, ...]:
    """Where each segment's batches outside runs start, after the runs."""
    return _starts(batches % self.run_length for batches in self._batches)


# The segment of a kind that stands for all.
_ANY = -1


def _padded(batch: RecallBatch, queries: int) -> RecallBatch:
  """A batch of as many queries, the further ones of weight 0."""
  rows, own = batch["positions"].shape
  more = lambda x: jnp.pad(x, ((0, 0), (0, queries - own)))
  padded = {name: more(batch[name]) for name in _BY_QUERY}
  weights = more(jnp.ones((rows, own), jnp.float32))
  return {**batch, **padded, "weights": weights}


_BY_QUERY = ("positions", "targets", "distances")


def _shuffle(index, epoch, size: int, xp):
  """Permute 0 … size − 1 as the epoch does; `index` is uint32.

  The swap-or-not shuffle (Hoang, Morris, Rogaway 2012): each round pairs x
  with k − x and swaps the pair on a bit that both share. Constant work for one
  index, so that a traced step finds its batch without a table; the same code
  with numpy gives the host the whole order.
  """
  modulus = np.uint32(size)
  rounds = np.arange(_ROUNDS, dtype=np.uint32)
  words = _mix_bits(_mix_bits(epoch) + rounds)
  offsets = words % modulus
  for i in range(_ROUNDS):
    partner = (offsets[i] + (modulus - index)) % modulus
    swap = _mix_bits(xp.maximum(index, partner) ^ words[i]) & np.uint32(1)
    index = xp.where(swap == np.uint32(1), partner, index)
  return index


# With 12 rounds neighbours are visibly correlated, with 16 no longer.
_ROUNDS = 20


def _mix_bits(x):
  """MurmurHash3's finalizer on uint32, of numpy or jax."""
  x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EB_CA6B)
  x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2_AE35)
  return x ^ (x >> np.uint32(16))


@functools.lru_cache(maxsize=8)
def _epoch_order(epoch: int, size: int) -> np.ndarray:
  """List the run at each place of the epoch."""
  index = np.arange(size, dtype=np.uint32)
  return _shuffle(index, np.array([epoch % 2**32], np.uint32), size, np)


def _segment(starts: tuple[int, ...], place: int) -> int:
  """Find the last segment that starts at or before `place`."""
  return bisect.bisect_right(starts, place) - 1


def _starts(sizes: Iterable[int]) -> tuple[int, ...]:
  return tuple(itertools.accumulate(sizes, initial=0))[:-1]
