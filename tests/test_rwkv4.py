"""RWKV-4 is the published one, and exact where exponentials overflow."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from flax import nnx

from ssmjax import theory
from ssmjax.models import (
  RWKV4,
  RWKV4Config,
  RWKVChannelMix,
  RWKVChannelMixConfig,
)
from ssmjax.ops.stabiliser import FLOOR, _associative, running_maximum
from ssmjax.types import Polarization

GOLDEN = pathlib.Path(__file__).with_name("golden") / "rwkv4.npz"
BOTH = Polarization(ones=1, zeros=1)
REPLACED = Polarization(ones=1, zeros=1, placement="replace")
PARTS = ("attention", "feed_forward")


@pytest.mark.parametrize("part", PARTS)
def test_rwkv4_gives_outputs_and_gradients_of_published_code(part):
  golden = published()

  def loss(model, x):
    y, _ = model(x)
    return (y * golden["weights"]).sum(), y

  run = quick(jax.grad(loss, (0, 1), has_aux=True))
  (grads, d_x), y = run(from_golden(part), golden["inputs"])
  assert_close(y, golden[f"{part}:outputs"], jnp.float32)
  assert_close(d_x, golden[f"{part}:gradient"], jnp.float32)
  expected = arrays_of(part, "gradient")
  found = {name: getattr(grads, name)[...] for name in expected}
  assert_close(found, expected, jnp.float32)


@pytest.mark.parametrize(
  "size", [1e3, pytest.param(1.0, marks=pytest.mark.nightly)]
)
def test_rwkv4_with_keys_of_any_size_equals_its_equations_in_float64(size):
  model, x, ids = exploding(size)

  @quick
  def run(model, x):
    def loss(model, x):
      y, state = model(x, segment_ids=ids)
      return (y * jnp.sin(jnp.arange(y.size)).reshape(y.shape)).sum(), (
        y, state, model._before_scan(x, None, None)[:3]
      )  # fmt: skip

    return jax.grad(loss, (0, 1), has_aux=True)(model, x)

  grads, (y, state, kvr) = run(model, x)
  # From the very keys that the model has: float32 rounds those of 1e3.
  expected, total = equations(model, *kvr)
  assert_close(y, expected, jnp.float32)
  log_total = state.peak + jnp.log(state.denominator)
  assert_close(log_total, total, jnp.float32)
  for path, grad in jax.tree.leaves_with_path(grads):
    assert jnp.isfinite(grad).all(), path


def test_one_channel_is_a_mean_and_zero_channel_forgets_exactly():
  config = RWKV4Config(4, polarization=BOTH)

  @quick
  def show(key):
    x = jax.random.normal(key, (1, 7, 4))
    model = RWKV4(4, config, rngs=nnx.Rngs(key))
    recurrence = model.recurrence(x)
    smooth = theory.kappa_smoothing(recurrence)
    return recurrence, smooth, model._before_scan(x, None, None)[0]

  eq1, smoothing, k = show(jax.random.key(0))
  np.testing.assert_allclose(eq1.a + eq1.dt, 1, rtol=0, atol=2e-7)
  assert (eq1.a[:, :2] == 0)[:, 0].all()
  assert (eq1.a[..., -1] == 0).all()
  assert (eq1.dt[..., -1] == 1).all()
  assert (eq1.a[:, 2:, :-1] > 0).all()
  # Of decay 1 is the sum of e^k: the state is their weighted mean.
  weight = np.exp(np.asarray(k, np.float64))[..., 0]
  mean = weight.cumsum(1)[:, :-1] / weight.cumsum(1)[:, 1:]
  np.testing.assert_allclose(eq1.a[:, 2:, 0], mean[:, :-1], rtol=1e-5)
  spread, slack = np.asarray(smoothing.state_spread), 1 + 1e-5
  assert (spread <= slack * np.asarray(smoothing.hull_bound)).all()
  applies = np.asarray(smoothing.applies)
  assert applies.any()
  assert (spread <= slack * np.asarray(smoothing.bound))[applies].all()


def test_running_maximum_is_that_of_its_definition_on_every_platform():
  keys = jax.random.split(jax.random.key(0), 3)
  log_a = -jnp.exp(jax.random.normal(keys[0], (2, 13, 3)))
  log_a = log_a.at[..., 0].set(0).at[..., 2].set(-jnp.inf)
  b = 5 * jax.random.normal(keys[1], (2, 13, 3))
  b = b.at[0, 4].set(jnp.nan).at[1, 4].set(jnp.inf).at[1, 0].set(-jnp.inf)
  ids = np.array([[0] + [1] * 5 + [2] * 7, [3] * 8 + [0, 0, 3, 4, 0]])
  valid = ids > 0
  restart = np.zeros((2, 13), bool)
  restart[0, 6] = restart[1, 11] = True
  start = jnp.full((2, 3), FLOOR).at[1, 0].set(2.0)
  found = quick(running_maximum)(log_a, b, start, valid, restart)
  expected = np.empty((2, 13, 3), np.float32)
  for row in range(2):
    m = np.asarray(start[row])
    for t in range(13):
      if valid[row, t]:
        m = np.full(3, FLOOR) if restart[row, t] else m
        own = np.asarray(b[row, t])
        own = np.where(np.isfinite(own), own, FLOOR)
        m = np.maximum(np.maximum(np.asarray(log_a[row, t]) + m, own), FLOOR)
      expected[row, t] = m
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  wide = valid[..., None]
  log_a = jnp.where(wide, log_a, 0)
  log_a = jnp.where(restart[..., None], -jnp.inf, log_a)
  b = jnp.where(wide & (b < jnp.inf), b, -jnp.inf)
  again = jnp.maximum(quick(_associative)(log_a, b, start), FLOOR)
  np.testing.assert_allclose(again, expected, rtol=1e-6)


@pytest.mark.nightly
@pytest.mark.parametrize("implementation", ["reference", "associative"])
def test_rwkv4_is_the_same_by_every_implementation(implementation):
  x = jax.random.normal(jax.random.key(1), (2, 37, 6))
  ids = np.repeat([[1, 2, 0, 3]], 2, 0).repeat([11, 12, 5, 9], 1)
  config = RWKV4Config(polarization=REPLACED)
  other = RWKV4Config(polarization=REPLACED, implementation=implementation)

  def run(config):
    model = RWKV4(6, config, rngs=nnx.Rngs(0))
    loss = lambda x: jnp.square(model(x, segment_ids=ids)[0]).sum()
    return jax.value_and_grad(loss)(x)

  assert_close(quick(run, static_argnums=0)(other), run(config))


@pytest.mark.nightly
def test_rwkv4_has_a_finite_gradient_over_four_thousand_tokens():
  x = jax.random.normal(jax.random.key(1), (1, 4096, 4))
  config = RWKV4Config(polarization=REPLACED)

  @quick
  def gradients(key, x):
    model = RWKV4(4, config, rngs=nnx.Rngs(key))
    loss = lambda model, x: jnp.square(model(x)[0]).mean()
    return jax.grad(loss, (0, 1))(model, x)

  for leaf in jax.tree.leaves(gradients(jax.random.key(0), x)):
    assert jnp.isfinite(leaf).all()


@pytest.mark.parametrize(
  ("config", "fields", "message"),
  [
    (RWKV4Config, {"width": 0}, "RWKV4Config: width is 0, expected an integer"),
    (RWKV4Config, {"init": "x"}, "init is 'x', expected one of 'mamba', 'auth"),
    (
      RWKV4Config,
      {"polarization": Polarization(zeros=1, zero_decay="paper")},
      "zero_decay is 'paper', expected 'exact'",
    ),
    (RWKVChannelMixConfig, {"width": 0}, "width is 0, expected an integer"),
  ],
)
def test_rwkv4_configs_refuse_a_value_that_cannot_be(config, fields, message):
  with pytest.raises(ValueError, match=message):
    config(**fields)


def exploding(size):
  """A model whose keys are about ±size, its inputs, and two documents."""
  config = RWKV4Config(polarization=REPLACED)
  model = quick(lambda key: RWKV4(6, config, rngs=nnx.Rngs(key)))(
    jax.random.key(0)
  )
  model.k_proj = nnx.Param(size * model.k_proj[...])
  x = jax.random.normal(jax.random.key(1), (2, 19, 6))
  return model, x, np.repeat([[1] * 19], 2, 0)


def equations(model, k, v, r):
  """The time mix in float64 logarithms: outputs and the last log D."""
  k, v, r = (np.asarray(x, np.float64) for x in (k, v, r))
  w = np.exp(np.asarray(model.time_decay[...], np.float64))
  w[0], w[-1] = 0, np.inf
  u = np.asarray(model.bonus[...], np.float64)
  total, mean = np.full_like(k[:, 0], -np.inf), np.zeros_like(k[:, 0])
  ys = []
  for t in range(k.shape[1]):
    both = np.logaddexp(total, u + k[:, t])
    wkv = np.exp(total - both) * mean + np.exp(u + k[:, t] - both) * v[:, t]
    ys.append(r[:, t] * wkv @ np.asarray(model.out_proj[...], np.float64))
    new = np.logaddexp(total - w, k[:, t])
    mean = np.exp(total - w - new) * mean + np.exp(k[:, t] - new) * v[:, t]
    total = new
  return np.stack(ys, 1), total


def arrays_of(part, sort):
  """The golden file's arrays of a part under our names."""
  get = lambda name: published()[f"{part}:{sort}:{name}"]
  arrays = {
    "mix_key": get("time_mix_key")[0, 0],
    "mix_receptance": get("time_mix_receptance")[0, 0],
    "k_proj": get("key.weight").T,
    "v_proj": get("value.weight").T,
    "r_proj": get("receptance.weight").T,
  }
  if part == "attention":
    arrays |= {
      "mix_value": get("time_mix_value")[0, 0],
      "time_decay": get("time_decay"),
      "bonus": get("time_first"),
      "out_proj": get("output.weight").T,
    }
  return arrays


@functools.cache
def published():
  with np.load(GOLDEN) as golden:
    return dict(golden)


@functools.cache
def from_golden(part):
  kind = {
    "attention": lambda: RWKV4(10, RWKV4Config(12), rngs=nnx.Rngs(0)),
    "feed_forward": lambda: RWKVChannelMix(
      10, RWKVChannelMixConfig(14), rngs=nnx.Rngs(0)
    ),
  }
  model = jax.eval_shape(kind[part])
  for name, value in arrays_of(part, "weight").items():
    assert getattr(model, name).shape == value.shape, name
    setattr(model, name, nnx.Param(jnp.asarray(value)))
  return model
