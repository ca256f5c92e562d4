"""Linear attentions are the published ones, and polarized where they decay."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from flax import nnx

from ssmjax.models import (
  GLAConfig,
  HGRN2Config,
  LanguageModel,
  LinearAttentionConfig,
  ModelConfig,
  RetNetConfig,
  config_from_json,
  config_to_json,
  linear_attention,
)
from ssmjax.types import Polarization

GOLDEN = pathlib.Path(__file__).with_name("golden")
BOTH = Polarization(ones=1, zeros=1)
REPLACED = Polarization(ones=1, zeros=1, placement="replace")
# Ours, where the weights have their names, and those by name.
PROJECTIONS = ("query_projection", "key_projection", "value_projection")
QKV = ("q_proj", "k_proj", "v_proj")
PUBLISHED = {
  "elu": (LinearAttentionConfig(2), PROJECTIONS),
  "random": (
    LinearAttentionConfig(
      2, feature_map="random", num_features=8, epsilon=1e-10
    ),
    PROJECTIONS,
  ),
  "exp_mlp": (
    LinearAttentionConfig(
      2, feature_map="exp_mlp", epsilon=1e-10, head_norm=True
    ),
    QKV,
  ),
  "retnet": (RetNetConfig(2, norm="rms"), (*QKV, "g_proj")),
  "gla": (GLAConfig(2, gate_rank=5), (*QKV, "g_proj")),
  "hgrn2": (HGRN2Config(2, lower_bound=0.5), ("q_proj", "f_proj", "i_proj")),
  "hgrn2_first": (HGRN2Config(2), ("q_proj", "f_proj", "i_proj")),
}
POLARIZED = {
  "retnet": RetNetConfig(1, polarization=BOTH),
  "gla": GLAConfig(1, polarization=BOTH),
  "hgrn2": HGRN2Config(2, lower_bound=0.2, polarization=BOTH),
}
late = lambda *x: pytest.param(*x, marks=pytest.mark.nightly)


@pytest.mark.parametrize(
  "name",
  [
    *("elu", "retnet", "gla", "hgrn2"),
    *map(late, ("random", "exp_mlp", "hgrn2_first")),
  ],
)
def test_layer_gives_outputs_and_gradients_of_published_code(name, monkeypatch):
  golden = published(name)
  if name == "random":
    omega = golden["buffer:inner_attention.feature_map.omega"]
    monkeypatch.setattr(linear_attention, "_orthogonal", lambda *_: omega)

  @quick
  def run(model, x):
    weights = jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    def loss(model, x):
      y, _ = model(x)
      return (y * weights).sum(), y

    grads, y = jax.grad(loss, (0, 1), has_aux=True)(model, x)
    return y, *grads

  y, grads, d_x = run(from_golden(name), golden["inputs"])
  assert_close(y, golden["outputs"], jnp.float32)
  assert_close(d_x, golden["gradient"], jnp.float32)
  expected = arrays_of(name, "gradient")
  found = {key: parameter(grads, key)[...] for key in expected}
  for key, (axis, factor) in SHARED.get(name, {}).items():
    # Heads have weights of their own here, and there one weight.
    found[key] = factor * found[key].sum(axis, keepdims=True)
    found[key] = jnp.broadcast_to(found[key], expected[key].shape)
  assert_close(found, expected, jnp.float32)


@pytest.mark.nightly
def test_random_features_have_softmax_attentions_products_on_average():
  config = LinearAttentionConfig(
    1, feature_map="random", num_features=1 << 14, normalize=False
  )
  model = config.build(4, 1, nnx.Rngs(0))
  q, k = 0.7 * jax.random.normal(jax.random.key(0), (2, 3, 1, 4))
  found = (model._features(q, 0) * model._features(k, 1)).sum(-1)
  np.testing.assert_allclose(found, np.exp((q * k).sum(-1) / 2), rtol=0.05)


def test_random_features_are_orthogonal_and_of_the_seed_alone():
  omega = linear_attention._orthogonal(4, 6, 0)
  for block in (omega[:, :4], omega[:, 4:]):
    gram = block.T @ block
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-5)
  # A trained model's weights belong to these numbers.
  first = [1.7640524, 0.40015721, 0.97873798, 2.2408932]
  block = np.random.RandomState(0).standard_normal((4, 4))
  np.testing.assert_allclose(block[0], first, rtol=1e-6)
  cosine = block[:, 0] @ omega[:, 0] / np.linalg.norm(omega[:, 0]) ** 2
  np.testing.assert_allclose(cosine, 1, rtol=1e-6)
  assert (linear_attention._orthogonal(4, 6, 1) != omega).all()
  config = LinearAttentionConfig(feature_map="random")
  model = jax.eval_shape(lambda: config.build(8, 1, nnx.Rngs(0)))
  assert set(nnx.state(model)) == {"in_proj", "out_proj"}


@pytest.mark.parametrize(
  "feature_map", ["elu", late("random"), late("exp_mlp")]
)
def test_normalized_linear_attention_of_equal_values_is_that_value(feature_map):
  config = LinearAttentionConfig(1, feature_map=feature_map, num_features=3)
  model = config.build(4, 1, nnx.Rngs(0))
  # The last channel is one for all tokens, and alone makes the values.
  model.in_proj[...] = model.in_proj[...].at[:3, 8:].set(0)
  x = jax.random.normal(jax.random.key(1), (1, 7, 4)).at[..., 3].set(1)
  y, _ = quick(lambda model, x: model(x))(model, x)
  expected = x[..., 3:] * (model.in_proj[3:, 8:] @ model.out_proj[...])
  assert_close(y, expected, jnp.float32)


@pytest.mark.nightly
@pytest.mark.parametrize("placement", ["add", "replace"])
@pytest.mark.parametrize("name", POLARIZED)
def test_polarized_decays_are_exact_and_the_others_between(name, placement):
  held = Polarization(ones=1, zeros=1, placement=placement)
  heads = 2 if placement == "add" else 4
  config = {
    "retnet": RetNetConfig(heads, polarization=held),
    "gla": GLAConfig(2, expand_k=1.0, polarization=held),
    "hgrn2": HGRN2Config(2, lower_bound=0.2, polarization=held),
  }[name]

  @quick
  def show(key):
    x = 3 * jax.random.normal(key, (1, 5, 8))
    return config.build(8, 1, nnx.Rngs(key)).recurrence(x)

  eq1 = show(jax.random.key(0))
  # The axis of heads, or of keys.
  axis = 2 if name == "retnet" else 3
  a, b = np.moveaxis(eq1.a, axis, 0), np.moveaxis(eq1.b, axis, 0)
  assert (a[0] == 1).all()
  assert (a[-1] == 0).all()
  assert ((a[1:-1] > (0.2 if name == "hgrn2" else 0)) & (a[1:-1] < 1)).all()
  assert len(a) == (4 if name == "retnet" or placement == "replace" else 6)
  # A one-channel of key 1 - 1 would be deaf.
  assert b[0].all()
  if name == "retnet":
    expected = 1 - 2.0 ** -np.array([5, 6] if placement == "add" else [6, 7])
    np.testing.assert_allclose(a[1:-1, 0, 0, 0, 0], expected, rtol=1e-6)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["linear", *POLARIZED])
def test_layer_has_a_finite_gradient_over_four_thousand_tokens(name):
  config = POLARIZED.get(name, LinearAttentionConfig(2))
  x = jax.random.normal(jax.random.key(1), (1, 4096, 4))

  @quick
  def gradients(key, x):
    loss = lambda model, x: jnp.square(model(x)[0]).mean()
    return jax.grad(loss, (0, 1))(config.build(4, 1, nnx.Rngs(key)), x)

  for leaf in jax.tree.leaves(gradients(jax.random.key(0), x)):
    assert jnp.isfinite(leaf).all()


@pytest.mark.nightly
def test_language_model_of_all_of_them_has_gradients_and_goes_through_json():
  config = ModelConfig(
    vocab_size=17,
    d_model=8,
    n_layers=4,
    mixers=(
      LinearAttentionConfig(2, feature_map="exp_mlp", num_features=3),
      RetNetConfig(2, polarization=REPLACED),
      GLAConfig(2, polarization=BOTH, dtype=jnp.bfloat16),
      HGRN2Config(2, lower_bound=0.25, polarization=BOTH),
    ),
  )
  assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == (
    config
  )

  @quick
  def gradient(key):
    model = LanguageModel(config, rngs=nnx.Rngs(key))
    tokens = jax.random.randint(key, (2, 9), 0, 17)
    return jax.grad(lambda model: jnp.square(model(tokens)[0]).mean())(model)

  for path, leaf in jax.tree.leaves_with_path(gradient(jax.random.key(0))):
    assert jnp.isfinite(leaf).all(), path
    assert leaf.any(), path


@pytest.mark.parametrize(
  ("kind", "fields", "message"),
  [
    (
      GLAConfig,
      {"num_heads": 0},
      "GLAConfig: num_heads is 0, expected an integer",
    ),
    (
      GLAConfig,
      {"gate_rank": 0},
      "GLAConfig: gate_rank is 0, expected an integer",
    ),
    (GLAConfig, {"gate_temperature": 0}, "temperature is 0, expected a finit"),
    (RetNetConfig, {"norm": "layer"}, "norm is 'layer', expected one of 'gro"),
    (RetNetConfig, {"init": "xavier"}, "RetNetConfig: init is 'xavier', expe"),
    (HGRN2Config, {"lower_bound": 1.0}, "1.0, expected a finite number of a"),
    (LinearAttentionConfig, {"feature_map": "relu"}, "feature_map is 'relu', "),
    (LinearAttentionConfig, {"num_features": 0}, "num_features is 0, expected"),
    (
      LinearAttentionConfig,
      {"feature_map": "linear"},
      "normalize is True with",
    ),
    (
      HGRN2Config,
      {"polarization": Polarization(zeros=1, zero_decay="authors")},
      "HGRN2Config: polarization.zero_decay is 'authors', expected 'exact'",
    ),
  ],
)
def test_config_refuses_a_value_that_cannot_be(kind, fields, message):
  with pytest.raises(ValueError, match=message):
    kind(**fields)


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (HGRN2Config(3), "HGRN2: d_model=8, expected a multiple of num_heads=3."),
    (GLAConfig(8), "d_model=8 times expand_k=0.5 is 4, expected a multiple of"),
    (RetNetConfig(8), "RetNet: heads have 1 keys, expected an even number to"),
    (
      RetNetConfig(1, polarization=REPLACED),
      "replace more channels than the 1 learned",
    ),
  ],
)
def test_layer_refuses_a_width_that_its_heads_do_not_divide(config, message):
  with pytest.raises(ValueError, match=message):
    config.build(8, 1, nnx.Rngs(0))


def test_layer_refuses_inputs_of_another_width():
  message = r"HGRN2: x has shape \(1, 3, 7\), expected \(B, T, M=8\)."
  with pytest.raises(ValueError, match=message):
    from_golden("hgrn2")(jnp.zeros((1, 3, 7)))


# Parameters that published code has once for all heads, our axis of heads, and
# what a gradient by ours is to one by theirs: twice their map is ours.
SHARED = {
  "exp_mlp": {
    "norm.scale": (0, 1),
    "feature_weight": (1, 2),
    "feature_bias": (1, 2),
  },
  "gla": {"norm.scale": (0, 1)},
}


def arrays_of(name, sort):
  """The golden file's arrays of a layer by our names."""
  golden = published(name)
  get = lambda key: golden[f"{sort}:{key}"]
  parts = PUBLISHED[name][1]
  out = "out_projection" if parts is PROJECTIONS else "o_proj"
  out = "out_proj" if name == "retnet" else out
  arrays = {
    "in_proj": np.concatenate([get(f"{part}.weight") for part in parts]).T,
    "out_proj": get(f"{out}.weight").T,
  }
  by_head = lambda x, ndim: np.broadcast_to(
    np.expand_dims(x, -1 - ndim), (*x.shape[:-ndim], 2, *x.shape[-ndim:])
  )
  if name == "exp_mlp":
    pair = lambda key: np.stack(
      [get(f"feature_map_{side}.layer.{key}") for side in "qk"]
    )
    twice = 2 if sort == "weight" else 1
    weight = pair("weight").swapaxes(1, 2)
    arrays["feature_weight"] = twice * by_head(weight, 2)
    arrays["feature_bias"] = twice * by_head(pair("bias"), 1)
    arrays["norm.scale"] = by_head(get("norm.weight"), 1)
  if name == "gla":
    arrays["gate_down"] = get("gk_proj.0.weight").T
    arrays["gate_up"] = get("gk_proj.1.weight").T
    arrays["gate_bias"] = get("gk_proj.1.bias")
    arrays["norm.scale"] = by_head(get("g_norm.weight"), 1)
  if name.startswith("hgrn2"):
    arrays["norm.scale"] = get("g_norm.weight")
  if name == "hgrn2":
    arrays["bound_bias"] = get("bound").reshape(2, -1)
  return arrays


def parameter(model, key):
  return functools.reduce(getattr, key.split("."), model)


@functools.cache
def published(name):
  gated = name.startswith(("gla", "hgrn2"))
  file = "gated_linear_attention" if gated else "linear_attention"
  with np.load(GOLDEN / f"{file}.npz") as golden:
    return {
      key.removeprefix(f"{name}:"): golden[key]
      for key in golden
      if key.startswith(f"{name}:")
    }


def from_golden(name):
  build = lambda: PUBLISHED[name][0].build(8, 1, nnx.Rngs(0))
  model = quick(build)()
  for key, value in arrays_of(name, "weight").items():
    assert parameter(model, key).shape == value.shape, key
    parameter(model, key)[...] = jnp.asarray(value)
  return model
