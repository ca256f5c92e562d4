"""Pallas kernels for TPU and GPU, and nothing else.

`kernels(op)` is the one door: it tells dispatch which platforms have a fused
kernel for an op. A kernel is a pair of plain functions, the forward and the
backward pass; `ssmjax.ops` makes a differentiable op of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

# Importing it adds to what JAX's caches are keyed by: if a kernel did so in the
# middle of a program's first trace, its second call would compile it again.
import jax.experimental.pallas.tpu  # noqa: F401

__all__ = ["Kernel", "kernels"]


class Kernel(NamedTuple):
  """A kernel's two passes, in the contract of its op."""

  forward: Callable[..., Any]
  backward: Callable[..., Any]


def kernels(op: str) -> dict[str, Kernel]:
  """Map platform ("tpu", "cuda") to the fused kernel of `op`, if there is one.

  The contracts are those of `ssmjax.ops.selective_fused.fused` and
  `ssmjax.ops.scan_fused.fused`.
  """
  # Most programs run one op, on one platform.
  if op == "selective_scan":
    from kernels_pallas import (
      selective_scan_gpu,
      selective_scan_gpu_backward,
      selective_scan_tpu,
      selective_scan_tpu_backward,
    )

    return {
      "tpu": Kernel(
        selective_scan_tpu.forward, selective_scan_tpu_backward.backward
      ),
      "cuda": Kernel(
        selective_scan_gpu.forward, selective_scan_gpu_backward.backward
      ),
    }
  if op == "linear_scan":
    from kernels_pallas import linear_scan_gpu, linear_scan_tpu

    return {
      "tpu": Kernel(linear_scan_tpu.forward, linear_scan_tpu.backward),
      "cuda": Kernel(linear_scan_gpu.forward, linear_scan_gpu.backward),
    }
  return {}
