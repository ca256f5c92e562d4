"""Influence is what the theorem says it is, and dies away as it says."""

import functools

import appendix_b
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssmjax import theory

pytestmark = pytest.mark.usefixtures("strict", "x64")

REAL = sorted(
  appendix_b.FORMS.keys() - appendix_b.COMPLEX - appendix_b.NOT_LOCAL
)
COMPLEX = sorted(appendix_b.COMPLEX)
LENGTH = 6


@pytest.mark.parametrize("name", [*REAL, *COMPLEX])
@given(
  seed=st.integers(0, 2**31 - 1),
  scale=st.sampled_from([0.3, 1.0, 3.0]),
)
@settings(
  max_examples=5,
  deadline=None,
  derandomize=True,
  # The fixtures are contexts; it is right that they stay on.
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_influence_of_every_form_is_exact_and_bounded(name, seed, scale):
  group = COMPLEX if name in COMPLEX else REAL
  p, x = drawn(seed, scale)
  result, jacobian = influence_of(tuple(group))(group.index(name), p, x)
  chex.assert_shape(result.jacobian, (3, LENGTH, LENGTH, 1, 3))
  check(result, jacobian)


@pytest.mark.parametrize("name", ["rwkv4_pair", "mlstm_pair"])
def test_influence_through_a_nonlinear_readout_is_exact_and_bounded(name):
  layer = getattr(appendix_b, name)

  @quick
  def run(p, x):
    bound = functools.partial(layer, p)
    local = theory.locality_premise(bound, x)
    return local, theory.recency(bound, x), autodiff(bound, x)

  for seed in range(5):
    p, x = drawn(seed, 1.0)
    with jax.numpy_rank_promotion("allow"):
      local, *sides = run(p, x)
    assert bool(local.holds)
    check(*sides)


def test_bound_is_an_equality_for_one_channel_that_ignores_its_input():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 1)))
  result = quick(lambda x: theory.recency(constant_layer, x))(x)
  far = np.tril_indices(9, -1)
  score, bound = np.asarray(result.score), np.asarray(result.bound)
  assert_close(score[:, *far], bound[:, *far])
  assert_close(result.product_bound[:, *far], bound[:, *far])
  assert_close(result.constant, result.a_priori_constant)
  # The logarithm of the score falls by log A_max a token.
  slope = np.polyfit(np.arange(1, 9), np.log(score[0, -1, :-1][::-1]), 1)[0]
  assert slope == pytest.approx(np.log(0.7))
  assert_close(-result.rate, jnp.log(jnp.full(2, 0.7)))


def test_slope_of_many_channels_tends_to_that_of_the_slowest():
  decays = jnp.asarray([0.2, 0.5, 0.9])

  def layer(x):
    a = jnp.broadcast_to(decays, (*x.shape[:2], 3))
    return theory.from_arrays(a, jnp.ones_like(a), a * x, a)

  x = jnp.ones((1, 41, 1))
  score = np.asarray(quick(lambda x: theory.recency(layer, x).score)(x))[0, -1]
  slopes = np.diff(np.log(score[:-1][::-1]))
  assert (slopes <= np.log(0.9) + 1e-12).all()
  assert slopes[-1] == pytest.approx(np.log(0.9), abs=1e-6)


def test_a_convolution_wider_than_the_window_is_found():
  def layer(x):
    before = jnp.pad(x, ((0, 0), (2, 0), (0, 0)))
    return constant_layer(x + before[:, 1:-1] + before[:, :-2] ** 2)

  x = jnp.ones((1, 6, 1))

  def run(x):
    windows = (1, 2, 3)
    premises = [theory.locality_premise(layer, x, window=n) for n in windows]
    return premises, theory.recency(layer, x, window=3), autodiff(layer, x)

  premises, result, truth = quick(run)(x)
  assert bool(premises.pop().holds)
  assert_close(result.jacobian, reached(truth, 3))
  check_bounds(result)
  assert np.isfinite(np.asarray(result.bound)).sum() == 3 + 2 + 1
  for window, premise in enumerate(premises, 1):
    assert not premise.holds
    t, s = premise.worst.tolist()
    assert window <= t - s <= 2
    # All pairs but those from `window` to 2 tokens apart.
    apart = sum(6 - lag for lag in range(window, 3))
    assert float(premise.fraction) == pytest.approx(1 - apart / 36)


