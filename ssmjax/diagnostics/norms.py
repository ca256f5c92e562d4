"""Norms of numbers whose squares a float cannot hold."""

from collections.abc import Sequence

import jax.numpy as jnp

from ssmjax.types import Array, Float, Inexact, real_dtype

__all__ = ["norm"]


def norm(
  v: Inexact[Array, "..."], axes: int | Sequence[int] = -1
) -> Float[Array, "..."]:
  """Measure the Euclidean norm over some axes, of tiny and of huge numbers.

  ‖v‖ = m √(Σ |v/m|²),  m = max |v|

  float32 has no squares of numbers below 10⁻¹⁹ or above 10¹⁹; these have, for
  they are at most 1.

  Args:
    v: real or complex.
    axes: to be summed over.

  Returns:
    The norm, in float32 or wider, without these axes; NaN where a number is.
  """
  size = jnp.abs(v).astype(real_dtype(v))
  largest = size.max(axes, keepdims=True)
  some = (largest > 0) & jnp.isfinite(largest)
  scale = jnp.where(some, largest, jnp.ones_like(largest))
  root = jnp.sqrt(jnp.square(size / scale).sum(axes, keepdims=True))
  return jnp.squeeze(scale * root, axes)
