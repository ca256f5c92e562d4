"""The TPU selective scan equals its definition, in every option."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from jax import export, lax
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P
from test_selective_chunked import FLOATS, NAMES, make, pull, truth

from kernels_pallas.selective_scan_tpu import forward
from kernels_pallas.selective_scan_tpu_backward import backward
from kernels_pallas.selective_scan_tpu_tiles import (
  Tiling,
  default_tiling,
  sigmoid,
  softplus,
)
from ssmjax.ops import selective_scan
from ssmjax.ops.selective_chunked_backward import backward_blocks
from ssmjax.ops.selective_chunked_forward import forward_blocks
from ssmjax.ops.selective_fused import fused
from ssmjax.types import Polarization

pytestmark = pytest.mark.usefixtures("strict")
LEAST = ("D", "z", "delta_bias", "direct", "initial_state")
# Three tiles of time, the last one short, in which a group is empty.
SMALL = dict(batch=1, length=36, channels=100, states=3)


def scan(tiling=None, **interpret):
  """The op of the two passes, interpreted and raced; memory starts as NaN."""
  mode = pltpu.InterpretParams(detect_races=True, **interpret)
  static = dict(tiling=tiling, interpret=mode)
  return fused(
    functools.partial(forward, **static), functools.partial(backward, **static)
  )


def check(args, tiling=None, *, softplus=True, ones=0, dtype=None):
  """Values and every gradient."""
  static = dict(delta_softplus=softplus, ones=ones)
  expected = truth(args, **static)
  actual = pull(scan(tiling), args, jit=quick, **static)
  assert actual[0][0].dtype == args["u"].dtype
  assert actual[0][1].dtype == jnp.float32
  for name, grad in actual[1].items():
    assert grad.dtype == args[name].dtype, name
  assert_close(actual, expected, dtype)
  return actual


@pytest.mark.parametrize(
  ("shape", "tiling", "options"),
  [
    # Everything, over tiles of time; padding and restarts at their edges too.
    ((1, 36, 100, 3), Tiling(16, 1, 3), dict(valid=True, restart=True)),
    # Nothing, over tiles of channels, the last one short; T a whole tile.
    ((2, 16, 300, 1), Tiling(16, 1, 1), dict(without=LEAST)),
    # Blocks of states, one unrolled for its one-channels, the last one short.
    ((1, 17, 9, 5), Tiling(16, 1, 2), dict(ones=1)),
    pytest.param(
      *((1, 20, 9, 7), Tiling(16, 1, 2), dict(ones=3)),
      marks=pytest.mark.nightly,
    ),
    # Two sublanes, a single token; Δ as it comes.
    ((2, 1, 130, 2), None, dict(without=("z",), softplus=False)),
    # More states than fit the registers at once; by day blocks are smaller.
    pytest.param(
      *((1, 17, 20, 17), None, dict(without=("direct",), restart=True)),
      marks=pytest.mark.nightly,
    ),
  ],
)
def test_tpu_scan_equals_the_definition(shape, tiling, options):
  options = dict(options)
  softplus, ones = options.pop("softplus", True), options.get("ones", 0)
  args = make(*shape, nan=bool(options.get("valid")), **options)
  if not softplus:
    args |= {k: jnp.abs(args[k]) for k in ("delta", "delta_bias")}
  check(args, tiling, softplus=softplus, ones=ones)


@pytest.mark.nightly
def test_tpu_scan_of_bfloat16_is_close_to_the_definition():
  args = make(**SMALL, dtype=jnp.bfloat16, valid=True, without=("direct",))
  check(args, Tiling(32, 1, 3), dtype=jnp.bfloat16)


@pytest.mark.nightly
def test_tpu_scan_holds_for_weak_and_strong_decay_and_every_step_size():
  args = make(**SMALL, without=LEAST)
  # Steps from 1e-4 to 10, rates from 1e-3 to 1e3, in one scan.
  step = jnp.logspace(-4, 1, args["delta"].size).reshape(args["delta"].shape)
  args["delta"] = jnp.log(jnp.expm1(step))
  rates = -jnp.logspace(-3, 3, args["A"].size).reshape(args["A"].shape)
  check(args | dict(A=rates), Tiling(16, 1, 3))


def test_small_steps_keep_their_relative_accuracy():
  # Δ of 1e-4 and less is softplus of -9 and less, all digits of it.
  x = jnp.linspace(-60, 60, 20001)
  wide = np.asarray(x, np.float64)
  exact = np.logaddexp(0, wide), 1 / (1 + np.exp(-wide))
  for function, expected in zip((softplus, sigmoid), exact, strict=True):
    actual = np.asarray(jax.jit(function)(x), np.float64)
    np.testing.assert_allclose(actual, expected, rtol=2e-6)


def test_a_restart_at_a_tile_edge_forgets_even_an_infinite_state():
  args = make(**SMALL, restart=True)
  edge = args["restart"].at[:, 16].set(True).at[:, 32].set(True)
  args |= dict(restart=edge)
  run = quick(functools.partial(
    scan(Tiling(16, 1, 3)), delta_softplus=True, ones=0
  ))  # fmt: skip
  infinite = args["initial_state"].at[0, 3].set(jnp.inf)
  (y, state), (bad_y, bad_state) = (
    run(**args),
    run(**args | dict(initial_state=infinite)),
  )
  np.testing.assert_array_equal(y[:, 16:], bad_y[:, 16:])
  np.testing.assert_array_equal(state, bad_state)
  assert not np.isfinite(bad_y[:, :16]).all()


def test_padding_that_is_nan_changes_not_a_bit():
  clean, dirty = (
    make(1, 20, 40, 2, valid=True, restart=True, nan=nan)
    for nan in (False, True)
  )
  form = scan(Tiling(16, 1, 2))
  static = dict(jit=lambda f: f, delta_softplus=True, ones=0)
  run = quick(functools.partial(pull, form, **static))
  expected, actual = run(clean), run(dirty)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)
  outside = ~np.asarray(clean["valid"])
  assert not np.asarray(actual[0][0])[outside].any()
  for name in ("u", "delta", "B", "C", "z", "direct"):
    assert not np.asarray(actual[1][name])[outside].any(), name


@pytest.mark.nightly
def test_vmap_over_layers_is_a_scan_with_groups():
  one = [make(2, 5, 20, 1, seed=s, valid=True) for s in range(2)]
  stacked = {
    k: None if one[0][k] is None else jnp.stack([a[k] for a in one])
    for k in NAMES
  }
  form = functools.partial(scan(), delta_softplus=True, ones=0)

  def loss(floats, valid):
    y, state = form(**floats, valid=valid, restart=None)
    return (y**2).sum() + (state**3).sum()

  floats = {k: stacked[k] for k in FLOATS}
  actual = quick(jax.vmap(jax.grad(loss)))(floats, stacked["valid"])
  for s, args in enumerate(one):
    wide = {k: args[k] for k in FLOATS}
    chunked = functools.partial(_chunked_loss, valid=args["valid"])
    assert_close(
      jax.tree.map(lambda x, s=s: x[s], actual), quick(jax.grad(chunked))(wide)
    )


@pytest.mark.parametrize(
  "inside", [pytest.param(True, marks=pytest.mark.nightly), False]
)
def test_sharded_gradients_equal_those_of_one_device(inside):
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((2,), ("data",), axis_types=auto)
  args = make(2, 5, 10, 1, valid=True)
  floats, valid = {k: args[k] for k in FLOATS}, args["valid"]
  shared = ("A", "D", "delta_bias")
  spec = {k: P() if k in shared else P("data") for k in FLOATS}
  form = functools.partial(scan(), delta_softplus=True, ones=0)

  def loss(floats, valid):
    y, state = form(**floats, valid=valid, restart=None)
    return (y**2).sum() + (state**3).sum()

  specs = (spec, P("data"))
  if inside:
    run = jax.shard_map(
      jax.grad(loss), mesh=mesh, in_specs=specs, out_specs=spec
    )
  else:
    total = lambda *a: lax.psum(loss(*a), "data")
    run = jax.grad(
      jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=P())
    )
  expected = quick(jax.grad(functools.partial(_chunked_loss, valid=valid)))
  assert_close(quick(run)(floats, valid), expected(floats))


def _chunked_loss(floats, valid):
  y, state = fused(forward_blocks, backward_blocks)(
    **floats, valid=valid, restart=None, delta_softplus=True, ones=0
  )
  return (y**2).sum() + (state**3).sum()


PUBLIC = dict(
  u=(2, 70, 300), delta=(2, 70, 300), A=(300, 4), B=(2, 70, 6), C=(2, 70, 6),
  D=(300,), z=(2, 70, 300), delta_bias=(300,),
)  # fmt: skip


def public_loss(segment_ids, /, **arrays):
  y, state = selective_scan(
    **arrays, delta_softplus=True, polarization=Polarization(1, 1),
    segment_ids=segment_ids, implementation="pallas",
  )  # fmt: skip
  return y.astype(jnp.float32).sum() + state.sum()


@pytest.mark.parametrize(
  "dtype",
  [pytest.param(jnp.float32, marks=pytest.mark.nightly), jnp.bfloat16],
)
@pytest.mark.parametrize(
  "transform",
  [
    lambda f: f,
    pytest.param(
      lambda f: lambda ids, **a: jax.grad(lambda a: f(ids, **a))(a),
      marks=pytest.mark.nightly,
    ),
    lambda f: lambda ids, **a: jax.grad(
      lambda a: jax.checkpoint(lambda a: f(ids, **a))(a)
    )(a),
    lambda f: lambda ids, **a: jax.vmap(
      jax.grad(lambda a: f(ids, **a)))(jax.tree.map(lambda x: x[None], a)),
  ],
  ids=["forward", "gradient", "remat", "vmap"],
)  # fmt: skip
def test_pallas_lowers_for_tpus_under_every_transformation(transform, dtype):
  ids = jax.ShapeDtypeStruct((2, 70), jnp.int32)
  wide = ("A", "D", "delta_bias")
  arrays = {
    k: jax.ShapeDtypeStruct(shape, jnp.float32 if k in wide else dtype)
    for k, shape in PUBLIC.items()
  }
  run = transform(public_loss)
  exported = export.export(jax.jit(run), platforms=["tpu"])(ids, **arrays)
  text = exported.mlir_module()
  assert "tpu_custom_call" in text
  assert "selective_scan_tpu_forward" in text
  differentiated = run is not public_loss
  assert ("selective_scan_tpu_backward" in text) == differentiated


def test_tiles_fit_their_memory_and_no_tile_is_for_nothing():
  for length in (1, 17, 1024, 65536):
    for channels in (1, 320, 1024, 1536, 5120):
      for states in (1, 16, 17, 256):
        tiling = default_tiling(length, channels, states)
        assert tiling.time % 16 == 0
        assert tiling.time < length + 16
        assert 1 <= tiling.states <= 16
        width = 128 * tiling.sublanes
        assert width <= 1024
        spare = -channels % width
        assert spare < 128 * -(-channels // 1024)
  assert default_tiling(1024, 1024, 256, backward=True).time >= 16


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("masks", [{}, dict(valid=True, restart=True)])
@pytest.mark.parametrize(
  ("shape", "ones"),
  [
    ((1, 64, 128, 16), 0),
    ((1, 70, 1100, 18), 2),
    ((2, 33, 320, 5), 5 - 1),
    ((1, 130, 64, 40), 17),
    ((1, 16, 8, 256), 0),
  ],
)
def test_tpu_scan_equals_the_definition_at_full_size(shape, ones, masks, dtype):
  args = make(*shape, ones=ones, dtype=dtype, nan="valid" in masks, **masks)
  check(args, ones=ones, dtype=dtype)
