"""Generation continues a prompt as the whole model would."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from ssmjax.models import (
  Attention,
  AttentionConfig,
  GenerationState,
  LanguageModel,
  MambaConfig,
  MinGRUConfig,
  ModelConfig,
  generate,
  prefill,
  take_rows,
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


def quick(prompt, new=NEW, **settings):
  """`generate`, which compiles once for all settings of one kind."""
  return generate(model(), prompt, new, **settings)


ALL = {
  "temperature": 3.0, "top_k": 9, "top_p": 0.9, "min_p": 0.01,
  "repetition_penalty": 1.3,
}  # fmt: skip


def sampled(prompt, new=NEW, seed=0, **settings):
  """Tokens by all rules of sampling at once."""
  return quick(prompt, new, key=jax.random.key(seed), **ALL, **settings)


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
  tokens = quick(prompt, 1, key=key, temperature=2.0, top_k=4)
  logits, _ = quick_jit(prefill)(model(), prompt[:1])
  kept = jnp.argsort(logits[0])[-4:]
  expected = np.zeros(16)
  expected[kept] = jax.nn.softmax(logits[0, kept] / 2.0)
  found = np.bincount(np.asarray(tokens[:, 0]), minlength=16) / 4096
  # Five standard errors of a frequency of 1/2.
  np.testing.assert_allclose(found, expected, atol=5 * 0.5 / 64)
  assert not found[expected == 0].any()


@pytest.mark.nightly
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


def test_rows_of_any_lengths_go_on_as_each_alone_sampling_included():
  keys = jax.random.split(jax.random.key(1), 2)
  rows = [[3, 1, 4, 1, 5], [9]]
  run = lambda rows, keys: np.asarray(
    generate(model(), rows, NEW, key=keys, **ALL)
  )
  found = run(rows, keys)
  for number, row in enumerate(rows):
    alone = run([row], keys[number : number + 1])
    np.testing.assert_array_equal(found[number], alone[0])
  # An array without padding is the same prompt as a row.
  array = quick(np.array(rows[:1]), key=keys[:1], **ALL)
  np.testing.assert_array_equal(array[0], found[0])


@pytest.mark.nightly
def test_four_tokens_and_six_more_are_ten():
  stops = {"eos_id": 7, "stop": [[8, 4, 2]], "return_state": True}
  tokens, state = sampled(PROMPT, 10, **stops)
  first, state = sampled(PROMPT, 4, max_length=14, **stops)
  assert isinstance(state, GenerationState)
  np.testing.assert_array_equal(state.last, first[:, -1])
  np.testing.assert_array_equal(state.model.length, [5 + 3] * 2)
  rest, state = sampled(None, 6, state=state, **stops)
  np.testing.assert_array_equal(jnp.concatenate([first, rest], 1), tokens)


def test_conversation_goes_on_as_the_whole_text_would():
  said = np.array([[7, 7], [1, 2]], np.int32)
  # The third row is the first, which says nothing more.
  again = np.array([0, 1, 0])
  prompt, said = PROMPT[again], said[again]
  first, state = quick(prompt, 3, return_state=True, max_length=20)
  whole = np.concatenate([prompt, first, said], 1)
  ids = np.ones_like(whole)
  ids[2, -2:] = 0
  expected = quick(whole, segment_ids=ids, repetition_penalty=2.0)
  second = quick(
    said, state=state, segment_ids=ids[:, -2:], repetition_penalty=2.0
  )
  np.testing.assert_array_equal(second, expected)


@pytest.mark.nightly
def test_prefix_is_read_once_for_several_prompts():
  _, state = quick_jit(prefill)(model(), PROMPT[:1], model().init_state(1, 16))
  ends = np.array([[7, 7], [1, 2], [4, 4]], np.int32)
  found = quick(ends, state=take_rows(state, [0, 0, 0]))
  whole = np.concatenate([np.repeat(PROMPT[:1], 3, 0), ends], 1)
  np.testing.assert_array_equal(found, quick(whole))


def test_row_ends_at_its_eos_token_and_pads_from_there():
  tokens = np.asarray(greedy())
  end = int(tokens[0, 1])
  kept = np.cumsum(tokens == end, 1) - (tokens == end) == 0
  for settings, pad in [({}, end), ({"pad_id": -7}, -7)]:
    found, state = quick(
      PROMPT, eos_id=[15, end], return_state=True, **settings
    )
    pad = pad if settings else 15
    np.testing.assert_array_equal(found, np.where(kept, tokens, pad))
  # The state is that before a row's last own token.
  made = kept.sum(1)
  np.testing.assert_array_equal(state.made, made)
  np.testing.assert_array_equal(state.model.length, 5 + made - 1)
  np.testing.assert_array_equal(state.done, (tokens == end).any(1))


def test_row_ends_at_a_stop_sequence_that_was_generated():
  tokens = np.asarray(greedy())
  # The first begins with the prompt's last token, which is not of it.
  across = [5, int(tokens[0, 0])]
  stop = [across, [0, 0, 0], [int(i) for i in tokens[0, 1:3]]]
  found = np.asarray(quick(PROMPT, stop=stop, pad_id=-5))
  np.testing.assert_array_equal(found[0, :3], tokens[0, :3])
  assert found[0, 3] == -5
  np.testing.assert_array_equal(found[1], tokens[1])
  # Another call's tokens are.
  _, state = quick(PROMPT, 2, stop=stop, return_state=True, max_length=9)
  rest = np.asarray(quick(None, 2, state=state, stop=stop, pad_id=-5))
  np.testing.assert_array_equal(rest, found[:, 2:])


def test_generation_ends_when_all_rows_have_ended():
  steps = []

  def counted(model, prompt):
    step = type(model).step
    type(model).step = lambda *args: (
      jax.debug.callback(steps.append, args[2].length) or step(*args)
    )
    try:
      return generate(model, prompt, 50, eos_id=list(range(16)))
    finally:
      type(model).step = step

  tokens = quick_jit(counted)(model(), PROMPT)
  jax.effects_barrier()
  np.testing.assert_array_equal(tokens[:, 0], greedy()[:, 0])
  assert tokens.shape == (2, 50)
  assert not steps


def test_weights_that_are_nan_are_told_and_not_token_zero():
  broken = jax.tree.map(lambda x: x * jnp.nan, model())
  key = jax.random.key(0)
  found = generate(broken, PROMPT, NEW, key=key, top_k=3, eos_id=3)
  np.testing.assert_array_equal(found, np.full((2, NEW), -1))
  np.testing.assert_array_equal(generate(broken, PROMPT, NEW), found)


def test_traced_token_outside_the_vocabulary_is_told_in_its_row_alone():
  prompt = PROMPT.copy()
  prompt[0, 2] = 16
  found = quick_jit(lambda m, p: generate(m, p, NEW))(model(), prompt)
  found = np.asarray(found)
  np.testing.assert_array_equal(found[0], [-1] * NEW)
  np.testing.assert_array_equal(found[1], greedy()[1])


def test_rows_that_pad_the_vocabulary_are_never_generated():
  lm = model()
  counts = lambda found: set(np.asarray(found).flat)
  key = jax.random.key(0)
  wild = {"key": key, "temperature": 1e6}
  assert counts(quick(PROMPT, 40, **wild)) - set(range(9))
  found = quick(PROMPT, 40, **wild, vocab_size=9)
  assert counts(found) <= set(range(9))
  padded = jax.tree.map(lambda x: x, lm)
  padded.config = dataclasses.replace(lm.config, true_vocab_size=9)
  np.testing.assert_array_equal(generate(padded, PROMPT, 40, **wild), found)


def test_other_numbers_keys_and_ends_do_not_compile_anew():
  traces = []

  class Counted(LanguageModel):
    def features(self, *args, **kwargs):
      traces.append("features")
      return super().features(*args, **kwargs)

  config = ModelConfig(16, 8, 1, mixers=(MinGRUConfig(),))
  lm = Counted(config, rngs=nnx.Rngs(0))
  run = lambda seed, **settings: generate(
    lm, PROMPT, 3, key=jax.random.key(seed), **settings
  )
  run(0, temperature=0.5, top_p=0.5, min_p=0.1, eos_id=1, stop=[[1, 2]])
  first = len(traces)
  run(1, temperature=0, top_p=1, min_p=0.0, eos_id=9, stop=[[4, 2]])
  assert first
  assert len(traces) == first


def test_state_without_room_for_the_tokens_is_refused():
  lm = jax.eval_shape(model)
  first = LanguageModel.init_state(model(), 2, 9)
  message = "need 10 positions, expected at most the state's room of 9"
  with pytest.raises(ValueError, match=message):
    generate(lm, PROMPT, 6, state=first)
  with pytest.raises(ValueError, match=r"state has 2 rows, expected B=1"):
    generate(lm, PROMPT[:1], 2, state=first)


@pytest.mark.skipif(
  jax.__version_info__ < (0, 12),
  reason="the compiler of jax 0.11 ends the process",
)
def test_rows_divided_in_a_shard_map_generate_as_together():
  mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))
  run = lambda m, p: generate(m, p, NEW, eos_id=3)
  config = ModelConfig(16, 8, 1, mixers=(MinGRUConfig(),))
  lm = LanguageModel(config, rngs=nnx.Rngs(0))
  parts = jax.shard_map(
    run, mesh=mesh, in_specs=(jax.P(), jax.P("data")), out_specs=jax.P("data")
  )
  np.testing.assert_array_equal(
    quick_jit(parts)(lm, PROMPT), quick_jit(run)(lm, PROMPT)
  )


@pytest.mark.nightly
def test_rows_of_explicit_shardings_generate_as_on_one_device():
  mesh = jax.make_mesh((2,), ("data",))
  on = lambda spec: lambda x: jax.device_put(x, NamedSharding(mesh, spec))
  config = ModelConfig(16, 8, 1, mixers=(MinGRUConfig(),))
  lm = LanguageModel(config, rngs=nnx.Rngs(0))
  run = quick_jit(
    lambda m, p: generate(
      m, p, NEW, key=jax.random.key(0), stop=[[3, 3]], eos_id=3, **ALL
    )
  )
  found = run(jax.tree.map(on(jax.P()), lm), on(jax.P("data"))(PROMPT))
  np.testing.assert_array_equal(jax.device_get(found), run(lm, PROMPT))


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


@pytest.mark.nightly
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
    ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5, expected 1 or more"),
    ({"temperature": -1.0}, "temperature is -1.0, expected a finite number, 0"),
    ({"temperature": float("nan")}, "temperature is nan, expected a finite"),
    ({"top_k": 0}, "top_k is 0, expected 1 to vocab_size=16"),
    ({"top_k": 17}, "top_k is 17, expected 1 to vocab_size=16"),
    ({"top_k": True}, "top_k is True, expected 1 to vocab_size=16"),
    ({"vocab_size": 9, "top_k": 10}, "top_k is 10, expected 1 to vocab_size=9"),
    ({"vocab_size": 17}, "vocab_size is 17, expected 1 to vocab_size=16"),
    ({"top_p": 0}, "top_p is 0, expected above 0 and at most 1"),
    ({"eos_id": 16}, "eos_id has token 16, expected 0 to 15"),
    ({"eos_id": [3, -1]}, "eos_id has token -1, expected 0 to 15"),
    ({"eos_id": 1.0}, "eos_id is 1.0, expected a token of 0 to 15"),
    ({"stop": [[3], [16]]}, "stop has token 16, expected 0 to 15"),
    ({"stop": [[3], []]}, "stop has an empty sequence"),
    ({"stop": "ab"}, "stop is text and tokenizer is NoneType"),
    ({"pad_id": "x"}, "pad_id is 'x', expected an integer"),
    (
      {"max_length": 7},
      "the tokens so far, .* need 8 positions, .* max_length=7",
    ),
    ({"key": 3}, "key is a int, expected a key"),
    ({"key": jax.random.split(jax.random.key(0), 3)}, r"key has shape \(3,\)"),
    ({"state": 3}, "state is a int, expected what generate returned"),
    ({"prompt": None}, "prompt is None, expected tokens"),
    ({"prompt": "abc"}, "prompt is text and tokenizer is NoneType"),
    ({"prompt": ["abc", 3]}, "prompt is text and tokenizer is NoneType"),
    ({"prompt": [[1], []]}, "row 1 of prompt is empty, expected a token"),
    ({"prompt": [[1], [2.0]]}, "row 1 of prompt has shape .* float64"),
    ({"prompt": PROMPT * 1.0}, "prompt has dtype float64, expected an integer"),
    (
      {"prompt": PROMPT + 10},
      r"prompt has token 19 at \[1, 0\], expected 0 to",
    ),
    ({"prompt": PROMPT - 2}, r"prompt has token -1 at \[0, 1\], expected 0 to"),
    (
      {"prompt": PROMPT.astype(np.int64) + 2**32},
      r"prompt has token 4294967299 at \[0, 0\], expected 0 to 15",
    ),
    (
      {"segment_ids": np.array([[1] * 5, [0] * 5])},
      "segment_ids has no token in row 1",
    ),
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
  message = "max_new_tokens=4 need 8 positions, expected at most max_posit"
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
    ({"d_model": 0}, "d_model is 0, expected an integer of at least 1"),
    ({"mlp_ratio": -1}, "mlp_ratio is -1, expected an integer of at least 0"),
    (
      {"max_positions": 0},
      "max_positions is 0, expected an integer of at least 1",
    ),
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
