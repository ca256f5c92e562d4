"""The TPU's decode step equals the definition, wherever it is taken."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from jax import export, lax
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from experiments.static_cases import CHIPS
from experiments.static_tpu import kernel_calls
from kernels_pallas.selective_step_tpu import default_tiling, forward
from ssmjax.ops import selective_step
from ssmjax.types import Polarization

pytestmark = pytest.mark.usefixtures("strict")
KERNEL, CALL = "selective_step_tpu", "tpu_custom_call"
SHARED = ("A", "D", "delta_bias")
BOTH = Polarization(ones=2, zeros=3)


def make(
  rows, channels, states, *, dtype=jnp.float32, without=(), learned=None
):
  """Arguments by name, A with as many columns as are learned."""
  keys = iter(jax.random.split(jax.random.key(0), 9))
  draw = lambda *shape: jax.random.normal(next(keys), shape)
  args = dict(
    u=draw(rows, channels), delta=draw(rows, channels),
    B=draw(rows, states), C=draw(rows, states), z=draw(rows, channels),
  )  # fmt: skip
  args = {k: x.astype(dtype) for k, x in args.items()} | dict(
    A=-jnp.exp(draw(channels, states if learned is None else learned)),
    D=draw(channels), delta_bias=draw(channels),
    state=draw(rows, channels, states),
  )  # fmt: skip
  return {k: x for k, x in args.items() if k not in without}


def kernel(args, *, tiling=None, softplus=True, polarization=None, valid=None):
  """The kernel, interpreted and raced, as the op would call it."""
  args = dict.fromkeys(("D", "z", "delta_bias")) | args
  p = polarization or Polarization()
  args["A"] = jnp.pad(args["A"], ((0, 0), (p.ones, p.zeros)))
  rows = {k: args[k] for k in ("u", "delta", "z", "B", "C")}
  y, state = forward(
    rows | dict(valid=valid, state=jnp.swapaxes(args["state"], 1, 2)),
    dict(A=args["A"].T, D=args["D"], delta_bias=args["delta_bias"]),
    delta_softplus=softplus, ones=p.ones, zeros=p.zeros, tiling=tiling,
    interpret=pltpu.InterpretParams(detect_races=True),
  )  # fmt: skip
  return y, jnp.swapaxes(state, 1, 2)


def definition(args, *, softplus=True, polarization=None, valid=None):
  """In float64."""
  wide = lambda x: None if x is None else np.asarray(x, np.float64)
  ids = None if valid is None else np.asarray(valid, np.int32)
  with jax.enable_x64(True):
    run = functools.partial(
      selective_step, delta_softplus=softplus, polarization=polarization,
      implementation="reference", segment_ids=ids,
    )  # fmt: skip
    return jax.tree.map(np.asarray, run(**jax.tree.map(wide, args)))


@pytest.mark.parametrize(
  ("shape", "tiling", "options"),
  [
    # One block; and blocks of which the last are short, with all options.
    pytest.param((2, 48, 8), None, {}, marks=pytest.mark.nightly),
    ((11, 300, 17), (8, 128), dict(polarization=BOTH, valid=True)),
    # A state of one number; nothing but the recurrence; Δ as it comes.
    ((1, 130, 1), None, dict(without=("D", "z", "delta_bias"))),
    ((3, 20, 5), None, dict(without=("z",), softplus=False, valid=True)),
    # More states than a register has sublanes and lanes.
    pytest.param(
      *((2, 24, 136), None, dict(polarization=Polarization(ones=1))),
      marks=pytest.mark.nightly,
    ),
    # Nothing but exact channels.
    ((2, 16, 5), None, dict(polarization=BOTH)),
  ],
)
@pytest.mark.parametrize(
  "dtype",
  [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.nightly)],
)
def test_tpu_step_equals_the_definition(shape, tiling, options, dtype):
  options = dict(options)
  without, valid = options.pop("without", ()), options.pop("valid", None)
  p = options.get("polarization") or Polarization()
  args = make(
    *shape, dtype=dtype, without=without, learned=shape[2] - p.ones - p.zeros
  )
  if not options.get("softplus", True):
    args |= {k: jnp.abs(args[k]) for k in ("delta", "delta_bias")}
  if valid:
    valid = jnp.arange(shape[0]) % 3 != 1
    bad = lambda x: x.at[1].set(jnp.nan)
    args |= {k: bad(args[k]) for k in ("u", "delta", "B", "C")}
  y, state = kernel(args, tiling=tiling, valid=valid, **options)
  assert (y.dtype, state.dtype) == (dtype, jnp.float32)
  expected = definition(args, valid=valid, **options)
  assert_close((y, state), expected, dtype)
  if valid is not None:
    np.testing.assert_array_equal(state[1], args["state"][1])
    assert not y[1].any()


def test_infinite_state_of_a_zero_channel_is_forgotten():
  args = make(2, 16, 8, learned=3)
  state = args["state"].at[:, :, -3:].set(jnp.inf)
  y, new = kernel(args | dict(state=state), polarization=BOTH)
  assert_close((y, new), kernel(args, polarization=BOTH))


def test_step_sizes_and_rates_of_any_size_are_exact():
  args = make(2, 64, 8)
  step = jnp.logspace(-4, 1, 128).reshape(2, 64)
  rates = -jnp.logspace(-3, 3, 512).reshape(64, 8)
  args |= dict(delta=jnp.log(jnp.expm1(step)), A=rates)
  args["delta_bias"] = jnp.zeros_like(args["delta_bias"])
  assert_close(kernel(args), definition(args), jnp.float32)


@pytest.mark.parametrize("rows", [1, 3, 8, 20, 512])
@pytest.mark.parametrize("states", [1, 16, 17, 256])
def test_blocks_are_as_even_as_the_chip_allows(rows, states):
  for channels in (8, 96, 128, 1500, 2048, 5120):
    block, lanes = default_tiling(rows, channels, states)
    assert block == rows or block % 8 == 0
    assert lanes == channels or lanes % 128 == 0
    # Two in and two out, of 16 MiB.
    assert 4 * block * -(-states // 8) * 8 * max(lanes, 128) <= 2 << 20
    # What a block is too wide for the last is less than a register for each.
    tiles = -(-channels // lanes)
    assert tiles * lanes - channels < 128 * tiles


def op(args, **static):
  return selective_step(**args, delta_softplus=True, **static)


def loss(args, **static):
  y, state = op(args, **static)
  return (y.astype(jnp.float32) ** 2).sum() + (state**3).sum()


def reference(transform):
  return transform(functools.partial(op, implementation="reference"))


def test_derivatives_are_those_of_the_definition():
  args = make(2, 6, 8)
  plain = functools.partial(loss, implementation="reference")
  pair = (args, jax.tree.map(jnp.cos, args))
  for derive in (
    lambda f: jax.grad(f)(args),
    lambda f: jax.jvp(f, *((x,) for x in pair)),
    lambda f: jax.jvp(jax.grad(f), *((x,) for x in pair)),
    lambda f: jax.grad(jax.checkpoint(f))(args),
  ):
    assert_close(
      quick(lambda d=derive: d(loss))(), quick(lambda d=derive: d(plain))()
    )


@pytest.mark.parametrize(
  "alone",
  [
    pytest.param((), marks=pytest.mark.nightly),
    SHARED,
    ("u", "state"),
    pytest.param(("A", "z"), marks=pytest.mark.nightly),
  ],
)
def test_vmap_is_more_rows(alone):
  args = make(2, 6, 8)
  axes = {k: None if k in alone else x.ndim - 1 for k, x in args.items()}
  pair = lambda k, x: x if k in alone else jnp.stack([x, jnp.cos(x)], -2)
  axes = {k: None if a is None else args[k].ndim - 1 for k, a in axes.items()}
  args = {k: pair(k, x) for k, x in args.items()}
  mapped = lambda f: jax.vmap(f, (axes,))
  assert_close(quick(mapped(op))(args), reference(mapped)(args))
  gradient = lambda f: jax.vmap(jax.grad(f), (axes,))(args)
  plain = functools.partial(loss, implementation="reference")
  assert_close(quick(lambda: gradient(loss))(), gradient(plain))
  text = lower(mapped(op), args)
  # What rows share cannot be more than one, so there the definition serves.
  assert (KERNEL in text) == all(k in alone for k in SHARED)


def lower(function, *args, platform="tpu"):
  traced = jax.jit(function).trace(*args)
  return traced.lower(lowering_platforms=(platform,)).as_text()


def test_kernel_is_taken_where_it_is_the_fastest():
  for states, taken in ((16, True), (17, False), (128, False)):
    args = make(2, 32, states)
    assert (KERNEL in lower(op, args)) == taken
  forced = functools.partial(op, implementation="pallas")
  assert KERNEL in lower(forced, args)
  args = make(2, 32, 16)
  plain = functools.partial(op, implementation="chunked")
  assert KERNEL not in lower(plain, args)
  assert KERNEL not in lower(op, args, platform="cuda")


def test_every_platform_of_an_export_has_its_own_form():
  args = make(2, 32, 16, dtype=jnp.bfloat16)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
  exported = export.export(jax.jit(op), platforms=("cpu", "tpu", "cuda"))
  exported = exported(shapes)
  assert KERNEL in exported.mlir_module()
  y, state = op(args, implementation="reference")
  assert_close(exported.call(args), (y, state))


def test_pallas_by_name_says_where_there_is_no_kernel():
  args = make(2, 32, 16)
  with pytest.raises(NotImplementedError, match="no kernel for cpu; it has"):
    op(args, implementation="pallas")
  with pytest.raises(NotImplementedError, match="state of complex64"):
    op(
      args | dict(A=lax.complex(args["A"], args["A"])), implementation="pallas"
    )
  half = {k: args[k].astype(jnp.float16) for k in ("u", "delta", "B", "C", "z")}
  with pytest.raises(NotImplementedError, match="kernel for float16"):
    op(args | half, implementation="pallas")
  with pytest.raises(ValueError, match="implementation is 'fastest'"):
    op(args, implementation="fastest")


def over_rows(mesh):
  """The op under shard_map, and its specs: rows are divided."""
  args = make(8, 32, 16)
  spec = {k: P() if k in SHARED else P("data") for k in args}
  mapped = lambda f: jax.shard_map(
    f, mesh=mesh, in_specs=(spec,), out_specs=P("data")
  )
  return args, spec, mapped


def test_step_holds_under_shard_map():
  kinds = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((8,), ("data",), axis_types=kinds)
  args, _, mapped = over_rows(mesh)
  assert_close(quick(mapped(op))(args), op(args, implementation="reference"))
  total = lambda f: (
    lambda args: sum((x**2).sum() for x in (mapped(f) if f is op else f)(args))
  )
  plain = functools.partial(op, implementation="reference")
  assert_close(
    quick(jax.grad(total(op)))(args), quick(jax.grad(total(plain)))(args)
  )


@pytest.mark.parametrize(
  "kind", [pytest.param("Auto", marks=pytest.mark.nightly), "Explicit"]
)
def test_step_of_a_divided_batch_needs_no_shard_map(kind):
  kinds = (getattr(jax.sharding.AxisType, kind),)
  mesh = jax.make_mesh((8,), ("data",), axis_types=kinds)
  args, spec, _ = over_rows(mesh)
  place = lambda x, s: jax.device_put(x, jax.NamedSharding(mesh, s))
  put = jax.tree.map(place, args, spec)
  assert_close(quick(op)(put), op(args, implementation="reference"))
  assert_close(quick(jax.grad(loss))(put), jax.grad(loss)(args))


@pytest.fixture(scope="module")
def chips():
  """A device of every TPU that the compiler knows."""
  try:
    return {
      chip: topologies.get_topology_desc(platform="tpu", topology_name=name)
      for chip, name in CHIPS["tpu"].items()
    }
  except RuntimeError as error:
    pytest.skip(f"no TPU compiler: {str(error).splitlines()[0]}")


@pytest.mark.parametrize(
  "chip",
  [
    "v5e",
    *(pytest.param(x, marks=pytest.mark.nightly) for x in ("v5p", "v6e")),
    "tpu7x",
  ],
)
@pytest.mark.parametrize(
  ("shape", "dtype", "options"),
  [
    ((8, 2048, 16), jnp.bfloat16, {}),
    ((1, 96, 8), jnp.float32, {}),
    ((20, 1500, 17), jnp.bfloat16, dict(polarization=BOTH, valid=True)),
    ((3, 5120, 256), jnp.float32, {}),
  ],
)
def test_step_compiles_for_tpus(chips, chip, shape, dtype, options):
  options = dict(options)
  p = options.get("polarization") or Polarization()
  place = jax.sharding.SingleDeviceSharding(chips[chip].devices[0])
  on = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
  make_args = functools.partial(
    make, *shape, dtype=dtype, learned=shape[2] - p.ones - p.zeros
  )
  args = jax.tree.map(on, jax.eval_shape(make_args))
  if options.pop("valid", False):
    ids = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    args["segment_ids"] = on(ids)
  rest = args.pop("state")
  run = lambda args, state: selective_step(
    **args, state=state, delta_softplus=True, implementation="pallas", **options
  )
  run = jax.jit(run, donate_argnums=1)
  compiled = run.lower(args, rest).compile()
  # Also where XLA has fused it with what makes its inputs.
  (name,) = kernel_calls(compiled.as_text())
  assert name.startswith(KERNEL)
  memory = compiled.memory_analysis()
  # The new state lies where the old one did.
  assert memory.alias_size_in_bytes >= 4 * np.prod(shape)


def test_step_on_several_tpus_is_the_kernel_where_shard_map_divides(chips):
  mesh = jax.sharding.Mesh(
    chips["v5e"].devices, ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  args, spec, mapped = over_rows(mesh)
  on = lambda x, s: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=jax.NamedSharding(mesh, s)
  )
  args = jax.tree.map(on, args, spec)
  compiled = jax.jit(mapped(op)).lower(args).compile()
  assert CALL in compiled.as_text()
  compiled = jax.jit(op).lower(args).compile()
  assert CALL not in compiled.as_text()
  with pytest.raises(NotImplementedError, match="shard_map"):
    jax.jit(functools.partial(op, implementation="pallas")).lower(args)
