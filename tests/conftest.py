"""Every test runs on eight CPU devices, with warnings as errors."""

import gc
import os
import pathlib
import tempfile

import checks
import jax
import jax.numpy as jnp
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# By default every 700 new objects begin a walk over those that jax keeps.
gc.set_threshold(100_000, 20, 20)


# A compiled program takes a few maps of memory, of which Linux gives a process
# 65,530: the compiler crashes where they end.
MOST_MAPS = 20_000


def pytest_configure(config):
  """What one test compiled, the next ones load; by day it is compiled fast."""
  if config.option.markexpr == "not nightly":
    _compile_fast()
  # Not shared: jax writes entries in place, so that another process could read
  # half of one, or be left half of one by a child that a test kills.
  folder = tempfile.TemporaryDirectory(prefix="ssmjax-tests-")
  config.add_cleanup(folder.cleanup)
  jax.config.update("jax_compilation_cache_dir", folder.name)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _compile_fast():
  """Leave out LLVM's optimisations in this process.

  Most tests compile for longer than they run. The processes that tests start
  compile as users do (but see `checks.same_compiler`), and so does the night.
  """
  flags = os.environ.get("XLA_FLAGS")
  os.environ["XLA_FLAGS"] = f"{flags or ''} --xla_backend_optimization_level=0"
  checks.compiler_flags = os.environ["XLA_FLAGS"]
  jax.jit(jnp.sin)(1.0)  # XLA reads its flags once, when it first compiles.
  if flags is None:
    del os.environ["XLA_FLAGS"]
  else:
    os.environ["XLA_FLAGS"] = flags


@pytest.fixture(autouse=True)
def few_maps():
  """Drop what was compiled before there are too many maps of memory.

  At night one module alone compiles enough for it. To count takes long where
  there are many, so it is done after every tenth test.
  """
  yield
  _done[0] += 1
  if _done[0] % 10 == 0 and MAPS.exists():
    if MAPS.read_bytes().count(b"\n") > MOST_MAPS:
      jax.clear_caches()


MAPS = pathlib.Path("/proc/self/maps")
_done = [0]


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
