"""Tensors in safetensors files, read and written a piece at a time.

A safetensors file is eight bytes of a length (little-endian), a JSON header
of that length, which gives each tensor's dtype, shape and place, and the
tensors' bytes. The safetensors library reads it, and refuses a header that
does not describe the whole file. Its own writer wants all tensors in memory
at once, so files are written here.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

__all__ = [
  "FileTensor",
  "TensorSpec",
  "copy_piece",
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
# Bytes of a file that are copied at a time.
_BLOCK = 2**19
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


class FileTensor:
  """A tensor in a file, of which an index reads that piece alone.

  Attributes:
    shape: its shape.
    dtype: its dtype.
  """

  def __init__(self, source, shape: tuple[int, ...], dtype: np.dtype):
    """Describe a tensor; `source` is a slice of the library's."""
    self._source = source
    self.shape = shape
    self.dtype = dtype

  def __getitem__(self, index: slice | tuple[slice, ...]) -> np.ndarray:
    """Read a piece: a slice without a step for each of the first axes."""
    slices = index if isinstance(index, tuple) else (index,)
    ranges = [
      range(*part.indices(size))
      for part, size in zip(slices, self.shape, strict=False)
    ]
    # The library takes no negative numbers, no empty pieces, and no slices of
    # a tensor that is one number.
    if not all(ranges):
      shape = (*map(len, ranges), *self.shape[len(ranges) :])
      return np.empty(shape, self.dtype)
    return self._source[tuple(slice(r.start, r.stop) for r in ranges)]

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    """Read all of it."""
    return np.asarray(self[()], dtype)


def read_safetensors(
  path: pathlib.Path, function: str
) -> Mapping[str, FileTensor]:
  """Open a safetensors file; nothing but its header is read.

  Args:
    path: the file.
    function: the public function that its errors name.

  Returns:
    The tensors by name, in the order in which they lie. An index reads.

  Raises:
    ValueError: the file is not whole, or is not such a file.
    NotImplementedError: a tensor is of a dtype that NumPy and ml_dtypes lack.
  """
  refuse_pointer(path, function)
  try:
    file = safetensors.safe_open(path, framework="numpy")
  except safetensors.SafetensorError as error:
    # It may quote a header, which may be long.
    why = str(error).removeprefix("Error while deserializing header: ")[:200]
    raise ValueError(
      f"{function}: {path} is no whole safetensors file: {why}. Download or"
      " write it again."
    ) from error
  tensors = {}
  for name in file.offset_keys():
    source = file.get_slice(name)
    code = source.get_dtype()
    if code not in _DTYPES:
      raise NotImplementedError(
        f"{function}: {path.name} holds {name} as {code}, expected one of"
        f" {', '.join(_DTYPES)}. A quantised checkpoint has to be turned into"
        " one of these first."
      )
    shape = tuple(source.get_shape())
    tensors[name] = FileTensor(source, shape, _DTYPES[code])
  return tensors


def copy_piece(
  out: np.ndarray, tensor: FileTensor | np.ndarray, index: tuple[slice, ...]
) -> None:
  """Copy a piece of a tensor into an array, a few of its rows at a time.

  Args:
    out: of the piece's shape, and of any dtype and layout in memory.
    tensor: where it comes from.
    index: a slice without a step for each axis of the tensor.
  """
  if not index:
    out[...] = np.asarray(tensor)
    return
  start, stop, _ = index[0].indices(tensor.shape[0])
  rows = max(1, _BLOCK // max(1, out[:1].size * tensor.dtype.itemsize))
  for low in range(start, stop, rows):
    high = min(low + rows, stop)
    out[low - start : high - start] = tensor[(slice(low, high), *index[1:])]


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
