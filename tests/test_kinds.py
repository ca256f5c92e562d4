"""Every kind of mixer in a language model, on one device and on several."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding

from experiments.recall_zoo import BOTH, SIZES
from ssmjax.models import LanguageModel, ModelConfig
from ssmjax.models.kinds import MIXERS

KINDS = pytest.mark.parametrize("kind", MIXERS)
TOKENS = jnp.arange(4 * 6).reshape(4, 6) % 16


def config_of(kind, **fields):
  mixer = MIXERS[kind](**SIZES.get(kind, {}), **fields)
  return ModelConfig(16, 64, 2, mixers=(mixer,))


def shapes_of(config):
  return jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))


@KINDS
@pytest.mark.parametrize("held", [None, BOTH], ids=["plain", "both"])
def test_kind_fits_into_a_language_model_of_stacked_layers(kind, held):
  if held and not MIXERS[kind].polarizes:
    assert "polarization" not in vars(MIXERS[kind]())
    return
  model = shapes_of(config_of(kind, **({"polarization": held} if held else {})))
  state = jax.eval_shape(lambda m: m.init_state(4, 16), model)
  run = lambda m, s: m(TOKENS, s)[1]
  step = lambda m, s: m.step(TOKENS[:, 0], s)[1]
  assert jax.eval_shape(run, model, state) == state
  assert jax.eval_shape(step, model, state) == state


def loss(model, tokens):
  return jnp.square(model(tokens)[0]).mean()


@KINDS
def test_kind_is_trained_in_a_shard_map_without_segment_ids(kind):
  mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,))
  train = jax.shard_map(
    jax.grad(loss),
    mesh=mesh,
    in_specs=(jax.P(), jax.P("data")),
    out_specs=jax.P(),
  )
  model = shapes_of(config_of(kind))
  grads = jax.eval_shape(train, model, TOKENS)
  assert jax.tree.structure(grads) == jax.tree.structure(model)


@pytest.mark.nightly
@KINDS
@pytest.mark.parametrize("known", [True, False], ids=["set_mesh", "types"])
def test_kind_takes_explicit_shardings(kind, known):
  mesh = jax.make_mesh((2,), ("data",))
  on = lambda spec: lambda x: jax.device_put(x, NamedSharding(mesh, spec))
  with jax.set_mesh(mesh) if known else contextlib.nullcontext():
    model = LanguageModel(config_of(kind), rngs=nnx.Rngs(0))
    model = jax.tree.map(on(jax.P()), model)
    grads = jax.eval_shape(jax.grad(loss), model, on(jax.P("data"))(TOKENS))
  assert jax.tree.structure(grads) == jax.tree.structure(model)


def test_kinds_are_frozen_and_say_what_runs_them():
  from ssmjax import ops

  for kind, config in MIXERS.items():
    assert dataclasses.is_dataclass(config), kind
    hash(config(**SIZES.get(kind, {})))
    assert config.op is None or callable(getattr(ops, config.op)), kind
    assert config.polarizes in ("channels", "heads", None), kind
