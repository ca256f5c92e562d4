"""Continuous time-invariant systems, made discrete.

h'(t) = A h(t) + B x(t) becomes hₜ = Ā hₜ₋₁ + B̄ xₜ at steps of Δ. The state
that takes xₜ in is hₜ itself, as in S4, and y is read from it.
"""

import jax.numpy as jnp
import jax.scipy.linalg
import numpy as np
from jax import lax

from ssmjax.types import (
  Array,
  Complex,
  Float,
  Inexact,
  check_arrays,
  check_inexact,
  real_dtype,
  state_dtype,
)

__all__ = ["bilinear", "bilinear_dplr", "zero_order_hold"]


def zero_order_hold(
  A: Inexact[Array, "*S N"],
  B: Inexact[Array, "*S N"],
  dt: Float[Array, "*S"] | float,
  *,
  dense: bool = False,
) -> tuple[Inexact[Array, "*S N"], Inexact[Array, "*S N"]]:
  """Discretise a system whose input is constant within a step.

  Ā = exp(ΔA),  B̄ = ∫₀^Δ exp(sA) B ds = (ΔA)⁻¹ (exp(ΔA) - I) ΔB

  B̄ is had without an inverse: small ΔA take the series of (eᶻ - 1)/z, so that
  A = 0 gives Ā = 1 and B̄ = ΔB to the bit, and every gradient is finite.

  Args:
    A: the diagonal, `[*S, N]`, or with `dense` the matrix, `[*S, N, N]`;
      per unit of time, real or complex.
    B: input weights, `[*S, N]`.
    dt: Δ ≥ 0, `[*S]` or a number. The axes `*S` broadcast from the right.
    dense: A is a matrix. Its 1-norm times Δ must be below 2·10⁵ (4·10⁵ in
      float64): the exponential is NaN above.

  Returns:
    Ā of A's shape and B̄ `[*S, N]`, with all of `*S`; float32 or wider,
    complex where A is (B̄ also where B is).

  Raises:
    ValueError: an argument of the wrong shape or dtype.

  Source: Gu & Dao 2023, Eq. 4 (Mamba); Gu et al. 2022, S4D, §3.1. For dense
  A: Van Loan 1978, one exponential of [[ΔA, ΔB], [0, 0]].

  >>> a, b = zero_order_hold(jnp.array([0.0, -1.0]), jnp.ones(2), 0.5)
  >>> b
  Array([0.5       , 0.39346933], dtype=float32)
  """
  A, B, step = _arguments("zero_order_hold", A, B, dt, dense)
  if not dense:
    z = product(step, A)
    return jnp.exp(z), product(step, expm1_ratio(z), B)
  row = _wide(
    product(step[..., None], A), product(step, B)[..., None]
  )  # fmt: skip
  row = jnp.concatenate(row, -1)
  whole = jnp.concatenate([row, jnp.zeros_like(row[..., :1, :])], -2)
  whole = jax.scipy.linalg.expm(whole)
  a, b = whole[..., :-1, :-1], whole[..., :-1, -1]
  return (a if jnp.iscomplexobj(A) else a.real), b


