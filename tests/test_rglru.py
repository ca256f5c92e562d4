"""The RG-LRU is the published one: its numbers, slopes and initial decays."""

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
  RGLRU,
  AttentionConfig,
  MinGRUConfig,
  MinLSTMConfig,
  ModelConfig,
  RGLRUConfig,
  config_from_json,
  config_to_json,
  rglru,
)
from ssmjax.types import Polarization

GOLDEN = pathlib.Path(__file__).with_name("golden") / "rglru.npz"
BOTH = Polarization(ones=1, zeros=1)
REPLACED = Polarization(ones=1, zeros=1, placement="replace")


def test_rglru_gives_the_outputs_of_published_code():
  golden = published()
  y, _ = quick(lambda model, x: model(x))(from_golden(), golden["inputs"])
  assert_close(y, golden["outputs"], jnp.float32)


def test_rglru_in_a_packed_row_gives_the_outputs_of_each_document():
  golden = published()
  x = golden["inputs"].reshape(1, -1, 12)
  segment_ids = np.repeat([[3, 4]], golden["inputs"].shape[1], axis=1)
  run = quick(lambda model, x, ids: model(x, segment_ids=ids))
  y, _ = run(from_golden(), x, segment_ids)
  assert_close(y.reshape(golden["outputs"].shape), golden["outputs"])


def test_rglru_gives_the_gradients_of_published_code():
  golden = published()
  loss = lambda model, x: (model(x)[0] * golden["weights"]).sum()
  grads, d_x = quick(jax.grad(loss, (0, 1)))(from_golden(), golden["inputs"])
  expected = arrays_of(golden, "gradient")
  found = {name: getattr(grads, name)[...] for name in expected}
  assert_close(found, expected, jnp.float32)
  assert_close(d_x, golden["gradient"], jnp.float32)


# Without polarization, see the published values.
@pytest.mark.parametrize("polarization", [BOTH, REPLACED])
def test_rglru_equals_its_equations_in_float64(polarization):
  config = RGLRUConfig(10, 2, polarization=polarization)

  @quick
  def run(key, x):
    model = shaken(RGLRU(8, config, rngs=nnx.Rngs(key)), key)
    return model, model(x)

  x = jax.random.normal(jax.random.key(1), (2, 21, 8))
  model, (y, state) = run(jax.random.key(0), x)
  expected, hidden = equations(model, np.asarray(x, np.float64))
  assert_close(y, expected, jnp.float32)
  assert_close(state.hidden, hidden, jnp.float32)
  assert state.started.all()


def test_rglru_decays_lie_between_the_bounds_of_its_config():
  config = RGLRUConfig(1024, decay_min=0.5, decay_max=0.7)
  build = lambda key: RGLRU(4, config, rngs=nnx.Rngs(key)).decay_param[...]
  param = np.asarray(quick(build)(jax.random.key(0)), np.float64)
  decay = np.exp(-8 * np.log1p(np.exp(param)))
  rank = np.sort((decay - 0.5) / 0.2)
  assert rank[0] >= -1e-4
  assert rank[-1] <= 1 + 1e-4
  # Kolmogorov-Smirnov distance from uniform at p ≈ 1e-6.
  middle = (np.arange(1024) + 0.5) / 1024
  assert np.abs(rank - middle).max() < 2.7 / 32


def test_one_channel_sums_and_zero_channel_forgets_exactly():
  config = RGLRUConfig(4, polarization=BOTH)

  @quick
  def show(key):
    x = jax.random.normal(key, (1, 5, 4))
    return RGLRU(4, config, rngs=nnx.Rngs(key)).recurrence(x)

  eq1 = show(jax.random.key(0))
  assert (eq1.a[..., 0] == 1).all()
  assert (eq1.a[..., -1] == 0).all()
  assert ((eq1.a[..., 1:-1] > 0) & (eq1.a[..., 1:-1] < 1)).all()
  # A one-channel of Δ = √(1 - 1²) would be deaf.
  assert (eq1.dt[:, 1:, 0] > 0).all()
  assert (eq1.dt[:, 0] == 1).all()


def test_input_scale_keeps_its_slope_where_the_decay_is_nearly_one():
  # The published code bounds the slope of the root: at rates below 1e-7 its
  # gradient by the gate is less than half of the true one.
  gate = jnp.asarray([-2.0, -10.0, -20.0, -40.0, -80.0])
  scale = lambda v: rglru._input_scale(jax.nn.sigmoid(v))
  value, slope = scale(gate), jax.vmap(jax.grad(scale))(gate)
  rate = 1 / (1 + np.exp(-np.asarray(gate, np.float64)))
  expected = np.sqrt(-np.expm1(-2 * rate))
  inner = np.exp(-2 * rate) / expected * rate * (1 - rate)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(slope, inner, rtol=1e-5)
  for dead in (-104.0, -1e6):
    assert jax.grad(scale)(dead) == 0


