"""Tokenizers of published checkpoints, through the tokenizers library."""

import os
from typing import TYPE_CHECKING

from ssmjax.interop.folders import find_folder

if TYPE_CHECKING:
  from tokenizers import Tokenizer

__all__ = ["load_tokenizer"]


def load_tokenizer(
  path: str | os.PathLike, *, revision: str | None = None
) -> "Tokenizer":
  """Load the tokenizer that lies beside a checkpoint.

  Args:
    path: the folder, as `load_pretrained` takes it, with `tokenizer.json`;
      or a repository of the Hub, of which no tensors are fetched.
    revision: a repository's branch, tag or commit.

  Returns:
    A `tokenizers.Tokenizer`: `encode(text).ids` are tokens, `decode(ids)` is
    the way back.

  Raises:
    ValueError: no such folder, no tokenizer.json in it, or one that is not
      whole.
    ImportError: the tokenizers library is not installed, or huggingface_hub
      where it is needed.
  """
  folder = find_folder(
    path, revision, "load_tokenizer", "tokenizer.json", tensors=False
  )
  file = folder / "tokenizer.json"
  if not file.is_file():
    raise ValueError(
      f"load_tokenizer: {folder} has no tokenizer.json. Where it has another"
      " tokenizer's files (tokenizer.model), let transformers write it:"
      " AutoTokenizer.from_pretrained(folder).save_pretrained(folder). A"
      " Mamba of the mamba_ssm package has none: its tokenizer is"
      " EleutherAI/gpt-neox-20b's."
    )
  try:
    import tokenizers
  except ImportError as error:
    raise ImportError(
      "load_tokenizer: the tokenizers library is not installed. Install it:"
      " pip install tokenizers."
    ) from error
  try:
    return tokenizers.Tokenizer.from_file(str(file))
  except Exception as error:  # The library raises nothing narrower.
    raise ValueError(
      f"load_tokenizer: {file} is no tokenizer: {error}. Download it again."
    ) from error
