"""Continuous S4 filters high frequencies, as far as that is said of it."""

import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssmjax import theory

pytestmark = pytest.mark.usefixtures("strict", "x64")

LOW_PASS = quick(theory.low_pass)
TRANSFER = quick(theory.transfer)
STEPS = 1 << 14


@given(
  seed=st.integers(0, 2**31 - 1),
  states=st.sampled_from([1, 4, 9]),
  epsilon=st.floats(1e-6, 0.999),
  real=st.booleans(),
)
@settings(
  max_examples=40,
  deadline=None,
  derandomize=True,
  # The fixtures are contexts; it is right that they stay on.
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_response_beyond_the_cutoff_never_exceeds_epsilon(
  seed, states, epsilon, real
):
  result = LOW_PASS(epsilon, *drawn(seed, states, real))
  assert bool(result.premise.holds)
  assert (np.abs(result.omega) >= float(result.cutoff)).all()
  size, bound = np.abs(result.response), np.asarray(result.bound)
  assert (size <= bound * (1 + 1e-12)).all()
  assert (bound <= epsilon * (1 + 1e-12)).all()
  assert float(result.peak) <= epsilon * (1 + 1e-12)


def test_one_state_meets_epsilon_at_the_cutoff():
  for a in (-0.3 + 0j, -0.3 + 5j, -2.0 - 7j):
    result = LOW_PASS(0.01, *map(vector, (a, 1.5 - 1j, 2j)))
    assert_close(result.peak, result.epsilon)
    edge = result.cutoff if a.imag >= 0 else -result.cutoff
    response = TRANSFER(edge[None], *map(vector, (a, 1.5 - 1j, 2j)))
    assert_close(jnp.abs(response)[0], result.epsilon)


def test_cutoff_grows_as_one_over_epsilon():
  layer = drawn(0, 4, False)
  edges = [float(theory.cutoff(0.1**k, *layer)) for k in range(4, 8)]
  ratios = np.divide(edges[1:], edges[:-1])
  np.testing.assert_allclose(ratios, 10, rtol=1e-2)


def test_epsilon_above_every_response_leaves_nothing_to_cut_off():
  result = LOW_PASS(0.9, *map(vector, (-2.0, 1.0, 1.0)))
  assert float(result.cutoff) == 0
  assert float(result.peak) == 0.5


def test_transfer_function_is_the_fourier_transform_of_the_kernel():
  a, b, c = drawn(1, 3, False)
  step = 2e-3
  times = step * np.arange(STEPS)
  kernel = (np.asarray(b * c) * np.exp(np.asarray(a) * times[:, None])).sum(1)
  assert abs(kernel[-1]) < 1e-4 * abs(kernel[0])
  # The kernel jumps at 0: a trapezoid counts half of it.
  kernel[0] /= 2
  spectrum = np.fft.fft(kernel) * step
  omega = 2 * np.pi * np.fft.fftfreq(STEPS, step)
  low = np.abs(omega) < 30
  response = np.asarray(TRANSFER(jnp.asarray(omega[low]), a, b, c))
  error = np.abs(response - spectrum[low]).max() / np.abs(response).max()
  assert error < 1e-3
  epsilon = 0.2 * np.abs(response).max()
  edge = float(theory.cutoff(epsilon, a, b, c))
  assert edge < 25
  peak = theory.stop_band_peak(
    jnp.asarray(omega[low]), jnp.asarray(spectrum[low]), edge
  )
  assert 0 < float(peak) <= epsilon


def test_definition_is_of_tails_only_so_a_band_pass_is_low_pass():
  # b₁c₁/a₁ = -b₂c₂/a₂: nothing of a constant input gets through.
  a, b, c = (jnp.asarray(v) for v in ([-1.0, -3.0], [1.0, -3.0], [1.0, 1.0]))
  still, moving = np.abs(TRANSFER(jnp.asarray([0.0, 1.5]), a, b, c))
  assert still < 1e-15 < 0.3 < moving
  result = LOW_PASS(1e-3, a, b, c)
  assert bool(result.premise.holds)
  assert float(result.peak) <= 1e-3


def test_a_skip_connection_is_never_low_pass():
  layer = drawn(2, 4, True)
  result = LOW_PASS(1e-3, *layer, skip=0.5)
  assert float(result.peak) > 0.49
  assert float(jnp.abs(result.response)[-1]) == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.25 + 3j, np.nan])
def test_an_eigenvalue_that_does_not_decay_is_caught(rate):
  a = np.full(4, -1.0, type(rate))
  a[2] = rate
  premise = theory.low_pass_premise(jnp.asarray(a))
  assert not premise.holds
  assert premise.worst.tolist() == [2]
  assert float(premise.excess) == pytest.approx(np.real(rate), nan_ok=True)
  assert float(premise.fraction) == 0.75
  assert premise.by_channel.tolist() == [1, 1, 0, 1]
  # The integral does not exist, whatever the formula gives.
  kernel = np.exp(a[2] * np.arange(4.0))
  assert not np.abs(kernel[-1]) < np.abs(kernel[0])


