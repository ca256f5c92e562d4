"""What makes two runs of one program give the same bits."""

import os

import jax
from jax._src import xla_bridge  # the question below has no public door

_FLAG = "--xla_gpu_deterministic_ops"


def ensure_deterministic() -> bool:
  """Asks XLA for deterministic GPU programs; call it before JAX starts.

  CPU and TPU programs are deterministic as they are. On a GPU, XLA's choice of
  algorithms by timing and its atomic additions differ from run to run unless
  `--xla_gpu_deterministic_ops=true` stands in `XLA_FLAGS` when the backend
  starts.

  Returns:
    Whether runs are repeatable to the bit; False where the backend is a GPU
    that has already started without the flag.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  if _FLAG in flags:
    return f"{_FLAG}=false" not in flags
  if not xla_bridge.backends_are_initialized():
    os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}=true".strip()
    return True
  return jax.default_backend() != "gpu"
