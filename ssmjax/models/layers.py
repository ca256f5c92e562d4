"""What every model is made of: norms and initial values."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from ssmjax.types import Array, Float

__all__ = ["LayerNorm", "RMSNorm", "dense", "normal", "torch_uniform"]


class RMSNorm(nnx.Module):
  """x / RMS(x) · scale over the last axis, computed in float32.

  Source: Zhang & Sennrich 2019 (arXiv 1910.07467).
  """

  def __init__(self, size: int, *, epsilon: float = 1e-5):
    self.scale = nnx.Param(jnp.ones((size,), jnp.float32))
    self.epsilon = epsilon

  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Normalise; the result has x's dtype."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), -1, keepdims=True)
    y = wide * jax.lax.rsqrt(mean_square + self.epsilon) * self.scale[...]
    return y.astype(x.dtype)


class LayerNorm(nnx.Module):
  """(x - mean) / deviation · scale + bias over the last axis, in float32."""

  def __init__(self, size: int, *, epsilon: float = 1e-5):
    self.scale = nnx.Param(jnp.ones((size,), jnp.float32))
    self.bias = nnx.Param(jnp.zeros((size,), jnp.float32))
    self.epsilon = epsilon

  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Normalise; the result has x's dtype."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    variance = jnp.mean(jnp.square(wide), -1, keepdims=True)
    y = wide * jax.lax.rsqrt(variance + self.epsilon)
    return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


def dense(
  x: Float[Array, "... M"], weight: Float[Array, "M K"]
) -> Float[Array, "... K"]:
  """x @ weight in x's dtype, as one matrix product.

  All leading axes are merged first: contracted over two axes, XLA:CPU takes
  twice the time for the weight's gradient.
  """
  y = x.reshape(-1, x.shape[-1]) @ weight.astype(x.dtype)
  return y.reshape(*x.shape[:-1], weight.shape[-1])


def normal(key, shape, deviation: float = 0.02) -> Array:
  """Draw from N(0, deviation²) in float32."""
  return deviation * jax.random.normal(key, shape, jnp.float32)


def torch_uniform(key, shape, fan_in: int) -> Array:
  """Draw from U(±1/√fan_in), PyTorch's default for linear layers."""
  bound = 1 / math.sqrt(fan_in)
  return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
