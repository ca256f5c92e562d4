"""Folders of checkpoints, as the Hugging Face Hub gives them."""

import json
import os
import pathlib
from typing import Any

from ssmjax.interop.tensor_files import read_tensors

__all__ = ["find_folder", "list_tensors", "read_config"]


# Mistral's own form of its models is called consolidated.
_WHOLE = ("model.safetensors", "consolidated.safetensors", "pytorch_model.bin")


def find_folder(
  path: str | os.PathLike,
  function: str = "load_pretrained",
  content: str = "config.json and the tensors",
) -> pathlib.Path:
  """Make sure that there is such a folder; its content is for the error."""
  folder = pathlib.Path(path)
  if not folder.is_dir():
    raise ValueError(
      f"{function}: {folder} is no folder, expected one with {content}. For a"
      " repository of the Hub, first huggingface_hub.snapshot_download(name),"
      " which returns its folder."
    )
  return folder


def read_config(folder: pathlib.Path) -> dict[str, Any]:
  """Read config.json, or params.json where there is none."""
  for name in ("config.json", "params.json"):
    if (folder / name).is_file():
      return _read_object(folder / name)
  raise ValueError(
    f"load_pretrained: {folder} has neither config.json nor params.json."
  )


def list_tensors(folder: pathlib.Path) -> dict[pathlib.Path, dict[str, tuple]]:
  """List the files, with shape and dtype of each tensor that they hold."""
  for whole in _WHOLE:
    index = folder / f"{whole}.index.json"
    names: dict[str, list[str]]
    if (folder / whole).is_file():
      names = {whole: []}
    elif index.is_file():
      names = _indexed(index)
    else:
      continue
    found: dict[pathlib.Path, dict[str, tuple]] = {}
    for name, listed in names.items():
      tensors = read_tensors(folder / name)
      missing = [n for n in listed if n not in tensors]
      again = [n for held in found.values() for n in tensors if n in held]
      if missing or again:
        raise ValueError(
          f"load_pretrained: {name} lacks {missing} of {index.name}, and"
          f" holds {again}, which another file holds too."
        )
      found[folder / name] = {n: (x.shape, x.dtype) for n, x in tensors.items()}
      del tensors
    return found
  raise ValueError(
    f"load_pretrained: {folder} has none of {', '.join(_WHOLE)} and their"
    " index.json."
  )


def _read_object(path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"load_pretrained: {path} is no JSON: {error}") from error
  if not isinstance(value, dict):
    raise ValueError(f"load_pretrained: {path} holds no object.")
  return value


def _indexed(index) -> dict[str, list[str]]:
  """File names of an index, each with the tensors it should hold."""
  table = _read_object(index).get("weight_map")
  if not isinstance(table, dict) or not table:
    raise ValueError(f"load_pretrained: {index} has no weight_map.")
  files: dict[str, list[str]] = {}
  for tensor, name in table.items():
    # A name, not a path: a checkpoint reads nothing outside its folder.
    if not isinstance(name, str) or pathlib.PurePath(name).name != name:
      raise ValueError(
        f"load_pretrained: {index} says that {tensor} is in {name!r}, expected"
        " a file beside it."
      )
    if not (index.parent / name).is_file():
      raise ValueError(
        f"load_pretrained: {index.parent} lacks {name}, which {index.name}"
        " lists. The download is not complete."
      )
    files.setdefault(name, []).append(tensor)
  return files
