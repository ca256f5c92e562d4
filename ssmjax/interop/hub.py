"""Repositories of the Hugging Face Hub, where huggingface_hub is installed."""

import pathlib
import re
from typing import Any

__all__ = ["TOKENIZER", "fetch", "is_name"]

# Files of a tokenizer, whatever wrote them.
TOKENIZER = (
  *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
  *("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model*"),
  *("spiece.model", "tekken.json", "chat_template.*"),
)
_DESCRIPTION = ("config.json", "params.json", "generation_config.json")
# The forms that the tensors may have; the first that is there is enough.
_TENSORS = ("model*.safetensors", "consolidated*.safetensors", "*.bin")


def is_name(path: Any) -> bool:
  """Say whether this may be a repository: `org/name`, and no path."""
  part = r"[A-Za-z0-9][\w.-]*"
  return isinstance(path, str) and bool(re.fullmatch(f"{part}/{part}", path))


def fetch(
  name: str, revision: str | None, function: str, tensors: bool
) -> pathlib.Path:
  """Fetch a repository's files, or find them in the cache of the library.

  Args:
    name: as `org/name`.
    revision: a branch, tag or commit; None for the main branch.
    function: the public function that errors name.
    tensors: whether they are wanted too: safetensors, or pickles where there
      are none.

  Returns:
    The folder in the library's cache.

  Raises:
    ImportError: huggingface_hub is not installed.
    ValueError: there is no such repository or revision, it is not to be had,
      or it is not in the cache and there is no network.
  """
  try:
    import huggingface_hub
  except ImportError as error:
    raise ImportError(
      f"{function}: {name} is no folder here, and to fetch a repository of that"
      " name from the Hub, huggingface_hub has to be installed: pip install"
      " 'ssmjax[hub]'. Or pass a folder."
    ) from error
  wanted = [*_DESCRIPTION, *TOKENIZER]
  try:
    if not tensors:
      return _download(huggingface_hub, name, revision, wanted)
    for form in _TENSORS:
      files = [*wanted, form, "*.index.json"]
      folder = _download(huggingface_hub, name, revision, files)
      if any(folder.glob(form)):
        break
    return folder
  except Exception as error:  # Of the library, of its client, of the system.
    raise ValueError(
      f"{function}: {name}{f' at {revision}' if revision else ''} is no folder"
      f" here and is not to be had from the Hub: {error}\nCheck its name. A"
      " private or gated one asks for `hf auth login`; without a network"
      " (HF_HUB_OFFLINE=1) only what was fetched before is found."
    ) from error


def _download(hub, name, revision, files) -> pathlib.Path:
  folder = hub.snapshot_download(
    name, revision=revision, allow_patterns=list(files)
  )
  return pathlib.Path(folder)
