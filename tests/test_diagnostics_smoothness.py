"""Sharpness is what its definition says, and falls as the theorems say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick

from ssmjax import diagnostics, theory

pytestmark = pytest.mark.usefixtures("strict")

SHARPNESS = quick(diagnostics.sharpness, static_argnames="block")
SMOOTHNESS = quick(diagnostics.layer_smoothness)


def by_pairs(x, counts):
  """The four measures of one row from all pairs of tokens, in float64."""
  wide = np.complex128 if np.iscomplexobj(x) else np.float64
  x = np.asarray(x, wide)[np.asarray(counts)].reshape(counts.sum(), -1)
  pairs = [(t, s) for t in range(len(x)) for s in range(len(x)) if t != s]
  size = np.linalg.norm(x, axis=-1)
  apart = [np.linalg.norm(x[t] - x[s]) for t, s in pairs]
  cosines = [
    np.vdot(x[t], x[s]).real / (size[t] * size[s]) if size[t] * size[s] else 0.0
    for t, s in pairs
  ]
  return (
    max(np.abs(x[t] - x[s]).max() for t, s in pairs),
    np.mean(apart),
    np.mean(apart) / size.mean(),
    1 - np.mean(cosines),
  )


@functools.cache
def points(kind):
  """Two rows of seven tokens, `[2, 7, 3, 2]`, one of them 0."""
  keys = jax.random.split(jax.random.key(0), 2)
  x, y = (jax.random.normal(key, (2, 7, 3, 2)) for key in keys)
  x = jax.lax.complex(x, y) if kind == "complex" else x
  return x.at[0, 2].set(0)


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize(
  "masked", [pytest.param(False, marks=pytest.mark.nightly), True]
)
def test_sharpness_is_what_the_pairs_of_tokens_give(kind, masked):
  x = points(kind)
  mask = np.ones((2, 7), bool)
  if masked:
    mask[0, [0, 4]], mask[1, 3:] = False, False
    # Padding may hold anything.
    x = jnp.where(jnp.asarray(mask)[..., None, None], x, jnp.nan)
  found = SHARPNESS(x, mask=jnp.asarray(mask) if masked else None, block=3)
  expected = np.array([by_pairs(x[i], mask[i]) for i in range(2)]).T
  for value, wanted in zip(found, expected, strict=True):
    assert_close(value, wanted, jnp.float32)


def test_sharpness_of_tokens_that_lie_close_together_does_not_cancel():
  rng = np.random.default_rng(0)
  near = 1 + 1e-5 * rng.normal(size=(1, 9, 4))
  x = jnp.asarray(near, jnp.float32)
  expected = np.array(by_pairs(x[0], np.ones(9, bool)))
  found = SHARPNESS(x)
  assert_close(found.mean, expected[1:2], jnp.float32)
  assert_close(found.relative, expected[2:3], jnp.float32)
  # One less a mean of cosines would leave no digit of some 1e-10.
  np.testing.assert_allclose(found.cosine, expected[3:], rtol=1e-2)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_sharpness_grows_with_the_size_alone(size):
  x = points("real")
  one, other = SHARPNESS(x), SHARPNESS(x * size)
  assert_close(other.mean / size, one.mean)
  assert_close(other.maximum / size, one.maximum)
  assert_close(other.relative, one.relative)
  assert_close(other.cosine, one.cosine)


@pytest.mark.parametrize(
  "tokens",
  [
    # Large and close together; one token of nothing beside others; the end.
    [[1, 1e-25], [1, 2e-25], [1, -3e-25]],
    [[1, 0], [1e-25, 1e-25], [0, 1]],
    [[1e38, 0], [-1e38, 1], [0, 1e38]],
  ],
)
def test_sharpness_holds_where_squares_do_not(tokens):
  x = jnp.asarray([tokens], jnp.float32)
  expected = by_pairs(x[0], np.ones(3, bool))
  for value, wanted in zip(SHARPNESS(x), expected, strict=True):
    np.testing.assert_allclose(value, [wanted], rtol=1e-5)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
# XLA's reductions of few numbers keep NaN, those of many do not.
@pytest.mark.parametrize(
  "width", [pytest.param(1, marks=pytest.mark.nightly), 5000]
)
def test_what_is_not_finite_is_not_smooth(value, width):
  x = jnp.zeros((1, 3, width)).at[0, 1, -1].set(value)
  for found in SHARPNESS(x):
    assert not jnp.isfinite(found).any()
  half = jnp.full_like(x, 0.5)
  layer = SMOOTHNESS(theory.from_arrays(half, half, x))
  assert not jnp.isfinite(layer.channel_ratio[0, -1])
  assert not jnp.isfinite(layer.ratio.maximum).any()


def test_sharpness_of_equal_tokens_and_of_one_token_is_nothing():
  equal = SHARPNESS(jnp.full((2, 5, 3), 0.3, jnp.bfloat16))
  for value in equal:
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, 0, atol=1e-6)
  for value in SHARPNESS(jnp.ones((2, 1, 3))):
    np.testing.assert_array_equal(value, 0)
  none = SHARPNESS(jnp.ones((1, 3)), mask=jnp.zeros((1, 3), bool))
  assert none.maximum == none.mean == none.cosine == 0
  assert jnp.isnan(none.relative[0])


def test_sharpness_says_what_does_not_fit():
  with pytest.raises(ValueError, match="dtype int32"):
    diagnostics.sharpness(jnp.ones((1, 3, 2), jnp.int32))
  with pytest.raises(ValueError, match="none empty"):
    diagnostics.sharpness(jnp.ones((1, 0, 2)))
  with pytest.raises(ValueError, match="block is 0"):
    diagnostics.sharpness(jnp.ones((1, 3, 2)), block=0)
  with pytest.raises(ValueError, match="mask has shape"):
    diagnostics.sharpness(jnp.ones((1, 3, 2)), mask=jnp.ones((1, 2), bool))


def selective(polarized):
  """S6's Eq. 1 on 9 tokens: four channels of four states."""
  keys = jax.random.split(jax.random.key(1), 2)
  dt = jax.random.uniform(keys[0], (2, 9, 4, 1), jnp.float32, 0.05, 0.4)
  a = jnp.exp(-dt * jnp.arange(1.0, 5.0)[None, None, None])
  if polarized:
    a = a.at[..., -1].set(0.0)
  return theory.from_arrays(a, dt, jax.random.normal(keys[1], a.shape))


