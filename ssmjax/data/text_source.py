"""Rows of text for a language model: packed, shuffled, random access, grain."""

import dataclasses
import functools
import hashlib
import operator
import sys
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ssmjax.data.recall import check_positive
from ssmjax.data.text_tokens import TextCorpus
from ssmjax.types import Array, Count, Float, Int, Seed, Size, check_fields

if TYPE_CHECKING:
  import grain


@dataclasses.dataclass(frozen=True, eq=False)
class TextSource:
  """Pack a corpus into batches of rows; any batch can be made alone.

  Every document d₁ … dₙ stands between boundaries ∂ and gives n + 1 pairs,

      inputs ∂ d₁ … dₙ,   targets d₁ … dₙ ∂,

  so that every token is a target exactly once and no target is of another
  document than its input. The pairs of all documents, one after the other,
  are cut every T: no pair is lost and only the last row has padding. A
  document that is cut goes on in another row, without its beginning.

  With `shuffle_seed`, documents are packed in another order in each epoch, and
  the rows then shuffled, so that a batch does not consist of one long document.
  Both orders are the same on every platform.

  A batch is a dict of arrays, as ops and `labelled_loss` want them:
  `tokens [B, T]` int32; `segment_ids [B, T]` int32, the row's documents counted
  from 1, 0 for padding; `positions [B, T]` int32, 0 … T − 1; `targets [B, T]`
  int32; `weights [B, T]` float32, 1, and 0 for padding; `bytes [B, T]` int32,
  what each target stands for: 1 for a byte, 0 for ∂, but for what a tokenizer
  strips off a document's end (see `bits_per_byte`).

  Where several processes train, each makes its own rows: the batches of all,
  one below the other, are the batch that a single one would make. The state
  of a training is the number of its steps, whatever their number.

  Args:
    corpus: the documents' tokens.
    length: T.
    batch_size: B, rows of the global batch.
    shuffle_seed: integer in [0, 2³²); None keeps documents and rows in order.
    drop_remainder: leave out the rows of an epoch that fill no batch; else
      the last batch is filled up with rows of padding, and an epoch has every
      byte of text exactly once.
    processes: (index of this one, their number), both those of jax by default,
      which is asked when the first batch is made.

  Raises:
    ValueError: if an argument is out of range, or the corpus fills no batch.

  >>> from ssmjax.data import encode_documents
  >>> source = TextSource(encode_documents([b"ab", b"c"]), 6, 1)
  >>> source[0]["tokens"], source[0]["segment_ids"]
  (array([[256,  97,  98, 256,  99,   0]], dtype=int32), \
array([[1, 1, 1, 2, 2, 0]], dtype=int32))
  """

  corpus: TextCorpus
  length: Size
  batch_size: Size
  shuffle_seed: Seed | None = None
  drop_remainder: bool = False
  processes: tuple[Count, Size] | None = None

  def __post_init__(self):
    check_fields(self)
    if not len(self):
      raise ValueError(
        f"TextSource: the corpus fills {self._rows} rows of length="
        f"{self.length}, expected at least batch_size={self.batch_size}. Take "
        "smaller ones, more text, or drop_remainder=False."
      )
    if self.processes is not None:
      self._share(*self.processes)

  def __len__(self) -> int:
    """Batches in an epoch."""
    if self.drop_remainder:
      return self._rows // self.batch_size
    return -(-self._rows // self.batch_size)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Make a batch of the first epoch."""
    index = operator.index(index)
    if not -len(self) <= index < len(self):
      raise IndexError(
        f"TextSource: index {index}, expected less than {len(self)}."
      )
    return self.batch(index % len(self))

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """Make this process's part of the batch of any step, from 0."""
    step = operator.index(step)
    if step < 0:
      raise ValueError(f"TextSource.batch: step={step}, expected 0 or more.")
    if self.processes is None:
      first, size = self._share(jax.process_index(), jax.process_count())
    else:
      first, size = self._share(*self.processes)
    epoch, place = divmod(step, len(self))
    places = place * self.batch_size + first + np.arange(size)
    rows = np.full(size, -1)
    there = places < self._rows
    rows[there] = self._order("rows", epoch, self._rows)[places[there]]
    return self._pack(epoch, rows)

  def identity(self) -> dict[str, Any]:
    """Say in JSON all that the batches depend on, for a run's settings."""
    return {
      "corpus": self.corpus.fingerprint,
      "length": self.length,
      "batch_size": self.batch_size,
      "shuffle_seed": self._seed,
      "drop_remainder": self.drop_remainder,
    }

  @property
  def _seed(self) -> int | None:
    return None if self.shuffle_seed is None else int(self.shuffle_seed)

  @functools.cached_property
  def _pairs(self) -> int:
    """Pairs of an input and a target in an epoch."""
    return int(self.corpus.lengths.sum()) + len(self.corpus.lengths)

  @property
  def _rows(self) -> int:
    """Rows in an epoch."""
    return -(-self._pairs // self.length)

  @functools.cached_property
  def _begins(self) -> np.ndarray:
    """Where each document's tokens begin."""
    return np.cumsum(self.corpus.lengths) - self.corpus.lengths

  def _share(self, index: int, count: int) -> tuple[int, int]:
    """First row of the batch that is this process's, and how many are."""
    if not 0 <= index < count:
      raise ValueError(
        f"TextSource: processes={(index, count)}, expected an index from 0 to "
        "the number of processes - 1, and that number."
      )
    if self.batch_size % count:
      raise ValueError(
        f"TextSource: batch_size={self.batch_size} does not divide among "
        f"{count} processes. Take a multiple of {count}."
      )
    size = self.batch_size // count
    return index * size, size

  def _order(self, what: str, epoch: int, size: int) -> np.ndarray:
    if self._seed is None:
      return np.arange(size)
    return _permutation(self._seed, what, epoch, size)

  def _pack(self, epoch: int, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Make the rows of these numbers; -1 is a row of padding."""
    corpus = self.corpus
    order = self._order("documents", epoch, len(corpus.lengths))
    lengths = corpus.lengths[order]
    starts = np.cumsum(lengths + 1) - (lengths + 1)
    time = np.arange(self.length)
    pair = rows[:, None] * self.length + time
    valid = (rows >= 0)[:, None] & (pair < self._pairs)
    pair = np.where(valid, pair, 0)
    number = np.searchsorted(starts, pair.ravel(), side="right") - 1
    number = number.reshape(pair.shape)
    offset = pair - starts[number]
    document = order[number]
    at = self._begins[document] + offset
    last = offset == lengths[number]
    token = lambda i: corpus.tokens.take(i, mode="clip").astype(np.int32)
    inputs = np.where(offset == 0, np.int32(corpus.boundary), token(at - 1))
    targets = np.where(last, np.int32(corpus.boundary), token(at))
    sizes: Any = 1
    if corpus.token_bytes is not None:
      sizes = corpus.token_bytes.take(at, mode="clip")
    sizes = np.where(last, corpus.tails[document], sizes)
    mask = lambda x: np.where(valid, x, 0).astype(np.int32)
    return {
      "tokens": mask(inputs),
      "segment_ids": mask(1 + number - number[:, :1]),
      "positions": np.broadcast_to(time.astype(np.int32), pair.shape).copy(),
      "targets": mask(targets),
      "weights": valid.astype(np.float32),
      "bytes": mask(sizes),
    }


def text_dataset(
  source: TextSource, *, epochs: int | None = None, prefetch: int = 8
) -> "grain.IterDataset":
  """Show a source as a grain dataset whose iterator's state is a checkpoint.

  `iter(...)` gives what `fit` takes as data. Its state is the number of
  batches given so far; restored in any process, it goes on with the very
  batches that would have come. Pass `source.identity()` among the run's
  settings, so that a run does not go on with another text. Worker processes
  (`.mp_prefetch`) give the same batches; jax in them knows of no others, so a
  training of several processes then has to say its `processes`.

  Args:
    source: the batches.
    epochs: how often all of it; None for ever.
    prefetch: batches that a thread makes ahead; 0 for none.

  Raises:
    ImportError: if grain is not installed.
    ValueError: if an argument is out of range.
  """
  try:
    import grain
  except ImportError as error:
    raise ImportError(
      "text_dataset: grain is not installed. `pip install grain`, or use "
      "TextSource.batch, which does without it."
    ) from error
  if epochs is not None:
    check_positive("text_dataset", epochs=epochs)
  if not isinstance(prefetch, int) or prefetch < 0:
    raise ValueError(
      f"text_dataset: prefetch={prefetch!r}, expected a number of batches, 0 "
      "or more."
    )
  steps = sys.maxsize if epochs is None else epochs * len(source)
  # Grain's own default makes 500 batches ahead.
  options = grain.ReadOptions(
    num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch
  )
  dataset = grain.MapDataset.range(steps).map(source.batch)
  return dataset.to_iter_dataset(options)


def bits_per_byte(
  loss: Float[Array, ""], batch_bytes: Int[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Turn a loss into a metric as training takes it, (sum, its own weight).

      bits per byte = (Σ −ln p(target) / ln 2) / Σ bytes

  The ends of documents are part of the sum: it is the length of a code from
  which the documents can be had again, per byte of text, and so does not
  depend on the tokenizer.

  Args:
    loss: the summed cross-entropy in nats of all targets of a batch.
    batch_bytes: the batch's `bytes`, those of the same targets.

  Returns:
    Bits and bytes, both scalars; sums of either over batches, devices and
    processes may be divided.

  >>> bits, size = bits_per_byte(jnp.log(256.0) * 3, jnp.array([[1, 1, 1]]))
  >>> round(float(bits / size), 4)
  8.0
  """
  bits = loss * np.float32(1 / np.log(2))
  return bits, jnp.asarray(batch_bytes).sum().astype(jnp.float32)


# Both orders of an epoch, and of the next while a thread runs ahead.
@functools.lru_cache(maxsize=8)
def _permutation(seed: int, what: str, epoch: int, size: int) -> np.ndarray:
  """Order 0 … size − 1 by a hash of each.

  Numpy does not promise that its own shuffles stay what they are.
  """
  name = f"{seed} {what} {epoch}".encode()
  digest = hashlib.blake2b(name, digest_size=8).digest()
  # SplitMix64 (Steele, Lea, Flood 2014), a bijection: there are no ties.
  x = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
  x += np.uint64(int.from_bytes(digest, "little"))
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  order = np.argsort(x ^ (x >> np.uint64(31)))
  order.flags.writeable = False
  return order
