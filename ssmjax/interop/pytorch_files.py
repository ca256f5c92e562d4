"""Tensors in .bin files, through PyTorch where it is installed."""

import pathlib
import pickle
import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

__all__ = ["read_pytorch"]

# The first whose weights-only reader has no known way to run code.
_SAFE_TORCH = (2, 10)


def read_pytorch(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Read a file of `torch.save` through the reader that runs no code.

  Args:
    path: the file.

  Returns:
    The tensors by name, each in the memory that PyTorch has it in.

  Raises:
    ValueError: the file is not whole, or holds more than tensors.
    ImportError: PyTorch is not installed.
  """
  try:
    import torch
  except ImportError as error:
    raise ImportError(
      f"load_pretrained: {path.name} is a pickle, which only PyTorch's"
      " weights-only reader may open here, and PyTorch is not installed."
      " Install it (pip install torch), or take a checkpoint that has"
      " model.safetensors: many repositories on the Hub have one beside it,"
      " or as a pull request."
    ) from error
  version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
  if version < _SAFE_TORCH:
    raise ValueError(
      f"load_pretrained: {path.name} is a pickle, and the weights-only reader"
      f" of PyTorch {torch.__version__} can be made to run code"
      " (CVE-2025-32434, CVE-2026-24747), expected 2.10 or later. Install that"
      " (pip install 'torch>=2.10'), or take a checkpoint that has"
      " model.safetensors."
    )
  options = {"map_location": "cpu", "weights_only": True}
  try:
    try:
      tensors = torch.load(path, mmap=True, **options)
    except RuntimeError:
      # Files from before PyTorch 1.6 are no zip archives, to be mapped.
      tensors = torch.load(path, **options)
  except (
    OSError,
    RuntimeError,
    EOFError,
    pickle.UnpicklingError,
  ) as error:
    raise ValueError(
      f"load_pretrained: PyTorch's weights-only reader does not open"
      f" {path.name}: it is not whole, or holds more than tensors, which"
      " loading would run as code. Take model.safetensors."
    ) from error
  if not isinstance(tensors, Mapping):
    raise ValueError(
      f"load_pretrained: {path.name} holds a {type(tensors).__name__}, expected"
      " tensors by name. Save the model's state_dict alone."
    )
  odd = [name for name, x in tensors.items() if not hasattr(x, "detach")]
  if odd:
    raise ValueError(
      f"load_pretrained: {path.name} holds {', '.join(map(str, odd))}, which"
      " are no tensors. Save the model's state_dict alone."
    )
  return {name: _numpy(torch, tensor) for name, tensor in tensors.items()}


def _numpy(torch, tensor) -> np.ndarray:
  """A tensor's own memory as an array; NumPy has no name for bfloat16."""
  tensor = tensor.detach()
  if tensor.dtype == torch.bfloat16:
    return tensor.contiguous().view(torch.int16).numpy().view(jnp.bfloat16)
  return tensor.numpy()
