"""One error measure and one tolerance table for every numeric test."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

# RMS(error) / RMS(reference), by the dtype of the computation under test.
TOLERANCE = {
  jnp.dtype("float64"): 1e-12,
  jnp.dtype("complex128"): 1e-12,
  jnp.dtype("float32"): 1e-5,
  jnp.dtype("complex64"): 1e-5,
  jnp.dtype("bfloat16"): 1e-2,
}


# jax.jit for tests in which compiling would take longer than running.
quick = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)

# XLA's flags in this process; None for those of the environment.
compiler_flags: str | None = None


def same_compiler() -> dict[str, str]:
  """An environment in which a process compiles to the bits of this one."""
  flags = {} if compiler_flags is None else {"XLA_FLAGS": compiler_flags}
  return dict(os.environ) | flags


def rms_error(actual, expected) -> float:
  """RMS(actual - expected) / RMS(expected), in float64."""
  wide = lambda x: np.asarray(
    x, np.complex128 if np.iscomplexobj(x) else np.float64
  )
  actual, expected = wide(actual), wide(expected)
  assert actual.shape == expected.shape, (actual.shape, expected.shape)
  if not expected.size:
    return 0.0
  error = np.sqrt(np.mean(np.abs(actual - expected) ** 2))
  scale = np.sqrt(np.mean(np.abs(expected) ** 2))
  return float(error / scale) if scale else float(error)


def assert_close(actual, expected, dtype=None, what=""):
  """Every leaf agrees to the table's tolerance for `dtype`."""
  actual_leaves, tree = jax.tree.flatten_with_path(actual)
  expected_leaves, expected_tree = jax.tree.flatten_with_path(expected)
  assert tree == expected_tree, (tree, expected_tree)
  for (path, a), (_, e) in zip(actual_leaves, expected_leaves, strict=True):
    limit = TOLERANCE[jnp.dtype(dtype or a.dtype)]
    error = rms_error(a, e)
    assert error <= limit, (
      f"{what}{jax.tree_util.keystr(path)}: error {error:.3g} > {limit:.3g}"
    )
