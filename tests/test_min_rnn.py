"""minGRU and minLSTM are the paper's sequential equations."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from flax import nnx

from ssmjax.models import MinGRUConfig, MinLSTMConfig
from ssmjax.types import Polarization

BOTH = Polarization(ones=1, zeros=1)
REPLACED = Polarization(ones=1, zeros=1, placement="replace")
GOLDEN = pathlib.Path(__file__).with_name("golden") / "min_rnn.npz"
CONFIGS = {"gru": MinGRUConfig, "lstm": MinLSTMConfig}


@pytest.mark.parametrize("cell", CONFIGS)
def test_min_rnn_gives_outputs_and_gradients_of_the_code_that_others_use(cell):
  with np.load(GOLDEN) as arrays:
    golden = {
      name.removeprefix(f"{cell}:"): array for name, array in arrays.items()
    }
  model = CONFIGS[cell](expand=2).build(6, 1, nnx.Rngs(0))
  # The candidate comes first there, and there are no biases.
  order = lambda rows: np.roll(rows, -12, 0).T
  model.in_proj = nnx.Param(jnp.asarray(order(golden["in"])))
  model.in_bias = nnx.Param(jnp.zeros_like(model.in_bias[...]))
  model.out_proj = nnx.Param(jnp.asarray(golden["out"].T))

  def loss(model, x):
    y, _ = model(x)
    return (y * jnp.sin(jnp.arange(y.size)).reshape(y.shape)).sum(), y

  run = quick(jax.grad(loss, (0, 1), has_aux=True))
  (grads, d_x), y = run(model, golden["inputs"])
  assert_close(y, golden["outputs"], jnp.float32)
  assert_close(d_x, golden["gradient"], jnp.float32)
  assert_close(grads.in_proj[...], order(golden["gradient_in"]), jnp.float32)
  assert_close(grads.out_proj[...], golden["gradient_out"].T, jnp.float32)


@pytest.mark.parametrize("cell", CONFIGS)
@pytest.mark.parametrize(
  ("fields", "lengths"),
  [
    ({}, [21]),
    ({"candidate": "linear", "expand": 2, "polarization": BOTH}, [13]),
    ({"d_conv": 4, "polarization": REPLACED}, [2, 9]),
  ],
)
def test_min_rnn_equals_the_papers_sequence_in_float64(cell, fields, lengths):
  config = CONFIGS[cell](**fields)

  @quick
  def run(key, x):
    model = config.build(6, 1, nnx.Rngs(key))
    state, ys = None, []
    for piece in jnp.split(x, np.cumsum(lengths)[:-1], 1):
      y, state = model(piece, state)
      ys.append(y)
    return model, jnp.concatenate(ys, 1), state.hidden

  x = jax.random.normal(jax.random.key(1), (2, sum(lengths), 6))
  model, y, hidden = run(jax.random.key(0), x)
  expected, last = equations(cell, model, np.asarray(x, np.float64))
  assert_close(y, expected, jnp.float32)
  assert_close(hidden, last, jnp.float32)


@pytest.mark.parametrize("cell", CONFIGS)
def test_min_rnn_gradient_equals_that_of_the_papers_sequence(x64, cell):
  config = CONFIGS[cell](polarization=BOTH, implementation="chunked")
  x = jax.random.normal(jax.random.key(1), (2, 7, 4), jnp.float32)

  @quick
  def run(key, x):
    model = config.build(4, 1, nnx.Rngs(key))
    layer = lambda model, x: jnp.sin(model(x)[0]).sum()
    plain = lambda p, x: jnp.sin(sequence(cell, config, p, x, jnp)[0]).sum()
    wide = {name: v.astype(jnp.float64) for name, v in params(model).items()}
    found = jax.grad(layer, (0, 1))(model, x)
    expected = jax.grad(plain, (0, 1))(wide, x.astype(jnp.float64))
    return (params(found[0]), found[1]), expected

  found, expected = run(jax.random.key(0), x)
  assert_close(found, expected, jnp.float32)


@pytest.mark.parametrize("cell", CONFIGS)
def test_gates_are_exact_where_the_papers_quotient_is_not_a_number(cell):
  config = CONFIGS[cell](candidate="linear")

  @quick
  def run(key, bias):
    model = config.build(2, 1, nnx.Rngs(key))
    model.in_bias = nnx.Param(jnp.full_like(model.in_bias[...], bias))
    model.in_proj = nnx.Param(jnp.zeros_like(model.in_proj[...]))
    loss = lambda model: model(jnp.ones((1, 3, 2)))[0].sum()
    eq1 = model.recurrence(jnp.ones((1, 3, 2)))
    return eq1.a, eq1.dt, jax.grad(loss)(model)

  for bias in (-200.0, 200.0):
    a, dt, grads = run(jax.random.key(0), bias)
    # The minLSTM's gates are alike however small, the minGRU's one is shut.
    expected = {"lstm": 0.5, "gru": float(bias < 0)}[cell]
    np.testing.assert_allclose(a, expected, atol=1e-30)
    np.testing.assert_allclose(dt, 1 - expected, atol=1e-30)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("cell", CONFIGS)
def test_forget_bias_lengthens_the_memory_at_initialisation(cell):
  def decay(config, key):
    model = config.build(8, 1, nnx.Rngs(key))
    return model.recurrence(jnp.zeros((1, 1, 8))).a

  run = quick(decay, static_argnums=0)
  short = run(CONFIGS[cell](), jax.random.key(0))
  long = run(CONFIGS[cell](forget_bias=3.0), jax.random.key(0))
  assert (long > short).all()
  # The minLSTM's f' = f/(f + i) stays below 2/3 where i is about ½.
  assert long.min() > {"gru": 0.85, "lstm": 0.6}[cell]


@pytest.mark.nightly
@pytest.mark.parametrize("cell", CONFIGS)
def test_min_rnn_has_a_finite_gradient_over_four_thousand_tokens(cell):
  x = jax.random.normal(jax.random.key(1), (1, 4096, 4))
  config = CONFIGS[cell](polarization=REPLACED)

  @quick
  def gradients(key, x):
    loss = lambda model, x: jnp.square(model(x)[0]).mean()
    return jax.grad(loss, (0, 1))(config.build(4, 1, nnx.Rngs(key)), x)

  for leaf in jax.tree.leaves(gradients(jax.random.key(0), x)):
    assert jnp.isfinite(leaf).all()


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"expand": 0}, "MinLSTMConfig: expand is 0, expected an integer"),
    ({"d_conv": -1}, "MinLSTMConfig: d_conv is -1, expected an integer"),
    ({"candidate": "g"}, "candidate is 'g', expected one of 'positive', 'l"),
    ({"init": "xavier"}, "init is 'xavier', expected one of 'mamba', 'auth"),
    (
      {"polarization": Polarization(zeros=1, zero_decay="paper")},
      "zero_decay is 'paper', expected 'exact'",
    ),
  ],
)
def test_min_rnn_config_refuses_a_value_that_cannot_be(fields, message):
  with pytest.raises(ValueError, match=message):
    MinLSTMConfig(**fields)


def test_min_rnn_refuses_another_width_and_says_which_it_has():
  model = MinGRUConfig().build(4, 1, nnx.Rngs(0))
  message = r"MinGRU: x has shape \(1, 3, 7\), expected \(B, T, M=4\)."
  with pytest.raises(ValueError, match=message):
    model(jnp.zeros((1, 3, 7)))


def params(model):
  names = ("conv_weight", "conv_bias", "in_proj", "in_bias", "out_proj")
  return {n: getattr(model, n)[...] for n in names if hasattr(model, n)}


def equations(cell, model, x):
  p = {k: np.asarray(v, np.float64) for k, v in params(model).items()}
  return sequence(cell, model.config, p, x, np)


def sequence(cell, config, p, x, xp):
  """The paper's recurrence, token by token: outputs and last state."""
  sigmoid = lambda v: 1 / (1 + xp.exp(-v))
  channels = len(p["out_proj"])
  window = xp.zeros((len(x), config.d_conv, x.shape[-1]))
  h, ys = xp.zeros((len(x), channels)), []
  for t in range(x.shape[1]):
    token = x[:, t]
    if config.d_conv:
      window = xp.concatenate([window[:, 1:], token[:, None]], axis=1)
      token = (window * p["conv_weight"]).sum(1) + p["conv_bias"]
    *gates, candidate = xp.split(
      token @ p["in_proj"] + p["in_bias"],
      {"gru": 2, "lstm": 3}[cell],
      axis=-1,
    )
    if config.candidate == "positive":
      candidate = xp.where(candidate >= 0, candidate + 0.5, sigmoid(candidate))
    if cell == "gru":
      write = sigmoid(gates[0])
      keep = 1 - write
    else:
      f, i = sigmoid(gates[0]), sigmoid(gates[1])
      keep, write = f / (f + i), i / (f + i)
    if config.polarization is not None:
      inner = xp.ones_like(keep[:, :1])
      keep = xp.concatenate([inner, keep[:, 1:-1], 0 * inner], axis=1)
    h = keep * h + write * candidate
    ys.append(h @ p["out_proj"])
  return xp.stack(ys, 1), h
