"""The real TPU compiler takes the models and the kernels, without a TPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from experiments.static_cases import CHIPS, Case, build
from experiments.static_tpu import kernel_calls
from ssmjax.models import (
  AttentionConfig,
  LanguageModel,
  MambaConfig,
  ModelConfig,
  generate,
  labelled_loss,
)
from ssmjax.ops import linear_scan, selective_scan
from ssmjax.training import (
  adamw,
  data_mesh,
  init_state,
  make_program,
  parallel,
)
from ssmjax.types import Polarization

BATCH, LENGTH, LABELS, STEPS = 8, 256, 32, 2
CONFIG = ModelConfig(
  vocab_size=512,
  d_model=128,
  n_layers=2,
  mixers=(
    MambaConfig(polarization=Polarization(ones=1, zeros=1), dtype=jnp.bfloat16),
  ),
  dtype=jnp.bfloat16,
)

_TRACED: dict = {}


@pytest.fixture(scope="module")
def mesh():
  """Four chips of a TPU v5e that nobody has."""
  try:
    topology = topologies.get_topology_desc(
      platform="tpu", topology_name="v5e:2x2"
    )
  except RuntimeError as error:
    pytest.skip(f"no TPU compiler: {str(error).splitlines()[0]}")
  return data_mesh(topology.devices)


def test_sharded_train_step_compiles_for_tpus(mesh):
  optimizer = adamw(1e-3, clip=1.0)
  graphdef, state = abstract_state(CONFIG, optimizer)
  program = make_program(
    labelled_loss,
    optimizer,
    graphdef,
    steps=STEPS,
    seeds=(0,),
    axis="data",
    devices=mesh.size,
  )
  shape = lambda *sizes: jax.ShapeDtypeStruct(
    (STEPS, BATCH, *sizes), jnp.int32, sharding=on(mesh, None, "data")
  )
  batches = {
    "tokens": shape(LENGTH),
    "positions": shape(LABELS),
    "targets": shape(LABELS),
  }
  compiled = parallel(program, mesh).lower(put(state, mesh), batches).compile()
  assert "all-reduce" in compiled.as_text()
  memory = compiled.memory_analysis()
  # A device holds the whole state, gives it back in place, and recomputes
  # each layer: it never has two layers' [B, T, D, N] at once.
  held = nbytes(state)
  assert held <= memory.argument_size_in_bytes <= 1.5 * held
  assert memory.alias_size_in_bytes >= 0.9 * held
  scan = BATCH // mesh.size * LENGTH * 256 * 18 * 4
  assert memory.temp_size_in_bytes < 2 * scan


@pytest.mark.parametrize(
  ("mixer", "by_hand"),
  [
    pytest.param("mamba", True, marks=pytest.mark.nightly),
    ("mamba", False),
    ("attention", True),
    pytest.param("attention", False, marks=pytest.mark.nightly),
  ],
)
def test_forward_compiles_for_tpus(mesh, mixer, by_hand):
  mixers = {"mamba": CONFIG.mixers, "attention": (AttentionConfig(2),)}
  config = ModelConfig(512, 128, 2, mixers=mixers[mixer])
  compiled = compile_forward(lambda m, x: m(x)[0], config, mesh, by_hand)
  logits = compiled.out_info
  assert logits.shape == (BATCH, LENGTH, 512)
  assert logits.dtype == jnp.float32
  text = compiled.as_text()
  assert "all-reduce" not in text
  assert bool(kernel_calls(text)) == (mixer == "mamba")
  # The logits may be moved at the end, nothing before.
  assert "all-to-all" not in text


@pytest.mark.parametrize("op", ["selective_scan", "linear_scan"])
def test_kernels_under_jit_alone_stay_where_shardings_say(mesh, op, strict):
  mesh = square(mesh)
  on = lambda shape, *axes: jax.ShapeDtypeStruct(
    shape, jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(*axes))
  )
  x = on((4, 64, 512), "data", None, "model")
  if op == "linear_scan":
    run, args = linear_scan, (x, x)
  else:
    numbers = on((4, 64, 16), "data")
    run, args = selective_scan, (x, x, on((512, 16), "model"), numbers, numbers)
  total = lambda *args: sum(jnp.square(x).sum() for x in run(*args))
  pull = jax.jit(jax.grad(total, tuple(range(len(args)))))
  compiled = pull.lower(*args).compile()
  text = compiled.as_text()
  assert directions(text) == {"forward", "backward"}
  assert "f32[2,64,256]" in text
  assert not {"all-to-all", "all-gather"} & set(text.replace("(", " ").split())
  wanted = [x.sharding.spec for x in args]
  # A is summed over rows, B and C over channels, and all else stays.
  assert ("all-reduce" in text) == (op == "selective_scan")
  for spec, x in zip(wanted, compiled.out_info, strict=True):
    assert x.sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), x.ndim)


def test_a_kernel_in_a_shard_map_over_part_of_the_mesh_says_what_to_do(mesh):
  mesh = square(mesh, jax.sharding.AxisType.Auto)
  x = jax.ShapeDtypeStruct(
    (4, 64, 512), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P("data"))
  )
  run = jax.shard_map(
    lambda x: linear_scan(x, x)[0], mesh=mesh, in_specs=jax.P("data"),
    out_specs=jax.P("data"), axis_names={"data"},
  )  # fmt: skip
  with pytest.raises(NotImplementedError, match="over all axes of the mesh"):
    jax.jit(run).lower(x)


def square(mesh, kind=jax.sharding.AxisType.Explicit):
  """The mesh's chips as two by two."""
  devices = mesh.devices.reshape(2, 2)
  return jax.sharding.Mesh(devices, ("data", "model"), axis_types=(kind,) * 2)


