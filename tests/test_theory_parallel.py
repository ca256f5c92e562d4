"""Eq. 1, its parallel form and its other ways of being written agree."""

import functools

import appendix_b
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssmjax import theory
from ssmjax.models import Mamba, MambaConfig
from ssmjax.ops import linear_scan
from ssmjax.types import Polarization, Recurrence

pytestmark = pytest.mark.usefixtures("strict", "x64")

CHANNELS = 5
CHUNKED = functools.partial(MambaConfig, implementation="chunked")


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
@given(
  seed=st.integers(0, 2**31 - 1),
  length=st.sampled_from([1, 17]),
  started=st.booleans(),
)
@settings(
  max_examples=8,
  deadline=None,
  derandomize=True,
  # The fixtures are contexts; it is right that they stay on.
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_recurrence_is_its_weighted_sum_is_an_associative_scan(
  dtype, seed, length, started
):
  layer = drawn(seed, length, dtype, started)
  form, y, h, turned = both_forms(layer)
  chex.assert_shape(form.weights, (3, length, length, CHANNELS))
  assert form.states.dtype == dtype
  assert_close(form.parallel_states, form.states)
  assert_close(form.parallel_outputs, form.outputs)
  assert_close(y, form.states)
  assert_close(h, form.states[:, -1])
  assert_close(turned, form.outputs)


@pytest.mark.parametrize("name", sorted(appendix_b.FORMS))
def test_every_form_has_its_parallel_form(name):
  group = tuple(sorted(appendix_b.FORMS))
  p, x = drawn_tokens(0)
  sides = forms(group)(group.index(name), p, x)
  assert_close(sides[1], sides[0])


def test_long_products_through_zeros_and_ones_are_exact():
  rng = np.random.default_rng(0)
  a = rng.choice([0.0, 1.0], size=(1, 257, 3), p=[0.02, 0.98])
  b = rng.integers(-8, 9, size=a.shape).astype(float)
  layer = theory.from_arrays(*map(jnp.asarray, (a, np.ones_like(a), b)))
  form = quick(theory.parallel_form)(layer)
  np.testing.assert_array_equal(form.states, form.parallel_states)
  assert set(np.unique(form.weights)) == {0.0, 1.0}


def test_weights_fall_strictly_with_distance_but_a_large_step_outweighs_them():
  a = jnp.asarray(np.random.default_rng(1).uniform(0.01, 0.99, (2, 9, 4)))
  weights = np.asarray(quick(theory.parallel_weights)(a))
  for t in range(9):
    assert (np.diff(weights[:, t, : t + 1], axis=1) > 0).all()
    assert not weights[:, t, t + 1 :].any()
  # The paper's remark is of the weights without Δ.
  dt = jnp.ones_like(a).at[:, 0].set(1e20)
  whole = weights * np.asarray(dt)[:, None]
  assert (whole[:, -1, 0] > whole[:, -1, -1]).all()


@pytest.mark.parametrize(
  "polarization",
  [
    pytest.param(None, marks=pytest.mark.nightly),
    Polarization(ones=1, zeros=1),
    Polarization(ones=1, zeros=2, placement="replace"),
    Polarization(zeros=2, zero_decay="authors"),
  ],
)
def test_recurrence_of_a_mamba_reproduces_its_states_and_outputs(polarization):
  check_mamba(CHUNKED(d_state=4, polarization=polarization), jnp.float32)


@pytest.mark.nightly
def test_recurrence_of_the_authors_mamba_reproduces_it():
  config = CHUNKED(d_state=4, init="authors")
  check_mamba(config, jnp.float32)


@pytest.mark.nightly
def test_recurrence_of_a_half_precision_mamba_reproduces_it():
  config = CHUNKED(d_state=4, dtype=jnp.bfloat16)
  check_mamba(config, jnp.bfloat16)


@pytest.mark.nightly
def test_gradients_through_a_recurrence_are_those_of_the_mamba():
  model, x = mamba(CHUNKED(d_state=3, polarization=Polarization(ones=1)))

  def loss(run, model, x):
    with standard():
      return jnp.sin(run(model, x)).sum()

  grads = [
    quick(jax.grad(functools.partial(loss, run), (0, 1)))(model, x)
    for run in (
      lambda model, x: theory.outputs(model.recurrence(x)),
      lambda model, x: model(x)[0],
    )
  ]
  with standard():
    assert_close(*grads)


def test_a_batch_of_layers_is_mapped_as_any_pytree():
  layer = drawn(0, 4, "float64", True)
  stacked = jax.tree.map(lambda v: jnp.stack([v, v]), layer)
  h = quick(jax.vmap(theory.states))(stacked)
  assert_close(h[1], theory.states(layer))


def test_half_precision_arrays_are_computed_in_float32():
  half = jnp.full((1, 3, 2), 0.5, jnp.bfloat16)
  layer = theory.from_arrays(half, half[..., :1], half)
  assert theory.states(layer).dtype == jnp.float32
  assert theory.kappa(layer).dtype == jnp.float32


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(a=jnp.ones((2, 3))), r"a has shape \(2, 3\), expected one that"),
    (dict(dt=jnp.ones((2, 4, 1))), r"dt has shape \(2, 4, 1\), expected one"),
    (dict(c=jnp.ones((2, 3, 5))), r"c has shape \(2, 3, 5\), expected one"),
    (dict(b=jnp.ones((2,))), r"b has shape \(2,\), expected \(B, T, \*S\)"),
    (dict(b=jnp.ones((2, 0, 4))), "at least one token and one channel"),
    (dict(a=jnp.ones((2, 3, 4), jnp.int32)), "a has dtype int32, expected a"),
    (dict(initial_state=jnp.ones((2, 3))), r"shape \(2, 3\), expected \(2, 4"),
  ],
)
def test_misfits_are_named(change, message):
  good = dict(a=jnp.ones((2, 3, 4)), dt=jnp.ones((2, 3, 1)),
              b=jnp.ones((2, 3, 4)))  # fmt: skip
  theory.from_arrays(**good)
  with pytest.raises(ValueError, match=f"from_arrays: .*{message}"):
    theory.from_arrays(**(good | change))


