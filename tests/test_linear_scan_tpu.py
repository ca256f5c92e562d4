"""The linear scan's TPU kernels, interpreted and lowered on a CPU."""

import functools

import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu
from linear_scan_kernels import (
  check_definition,
  check_lowering,
  check_poison,
  check_vmap,
)

from kernels_pallas import linear_scan_tpu

INTERPRET = pltpu.InterpretParams(detect_races=True)
SMALL = linear_scan_tpu.Tiling(128, 128)
check = functools.partial(check_definition, linear_scan_tpu, INTERPRET)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  "case",
  [
    pytest.param(dict(shape=(1, 1, 1)), marks=pytest.mark.nightly),
    pytest.param(dict(shape=(2, 37, 3), share=(0,)), marks=pytest.mark.nightly),
    pytest.param(
      dict(shape=(2, 7, 200), ids=True, reverse=True), marks=pytest.mark.nightly
    ),
    dict(shape=(2, 300, 5), share=(0, 1), ids=True, tiling=SMALL),
    dict(shape=(2, 256, 130), share=(1,), tiling=SMALL, reverse=True),
    pytest.param(
      dict(shape=(1, 150, 5), ids=True, tiling=SMALL, dtype="bfloat16"),
      marks=pytest.mark.nightly,
    ),
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
@pytest.mark.parametrize("length", [8, 129, 256])
def test_all_values_and_gradients_equal_the_definition(
  length, dtype, share, ids, reverse
):
  shape = (2, length, 131)
  check(shape, share, ids=ids, reverse=reverse, dtype=dtype, tiling=SMALL)


@pytest.mark.usefixtures("strict")
def test_a_document_that_overflows_stays_alone():
  ids = jnp.array([[1, 1, 1, 0, 2, 2, 2, 0, 3, 3, 3, 0]], jnp.int32)
  check_poison(linear_scan_tpu, INTERPRET, ids)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  "groups", [pytest.param(1, marks=pytest.mark.nightly), 2]
)
def test_a_mapped_axis_becomes_rows(groups):
  check_vmap(linear_scan_tpu, INTERPRET, groups)


@pytest.mark.usefixtures("strict")
def test_kernels_are_lowered_alone_sharded_mapped_and_exported(monkeypatch):
  check_lowering("tpu", monkeypatch)


def test_tiles_are_even_and_fit_what_a_kernel_is_granted():
  tiling = linear_scan_tpu.default_tiling
  assert tiling(1, 1) == linear_scan_tpu.Tiling(16, 128)
  assert tiling(1000, 640) == linear_scan_tpu.Tiling(512, 384)
  assert tiling(65536, 2048) == linear_scan_tpu.Tiling(512, 512)
  for T in range(1, 3000, 97):
    for D in range(1, 3000, 97):
      tile = tiling(T, D)
      assert tile.time % (16 if T <= 512 else 128) == tile.channels % 128 == 0
      # a, b, ȳ, ā, b̄ twice, and one state for each step.
      assert 11 * 4 * tile.time * tile.channels < 16 << 20
