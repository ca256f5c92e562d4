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
def mixer(positions="rope", window=None):
  config = AttentionConfig(HEADS, positions, max_length=512, window=window)
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


# Within a block of queries, over several of them, and as long as the row.
@pytest.mark.parametrize(
  "window",
  [280, *(pytest.param(n, marks=pytest.mark.nightly) for n in (1, 7, 300))],
)
def test_windowed_attention_equals_the_softmax_written_out(window):
  x, segment_ids = inputs()
  model = mixer(window=window)
  y, state = run(model, x, None, segment_ids)
  assert state.keys.shape[1] == window
  for row, tokens in [
    (0, slice(None)), (1, slice(90)), (1, slice(100, None))
  ]:  # fmt: skip
    expected = written_out(model, x[row, tokens], "rope", window)
    assert_close(y[row, tokens], expected, jnp.float32)
  assert not y[1, 90:100].any()


@pytest.mark.parametrize(
  "window", [5, pytest.param(40, marks=pytest.mark.nightly)]
)
def test_windowed_attention_goes_on_from_its_ring_of_keys(window):
  x, segment_ids = inputs()
  # Padding between tokens takes no room in the window.
  segment_ids = np.where(np.arange(LENGTH) % 7 == 3, 0, segment_ids)
  model = mixer(window=window)
  expected, end = run(model, x, None, segment_ids)
  state, ys = model.init_state(2), []
  for piece in jnp.split(jnp.arange(LENGTH), [14, 15]):
    y, state = run(model, x[:, piece], state, segment_ids[:, piece])
    ys.append(y)
  assert_close(jnp.concatenate(ys, 1), expected)
  assert_close(state, end, jnp.float32)


def test_windowed_attention_steps_for_as_long_as_it_likes():
  x, _ = inputs()
  model = mixer(window=4)
  expected, _ = run(model, x[:, :24], None, None)

  @quick_jit
  def steps(model, x):
    body = lambda state, x: model.step(x, state)[::-1]
    return jax.lax.scan(body, model.init_state(2), jnp.moveaxis(x, 1, 0))

  state, y = steps(model, x[:, :24])
  assert_close(jnp.moveaxis(y, 0, 1), expected)
  assert state.keys.shape[1] == 4
  np.testing.assert_array_equal(state.length, 24)


def test_windowed_attentions_gradient_is_that_of_the_masked_softmax():
  x, segment_ids = inputs()
  weights = jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

  def windowed(model, x):
    return (model(x, segment_ids=segment_ids)[0] * weights).sum()

  def plain(model, x):
    whole = [
      masked(model, x[row, tokens], 7)
      for row, tokens in [
        (0, slice(None)),
        (1, slice(90)),
        (1, slice(100, 300)),
      ]
    ]
    parts = [weights[0], weights[1, :90], weights[1, 100:]]
    return sum((y * w).sum() for y, w in zip(whole, parts, strict=True))

  model = mixer("none", 7)
  found = quick_jit(jax.grad(windowed, (0, 1)))(model, x)
  expected = quick_jit(jax.grad(plain, (0, 1)))(model, x)
  assert_close(jax.tree.leaves(found), jax.tree.leaves(expected))