def bilinear(
  A: Inexact[Array, "*S N"],
  B: Inexact[Array, "*S N"],
  dt: Float[Array, "*S"] | float,
  *,
  dense: bool = False,
) -> tuple[Inexact[Array, "*S N"], Inexact[Array, "*S N"]]:
  """Discretise a system by the trapezoidal rule (Tustin).

  Ā = (I - ΔA/2)⁻¹ (I + ΔA/2),  B̄ = (I - ΔA/2)⁻¹ ΔB

  Stable A (eigenvalues in the left half-plane) gives stable Ā, and decay 0
  only where ΔA = -2. A fast mode, |ΔA| ≫ 2, turns into one that alternates:
  Ā → -1.

  Args:
    A: the diagonal, `[*S, N]`, or with `dense` the matrix, `[*S, N, N]`;
      no eigenvalue 2/Δ.
    B: input weights, `[*S, N]`.
    dt: Δ ≥ 0, `[*S]` or a number. The axes `*S` broadcast from the right.
    dense: A is a matrix.

  Returns:
    Ā and B̄ as `zero_order_hold`.

  Raises:
    ValueError: an argument of the wrong shape or dtype.

  Source: Tustin 1947; Gu et al. 2022, S4 (arXiv 2111.00396), Eq. 3.

  >>> bilinear(jnp.array([-2.0]), jnp.ones(1), 0.5)[0]
  Array([0.33333334], dtype=float32)
  """
  A, B, step = _arguments("bilinear", A, B, dt, dense)
  if not dense:
    half = product(0.5 * step, A)
    return (1 + half) / (1 - half), product(step, 1 / (1 - half), B)
  half = product(0.5 * step[..., None], A)
  unit = jnp.broadcast_to(jnp.eye(A.shape[-1], dtype=A.dtype), half.shape)
  a = jnp.linalg.solve(unit - half, unit + half)
  left, right = _wide(unit - half, product(step, B)[..., None])
  return a, jnp.linalg.solve(left, right)[..., 0]


def bilinear_dplr(
  A: Complex[Array, "*S N"],
  P: Complex[Array, "*S N"],
  B: Complex[Array, "*S N"],
  dt: Float[Array, "*S"] | float,
  *,
  Q: Complex[Array, "*S N"] | None = None,
  conjugate_pairs: bool = False,
) -> tuple[Array, Array, Array, Array]:
  """Discretise a diagonal-plus-low-rank system, in O(N).

  Ā = (I - Δ𝐀/2)⁻¹ (I + Δ𝐀/2) = diag(a) - u vᴴ,  𝐀 = diag(A) - P Qᴴ
  a = (1 + ΔA/2) g,  u = Δ g∘P / (1 + (Δ/2) Qᴴ(g∘P)),  v = ḡ∘Q,
  B̄ = Δ g∘B - (Δ/2) (vᴴB) u,  g = 1/(1 - ΔA/2)

  so that one token is hₜ = a∘hₜ₋₁ - u (vᴴhₜ₋₁) + B̄ xₜ.

  Args:
    A: the diagonal, `[*S, N]`.
    P: left factor, `[*S, N]`.
    B: input weights, `[*S, N]`.
    dt: Δ ≥ 0, `[*S]` or a number. The axes `*S` broadcast from the right.
    Q: right factor, `[*S, N]`; P if None (stable if Re A ≤ 0).
    conjugate_pairs: the N entries stand for 2N, themselves and their
      conjugates: then vᴴh above is 2 Re(vᴴh), as is Qᴴ(g∘P).

  Returns:
    a, u, v and B̄, all `[*S, N]`, complex64 or complex128.

  Raises:
    ValueError: an argument of the wrong shape or dtype.

  Source: Gu et al. 2022, S4 (arXiv 2111.00396), §C.2, with the inverse by
  Sherman and Morrison.

  >>> one = jnp.ones(1, jnp.complex64)
  >>> a, u, v, b = bilinear_dplr(-one, one, one, 1.0)
  >>> a - u * v.conj()  # (1 - 2/2) / (1 + 2/2)
  Array([0.+0.j], dtype=complex64)
  """
  function = "bilinear_dplr"
  check_arrays(function, A=A, P=P, B=B)
  Q = P if Q is None else Q
  check_arrays(function, Q=Q)
  shapes = [jnp.shape(x) for x in (A, P, B, Q)]
  for name, shape in zip("APBQ", shapes, strict=True):
    if shape[-1:] != shapes[0][-1:]:
      raise ValueError(
        f"{function}: {name} has shape {shape}, expected (..., N) with A's"
        f" N = {shapes[0][-1] if shapes[0] else None}."
      )
  check_inexact(function, P=P, Q=Q)
  dtype = np.result_type(state_dtype(A, P, B, Q), np.complex64)
  A, B, step = _arguments(function, A, B, dt, False)
  rank = A.ndim
  A, P, B, Q = (_to_rank(jnp.asarray(x, dtype), rank) for x in (A, P, B, Q))
  step = step.astype(dtype)
  g = 1 / (1 - 0.5 * step * A)
  v = g.conj() * Q

  def inner(x):
    total = (v.conj() * x).sum(-1, keepdims=True)
    return 2 * total.real.astype(dtype) if conjugate_pairs else total

  u = step * g * P / (1 + 0.5 * step * inner(P))
  b = step * g * B - 0.5 * step * inner(B) * u
  shape = jnp.broadcast_shapes(b.shape, u.shape)
  return *(
    jnp.broadcast_to(x, shape) for x in ((1 + 0.5 * step * A) * g, u, v)
  ), b


