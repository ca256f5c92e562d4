"""What every model is made of: norms, projections, a convolution."""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.lax import Precision

from ssmjax import ops
from ssmjax.models.module import Module
from ssmjax.ops.varying import match_varying
from ssmjax.types import (
  Array,
  Float,
  Int,
  Polarization,
)

__all__ = [
  "LayerNorm",
  "RMSNorm",
  "ShortConv",
  "affine",
  "check_exact",
  "clear_padding",
  "dense",
  "fresh_state",
  "linear_weight",
  "normal",
  "output_weight",
  "rotate_pairs",
  "torch_uniform",
]


class RMSNorm(Module):
  """x / RMS(x) · scale over the last axis, computed in float32.

  With a size of `(H, P)` it is a norm of each head's P channels, which have
  scales of their own.

  Source: Zhang & Sennrich 2019 (arXiv 1910.07467).
  """

  def __init__(self, size: int | tuple[int, ...], *, epsilon: float = 1e-5):
    self.scale = nnx.Param(jnp.ones(size, jnp.float32), weight_decay=False)
    self.epsilon = epsilon

  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Normalise; the result has x's dtype."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), -1, keepdims=True)
    y = wide * jax.lax.rsqrt(mean_square + self.epsilon) * self.scale[...]
    return y.astype(x.dtype)


class LayerNorm(Module):
  """(x - mean) / deviation · scale + bias over the last axis, in float32.

  A size of `(H, P)` as in `RMSNorm`.
  """

  def __init__(self, size: int | tuple[int, ...], *, epsilon: float = 1e-5):
    self.scale = nnx.Param(jnp.ones(size, jnp.float32), weight_decay=False)
    self.bias = nnx.Param(jnp.zeros(size, jnp.float32), weight_decay=False)
    self.epsilon = epsilon

  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Normalise; the result has x's dtype."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    variance = jnp.mean(jnp.square(wide), -1, keepdims=True)
    y = wide * jax.lax.rsqrt(variance + self.epsilon)
    return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class ShortConv(Module):
  """A causal convolution of each channel with W taps of its own."""

  def __init__(self, channels: int, width: int, key, *, bias: bool = True):
    # Of their own: in a stack of layers the weight has an axis more.
    self.channels, self.width = channels, width
    keys = jax.random.split(key)
    self.weight = nnx.Param(torch_uniform(keys[0], (width, channels), width))
    self.bias = (
      nnx.Param(torch_uniform(keys[1], (channels,), width), weight_decay=False)
      if bias
      else None
    )

  def __call__(
    self,
    x: Float[Array, "B T D"],
    state: Float[Array, "B V D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T D"], Float[Array, "B V D"]]:
    """Convolve; the state is the last W-1 tokens, float32."""
    return ops.causal_conv(
      x, self.weight[...], self._bias(), initial_state=state,
      segment_ids=segment_ids,
    )  # fmt: skip

  def step(
    self,
    x: Float[Array, "B D"],
    state: Float[Array, "B V D"],
    segment_ids: Int[Array, " B"] | None = None,
  ) -> tuple[Float[Array, "B D"], Float[Array, "B V D"]]:
    """Convolve one token."""
    return ops.causal_conv_step(
      x, self.weight[...], self._bias(), state=state, segment_ids=segment_ids
    )

  def init_state(self, batch_size: int) -> Float[Array, "B V D"]:
    """No tokens yet."""
    shape = (batch_size, self.width - 1, self.channels)
    return jnp.zeros(shape, jnp.float32)

  def _bias(self):
    return None if self.bias is None else self.bias[...]


def check_exact(function: str, polarization: Polarization | None) -> None:
  """Raise ValueError for a compatibility mode, which only S6 has."""
  if polarization and polarization.finite_zero is not None:
    raise ValueError(
      f"{function}: polarization.zero_decay is"
      f" {polarization.zero_decay!r}, expected 'exact': the compatibility"
      " modes are S6's."
    )


def fresh_state(mixer, x: Float[Array, "B *T M"]):
  """The state of a mixer before any token, its rows divided as those of x."""
  state = mixer.init_state(x.shape[0])
  sharding = jax.typeof(x).sharding
  if not sharding.mesh.explicit_axes:
    return state
  rows = jax.NamedSharding(sharding.mesh, jax.P(sharding.spec[0]))
  return jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, rows), state)


def clear_padding(
  x: Float[Array, "*B M"], segment_ids: Int[Array, "*B"] | None
) -> Float[Array, "*B M"]:
  """Zeros at padding, before a weight's gradient can meet NaN · 0 there."""
  if segment_ids is None:
    return x
  return jnp.where(segment_ids[..., None] > 0, x, jnp.zeros_like(x))


def linear_weight(
  key, n_in: int, n_out: int, init: Literal["mamba", "authors"]
) -> Array:
  """Draw a linear layer's weight `[n_in, n_out]`, see `MambaConfig.init`."""
  if init == "mamba":
    return torch_uniform(key, (n_in, n_out), n_in)
  return normal(key, (n_in, n_out))