@pytest.mark.parametrize("epsilon", [0.0, -0.1, np.nan, -np.inf])
def test_an_epsilon_that_is_not_positive_is_refused(epsilon):
  one = jnp.ones(1)
  for function in (theory.low_pass, theory.cutoff):
    name = function.__name__
    with pytest.raises(ValueError, match=f"{name}: epsilon is .*expected"):
      function(epsilon, -one, one, one)
  with pytest.raises(ValueError, match=r"expected one in \(0, 1\)"):
    theory.low_pass(1.0, -one, one, one)
  # A traced one has no value to be refused by.
  traced = LOW_PASS(epsilon, -one, one, one)
  assert jnp.isnan(traced.cutoff)
  assert not traced.peak <= epsilon


@pytest.mark.parametrize("argument", range(3))
# XLA's reductions of few numbers keep NaN, those of many do not.
@pytest.mark.parametrize("states", [1, 5000])
def test_nan_passes_no_filter(argument, states):
  layer = [jnp.full(states, v) for v in (-1.0, 1.0, 1.0)]
  layer[argument] = layer[argument].at[0].set(jnp.nan)
  result = quick(theory.low_pass, static_argnames="points")(
    0.1, *layer, points=2
  )
  assert jnp.isnan(result.cutoff)
  assert not result.peak <= result.epsilon
  assert bool(result.premise.holds) == (argument != 0)
  # Nor a NaN in the frequency of an eigenvalue.
  turning = jnp.asarray([complex(-1.0, np.nan)])
  assert not theory.low_pass_premise(turning).holds


def test_cutoff_does_not_overflow_where_its_square_does():
  one = jnp.ones(1, jnp.float32)
  found = theory.cutoff(1e-3, -one, 1e30 * one, one)
  np.testing.assert_allclose(found, 1e33, rtol=1e-5)


def test_discrete_response_is_that_of_the_scan():
  a, b, c = drawn(3, 3, False)
  a = jnp.exp(a - 0.2)  # Gone within the length, to rounding.
  dt = jnp.asarray([0.5, 1.0, 2.0])
  length = 512
  impulse = jnp.zeros((1, length, 3), a.dtype).at[:, 0].set(b)
  wide = lambda v: jnp.broadcast_to(v, impulse.shape)
  layer = theory.from_arrays(wide(a), wide(dt), impulse, wide(c))
  kernel = np.asarray(quick(theory.outputs)(layer))[0, :, 0]
  theta = 2 * np.pi * np.fft.fftfreq(length)
  response = theory.discrete_transfer(jnp.asarray(theta), a, dt, b, c)
  assert_close(response, np.fft.fft(kernel))


def test_discrete_time_has_no_low_pass_and_a_zero_channel_is_all_pass():
  theta = jnp.linspace(-jnp.pi, jnp.pi, 101)
  for decay in (0.0, 0.3, 0.99):
    args = map(vector, (decay, 0.5, 2.0, 3.0))
    size = np.abs(quick(theory.discrete_transfer)(theta, *args))
    least = 0.5 * 6 / (1 + decay)
    assert size.min() == pytest.approx(least)
    assert size[0] == pytest.approx(least)
    assert size.max() == pytest.approx(0.5 * 6 / (1 - decay))


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda one: theory.transfer(one, one, jnp.ones(2), one),
      r"transfer: b has shape \(2,\), expected \(N=1\)",
    ),
    (
      lambda one: theory.cutoff(0.1, one.astype(jnp.int32), one, one),
      "cutoff: a has dtype int32, expected a floating type",
    ),
    (
      lambda one: theory.low_pass_premise(one[None]),
      r"low_pass_premise: a has shape \(1, 1\), expected \(N\)",
    ),
    (
      lambda one: theory.discrete_transfer(one, one, jnp.ones(3), one, one),
      r"discrete_transfer: dt has shape \(3,\), expected \(N=1\)",
    ),
    (
      lambda one: theory.cutoff(0.1, one[:0], one[:0], one[:0]),
      r"cutoff: a has shape \(0,\), expected a state or more",
    ),
    (
      lambda one: theory.transfer(one.astype(complex), one, one, one),
      "transfer: omega has dtype complex128, expected a real one",
    ),
    (
      lambda one: theory.discrete_transfer(
        one, one, one.astype(complex), one, one
      ),
      "discrete_transfer: dt has dtype complex128, expected a real one",
    ),
    (
      lambda one: theory.low_pass(0.1, -one, one, one, points=1),
      "low_pass: points is 1, expected 2 or more",
    ),
    (
      lambda one: theory.stop_band_peak(one, jnp.ones(2), 1.0),
      r"stop_band_peak: response has shape \(2,\), expected \(F=1\)",
    ),
  ],
)
def test_misfits_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call(jnp.ones(1))


def drawn(seed, states, real):
  rng = np.random.default_rng(seed)
  normal = lambda: rng.normal(size=states) + 1j * rng.normal(size=states)
  a, b, c = (
    -np.exp(rng.normal(size=states)) + 3j * normal().real,
    *(normal() for _ in range(2)),
  )
  return tuple(jnp.asarray(v.real if real else v) for v in (a, b, c))


def vector(value):
  return jnp.asarray([value])