@pytest.mark.nightly
def test_generation_compiles_for_tpus(mesh):
  continued = functools.partial(generate, max_new_tokens=4)
  compiled = compile_forward(continued, CONFIG, mesh)
  assert compiled.out_info.shape == (BATCH, 4)


@pytest.mark.parametrize(
  "dtype", [pytest.param("float32", marks=pytest.mark.nightly), "bfloat16"]
)
@pytest.mark.parametrize("op", ["selective_scan", "linear_scan"])
@pytest.mark.parametrize("chip", CHIPS["tpu"])
def test_kernels_compile_for_every_tpu(mesh, strict, op, chip, dtype):
  text = compile_case(case(chip, op, "gradient", dtype)).as_text()
  assert directions(text) == {"forward", "backward"}
  assert all(name.startswith(op) for name in kernel_calls(text))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", ["selective_scan", "linear_scan"])
def test_forward_alone_is_one_kernel(mesh, strict, op, dtype):
  text = compile_case(case("v5e", op, "forward", dtype)).as_text()
  assert len(kernel_calls(text)) == 1
  assert directions(text) == {"forward"}


@pytest.mark.parametrize(
  "op",
  [
    # By day a model takes it by default.
    pytest.param("selective_scan", marks=pytest.mark.nightly),
    "linear_scan",
  ],
)
def test_default_takes_the_kernel_from_a_cpu_host(mesh, strict, op):
  wanted = case("v5e", op, "gradient", "bfloat16")
  text = compile_case(wanted, implementation=None).as_text()
  assert directions(text) == {"forward", "backward"}


@pytest.mark.parametrize("op", ["selective_scan", "linear_scan"])
def test_kernels_compile_for_256_chips_with_the_batch_divided(mesh, strict, op):
  wanted = case("v5e", op, "gradient", "bfloat16", batch=256)
  wanted = dataclasses.replace(wanted, topology="v5e:16x16")
  compiled = compile_case(wanted)
  text = compiled.as_text()
  assert directions(text) == {"forward", "backward"}
  # What the rows share has one gradient, added up over the chips.
  assert ("all-reduce" in text) == (op == "selective_scan")
  y, _ = compiled.out_info
  assert y.sharding.shard_shape(y.shape)[0] == 1


@pytest.mark.parametrize(
  ("states", "channels"),
  [
    (17, 1000),
    pytest.param(256, 1024, marks=pytest.mark.nightly),
    pytest.param(100, 5120, marks=pytest.mark.nightly),
  ],
)
def test_odd_and_large_shapes_fit_the_memory_of_a_tpu(
  mesh, strict, states, channels
):
  """The compiler refuses a kernel that asks for more VMEM than there is."""
  shape = (1, 1001, channels, states)
  wanted = Case("v5e", "selective_scan", "gradient", "float32", shape, "mamba")
  assert directions(compile_case(wanted).as_text()) == {"forward", "backward"}


def case(chip, op, program, dtype, batch=1):
  shape = (batch, 512, 1024)
  if op == "linear_scan":
    return Case(chip, op, program, dtype, shape)
  return Case(chip, op, program, dtype, (*shape, 16), "mamba")


@pytest.fixture(autouse=True)
def nothing_kept():
  """What is compiled for a chip that is not there cannot be loaded again."""
  for on in (False, True):
    jax.config.update("jax_enable_compilation_cache", on)
    compilation_cache.reset_cache()
    if not on:
      yield


def compile_case(wanted, implementation="pallas"):
  topology = wanted.topology or CHIPS["tpu"][wanted.chip]
  found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
  devices = found.devices if wanted.topology else found.devices[:1]
  function, args = build(wanted, devices, implementation)
  # One chip's trace serves all chips: the kernel's is most of the time.
  if not wanted.topology:
    key = dataclasses.replace(wanted, chip=""), implementation
    function = _TRACED.setdefault(key, function)
  return jax.jit(function).lower(*args).compile()


def directions(text):
  """Which passes have a kernel in the compiled program."""
  return {name.split(".")[0].split("_")[-1] for name in kernel_calls(text)}


def compile_forward(function, config, mesh, by_hand=True):
  model = jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
  tokens = jax.ShapeDtypeStruct(
    (BATCH, LENGTH), jnp.int32, sharding=on(mesh, "data")
  )
  if by_hand:
    function = jax.shard_map(
      function,
      mesh=mesh,
      in_specs=(jax.P(), jax.P("data")),
      out_specs=jax.P("data"),
    )
  return jax.jit(function).lower(put(model, mesh), tokens).compile()


def abstract_state(config, optimizer):
  found = []

  def build():
    init = lambda seed: LanguageModel(config, rngs=nnx.Rngs(seed))
    graphdef, state = init_state(init, optimizer, (0,))
    found.append(graphdef)
    return state

  state = jax.eval_shape(build)
  return found[0], state


def on(mesh, *axes):
  return jax.sharding.NamedSharding(mesh, jax.P(*axes))


def put(tree, mesh):
  """Every leaf whole on every device."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on(mesh)), tree
  )


def nbytes(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
