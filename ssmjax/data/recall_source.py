"""Recall examples on the host: a grain source and a grain dataset."""

import dataclasses
import operator
from typing import TYPE_CHECKING

import jax
import numpy as np

from ssmjax.data.recall import (
  RecallConfig,
  as_uint32,
  check_positive,
  recall_examples,
)
from ssmjax.data.recall_mixes import RecallMix
from ssmjax.types import Count, Seed, Size, check_fields

if TYPE_CHECKING:
  import grain


@dataclasses.dataclass(frozen=True)
class RecallSource:
  """Show a set of examples as a grain source with random access.

  Satisfies `grain.sources.RandomAccessDataSource` without importing grain:
  `len`, `source[i]`, and a `repr` that says everything the data depend on,
  which grain compares when a checkpoint is restored. Works on the host, with
  numpy arrays.

  Args:
    config: the examples' sizes.
    num_examples: how many there are.
    seed: integer in [0, 2³²).
    start: index of the first, for a part of a larger set.

  >>> source = RecallSource(RecallConfig(16, 2), num_examples=100, seed=0)
  >>> len(source), source[7]["tokens"].shape
  (100, (16,))
  """

  config: RecallConfig
  num_examples: Size
  seed: Seed
  start: Count = 0

  def __post_init__(self):
    check_fields(self)
    as_uint32(
      "RecallSource", "start + num_examples", self.start + self.num_examples
    )

  def __len__(self) -> int:
    return self.num_examples

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    index = operator.index(index)
    if not -len(self) <= index < len(self):
      raise IndexError(
        f"RecallSource: index {index}, expected less than {len(self)}."
      )
    batch = self.take(np.array([index % len(self)]))
    return {name: array[0] for name, array in batch.items()}

  def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Make the examples at `indices` [B] in one call."""
    indices = np.asarray(indices, np.uint32) + np.uint32(self.start)
    with jax.default_device(_host()):
      batch = recall_examples(self.config, self.seed, indices)
    return {name: np.array(array) for name, array in batch.items()}


def recall_dataset(
  mix: RecallMix,
  batch_size: int,
  seed: int,
  *,
  shuffle_seed: int | None = None,
  drop_remainder: bool = False,
) -> "grain.MapDataset":
  """Show a mix as a grain dataset of batches with random access.

  Without `shuffle_seed` the batches are those of a sequential `RecallStream`'s
  first epoch, ragged ones included. `.repeat(n)` adds epochs (shuffled anew),
  `.to_iter_dataset()` gives an iterator whose state is a checkpoint. Reading
  in threads is enough; worker processes would each start jax.

  Args:
    mix: the segments; batches never cross them.
    batch_size: examples in a batch.
    seed: names the set of examples, integer in [0, 2³²).
    shuffle_seed: shuffles the examples within each segment and then the
      batches; None keeps the order short to long that the mix has.
    drop_remainder: leave out each segment's last batch if it is ragged.

  Raises:
    ImportError: if grain is not installed.
    ValueError: as `RecallSource` does.
  """
  try:
    import grain
  except ImportError as error:
    raise ImportError(
      "recall_dataset: grain is not installed. `pip install grain`, or use "
      "RecallStream or recall_batch, which do without it."
    ) from error
  check_positive("recall_dataset", batch_size=batch_size)
  segments = []
  for (config, size), start in zip(mix.segments, mix.offsets, strict=True):
    source = RecallSource(config, size, seed, start)
    indices = grain.MapDataset.range(size)
    if shuffle_seed is not None:
      indices = indices.shuffle(seed=shuffle_seed)
    # Indices are batched and not examples: one call makes the whole batch.
    batched = indices.batch(batch_size, drop_remainder=drop_remainder)
    segments.append(batched.map(source.take))
  dataset = grain.MapDataset.concatenate(segments)
  if shuffle_seed is not None:
    dataset = dataset.shuffle(seed=shuffle_seed)
  return dataset


def _host() -> jax.Device | None:
  """Find the CPU: a pipeline leaves the accelerator to the training step."""
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:  # JAX_PLATFORMS names accelerators only
    return None
