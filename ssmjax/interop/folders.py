"""Folders of checkpoints, as the Hugging Face Hub gives them."""

import os
import pathlib
from collections.abc import Mapping

import numpy as np

from ssmjax.interop.hub import fetch, is_name
from ssmjax.interop.pytorch_files import read_pytorch
from ssmjax.models.json_files import read_object
from ssmjax.models.tensor_files import (
  FileTensor,
  read_safetensors,
  refuse_pointer,
)

__all__ = [
  "find_config",
  "find_folder",
  "list_tensors",
  "read_tensors",
]

# Mistral's own form of its models is called consolidated.
_OWN = "consolidated.safetensors"
_WHOLE = ("model.safetensors", _OWN, "pytorch_model.bin")


def find_folder(
  path: str | os.PathLike,
  revision: str | None = None,
  function: str = "load_pretrained",
  content: str = "config.json and the tensors",
  *,
  tensors: bool = True,
) -> pathlib.Path:
  """Find a folder, or fetch a repository of the Hub.

  Args:
    path: a folder, which is taken where there is one, or `org/name`.
    revision: of a repository.
    function: the public function that errors name.
    content: what a folder should have, for the error.
    tensors: whether a repository's tensors are wanted.
  """
  folder = pathlib.Path(path)
  if folder.is_dir():
    if revision is not None:
      raise ValueError(
        f"{function}: revision is {revision!r}, and {folder} is a folder here,"
        " which has none. Leave it out, or run where there is no such folder."
      )
    return folder
  if is_name(path) and not folder.exists():
    return fetch(os.fspath(path), revision, function, tensors)
  raise ValueError(
    f"{function}: {folder} is no folder, expected one with {content}, or a"
    " repository of the Hub as 'org/name'."
  )


def find_config(folder: pathlib.Path) -> pathlib.Path:
  """Find config.json, or params.json where that is about the tensors."""
  names = ["config.json", "params.json"]
  if _whole(folder) == _OWN:
    # A repository may have both forms, of which one was downloaded.
    names.reverse()
  for name in names:
    if (folder / name).is_file():
      return folder / name
  raise ValueError(
    f"load_pretrained: {folder} has neither config.json nor params.json."
    " Download the whole repository (huggingface_hub.snapshot_download)."
  )


def list_tensors(folder: pathlib.Path) -> dict[pathlib.Path, dict[str, tuple]]:
  """List the files, with shape and dtype of each tensor that they hold."""
  whole = _whole(folder)
  if whole is None:
    raise ValueError(
      f"load_pretrained: {folder} has none of {', '.join(_WHOLE)} and their"
      " index.json. Download the whole repository, or write the model again"
      " (save_pretrained) if it has its weights in another form."
    )
  index = folder / f"{whole}.index.json"
  single = (folder / whole).is_file()
  names: dict[str, list[str]] = {whole: []} if single else _indexed(index)
  found: dict[pathlib.Path, dict[str, tuple]] = {}
  where: dict[str, str] = {}
  for name, listed in names.items():
    tensors = read_tensors(folder / name)
    missing = [n for n in listed if n not in tensors]
    if missing:
      raise ValueError(
        f"load_pretrained: {folder / name} lacks {', '.join(missing)}, which"
        f" {index.name} says it holds. The two are not of one download."
      )
    again = [f"{n} (in {where[n]} too)" for n in tensors if n in where]
    if again:
      raise ValueError(
        f"load_pretrained: {folder / name} holds {', '.join(again)}, expected"
        " each tensor in one file. The two are not of one download."
      )
    where |= dict.fromkeys(tensors, name)
    found[folder / name] = {n: (x.shape, x.dtype) for n, x in tensors.items()}
    del tensors
  return found


def read_tensors(path: pathlib.Path) -> Mapping[str, FileTensor | np.ndarray]:
  """Open a file of tensors: a `.safetensors`, or else a file of PyTorch's."""
  if path.suffix == ".safetensors":
    return read_safetensors(path, "load_pretrained")
  refuse_pointer(path, "load_pretrained")
  return read_pytorch(path)


def _whole(folder) -> str | None:
  """What one file of all tensors is called, be they in one or in several."""
  for name in _WHOLE:
    if (folder / name).is_file() or (folder / f"{name}.index.json").is_file():
      return name
  return None


def _indexed(index) -> dict[str, list[str]]:
  """File names of an index, each with the tensors it should hold."""
  table = read_object(index, "load_pretrained").get("weight_map")
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
