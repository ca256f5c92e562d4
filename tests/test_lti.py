"""Time-invariant systems: discretised, and HiPPO's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from lti_systems import D, N, draw, held, in_float64, pulled, system, trapezoid

from ssmjax.ops import (
  bilinear,
  bilinear_dplr,
  hippo_legs,
  hippo_legs_dplr,
  hippo_legt,
  zero_order_hold,
)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("kind", ["r", "c"])
@pytest.mark.parametrize(
  ("function", "definition"), [(zero_order_hold, held), (bilinear, trapezoid)]
)
def test_discretisation_and_gradients_equal_their_formula(
  function, definition, kind
):
  A, B, _, dt = system(kind)
  expected = in_float64(pulled(definition), A, B, dt)
  actual = jax.jit(pulled(function))(A, B, dt)
  assert_close(actual, expected, "float32")
  assert actual[0][0].dtype == A.dtype


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("function", [zero_order_hold, bilinear])
def test_dense_discretisation_of_a_diagonal_is_the_diagonal_one(function):
  A, B, _, dt = system()
  diagonal = functools.partial(function, dense=False)
  matrix = lambda A, B, dt: function(jax.vmap(jnp.diag)(A), B, dt, dense=True)
  (a, b), gradients = jax.jit(pulled(diagonal))(A, B, dt)
  (a_dense, b_dense), _ = jax.jit(pulled(matrix))(A, B, dt)
  assert_close(a_dense, jax.vmap(jnp.diag)(a), "float32")
  assert_close(b_dense, b, "float32")
  only_b = lambda function: pulled(lambda *args: function(*args)[1])
  assert_close(
    jax.jit(only_b(matrix))(A, B, dt),
    jax.jit(only_b(diagonal))(A, B, dt),
    "float32",
  )
  assert all(np.isfinite(g).all() for g in gradients)


def test_dense_zero_order_hold_is_the_exponential_of_a_matrix_not_normal():
  A, B = hippo_legs(6)
  # Eigenvalues are -1 … -6, so powers of A are polynomials: exact by squaring.
  step = 0.1
  tiny = (
    np.eye(6) + step * A / 2**30 + (step * A / 2**30) @ (step * A / 2**30) / 2
  )
  a = np.linalg.matrix_power(tiny, 2**30)
  b = np.linalg.solve(A, (a - np.eye(6)) @ B)
  actual = zero_order_hold(
    jnp.asarray(A, jnp.float32), jnp.asarray(B, jnp.float32), step, dense=True
  )
  assert_close(actual, (a, b), "float32")


@pytest.mark.nightly
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("function", [zero_order_hold, bilinear])
@pytest.mark.parametrize("kind", ["r", "c"])
@pytest.mark.parametrize("dense", [False, True])
def test_no_drift_adds_the_input_and_has_a_gradient(function, kind, dense):
  shape = (N, N) if dense else (N,)
  A = jnp.zeros(shape, np.complex64 if kind == "c" else np.float32)
  B = jnp.asarray(draw((N,), kind))
  dt = jnp.float32(0.25)
  a, b = function(A, B, dt, dense=dense)
  np.testing.assert_array_equal(a, np.eye(N) if dense else np.ones(N))
  if dense:
    assert_close(b, 0.25 * B, "float32")
  else:
    np.testing.assert_array_equal(b, 0.25 * B)
  # B̄ = ΔB + Δ²AB/2 + …
  run = lambda A, dt: function(A, B, dt, dense=dense)[1].real.sum()
  dA, d_dt = jax.grad(run, (0, 1))(A, dt)
  expected = jnp.broadcast_to(0.03125 * B, A.shape)
  assert_close(dA, expected, "float32")
  assert_close(d_dt, B.real.sum(), "float32")


@pytest.mark.usefixtures("strict")
def test_strong_decay_and_tiny_steps_are_right():
  A = jnp.array([-1e8, -1e4, -1.0, -1e-20, 0.0])
  one = jnp.ones(5)
  a, b = zero_order_hold(A, one, 1.0)
  np.testing.assert_allclose(a, [0, 0, np.exp(-1), 1, 1], rtol=1e-6)
  np.testing.assert_allclose(b, [1e-8, 1e-4, 1 - np.exp(-1), 1, 1], rtol=1e-6)
  # 1 - e⁻ᶻ by subtraction would be 0 here, or off by a few percent.
  b = zero_order_hold(-one, one, 1e-6)[1]
  np.testing.assert_allclose(b, 1e-6 - 5e-13, rtol=1e-6)
  a, b = bilinear(jnp.array([-2.0, -1e8]), jnp.ones(2), 1.0)
  assert a[0] == 0
  np.testing.assert_allclose(a[1], -1, rtol=1e-6)


@pytest.mark.usefixtures("strict")
def test_bfloat16_is_discretised_in_float32():
  A = jnp.asarray([-1.0, -0.5], jnp.bfloat16)
  for function in (zero_order_hold, bilinear):
    a, b = function(A, A, jnp.asarray(0.5, jnp.bfloat16))
    assert a.dtype == b.dtype == jnp.float32
    wide = A.astype(jnp.float32)
    assert_close((a, b), function(wide, wide, 0.5))


@pytest.mark.usefixtures("strict")
def test_leading_axes_of_a_discretisation_broadcast():
  a, b = zero_order_hold(-jnp.ones((D, N)), jnp.ones(N), jnp.ones((2, 5, D)))
  assert a.shape == b.shape == (2, 5, D, N)
  matrix = jnp.broadcast_to(-jnp.eye(N), (D, N, N))
  a, b = bilinear(matrix, jnp.ones(N), jnp.ones((2, D)), dense=True)
  assert (a.shape, b.shape) == ((2, D, N, N), (2, D, N))


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("pairs", [False, True])
def test_low_rank_discretisation_equals_the_dense_one(pairs):
  A, B, _, dt = system()
  p, q = draw((D, N), seed=5), 0.3 * draw((D, N), seed=6)
  a, u, v, b = bilinear_dplr(A, p, B, dt, Q=q, conjugate_pairs=pairs)
  if pairs:
    both = lambda x: np.concatenate([x, np.conj(x)], -1)
    A, B, p, q, a, u, v, b = map(both, (A, B, p, q, a, u, v, b))
  outer = lambda x, y: x[:, :, None] * np.conj(y)[:, None]
  matrix = jax.vmap(jnp.diag)(jnp.asarray(A)) - outer(p, q)
  expected = bilinear(matrix, jnp.asarray(B), dt, dense=True)
  actual = jax.vmap(jnp.diag)(jnp.asarray(a)) - outer(u, v)
  assert_close((actual, jnp.asarray(b)), expected, "float32")


@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_legs_is_normal_plus_rank_one_in_its_basis(size):
  A, B = hippo_legs(size)
  diagonal, p, b, V = hippo_legs_dplr(size)
  rebuilt = V @ (np.diag(diagonal) - np.outer(p, p)) @ V.conj().T
  assert_close(rebuilt, A.astype(complex), "float64")
  assert_close(V @ V.conj().T, np.eye(size, dtype=complex), "float64")
  assert_close(V @ b, B.astype(complex), "float64")
  assert (diagonal.real == -0.5).all()
  assert (p > 0).all()
  np.testing.assert_array_equal(diagonal[::-1], diagonal.conj())
  np.testing.assert_array_equal(V[:, ::-1], V.conj())


def test_legs_keeps_a_constant_and_a_slope():
  A, B = hippo_legs(7)
  # t c' = A c + B x: for x = 1 at rest, for x = t it is c = t e.
  constant = np.linalg.solve(A, -B)
  slope = np.linalg.solve(np.eye(7) - A, B)
  assert_close(constant, np.eye(7)[0], "float64")
  expected = np.zeros(7)
  expected[:2] = 1 / 2, 1 / (2 * np.sqrt(3))
  assert_close(slope, expected, "float64")


def test_legt_keeps_a_constant_and_a_slope_over_its_window():
  A, B = hippo_legt(7, window=20.0)
  at_rest = np.eye(7)[0]
  assert_close(A @ at_rest, -B, "float64")
  # x(t - s) = t - s is (t - θ/2) P₀ - θ/2 P₁ of 2s/θ - 1; its slope is 1.
  lag = np.zeros(7)
  lag[:2] = -10.0
  assert_close(A @ lag, at_rest, "float64")


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda A, B, dt: zero_order_hold(A, B[:, :2], dt), "(..., N=4)"),
    (lambda A, B, dt: zero_order_hold(A, B, dt[:2]), "dt has shape (2,)"),
    (lambda A, B, dt: bilinear(A, B, dt, dense=True), "(..., N, N)"),
    (lambda A, B, dt: bilinear(A, B, 1j * dt), "dt is complex"),
    (lambda A, B, dt: bilinear(A.real.astype(int), B, dt), "A has dtype int"),
    (lambda A, B, dt: bilinear_dplr(A, B[:, :2], B, dt), "P has shape (3, 2)"),
    (lambda A, B, dt: hippo_legs(0), "size is 0"),
    (lambda A, B, dt: hippo_legt(3, 0.0), "window is 0.0"),
  ],
)
def test_bad_input_is_named(call, message):
  A, B, _, dt = system()
  with pytest.raises(ValueError, match=r"^\w+: ") as error:
    call(A, B, dt)
  assert message in str(error.value)
