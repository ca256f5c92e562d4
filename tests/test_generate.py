"""Generation continues a prompt as the whole model would."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ssmjax.models import (
  Attention,
  AttentionConfig,
  LanguageModel,
  MambaConfig,
  ModelConfig,
  generate,
  prefill,
)

NEW = 4
PROMPT = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], np.int32)
quick_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@functools.cache
def model():
  config = ModelConfig(
    vocab_size=16,
    d_model=8,
    n_layers=2,
    mixers=(MambaConfig(d_state=2), AttentionConfig(max_length=2)),
  )

  def build(key):
    model = LanguageModel(config, rngs=nnx.Rngs(key))
    # Logits far enough apart that rounding cannot choose between tokens.
    return jax.tree.map(lambda x: 3 * x, model)

  return quick_jit(build)(jax.random.key(1))


@functools.cache
def greedy():
  return np.asarray(quick(PROMPT))


def quick(prompt, new=NEW, key=None, segment_ids=None, **settings):
  """`generate`, compiled quickly."""
  run = lambda model, prompt, key, segment_ids: generate(
    model, prompt, new, key=key, segment_ids=segment_ids, **settings
  )
  return quick_jit(run)(model(), prompt, key, segment_ids)


def test_greedy_tokens_are_the_likeliest_of_the_whole_forward():
  tokens = np.concatenate([PROMPT, greedy()], 1)
  logits, _ = quick_jit(lambda m, x: m(x))(model(), tokens)
  expected = jnp.argmax(logits[:, len(PROMPT[0]) - 1 : -1], -1)
  np.testing.assert_array_equal(greedy(), expected)
  assert len(np.unique(greedy())) > 2
  assert greedy().dtype == np.int32


def test_sampling_is_determined_by_its_key():
  sample = lambda seed: generate(
    model(), PROMPT, NEW, key=jax.random.key(seed), temperature=3.0
  )
  np.testing.assert_array_equal(sample(0), sample(0))
  assert (sample(0) != sample(1)).any()


def test_sampling_among_the_likeliest_one_is_greedy():
  tokens = quick(PROMPT, key=jax.random.key(0), top_k=1)
  np.testing.assert_array_equal(tokens, greedy())


def test_sampling_at_a_low_temperature_is_greedy():
  key = jax.random.key(0)
  tokens = generate(model(), PROMPT, NEW, key=key, temperature=1e-4)
  np.testing.assert_array_equal(tokens, greedy())


def test_sampling_follows_the_softmax_of_the_logits_over_temperature():
  prompt = jnp.tile(jnp.asarray(PROMPT[:1]), (4096, 1))
  key = jax.random.key(2)
  tokens = quick(prompt, 1, key, temperature=2.0, top_k=4)
  logits, _ = quick_jit(prefill)(model(), prompt[:1])
  kept = jnp.argsort(logits[0])[-4:]
  expected = np.zeros(16)
  expected[kept] = jax.nn.softmax(logits[0, kept] / 2.0)
  found = np.bincount(np.asarray(tokens[:, 0]), minlength=16) / 4096
  # Five standard errors of a frequency of 1/2.
  np.testing.assert_allclose(found, expected, atol=5 * 0.5 / 64)
  assert not found[expected == 0].any()


def test_padded_prompts_of_one_batch_go_on_as_each_alone():
  tokens = np.full((3, 7), -1, np.int32)
  segments = np.zeros((3, 7), np.int32)
  for row, (prompt, start, length) in enumerate(
    [(PROMPT[0], 2, 5), (PROMPT[1], 0, 5), (PROMPT[0], 3, 2)]
  ):
    tokens[row, start : start + length] = prompt[:length]
    segments[row, start : start + length] = 1
  found = quick(tokens, segment_ids=segments)
  np.testing.assert_array_equal(found[:2], greedy())
  alone = quick(PROMPT[:1, :2])
  np.testing.assert_array_equal(found[2:], alone)


def test_prefill_gives_the_logits_after_each_rows_last_token():
  tokens = np.concatenate([PROMPT, [[-1, 0], [9, 9]]], 1)
  segments = (np.array([[1] * 5 + [0, 0], [1] * 7])).astype(np.int32)
  padded, state = quick_jit(prefill)(model(), tokens, None, segments)
  full, _ = quick_jit(lambda m, x: m(x))(model(), np.maximum(tokens, 0))
  np.testing.assert_allclose(padded[0], full[0, 4], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(padded[1], full[1, 6], rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(state.length, [5, 7])


def test_generation_makes_room_beyond_the_configured_capacity():
  # max_length is 2, and prompt and new tokens are 9.
  assert (greedy() >= 0).all()
  state = model().init_state(2, 9)
  assert state.layers[1].keys.shape == (1, 2, 9, 1, 8)


def test_attention_beyond_its_capacity_is_nan_and_not_wrong():
  mixer = quick_jit(
    lambda key: Attention(8, AttentionConfig(), rngs=nnx.Rngs(key))
  )(jax.random.key(0))
  run = quick_jit(lambda m, x, state: m(x, state))
  x = jax.random.normal(jax.random.key(1), (1, 6, 8))
  expected, _ = run(mixer, x, None)
  state = mixer.init_state(1, 5)
  first, state = run(mixer, x[:, :3], state)
  second, state = run(mixer, x[:, 3:], state)
  found = jnp.concatenate([first, second], 1)
  np.testing.assert_allclose(found[:, :5], expected[:, :5], atol=1e-6)
  assert jnp.isnan(found[:, 5]).all()
  again, _ = run(mixer, x[:, :3], state)
  assert jnp.isnan(again).all()


def test_tokens_before_the_overflow_are_right_in_every_layer():
  config = ModelConfig(16, 8, 2, mixers=(AttentionConfig(),))
  build = lambda key: LanguageModel(config, rngs=nnx.Rngs(key))
  lm = quick_jit(build)(jax.random.key(0))
  run = quick_jit(lambda m, x, state: m(x, state))
  expected, _ = run(lm, PROMPT, lm.init_state(2, 10))
  _, state = run(lm, PROMPT[:, :3], lm.init_state(2, 4))
  found, _ = run(lm, PROMPT[:, 3:], state)
  np.testing.assert_allclose(found[:, 0], expected[:, 3], atol=1e-6)
  assert jnp.isnan(found[:, 1]).all()


def test_attention_refuses_a_piece_longer_than_its_state():
  mixer = jax.eval_shape(lambda: Attention(8, rngs=nnx.Rngs(0)))
  message = "x has 6 tokens, expected at most the state's capacity of 5"
  with pytest.raises(ValueError, match=message):
    mixer(jnp.zeros((1, 6, 8)), mixer.init_state(1, 5))


def test_token_outside_the_vocabulary_is_nan_and_not_anothers():
  run = quick_jit(lambda m, x: m(x)[0])
  for wild in (-1, -16, 16, 1 << 30):
    tokens = PROMPT.copy()
    tokens[0, -1] = wild
    logits = run(model(), tokens)
    assert jnp.isnan(logits[0, -1]).all(), wild
    assert jnp.isfinite(logits[1]).all(), wild


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"max_new_tokens": 0}, "max_new_tokens is 0, expected 1 or more"),
    ({"temperature": 0.0}, "temperature is 0.0, expected above 0"),
    ({"temperature": float("nan")}, "temperature is nan, expected above 0"),
    ({"top_k": 0}, "top_k is 0, expected 1 to vocab_size=16"),
    ({"top_k": 17}, "top_k is 17, expected 1 to vocab_size=16"),
    ({"prompt": PROMPT[0]}, r"prompt has shape \(5,\), expected \(B, T\)"),
    (
      {"segment_ids": PROMPT[:, :4]},
      r"segment_ids has shape \(2, 4\), expected \(B=2, T=5\)",
    ),
  ],
)
def test_generate_refuses_what_cannot_be(arguments, message):
  arguments = {"prompt": PROMPT, "max_new_tokens": NEW} | arguments
  with pytest.raises(ValueError, match="generate: " + message):
    generate(model(), **arguments)


def test_generate_refuses_to_run_past_learned_positions():
  config = ModelConfig(
    16, 8, 1, mixers=(AttentionConfig(positions="none"),), max_positions=7
  )
  lm = jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
  message = "max_new_tokens=4 need 8 positions, expected at most max_posi"
  with pytest.raises(ValueError, match=message):
    generate(lm, PROMPT, 4)


@pytest.mark.parametrize(
  ("tokens", "message"),
  [
    (np.zeros((1, 2, 3), np.int32), r"tokens has shape \(1, 2, 3\), expected"),
    (np.zeros((1, 0), np.int32), r"tokens has shape \(1, 0\), expected no em"),
    (np.zeros((1, 2), np.float32), "tokens has dtype float32, expected an in"),
  ],
)
def test_language_model_refuses_what_are_no_tokens(tokens, message):
  with pytest.raises(ValueError, match="LanguageModel: " + message):
    model()(tokens)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"n_layers": 3}, "n_layers is 3, expected a multiple of the pattern of 2"),
    ({"d_model": 0}, "d_model is 0, expected 1 or more"),
    ({"mlp_ratio": -1}, "mlp_ratio is -1, expected 0 or more"),
    ({"max_positions": 0}, "max_positions is 0, expected 1 or more"),
    ({"final_norm": "batch"}, "final_norm is 'batch', expected one of 'rms'"),
  ],
)
def test_model_config_refuses_what_cannot_be(fields, message):
  fields = {
    "vocab_size": 16, "d_model": 8, "n_layers": 2,
    "mixers": (MambaConfig(), AttentionConfig()),
  } | fields  # fmt: skip
  with pytest.raises(ValueError, match=message):
    ModelConfig(**fields)
