"""The linear scan's GPU kernels, interpreted and lowered on a CPU."""

import functools

import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from linear_scan_kernels import (
  check_definition,
  check_lowering,
  check_poison,
  check_vmap,
)

from kernels_pallas import linear_scan_gpu

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
SMALL = linear_scan_gpu.Tiling(16, kept=8)
check = functools.partial(check_definition, linear_scan_gpu, INTERPRET)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  "case",
  [
    dict(shape=(1, 1, 1)),
    pytest.param(
      dict(shape=(2, 16, 3), share=(0,), tiling=SMALL),
      marks=pytest.mark.nightly,
    ),
    dict(shape=(1, 3, 200), ids=True, reverse=True),
    dict(shape=(1, 21, 5), share=(1,), tiling=SMALL, reverse=True),
    dict(shape=(2, 27, 3), ids=True, tiling=SMALL, dtype="bfloat16"),
  ],
  ids=str,
)
def test_values_and_gradients_equal_the_definition(case):
  check(**case)


@pytest.mark.nightly
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("share", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [8, 21, 32])
def test_all_values_and_gradients_equal_the_definition(
  length, dtype, share, ids, reverse
):
  shape = (2, length, 131)
  check(shape, share, ids=ids, reverse=reverse, dtype=dtype, tiling=SMALL)


@pytest.mark.usefixtures("strict")
def test_a_document_that_overflows_stays_alone():
  ids = jnp.array([[1, 1, 1, 0, 2, 2, 2, 0, 3, 3, 3, 0]], jnp.int32)
  check_poison(linear_scan_gpu, INTERPRET, ids)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  "groups", [pytest.param(1, marks=pytest.mark.nightly), 2]
)
def test_a_mapped_axis_becomes_rows(groups):
  check_vmap(linear_scan_gpu, INTERPRET, groups)


@pytest.mark.usefixtures("strict")
def test_kernels_are_lowered_alone_sharded_mapped_and_exported(monkeypatch):
  check_lowering("cuda", monkeypatch)


def test_tiles_fit_the_shared_memory_of_every_chip():
  for a in ("float32", "bfloat16"):
    for b in ("float32", "bfloat16"):
      a, b = jnp.dtype(a), jnp.dtype(b)
      tile = linear_scan_gpu.default_tiling(a, b)
      assert tile.time % tile.kept == tile.channels % 128 == 0
      step = a.itemsize + 2 * b.itemsize + 4 / tile.kept
      assert step * tile.channels * tile.time * tile.stages < 160 << 10
