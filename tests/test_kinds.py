"""Every kind of mixer in a language model, on one device and on several."""

import contextlib
import dataclasses
import functools
import inspect
import pydoc
import re
from typing import get_args

import jax
import jax.numpy as jnp
import pytest
from checks import assert_close
from flax import nnx
from jax.sharding import AxisType, NamedSharding

from experiments.recall_zoo import BOTH, SIZES
from ssmjax.models import (
  Classifier,
  ClassifierConfig,
  LanguageModel,
  ModelConfig,
)
from ssmjax.models.kinds import MIXERS
from ssmjax.training import decay_mask

KINDS = pytest.mark.parametrize("kind", MIXERS)
LATE = {
  *("dss", "cema", "lmu", "longhorn", "mingru", "minlstm", "rwkv5"),
  *("hgrn2", "linear_attention", "retnet", "deltanet"),
}
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


# By day one of those that share an op and most of their code.
@pytest.mark.parametrize(
  "kind",
  [
    pytest.param(kind, marks=[pytest.mark.nightly] if kind in LATE else [])
    for kind in MIXERS
  ],
)
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


def test_mlp_of_the_error_function_is_trained_in_a_shard_map():
  mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,))
  config = ModelConfig(16, 8, 1, mlp_ratio=2, mlp="gelu_exact")
  train = jax.shard_map(
    jax.grad(loss),
    mesh=mesh,
    in_specs=(jax.P(), jax.P("data")),
    out_specs=jax.P(),
  )
  text = jax.jit(train).lower(shapes_of(config), TOKENS).as_text()
  assert "shard" in text


def test_classifier_takes_tokens_on_explicit_shardings():
  mesh = jax.make_mesh((2,), ("data",))
  config = ClassifierConfig(3, 8, 1, vocab_size=16)
  model = Classifier(config, rngs=nnx.Rngs(0))
  on = lambda spec: lambda x: jax.device_put(x, NamedSharding(mesh, spec))
  run = jax.jit(lambda model, tokens: model(tokens))
  wanted = run(model, TOKENS)
  actual = run(jax.tree.map(on(jax.P()), model), on(jax.P("data"))(TOKENS))
  assert jnp.allclose(jax.device_get(actual), wanted, atol=1e-5)


# What multiplies activations; anything else of a mixer sets a time scale, a
# mean of neighbours or a skip, whose zero is not neutral.
_PULLED = re.compile(
  r"C|gamma|(conv_)?weight|inner_weight|\w+_proj|\w+_(down|up)"
  r"|filter_(in|hidden|out)|embedding"
)


def pulled(tree):
  """The marked parameters' paths."""
  paths = jax.tree.leaves_with_path(decay_mask(tree))
  text = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
  return {text(path).removesuffix(".value") for path, mark in paths if mark}


@KINDS
@pytest.mark.parametrize("held", [None, BOTH], ids=["plain", "both"])
def test_weight_decay_pulls_on_projections_alone(kind, held):
  if held and not MIXERS[kind].polarizes:
    return
  fields = {"polarization": held} if held else {}
  model = shapes_of(config_of(kind, **fields))
  state = nnx.state(model)
  assert pulled(model) == pulled(state)
  variables = nnx.to_flat_state(state)
  for path, variable in variables:
    name = path[-1]
    wanted = bool(_PULLED.fullmatch(name)) and "norm" not in str(path)
    mark = ".".join(map(str, path)) in pulled(state)
    assert mark == wanted, path
    # Alone it has no name: it says itself what it is.
    assert bool(pulled({"x": variable})) == wanted, path


def test_weight_decay_pulls_on_what_is_around_the_mixers():
  config = ModelConfig(
    16, 8, 4, max_positions=9, mlp_ratio=2, mlp="swiglu", mlp_bias=True,
    tie_embeddings=False, embedding_norm=True, block_norm="layer",
  )  # fmt: skip
  model = shapes_of(config)
  around = {path for path in pulled(model) if "mixer" not in path}
  mlp = {f"blocks.0.mlp.{name}_proj" for name in ("up", "down", "gate")}
  assert around == mlp | {"embedding", "positions", "head"}
  config = ClassifierConfig(3, 8, 2, n_features=5, pooling="token")
  model = jax.eval_shape(lambda: Classifier(config, rngs=nnx.Rngs(0)))
  around = {path for path in pulled(model) if "mixer" not in path}
  assert around == {"in_proj", "head"}


@pytest.mark.parametrize("kind", ["cema", "h3", "hyena", "rglru", "s4d"])
def test_kind_writes_less_to_the_residual_of_a_deeper_model(kind):
  config = MIXERS[kind]()

  def written(depth):
    mixer = config.build(8, depth, nnx.Rngs(0))
    # Behind them may be a gate's half, which writes nothing by itself.
    return mixer.out_proj[..., :8], mixer.out_bias[..., :8]

  one, four = jax.jit(lambda: (written(1), written(4)))()
  assert_close(four, jax.tree.map(lambda v: v / 2, one))


