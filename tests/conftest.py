"""Every test runs on eight CPU devices, with warnings as errors."""

import gc
import tempfile

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# By default every 700 new objects begin a walk over those that jax keeps.
gc.set_threshold(100_000, 20, 20)


def pytest_configure(config):
  """What one test compiled, the next ones load."""
  # Not shared: jax writes entries in place, so that another process could read
  # half of one, or be left half of one by a child that a test kills.
  folder = tempfile.TemporaryDirectory(prefix="ssmjax-tests-")
  config.add_cleanup(folder.cleanup)
  jax.config.update("jax_compilation_cache_dir", folder.name)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


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
