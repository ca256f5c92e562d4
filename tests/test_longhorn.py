"""Longhorn is its authors', and keeps no states of a whole sequence."""

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
  Longhorn,
  LonghornConfig,
  ModelConfig,
  config_from_json,
  config_to_json,
)
from ssmjax.types import Polarization

GOLDEN = pathlib.Path(__file__).with_name("golden") / "longhorn.npz"
BOTH = Polarization(ones=1, zeros=1)
REPLACED = Polarization(ones=1, zeros=1, placement="replace")
NAMES = {
  "in_proj": ("in_proj.weight", np.transpose),
  "conv.weight": ("conv1d.weight", lambda x: x[:, 0].T),
  "conv.bias": ("conv1d.bias", np.asarray),
  "x_proj": ("x_proj.weight", np.transpose),
  "beta_proj": ("dt_head.weight", np.transpose),
  "beta_bias": ("dt_head.bias", np.asarray),
  "D": ("D", np.asarray),
  "out_proj": ("out_proj.weight", np.transpose),
}


def test_longhorn_gives_the_outputs_and_gradients_of_published_code():
  with np.load(GOLDEN) as file:
    golden = dict(file)

  def loss(model, x):
    y, state = model(x)
    return (y * golden["weights"]).sum(), (y, state)

  slope = quick(jax.grad(loss, (0, 1), has_aux=True))
  (grads, d_x), (y, state) = slope(from_golden(golden), golden["inputs"])
  assert_close(y, golden["outputs"], jnp.float32)
  assert_close(state.ssm, golden["state"], jnp.float32)
  assert_close(d_x, golden["gradient"], jnp.float32)
  expected = arrays_of(golden, "gradient")
  assert_close({name: at(grads, name)[...] for name in expected}, expected)


def test_decays_lie_between_zero_and_one_and_hold_the_polarized_channels():
  config = LonghornConfig(d_state=3, polarization=BOTH)

  @quick
  def show(key):
    x = 9 * jax.random.normal(key, (1, 6, 4))
    return Longhorn(4, config, rngs=nnx.Rngs(key)).recurrence(x)

  eq1 = show(jax.random.key(0))
  assert eq1.a.shape == (1, 6, 8, 5)
  assert (eq1.a[..., 0] == 1).all()
  assert (eq1.a[..., -1] == 0).all()
  learned = eq1.a[..., 1:-1]
  assert ((learned > 0) & (learned < 1)).all()


# Two chunks and a tail, with documents that begin in one, at its edge, and
# after padding at its edge, against pieces that no chunk divides.
@pytest.mark.nightly
@pytest.mark.parametrize("implementation", [None, "reference"])
def test_chunks_are_the_sequence_in_pieces_of_any_length(implementation):
  config = LonghornConfig(
    d_state=4, polarization=REPLACED, implementation=implementation
  )
  ids = np.ones((3, 150), np.int32)
  ids[0, 70:] = 2
  ids[1, 64:] = 2
  ids[1, 100:130] = 0
  ids[2, 60:66] = 0
  ids[2, 66:] = 7
  ids[2, 128:] = 8
  x = jax.random.normal(jax.random.key(1), (3, 150, 4))
  x = jnp.where(ids[..., None] > 0, x, jnp.nan)
  model = quick(lambda key: Longhorn(4, config, rngs=nnx.Rngs(key)))(
    jax.random.key(0)
  )
  run = quick(lambda model, x, ids: model(x, segment_ids=ids))
  y, state = run(model, x, ids)
  found, last = np.zeros(y.shape, np.float32), np.zeros(state.ssm.shape)
  for row in range(3):
    for document in sorted(set(ids[row]) - {0}):
      (place,) = np.nonzero(ids[row] == document)
      part, after = stepped(model, x[row, place][None])
      found[row, place], last[row] = part[0], after[0]
  assert_close(y, found, jnp.float32)
  assert_close(state.ssm, last, jnp.float32)


@pytest.mark.nightly
def test_gradient_keeps_no_states_of_a_whole_sequence():
  # With so many states a channel, the rest of the layer is small.
  config = LonghornConfig(d_state=128)

  def loss(model, x):
    return jnp.square(model(x)[0]).mean()

  build = lambda: Longhorn(32, config, rngs=nnx.Rngs(0))
  x = jax.ShapeDtypeStruct((2, 4096, 32), jnp.float32)
  compiled = jax.jit(jax.grad(loss)).lower(jax.eval_shape(build), x).compile()
  states = 2 * 4096 * 64 * 128 * 4
  assert compiled.memory_analysis().temp_size_in_bytes < states / 2


def test_longhorn_goes_through_json_with_every_field():
  mixer = LonghornConfig(8, 3, 1, 5, BOTH, "authors", jnp.bfloat16, "chunked")
  config = ModelConfig(257, 64, 4, mixers=(mixer,))
  assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == (
    config
  )


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"d_state": 0}, "LonghornConfig: d_state is 0, expected an integer"),
    ({"dt_rank": 0}, "LonghornConfig: dt_rank is 0, expected an integer"),
    ({"init": "xavier"}, "init is 'xavier', expected one of 'mamba', 'auth"),
    (
      {"polarization": Polarization(zeros=1, zero_decay="authors")},
      "zero_decay is 'authors', expected 'exact'",
    ),
  ],
)
def test_longhorn_config_refuses_a_value_that_cannot_be(fields, message):
  with pytest.raises(ValueError, match=message):
    LonghornConfig(**fields)


def test_longhorn_refuses_what_does_not_fit_it():
  build = lambda **fields: Longhorn(
    4, LonghornConfig(**fields), rngs=nnx.Rngs(0)
  )
  with pytest.raises(ValueError, match="replace more channels than the 1"):
    build(d_state=1, polarization=REPLACED)
  message = r"Longhorn: x has shape \(1, 3, 7\), expected \(B, T, M=4\)."
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: build()(jnp.zeros((1, 3, 7))))


@quick
def stepped(model, x):
  """Outputs and last state of one sequence, token by token."""

  def body(state, token):
    y, state = model.step(token, state)
    return state, y

  state, y = jax.lax.scan(body, model.init_state(1), jnp.moveaxis(x, 1, 0))
  return jnp.moveaxis(y, 0, 1), state.ssm


def at(module, name):
  """A parameter by its dotted name."""
  return functools.reduce(getattr, name.split("."), module)


def arrays_of(golden, sort):
  """The golden file's arrays under our names."""
  return {
    ours: change(golden[f"{sort}:{theirs}"])
    for ours, (theirs, change) in NAMES.items()
  }


def from_golden(golden):
  config = LonghornConfig(d_state=4, d_conv=3, dt_rank=3)
  model = jax.eval_shape(lambda: Longhorn(8, config, rngs=nnx.Rngs(0)))
  for name, value in arrays_of(golden, "weight").items():
    *path, last = name.split(".")
    module = at(model, path[0]) if path else model
    assert getattr(module, last).shape == value.shape, name
    setattr(module, last, nnx.Param(jnp.asarray(value)))
  return model