def test_rwkv4_as_the_paper_writes_it_is_not_of_eq_1():
  p, x = drawn(0, 1.0)

  @quick
  def run(p, x):
    layer = functools.partial(appendix_b.layer, "rwkv4", p)
    local = theory.locality_premise(layer, x)
    return local, theory.recency(layer, x).jacobian, autodiff(layer, x)

  local, factorised, truth = run(p, x)
  assert not local.holds
  # What the factorised Jacobian misses is no rounding. As a pair of sums
  # (`rwkv4_pair`) RWKV-4 is of Eq. 1.
  error = jnp.abs(factorised - truth).max() / jnp.abs(truth).max()
  assert float(error) > 1e-2


def test_looking_ahead_is_found():
  def layer(x):
    ahead = jnp.concatenate([x[:, 1:], x[:, :1]], 1)
    return constant_layer(ahead)

  x = jnp.ones((1, 4, 1))
  premise = quick(lambda x: theory.locality_premise(layer, x))(x)
  assert not premise.holds
  # Four of the sixteen pairs: each token's next one.
  assert float(premise.fraction) == 12 / 16


@pytest.mark.parametrize(
  ("decay", "name", "excess"),
  [
    (1.0, "below_one", 0.0),
    (-1.0, "below_one", 0.0),
    (1.25, "below_one", 0.25),
    (0.6 + 1j * 0.8, "below_one", 0.0),
    (np.nan, "below_one", np.nan),
    (0.0, "above_zero", 0.0),
  ],
)
def test_a_decay_violated_on_purpose_is_caught(decay, name, excess):
  dtype = complex if isinstance(decay, complex) else float
  a = np.full((2, 5, 3), 0.5, dtype)
  a[1, 3, 2] = decay
  one = jnp.ones((2, 5, 3))
  layer = theory.from_arrays(jnp.asarray(a), one, one)
  premises = quick(theory.recency_premises)(layer)
  caught = getattr(premises, name)
  other = {"below_one": "above_zero", "above_zero": "below_one"}[name]
  assert not caught.holds
  assert caught.worst.tolist() == [1, 3, 2]
  assert float(caught.excess) == pytest.approx(excess, nan_ok=True)
  assert float(caught.fraction) == pytest.approx(29 / 30)
  assert (caught.by_channel < 1).tolist() == [False, False, True]
  if not np.isnan(excess):
    assert bool(getattr(premises, other).holds)


def test_one_channel_makes_the_bound_vacuous_and_its_influence_flat():
  layer = functools.partial(decaying_layer, (1.0,))
  x = jnp.ones((1, 12, 1))
  run = lambda x: (
    theory.recency(layer, x), theory.polarized_recency(layer, x)
  )  # fmt: skip
  result, split = quick(run)(x)
  far = np.tril_indices(12, -1)
  assert float(result.rate[0]) == 0
  assert not result.premises.below_one.holds
  for flat in (result.score, result.bound, split.lower[..., 0, 0]):
    assert_close(flat[:, *far], jnp.ones((1, 66)))
  assert float(split.floor[0]) == 1
  assert float(split.horizon[0]) == 0


def test_decay_zero_breaks_a_premise_that_the_theorem_does_not_need():
  layer = functools.partial(decaying_layer, (0.0, 0.5))
  x = jnp.ones((1, 5, 1))
  result = quick(lambda x: theory.recency(layer, x))(x)
  assert not result.premises.above_zero.holds
  assert bool(result.premises.below_one.holds)
  check_bounds(result)


