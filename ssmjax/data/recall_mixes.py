"""Named training and test sets for associative recall."""

import dataclasses
import itertools
from typing import Any

from ssmjax.data.recall import RecallConfig
from ssmjax.types import Size, check_fields


@dataclasses.dataclass(frozen=True)
class RecallMix:
  """Name a sequence of sets, each of one config: the data of a training.

  Args:
    segments: pairs of a config and its number of examples. Batches never
      cross a segment, so that each has one length.

  Raises:
    ValueError: if there is no segment, or one without examples.

  >>> PAPER_MIX.num_examples
  300000
  """

  segments: tuple[tuple[RecallConfig, Size], ...]

  def __post_init__(self):
    check_fields(self)
    if not self.segments:
      raise ValueError(
        "RecallMix: segments is empty, expected (RecallConfig, int) pairs."
      )

  @property
  def num_examples(self) -> int:
    """The number of examples of all segments."""
    return sum(size for _, size in self.segments)

  @property
  def offsets(self) -> tuple[int, ...]:
    """The index of each segment's first example."""
    sizes = (size for _, size in self.segments)
    return tuple(itertools.accumulate(sizes, initial=0))[:-1]

  def replace(self, **changes: Any) -> "RecallMix":
    """Change fields of every segment's config, e.g. `vocab_size=64`."""
    return RecallMix(
      tuple(
        (dataclasses.replace(config, **changes), size)
        for config, size in self.segments
      )
    )


# The training set that the paper describes: every length with K = T/16, T/8
# and T/4.
PAPER_MIX = RecallMix(
  tuple(
    (RecallConfig(length, length // fraction), 20_000)
    for length in (64, 128, 256, 512, 1024)
    for fraction in (16, 8, 4)
  )
)

# The training set that the authors' released code builds, in its order.
AUTHORS_MIX = RecallMix(
  (
    (RecallConfig(64, 4), 100_000),
    (RecallConfig(128, 8), 20_000),
    *(
      (RecallConfig(length, length // fraction), 20_000)
      for length in (256, 512, 1024)
      for fraction in (16, 8, 4)
    ),
  )
)


def recall_test_configs() -> tuple[RecallConfig, ...]:
  """Return the configs of Table 2's columns: T = 1024, K = 64, 128, 256."""
  return tuple(RecallConfig(1024, pairs) for pairs in (64, 128, 256))


# Both the paper's and its code's test set.
TEST_MIX = RecallMix(tuple((config, 1_000) for config in recall_test_configs()))
