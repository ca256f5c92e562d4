"""What the selective scan on GPU knows of the chip it is compiled for."""

import jax
from jax.extend import backend
from jax.extend.core import Primitive
from jax.interpreters import mlir

from ssmjax.types import Array

__all__ = ["before_hopper", "capability", "refuse", "shared_memory"]


def capability() -> tuple[int, int]:
  """The compute capability compiled for; as Mosaic does, Hopper's if unknown.

  It is known where a GPU is visible, or where code is compiled ahead of time
  for one that is the default device or in the abstract mesh.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  default = backend.get_default_device()
  if device is None or device.device_kind == default.device_kind:
    device = default
  major, minor = getattr(device, "compute_capability", "9.0").split(".")
  return int(major), int(minor)


def before_hopper() -> bool:
  """Whether the chip compiled for has no tensor memory accelerator.

  Its copies into shared memory come in tiles of 8 rows and 32 bytes.
  """
  return capability() < (9, 0)


def shared_memory() -> int:
  """Bytes of shared memory that a block may take.

  Source: CUDA C++ Programming Guide, "Technical Specifications per Compute
  Capability". What is not in that table has the least of all.
  """
  major, minor = capability()
  if major in (9, 10, 11):
    return 227 * 1024
  return 1024 * (163 if (major, minor) in ((8, 0), (8, 7)) else 99)


def refuse(x: Array, message: str) -> Array:
  """`x`, in a program that ends with `message` when it is lowered.

  Not before: a program for a chip is traced on every host, with the kernels
  of chips it will never see.
  """
  return _refuse_p.bind(x, message=message)


def _refuse(*_, message, **__):
  raise NotImplementedError(message)


_refuse_p = Primitive("selective_scan_gpu_refuse")
_refuse_p.def_abstract_eval(lambda x, message: x)
_refuse_p.def_impl(_refuse)
mlir.register_lowering(_refuse_p, _refuse)
