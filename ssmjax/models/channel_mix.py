"""RWKV's channel mix: an MLP that sees the token before, too."""

import dataclasses
from typing import ClassVar, Literal, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from flax import nnx

from ssmjax.models.doors import check_call, check_step
from ssmjax.models.layers import (
  clear_padding,
  dense,
  linear_weight,
  output_weight,
)
from ssmjax.models.module import Module
from ssmjax.models.token_shift import (
  mix,
  mix_weight,
  token_shift,
  token_shift_step,
)
from ssmjax.types import Array, Float, FloatingDType, Int, Size, check_fields

__all__ = ["RWKVChannelMix", "RWKVChannelMixConfig", "RWKVChannelMixState"]


class RWKVChannelMixState(NamedTuple):
  """What a channel mix carries from token to token.

  Attributes:
    shift: the last token, `[B, M]`, float32.
  """

  shift: Float[Array, "B M"]


@dataclasses.dataclass(frozen=True)
class RWKVChannelMixConfig:
  """Sizes and choices of an `RWKVChannelMix`.

  Attributes:
    width: hidden channels; None for 4 · d_model (RWKV-4's; RWKV-5 and 6 have
      3.5).
    init: as in `MambaConfig`, of the projections.
    dtype: dtype of activations; parameters and states are float32.
  """

  op: ClassVar[str | None] = None
  polarizes: ClassVar[str | None] = None

  width: Size | None = None
  init: Literal["mamba", "authors"] = "mamba"
  dtype: FloatingDType = jnp.float32

  def __post_init__(self):
    check_fields(self)

  def build(
    self, d_model: int, n_layers: int, rngs: nnx.Rngs
  ) -> "RWKVChannelMix":
    """Make the layer for a model of this width and depth."""
    return RWKVChannelMix(d_model, self, n_layers=n_layers, rngs=rngs)


class RWKVChannelMix(Module):
  """The second half of an RWKV block, as a layer of the pattern.

  x̃ = μ x_t + (1 - μ) x_{t-1}, its own μ for k and r
  y = σ(W_r x̃) · W_v relu(W_k x̃)²

  With `mixers=(RWKV4Config(), RWKVChannelMixConfig())` a model's two
  successive layers are one block of RWKV-4. There is no decay in it, nothing
  to polarize and no diagonal Eq. 1: its memory is the previous token.

  Source: Peng et al. 2023 (arXiv 2305.13048), §3.1; RWKV-5 and 6 have the same
  (Peng et al. 2024, arXiv 2404.05892), and write 1 - μ for our μ.
  """

  def __init__(
    self,
    d_model: int,
    config: RWKVChannelMixConfig | None = None,
    *,
    n_layers: int = 1,
    rngs: nnx.Rngs,
  ):
    """Draw the parameters.

    Args:
      d_model: width of input and output.
      config: sizes and choices.
      n_layers: depth of the model around it, which scales `v_proj`.
      rngs: source of the `params` key; not kept.
    """
    config = config or RWKVChannelMixConfig()
    self.config = config
    self.d_model = d_model
    hidden, init = config.width or 4 * d_model, config.init
    keys = jax.random.split(rngs.params(), 3)
    # Of the middle layer, see `RWKV4`.
    self.mix_key = nnx.Param(mix_weight(d_model, 0.5), weight_decay=False)
    self.mix_receptance = nnx.Param(
      mix_weight(d_model, 0.5), weight_decay=False
    )
    self.k_proj = nnx.Param(linear_weight(keys[0], d_model, hidden, init))
    self.r_proj = nnx.Param(linear_weight(keys[1], d_model, d_model, init))
    self.v_proj = nnx.Param(
      output_weight(keys[2], hidden, d_model, init, n_layers)
    )

  def __call__(
    self,
    x: Float[Array, "B T M"],
    state: RWKVChannelMixState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T M"], RWKVChannelMixState]:
    """Apply to a sequence.

    Args:
      x: `[B, T, M]`.
      state: to go on from; None for the beginning.
      segment_ids: `[B, T]`, 1-based, 0 for padding.

    Returns:
      y `[B, T, M]` of x's dtype (0 at padding) and the state after it.
    """
    check_call(self, x, state, segment_ids)
    x_dtype = x.dtype
    x = clear_padding(x, segment_ids).astype(self.config.dtype)
    last = None if state is None else state.shift
    shifted, last = token_shift(x, last, segment_ids)
    y = self._apply(x, shifted).astype(x_dtype)
    return clear_padding(y, segment_ids), RWKVChannelMixState(last)

  def step(
    self,
    x: Float[Array, "B M"],
    state: RWKVChannelMixState,
    segment_ids: Int[Array, " B"] | None = None,
  ) -> tuple[Float[Array, "B M"], RWKVChannelMixState]:
    """Apply to one token: y `[B, M]` and the new state."""
    check_step(self, x, state, segment_ids)
    x_dtype = x.dtype
    x = clear_padding(x, segment_ids).astype(self.config.dtype)
    shifted, last = token_shift_step(x, state.shift, segment_ids)
    y = self._apply(x, shifted).astype(x_dtype)
    return clear_padding(y, segment_ids), RWKVChannelMixState(last)

  def init_state(
    self, batch_size: int, max_length: int | None = None
  ) -> RWKVChannelMixState:
    """The state before any token; its size does not depend on a length."""
    del max_length
    return RWKVChannelMixState(
      jnp.zeros((batch_size, self.d_model), jnp.float32)
    )

  def recurrence(self, x: Float[Array, "B T M"]) -> NoReturn:
    """Raise: there is no recurrent state."""
    raise NotImplementedError(
      "RWKVChannelMix.recurrence: it has no diagonal Eq. 1: it is an MLP of"
      " the present and the previous token, without a recurrent state."
    )

  def _apply(self, x, shifted):
    key = dense(mix(x, shifted, self.mix_key[...]), self.k_proj[...])
    value = dense(jnp.square(jax.nn.relu(key)), self.v_proj[...])
    receptance = mix(x, shifted, self.mix_receptance[...])
    return jax.nn.sigmoid(dense(receptance, self.r_proj[...])) * value
