"""A model hands over what passes through its layers, and only on request."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from flax import nnx

from ssmjax import diagnostics, theory
from ssmjax.models import (
  AttentionConfig,
  LanguageModel,
  MambaConfig,
  ModelConfig,
)

TOKENS = jnp.array([[3, 1, 4, 1, 5], [2, 6, 5, 3, 5]])
KEPT = ("mixer_input", "mixer_output", "block_output")


@functools.cache
def model():
  """Four layers of two kinds, with an MLP and learned positions."""
  mixers = (
    MambaConfig(d_state=3, implementation="associative"),
    AttentionConfig(max_length=8),
  )
  config = ModelConfig(
    vocab_size=11, d_model=4, n_layers=4, mixers=mixers, mlp_ratio=1,
    max_positions=8,
  )  # fmt: skip
  build = lambda key: LanguageModel(config, rngs=nnx.Rngs(key))
  return quick(build)(jax.random.key(0))


@quick
def shown(model, tokens, segment_ids):
  """Features, and all that is handed over."""
  out: dict = {}
  features, _ = model.features(tokens, None, segment_ids, out=out)
  return features, out


@pytest.mark.nightly
def test_what_is_handed_over_is_what_the_layers_make_one_by_one():
  built = model()
  features, out = shown(built, TOKENS, jnp.ones_like(TOKENS))
  assert set(out) == {"embeddings", *KEPT}
  for name in KEPT:
    assert out[name].shape == (4, 2, 5, 4)

  @quick
  def one_by_one(model, x):
    made = []
    for i in range(4):
      block = model.block(i)
      normed = block.norm(x)
      y, _ = block.mixer(normed)
      x, _ = block(x)
      made.append((normed, y, x))
    return model.norm(x), [jnp.stack(v) for v in zip(*made, strict=True)]

  expected, made = one_by_one(built, out["embeddings"])
  assert_close(features, expected)
  for name, value in zip(KEPT, made, strict=True):
    assert_close(out[name], value)
  with pytest.raises(ValueError, match="index is 4"):
    built.block(4)


def test_features_are_the_same_with_and_without_handing_over():
  built = model()
  segment_ids = jnp.array([[1, 1, 0, 2, 2], [1, 1, 1, 1, 1]])
  plain = quick(lambda m: m.features(TOKENS, None, segment_ids)[0])(built)
  features, out = shown(built, TOKENS, segment_ids)
  np.testing.assert_array_equal(features, plain)
  other = jnp.where(segment_ids > 0, TOKENS, 7)
  again = shown(built, other, segment_ids)[1]
  for name in KEPT:
    np.testing.assert_array_equal(out[name], again[name])


def test_handing_over_costs_nothing_when_off_and_only_what_is_used_when_on():
  built = model()

  def loops(function):
    jaxpr = jax.make_jaxpr(function)(built).jaxpr
    (loop,) = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    return loop

  def off(m):
    return m.features(TOKENS)[0]

  def unused(m):
    return m.features(TOKENS, out={})[0]

  # The loop over blocks yields the residual and the mixers' states only.
  states = len(jax.tree.leaves(jax.eval_shape(lambda: built.init_state(2))))
  assert len(loops(off).outvars) == 1 + states - 1  # `length` is outside.
  assert len(loops(unused).outvars) == 1 + states - 1 + 2 * 3
  size = lambda f: jax.jit(f).lower(built).compile().memory_analysis()
  assert size(off).temp_size_in_bytes == size(unused).temp_size_in_bytes


def test_handing_over_compiles_once():
  count = 0

  @jax.jit
  def run(model, tokens):
    nonlocal count
    count += 1
    out: dict = {}
    model.features(tokens, out=out)
    return out["mixer_input"]

  run(model(), TOKENS)
  run(jax.tree.map(lambda v: 2 * v, model()), TOKENS + 1)
  assert count == 1


def test_embeddings_take_the_place_of_the_tokens_own():
  built = model()
  features, out = shown(built, TOKENS, jnp.ones_like(TOKENS))
  run = quick(lambda m, x: m.features(jnp.zeros_like(TOKENS), embeddings=x)[0])
  assert_close(run(built, out["embeddings"]), features)
  with pytest.raises(ValueError, match="embeddings has shape"):
    built.features(TOKENS, embeddings=out["embeddings"][:, :, :2])


def test_layers_seen_through_the_model_are_their_own_eq_1():
  built = model()
  out = shown(built, TOKENS, jnp.ones_like(TOKENS))[1]

  @quick
  def look(model, mixer_input, mixer_output, block_output):
    r = model.block(2).mixer.recurrence(mixer_input[2])
    return (
      theory.outputs(r),
      diagnostics.layer_smoothness(r, mixer_output[2], block_output[2]),
    )

  y, found = look(built, *(out[name] for name in KEPT))
  assert_close(y, out["mixer_output"][2])
  assert (found.ratio.maximum <= found.hull_factor * (1 + 1e-5)).all()
  assert_close(found.block, diagnostics.sharpness(out["block_output"][2]))
