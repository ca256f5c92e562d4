"""Every test runs on eight CPU devices, with warnings as errors."""

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def strict():
  """Strict dtype promotion, no rank promotion: for ops, kernels, theory."""
  with (
    jax.numpy_dtype_promotion("strict"),
    jax.numpy_rank_promotion("raise"),
  ):
    yield


@pytest.fixture
def x64():
  """Float64 is available inside the test."""
  with jax.enable_x64(True):
    yield
