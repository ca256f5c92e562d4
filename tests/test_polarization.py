"""Decays of exactly one and exactly zero, and what the paper says of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick

from ssmjax.ops import linear_scan, selective_scan
from ssmjax.ops.selective_associative import selective_scan_chunks
from ssmjax.polarization import (
  Polarization,
  polarize,
  polarize_log,
  selective_decay,
)

pytestmark = pytest.mark.usefixtures("strict")

BOTH = Polarization(ones=1, zeros=1)
LONG = 1_000_000


def integers():
  """A million steps from -8 to 8; their sum stays far below 2**24."""
  return np.random.default_rng(0).integers(-8, 9, LONG)


def long_arguments(steps):
  u = jnp.asarray(steps, jnp.float32)[None, :, None]
  one = jnp.ones_like(u)
  B = jnp.concatenate([one, one], -1)
  return u, one, -jnp.ones((1, 1)), B, B


def test_a_one_channel_is_the_exact_sum_of_a_million_integers():
  steps = integers()
  total = steps.sum(dtype=np.int64)
  assert np.abs(np.cumsum(steps, dtype=np.int64)).max() < 2**24
  args = long_arguments(steps)
  polarization = Polarization(ones=1)
  _, state = selective_scan(
    *args, polarization=polarization, implementation="chunked"
  )
  assert int(state[0, 0, 0]) == total
  u, delta, A, B, C = args
  none = (None,) * 4
  _, state = selective_scan_chunks(
    u, delta, A, B, C, *none, None, None, None,
    delta_softplus=False, ones=1, chunk=32,
  )  # fmt: skip
  assert int(state[0, 0, 0]) == total
  y, _ = linear_scan(jnp.ones((1, 1, 1)), u)
  np.testing.assert_array_equal(
    np.asarray(y, np.int64)[0, :, 0], np.cumsum(steps, dtype=np.int64)
  )


@pytest.mark.nightly
def test_associative_too_sums_a_million_integers_exactly():
  steps = integers()
  u, *rest = long_arguments(steps)
  y, _ = linear_scan(jnp.ones((1, 1, 1)), u, implementation="associative")
  sums = np.cumsum(steps, dtype=np.int64)
  np.testing.assert_array_equal(np.asarray(y, np.int64)[0, :, 0], sums)
  _, state = selective_scan(
    u, *rest, polarization=Polarization(ones=1), implementation="associative"
  )
  assert int(state[0, 0, 0]) == sums[-1]


def small(seed=0, length=9, polarization=BOTH):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
  total = polarization.total(2)
  return dict(
    u=draw(2, length, 3),
    delta=jnp.abs(draw(2, length, 3)),
    A=-jnp.exp(draw(3, 2)),
    B=draw(2, length, total),
    C=draw(2, length, total),
  )


@pytest.mark.parametrize("form", ["associative", "chunked", "reference"])
def test_a_zero_channel_never_sees_the_past(form):
  only = Polarization(zeros=2, placement="replace")
  run = quick(
    functools.partial(selective_scan, polarization=only, implementation=form)
  )
  args = small(polarization=only)
  for step in (0.0, 1e-6, 10.0):
    args["delta"] = jnp.full_like(args["delta"], step)
    y, state = run(**args)
    last = (args["delta"] * args["u"])[:, -1, :, None] * args["B"][:, -1, None]
    np.testing.assert_array_equal(state, last)
    past = {k: args[k].at[:, :5].set(jnp.nan) for k in ("u", "delta", "B", "C")}
    start = jnp.full_like(state, jnp.inf)
    again = run(**(args | past), initial_state=start)
    np.testing.assert_array_equal(again[0][:, 5:], y[:, 5:])
    np.testing.assert_array_equal(again[1], state)
  influence = jax.jacobian(lambda u: run(**(args | dict(u=u)))[0][0, :, 0])
  jacobian = np.asarray(influence(args["u"]))[:, 0, :, 0]
  assert np.diag(jacobian).all()
  np.testing.assert_array_equal(jacobian, np.diag(np.diag(jacobian)))


def test_compatibility_modes_leak_what_the_paper_does_not_say():
  A = -jnp.ones((1, 1))
  for mode, step, leak in (
    ("authors", 1e-3, 0.905),
    ("paper", 1e-3, 0.368),
    ("authors", 1e-2, 0.368),
    ("exact", 1e-3, 0.0),
    ("exact", 0.0, 0.0),
  ):
    polarization = Polarization(zeros=1, zero_decay=mode)
    decay = selective_decay(jnp.full((1, 1), step), A, polarization)
    assert float(decay[0, 0, -1]) == pytest.approx(leak, abs=5e-4)
    # So does the state: half a memory of the first token stays.
    x = jnp.array([1.0, 0.0])[None, :, None]
    _, state = selective_scan(
      x, jnp.full((1, 2, 1), step), A, jnp.ones((1, 2, 2)),
      jnp.ones((1, 2, 2)), polarization=polarization,
    )  # fmt: skip
    assert float(state[0, 0, -1]) == pytest.approx(leak * step, rel=1e-3)


def test_gradient_of_the_step_is_that_of_the_papers_appendix(x64):
  args = small()
  weights = small(seed=1)["u"]
  total = lambda args, **options: (
    selective_scan(**args, **options)[0] * weights
  ).sum()
  actual = quick(jax.grad(functools.partial(total, polarization=BOTH)))(args)

  # Wang et al. 2025, E.5.1: Σₙ ∂ℓ/∂hₜₙ (Aₙ exp(ΔₜAₙ) hₜ₋₁,ₙ + bₜₙ), where a
  # one-channel has A = 0 and a zero-channel's first term is its limit, 0.
  a = selective_decay(args["delta"], args["A"], BOTH)
  b = args["u"][..., None] * args["B"][:, :, None]
  rates = jnp.pad(args["A"], ((0, 0), (1, 1)))[None, None]
  h, _ = linear_scan(a, args["delta"][..., None] * b)
  before = jnp.pad(h[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
  after = jnp.pad(a[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
  read = weights[..., None] * args["C"][:, :, None]
  adjoint, _ = linear_scan(after, read, reverse=True)
  expected = (adjoint * (rates * a * before + b)).sum(-1)
  assert_close(actual["delta"], expected)

  # The exact zero is the limit of finite rates, in every gradient.
  away = args | dict(delta=args["delta"] + 0.1)
  exact = quick(jax.grad(functools.partial(total, polarization=BOTH)))(away)
  rates = jnp.pad(args["A"], ((0, 0), (1, 0)))
  finite = jnp.pad(rates, ((0, 0), (0, 1)), constant_values=-1e4)
  limit = quick(jax.grad(total))(away | dict(A=finite))
  limit["A"] = limit["A"][:, 1:-1]
  assert_close(exact, limit)


def test_added_channels_grow_the_state_and_replaced_ones_learn_nothing():
  added = small()
  _, state = selective_scan(**added, polarization=BOTH)
  assert state.shape == (2, 3, 4)
  replace = Polarization(ones=1, zeros=1, placement="replace")
  args = small(polarization=replace) | dict(A=-jnp.ones((3, 4)))
  args |= {k: added[k] for k in ("B", "C")}

  def loss(A, form):
    y, state = selective_scan(
      **(args | dict(A=A)), polarization=replace, implementation=form
    )
    return (y**2).sum() + (state**2).sum()

  for form in ("associative", "chunked", "reference"):
    slope = quick(jax.grad(functools.partial(loss, form=form)))(args["A"])
    assert not np.asarray(slope[:, [0, 3]]).any()
    assert np.asarray(slope[:, 1:3]).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
def test_polarize_holds_the_ends_of_any_axis(dtype):
  a = jnp.full((2, 4, 3), 0.5).astype(dtype)
  for axis in (1, -2):
    grown = polarize(a, Polarization(ones=1, zeros=2), axis=axis)
    assert (grown.shape, grown.dtype) == ((2, 7, 3), dtype)
    column = np.asarray(grown[0, :, 0].astype(jnp.complex64))
    np.testing.assert_array_equal(column, [1, 0.5, 0.5, 0.5, 0.5, 0, 0])
    held = Polarization(ones=1, zeros=2, placement="replace")
    same = polarize(a, held, axis=axis)
    column = np.asarray(same[0, :, 0].astype(jnp.complex64))
    np.testing.assert_array_equal(column, [1, 0.5, 0, 0])
    logs = polarize_log(jnp.log(a), held, axis=axis)
    assert logs.dtype == dtype
    column = np.asarray(jnp.exp(logs)[0, :, 0].astype(jnp.complex64))
    np.testing.assert_array_equal(column[[0, 2, 3]], [1, 0, 0])
  real = jnp.full((1, 4), 0.5)
  slope = jax.grad(lambda a: polarize(a, held).sum())(real)
  np.testing.assert_array_equal(slope, [[0, 1, 0, 0]])
  slope = jax.grad(lambda a: jnp.exp(polarize_log(a, held)).sum())(real)
  assert np.isfinite(slope).all()


def test_decays_are_float32_whatever_the_activations_are():
  delta = jnp.full((1, 2, 3), 1e-3, jnp.bfloat16)
  A = -jnp.ones((3, 2), jnp.bfloat16)
  decay = selective_decay(delta, A, BOTH)
  assert (decay.shape, decay.dtype) == ((1, 2, 3, 4), jnp.float32)
  expected = np.exp(-np.asarray(delta, np.float64))[..., None]
  assert_close(decay[..., 1:2], expected)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda a: polarize(a, Polarization(ones=3, placement="replace")),
      "replace more channels than the 2 learned ones",
    ),
    (
      lambda a: polarize(a, Polarization(zeros=1, zero_decay="paper")),
      "polarize: zero_decay is 'paper', expected 'exact'. .*selective_decay",
    ),
    (
      lambda a: polarize(a, BOTH, axis=2),
      r"polarize: axis is 2, expected one of the 2 axes .* \(3, 2\)",
    ),
    (
      lambda a: polarize_log(a, BOTH, axis=-3),
      "polarize_log: axis is -3, expected one of the 2 axes",
    ),
    (
      lambda a: polarize_log(a.astype(jnp.int32), BOTH),
      "polarize_log: a has dtype int32, expected a floating type",
    ),
    (
      lambda a: selective_decay(jnp.ones((1, 4)), a, BOTH),
      r"selective_decay: delta has shape \(1, 4\), expected \(1, D=3\)",
    ),
  ],
)
def test_errors_name_what_was_found_and_the_way_out(call, message):
  with pytest.raises(ValueError, match=message):
    call(jnp.ones((3, 2)))