def test_windowed_attentions_memory_grows_with_the_window_alone():
  model = mixer(window=64)
  loss = lambda model, x: model(x)[0].sum()

  def temporary(length):
    x = jax.ShapeDtypeStruct((1, length, WIDTH), jnp.float32)
    compiled = quick_jit(jax.grad(loss)).lower(model, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary(8192) < 2.2 * temporary(4096)
  assert temporary(8192) < 0.1 * HEADS * 8192**2 * 4


def test_attentions_gradient_keeps_no_square_of_scores():
  length = 2048
  x = jnp.zeros((1, length, WIDTH))
  loss = lambda model, x: model(x)[0].sum()
  compiled = quick_jit(jax.grad(loss)).lower(mixer(), x).compile()
  square = HEADS * length**2 * 4
  assert compiled.memory_analysis().temp_size_in_bytes < 0.75 * square


@functools.cache
def grouped(**fields):
  """Heads of another width than the model's, two for each head of keys."""
  config = AttentionConfig(
    4, num_kv_heads=2, head_dim=6, rotary_fraction=0.7, bias=True,
    out_bias=True, max_length=512, **fields,
  )  # fmt: skip

  def build(key):
    model = Attention(WIDTH, config, rngs=nnx.Rngs(key))
    bias = 0.5 + jnp.arange(model.in_bias.size) / model.in_bias.size
    model.in_bias = nnx.Param(bias)
    model.out_bias = nnx.Param(jnp.arange(WIDTH, dtype=jnp.float32))
    return model

  return quick_jit(build)(jax.random.key(2))


@pytest.mark.parametrize(
  "window", [pytest.param(None, marks=pytest.mark.nightly), 9]
)
def test_grouped_heads_turned_in_part_equal_the_softmax_written_out(window):
  x, segment_ids = inputs()
  y, state = run(grouped(window=window), x, None, segment_ids)
  assert state.keys.shape[2:] == (2, 6)
  for row, tokens in [
    (0, slice(None)), (1, slice(90)), (1, slice(100, None))
  ]:  # fmt: skip
    expected = grouped_written_out(grouped(), x[row, tokens], window)
    assert_close(y[row, tokens], expected, jnp.float32)
  assert not y[1, 90:100].any()


def grouped_written_out(model, x, window):
  """One document, `[T, M]`, head by head; four of six channels turn."""
  weight = lambda param: np.asarray(param[...], np.float64)
  x = np.asarray(x, np.float64) @ weight(model.in_proj) + weight(model.in_bias)
  length = len(x)
  heads = [x[:, 6 * i : 6 * i + 6] for i in range(8)]
  turn = np.exp(
    1j * np.outer(np.arange(length), 10_000.0 ** -np.array([0, 0.5]))
  )

  def turned(head):
    pair = (head[:, :2] + 1j * head[:, 2:4]) * turn
    return np.concatenate([pair.real, pair.imag, head[:, 4:]], 1)

  seen = np.tri(length, dtype=bool)
  if window is not None:
    seen &= ~np.tri(length, k=-window, dtype=bool)
  ys = []
  for head in range(4):
    q, k = turned(heads[head]), turned(heads[4 + head // 2])
    scores = np.where(seen, q @ k.T / np.sqrt(6), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    ys.append(weights / weights.sum(-1, keepdims=True) @ heads[6 + head // 2])
  return np.concatenate(ys, 1) @ weight(model.out_proj) + weight(model.out_bias)


@pytest.mark.parametrize(
  "window", [pytest.param(None, marks=pytest.mark.nightly), 3]
)
def test_attention_on_explicit_shardings_has_the_whole_gradient(window):
  x = inputs()[0][:, :6]
  model = grouped(window=window)

  @quick_jit
  def gradient(model, x):
    loss = lambda model, x: jnp.square(model(x)[0]).mean()
    return jax.grad(loss, (0, 1))(model, x)

  wanted = gradient(model, x)
  mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Explicit,))
  put = lambda x, *axes: jax.device_put(
    x, jax.NamedSharding(mesh, jax.P(*axes))
  )
  with jax.set_mesh(mesh):
    found = gradient(jax.tree.map(put, model), put(x, "data"))
  assert_close(jax.device_get(found), jax.device_get(wanted))


@pytest.mark.parametrize(
  ("build", "message"),
  [
    (lambda: AttentionConfig(0), "num_heads is 0, expected an integer"),
    (lambda: AttentionConfig(window=0), "window is 0, expected an integer"),
    (lambda: AttentionConfig(positions="sin"), "positions is 'sin', expected"),
    (
      lambda: AttentionConfig(4, num_kv_heads=3),
      "num_heads is 4, expected a multiple of num_kv_heads=3",
    ),
    (
      lambda: AttentionConfig(rotary_fraction=0.0),
      "rotary_fraction is 0.0, expected a finite",
    ),
    (
      lambda: Attention(8, AttentionConfig(3), rngs=nnx.Rngs(0)),
      "d_model is 8, expected a multiple of num_heads=3",
    ),
    (
      lambda: Attention(6, AttentionConfig(2), rngs=nnx.Rngs(0)),
      "heads have 3 channels to rotate, expected an even number",
    ),
  ],
)
def test_attention_refuses_sizes_that_do_not_fit(build, message):
  with pytest.raises(ValueError, match=message):
    build()


def masked(model, x, window):
  """One document without positions, `[T, M]`, every score at once."""
  length = len(x)
  qkv = (x @ model.in_proj[...]).reshape(length, 3, HEADS, -1)
  q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
  scores = jnp.einsum("qhk,shk->hqs", q, k) / np.sqrt(q.shape[-1])
  seen = np.tri(length, dtype=bool) & ~np.tri(length, k=-window, dtype=bool)
  weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1)
  y = jnp.einsum("hqs,shk->qhk", weights, v).reshape(length, WIDTH)
  return y @ model.out_proj[...]


def written_out(model, x, positions, window=None):
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
  if window is not None:
    scores[:, np.tri(length, k=-window, dtype=bool)] = -np.inf
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  y = np.einsum("hqs,shk->qhk", weights, v).reshape(length, WIDTH)
  return y @ weight(model.out_proj)
