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
    Whether runs are repeatable to the bit; False where the flag is off, or
    where the backend is a GPU that has already started without it. A flag
    added after the start is recognized where this module was imported, or this
    function called, before it was added.
  """
  global _found
  if not xla_bridge.backends_are_initialized():
    flags = os.environ.get("XLA_FLAGS", "")
    if _flag() is None:
      os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}=true".strip()
    _found = bool(_flag())
    return _found
  if jax.default_backend() != "gpu":
    return True
  if _found is None:
    _found = bool(_flag())
  return _found


def _flag() -> bool | None:
  """What `XLA_FLAGS` says last about the flag; None if nothing."""
  found = None
  for word in os.environ.get("XLA_FLAGS", "").split():
    name, _, value = word.partition("=")
    if name == _FLAG:
      found = value.lower() in ("", "1", "true")
  return found


# What the backend found when it started, as far as it is known: XLA reads its
# flags only once.
_found: bool | None = None
if xla_bridge.backends_are_initialized():
  _found = bool(_flag())
