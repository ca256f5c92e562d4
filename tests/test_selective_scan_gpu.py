"""The GPU selective scan equals its definition, in every option."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import TOLERANCE, rms_error
from jax import export
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P
from test_selective_chunked import FLOATS, NAMES, make, pull, truth

from kernels_pallas import selective_scan_gpu as gpu
from kernels_pallas import selective_scan_gpu_block as block
from kernels_pallas import selective_scan_gpu_chip as chip
from kernels_pallas import selective_scan_gpu_plan as planning
from kernels_pallas import selective_scan_gpu_tiling as tilings
from kernels_pallas.selective_scan_gpu import Tiling
from kernels_pallas.selective_scan_gpu_backward import backward
from ssmjax.ops.selective_fused import fused

pytestmark = pytest.mark.usefixtures("strict")
LEAST = ("D", "z", "delta_bias", "direct", "initial_state")


def scan(tiling=None, *, races=True, interpret=True):
  """The op of the two passes, interpreted; memory starts as NaN."""
  mode = plgpu.InterpretGPUParams(detect_races=races) if interpret else False
  static = dict(tiling=tiling, interpret=mode)
  return fused(
    functools.partial(gpu.forward, **static),
    functools.partial(backward, **static),
  )


def assert_near(name, actual, expected, dtype):
  error, limit = rms_error(actual, expected), TOLERANCE[jnp.dtype(dtype)]
  assert error <= limit, f"{name}: error {error:.3g} > {limit:.3g}"


def check_values(args, tiling=None, *, softplus=True, ones=0):
  static = dict(delta_softplus=softplus, ones=ones)
  expected, _ = truth(args, **static)
  y, state = scan(tiling)(**args, **static)
  assert_near("y", y, expected[0], args["u"].dtype)
  assert_near("state", state, expected[1], jnp.float32)


def check(args, tiling=None, *, softplus=True, ones=0, races=True):
  """Values and every gradient."""
  static = dict(delta_softplus=softplus, ones=ones)
  expected, expected_grads = truth(args, **static)
  (y, state), grads = pull(scan(tiling, races=races), args, **static)
  dtype = args["u"].dtype
  assert y.dtype == dtype
  assert state.dtype == jnp.float32
  assert_near("y", y, expected[0], dtype)
  assert_near("state", state, expected[1], jnp.float32)
  for name, grad in grads.items():
    assert grad.dtype == args[name].dtype, name
    assert_near(name, grad, expected_grads[name], dtype)
  return (y, state), grads


@pytest.mark.parametrize(
  ("shape", "tiling", "masks", "ones"),
  [
    pytest.param((1, 64, 128, 4), None, {}, 0, marks=pytest.mark.nightly),
    ((1, 19, 128, 17), Tiling(copies=2, unroll=1), dict(valid=True), 1),
    pytest.param(
      *((1, 9, 16, 40), Tiling(lanes=8, unroll=4), dict(restart=True), 0),
      marks=pytest.mark.nightly,
    ),
    pytest.param((2, 8, 5, 256), None, {}, 0, marks=pytest.mark.nightly),
    ((1, 1, 1, 1), None, {}, 0),
    ((1, 16, 128, 5), Tiling(lanes=1, chunk=8, stages=1), {}, 3),
    pytest.param(
      *((1, 16, 128, 18), Tiling(lanes=1, chunk=8, stages=1), {}, 3),
      marks=pytest.mark.nightly,
    ),
  ],
)
def test_scan_equals_the_definition_at_odd_shapes(shape, tiling, masks, ones):
  check(make(*shape, ones=ones, **masks), tiling, ones=ones)


def test_channels_of_the_last_tile_are_computed():
  # Tiles overlap, and both store the same numbers: a race to the detector.
  check(make(1, 16, 72, 3), Tiling(lanes=2), races=False)


def test_scan_without_options_equals_the_definition():
  args = make(1, 16, 32, 6, without=LEAST)
  args["delta"] = jnp.abs(args["delta"])
  check(args, Tiling(lanes=4, unroll=4), softplus=False)


def test_padding_that_is_nan_changes_nothing():
  clean, dirty = (
    make(1, 19, 32, 3, valid=True, restart=True, nan=nan)
    for nan in (False, True)
  )
  tiling = Tiling(lanes=4, unroll=1)
  expected = check(clean, tiling)
  static = dict(delta_softplus=True, ones=0)
  actual = pull(scan(tiling), dirty, **static)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)
  (y, _), grads = actual
  outside = ~np.asarray(clean["valid"])
  assert not np.asarray(y)[outside].any()
  for name in ("u", "delta", "B", "C", "z", "direct"):
    assert not np.asarray(grads[name])[outside].any(), name


def test_restarts_at_the_edges_of_chunks_forget_even_infinity():
  args = make(2, 24, 32, 3, restart=True)
  edges = jnp.isin(jnp.arange(24), jnp.array([8, 15, 16, 23]))
  args["restart"] = jnp.broadcast_to(edges[None], (2, 24))
  tiling = Tiling(lanes=4, chunk=8, unroll=1)
  out, _ = check(args, tiling)
  state = args["initial_state"].at[0].set(jnp.inf)
  wild = args | dict(initial_state=state)
  bad, _ = pull(scan(tiling), wild, delta_softplus=True, ones=0)
  np.testing.assert_array_equal(out[0][:, 8:], bad[0][:, 8:])
  np.testing.assert_array_equal(out[1], bad[1])


@pytest.mark.parametrize(
  ("step", "rate"),
  [
    (1e-4, 1.0),
    pytest.param(1e-4, 1e4, marks=pytest.mark.nightly),
    pytest.param(10.0, 1e-3, marks=pytest.mark.nightly),
    (10.0, 1.0),
  ],
)
def test_scan_holds_from_weak_to_strong_decay(step, rate):
  args = make(1, 32, 32, 2, without=("delta_bias", "direct"))
  before_softplus = np.log(np.expm1(step)).astype(np.float32)
  args["delta"] = before_softplus + 0.1 * args["delta"]
  args["A"] = args["A"] * np.float32(rate)
  check(args, Tiling(lanes=4))


def test_softplus_keeps_relative_precision():
  x = jnp.linspace(-80.0, 80.0, 20001, dtype=jnp.float32)
  value, slope = jax.jit(block.softplus)(x)
  wide = np.asarray(x, np.float64)
  expected = np.log1p(np.exp(-np.abs(wide))) + np.maximum(wide, 0)
  np.testing.assert_allclose(value, expected, rtol=6e-6)
  np.testing.assert_allclose(slope, 1 / (1 + np.exp(-wide)), rtol=6e-6)
  # Where Δ of a model lies.
  usual = (wide > -12) & (wide < 12)
  np.testing.assert_allclose(value[usual], expected[usual], rtol=1.5e-6)


@pytest.mark.nightly
def test_bfloat16_may_be_mixed_with_float32():
  args = make(1, 24, 64, 2, dtype=jnp.bfloat16)
  check(args)
  args = args | dict(
    u=args["u"].astype(jnp.float32), C=args["C"].astype(jnp.float32)
  )
  check_values(args)


@pytest.mark.nightly
def test_groups_of_rows_have_their_own_rates():
  one = [make(1, 8, 64, 3, seed=s) for s in range(2)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *one)
  run = functools.partial(scan(), delta_softplus=True, ones=0)
  y, state = jax.vmap(lambda a: run(**a))(stacked)
  for i, args in enumerate(one):
    expected = run(**args)
    np.testing.assert_array_equal(y[i], expected[0])
    np.testing.assert_array_equal(state[i], expected[1])


@pytest.mark.parametrize(
  ("states", "ones"), [(13, 9), pytest.param(20, 3, marks=pytest.mark.nightly)]
)
def test_a_state_too_large_for_one_backward_pass_takes_several(states, ones):
  # With 9 ones the first pass has no learned channel.
  args = make(1, 9, 32, states, ones=ones, valid=True, restart=True)
  check(args, Tiling(lanes=4, states=8, unroll=4), ones=ones)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("states", "ones"), [(200, 130), (256, 0), (129, 1)])
def test_large_states_equal_the_definition(states, ones, dtype):
  masks = dict(valid=True, restart=True)
  check(make(1, 17, 5, states, ones=ones, dtype=dtype, **masks), ones=ones)


@pytest.mark.nightly
@pytest.mark.parametrize("states", [1, 2, 7, 16, 17, 18, 32, 100])
@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("length", [7, 33, 64])
def test_scan_equals_the_definition_in_every_tiling(states, lanes, length):
  masks = dict(valid=bool(states % 2), restart=lanes % 4 == 1)
  ones = states // 3
  args = make(1, length, 128, states, ones=ones, **masks)
  check(args, Tiling(lanes=lanes, copies=1 + (lanes > 4)), ones=ones)


@pytest.mark.parametrize(
  "tiling",
  [
    lambda: Tiling(lanes=3),
    lambda: Tiling(chunk=12),
    lambda: Tiling(chunk=16, unroll=3),
    lambda: Tiling(stages=0),
    lambda: Tiling(states=0),
  ],
)
def test_tilings_that_cannot_be_are_refused(tiling):
  with pytest.raises(ValueError, match="Tiling"):
    tiling()


def test_chips_before_hopper_take_whole_copy_tiles(monkeypatch):
  monkeypatch.setattr(chip, "capability", lambda: (8, 0))
  args = make(1, 41, 20, 5, dtype=jnp.bfloat16)
  shared = dict(A=jnp.swapaxes(args["A"], 0, 1)[None])
  rows = {k: args[k] for k in ("u", "delta", "z", "direct", "valid", "restart")}
  tiling = tilings.default_tiling(5)
  plan = planning.plan(rows, shared, 0, tiling)
  assert plan.tiling.chunk % 32 == 0
  assert plan.time % 8 == 0
  assert plan.depth % 16 == 0
  assert "valid" in plan.flags


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
  ("capability", "kibibytes"),
  [
    # By day the least memory, which takes the smallest tiles.
    ((8, 6), 99),
    *(
      pytest.param(*chip, marks=pytest.mark.nightly)
      for chip in (((8, 0), 163), ((9, 0), 227), ((10, 0), 227), ((12, 0), 99))
    ),
  ],
)
def test_every_state_to_256_fits_every_chip(
  capability, kibibytes, itemsize, monkeypatch
):
  monkeypatch.setattr(chip, "capability", lambda: capability)
  for states in range(1, 257):
    for ones in {0, 1, states // 2, states - 1} - {states}:
      kept = set()
      for which in (False, True):
        tiling = tilings.default_tiling(
          states, ones=ones, itemsize=itemsize, backward=which
        )
        plan = planning.Plan(
          tiling, 1, 1, 64, 64, ones, states - ones, (), 4, 1
        )
        need = tilings.shared_bytes(plan, itemsize, which)
        assert need <= kibibytes * 1024, (states, ones, tiling)
        kept.add((tiling.lanes, tiling.chunk, tuple(plan.parts.items())))
        # What a thread holds of a state, and of A.
        most = sum(plan.parts.values()) / tiling.lanes
        assert most <= 24, (states, ones, tiling)
      assert len(kept) == 1, "the passes disagree on the states they share"


def test_a_kernel_that_does_not_fit_says_so_when_it_is_lowered(monkeypatch):
  monkeypatch.setattr(chip, "capability", lambda: (8, 6))
  run = functools.partial(loss, tiling=Tiling(lanes=2, states=256, chunk=32))
  traced = jax.jit(jax.grad(run)).trace(*arguments(1, states=64))
  expected = (
    r"selective_scan: B has N=64, .* KiB of shared memory .* expected at most"
    r" 99 KiB, as GPUs of compute capability 8.6 .* implementation='chunked'"
  )
  with pytest.raises(NotImplementedError, match=expected):
    traced.lower(lowering_platforms=("cuda",))


def test_a_sequence_too_long_to_count_says_so_when_it_is_lowered():
  floats, rest = arguments(1, length=64, states=64, without=LEAST)
  at = {"u": 2**25, "delta": 2**25, "B": 2**25, "C": 2**25}
  long = {
    k: jax.ShapeDtypeStruct((1, at[k], x.shape[2]), x.dtype) if k in at else x
    for k, x in floats.items()
  }
  traced = jax.jit(jax.grad(loss)).trace(long, rest)
  expected = r"u has B=1, T=33554432, D=64, .* 4294967296 .* Scan parts of T"
  with pytest.raises(NotImplementedError, match=expected):
    traced.lower(lowering_platforms=("cuda",))


def loss(floats, rest, tiling=None, ones=0):
  form = scan(tiling, interpret=False)
  y, state = form(**floats, **rest, delta_softplus=True, ones=ones)
  y = y.astype(jnp.float32)
  return (y * y).sum() + (state * state).sum()


def arguments(batch, length=32, states=4, without=("D", "z", "direct"), **kw):
  args = make(batch, length, 64, states, without=without, **kw)
  floats = {k: args[k] for k in FLOATS if args[k] is not None}
  return floats, {k: args[k] for k in NAMES if k not in floats}


@pytest.mark.parametrize(
  ("states", "ones", "tiling", "options"),
  [
    (17, 1, None, dict(length=35, without=(), restart=True)),
    pytest.param(
      *(1, 0, Tiling(lanes=1, unroll=1), dict(without=("z",), valid=True)),
      marks=pytest.mark.nightly,
    ),
    (30, 0, Tiling(lanes=8, unroll=1), dict(without=(), dtype=jnp.bfloat16)),
    pytest.param(
      *(256, 0, Tiling(lanes=16, unroll=1), dict(without=LEAST)),
      marks=pytest.mark.nightly,
    ),
  ],
)
def test_lowering_finds_layouts_for_odd_states(states, ones, tiling, options):
  # Interpretation does not check layouts.
  run = functools.partial(loss, tiling=tiling, ones=ones)
  floats, rest = arguments(1, states=states, ones=ones, **options)
  traced = jax.jit(jax.grad(run)).trace(floats, rest)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert "selective_scan_gpu_backward" in text


def test_lowering_for_cuda_names_both_kernels():
  gradient = jax.jit(jax.grad(loss))
  text = gradient.trace(*arguments(1)).lower(lowering_platforms=("cuda",))
  for name in ("forward", "backward"):
    assert f"selective_scan_gpu_{name}" in text.as_text()


def test_lowering_inside_shard_map_sums_the_shared_gradients():
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((8,), ("data",), axis_types=auto)
  floats, rest = arguments(8)
  shared = ("A", "D", "delta_bias")
  spec = {k: P() if k in shared else P("data") for k in floats}
  gradient = jax.shard_map(
    lambda floats: jax.grad(loss)(floats, rest),
    mesh=mesh, in_specs=(spec,), out_specs=spec, check_vma=True,
  )  # fmt: skip
  lowered = jax.jit(gradient).trace(floats).lower(lowering_platforms=("cuda",))
  text = lowered.as_text()
  assert "selective_scan_gpu_backward" in text
  assert "all_reduce" in text


def test_export_for_cuda_holds_the_kernel():
  form = functools.partial(scan(interpret=False), delta_softplus=True, ones=0)
  floats, rest = arguments(1)
  run = jax.jit(lambda floats: form(**floats, **rest))
  allowed = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
  exported = export.export(run, platforms=["cuda"], disabled_checks=allowed)
  module = exported(floats).mlir_module()
  assert "selective_scan_gpu_forward" in module
