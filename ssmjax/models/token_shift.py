"""RWKV's token shift: the previous token beside the present one."""

import jax.numpy as jnp

from ssmjax import ops
from ssmjax.types import Array, Float, Int

__all__ = ["mix", "mix_weight", "token_shift", "token_shift_step"]


def token_shift(
  x: Float[Array, "B T M"],
  state: Float[Array, "B M"] | None,
  segment_ids: Int[Array, "B T"] | None,
) -> tuple[Float[Array, "B T M"], Float[Array, "B M"]]:
  """Give each token's previous one, 0 at a start, and the last, float32."""
  taps = jnp.zeros((2, x.shape[-1]), jnp.float32).at[0].set(1)
  shifted, last = ops.causal_conv(
    x, taps, initial_state=None if state is None else state[:, None],
    segment_ids=segment_ids,
  )  # fmt: skip
  return shifted, last[:, 0]


def token_shift_step(
  x: Float[Array, "B M"],
  state: Float[Array, "B M"],
  segment_ids: Int[Array, " B"] | None,
) -> tuple[Float[Array, "B M"], Float[Array, "B M"]]:
  """As `token_shift`, of one token."""
  last = x.astype(jnp.float32)
  if segment_ids is not None:
    last = jnp.where(segment_ids[:, None] > 0, last, state)
  return state.astype(x.dtype), last


def mix(
  x: Float[Array, "... M"],
  shifted: Float[Array, "... M"],
  weight: Float[Array, "... M"],
) -> Float[Array, "... M"]:
  """μ x + (1 - μ) shifted, in float32, of x's dtype."""
  y = x * weight + shifted * (1 - weight)
  return y.astype(x.dtype)


def mix_weight(
  d_model: int, power: float, shift: float = 0.0
) -> Float[Array, " M"]:
  """Initial μ = (i/M)^power + shift: later channels look at the present."""
  i = jnp.arange(d_model, dtype=jnp.float32)
  return (i / d_model) ** power + shift
