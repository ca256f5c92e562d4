"""Data: synthetic recall, as arrays, as a stream and as a grain source."""

from ssmjax.data.recall import (
  IGNORE,
  RecallBatch,
  RecallConfig,
  recall_batch,
  recall_example,
  recall_examples,
)
from ssmjax.data.recall_mixes import (
  AUTHORS_MIX,
  PAPER_MIX,
  TEST_MIX,
  RecallMix,
  recall_test_configs,
)
from ssmjax.data.recall_source import RecallSource, recall_dataset
from ssmjax.data.recall_stream import RecallKind, RecallStream

__all__ = [
  "AUTHORS_MIX",
  "IGNORE",
  "PAPER_MIX",
  "TEST_MIX",
  "RecallBatch",
  "RecallConfig",
  "RecallKind",
  "RecallMix",
  "RecallSource",
  "RecallStream",
  "recall_batch",
  "recall_dataset",
  "recall_example",
  "recall_examples",
  "recall_test_configs",
]