def test_decays_above_one_are_bounded_by_their_own_growth():
  layer = functools.partial(decaying_layer, (1.2, 0.3))
  x = jnp.ones((1, 8, 1))
  result = quick(lambda x: theory.recency(layer, x))(x)
  assert float(result.rate[0]) < 0
  check_bounds(result)


def test_polarized_influence_is_bounded_from_both_sides_and_stays():
  rng = np.random.default_rng(0)
  p, x = jnp.asarray(rng.normal(size=(8, 3, 4))), np.zeros((4, 40, 3))
  x = jnp.asarray(1.0 + 0.3 * rng.uniform(-1, 1, size=x.shape))

  def layer(x):
    a, dt, b, c = appendix_b.arrays("s6", p, x)
    a = a.at[..., 0].set(1.0).at[..., -1].set(0.0)
    # Token t reads, and token s writes, into the one-channel with one sign.
    b = b.at[..., 0].set(jnp.abs(b[..., 0]) + jnp.exp(x[..., 0]))
    c = c.at[..., 0].set(jnp.exp(-x[..., 1]))
    return theory.from_arrays(a, dt, b, c)

  run = lambda x: (theory.polarized_recency(layer, x), autodiff(layer, x))
  split, truth = quick(run)(x)
  check_split(split, truth)
  assert split.ones.tolist() == [[True, False, False, False]] * 4
  assert (np.asarray(split.floor) > 0).all()
  horizon = np.asarray(split.horizon)
  assert (horizon < 30).all()
  lags = np.arange(40)[:, None] - np.arange(40)[None]
  for row in range(4):
    beyond = lags > horizon[row]
    assert beyond.sum() > 20
    lower = np.asarray(split.lower)[row].max((-1, -2))
    score = np.abs(np.asarray(truth)[row]).max((-1, -2))
    assert (lower[beyond] > 0).all()
    floor = float(split.floor[row]) - np.asarray(split.remainder)[row]
    assert (score[beyond] >= floor[beyond] - 1e-12).all()


def test_without_a_one_channel_the_lower_bound_is_nothing():
  layer = functools.partial(decaying_layer, (0.9, 0.0))
  x = jnp.ones((1, 6, 1))
  run = lambda x: (
    theory.polarized_recency(layer, x), theory.recency(layer, x)
  )  # fmt: skip
  split, plain = quick(run)(x)
  assert not split.lower.any()
  assert not split.ones.any()
  assert float(split.floor[0]) == 0
  assert np.isinf(float(split.horizon[0]))
  assert_close(split.constant, plain.constant)
  far = np.tril_indices(6, -1)
  assert_close(split.upper[:, *far][..., 0, 0], plain.bound[:, *far])


@pytest.mark.parametrize("length", [1, 2])
def test_shortest_sequences_have_no_influence_or_one(length):
  layer = functools.partial(decaying_layer, (0.5, 1.0))
  x = jnp.ones((1, length, 1))
  run = lambda x: (
    theory.recency(layer, x), theory.polarized_recency(layer, x)
  )  # fmt: skip
  result, split = quick(run)(x)
  assert np.isfinite(np.asarray(result.bound)).sum() == length - 1
  assert np.count_nonzero(result.jacobian) == length - 1
  assert not np.isnan(np.asarray(split.horizon)).any()


