"""Tensors in safetensors files, mapped into memory.

A safetensors file is eight bytes of a length (little-endian), a JSON header
of that length, which gives each tensor's dtype, shape and place, and the
tensors' bytes. Mapped, only what is copied out of it is ever read, and the
system may drop it again: a tensor, or a device's piece of it, at a time.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

__all__ = [
  "TensorSpec",
  "read_safetensors",
  "refuse_pointer",
  "write_safetensors",
]

_NAMED: dict[str, Any] = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": jnp.bfloat16,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U64": np.uint64,
  "U32": np.uint32,
  "U16": np.uint16,
  "U8": np.uint8,
  "BOOL": np.bool_,
}
_DTYPES = {code: np.dtype(dtype) for code, dtype in _NAMED.items()}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
# The published library refuses longer headers too.
_LONGEST_HEADER = 100_000_000
# How what stands for a file in a clone without Git LFS begins.
_POINTER = b"version https://git-lfs"


class TensorSpec(NamedTuple):
  """A tensor to be written.

  Attributes:
    shape: its shape.
    dtype: its dtype.
    get: makes the array when its turn has come.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  get: Callable[[], np.ndarray]

  @property
  def size(self) -> int:
    """Bytes that it takes."""
    return math.prod(self.shape) * self.dtype.itemsize


def read_safetensors(
  path: pathlib.Path, function: str
) -> Mapping[str, np.ndarray]:
  """Open a safetensors file; nothing but its header is read.

  Args:
    path: the file.
    function: whose errors these are.

  Returns:
    The tensors by name, views of the mapped file: copy what is to outlive it.

  Raises:
    ValueError: the file is not whole, or is not such a file.
    NotImplementedError: a tensor is of a dtype that NumPy and ml_dtypes lack.
  """
  refuse_pointer(path, function)
  return _read_safetensors(path, function)


def refuse_pointer(path: pathlib.Path, function: str) -> None:
  """Raise ValueError for what Git has in a file's place without its LFS."""
  with open(path, "rb") as file:
    start = file.read(len(_POINTER))
  if start == _POINTER:
    raise ValueError(
      f"{function}: {path} is not the file but Git's pointer to it. Run"
      " git lfs pull in its folder, or huggingface_hub.snapshot_download."
    )


def write_safetensors(
  path: pathlib.Path, tensors: Mapping[str, TensorSpec]
) -> None:
  """Write a safetensors file, one tensor in memory at a time.

  Args:
    path: the file, which is made or written over.
    tensors: what to write, in this order.
  """
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  start = 0
  for name, spec in tensors.items():
    header[name] = {
      "dtype": _CODES[spec.dtype],
      "shape": list(spec.shape),
      "data_offsets": [start, start + spec.size],
    }
    start += spec.size
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)  # So that the tensors are aligned.
  with open(path, "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for name, spec in tensors.items():
      array = np.asarray(spec.get(), order="C")
      if array.shape != spec.shape or array.dtype != spec.dtype:
        raise AssertionError(f"{name}: {array.shape}, {array.dtype}, {spec}")
      file.write(array.reshape(-1).view(np.uint8).data)
    file.flush()
    os.fsync(file.fileno())


def _read_safetensors(path, function) -> dict[str, np.ndarray]:
  """Views of the mapped file; nothing but the header is read."""
  size = path.stat().st_size
  if size < 8:
    raise _broken(
      function, path, f"it has {size} bytes, fewer than a header's length"
    )
  mapped = np.asarray(np.memmap(path, np.uint8, "r"))
  length = int.from_bytes(mapped[:8].tobytes(), "little")
  if length > min(size - 8, _LONGEST_HEADER):
    raise _broken(
      function, path, f"its header would take {length} of its {size} bytes"
    )
  try:
    header = json.loads(
      mapped[8 : 8 + length].tobytes(), object_pairs_hook=_no_repeats
    )
    if not isinstance(header, dict):
      raise ValueError("no object")
  except ValueError as error:
    raise _broken(
      function, path, f"its header is no JSON object: {error}"
    ) from error
  header.pop("__metadata__", None)
  data = mapped[8 + length :]
  tensors: dict[str, np.ndarray] = {}
  end = 0
  for name, entry in sorted(header.items(), key=_place(function, path)):
    dtype, shape, (start, stop) = _entry(function, path, name, entry)
    if start != end or stop - start != math.prod(shape) * dtype.itemsize:
      raise _broken(
        function,
        path,
        f"{name} of shape {shape} and dtype {dtype.name} lies at {start} to"
        f" {stop}, after {end}",
      )
    end = stop
    if stop > data.size:
      break
    tensors[name] = data[start:stop].view(dtype).reshape(shape)
  if end != data.size:
    raise _broken(
      function,
      path,
      f"it has {data.size} bytes of tensors, its header tells of {end}",
    )
  return tensors


def _entry(function, path, name, entry):
  """A header's entry: dtype, shape and place, each of its type."""
  code = entry.get("dtype")
  shape, place = entry.get("shape"), entry["data_offsets"]
  if code not in _DTYPES:
    raise NotImplementedError(
      f"{function}: {path.name} holds {name} as {code}, expected one of"
      f" {', '.join(_DTYPES)}. A quantised checkpoint has to be turned into"
      " one of these first."
    )
  if not _counts(shape):
    raise _broken(function, path, f"{name} has the shape {shape!r}")
  return _DTYPES[code], tuple(shape), place


def _place(function, path):
  """The key to order a header's entries by where they lie."""

  def place(item):
    name, entry = item
    found = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not _counts(found) or len(found) != 2:
      raise _broken(
        function, path, f"its header does not tell where {name} lies"
      )
    return tuple(found)

  return place


def _counts(value) -> bool:
  """True of a list of integers, none negative."""
  return isinstance(value, list) and all(
    type(number) is int and number >= 0 for number in value
  )


def _no_repeats(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
  found: dict[str, Any] = {}
  for name, value in pairs:
    if name in found:
      raise ValueError(f"{name!r} is there twice")
    found[name] = value
  return found


def _broken(function, path, why) -> ValueError:
  return ValueError(
    f"{function}: {path} is no whole safetensors file: {why}."
    " Download it again."
  )
