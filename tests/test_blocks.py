"""What a language model's options compute, against formulas written out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick, rms_error
from flax import nnx

from ssmjax import models
from ssmjax.models import (
  AttentionConfig,
  LanguageModel,
  ModelConfig,
  gather_labels,
  labelled_loss,
)

TOKENS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], np.int32)
CONFIG = ModelConfig(
  11, 6, 2,
  mixers=(AttentionConfig(num_heads=3, positions="none"),),
  mlp_ratio=2, norm_epsilon=1e-3,
)  # fmt: skip
ALL = dataclasses.replace(
  CONFIG,
  tie_embeddings=False,
  block_norm="layer",
  final_norm="layer",
  embedding_norm=True,
  embedding_scale=1.7,
  logit_softcap=0.8,
  mlp="swiglu",
  mlp_width=7,
  mlp_bias=True,
  parallel_residual=True,
)


@functools.cache
def model(config):
  """All parameters drawn, also those that begin as ones and zeros."""

  def build(key):
    made = LanguageModel(config, rngs=nnx.Rngs(0))
    leaves, tree = jax.tree.flatten(made)
    keys = jax.random.split(key, len(leaves))
    draw = lambda key, x: 0.5 * jax.random.normal(key, x.shape)
    return jax.tree.unflatten(tree, map(draw, keys, leaves))

  return quick(build)(jax.random.key(5))


def norm(kind, params, x):
  wide = np.asarray(x, np.float64)
  if kind == "layer":
    wide = wide - wide.mean(-1, keepdims=True)
  y = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-3)
  y = y * np.asarray(params.scale[...])
  return y + np.asarray(params.bias[...]) if kind == "layer" else y


def mlp(config, block, x):
  x = norm(config.block_norm, block.mlp.norm, x)
  gelu = lambda v: np.asarray(
    jax.nn.gelu(jnp.asarray(v, jnp.float32), config.mlp != "gelu_exact")
  )
  silu = lambda v: v / (1 + np.exp(-v))
  affine = lambda v, w, b: (
    v @ np.asarray(w[...]) + (0 if b is None else np.asarray(b[...]))
  )
  hidden = affine(x, block.mlp.up_proj, block.mlp.up_bias)
  if config.mlp in ("swiglu", "geglu"):
    gate = affine(x, block.mlp.gate_proj, block.mlp.gate_bias)
    hidden = hidden * (silu if config.mlp == "swiglu" else gelu)(gate)
  else:
    hidden = gelu(hidden)
  return affine(hidden, block.mlp.down_proj, block.mlp.down_bias)


def literal(config, lm):
  """Logits by NumPy, the mixer's own call apart."""
  x = np.asarray(lm.embedding[...], np.float64)[TOKENS] * config.embedding_scale
  if config.embedding_norm:
    x = norm("layer", lm.embedding_norm, x)
  mix = quick(lambda block, x: block.mixer(x)[0])
  for layer in range(config.n_layers):
    block = lm.block(layer)
    normed = norm(config.block_norm, block.norm, x)
    y = np.asarray(mix(block, jnp.asarray(normed, jnp.float32)))
    if config.parallel_residual:
      x = x + y + mlp(config, block, x)
    else:
      x = x + y
      x = x + mlp(config, block, x)
  x = norm(config.final_norm, lm.norm, x)
  table = lm.embedding if config.tie_embeddings else lm.head
  logits = x @ np.asarray(table[...]).T
  cap = config.logit_softcap
  return logits if cap is None else cap * np.tanh(logits / cap)


@pytest.mark.parametrize(
  "fields",
  [
    {},
    {"mlp": "gelu_exact", "mlp_bias": True, "mlp_width": 5, "mlp_ratio": 0},
    {"mlp": "geglu"},
    ALL.__dict__,
  ],
  ids=["plain", "exact", "geglu", "all"],
)
def test_model_computes_what_its_options_say(fields):
  config = dataclasses.replace(CONFIG, **fields)
  lm = model(config)
  run = quick(lambda lm, tokens: lm(tokens)[0])
  assert rms_error(run(lm, TOKENS), literal(config, lm)) <= 1e-5


def test_options_write_to_the_residual_at_no_padding():
  lm, pad = model(ALL), np.zeros((2, 1), np.int32)
  tokens = np.concatenate([TOKENS, pad + 99], 1)
  ids = np.concatenate([np.ones_like(TOKENS), pad], 1)
  out = quick(lambda lm: _shown(lm, tokens, ids))(lm)
  assert not out["embeddings"][:, -1].any()
  assert out["embeddings"][:, :-1].all()


def _shown(lm, tokens, ids):
  out: dict = {}
  lm.features(tokens, None, ids, out=out)
  return out


def test_labelled_loss_goes_through_the_head_and_the_soft_cap():
  labels = np.where(TOKENS % 2, TOKENS, -100)
  batch = {"tokens": TOKENS, **gather_labels(labels, 4)}

  def dense(lm):
    logits = jax.nn.log_softmax(lm(TOKENS)[0])
    chosen = jnp.take_along_axis(logits, np.maximum(labels, 0)[..., None], -1)
    return -jnp.where(labels >= 0, chosen[..., 0], 0).sum()

  lm = model(ALL)
  found = quick(jax.value_and_grad(lambda m: labelled_loss(m, batch)[0]))(lm)
  assert_close(found, quick(jax.value_and_grad(dense))(lm), jnp.float32)


def test_tied_model_has_no_head_and_plain_ones_no_new_parameters():
  lm = jax.eval_shape(lambda: LanguageModel(CONFIG, rngs=nnx.Rngs(0)))
  names = {
    jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(
      ".value"
    )
    for path, _ in jax.tree.leaves_with_path(lm)
  }
  blocks = ("norm.scale", "mixer.in_proj", "mixer.out_proj", "mlp.norm.scale")
  assert names == {
    *("embedding", "norm.scale"),
    *(f"blocks.0.{name}" for name in blocks),
    *("blocks.0.mlp.up_proj", "blocks.0.mlp.down_proj"),
  }


def test_options_come_back_from_json():
  found = models.config_from_json(models.config_to_json(ALL))
  assert found == ALL


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"mlp": "relu"}, "mlp is 'relu', expected one of 'gelu'"),
    ({"mlp_width": 0}, "mlp_width is 0, expected an integer"),
    ({"block_norm": "batch"}, "block_norm is 'batch', expected one of 'rms'"),
    ({"logit_softcap": 0.0}, "logit_softcap is 0.0, expected a finite number"),
  ],
)
def test_model_config_refuses_options_that_cannot_be(fields, message):
  with pytest.raises(ValueError, match=f"ModelConfig: {message}"):
    dataclasses.replace(CONFIG, **fields)
