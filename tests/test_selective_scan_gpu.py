"""The GPU selective scan equals its definition, in every option."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import TOLERANCE, rms_error
from jax.experimental.pallas import mosaic_gpu as plgpu
from test_selective_chunked import make, truth

from kernels_pallas import selective_scan_gpu as gpu
from kernels_pallas.selective_scan_gpu import Tiling
from ssmjax.ops.selective_fused import fused

pytestmark = pytest.mark.usefixtures("strict")


def scan(tiling=None, *, races=True, interpret=True):
  """The op of the two passes, interpreted; memory starts as NaN."""
  mode = plgpu.InterpretGPUParams(detect_races=races) if interpret else False
  static = dict(tiling=tiling, interpret=mode)
  return fused(functools.partial(gpu.forward, **static), None)


def check_values(args, tiling=None, *, softplus=True, ones=0, races=True):
  static = dict(delta_softplus=softplus, ones=ones)
  expected = truth(args, **static)[0]
  actual = scan(tiling, races=races)(**args, **static)
  limit = TOLERANCE[args["u"].dtype]
  assert actual[0].dtype == args["u"].dtype
  assert actual[1].dtype == jnp.float32
  for name, a, e, most in zip(
    ("y", "state"), actual, expected, (limit, 1e-5), strict=True
  ):
    error = rms_error(a, e)
    assert error <= most, f"{name}: error {error:.3g}"
  return actual


@pytest.mark.parametrize(
  ("shape", "tiling"),
  [
    ((1, 64, 128, 4), Tiling(lanes=2)),
    ((2, 32, 64, 16), Tiling(lanes=4, chunk=32, unroll=4)),
    ((1, 16, 128, 18), Tiling(lanes=1, chunk=8, unroll=1)),
    ((1, 19, 128, 17), Tiling(lanes=2, copies=2, unroll=1)),
    ((1, 9, 16, 40), Tiling(lanes=8)),
    ((1, 16, 5, 256), None),
    ((1, 1, 1, 1), None),
  ],
)
def test_values_equal_the_definition_at_odd_shapes(shape, tiling):
  check_values(make(*shape), tiling)


def test_channels_of_the_last_tile_are_computed():
  # Tiles overlap, and both store the same numbers: a race to the detector.
  check_values(make(1, 16, 136, 3), Tiling(lanes=2), races=False)


@pytest.mark.parametrize(
  ("without", "softplus", "ones", "masks"),
  [
    (("D", "z", "delta_bias", "direct", "initial_state"), False, 0, {}),
    (("z", "direct"), True, 0, dict(valid=True, nan=True)),
    (("D", "initial_state"), True, 1, dict(restart=True)),
    (("delta_bias",), False, 3, dict(valid=True, restart=True, nan=True)),
  ],
)
def test_values_equal_the_definition_in_its_options(
  without, softplus, ones, masks
):
  args = make(2, 21, 64, 6, without=without, ones=ones, **masks)
  if not softplus:
    args["delta"] = jnp.abs(args["delta"])
    if args["delta_bias"] is not None:
      args["delta_bias"] = jnp.abs(args["delta_bias"])
  check_values(args, softplus=softplus, ones=ones)


@pytest.mark.parametrize("step", [1e-4, 1e-2, 10.0])
@pytest.mark.parametrize("rate", [1e-3, 1.0, 100.0])
def test_values_hold_from_weak_to_strong_decay(step, rate):
  args = make(1, 32, 64, 3, without=("delta_bias",))
  before_softplus = np.log(np.expm1(step))
  args["delta"] = before_softplus + 0.1 * args["delta"]
  args["A"] = args["A"] * rate
  check_values(args)


def test_softplus_keeps_relative_precision():
  x = jnp.linspace(-80.0, 80.0, 20001, dtype=jnp.float32)
  value, slope = jax.jit(gpu.softplus)(x)
  wide = np.asarray(x, np.float64)
  expected = np.log1p(np.exp(-np.abs(wide))) + np.maximum(wide, 0)
  np.testing.assert_allclose(value, expected, rtol=6e-6)
  np.testing.assert_allclose(slope, 1 / (1 + np.exp(-wide)), rtol=6e-6)
  # Where Δ of a model lies.
  usual = (wide > -12) & (wide < 12)
  np.testing.assert_allclose(value[usual], expected[usual], rtol=1.5e-6)


def test_restart_forgets_even_an_infinite_state():
  args = make(2, 20, 64, 3, restart=True)
  args["restart"] = args["restart"].at[:, 16].set(True)
  state = args["initial_state"].at[0].set(jnp.inf)
  run = functools.partial(scan(), delta_softplus=True, ones=0)
  out, bad = run(**args), run(**args | dict(initial_state=state))
  np.testing.assert_array_equal(out[0][:, 16:], bad[0][:, 16:])
  np.testing.assert_array_equal(out[1], bad[1])


def test_bfloat16_may_be_mixed_with_float32():
  args = make(1, 24, 64, 5, dtype=jnp.bfloat16)
  check_values(args)
  args = args | dict(u=args["u"].astype(jnp.float32))
  args = args | dict(C=args["C"].astype(jnp.float32))
  check_values(args)


def test_groups_of_rows_have_their_own_rates():
  one = [make(1, 8, 64, 3, seed=s) for s in range(2)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *one)
  run = functools.partial(scan(), delta_softplus=True, ones=0)
  y, state = jax.vmap(lambda a: run(**a))(stacked)
  for i, args in enumerate(one):
    expected = run(**args)
    np.testing.assert_array_equal(y[i], expected[0])
    np.testing.assert_array_equal(state[i], expected[1])
