"""The block around a time-invariant system, for S4, S4D and DSS alike."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ssmjax.models.doors import check_call, check_step
from ssmjax.models.gelu import gelu
from ssmjax.models.layers import (
  affine,
  check_exact,
  clear_padding,
  linear_weight,
  output_weight,
  torch_uniform,
)
from ssmjax.models.module import Module
from ssmjax.types import Array, Float, Inexact, Int, check_fields

__all__ = ["S4Block", "S4State", "check_system"]


class S4State(NamedTuple):
  """What an S4, S4D or DSS mixer carries from token to token.

  Attributes:
    hidden: the state of the system, `[B, D, N]`, complex64 (float32 where the
      system is real).
  """

  hidden: Inexact[Array, "B D N"]


class S4Block(Module):
  """y = glu(W_out gelu(system(x) + D x) + b_out), or without the glu.

  A layer gives it a system with `scan`, `step` and `init_state`.
  """

  def __init__(self, d_model: int, config: Any, system: Any, key, depth: int):
    """Draw what is around the system; `depth` layers write to the residual."""
    self.config = config
    self.d_model = d_model
    self.system = system
    keys = jax.random.split(key, 4)
    self.D = nnx.Param(
      jax.random.normal(keys[0], (d_model,), jnp.float32), weight_decay=False
    )
    out_proj = output_weight(keys[1], d_model, d_model, config.init, depth)
    if config.gate:
      # The gate's half writes nothing by itself, so that depth is not in it.
      gate = linear_weight(keys[2], d_model, d_model, config.init)
      out_proj = jnp.concatenate([out_proj, gate], 1)
    out_bias = jnp.zeros((out_proj.shape[1],), jnp.float32)
    if config.init == "mamba":
      out_bias = torch_uniform(keys[3], out_bias.shape, d_model)
      out_bias = out_bias.at[:d_model].divide(depth**0.5)
    self.out_proj = nnx.Param(out_proj)
    self.out_bias = nnx.Param(out_bias, weight_decay=False)

  def __call__(
    self,
    x: Float[Array, "B T M"],
    state: S4State | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T M"], S4State]:
    """Mix over time.

    Args:
      x: `[B, T, M]`.
      state: to go on from; None for the beginning.
      segment_ids: `[B, T]`, 1-based, 0 for padding.

    Returns:
      y `[B, T, M]` of x's dtype (0 at padding) and the state after it.
    """
    check_call(self, x, state, segment_ids)
    u = clear_padding(x, segment_ids).astype(self.config.dtype)
    y, hidden = self.system.scan(
      u,
      self.D[...],
      None if state is None else state.hidden,
      segment_ids,
      self.config.implementation,
    )
    y = write(y, self.out_proj[...], self.out_bias[...]).astype(x.dtype)
    return clear_padding(y, segment_ids), S4State(hidden)

  def step(
    self,
    x: Float[Array, "B M"],
    state: S4State,
    segment_ids: Int[Array, " B"] | None = None,
  ) -> tuple[Float[Array, "B M"], S4State]:
    """Mix one token, at any length of the past: y `[B, M]`, the new state."""
    check_step(self, x, state, segment_ids)
    u = clear_padding(x, segment_ids).astype(self.config.dtype)
    y, hidden = self.system.step(u, self.D[...], state.hidden, segment_ids)
    y = write(y, self.out_proj[...], self.out_bias[...]).astype(x.dtype)
    return clear_padding(y, segment_ids), S4State(hidden)

  def init_state(
    self, batch_size: int, max_length: int | None = None
  ) -> S4State:
    """The state before any token; its size does not depend on a length."""
    del max_length
    return S4State(self.system.init_state(batch_size))


def write(
  y: Float[Array, "... M"],
  out_proj: Float[Array, "M K"],
  out_bias: Float[Array, " K"],
) -> Float[Array, "... M"]:
  """What a block gives for the system's output: K is M, or 2M with a gate."""
  gated = out_proj.shape[1] != out_proj.shape[0]
  hidden = gelu(y.astype(jnp.float32))
  out = affine(hidden.astype(y.dtype), out_proj, out_bias, dtype=jnp.float32)
  return jax.nn.glu(out) if gated else out


def check_system(config: Any) -> None:
  """Raise ValueError for a field of a time-invariant layer's configuration."""
  name = type(config).__name__
  check_fields(config)
  if not 0 < config.dt_min <= config.dt_max:
    raise ValueError(
      f"{name}: dt_min is {config.dt_min} and dt_max {config.dt_max},"
      " expected 0 < dt_min <= dt_max."
    )
  check_exact(name, getattr(config, "polarization", None))
