"""Convolution kernels of the linear time-invariant layers: S4D, DSS and S4.

y = K * x with K[l] = Re C Āˡ B̄ is the recurrence hₜ = Ā hₜ₋₁ + B̄ xₜ,
yₜ = Re C hₜ (`lti_scan`), all at once. There is no factor 2 in it: a layer that
keeps one of each conjugate pair doubles C, or for S4 says `conjugate_pairs`.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ssmjax.ops.lti import bilinear, expm1_ratio, product
from ssmjax.ops.lti_powers import integer_powers, powers
from ssmjax.types import (
  Array,
  Complex,
  Float,
  Inexact,
  check_arrays,
  check_choice,
  check_inexact,
  real_dtype,
)

__all__ = ["dss_kernel", "s4_dplr_kernel", "s4d_kernel"]

# Entries of a Cauchy matrix at once: 4 M complex numbers, 32 MB.
_BLOCK_ENTRIES = 1 << 22


def s4d_kernel(
  A: Inexact[Array, "D N"],
  B: Inexact[Array, "D N"],
  C: Inexact[Array, "D N"],
  dt: Float[Array, " D"],
  length: int,
  *,
  discretization: Literal["zoh", "bilinear"] = "zoh",
) -> Float[Array, "D L"]:
  """Give the kernel of a diagonal system.

  K[d,l] = Re Σₙ C[d,n] Ā[d,n]ˡ B̄[d,n],  l = 0 … L-1

  a product with a Vandermonde matrix. With l = i·c + j, c ≈ √L, it is a
  matrix product over n of (C B̄ Āⁱᶜ) and Āʲ for each channel, so that neither
  memory nor exponentials are D·N·L, but D·N·√L. Angles of Āˡ are formed
  without the rounding of Δ Im A; bilinear ones have that of Ā, 2⁻²⁴ l.

  Args:
    A: diagonal of A, `[D, N]`, per unit of time, Re A ≤ 0; real or complex.
    B: input weights, `[D, N]`.
    C: output weights, `[D, N]`; not conjugated. For one of each pair of
      conjugates pass 2C.
    dt: Δ ≥ 0, `[D]`.
    length: L ≥ 1, below 2³¹; any.
    discretization: `"zoh"` (`zero_order_hold`) or `"bilinear"`.

  A, B and C may have 1 for D or N.

  Returns:
    K `[D, L]`, float32 (float64 where an argument is). Differentiable to any
    order.

  Raises:
    ValueError: an argument of the wrong shape or dtype.

  Source: Gu et al. 2022, S4D (arXiv 2206.11893), §3.2 and Eq. 5.

  >>> one = jnp.ones((1, 1))
  >>> s4d_kernel(0 * one, one, one, jnp.array([0.5]), 3)
  Array([[0.5, 0.5, 0.5]], dtype=float32)
  """
  function = "s4d_kernel"
  check_choice(function, "discretization", discretization, ("zoh", "bilinear"))
  (A, B, C), dt = _arguments(function, length, dt, A=A, B=B, C=C)
  return _s4d_kernel(A, B, C, dt, length, discretization)


def dss_kernel(
  A: Complex[Array, "D N"],
  W: Complex[Array, "D N"],
  dt: Float[Array, " D"],
  length: int,
) -> Float[Array, "D L"]:
  """Give the kernel of DSS with its softmax over positions.

  K[d,l] = Re Σₙ W[d,n]/A[d,n] · exp(xl) / Σᵣ₌₀ᴸ⁻¹ exp(xr),  x = Δ[d] A[d,n]

  The sum is (exp(xL) - 1)/(exp(x) - 1), by series where x is small, and modes
  that grow, Re A > 0, run from the last position back, as exponents must not
  be positive: exact, without the ε of the published softmax. It is
  `s4d_kernel` with weights that depend on L; a layer without the softmax
  (DSS-exp) is `s4d_kernel(A, 1, W, dt, length)`.

  Args:
    A: Λ, `[D, N]` (or `[1, N]`), per unit of time, not 0, any real part.
    W: weights, `[D, N]`; 2W for one of each pair of conjugates.
    dt: Δ > 0, `[D]`.
    length: L ≥ 1. The sum is 0, and K not finite, where xL is 2πi times a
      whole number other than 0: for Re A = 0 only.

  Returns:
    K `[D, L]`, float32 (float64 where an argument is).

  Raises:
    ValueError: an argument of the wrong shape or dtype.

  Source: Gupta et al. 2022 (arXiv 2203.14343), Proposition 1(b).

  >>> one = jnp.ones((1, 1))
  >>> np.asarray(dss_kernel(-one, -one, jnp.ones(1), 2)).round(3)
  array([[0.731, 0.269]], dtype=float32)
  """
  (A, W), dt = _arguments("dss_kernel", length, dt, A=A, W=W)
  return _dss_kernel(A, W, dt, length)


def s4_dplr_kernel(
  A: Complex[Array, "D N"],
  P: Complex[Array, "D N"],
  B: Complex[Array, "D N"],
  C: Complex[Array, "D N"],
  dt: Float[Array, " D"],
  length: int,
  *,
  Q: Complex[Array, "D N"] | None = None,
  conjugate_pairs: bool = False,
) -> Float[Array, "D L"]:
  """Give the kernel of a diagonal-plus-low-rank system, discretised bilinearly.

  K[l] = Re C Āˡ B̄ for 𝐀 = diag(A) - P Qᴴ, by its generating function
  K̂(z) = Σₗ K[l] zˡ = C (I - zĀ)⁻¹ B̄ = Δ (k_CB - w k_CP k_QB / (1 + w k_QP)),
  k_XY(z) = Σₙ XₙYₙ / (1 - z - wAₙ),  w = (1 + z) Δ/2  (Q conjugated)

  at M ≥ 6L points z of a circle with radius ρ < 1. The inverse Fourier
  transform gives K[l] + ρᴹ K[l+M] + …, and ρ with ρᴹ⁺ᴸ = ε, the rounding error,
  makes all of it as small as rounding allows. So neither Āᴸ is needed (in the
  published code it is part of the learned C), nor is anything divided by 0 on
  the unit circle, z = -1 and modes that never decay included. D·N·M numbers
  are never in memory, forward or backward.

  Args:
    A: the diagonal, `[D, N]`, per unit of time; 𝐀 must be stable (Re A ≤ 0 and
      Q = P suffice).
    P: left factor, `[D, N]`.
    B: input weights, `[D, N]`.
    C: output weights, `[D, N]`; not conjugated.
    dt: Δ ≥ 0, `[D]`.
    length: L ≥ 1; any.
    Q: right factor, `[D, N]`; P if None.
    conjugate_pairs: the N entries stand for 2N, themselves and their
      conjugates: the low rank binds both halves, so that 2C would not do. Half
      the points suffice then.

  Arrays `[D, N]` may have 1 for D.

  Returns:
    K `[D, L]`, float32 (float64 where an argument is).

  Raises:
    ValueError: an argument of the wrong shape or dtype.

  Source: Gu et al. 2022, S4 (arXiv 2111.00396), Theorem 3 and §C.3; the
  radius: Abate & Whitt 1992, "Numerical inversion of probability generating
  functions"; tied P: Goel et al. 2022 (arXiv 2202.09729), §4.2.

  >>> one = jnp.ones((1, 1))
  >>> K = s4_dplr_kernel(-one, 0 * one, one, one, jnp.ones(1), 2)
  >>> np.asarray(K).round(4)  # 2/3, 2/9
  array([[0.6667, 0.2222]], dtype=float32)
  """
  Q = P if Q is None else Q
  arrays, dt = _arguments("s4_dplr_kernel", length, dt, A=A, P=P, B=B, C=C, Q=Q)
  dtype = np.result_type(dt.dtype, np.complex64)
  arrays = [x.astype(dtype) for x in arrays]
  return _dplr_kernel(*arrays, dt, length, conjugate_pairs)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _s4d_kernel(A, B, C, dt, length, discretization):
  if discretization == "zoh":
    z = dt.astype(A.dtype) * A
    weight = product(dt, expm1_ratio(z), B, C)
    power = functools.partial(powers, A, dt)
  else:
    a, b = bilinear(A, B, dt[:, 0])
    weight = product(b, C)
    power = functools.partial(integer_powers, a)
  return _vandermonde(power, weight, length)


@functools.partial(jax.jit, static_argnums=3)
def _dss_kernel(A, W, dt, length):
  grows = A.real > 0
  # Σᵣ exp(xr) is exp(x(L-1)) Σᵣ exp(-xr): turned round, growth is decay.
  turn = lambda x: jnp.where(grows, -x, x)
  A, W = turn(A), turn(W)
  z = dt.astype(A.dtype) * A
  last = powers(A, dt, length, 2)[..., 1]
  total = length * _mean(z * length, last)
  weight = product(W / A, expm1_ratio(z) / total)

  def kernel(keep):
    kept = jnp.where(keep, weight, 0)
    return _vandermonde(functools.partial(powers, A, dt), kept, length)

  return kernel(~grows) + jnp.flip(kernel(grows), -1)


def _mean(z, exponential):
  """`expm1_ratio` of z, given its exponential where that is far from 1."""
  small = jnp.abs(lax.stop_gradient(z)) < 0.5
  far = jnp.where(small, 1, z)
  return jnp.where(
    small, expm1_ratio(jnp.where(small, z, 0)), (exponential - 1) / far
  )


def _vandermonde(power, weight, length):
  """Re Σₙ weightₙ aₙˡ, as a matrix product of two halves of l.

  `power(step, count)` gives aˡ for l = 0, step, …, `[D, N, count]`.
  """
  inner = 1 << (math.isqrt(length - 1).bit_length() if length > 1 else 0)
  outer = -(-length // inner)
  coarse = product(weight[..., None], power(inner, outer))
  coarse, fine = _stacked(coarse, power(1, inner))
  kernel = jnp.einsum(
    "dni,dnj->dij", coarse, fine, precision=lax.Precision.HIGHEST
  )
  return kernel.reshape(kernel.shape[0], -1)[:, :length]


def _stacked(x, y):
  """Real arrays whose products along axis 1 sum up to Re Σ x y."""
  if not jnp.iscomplexobj(y):
    return x.real, y
  x = x.astype(y.dtype)
  return (
    jnp.concatenate([x.real, -x.imag], 1),
    jnp.concatenate([y.real, y.imag], 1),
  )


@functools.partial(jax.jit, static_argnums=(6, 7))
def _dplr_kernel(A, P, B, C, Q, dt, length, conjugate_pairs):
  if conjugate_pairs:
    A, P, B, C, Q = (jnp.concatenate([x, x.conj()], 1) for x in (A, P, B, C, Q))
  count = _fast_length(max(6 * length, 96))
  used = count // 2 + 1 if conjugate_pairs else count
  epsilon = float(jnp.finfo(dt.dtype).eps) / 2
  log_radius = math.log(epsilon) / (count + length)
  # On the host in float64: 1 - z is small near z = 1.
  z = np.exp(log_radius - 2j * np.pi * np.arange(used) / count)
  Q = Q.conj()
  rows = jnp.stack([C * B, C * P, Q * B, Q * P], 1)
  block = max(1, min(used, _BLOCK_ENTRIES // A.size))
  blocks = -(-used // block)
  z = np.pad(z, (0, blocks * block - used)).reshape(blocks, block)
  points = jnp.asarray(1 - z, A.dtype), jnp.asarray(1 + z, A.dtype)

  @jax.checkpoint
  def spectrum(points):
    return _generating_function(A, rows, dt.astype(A.dtype), *points)

  if blocks == 1:
    values = _generating_function(
      A, rows, dt.astype(A.dtype), points[0][0], points[1][0]
    )
  else:
    values = lax.map(spectrum, points)
    values = jnp.moveaxis(values, 0, 1).reshape(A.shape[0], -1)
  values = values[:, :used]
  if conjugate_pairs:
    kernel = jnp.fft.irfft(values, count)
  else:
    kernel = jnp.fft.ifft(values).real
  undo = np.exp(-log_radius * np.arange(length))
  return kernel[:, :length] * jnp.asarray(undo, dt.dtype)[None]


def _generating_function(A, rows, dt, below, above):
  """K̂ at points z given by 1 - z and 1 + z, both `[M]`: `[D, M]`."""
  w = 0.5 * dt * above[None]
  inverse = _inverse(below[None, None] - w[:, None] * A[..., None])
  sums = _complex_product(rows, inverse)
  sums = jnp.moveaxis(sums, 1, 0)
  return dt * (sums[0] - w * sums[1] * sums[2] / (1 + w * sums[3]))


def _complex_product(x, y):
  """x @ y for each channel, as one product of real matrices."""
  left = jnp.concatenate(
    [
      jnp.concatenate([x.real, -x.imag], 2),
      jnp.concatenate([x.imag, x.real], 2),
    ],
    1,
  )
  right = jnp.concatenate([y.real, y.imag], 1)
  out = jnp.einsum("dkn,dnm->dkm", left, right, precision=lax.Precision.HIGHEST)
  return lax.complex(*jnp.split(out, 2, 1))


@jax.custom_jvp
def _inverse(z):
  """1/z of numbers whose squares are in range: no careful division."""
  scale = 1 / (z.real**2 + z.imag**2)
  return lax.complex(z.real * scale, -z.imag * scale)


@_inverse.defjvp
def _inverse_jvp(primals, tangents):
  inverse = _inverse(*primals)
  return inverse, -inverse * inverse * tangents[0]


def _fast_length(count):
  """The least length from `count` on whose only factors are 2, 3 and 5."""
  best = 1 << (count - 1).bit_length()
  for three in (1, 3, 9, 27):
    for five in (1, 5, 25):
      odd = three * five
      needed = -(-count // odd)
      best = min(best, odd << (needed - 1).bit_length())
  return best


def _arguments(function, length, dt, **arrays):
  """The arrays `[D, N]` and dt `[D, 1]`, at full precision."""
  check_arrays(function, **arrays, dt=dt)
  check_inexact(function, **arrays, dt=dt)
  if jnp.iscomplexobj(dt):
    raise ValueError(f"{function}: dt is complex, expected a real step.")
  if jnp.ndim(dt) != 1:
    raise ValueError(
      f"{function}: dt has shape {jnp.shape(dt)}, expected (D,): one step for"
      " each channel."
    )
  if not isinstance(length, int) or not 1 <= length < 1 << 31:
    raise ValueError(
      f"{function}: length is {length!r}, expected a number of tokens, an int"
      " from 1 on."
    )
  channels = dt.shape[0]
  width = max((jnp.shape(x)[-1:] or (0,))[0] for x in arrays.values())
  for name, x in arrays.items():
    shape = jnp.shape(x)
    fits = len(shape) == 2 and shape[0] in (1, channels)
    if not fits or shape[1] not in (1, width):
      raise ValueError(
        f"{function}: {name} has shape {shape}, expected (D={channels},"
        f" N={width}), or 1 for an axis that is shared."
      )
  real = real_dtype(dt, *arrays.values())
  wide = []
  for x in arrays.values():
    dtype = np.result_type(real, np.complex64 if jnp.iscomplexobj(x) else real)
    wide.append(jnp.broadcast_to(x.astype(dtype), (channels, width)))
  return wide, dt.astype(real)[:, None]
