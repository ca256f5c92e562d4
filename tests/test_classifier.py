"""A classifier sees a row's tokens, and nothing of its padding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import TOLERANCE, assert_close, quick, rms_error
from flax import nnx

from ssmjax import models
from ssmjax.models import (
  AttentionConfig,
  Classifier,
  ClassifierConfig,
  MinGRUConfig,
)

LATE = pytest.mark.nightly
FEATURES = ClassifierConfig(
  3, 8, 2,
  n_features=2,
  mixers=(AttentionConfig(2),),
  mlp_ratio=1, max_positions=9,
)  # fmt: skip
TOKENS = ClassifierConfig(
  3, 8, 2,
  vocab_size=5,
  mixers=(MinGRUConfig(),),
  embedding_norm=True, final_norm="layer",
)  # fmt: skip
HYBRID = dataclasses.replace(
  FEATURES, mixers=(MinGRUConfig(), AttentionConfig(2))
)
# Whole rows, and the first five tokens with padding about and between.
IDS = np.array(
  [
    [1, 1, 1, 1, 1, 1, 1],
    [1, 1, 1, 1, 1, 0, 0],
    [0, 0, 1, 1, 1, 1, 1],
    [1, 0, 1, 1, 0, 1, 1],
  ],
  np.int32,
)
TRACES = []


@functools.cache
def model(config, seed=0):
  build = lambda key: Classifier(config, rngs=nnx.Rngs(key))
  return quick(build)(jax.random.key(seed))


@quick
def run(model, inputs, ids):
  TRACES.append(model.config)
  return model(inputs, ids)


def inputs(config, hole):
  """The same row in each company, `hole` in its padding."""
  key = jax.random.key(3)
  if config.vocab_size:
    row = np.asarray(jax.random.randint(key, (7,), 0, 5), np.int32)
  else:
    row = np.asarray(jax.random.normal(key, (7, 2)))
  rows = np.full((4, *row.shape), hole, row.dtype)
  for i, ids in enumerate(IDS):
    rows[i, ids > 0] = row[: ids.sum()]
  return jnp.asarray(rows)


@pytest.mark.parametrize(
  ("config", "hole", "pooling"),
  [
    (FEATURES, np.nan, "token"),
    (TOKENS, 99, "mean"),
    (TOKENS, 99, "last"),
    pytest.param(FEATURES, np.nan, "mean", marks=LATE),
    pytest.param(FEATURES, np.nan, "last", marks=LATE),
    pytest.param(TOKENS, 99, "token", marks=LATE),
    pytest.param(HYBRID, np.nan, "mean", marks=LATE),
  ],
)
def test_classes_do_not_depend_on_padding(config, hole, pooling):
  config = dataclasses.replace(config, pooling=pooling)
  y = run(model(config), inputs(config, hole), IDS)
  assert y.shape == (4, 3)
  assert y.dtype == jnp.float32
  assert_close(y[2], y[1])
  assert_close(y[3], y[1])
  assert rms_error(y[0], y[1]) > 1e-3
  if pooling != "last":
    # Without ids there is no padding to be seen.
    run_alone = quick(lambda m, x: m(x))
    alone = run_alone(model(config), inputs(config, hole)[1:2, :5])
    assert_close(alone[0], y[1])


@pytest.mark.parametrize(
  "pooling",
  ["token", *(pytest.param(n, marks=LATE) for n in ("mean", "last"))],
)
def test_pool_is_what_its_name_says(pooling):
  config = dataclasses.replace(FEATURES, pooling=pooling)
  made, x = model(config), inputs(FEATURES, 0.0)[:1]

  @quick
  def literal(m, x):
    x = x @ m.in_proj[...] + m.in_bias[...] + m.positions[...][:7]
    if pooling == "token":
      x = jnp.concatenate([x, m.class_token[...][None, None]], 1)
    for layer in range(2):
      x, _ = jax.tree.map(lambda leaf, i=layer: leaf[i], m.blocks[0])(x)
    x = m.norm(x)
    pooled = x.mean(1) if pooling == "mean" else x[:, -1]
    return pooled @ m.head[...] + m.head_bias[...]

  assert_close(run(made, x, IDS[:1]), literal(made, x))


def test_row_of_padding_alone_is_finite_and_so_are_gradients():
  ids = IDS.copy()
  ids[3] = 0
  x = jnp.where(ids[..., None] > 0, inputs(FEATURES, 0.0), jnp.nan)

  @quick
  @jax.value_and_grad
  def loss(model, x):
    return jnp.square(model(x, ids)).sum()

  value, grads = loss(model(FEATURES), x)
  assert jnp.isfinite(value)
  for path, grad in nnx.to_flat_state(nnx.state(grads)):
    assert jnp.isfinite(grad[...]).all(), path
    assert jnp.any(grad[...]), path


def test_classifier_in_bfloat16_is_near_and_compiles_once():
  mixers = (MinGRUConfig(dtype=jnp.bfloat16),)
  config = dataclasses.replace(TOKENS, mixers=mixers, dtype=jnp.bfloat16)
  narrow = model(config)
  x = inputs(TOKENS, 99)
  y = run(narrow, x, IDS)
  before = len(TRACES)
  again = run(model(config, 1), x, IDS)
  assert len(TRACES) == before
  assert rms_error(again, y) > 1e-3
  wide = quick(lambda m, x: m(x, IDS))(model(TOKENS), x)
  assert y.dtype == jnp.float32
  assert rms_error(y, wide) <= TOLERANCE[jnp.dtype(jnp.bfloat16)]


def test_configuration_comes_back_from_json():
  for config in (FEATURES, TOKENS):
    found = models.config_from_json(models.config_to_json(config))
    assert found == config


@pytest.mark.parametrize(
  ("build", "message"),
  [
    (lambda: ClassifierConfig(3, 8, 2), "expected one of them: tokens or"),
    (lambda: ClassifierConfig(3, 8, 2, 5, 2), "expected one of them: tokens"),
    (
      lambda: ClassifierConfig(0, 8, 2, 5),
      "n_classes is 0, expected an integer",
    ),
    (
      lambda: ClassifierConfig(3, 8, 2, 5, pooling="max"),
      "pooling is 'max', expected one of 'mean'",
    ),
    (
      lambda: ClassifierConfig(3, 8, 3, 5, mixers=(MinGRUConfig(),) * 2),
      "n_layers is 3, expected a multiple of the pattern of 2",
    ),
    (
      lambda: model(TOKENS)(jnp.zeros((1, 4))),
      "inputs has dtype float32, expected tokens of an integer type",
    ),
    (
      lambda: model(FEATURES)(jnp.zeros((1, 4, 5))),
      r"inputs has shape \(1, 4, 5\), expected \(B, T, F=2\)",
    ),
    (lambda: model(TOKENS)(jnp.zeros((1, 0), int)), "expected no empty axis"),
  ],
)
def test_classifier_refuses_what_cannot_be(build, message):
  with pytest.raises(ValueError, match=message):
    build()
