"""Pallas kernels for TPU and GPU, and nothing else.

`kernels(op)` is the one door: it tells dispatch which platforms have a fused
kernel for an op. A kernel takes the arguments of the op's other
implementations and returns the same results, states and gradients.
"""

from collections.abc import Callable
from typing import Any

__all__ = ["kernels"]


def kernels(op: str) -> dict[str, Callable[..., Any]]:
  """Map platform ("tpu", "cuda") to the fused kernel of `op`, if there is one.

  None has been written yet, so the map is empty for every op and the default
  dispatch takes the chunked form everywhere.
  """
  del op
  return {}
