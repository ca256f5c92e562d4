"""Hyena is the published operator, and says where it has no room."""

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
  Hyena,
  HyenaConfig,
  ModelConfig,
  config_from_json,
  config_to_json,
)

GOLDEN = pathlib.Path(__file__).with_name("golden") / "hyena.npz"
SMALL = HyenaConfig(3, 12, filter_width=4)


def test_hyena_gives_the_outputs_and_gradients_of_published_code():
  golden = published()

  def loss(model, x):
    y, _ = model(x)
    return (y * golden["weights"]).sum(), y

  run = quick(jax.grad(loss, (0, 1), has_aux=True))
  (grads, d_x), y = run(from_golden(), golden["inputs"])
  assert_close(y, golden["outputs"], jnp.float32)
  assert_close(d_x, golden["gradient"], jnp.float32)
  expected = arrays_of(golden, "gradient")
  assert_close({k: get(grads, k)[...] for k in expected}, expected, "float32")


@pytest.mark.nightly
def test_hyena_with_less_room_is_the_same_and_full_it_says_so():
  model = build()
  x = jax.random.normal(jax.random.key(1), (2, 12, 4))
  run, step = quick(lambda *args: model(*args)), quick(model.step)
  expected, _ = run(x)
  y, state = run(x[:, :5], model.init_state(2, 7))
  assert state.past.shape == (2, 2, 6, 4)
  outputs = [y]
  for t in range(5, 12):
    y, state = step(x[:, t], state)
    outputs.append(y[:, None])
  y = jnp.concatenate(outputs, 1)
  assert_close(y[:, :7], expected[:, :7])
  assert jnp.isnan(y[:, 7:]).all()
  assert (state.length == 12).all()
  # A new segment finds all the room again.
  ids = jnp.asarray([[1] + [2] * 5] * 2)
  y, state = run(x[:, :6], state, ids)
  assert jnp.isnan(y[:, :1]).all()
  assert_close(y[:, 1:], run(x[:, 1:6])[0])
  assert (state.length == 5).all()


def test_packed_row_may_be_longer_than_a_document_may():
  model = build()
  x = jax.random.normal(jax.random.key(1), (1, 30, 4))
  ids = np.repeat([1, 2, 3], [10, 13, 7])[None]
  y, state = quick(lambda *args: model(*args))(x, None, ids)
  alone, _ = quick(lambda x: model(x))(x[:, 10:22])
  assert_close(y[:, 10:22], alone)
  bad = np.isnan(y[0]).all(-1)
  np.testing.assert_array_equal(bad, np.arange(30) == 22)
  assert np.isfinite(y[0, ~bad]).all()
  assert state.length[0] == 7


def test_hyena_refuses_what_does_not_fit_it():
  model = build()
  with pytest.raises(ValueError, match="x has 13 tokens, expected at most the"):
    model(jnp.zeros((1, 13, 4)))
  with pytest.raises(ValueError, match="max_length is 13, expected at most 12"):
    model.init_state(1, 13)
  with pytest.raises(ValueError, match=r"Hyena.step: x has shape \(1, 3\)"):
    model.step(jnp.zeros((1, 3)), model.init_state(1))
  with pytest.raises(NotImplementedError, match="no diagonal Eq"):
    model.recurrence(jnp.zeros((1, 3, 4)))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"order": 1}, "HyenaConfig: order is 1, expected an integer"),
    ({"max_length": 0}, "max_length is 0, expected an integer"),
    ({"filter_layers": -1}, "filter_layers is -1, expected an integer"),
    ({"fast_decay": 0.0}, "fast_decay is 0.0, expected a finite"),
    ({"decay_target": 1.0}, "decay_target is 1.0, expected a finite number"),
    ({"init": "xavier"}, "init is 'xavier', expected one of 'mamba', 'auth"),
    ({"implementation": "pallas"}, "implementation is 'pallas'"),
  ],
)
def test_hyena_config_refuses_a_value_that_cannot_be(fields, message):
  with pytest.raises(ValueError, match=message):
    HyenaConfig(**fields)


def test_hyena_config_goes_through_json():
  config = ModelConfig(
    257, 64, 2, mixers=(HyenaConfig(3, 64, window_shift=0.5),)
  )
  again = config_from_json(json.loads(json.dumps(config_to_json(config))))
  assert again == config


def build(config=SMALL):
  return quick(lambda key: Hyena(4, config, rngs=nnx.Rngs(key)))(
    jax.random.key(0)
  )


def get(model, path):
  return functools.reduce(getattr, path.split("."), model)


def arrays_of(golden, sort):
  """The golden file's arrays under our names."""
  get = lambda name: golden[f"{sort}:{name}"]
  layer = lambda i, name: get(f"filter_fn.implicit_filter.{i}.{name}")
  return {
    "in_proj": get("in_proj.weight").T,
    "in_bias": get("in_proj.bias"),
    "conv.weight": get("short_filter.weight")[:, 0].T,
    "conv.bias": get("short_filter.bias"),
    "filter_in": layer(0, "weight").T,
    "filter_in_bias": layer(0, "bias"),
    "filter_frequency": layer(1, "freq")[0],
    "filter_hidden": np.stack([layer(i, "weight").T for i in (2, 4)]),
    "filter_hidden_bias": np.stack([layer(i, "bias") for i in (2, 4)]),
    "filter_out": layer(6, "weight").T,
    "D": get("filter_fn.bias").reshape(2, 6),
    "out_proj": get("out_proj.weight").T,
    "out_bias": get("out_proj.bias"),
  }


@functools.cache
def published():
  with np.load(GOLDEN) as golden:
    return dict(golden)


@functools.cache
def from_golden():
  config = HyenaConfig(
    order=3, max_length=24, filter_width=8, filter_bands=2, window_shift=0.05
  )
  model = jax.eval_shape(lambda: Hyena(6, config, rngs=nnx.Rngs(0)))
  for path, value in arrays_of(published(), "weight").items():
    assert get(model, path).shape == value.shape, path
    *owner, name = path.split(".")
    owner = get(model, ".".join(owner)) if owner else model
    setattr(owner, name, nnx.Param(jnp.asarray(value)))
  return model
