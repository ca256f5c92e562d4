"""GELU by the error function, as PyTorch's default has it."""

import jax.numpy as jnp

from ssmjax.types import Array, Float

__all__ = ["gelu"]


def gelu(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
  """x Φ(x), not by its tanh; right to 1.1e-6 for |x| ≤ 8, its slope to 4e-6.

  `jax.nn.gelu`, by `erf`, cannot be lowered in a shard_map that checks its
  types (JAX 0.12). erf is here a ratio of polynomials, as Eigen has it.
  """
  wide = x.astype(jnp.float32)
  u = jnp.clip(wide * 0.5**0.5, -_ERF_END, _ERF_END)
  erf = u * _horner(_ERF_ABOVE, u * u) / _horner(_ERF_BELOW, u * u)
  return (0.5 * wide * (1 + erf)).astype(x.dtype)


def _horner(coefficients, x):
  total = jnp.full_like(x, coefficients[0])
  for coefficient in coefficients[1:]:
    total = total * x + coefficient
  return total


# Beyond it |erf| is 1 in float32.
_ERF_END = 3.832506856900711
_ERF_ABOVE = (
  2.2905065861350646e-4, 3.4082910107109506e-3, 5.0955695062380861e-2,
  1.8520832239976145e-1, 1.128379143519084,
)  # fmt: skip
_ERF_BELOW = (
  -1.1791602954361697e-7, 2.3547966471313185e-5, 1.0179625278914885e-3,
  1.4070470171167667e-2, 1.1098505178285362e-1, 4.9746925110067538e-1, 1.0,
)  # fmt: skip
