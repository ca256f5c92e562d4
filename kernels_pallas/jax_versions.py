"""The two names of Pallas for GPUs that the oldest jax allowed has not.

jax 0.11.2 is the oldest that `setup.cfg` allows. What jax has is looked up, not
its version, so that a jax which has both names gets exactly its own functions.
"""

import inspect

from jax.experimental.pallas import mosaic_gpu as plgpu

__all__ = ["gpu_kernel", "gpu_store"]


def _kernel(body, *, cost_estimate=None, **options):
  """`plgpu.kernel` of a jax that takes no estimate, as XLA never gets one."""
  del cost_estimate
  return plgpu.kernel(body, **options)


def _store(ref, value, *, optimized=True):
  """`plgpu.store` of a jax that has none: an assignment.

  It tries the optimized way first and takes the other where there is none, so
  that `optimized=False` is what it does; to demand it is not possible.
  """
  if optimized:
    raise NotImplementedError(
      "gpu_store: optimized=True needs a jax that has plgpu.store, pass"
      " optimized=False."
    )
  ref[...] = value


# Elsewhere unknown keywords are taken for those of a mesh, and fail there.
_PARAMETERS = inspect.signature(plgpu.kernel).parameters
gpu_kernel = plgpu.kernel if "cost_estimate" in _PARAMETERS else _kernel
gpu_store = plgpu.store if hasattr(plgpu, "store") else _store