def test_a_recurrence_that_does_not_fit_itself_is_refused_everywhere():
  one = jnp.ones((1, 2, 1))
  layer = Recurrence(one, one, one, one, jax.tree_util.Partial(len))
  for function in (
    theory.states, theory.parallel_form, theory.kappa, theory.oversmoothing,
    theory.recency_premises, theory.rotating_frame, theory.zero_order_hold,
  ):  # fmt: skip
    with pytest.raises(ValueError, match=f"{function.__name__}: initial_state"):
      function(layer)


def drawn(seed, length, dtype, started):
  """Random layers with decays of exactly 0 and 1, and negative ones."""
  rng = np.random.default_rng(seed)
  shape = (3, length, CHANNELS)
  kind = np.dtype(dtype).kind
  draw = lambda: (
    rng.normal(size=shape) + (1j * rng.normal(size=shape) if kind == "c" else 0)
  )
  a = rng.uniform(-1, 1, shape) * np.exp(1j * draw().real * (kind == "c"))
  a = a if kind == "c" else a.real
  a[..., 1], a[..., 2] = 1, 0
  a[rng.uniform(size=shape) < 0.1] = 0
  real = np.float32 if dtype == "float32" else np.float64
  cast = lambda v: jnp.asarray(v.astype(dtype))
  return theory.from_arrays(
    cast(a), jnp.asarray(rng.uniform(0, 2, shape).astype(real)), cast(draw()),
    cast(draw()), initial_state=cast(draw()[:, 0] * started),
  )  # fmt: skip


@quick
def both_forms(layer):
  form = theory.parallel_form(layer)
  drive = layer.dt.astype(layer.b.dtype) * layer.b
  y, h = linear_scan(
    layer.a, drive, initial_state=layer.initial_state,
    implementation="associative",
  )  # fmt: skip
  return form, y, h, theory.outputs(theory.rotating_frame(layer))


def drawn_tokens(seed):
  rng = np.random.default_rng(seed)
  p = rng.normal(size=(appendix_b.WEIGHTS, 3, 4))
  return jnp.asarray(p), jnp.asarray(rng.normal(size=(3, 7, 3)))


@functools.cache
def forms(group):
  @quick
  def run(index, p, x):
    form = theory.parallel_form(appendix_b.any_layer(group, index, p, x))
    left, right = form.states, form.parallel_states
    return (left, form.outputs), (right, form.parallel_outputs)

  return run


def mamba(config):
  build = quick(lambda key: Mamba(8, config, rngs=nnx.Rngs(key)))
  with standard():
    model = build(jax.random.key(0))
  return model, jax.random.normal(jax.random.key(1), (2, 19, 8), jnp.float32)


def check_mamba(config, dtype):
  model, x = mamba(config)

  @quick
  def run(model, x):
    with standard():
      y, state = model(x)
      eq1 = model.recurrence(x)
    h = theory.states(eq1)
    with standard():
      return y, state.ssm, theory.outputs(eq1, h), h[:, -1]

  y, state, outputs, last = run(model, x)
  assert_close(outputs, y, dtype)
  assert_close(last, state, dtype)


def standard():
  """Models run under JAX's own promotion of dtypes and ranks."""
  return appendix_b.usual_promotion()