def test_hybrid_of_gated_layers_and_windows_goes_through_json():
  config = ModelConfig(
    vocab_size=257,
    d_model=64,
    n_layers=4,
    mixers=(
      RGLRUConfig(96, 2, decay_min=0.5, polarization=BOTH, dtype=jnp.bfloat16),
      AttentionConfig(2, window=128),
      MinGRUConfig(2, forget_bias=1.5, candidate="linear"),
      MinLSTMConfig(d_conv=4, polarization=REPLACED),
    ),
  )
  assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == (
    config
  )


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"width": 0}, "RGLRUConfig: width is 0, expected an integer"),
    ({"num_blocks": 0}, "RGLRUConfig: num_blocks is 0, expected an integer"),
    ({"decay_max": 1.0}, "decay_max is 1.0, expected a finite number above"),
    ({"decay_min": 0.9999}, "decay_max 0.999, expected 0 < decay_min <="),
    ({"init": "xavier"}, "init is 'xavier', expected one of 'mamba', 'auth"),
    (
      {"polarization": Polarization(zeros=1, zero_decay="authors")},
      "zero_decay is 'authors', expected 'exact'",
    ),
  ],
)
def test_rglru_config_refuses_a_value_that_cannot_be(fields, message):
  with pytest.raises(ValueError, match=message):
    RGLRUConfig(**fields)


def test_rglru_refuses_what_does_not_fit_it():
  build = lambda config: RGLRU(8, config, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="there are 10 channels, polarized ones"):
    build(RGLRUConfig(num_blocks=4, polarization=BOTH))
  with pytest.raises(ValueError, match="replace more channels than the 1"):
    build(RGLRUConfig(1, polarization=REPLACED))
  message = r"RGLRU: x has shape \(1, 3, 7\), expected \(B, T, M=12\)."
  with pytest.raises(ValueError, match=message):
    from_golden()(jnp.zeros((1, 3, 7)))


def shaken(model, key):
  """The model with every parameter away from its initial value."""
  leaves, tree = jax.tree.flatten(model)
  keys = jax.random.split(key, len(leaves))
  shake = lambda x, k: x + 0.1 * jax.random.normal(k, x.shape)
  return jax.tree.unflatten(tree, map(shake, leaves, keys))


def equations(model, x):
  """The block, token by token, in plain NumPy: outputs and last state."""
  config = model.config
  p = {
    name: np.asarray(getattr(model, name)[...], np.float64)
    for name in arrays_of(published(), "weight")
  }
  sigmoid = lambda v: 1 / (1 + np.exp(-v))
  root = np.sqrt(2 / np.pi)
  gelu = lambda v: v / 2 * (1 + np.tanh(root * (v + 0.044715 * v**3)))
  batch, channels = len(x), p["decay_param"].size
  blocks, block, _ = p["gate_proj"].shape
  window = np.zeros((batch, config.d_conv, channels))
  h, ys = np.zeros((batch, channels)), []
  for t in range(x.shape[1]):
    u, z = np.split(x[:, t] @ p["in_proj"] + p["in_bias"], 2, axis=-1)
    window = np.concatenate([window[:, 1:], u[:, None]], axis=1)
    u = (window * p["conv_weight"]).sum(1) + p["conv_bias"]
    r, i = np.zeros_like(u), np.zeros_like(u)
    for n in range(blocks):
      own = slice(n * block, (n + 1) * block)
      both = sigmoid(u[:, own] @ p["gate_proj"][n] + p["gate_bias"][n])
      r[:, own], i[:, own] = both[:, :block], both[:, block:]
    a = np.exp(-8 * np.log1p(np.exp(p["decay_param"])) * r)
    scale = np.sqrt(1 - a**2) if t else 1.0
    if config.polarization is not None:
      a[:, 0], a[:, -1] = 1, 0
    h = a * h + scale * i * u
    ys.append((h * gelu(z)) @ p["out_proj"] + p["out_bias"])
  return np.stack(ys, 1), h


def arrays_of(golden, sort):
  """The golden file's arrays under our names: x before y, r before i."""
  get = lambda name: golden[f"{sort}:{name}"]
  pair = lambda name: [get(name.format(side)) for side in "xy"]
  gates = lambda name: np.concatenate(
    [get(f"rg_lru.{gate}_gate_{name}") for gate in ("recurrent", "input")], -1
  )
  return {
    "in_proj": np.concatenate(pair("linear_{}.weight")).T,
    "in_bias": np.concatenate(pair("linear_{}.bias")),
    "conv_weight": get("conv_1d.weight")[:, 0].T,
    "conv_bias": get("conv_1d.bias"),
    "gate_proj": gates("weight"),
    "gate_bias": gates("bias"),
    "decay_param": get("rg_lru.recurrent_param"),
    "out_proj": get("linear_out.weight").T,
    "out_bias": get("linear_out.bias"),
  }


@functools.cache
def published():
  with np.load(GOLDEN) as golden:
    return dict(golden)


@functools.cache
def from_golden():
  build = lambda: RGLRU(12, RGLRUConfig(num_blocks=3), rngs=nnx.Rngs(0))
  model = jax.eval_shape(build)
  for name, value in arrays_of(published(), "weight").items():
    assert getattr(model, name).shape == value.shape, name
    setattr(model, name, nnx.Param(jnp.asarray(value)))
  return model