def expm1_ratio(z: Inexact[Array, "*S"]) -> Inexact[Array, "*S"]:
  """(eᶻ - 1)/z, 1 at 0: the mean of exp over the way from 0 to z."""
  small = jnp.abs(lax.stop_gradient(z)) < 0.5
  # Both branches are finite everywhere, and so are their derivatives.
  near, far = jnp.where(small, z, 0), jnp.where(small, 1, z)
  terms = 16 if jnp.finfo(z.dtype).bits == 64 else 9
  series = jnp.ones_like(z)
  for k in range(terms, 1, -1):
    series = 1 + near / k * series
  return jnp.where(small, series, (jnp.exp(far) - 1) / far)


def product(*factors: Array) -> Array:
  """Their product in the dtype that holds them all."""
  product, *rest = _wide(*factors)
  for factor in rest:
    product = product * factor
  return product


def _wide(*arrays):
  dtype = np.result_type(*(x.dtype for x in arrays))
  return [x.astype(dtype) for x in arrays]


def _to_rank(x, rank):
  return lax.expand_dims(x, range(rank - x.ndim))


def _arguments(function, A, B, dt, dense):
  """A, B and dt at full precision and, with its axis N, of equal ranks."""
  check_arrays(function, A=A, B=B)
  check_inexact(function, A=A, B=B)
  if not isinstance(dt, (int, float)):
    check_arrays(function, dt=dt)
    check_inexact(function, dt=dt)
  if jnp.iscomplexobj(dt):
    raise ValueError(f"{function}: dt is complex, expected a real step.")
  a, b, step = jnp.shape(A), jnp.shape(B), jnp.shape(dt)
  axes = 2 if dense else 1
  wanted = "(..., N, N)" if dense else "(..., N)"
  if len(a) < axes or (dense and a[-1] != a[-2]):
    raise ValueError(f"{function}: A has shape {a}, expected {wanted}.")
  if b[-1:] != a[-1:]:
    way_out = "" if dense else " For a matrix A pass dense=True."
    raise ValueError(
      f"{function}: B has shape {b}, expected (..., N={a[-1]}).{way_out}"
    )
  try:
    jnp.broadcast_shapes(a[:-axes], b[:-1], step)
  except ValueError as error:
    raise ValueError(
      f"{function}: dt has shape {step}, expected axes that broadcast with"
      f" {a[:-axes]} of A {a} and {b[:-1]} of B {b}: it has none for N."
    ) from error
  rank = 1 + max(len(a) - axes, len(b) - 1, len(step))
  real = real_dtype(A, B, dt)
  kind = lambda x: np.result_type(
    real, np.complex64 if jnp.iscomplexobj(x) else real
  )
  A = _to_rank(jnp.asarray(A).astype(kind(A)), rank + axes - 1)
  B = _to_rank(jnp.asarray(B).astype(kind(B)), rank)
  return A, B, _to_rank(jnp.asarray(dt, real)[..., None], rank)
