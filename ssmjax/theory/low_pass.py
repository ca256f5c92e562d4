"""Definition D.3 and Proposition 4.1 / D.4: S4 filters high frequencies."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssmjax.theory.extremes import largest, smallest
from ssmjax.theory.premises import Premise, measure_premise
from ssmjax.types import (
  Array,
  Float,
  Inexact,
  check_inexact,
  check_shapes,
  gathered,
  real_dtype,
)

__all__ = [
  "LowPass",
  "cutoff",
  "discrete_transfer",
  "low_pass",
  "low_pass_premise",
  "stop_band_peak",
  "transfer",
  "transfer_bound",
]


class LowPass(NamedTuple):
  """Both sides of Proposition 4.1 / D.4.

  Attributes:
    cutoff: Ω(ε), rad per unit of time.
    omega: frequencies looked at, `[F]`, all |ω| ≥ Ω.
    response: Z(ω), `[F]`.
    bound: Σₙ|bₙcₙ|/|iω - aₙ|, between |Z| and ε, `[F]`.
    peak: left: the largest |Z(ω)| of those.
    epsilon: right.
    premise: Re aₙ < 0 and aₙ finite for each n; excess Re aₙ.
  """

  cutoff: Float[Array, ""]
  omega: Float[Array, " F"]
  response: Inexact[Array, " F"]
  bound: Float[Array, " F"]
  peak: Float[Array, ""]
  epsilon: Float[Array, ""]
  premise: Premise


@gathered
def transfer(
  omega: Float[Array, " F"],
  a: Inexact[Array, " N"],
  b: Inexact[Array, " N"],
  c: Inexact[Array, " N"],
  skip: Float[Array, ""] | float = 0.0,
) -> Inexact[Array, " F"]:
  """Evaluate the transfer function of a continuous diagonal S4 layer.

  Z(ω) = ∫ z(t) exp(-iωt) dt + D = Σₙ bₙcₙ/(iω - aₙ) + D,
  z(t) = Σₙ bₙcₙ exp(aₙt) for t ≥ 0, 0 before

  of h'(t) = a h(t) + b x(t), y(t) = Σₙ cₙhₙ(t) + D x(t). The integral
  converges for Re aₙ < 0 only.

  Args:
    omega: frequencies, rad per unit of time, `[F]`.
    a: diagonal of A, `[N]`, real or complex.
    b: input weights, `[N]`.
    c: output weights, `[N]`; not conjugated.
    skip: D, the weight of the input itself.

  Returns:
    Z, complex, `[F]`.

  Raises:
    ValueError: shapes or dtypes that do not fit.

  >>> one = jnp.ones(1)
  >>> abs(transfer(jnp.array([0.0, 1.0]), -one, one, one))
  Array([1.        , 0.70710677], dtype=float32)
  """
  omega, a, b, c, real = _check("transfer", omega, a, b, c)
  _check_real("transfer", skip=skip)
  poles = _turning(omega)[:, None] - a[None]
  z = ((b * c)[None] / poles).sum(-1)
  return z + jnp.asarray(skip, real).astype(z.dtype)


@gathered
def transfer_bound(
  omega: Float[Array, " F"],
  a: Inexact[Array, " N"],
  b: Inexact[Array, " N"],
  c: Inexact[Array, " N"],
) -> Float[Array, " F"]:
  """Bound |Z(ω)| by the triangle inequality.

  |Z(ω)| ≤ Σₙ |bₙcₙ| / √((Re aₙ)² + (ω - Im aₙ)²)

  Args and errors are those of `transfer`, without a skip.
  """
  omega, a, b, c, _ = _check("transfer_bound", omega, a, b, c)
  distance = jnp.abs(_turning(omega)[:, None] - a[None])
  return (jnp.abs(b * c)[None] / distance).sum(-1)


@gathered
def cutoff(
  epsilon: Float[Array, ""] | float,
  a: Inexact[Array, " N"],
  b: Inexact[Array, " N"],
  c: Inexact[Array, " N"],
) -> Float[Array, ""]:
  """Give a frequency from which on a diagonal S4 layer passes less than ε.

  Ω(ε) = maxₙ|Im aₙ| + √((‖b∘c‖₁/ε)² - minₙ(Re aₙ)²)

  Proof. Let |ω| ≥ Ω, w = ‖b∘c‖₁, r = minₙ|Re aₙ|. Then |ω - Im aₙ| ≥
  |ω| - maxₙ|Im aₙ| ≥ √((w/ε)² - r²), so each |iω - aₙ|² is at least
  r² + (w/ε)² - r², and the sum of `transfer_bound` is at most w/(w/ε) = ε. ∎
  So Ω = O(1/ε). Equality at ±Ω: N = 1 (or equal aₙ and equal phases of bₙcₙ).
  Where w/ε < r, |Z| ≤ ε everywhere, and the root is taken as 0.

  Args:
    epsilon: ε > 0 (the definition: below 1); traced, an ε that is not gives
      NaN.
    a: diagonal of A, `[N]`, Re a < 0.
    b: input weights, `[N]`.
    c: output weights, `[N]`.

  Returns:
    Ω ≥ 0, rad per unit of time; NaN where a weight or an eigenvalue is.

  Raises:
    ValueError: shapes or dtypes that do not fit, or an ε that is not positive.
  """
  _, a, b, c, real = _check("cutoff", None, a, b, c)
  epsilon = _check_epsilon("cutoff", epsilon, real, math.inf)
  steepness = jnp.abs(b * c).sum() / epsilon
  slowest = smallest(jnp.abs(a.real))
  # A product of roots: the squares, and their difference, could overflow.
  above = jnp.maximum(steepness - slowest, 0.0)
  root = jnp.sqrt(above) * jnp.sqrt(steepness + slowest)
  return largest(jnp.abs(a.imag)) + root


@gathered
def low_pass_premise(a: Inexact[Array, " N"]) -> Premise:
  """Check that Re aₙ < 0 and aₙ is finite, for each n; excess Re aₙ."""
  check_inexact("low_pass_premise", a=a)
  check_shapes("low_pass_premise", {"a": (a, "N")})
  _check_states("low_pass_premise", a)
  finite = jnp.isfinite(a)
  excess = jnp.where(finite, a.real, jnp.nan)
  return measure_premise(finite & (a.real < 0), excess, 0)


@gathered
def low_pass(
  epsilon: Float[Array, ""] | float,
  a: Inexact[Array, " N"],
  b: Inexact[Array, " N"],
  c: Inexact[Array, " N"],
  *,
  skip: Float[Array, ""] | float = 0.0,
  points: int = 513,
) -> LowPass:
  """Hold a continuous diagonal S4 layer against Proposition 4.1 / D.4.

  |Z(ω)| ≤ ε for every |ω| ≥ Ω(ε) = O(1/ε), if Re aₙ < 0 for every n

  z is then integrable, and by `cutoff` an (ε, Ω(ε))-low-pass filter in the
  sense of Definition D.3 for every ε: a low-pass filter.

  What this does not say. The definition is of tails only: Z need not fall
  monotonically, and Z(0) may be 0 (b₁c₁/a₁ = -b₂c₂/a₂), so that a band-pass
  is a "low-pass filter". A skip connection ends it: |Z(ω)| → |D|, so S4 with
  its D, and H3 and Mamba around their recurrences, are no low-pass filters.
  Nor does it carry over to discrete time, see `discrete_transfer`. Its exact
  norms (Hölder's pair) are lost in the text; the constant is as derived here.

  Args:
    epsilon: ε in (0, 1).
    a: diagonal of A, `[N]`.
    b: input weights, `[N]`.
    c: output weights, `[N]`.
    skip: D, which the proposition does not have, to see what it does.
    points: frequencies on either side to be looked at, 2 or more: Ω, and from
      there on evenly by logarithm over twelve decades.

  Returns:
    Both sides, also where the premise fails. NaN makes the left side NaN,
    which is at most no ε.

  Raises:
    ValueError: shapes or dtypes that do not fit, or an ε outside of (0, 1).

  Source: Wang et al. 2025, Definition D.3, Propositions 4.1 and D.4.
  """
  _, a, b, c, real = _check("low_pass", None, a, b, c)
  epsilon = _check_epsilon("low_pass", epsilon, real, 1.0)
  if points < 2:
    raise ValueError(f"low_pass: points is {points}, expected 2 or more.")
  edge = cutoff(epsilon, a, b, c)
  scale = jnp.maximum(edge, largest(jnp.abs(a)))
  steps = jnp.logspace(-6, 6, points - 1, dtype=real)
  above = jnp.concatenate([edge[None], edge + scale * steps])
  omega = jnp.concatenate([-above[::-1], above])
  response = transfer(omega, a, b, c, skip)
  return LowPass(
    cutoff=edge,
    omega=omega,
    response=response,
    bound=transfer_bound(omega, a, b, c),
    peak=stop_band_peak(omega, response, edge),
    epsilon=epsilon,
    premise=low_pass_premise(a),
  )


@gathered
def stop_band_peak(
  omega: Float[Array, " F"],
  response: Inexact[Array, " F"],
  cutoff: Float[Array, ""] | float,
) -> Float[Array, ""]:
  """Measure the left side of Definition D.3 for any sampled response.

  z is an (ε, Ω)-low-pass filter, 0 < ε < 1 and Ω > 0, if it is integrable and
  |Z(ω)| ≤ ε for all |ω| ≥ Ω; a low-pass filter if for every ε there is an Ω,
  that is, if Z(ω) → 0.

  Args:
    omega: frequencies, `[F]`, such as those of an FFT.
    response: Z there, `[F]`.
    cutoff: Ω.

  Returns:
    max |Z(ω)| over the |ω| ≥ Ω among them, 0 if there is none: to be compared
    with ε. NaN if Ω, an ω or a Z from Ω on is NaN.

  Raises:
    ValueError: shapes that do not fit.
  """
  check_shapes(
    "stop_band_peak", {"omega": (omega, "F"), "response": (response, "F")}
  )
  passed = jnp.abs(omega) < cutoff
  peak = largest(jnp.where(passed, 0.0, jnp.abs(response)))
  unknown = jnp.isnan(omega).any() | jnp.isnan(cutoff)
  return jnp.where(unknown, jnp.nan, peak)


@gathered
def discrete_transfer(
  theta: Float[Array, " F"],
  a: Inexact[Array, " N"],
  dt: Float[Array, " N"],
  b: Inexact[Array, " N"],
  c: Inexact[Array, " N"],
  skip: Float[Array, ""] | float = 0.0,
) -> Inexact[Array, " F"]:
  """Evaluate the transfer function of Eq. 1 with constant coefficients.

  Z(θ) = Σₙ cₙΔₙbₙ / (1 - Aₙ exp(-iθ)) + D

  Proposition 4.1 has no like in discrete time. Frequencies end at θ = π, and
  for one channel 0 ≤ A < 1 there |Z(θ)| ≥ |cΔb|/(1 + A) = |Z(π)| > 0: no ε
  below that has an Ω. Against constant inputs the highest frequency is damped
  by (1 - A)/(1 + A), not at all at A = 0, where the layer is all-pass: a
  zero-channel filters nothing.

  Args:
    theta: frequencies, rad per token, `[F]`.
    a: decays A, `[N]`, |A| < 1.
    dt: step sizes Δ, `[N]`.
    b: input weights, `[N]`.
    c: output weights, `[N]`.
    skip: D.

  Returns:
    Z, complex, `[F]`.

  Raises:
    ValueError: shapes or dtypes that do not fit.
  """
  theta, a, b, c, real = _check("discrete_transfer", theta, a, b, c)
  check_inexact("discrete_transfer", dt=dt)
  _check_real("discrete_transfer", dt=dt, skip=skip)
  check_shapes("discrete_transfer", {"a": (a, "N"), "dt": (dt, "N")})
  delay = jnp.exp(-_turning(theta))[:, None]
  weights = b * c * dt.astype(real).astype(b.dtype)
  z = (weights[None] / (1 - a[None] * delay)).sum(-1)
  return z + jnp.asarray(skip, real).astype(z.dtype)


def _turning(omega):
  """iω; strict promotion has no product of a real array and 1j."""
  return jax.lax.complex(jnp.zeros_like(omega), omega)


def _check(function, omega, a, b, c):
  """The arguments in one precision, a, b and c complex."""
  check_inexact(function, omega=omega, a=a, b=b, c=c)
  _check_real(function, omega=omega)
  check_shapes(
    function, {"omega": (omega, "F"), "a": (a, "N"), "b": (b, "N"),
               "c": (c, "N")}
  )  # fmt: skip
  _check_states(function, a)
  real = real_dtype(omega, a, b, c)
  whole = jnp.dtype("complex128" if real == "float64" else "complex64")
  a, b, c = (jnp.asarray(v).astype(whole) for v in (a, b, c))
  return None if omega is None else omega.astype(real), a, b, c, real


def _check_states(function, a):
  if not a.shape[0]:
    raise ValueError(f"{function}: a has shape (0,), expected a state or more.")


def _check_real(function, **arguments):
  for name, value in arguments.items():
    if value is not None and jnp.iscomplexobj(value):
      raise ValueError(
        f"{function}: {name} has dtype {jnp.result_type(value).name}, expected"
        " a real one."
      )


def _check_epsilon(function: str, epsilon: Any, real, below: float) -> Array:
  """ε as an array, NaN where a traced one is out of range."""
  epsilon = jnp.asarray(epsilon, real)
  inside = (epsilon > 0) & (epsilon < below)
  if not isinstance(inside, jax.core.Tracer) and not inside.all():
    expected = "one in (0, 1)" if below == 1 else "a positive number"
    raise ValueError(f"{function}: epsilon is {epsilon}, expected {expected}.")
  return jnp.where(inside, epsilon, jnp.nan)
