"""What lies beside the tensors: a tokenizer, and what its tokens are for."""

import os
import pathlib
import shutil
import warnings
from typing import Any

from ssmjax.interop.folders import find_folder
from ssmjax.interop.hub import TOKENIZER
from ssmjax.models.json_files import read_object

__all__ = ["copy_companions", "find_source", "special_tokens"]

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def find_source(
  origin: str | None, like: str | os.PathLike | None
) -> pathlib.Path | None:
  """Find the folder that a model is saved like.

  Args:
    origin: where the model was loaded from; a warning where that is gone.
    like: what the caller asked for.

  Raises:
    ValueError: there is no such folder as the caller asked for.
  """
  if like is not None:
    content = "a tokenizer"
    return find_folder(like, None, "save_pretrained", content, tensors=False)
  if origin is None:
    return None
  if not pathlib.Path(origin).is_dir():
    warnings.warn(
      f"save_pretrained: {origin}, which the model was loaded from, is there no"
      " more, so that no tokenizer and no special tokens are saved. Pass like="
      " a folder that has them.",
      stacklevel=3,
    )
    return None
  return pathlib.Path(origin)


def special_tokens(source: pathlib.Path | None) -> dict[str, Any]:
  """Read the numbers of special tokens out of a folder's config.json."""
  file = source / "config.json" if source else None
  if file is None or not file.is_file():
    return {}
  fields = read_object(file, "save_pretrained")
  found = {name: fields[name] for name in _SPECIAL if name in fields}
  for name, value in found.items():
    # Several tokens may end a text.
    numbers = value if isinstance(value, list) else [value]
    if value is not None and any(type(n) is not int or n < 0 for n in numbers):
      raise ValueError(
        f"save_pretrained: {file}: {name} is {value!r}, expected the number of"
        " a token, or null. Mend it there, or pass another folder as like."
      )
  return found


def copy_companions(
  source: pathlib.Path | None, folder: pathlib.Path, generation: bool
) -> None:
  """Copy the tokenizer's files.

  Args:
    source: the folder to take them from, if any.
    folder: the one that is being written.
    generation: whether to copy generation_config.json too.
  """
  if source is None:
    return
  names = (*TOKENIZER, *(["generation_config.json"] if generation else []))
  for pattern in names:
    for file in sorted(source.glob(pattern)):
      if not file.is_file():
        continue
      with open(file, "rb") as old, open(folder / file.name, "wb") as new:
        shutil.copyfileobj(old, new)
        new.flush()
        os.fsync(new.fileno())
