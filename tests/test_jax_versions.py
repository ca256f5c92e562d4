"""The kernels are written for every jax that setup.cfg allows."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

import kernels_pallas
from kernels_pallas import jax_versions

ESTIMATE = pl.CostEstimate(flops=8, bytes_accessed=8, transcendentals=0)


def test_gpu_kernels_take_from_pallas_no_name_that_the_oldest_jax_lacks():
  folder = pathlib.Path(kernels_pallas.__file__).parent
  found = [
    f"{path.name}: {name}"
    for path in folder.glob("*.py")
    if path.name != "jax_versions.py"
    for name in re.findall(r"plgpu\.(?:kernel|store)\(", path.read_text())
  ]
  assert not found


def test_a_jax_that_has_both_names_gives_its_own_functions():
  if not hasattr(plgpu, "store"):
    pytest.skip("this jax is an older one")
  assert jax_versions.gpu_kernel is plgpu.kernel
  assert jax_versions.gpu_store is plgpu.store


@pytest.mark.parametrize("older", [False, True])
def test_stores_of_an_older_jax_write_what_those_of_this_one_write(older):
  kernel = jax_versions._kernel if older else jax_versions.gpu_kernel
  store = jax_versions._store if older else jax_versions.gpu_store

  def double(x_ref, y_ref, rows_ref):
    x = plgpu.load(x_ref, layout=_ROW_A_THREAD, optimized=False)
    store(rows_ref, x + x, optimized=False)
    plgpu.commit_smem()
    rows = plgpu.load(rows_ref, layout=_ROW_A_THREAD, optimized=False)
    store(y_ref.at[1], rows, optimized=False)

  def call(x, interpret=None):
    return kernel(
      double,
      out_type=jax.ShapeDtypeStruct((2, *x.shape), x.dtype),
      scratch_types=[plgpu.SMEM(x.shape, x.dtype)],
      cost_estimate=ESTIMATE,
      compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
      interpret=interpret,
    )(x)

  x = jnp.arange(128.0 * 4).reshape(128, 4)
  lowered = jax.jit(call).trace(x).lower(lowering_platforms=("cuda",))
  assert "mosaic_gpu" in lowered.as_text()
  y = call(x, plgpu.InterpretGPUParams(detect_races=True))
  np.testing.assert_array_equal(y[1], 2 * x)


def test_an_older_jax_refuses_to_promise_an_optimized_store():
  with pytest.raises(NotImplementedError, match="optimized=False"):
    jax_versions._store(None, None)


_ROW_A_THREAD = plgpu.Layout.TCGEN05_TMEM_NATIVE(4)
