"""Multi-query associative recall (MQAR), made where it is used.

An example shows K pairs k₁ v₁ k₂ v₂ … and then asks for each value once, by
repeating its key somewhere in the rest of the sequence. One generator, in jax,
serves every door: inside a train step it makes a whole batch on the device
(`RecallStream`), elsewhere it stands behind a grain source (`RecallSource`,
`recall_dataset`). An example is a pure function of (config, seed, index), so
that any of them can be made alone, in any order, on any host.

The examples of a `RecallMix` are numbered through its segments, from 0; seeds
and indices are unsigned 32-bit integers. Train and test sets take different
seeds.

Sources: Arora et al. 2023 (Zoology), arXiv 2312.04927, for the task; Wang et
al. 2025, ICLR, arXiv 2501.00658, for the mixes.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from ssmjax.types import Count, Size, check_fields, gathered

# What a position without a query has as its label.
IGNORE = -100

type RecallBatch = dict[str, jax.Array]
type Integer = int | np.integer | jax.Array


@dataclasses.dataclass(frozen=True)
class RecallConfig:
  """Say what one example looks like.

  T tokens hold K pairs, 2K tokens of context, and S = (T − 2K) / 2 slots. Slot
  s is the position 2K + 2s; the query of the j-th pair (from 0) in slot s is
  2(K + s − j) tokens after its key. Slots are drawn without replacement from

      pₛ ∝ (s + 1)^(power − 1),

  and the j-th slot that is drawn goes to the j-th pair, so that early keys
  tend to be asked early. Token 0 is the filler, 1 … ⌊V/2⌋ − 1 are keys and
  ⌊V/2⌋ … V − 1 values, all distinct within an example.

  *Recall against distance*: `query_keys=(lo, hi)` lets only the pairs lo … hi−1
  be asked, `query_slots=(lo, hi)` only in the slots lo … hi−1, `num_queries`
  of them. The power law starts anew at the first slot of the range. Where
  fewer queries than pairs of the range are asked for, the asked ones are drawn
  uniformly; the j-th slot drawn goes to the j-th of them in the context's
  order. `query_keys=(j, j + 1), query_slots=(s, s + 1)` asks at one distance.

  Args:
    length: T, even, at least 4K.
    num_pairs: K, at least 1 and at most ⌊V/2⌋ − 1.
    vocab_size: V.
    power: exponent of the slots' law; 1 is uniform.
    random_fillers: fill the positions without a query with tokens drawn
      uniformly from the values' half instead of 0. None is then a key, of
      this example or any other, so that after the context every token of the
      keys' half is a query (published generators draw from the whole
      vocabulary, where a filler can be a key and goes unlabelled).
    query_keys: range of the pairs that may be asked, all K by default.
    query_slots: range of the slots that may be used, all S by default.
    num_queries: Q, as many as `query_keys` has pairs by default.

  Raises:
    ValueError: for sizes that do not fit, with the numbers.

  >>> RecallConfig(length=64, num_pairs=4).num_slots
  28
  """

  length: Size
  num_pairs: Size
  vocab_size: Size = 8192
  power: float = 0.01
  random_fillers: bool = False
  query_keys: tuple[Count, Count] | None = None
  query_slots: tuple[Count, Count] | None = None
  num_queries: Size | None = None

  def __post_init__(self):
    check_fields(self)
    length, pairs = self.length, self.num_pairs
    if length % 2:
      raise ValueError(
        f"RecallConfig: length={length} is odd, expected an even number: "
        f"pairs and slots are two tokens wide. Use {length + 1}."
      )
    if 4 * pairs > length:
      raise ValueError(
        f"RecallConfig: num_pairs={pairs} needs length >= 4 * num_pairs = "
        f"{4 * pairs} (context and one slot for each query), found "
        f"length={length}. Use num_pairs <= {length // 4} or a longer length."
      )
    most = max(self.vocab_size // 2 - 1, 0)
    if pairs > most:
      raise ValueError(
        f"RecallConfig: vocab_size={self.vocab_size} has {most} keys, expected "
        f"at least num_pairs={pairs}. Use vocab_size >= {2 * pairs + 2}."
      )
    for name, size in (("query_keys", pairs), ("query_slots", self.num_slots)):
      given = getattr(self, name)
      if given is not None and not 0 <= given[0] < given[1] <= size:
        raise ValueError(
          f"RecallConfig: {name}={given!r}, expected None or ints (lo, hi) "
          f"with 0 <= lo < hi <= {size}."
        )
    for name, (_, size) in (
      ("query_keys", self._key_range),
      ("query_slots", self._slot_range),
    ):
      if self.queries > size:
        raise ValueError(
          f"RecallConfig: {self.queries} queries, expected at most {size}, the "
          f"size of {name}={getattr(self, name)}. Widen {name} or lower "
          f"num_queries={self.num_queries}."
        )

  @property
  def num_slots(self) -> int:
    """S = (T − 2K) / 2, the places where a query may stand."""
    return (self.length - 2 * self.num_pairs) // 2

  @property
  def queries(self) -> int:
    """Q, the number of labelled positions of an example."""
    if self.num_queries is None:
      return self._key_range[1]
    return self.num_queries

  @property
  def _key_range(self) -> tuple[int, int]:
    """First pair that may be asked, and how many may."""
    low, high = self.query_keys or (0, self.num_pairs)
    return low, high - low

  @property
  def _slot_range(self) -> tuple[int, int]:
    """First slot that may be used, and how many may."""
    low, high = self.query_slots or (0, self.num_slots)
    return low, high - low


def recall_example(
  config: RecallConfig, seed: Integer, index: Integer
) -> RecallBatch:
  """Make example `index` of the set that `seed` names.

  The slots are drawn by Gumbel-top-k: the Q largest log pₛ + Gₛ, in descending
  order, with independent standard Gumbel Gₛ, are a draw without replacement
  with its order. Keys, values and fillers are the same on every platform;
  slots on every platform that rounds log alike.

  Args:
    config: the example's sizes; static.
    seed: integer in [0, 2³²); may be traced (int32 or uint32).
    index: likewise; any example is made alone.

  Returns:
    A dict of int32 arrays: `tokens` [T]; `labels` [T], the query's value at
    the query's own position and `IGNORE` elsewhere; `positions` [Q], the
    labelled positions, ascending; `targets` [Q], the label at each;
    `distances` [Q], tokens from the key in the context to its query.

  Raises:
    ValueError: if a concrete seed or index is outside [0, 2³²).
    TypeError: if one is no integer.

  >>> example = recall_example(RecallConfig(length=16, num_pairs=2), 0, 7)
  >>> int(example["labels"][example["positions"][0]] - example["targets"][0])
  0
  """
  seed = as_uint32("recall_example", "seed", seed)
  return _example(config, seed, as_uint32("recall_example", "index", index))


def recall_batch(
  config: RecallConfig, seed: Integer, start: Integer, batch_size: int
) -> RecallBatch:
  """Make the examples start … start + batch_size − 1 at once.

  Args:
    config: the examples' sizes; static.
    seed: integer in [0, 2³²); may be traced (int32 or uint32).
    start: likewise, index of the first example.
    batch_size: number of examples; static.

  Returns:
    What `recall_example` returns, each array with a leading axis [B]; every
    example is bit for bit the one made alone.

  Raises:
    ValueError: if batch_size is not positive, or as `recall_example` does.

  >>> recall_batch(RecallConfig(16, 2), 0, 100, 8)["tokens"].shape
  (8, 16)
  """
  check_positive("recall_batch", batch_size=batch_size)
  start = as_uint32("recall_batch", "start", start)
  indices = start + jnp.arange(batch_size, dtype=np.uint32)
  return recall_examples(config, seed, indices)


@gathered
def recall_examples(
  config: RecallConfig, seed: Integer, indices: jax.Array | np.ndarray
) -> RecallBatch:
  """Make the examples at `indices` [B], integers, in any order."""
  seed = as_uint32("recall_examples", "seed", seed)
  return _examples(
    config, seed, as_uint32("recall_examples", "indices", indices)
  )


def as_uint32(where: str, name: str, value):
  """Cast to uint32; refuse concrete integers outside [0, 2³²)."""
  if isinstance(value, int | np.integer):
    if not 0 <= value < 2**32:
      raise ValueError(f"{where}: {name}={value}, expected 0 to {2**32 - 1}.")
    return np.uint32(value)
  if not jnp.issubdtype(getattr(value, "dtype", float), jnp.integer):
    raise TypeError(
      f"{where}: {name} is {value!r}, expected an integer (a seed, not a key)."
    )
  return value.astype(jnp.uint32)


def check_positive(where: str, **values: int) -> None:
  """Refuse values that are not positive integers."""
  for name, value in values.items():
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
      raise ValueError(f"{where}: {name}={value!r}, expected an int >= 1.")


@functools.partial(jax.jit, static_argnums=0)
def _example(config: RecallConfig, seed, index) -> RecallBatch:
  pairs, half = config.num_pairs, config.vocab_size // 2
  # A named generator: `jax_default_prng_impl` must not change the data. Its
  # key is two words, which seed and index are; "mqar" keeps away from keys
  # that a training makes of small numbers.
  name = jnp.stack([seed ^ np.uint32(0x6D71_6172), index])
  key = jax.random.wrap_key_data(name, impl="threefry2x32")
  rest = config.length - 2 * pairs
  sizes = {
    "keys": half - 1,
    "values": config.vocab_size - half,
    "asked": config._key_range[1],
    "slots": config._slot_range[1],
    "fillers": rest if config.random_fillers else 0,
  }
  # One call for all random words: every call adds to the compile time.
  *ends, total = itertools.accumulate(sizes.values())
  parts = jnp.split(jax.random.bits(key, (total,), np.uint32), ends)
  words = dict(zip(sizes, parts, strict=True))

  keys = 1 + _draw_distinct(words["keys"], pairs)
  values = half + _draw_distinct(words["values"], pairs)
  asked = _draw_asked(words["asked"], config)
  slots = _draw_slots(words["slots"], config)
  slots, asked = jax.lax.sort((slots, asked), num_keys=1)

  fillers = jnp.zeros(rest, jnp.int32)
  if config.random_fillers:
    fillers = words["fillers"] % np.uint32(config.vocab_size - half)
    fillers = half + fillers.astype(jnp.int32)
  context = jnp.stack([keys, values], axis=1).reshape(2 * pairs)
  tokens = jnp.concatenate([context, fillers])
  labels = jnp.full(config.length, IGNORE, jnp.int32)
  positions = 2 * pairs + 2 * slots
  targets = values[asked]
  return {
    "tokens": _write(tokens, positions, keys[asked]),
    "labels": _write(labels, positions, targets),
    "positions": positions,
    "targets": targets,
    "distances": positions - 2 * asked,
  }


@functools.partial(jax.jit, static_argnums=0)
def _examples(config: RecallConfig, seed, indices) -> RecallBatch:
  return jax.vmap(lambda index: _example(config, seed, index))(indices)


def _write(sequence, positions, values):
  return sequence.at[positions].set(
    values, indices_are_sorted=True, unique_indices=True
  )


def _draw_distinct(words, count: int) -> jax.Array:
  """Draw `count` of 0 … n − 1 without replacement, in random order."""
  # The order of n random words. They are compared as floats, which top_k
  # selects from several times faster than from integers on CPU: 2³¹ different
  # normal numbers, none rounded, in the same order on every platform.
  words = (words & np.uint32(0xBFFF_FFFF)) + np.uint32(0x1000_0000)
  floats = jax.lax.bitcast_convert_type(words, jnp.float32)
  return jax.lax.top_k(floats, count)[1]


def _draw_slots(words, config: RecallConfig) -> jax.Array:
  """Draw the queries' slots [Q]; the order is that of the draws."""
  first, size = config._slot_range
  log_p = (config.power - 1) * np.log(np.arange(1, size + 1))
  # Near 0, where -log1p(-u) is small and a slot wins, u has all of its bits.
  uniform = words.astype(jnp.float32) * np.float32(2**-32) + np.float32(2**-33)
  gumbel = -jnp.log(-jnp.log1p(-uniform))
  _, slots = jax.lax.top_k(log_p.astype(np.float32) + gumbel, config.queries)
  return first + slots


def _draw_asked(words, config: RecallConfig) -> jax.Array:
  """Draw the pairs that are asked [Q], in the order of the context."""
  first, size = config._key_range
  if config.queries == size:
    return jnp.arange(first, first + size, dtype=jnp.int32)
  return first + jnp.sort(_draw_distinct(words, config.queries))
