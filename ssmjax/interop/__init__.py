"""Published checkpoints in, and trained models out."""

from ssmjax.interop.loading import abstract_pretrained, load_pretrained
from ssmjax.interop.saving import save_pretrained
from ssmjax.interop.tokenizers import load_tokenizer

__all__ = [
  "abstract_pretrained",
  "load_pretrained",
  "load_tokenizer",
  "save_pretrained",
]
