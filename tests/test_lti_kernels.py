"""S4D's, DSS's and S4's kernels: each is its recurrence, at any length."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from lti_systems import D, N, draw, held, in_float64, pulled, system, trapezoid

from ssmjax.ops import (
  dss_kernel,
  hippo_legs_dplr,
  linear_scan,
  s4_dplr_kernel,
  s4d_kernel,
  zero_order_hold,
)


def recurrence(a, b, c, length):
  """Re c aˡ b, one l after another."""

  def step(h, _):
    return h * a, (c * h).sum(-1).real

  h = b * jnp.ones_like(a * c)
  return jnp.moveaxis(lax.scan(step, h, length=length)[1], 0, -1)


def dense(A, p, b, c, dt, q, length):
  """Re C Āˡ B̄ of one channel of diag(A) - p qᴴ, by matrices."""

  def channel(A, p, b, c, dt, q):
    matrix = jnp.diag(A) - jnp.outer(p, q.conj())
    unit = jnp.eye(A.shape[0])
    left = unit - dt / 2 * matrix
    a = jnp.linalg.solve(left, unit + dt / 2 * matrix)
    h = jnp.linalg.solve(left, dt * b)
    step = lambda h, _: (a @ h, (c @ h).real)
    return lax.scan(step, h, length=length)[1]

  return jax.vmap(channel)(A, p, b, c, dt, q)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  ("kind", "rule", "length"),
  [
    ("c", "zoh", 1),
    ("r", "bilinear", 2),
    ("c", "bilinear", 37),
    ("r", "zoh", 64),
    ("c", "zoh", 257),
  ],
)
def test_s4d_kernel_and_gradients_equal_the_recurrence(kind, rule, length):
  A, B, C, dt = system(kind)
  if rule == "bilinear" and kind == "r":
    A[1, 0] = -2 / dt[1]  # Decay 0.
    A[2, 0] = -3 / dt[2]  # And below.
  discretise = held if rule == "zoh" else trapezoid

  def definition(A, B, C, dt):
    return recurrence(*discretise(A, B, dt), C, length)

  run = lambda A, B, C, dt: s4d_kernel(A, B, C, dt, length, discretization=rule)
  actual = quick(pulled(run))(A, B, C, dt)
  assert_close(actual, in_float64(pulled(definition), A, B, C, dt), "float32")


@pytest.mark.usefixtures("strict")
def test_s4d_kernel_is_right_after_many_turns():
  # Without damping every turn counts: 16,384 steps of 3 radians.
  A = np.asarray([[30j, -11.3j, 0.77j]], np.complex64)
  dt = np.asarray([0.1], np.float32)
  one = np.ones((1, 3), np.float32)
  length = 16384
  angle = A.astype(complex) * dt.astype(float)
  weight = (np.exp(angle) - 1) / A.astype(complex)
  expected = weight[..., None] * np.exp(angle[..., None] * np.arange(length))
  actual = s4d_kernel(A, one, one, dt, length)
  assert_close(actual, expected.sum(1).real, "float32")


@pytest.mark.usefixtures("strict")
def test_convolution_by_the_kernel_is_a_linear_scan():
  A, B, C, dt = system()
  length = 45
  x = draw((2, length, D), "r")
  kernel = np.asarray(s4d_kernel(A, B, C, dt, length), np.float64)
  y = [
    [np.convolve(x[i, :, d], kernel[d])[:length] for d in range(D)]
    for i in range(2)
  ]
  a, b = zero_order_hold(A, B, dt)
  u = x[..., None] * np.asarray(b)[None, None]
  states, _ = linear_scan(
    jnp.broadcast_to(a, (1, 1, D, N)), jnp.asarray(u, jnp.complex64)
  )
  expected = (states * C[None, None]).sum(-1).real
  assert_close(np.moveaxis(np.asarray(y), 1, 2), expected, "float32")


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  "length",
  [1, 37, *(pytest.param(n, marks=pytest.mark.nightly) for n in (2, 130))],
)
def test_dss_kernel_and_gradients_equal_a_softmax_by_its_sum(length):
  A, _, W, dt = system()
  A[0, 0] = -1e-3
  A[1, 1] = 20 + 3j  # Grows.
  A[2, 2] = 4j  # Neither grows nor decays.

  def definition(A, W, dt):
    x = (dt[:, None] * A)[..., None] * jnp.arange(length)
    # Any shift is the same softmax.
    weights = jnp.exp(x - lax.stop_gradient(x.real.max(-1, keepdims=True)))
    weights = weights / weights.sum(-1, keepdims=True)
    return jnp.einsum("dn,dnl->dl", W / A, weights).real

  run = lambda A, W, dt: dss_kernel(A, W, dt, length)
  actual = quick(pulled(run))(A, W, dt)
  assert_close(actual, in_float64(pulled(definition), A, W, dt), "float32")


@pytest.mark.usefixtures("strict")
def test_dss_kernel_does_not_overflow_where_modes_grow():
  A = jnp.asarray([[50.0 + 1j, -50.0 + 1j]], jnp.complex64)
  run = lambda A: dss_kernel(A, jnp.ones_like(A), jnp.ones(1), 1000)
  kernel = quick(run)(A)
  # All weight is on the last, or on the first.
  assert_close(kernel[0, -1], jnp.real(1 / A[0, 0]))
  assert_close(kernel[0, 0], jnp.real(1 / A[0, 1]))
  assert np.isfinite(quick(jax.grad(lambda A: run(A).sum()))(A)).all()


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  ("pairs", "tied", "length"),
  [(True, True, 1), (False, True, 2), (True, False, 37), (False, False, 130)],
)
def test_s4_kernel_and_gradients_equal_the_dense_recurrence(
  pairs, tied, length
):
  A, B, C, dt = system()
  p, q = draw((D, N), seed=5), draw((D, N), seed=6)
  q = p if tied else p + 0.2 * q

  def definition(A, p, b, c, dt, q):
    arrays = [A, p, b, c, p if tied else q]
    if pairs:
      arrays = [jnp.concatenate([x, x.conj()], -1) for x in arrays]
    A, p, b, c, q = arrays
    return dense(A, p, b, c, dt, q, length)

  def run(A, p, b, c, dt, q):
    return s4_dplr_kernel(
      A, p, b, c, dt, length, Q=None if tied else q, conjugate_pairs=pairs
    )

  args = (A, p, B, C, dt, q)
  actual = quick(pulled(run))(*args)
  assert_close(actual, in_float64(pulled(definition), *args), "float32")


@pytest.mark.usefixtures("strict")
def test_s4_kernel_of_legs_equals_its_recurrence():
  A, p, b, _ = (x[4:] for x in hippo_legs_dplr(8))
  narrow = lambda x: np.broadcast_to(x, (D, 4)).astype(np.complex64)
  args = [narrow(x) for x in (A, p, b)]
  C, dt = draw((D, 4)), np.asarray([1e-3, 1e-2, 0.1], np.float32)
  length = 500
  actual = s4_dplr_kernel(*args, C, dt, length, conjugate_pairs=True)
  both = [np.concatenate([x, x.conj()], -1) for x in (*args, C)]
  run = functools.partial(dense, length=length)
  expected = in_float64(run, *both, dt, both[1])
  assert_close(actual, expected, "float32")


@pytest.mark.usefixtures("strict")
def test_s4_kernel_has_no_singular_point():
  # At ρ = 1 a mode that stays divides by 0, and so does z = -1.
  zero, one = jnp.zeros((1, 1), jnp.complex64), jnp.ones((1, 1), jnp.complex64)

  def run(A):
    return s4_dplr_kernel(A, zero, one, one, jnp.ones(1), 100)

  assert_close(run(zero), jnp.ones((1, 100)))
  # d/dA aˡ b at A = 0 is l + 1/2.
  jacobian = jax.jacrev(lambda A: run(lax.complex(A, jnp.zeros((1, 1)))))
  gradient = jacobian(jnp.zeros((1, 1)))
  expected = jnp.arange(100, dtype=jnp.float32) + 0.5
  assert_close(gradient.reshape(100), expected)


@pytest.mark.usefixtures("strict", "x64")
def test_kernels_keep_float64():
  A, B, C, dt = (np.asarray(x, np.result_type(x, float)) for x in system())
  A[0, 0] = -1
  p = np.asarray(draw((D, N), seed=5), complex)
  run = functools.partial(in_float64, functools.partial(recurrence, length=67))
  expected = run(*in_float64(held, A, B, dt), C)
  assert_close(s4d_kernel(A, B, C, dt, 67), expected, "float64")
  x = dt[:, None] * A
  share = C / A * (np.exp(x) - 1) / (np.exp(67 * x) - 1)
  expected = run(np.exp(x), share, np.ones_like(x))
  assert_close(dss_kernel(A, C, dt, 67), expected, "float64")
  run = functools.partial(dense, length=67)
  expected = in_float64(run, A, p, B, C, dt, p)
  assert_close(s4_dplr_kernel(A, p, B, C, dt, 67), expected, "float64")


def kernels(length):
  """Each kernel as a function of (A, B, C, dt)."""
  return {
    "s4d": lambda A, B, C, dt: s4d_kernel(A, B, C, dt, length),
    "s4d bilinear": lambda A, B, C, dt: s4d_kernel(
      A, B, C, dt, length, discretization="bilinear"
    ),
    "dss": lambda A, B, C, dt: dss_kernel(A, C, dt, length),
    "s4": lambda A, B, C, dt: s4_dplr_kernel(A, B, B, C, dt, length),
  }


def damped():
  A, B, C, dt = system()
  return A - 1, B, C, dt


@pytest.mark.nightly
@pytest.mark.parametrize("name", kernels(1))
def test_no_kernel_has_all_powers_of_all_modes_in_memory(name):
  channels, modes, length = 64, 64, 8192
  wide = jax.ShapeDtypeStruct((channels, modes), jnp.complex64)
  dt = jax.ShapeDtypeStruct((channels,), jnp.float32)
  run = kernels(length)[name]
  loss = lambda *args: (run(*args) ** 2).sum()
  compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(wide, wide, wide, dt)
  used = compiled.compile().memory_analysis().temp_size_in_bytes
  # The Cauchy form has 6L points; its blocks are bounded, not √L.
  points = 6 * length if name == "s4" else length
  assert used < channels * modes * points * 8 / 4, used


@pytest.mark.nightly
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("name", kernels(1))
def test_kernels_map_and_divide(name):
  args = damped()
  run = kernels(21)[name]
  stacked = jax.tree.map(lambda x: jnp.stack([x, x]), args)
  mapped = quick(jax.vmap(run))(*stacked)
  assert_close(mapped, jnp.stack([quick(run)(*args)] * 2), "float32")
  # Channels on four devices, dt on all of them.
  mesh = jax.make_mesh((4,), ("d",), (AxisType.Auto,), devices=_four())
  wider = [jnp.concatenate([x, x[:1]]) for x in args]
  rows = lambda A, B, C, dt: (
    run(A, B, C, lax.dynamic_slice(dt, (lax.axis_index("d"),), (1,))) ** 2
  )
  split = jax.shard_map(
    rows, mesh=mesh, in_specs=(*[P("d")] * 3, P()), out_specs=P("d")
  )
  loss = lambda run: lambda *args: run(*args).sum()
  gradients = quick(jax.grad(loss(split), (0, 1, 2, 3)))(*wider)
  whole = jax.grad(loss(lambda *args: run(*args) ** 2), (0, 1, 2, 3))
  assert_close(gradients, quick(whole)(*wider), "float32")


@pytest.mark.nightly
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("name", ["s4d", "s4"])
def test_second_derivatives_by_reverse_and_forward_mode_agree(name):
  A, *others = damped()
  run = kernels(21)[name]
  along = lambda s: run(A * (1 + s).astype(np.complex64), *others).sum()
  second = quick(jax.grad(jax.grad(along)))(jnp.float32(0))
  slope = quick(jax.jacfwd(jax.jacfwd(along)))(jnp.float32(0))
  assert_close(second, slope, "float32")


@pytest.mark.nightly
@pytest.mark.parametrize(
  ("name", "kind"), [("s4d", AxisType.Auto), ("s4", AxisType.Explicit)]
)
def test_kernels_on_a_mesh_are_what_they_are_on_one_device(name, kind):
  args = [np.concatenate([x, x[:1]]) for x in damped()]
  run = quick(kernels(21)[name])
  mesh = jax.make_mesh((4,), ("d",), (kind,), devices=_four())
  sharding = jax.NamedSharding(mesh, P("d"))
  assert_close(run(*jax.device_put(args, sharding)), run(*args), "float32")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(B=np.ones(4)), "B has shape (4,), expected (D=3, N=4)"),
    (dict(C=np.ones((3, 3))), "C has shape (3, 3)"),
    (dict(A=np.ones((2, 4))), "A has shape (2, 4)"),
    (dict(A=np.ones((3, 4), int)), "A has dtype int"),
    (dict(dt=np.ones((3, 1))), "dt has shape (3, 1)"),
    (dict(dt=np.ones(3) * 1j), "dt is complex"),
    (dict(length=0), "length is 0"),
    (dict(length=2.0), "length is 2.0"),
    (dict(discretization="euler"), "discretization is 'euler'"),
  ],
)
def test_bad_input_is_named(change, message):
  arguments = dict(zip(("A", "B", "C", "dt"), system(), strict=True)) | change
  with pytest.raises(ValueError, match=r"^s4d_kernel: ") as error:
    s4d_kernel(**dict(length=3) | arguments)
  assert message in str(error.value)


def _four():
  return jax.devices()[:4]
