"""Attention is softmax attention, in blocks, with positions that turn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from flax import nnx

from ssmjax.models import Attention, AttentionConfig

# More than one block of queries, and not a whole number of them.
LENGTH, WIDTH, HEADS = 300, 8, 2
quick_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@functools.cache
def mixer(positions="rope"):
  config = AttentionConfig(HEADS, positions, max_length=512)
  build = lambda key: Attention(WIDTH, config, rngs=nnx.Rngs(key))
  model = quick_jit(build)(jax.random.key(0))
  # Sharp weights, so that a wrong key is seen.
  return jax.tree.map(lambda x: 3 * x, model)


@functools.cache
def inputs():
  x = jax.random.normal(jax.random.key(1), (2, LENGTH, WIDTH))
  segment_ids = np.ones((2, LENGTH), np.int32)
  segment_ids[1, 90:100], segment_ids[1, 100:] = 0, 2
  return x, segment_ids


@quick_jit
def run(model, x, state, segment_ids):
  return model(x, state, segment_ids)


@pytest.mark.parametrize("positions", ["none", "rope"])
def test_attention_equals_the_softmax_written_out(positions):
  x, segment_ids = inputs()
  y, _ = run(mixer(positions), x, None, segment_ids)
  for row, tokens in [
    (0, slice(None)), (1, slice(90)), (1, slice(100, None))
  ]:  # fmt: skip
    expected = written_out(mixer(positions), x[row, tokens], positions)
    assert_close(y[row, tokens], expected, jnp.float32)
  assert not y[1, 90:100].any()


def test_attention_in_blocks_goes_on_from_a_state():
  x, _ = inputs()
  expected, _ = run(mixer(), x, None, None)
  state = mixer().init_state(2)
  first, state = run(mixer(), x[:, :20], state, None)
  second, state = run(mixer(), x[:, 20:], state, None)
  assert_close(jnp.concatenate([first, second], 1), expected)
  np.testing.assert_array_equal(state.length, LENGTH)


def test_attentions_gradient_keeps_no_square_of_scores():
  length = 2048
  x = jnp.zeros((1, length, WIDTH))
  loss = lambda model, x: model(x)[0].sum()
  compiled = quick_jit(jax.grad(loss)).lower(mixer(), x).compile()
  square = HEADS * length**2 * 4
  assert compiled.memory_analysis().temp_size_in_bytes < 0.75 * square


@pytest.mark.parametrize(
  ("build", "message"),
  [
    (lambda: AttentionConfig(0), "num_heads is 0, expected 1 or more"),
    (lambda: AttentionConfig(positions="sin"), "positions is 'sin', expected"),
    (
      lambda: Attention(8, AttentionConfig(3), rngs=nnx.Rngs(0)),
      "d_model is 8, expected a multiple of num_heads=3",
    ),
    (
      lambda: Attention(6, AttentionConfig(2), rngs=nnx.Rngs(0)),
      "heads have 3 channels, expected an even number to rotate",
    ),
  ],
)
def test_attention_refuses_sizes_that_do_not_fit(build, message):
  with pytest.raises(ValueError, match=message):
    build()


def written_out(model, x, positions):
  """One document in NumPy, `[T, M]`; rotations as complex numbers."""
  x = np.asarray(x, np.float64)
  length, half = len(x), WIDTH // HEADS // 2
  weight = lambda param: np.asarray(param[...], np.float64)
  qkv = (x @ weight(model.in_proj)).reshape(length, 3, HEADS, 2, half)
  q, k = (qkv[:, i, :, 0] + 1j * qkv[:, i, :, 1] for i in range(2))
  v = qkv[:, 2].reshape(length, HEADS, 2 * half)
  if positions == "rope":
    frequency = 10_000.0 ** (-np.arange(half) / half)
    turn = np.exp(1j * np.arange(length)[:, None] * frequency)[:, None]
    q, k = q * turn, k * turn
  scores = np.einsum("qhk,shk->hqs", q, k.conj()).real / np.sqrt(2 * half)
  scores[:, np.triu(np.ones((length, length), bool), 1)] = -np.inf
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  y = np.einsum("hqs,shk->qhk", weights, v).reshape(length, WIDTH)
  return y @ weight(model.out_proj)