def output_weight(
  key,
  n_in: int,
  n_out: int,
  init: Literal["mamba", "authors"],
  n_layers: int,
) -> Array:
  """Draw the weight by which a mixer writes to the residual.

  It is scaled by one residual branch a layer (authors: two, as in GPT-2).
  """
  branches = n_layers if init == "mamba" else 2 * n_layers
  return linear_weight(key, n_in, n_out, init) / math.sqrt(branches)


def dense(
  x: Float[Array, "... M"],
  weight: Float[Array, "M K"],
  *,
  precision: Precision | None = None,
) -> Float[Array, "... K"]:
  """x @ weight in x's dtype, as one matrix product.

  All leading axes are merged first: contracted over two axes, XLA:CPU takes
  twice the time for the weight's gradient. Where x is narrower than the
  weight, that gradient is summed in the weight's dtype and never rounded to
  x's, and derivatives are in reverse mode only (of any order).

  Args:
    x: the inputs.
    weight: the matrix, which is rounded to x's dtype.
    precision: None is the platform's default, in which a TPU rounds float32 to
      bfloat16 before it multiplies. A product that is there for a decay, a
      rate, a Δ or an exponent's sake, and so is few numbers wide, is taken
      with `Precision.HIGHEST` everywhere in ssmjax. (Where such numbers are
      columns of one product with values, as in Mamba-2, HGRN2 and minGRU, or
      are the keys, as in Longhorn and RWKV-4, they have the precision of all:
      for float32 models on a TPU see `jax.default_matmul_precision`.)
  """
  rows = x.reshape(-1, x.shape[-1])
  if x.dtype.itemsize < weight.dtype.itemsize:
    y = _narrow_dense(*match_varying(rows, weight))
  else:
    y = jnp.matmul(rows, weight.astype(x.dtype), precision=precision)
  return y.reshape(*x.shape[:-1], weight.shape[-1])


def affine(
  x: Float[Array, "... M"],
  weight: Float[Array, "M K"],
  bias: Float[Array, " K"] | None,
  *,
  dtype: Any = None,
  precision: Precision | None = None,
) -> Float[Array, "... K"]:
  """x @ weight + bias; the bias is added, and its gradient summed, in float32.

  `dtype` is that of the result; None for x's. For `precision` see `dense`.
  """
  y = dense(x, weight, precision=precision)
  if bias is not None:
    # Wide, so that the bias's gradient is summed there.
    y = y.astype(jnp.float32) + bias
  return y.astype(dtype or x.dtype)


def rotate_pairs(
  x: Float[Array, "... K"], angle: Float[Array, "... J"]
) -> Float[Array, "... K"]:
  """Turn pairs of neighbouring channels by angles in radians, K = 2J."""
  x = x.astype(jnp.float32)
  even, odd = x[..., ::2], x[..., 1::2]
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  pairs = [even * cos - odd * sin, odd * cos + even * sin]
  return jnp.stack(pairs, -1).reshape(x.shape)


def normal(key, shape, deviation: float = 0.02) -> Array:
  """Draw from N(0, deviation²) in float32."""
  return deviation * jax.random.normal(key, shape, jnp.float32)


def torch_uniform(key, shape, fan_in: int) -> Array:
  """Draw from U(±1/√fan_in), PyTorch's default for linear layers."""
  bound = 1 / math.sqrt(fan_in)
  return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _product(x, weight):
  """`[T, M]` @ `[M, K]` in x's dtype, which is narrower than the weight's."""
  return x @ weight.astype(x.dtype)


def _narrow_forward(x, weight):
  # Not by `_narrow_dense`: what it computes has forward derivatives, too.
  return _product(x, weight), (x, weight)


def _narrow_backward(residuals, dy):
  x, weight = residuals
  dx = lax.dot_general(
    dy, weight.astype(dy.dtype), (((1,), (1,)), ((), ())),
    out_sharding=_explicit_sharding(x),
  )  # fmt: skip

  def gradient(x, dy, *, cast=lambda v: v):
    return lax.dot_general(
      cast(x), cast(dy), (((0,), (0,)), ((), ())),
      preferred_element_type=weight.dtype,
      out_sharding=_explicit_sharding(weight),
    )  # fmt: skip

  # XLA:CPU has no wide sum of narrow products in every layout that vmap makes
  # of this one, and in some sums them in bfloat16: 2 % off over 1024 terms.
  widen = functools.partial(gradient, cast=lambda v: v.astype(weight.dtype))
  return dx, lax.platform_dependent(x, dy, cpu=widen, default=gradient)


_narrow_dense = jax.custom_vjp(_product)
_narrow_dense.defvjp(_narrow_forward, _narrow_backward)


def _explicit_sharding(x):
  """The sharding that a cotangent of x is to have, where types tell it."""
  sharding = jax.typeof(x).sharding
  return sharding if sharding.mesh.explicit_axes else None
