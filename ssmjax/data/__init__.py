"""Data: synthetic recall and text, as arrays and as grain sources."""

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
from ssmjax.data.text import read_documents, split_documents
from ssmjax.data.text_source import TextSource, bits_per_byte, text_dataset
from ssmjax.data.text_tokens import (
  ByteTokenizer,
  FileTokenizer,
  TextCorpus,
  Tokenizer,
  encode_documents,
)

__all__ = [
  "AUTHORS_MIX",
  "IGNORE",
  "PAPER_MIX",
  "TEST_MIX",
  "ByteTokenizer",
  "FileTokenizer",
  "RecallBatch",
  "RecallConfig",
  "RecallKind",
  "RecallMix",
  "RecallSource",
  "RecallStream",
  "TextCorpus",
  "TextSource",
  "Tokenizer",
  "bits_per_byte",
  "encode_documents",
  "read_documents",
  "recall_batch",
  "recall_dataset",
  "recall_example",
  "recall_examples",
  "recall_test_configs",
  "split_documents",
  "text_dataset",
]
