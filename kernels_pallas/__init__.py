"""Pallas kernels for TPU and GPU, and nothing else.

`kernels(op)` is the one door: it tells dispatch which platforms have a fused
kernel for an op. A kernel is a pair of plain functions, the forward and the
backward pass; `ssmjax.ops` makes a differentiable op of them. Their modules,
and Pallas with them, are imported when a program is lowered for their chip.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["Kernel", "kernels"]

# Importing Pallas adds to what JAX's caches are keyed by. If the first program
# of a chip did so while it is lowered, its second call would compile it again.
# So it is imported here where a program can run on such a chip.
_PLUGINS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")
if any(importlib.util.find_spec(name) for name in _PLUGINS):
  import jax.experimental.pallas.tpu  # noqa: F401


class Kernel(NamedTuple):
  """A kernel's two passes, in the contract of its op.

  Attributes:
    forward: the forward pass.
    backward: the backward pass.
    saved: the arguments of forward to the shapes of what it keeps for
      backward, a tree of `jax.ShapeDtypeStruct`. It needs no Pallas.
  """

  forward: Callable[..., Any]
  backward: Callable[..., Any]
  saved: Callable[..., Any]


def kernels(op: str) -> dict[str, Kernel]:
  """Map platform ("tpu", "cuda") to the fused kernel of `op`, if there is one.

  The contracts are those of `ssmjax.ops.selective_fused.fused` and
  `ssmjax.ops.scan_fused.flattened`.
  """
  return dict(_KERNELS.get(op, {}))


def _when_called(place: str) -> Callable[..., Any]:
  """The function at `module:name`, whose module is imported when it is called.

  One object for one place: programs are cached by their functions.
  """
  module, name = place.split(":")

  def call(*args, **options):
    found = importlib.import_module(f"kernels_pallas.{module}")
    return getattr(found, name)(*args, **options)

  return call


def _kernel(forward: str, backward: str, saved: str) -> Kernel:
  return Kernel(*map(_when_called, (forward, backward, saved)))


_KERNELS = {
  "selective_scan": {
    "tpu": _kernel(
      "selective_scan_tpu:forward",
      "selective_scan_tpu_backward:backward",
      "selective_scan_tpu_tiling:saved",
    ),
    "cuda": _kernel(
      "selective_scan_gpu:forward",
      "selective_scan_gpu_backward:backward",
      "selective_scan_gpu_tiling:saved",
    ),
  },
  "linear_scan": {
    "tpu": _kernel(
      "linear_scan_tpu:forward",
      "linear_scan_tpu:backward",
      "linear_scan_tpu_tiling:saved",
    ),
    "cuda": _kernel(
      "linear_scan_gpu:forward",
      "linear_scan_gpu:backward",
      "linear_scan_gpu_tiling:saved",
    ),
  },
}