def test_complex_inputs_go_in_as_their_parts():
  rng = np.random.default_rng(4)
  x = jnp.asarray(rng.normal(size=(2, 5, 2)))

  def layer(x):
    z = jax.lax.complex(x[..., :1], x[..., 1:])
    a = 0.8 * jnp.exp(-(z**2)) / (1 + jnp.abs(jnp.exp(-(z**2))).astype(z.dtype))
    ones = jnp.ones_like(z)
    return theory.from_arrays(a, jnp.ones((1, 1, 1)), z**3, ones - z)

  # A complex output as well.
  run = lambda x: (theory.recency(layer, x), autodiff(layer, x))
  result, truth = quick(run)(x)
  assert jnp.iscomplexobj(result.jacobian)
  check(result, truth)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(x=jnp.ones((2, 3))), r": x has shape \(2, 3\) and dtype"),
    (dict(x=jnp.ones((1, 3, 1), jnp.int32)), "expected real"),
    (dict(window=0), ": window is 0, expected a number of tokens from"),
    (dict(window=4), "window is 4, .* from 1 to T=3"),
  ],
)
def test_bad_arguments_are_named(change, message):
  x = change.pop("x", jnp.ones((1, 3, 1)))
  for function in (
    theory.recency, theory.polarized_recency, theory.locality_premise
  ):  # fmt: skip
    with pytest.raises(ValueError, match=message):
      function(constant_layer, x, **change)


def constant_layer(x):
  return decaying_layer((0.7,), x)


def decaying_layer(decays, x):
  """Constant decays, b = x and c = 1 in every channel."""
  a = jnp.broadcast_to(jnp.asarray(decays), (*x.shape[:2], len(decays)))
  b = jnp.broadcast_to(x, a.shape)
  return theory.from_arrays(a, jnp.ones((1, 1, 1)), b, jnp.ones((1, 1, 1)))


def drawn(seed, scale):
  rng = np.random.default_rng(seed)
  p = rng.normal(size=(appendix_b.WEIGHTS, 3, 4))
  return jnp.asarray(p), jnp.asarray(scale * rng.normal(size=(3, LENGTH, 3)))


@functools.cache
def influence_of(group):
  @quick
  def run(index, p, x):
    layer = functools.partial(appendix_b.any_layer, group, index, p)
    return theory.recency(layer, x), autodiff(layer, x)

  return run


def autodiff(layer, x):
  """∂yₜ/∂xₛ at [t, s, output, input] by reverse mode, 0 for s ≥ t."""

  def row(x):
    y = theory.outputs(layer(x[None]))[0]
    return (y.real, y.imag) if jnp.iscomplexobj(y) else (y,)

  parts = jax.vmap(jax.jacrev(row))(x)
  full = jax.lax.complex(*parts) if len(parts) == 2 else parts[0]
  return reached(jnp.transpose(full, (0, 1, 3, 2, 4)), 1)


def reached(jacobian, window):
  times = jnp.arange(jacobian.shape[1])
  far = (times[:, None] >= times[None] + window)[None, :, :, None, None]
  return jnp.where(far, jacobian, jnp.zeros_like(jacobian))


def check(result, truth):
  assert_close(result.jacobian, truth)
  check_bounds(result)


def check_bounds(result, rounding=1e-12):
  score, bound = np.asarray(result.score), np.asarray(result.bound)
  product = np.asarray(result.product_bound)
  assert not np.isnan(score + bound).any()
  slack = 1 + rounding
  # An absolute term for influences that underflow together.
  floor = rounding * score.max()
  assert (score <= slack * product + floor).all()
  if (np.asarray(result.a_max) <= 1).all():
    assert (product <= slack * bound + floor).all()
  assert (score <= slack * bound + floor).all()
  constants = np.asarray(result.constant), np.asarray(result.a_priori_constant)
  if (np.asarray(result.a_max) < 1).all():
    assert (constants[0] <= slack * constants[1]).all()


def check_split(split, truth, rounding=1e-12):
  size = np.abs(np.asarray(truth))
  slack = rounding * size.max()
  assert (np.asarray(split.lower) <= size + slack).all()
  assert (np.asarray(split.upper) >= size - slack).all()
  decaying = np.abs(np.asarray(split.decaying)).max((-1, -2))
  assert (decaying <= np.asarray(split.remainder) + slack).all()
  dtype = jnp.float32 if rounding > 1e-8 else None
  assert_close(split.kept + split.decaying, truth, dtype)
