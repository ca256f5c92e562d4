"""Scans of arrays on a mesh: divided over rows and channels, and equal."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from flax import nnx
from jax.sharding import AxisType, NamedSharding

import kernels_pallas
from ssmjax.models import LanguageModel, ModelConfig
from ssmjax.ops import linear_scan, selective_scan
from ssmjax.ops.selective_chunked_backward import backward_blocks
from ssmjax.ops.selective_chunked_forward import forward_blocks, saved_blocks
from ssmjax.types import Polarization

B, T, D, N = 4, 24, 16, 3
OPS = {"linear_scan": linear_scan, "selective_scan": selective_scan}
SPECS = {
  "rows": ("data", None, None),
  "channels": (None, None, "model"),
  "rows and channels": ("data", None, "model"),
  "all over rows": (("data", "model"), None, None),
  "time": (None, "data", None),
}


def by_day(*names):
  """All of `SPECS`, of which the others are left to the night."""
  return [
    spec if spec in names else pytest.param(spec, marks=pytest.mark.nightly)
    for spec in SPECS
  ]


KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def arrays(op):
  draw = np.random.default_rng(0)
  x = lambda *shape: jnp.asarray(draw.uniform(0.1, 0.9, shape), jnp.float32)
  if op == "linear_scan":
    args = {"a": x(B, T, D), "b": x(B, T, D), "initial_state": x(B, D)}
  else:
    args = {
      "u": x(B, T, D), "delta": x(B, T, D), "A": -x(D, N),
      "B": x(B, T, N + 2), "C": x(B, T, N + 2), "D": x(D), "z": x(B, T, D),
      "delta_bias": x(D), "initial_state": x(B, D, N + 2),
    }  # fmt: skip
  return args, jnp.asarray(np.sort(draw.integers(0, 3, (B, T)), 1))


def total(op, **options):
  if op == "selective_scan":
    options["polarization"] = Polarization(ones=1, zeros=1)

  def run(args, segment_ids):
    y, state = OPS[op](**args, segment_ids=segment_ids, **options)
    return jnp.square(y).sum() + jnp.square(state).sum()

  return run


def gradient(op, **options):
  return jax.value_and_grad(total(op, **options))


def put(args, segment_ids, mesh, spec):
  """Every array as `spec` says of rows, time and channels."""
  rows, time, channels = spec
  by_name = dict(
    A=(channels, None), D=(channels,), delta_bias=(channels,),
    B=(rows, time, None), C=(rows, time, None), segment_ids=(rows, time),
    initial_state=(rows, channels, None),
  )  # fmt: skip

  def on(name, x):
    axes = by_name.get(name, spec)[: x.ndim]
    return jax.device_put(x, NamedSharding(mesh, jax.P(*axes)))

  args = {name: on(name, x) for name, x in args.items()}
  return args, on("segment_ids", segment_ids)


@functools.cache
def expected(op):
  return quick(gradient(op))(*arrays(op))


@pytest.mark.parametrize(
  "kind", ["auto", pytest.param("explicit", marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize("spec", by_day("rows and channels", "time"))
@pytest.mark.parametrize("op", OPS)
def test_scan_under_jit_alone_is_divided_and_equal(op, spec, kind, strict):
  mesh = square(kind)
  args = put(*arrays(op), mesh, SPECS[spec])
  with known(mesh):
    actual = quick(gradient(op))(*args)
  assert_close(jax.device_get(actual), expected(op))


def square(kind):
  return jax.make_mesh((2, 2), ("data", "model"), (KINDS[kind],) * 2)


def known(mesh):
  """Explicit shardings say their mesh by themselves."""
  explicit = bool(mesh.abstract_mesh.explicit_axes)
  return contextlib.nullcontext() if explicit else jax.set_mesh(mesh)


@pytest.mark.parametrize("implementation", ["reference", "associative"])
@pytest.mark.parametrize("op", OPS)
def test_every_implementation_takes_shardings_in_types(
  op, implementation, strict
):
  mesh = square("explicit")
  run = quick(gradient(op, implementation=implementation))
  actual = run(*put(*arrays(op), mesh, SPECS["time"]))
  assert_close(jax.device_get(actual), expected(op))


@pytest.mark.parametrize("spec", by_day("rows and channels"))
@pytest.mark.parametrize("op", OPS)
def test_scan_of_arrays_on_a_mesh_that_was_not_set_is_equal(op, spec, strict):
  args = put(*arrays(op), square("auto"), SPECS[spec])
  assert_close(jax.device_get(quick(gradient(op))(*args)), expected(op))


def test_scan_whose_mesh_no_argument_has_is_divided_over_its_rows(strict):
  # Of host arrays with in_shardings, types have no mesh.
  mesh = square("auto")
  rows = NamedSharding(mesh, jax.P(("data", "model")))
  args, _ = arrays("selective_scan")
  args = {name: np.asarray(x) for name, x in args.items()}
  by_name = {
    name: rows if x.shape[0] == B else NamedSharding(mesh, jax.P())
    for name, x in args.items()
  }
  run = lambda args: total("selective_scan")(args, None)
  sharded = jax.jit(run, in_shardings=(by_name,))
  assert_close(jax.device_get(sharded(args)), jax.device_get(quick(run)(args)))


def test_scan_on_an_explicit_mesh_of_one_device_is_equal(strict):
  mesh = jax.make_mesh((1,), ("data",), (AxisType.Explicit,))
  args = put(*arrays("selective_scan"), mesh, ("data", None, None))
  actual = quick(gradient("selective_scan"))(*args)
  assert_close(jax.device_get(actual), expected("selective_scan"))


@pytest.mark.parametrize(
  "kind", [pytest.param("auto", marks=pytest.mark.nightly), "explicit"]
)
@pytest.mark.parametrize("op", OPS)
def test_stacked_models_are_divided_like_one(op, kind, strict):
  mesh = square(kind)
  args, ids = arrays(op)
  stack = lambda tree: jax.tree.map(lambda x: jnp.stack([x, x / 2]), tree)
  run = jax.vmap(gradient(op), (0, None))
  wanted = quick(run)(stack(args), ids)
  args, ids = put(args, ids, mesh, SPECS["rows"])
  with known(mesh):
    actual = quick(run)(stack(args), ids)
  assert_close(jax.device_get(actual), wanted)


@pytest.mark.parametrize("op", OPS)
def test_what_a_shard_map_leaves_open_is_left_to_the_compiler(op, strict):
  mesh = square("auto")
  args, ids = arrays(op)
  args, ids = put(args, ids, mesh, SPECS["rows"])
  rows = {name: jax.P("data") for name in args}
  rows |= dict.fromkeys({"A", "D", "delta_bias"} & set(args), jax.P())

  run = jax.shard_map(
    lambda *args: jax.lax.psum(total(op)(*args), "data"),
    mesh=mesh,
    in_specs=(rows, jax.P("data")),
    out_specs=jax.P(),
    axis_names={"data"},
  )
  actual = quick(jax.value_and_grad(run))(args, ids)
  assert_close(jax.device_get(actual), expected(op))


@pytest.mark.parametrize("kind", KINDS)
def test_a_scan_without_channels_is_divided_over_rows(kind, strict):
  mesh, x = square(kind), jnp.linspace(0, 1, B * T).reshape(B, T)
  expected = linear_scan(x, x)
  with known(mesh):
    on_mesh = jax.device_put(x, NamedSharding(mesh, jax.P("data")))
    actual = quick(linear_scan)(on_mesh, on_mesh)
  assert_close(jax.device_get(actual), expected)


@pytest.mark.parametrize("op", OPS)
def test_arrays_that_have_left_a_mesh_are_not_divided_over_it(op, strict):
  # Their types still have it: jax.device_put keeps them.
  args = put(*arrays(op), square("auto"), SPECS["rows"])
  args = jax.device_put(args, jax.devices()[0])
  assert_close(quick(gradient(op))(*args), expected(op))


@pytest.mark.parametrize("spec", by_day("rows and channels"))
@pytest.mark.parametrize(
  "stacked",
  [pytest.param(False, marks=pytest.mark.nightly), True],
  ids=["one", "stacked"],
)
def test_a_kernel_is_divided_over_rows_where_no_mesh_was_set(
  spec, stacked, blocks, strict
):
  args, ids = arrays("selective_scan")
  mesh = square("auto")
  divided, ids = put(args, ids, mesh, SPECS[spec])
  run = gradient("selective_scan")
  if stacked:
    stack = lambda tree: jax.tree.map(lambda x: jnp.stack([x, x / 2]), tree)
    run, args, divided = jax.vmap(run, (0, None)), stack(args), stack(divided)
  wanted = quick(run)(args, jax.device_put(ids, jax.devices()[0]))
  blocks.clear()
  actual = quick(run)(divided, ids)
  assert_close(jax.device_get(actual), jax.device_get(wanted))
  # Two models of four rows: their eight rows go over two devices, by model.
  assert (B if stacked else 1) in blocks


@pytest.fixture
def blocks(monkeypatch):
  """The CPU's blocks as a kernel for CPUs, and the rows it was traced for."""
  seen = []

  def watched(function):
    def run(rows, shared, **static):
      seen.append(rows["u"].shape[0])
      return function(rows, shared, **static)

    return run

  passes = kernels_pallas.Kernel(
    watched(forward_blocks), watched(backward_blocks), saved_blocks
  )
  monkeypatch.setattr(kernels_pallas, "kernels", lambda op: {"cpu": passes})
  jax.clear_caches()
  yield seen
  jax.clear_caches()


@pytest.mark.parametrize(
  "kind", ["auto", pytest.param("explicit", marks=pytest.mark.nightly)]
)
def test_a_language_model_has_its_gradient_where_no_mesh_was_set(kind):
  config = ModelConfig(64, 16, 1)
  graph, params = nnx.split(LanguageModel(config, rngs=nnx.Rngs(0)))
  tokens = jnp.arange(4 * 12).reshape(4, 12) % 64

  @quick
  @jax.value_and_grad
  def gradient(params, tokens):
    logits, _ = nnx.merge(graph, params)(tokens)
    return jnp.square(logits).mean()

  wanted = gradient(params, tokens)
  mesh = square(kind)
  put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, jax.P(*axes)))
  actual = gradient(jax.tree.map(put, params), put(tokens, "data"))
  assert_close(jax.device_get(actual), jax.device_get(wanted))
