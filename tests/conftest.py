"""Every test runs on eight CPU devices, with warnings as errors."""

import gc
import os
import tempfile

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# By default every 700 new objects begin a walk over those that jax keeps.
gc.set_threshold(100_000, 20, 20)


def pytest_configure(config):
  """What one test, worker or child process compiled, the others load."""
  if "PYTEST_XDIST_WORKER" not in os.environ:
    folder = tempfile.TemporaryDirectory(prefix="ssmjax-tests-")
    config.add_cleanup(folder.cleanup)
    for option, value in {
      "jax_compilation_cache_dir": folder.name,
      "jax_persistent_cache_min_compile_time_secs": 0.0,
      "jax_persistent_cache_min_entry_size_bytes": -1,
    }.items():
      os.environ[option.upper()] = str(value)
      jax.config.update(option, value)


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