def products(jaxpr):
  """All products of matrices in a jaxpr, those of its inner ones included."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      yield eqn
    for inner in jax.tree.leaves(eqn.params, is_leaf=has_equations):
      if has_equations(inner):
        yield from products(inner)


def has_equations(x):
  return hasattr(x, "eqns")


def stated(eqn):
  """The precision of both operands, None for the platform's."""
  precision = eqn.params["precision"]
  return precision and set(precision)


def mixer_of(kind, dtype):
  config = MIXERS[kind](**SIZES.get(kind, {}), dtype=dtype)
  return jax.eval_shape(lambda: config.build(64, 2, nnx.Rngs(0)))


# On a TPU the platform's precision takes float32 for bfloat16: what is float32
# among narrow activations has a reason, and says what becomes of it.
@KINDS
def test_kind_states_the_precision_of_what_it_widens_to_float32(kind):
  mixer = mixer_of(kind, jnp.bfloat16)
  x = jax.ShapeDtypeStruct((1, 6, 64), jnp.bfloat16)
  jaxpr = jax.make_jaxpr(lambda mixer, x: mixer(x)[0])(mixer, x)
  for eqn in products(jaxpr.jaxpr):
    dtypes = {v.aval.dtype for v in eqn.invars}
    assert stated(eqn) or jnp.dtype(jnp.float32) not in dtypes, eqn


# Products that give values or keys, too, RWKV-4's sums of both among them.
SHARED = dict.fromkeys(["mamba2", "longhorn", "mingru", "minlstm", "hgrn2"], 1)
SHARED["rwkv4"] = 2
WITH_EQ1 = [
  kind for kind, config in MIXERS.items() if config.polarizes and kind != "h3"
]


@pytest.mark.parametrize("kind", WITH_EQ1)
def test_kind_makes_its_decays_of_exact_products(kind):
  x = jax.ShapeDtypeStruct((1, 6, 64), jnp.float32)

  def decays(mixer, x):
    shown = mixer.recurrence(x)
    return shown.a, shown.dt

  jaxpr = jax.make_jaxpr(decays)(mixer_of(kind, jnp.float32), x).jaxpr
  used, exact = set(jaxpr.outvars), []
  for eqn in reversed(jaxpr.eqns):
    if not used & set(eqn.outvars):
      continue
    if next(products(jaxpr.replace(eqns=[eqn])), None):
      # The last product before a decay; what is before it may be rough.
      exact.append(stated(eqn) == {jax.lax.Precision.HIGHEST})
      continue
    used |= {v for v in eqn.invars if not hasattr(v, "val")}
  assert exact.count(False) == SHARED.get(kind, 0), exact


@pytest.mark.nightly
@KINDS
def test_kind_keeps_float32_where_float64_is_available(kind, x64):
  model = LanguageModel(config_of(kind), rngs=nnx.Rngs(0))
  kinds = lambda tree: jax.tree.map(lambda leaf: leaf.dtype, tree)
  for path, leaf in jax.tree.leaves_with_path(model):
    assert leaf.dtype == jnp.float32, path
  tokens, state = TOKENS.astype(jnp.int32), model.init_state(4, 16)
  run = lambda m, s: m(tokens, s)
  step = lambda m, s: m.step(tokens[:, 0], s)
  for apply in (run, step):
    y, new = jax.eval_shape(apply, model, state)
    assert kinds(new) == kinds(state)
    assert y.dtype == jnp.float32


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


@KINDS
def test_kind_refuses_what_its_choices_lack(kind):
  config = MIXERS[kind]
  given = SIZES.get(kind, {})
  for field in dataclasses.fields(config):
    if "Literal" in str(field.type):
      known = "None, " if type(None) in get_args(field.type) else ""
      message = rf"{config.__name__}: {field.name} is 'x', .* one of {known}'"
      with pytest.raises(ValueError, match=message):
        config(**given | {field.name: "x"})
  assert "implementation" in vars(config(**given)) or not config.op


def test_kinds_are_frozen_and_say_what_runs_them():
  from ssmjax import ops

  for kind, config in MIXERS.items():
    assert dataclasses.is_dataclass(config), kind
    hash(config(**SIZES.get(kind, {})))
    assert config.op is None or callable(getattr(ops, config.op)), kind
    assert config.polarizes in ("channels", "heads", None), kind


@pytest.mark.parametrize("made", [LanguageModel, Classifier, *MIXERS])
def test_signature_of_a_class_shows_how_it_is_made(made):
  if isinstance(made, str):
    config = MIXERS[made](**SIZES.get(made, {}))
    built = jax.eval_shape(lambda: config.build(64, 2, nnx.Rngs(0)))
    made, named = type(built), ["d_model", "config", "n_layers", "rngs"]
    # An instance shows how it is called.
    called = list(inspect.signature(built).parameters)
    assert called == ["x", "state", "segment_ids"]
  else:
    named = ["config", "rngs"]
  parameters = inspect.signature(made).parameters
  assert list(parameters) == named
  assert parameters["rngs"].kind is inspect.Parameter.KEYWORD_ONLY
  help_text = pydoc.plain(pydoc.render_doc(made))
  assert f"{made.__name__}({named[0]}: " in help_text
