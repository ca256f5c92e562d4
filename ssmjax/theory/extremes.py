"""Largest and smallest values that do not lose a NaN."""

from collections.abc import Sequence

import jax.numpy as jnp

from ssmjax.types import Array, Float

__all__ = ["largest", "smallest"]

Axes = int | Sequence[int] | None


def largest(
  v: Float[Array, "..."], axes: Axes = None, *, keepdims: bool = False
) -> Float[Array, "..."]:
  """Find the largest value over some axes, NaN where one of them is.

  So it is said of `jnp.max`, but on CPUs XLA's reduction of some 4096 numbers
  and more leaves NaN out (jax 0.12), and a premise would hold of what is not
  known.
  """
  found = v.max(axes, keepdims=keepdims)
  unknown = jnp.isnan(v).any(axes, keepdims=keepdims)
  return jnp.where(unknown, jnp.nan, found)


def smallest(
  v: Float[Array, "..."], axes: Axes = None, *, keepdims: bool = False
) -> Float[Array, "..."]:
  """Find the smallest value over some axes, as `largest`."""
  return -largest(-v, axes, keepdims=keepdims)