@pytest.mark.parametrize("polarized", [False, True])
def test_smoothness_of_a_layer_stays_within_what_the_theorems_allow(polarized):
  recurrence, output = selective(polarized), points("real")
  found = SMOOTHNESS(recurrence, output, output)
  h = theory.states(recurrence)
  assert_close(found.h.maximum, jnp.abs(h[:, :, None] - h[:, None]).max(
    (1, 2, 3, 4)))  # fmt: skip
  assert_close(found.ratio.maximum, found.h.maximum / found.b.maximum)
  assert_close(found.ratio.mean, found.h.mean / found.b.mean)
  assert_close(found.mixer, SHARPNESS(output))
  assert_close(found.block, found.mixer)
  slack = 1 + 1e-5
  assert (found.ratio.maximum <= found.hull_factor * slack).all()
  applies = found.kappa.applies
  within = found.channel_ratio <= found.kappa.factor * slack
  assert (within | ~applies).all()
  within = found.channel_ratio <= found.theorem.factor * slack
  assert (within | ~found.theorem.premises.applies).all()
  # S6's first state never meets the premise, the others mostly.
  assert 0.2 < found.premise < 1
  assert (found.theorem.a_min == 0).any() == polarized
  power = found.theorem.a_min.min((1, 2)) ** 8
  assert_close(found.factor, 1 - power)


def test_smoothness_is_tight_where_the_theorem_is():
  a = jnp.full((1, 6, 1), 0.7)
  b = jnp.ones((1, 6, 1)).at[:, 0].set(0)
  found = SMOOTHNESS(theory.from_arrays(a, 1 - a, b))
  assert_close(found.ratio.maximum, 1 - jnp.array([0.7**5]))
  assert_close(found.factor, found.ratio.maximum)
  assert_close(found.kappa_factor, found.ratio.maximum)
  assert_close(found.hull_factor, found.ratio.maximum)
  assert found.premise == 1
  assert found.mixer is None
  assert found.block is None


def test_smoothness_of_turning_states_is_seen_by_who_turns_with_them():
  turning = lambda angle: jax.lax.complex(jnp.cos(angle), jnp.sin(angle))
  b = turning(jnp.arange(1.0, 9.0))[None, :, None]
  a = 0.5 * turning(jnp.ones((1, 8, 1)))
  found = SMOOTHNESS(theory.from_arrays(a, jnp.full((1, 8, 1), 0.5), b))
  # To the others b and h both run in circles; here b stands still.
  assert found.b.maximum < 1e-5
  assert found.h.maximum > 0.3
  assert found.ratio.maximum <= found.hull_factor * (1 + 1e-5)


def test_a_ratio_to_inputs_that_do_not_differ_is_infinite_or_nothing():
  half = jnp.full((1, 4, 1), 0.5)
  moved = SMOOTHNESS(theory.from_arrays(half, half, half))
  still = SMOOTHNESS(theory.from_arrays(half, half, 0 * half))
  assert (moved.channel_ratio == jnp.inf).all()
  assert (still.channel_ratio == 0).all()
