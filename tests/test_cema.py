"""CEMA is the published moving average, in the layer of its equations."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from flax import nnx

from ssmjax import ops
from ssmjax.models import (
  CEMA,
  CEMAConfig,
  ModelConfig,
  config_from_json,
  config_to_json,
)
from ssmjax.types import Polarization

GOLDEN = pathlib.Path(__file__).with_name("golden") / "cema.npz"
NAMES = {
  "A_alpha": "alpha",
  "A_delta": "delta",
  "A_theta": "theta",
  "gamma": "gamma",
  "D": "omega",
}
BOTH = Polarization(ones=1, zeros=1)
REPLACED = Polarization(ones=1, zeros=1, placement="replace")


def test_cema_gives_the_averages_and_gradients_of_published_code():
  with np.load(GOLDEN) as golden:
    golden = dict(golden)
  build = lambda key: CEMA(5, CEMAConfig(4, gate=False), rngs=nnx.Rngs(key))
  model = quick(build)(jax.random.key(0))
  for name, published in NAMES.items():
    value = golden[f"weight:{published}"].reshape(getattr(model, name).shape)
    setattr(model, name, nnx.Param(jnp.asarray(value)))

  def loss(model, x):
    a, b, c = model._system()
    run = functools.partial(ops.lti_scan, a=a, b=b, c=c, D=model.D[...])
    first, state = run(x[:, :11])
    second, last = run(x[:, 11:], initial_state=state)
    y = jnp.concatenate([first, second], 1)
    return (y * golden["weights"]).sum(), (y, state, last)

  run = quick(jax.grad(loss, (0, 1), has_aux=True))
  (grads, d_x), found = run(model, golden["inputs"])
  expected = tuple(golden[name] for name in ("outputs", "state", "last"))
  assert_close(found, expected, "float32")
  assert_close(d_x, golden["gradient"], "float32")
  for name, published in NAMES.items():
    gradient = getattr(grads, name)[...]
    expected = golden[f"gradient:{published}"].reshape(gradient.shape)
    assert_close(gradient, expected, "float32", name)


@pytest.mark.parametrize(
  ("polarization", "gate"),
  [
    (BOTH, True),
    pytest.param(REPLACED, True, marks=pytest.mark.nightly),
    pytest.param(None, False, marks=pytest.mark.nightly),
  ],
)
def test_cema_equals_its_equations_in_float64(polarization, gate):
  config = CEMAConfig(4, gate=gate, polarization=polarization)

  @quick
  def run(key, x):
    model = CEMA(6, config, rngs=nnx.Rngs(key))
    leaves, tree = jax.tree.flatten(model)
    keys = jax.random.split(key, len(leaves))
    shake = lambda x, k: x + 0.1 * jax.random.normal(k, x.shape)
    model = jax.tree.unflatten(tree, map(shake, leaves, keys))
    return model, model(x)

  x = jax.random.normal(jax.random.key(1), (2, 21, 6))
  model, (y, state) = run(jax.random.key(0), x)
  expected, hidden = equations(model, np.asarray(x, np.float64))
  assert_close(y, expected, "float32")
  assert_close(state.hidden, hidden, "float32")


@pytest.mark.parametrize("polarization", [BOTH, REPLACED])
def test_held_averages_are_exact_and_the_others_keep_their_wave(polarization):
  learned = 4 if polarization is BOTH else 2
  config = CEMAConfig(4, polarization=polarization)

  @quick
  def show(key):
    model = CEMA(3, config, rngs=nnx.Rngs(key))
    x = jax.random.normal(key, (1, 5, 3))
    return model.recurrence(x).a, model.A_theta[...]

  a, theta = show(jax.random.key(0))
  assert a.shape[-1] == learned + 2
  assert (a[..., 0] == 1).all()
  assert (a[..., -1] == 0).all()
  size = np.abs(a[..., 1:-1])
  assert ((size > 0) & (size < 1)).all()
  waves = np.arange(1, 5) if polarization is BOTH else np.arange(2, 4)
  turns = waves / 4 / (1 + np.exp(-np.asarray(theta, np.float64)))[:, None]
  expected = np.exp(2j * np.pi * turns)
  assert_close(np.asarray(a[0, 0, :, 1:-1]) / size[0, 0], expected, "float32")


def test_base_angles_are_the_published_ones_in_random_order():
  build = lambda key: CEMA(64, CEMAConfig(2), rngs=nnx.Rngs(key)).A_theta[...]
  share = jax.nn.sigmoid(quick(build)(jax.random.key(0)))
  expected = 64.0 ** -(np.arange(1, 65) / 64)
  assert_close(np.sort(share)[::-1], expected, "float32")
  assert (np.diff(share) > 0).any()
  assert (np.diff(share) < 0).any()
  single = lambda key: CEMA(1, CEMAConfig(2), rngs=nnx.Rngs(key)).A_theta[...]
  assert np.isfinite(quick(single)(jax.random.key(0)))


def test_cema_config_goes_through_json():
  mixer = CEMAConfig(8, gate=False, polarization=BOTH, dtype=jnp.bfloat16)
  config = ModelConfig(257, 64, 2, mixers=(mixer,))
  again = config_from_json(json.loads(json.dumps(config_to_json(config))))
  assert again == config


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"d_state": 0}, "CEMAConfig: d_state is 0, expected an integer"),
    ({"expand": 0}, "CEMAConfig: expand is 0, expected an integer"),
    ({"init": "xavier"}, "init is 'xavier', expected one of 'mamba', 'auth"),
    ({"implementation": "pallas"}, "implementation is 'pallas'"),
    (
      {"polarization": Polarization(zeros=1, zero_decay="paper")},
      "zero_decay is 'paper', expected 'exact'",
    ),
  ],
)
def test_cema_config_refuses_a_value_that_cannot_be(fields, message):
  with pytest.raises(ValueError, match=message):
    CEMAConfig(**fields)


def test_cema_refuses_what_does_not_fit_it():
  build = lambda config: jax.eval_shape(
    lambda: CEMA(4, config, rngs=nnx.Rngs(0))
  )
  with pytest.raises(ValueError, match="replace more channels than the 1"):
    build(CEMAConfig(1, polarization=REPLACED))
  model = build(CEMAConfig())
  with pytest.raises(ValueError, match=r"CEMA: x has shape \(1, 3, 5\)"):
    model(jnp.zeros((1, 3, 5)))


def equations(model, x):
  """The layer, token by token, in plain NumPy: outputs and last state."""
  config = model.config
  p = {
    name: np.asarray(value[...], np.float64)
    for name, value in vars(model).items()
    if isinstance(value, nnx.Param)
  }
  sigmoid = lambda v: 1 / (1 + np.exp(-v))
  silu = lambda v: v * sigmoid(v)
  alpha = sigmoid(p["A_alpha"])
  wave, decaying = np.arange(1, 5), slice(None)
  if config.polarization is not None:
    decaying = slice(1, -1)
    if config.polarization.placement == "replace":
      wave = wave[1:-1]
  angle = sigmoid(p["A_theta"])[:, None] * wave * 2 * np.pi / 4
  a = np.zeros(alpha.shape, complex)
  a[:, 0] = 1
  size = 1 - alpha[:, decaying] * sigmoid(p["A_delta"])
  a[:, decaying] = size * np.exp(1j * angle)
  gamma = (p["gamma"][..., 0] + 1j * p["gamma"][..., 1]) / a.shape[1] ** 0.5
  h, ys = np.zeros((len(x), *a.shape), complex), []
  for t in range(x.shape[1]):
    h = a * h + alpha * x[:, t, :, None]
    u = (gamma * h).sum(-1).real + p["D"] * x[:, t]
    m = u / np.sqrt((u**2).mean(-1, keepdims=True) + 1e-5)
    m = m * np.asarray(model.norm.scale[...], np.float64)
    y = m @ p["out_proj"] + p["out_bias"]
    if config.gate:
      v = silu(x[:, t] @ p["value_proj"] + p["value_bias"])
      r = silu(m @ p["gate_proj"] + p["gate_bias"])
      y = y + (v * r) @ p["gated_proj"]
    ys.append(y)
  return np.stack(ys, 1), h
