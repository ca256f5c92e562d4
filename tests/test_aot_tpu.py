"""The real TPU compiler takes the models, without a TPU."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental import topologies

from ssmjax.models import (
  AttentionConfig,
  LanguageModel,
  MambaConfig,
  ModelConfig,
  generate,
  labelled_loss,
)
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


@pytest.mark.parametrize("mixer", ["mamba", "attention"])
def test_forward_compiles_for_tpus(mesh, mixer):
  mixers = {"mamba": CONFIG.mixers, "attention": (AttentionConfig(2),)}
  config = ModelConfig(512, 128, 2, mixers=mixers[mixer])
  compiled = compile_forward(lambda m, x: m(x), config, mesh)
  logits, _ = compiled.out_info
  assert logits.shape == (BATCH, LENGTH, 512)
  assert logits.dtype == jnp.float32
  assert "all-reduce" not in compiled.as_text()


@pytest.mark.nightly
def test_generation_compiles_for_tpus(mesh):
  continued = functools.partial(generate, max_new_tokens=4)
  compiled = compile_forward(continued, CONFIG, mesh)
  assert compiled.out_info.shape == (BATCH, 4)


def compile_forward(function, config, mesh):
  model = jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
  tokens = jax.ShapeDtypeStruct(
    (BATCH, LENGTH), jnp.int32, sharding=on(mesh, "data")
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
