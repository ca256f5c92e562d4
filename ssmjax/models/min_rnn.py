"""minGRU and minLSTM: gates of the token alone, so that a scan runs them."""

import dataclasses
import math
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ssmjax import ops
from ssmjax.models.doors import check_call, check_mixer, check_step
from ssmjax.models.layers import (
  affine,
  check_exact,
  clear_padding,
  dense,
  normal,
  torch_uniform,
)
from ssmjax.models.module import Module
from ssmjax.polarization import polarize
from ssmjax.types import (
  Array,
  Count,
  Float,
  FloatingDType,
  Int,
  Polarization,
  Recurrence,
  Size,
  check_fields,
)

__all__ = [
  "MinGRU",
  "MinGRUConfig",
  "MinLSTM",
  "MinLSTMConfig",
  "MinRNNState",
]


class MinRNNState(NamedTuple):
  """What a minGRU or minLSTM carries from token to token.

  Attributes:
    conv: the last W-1 inputs of the convolution, `[B, W-1, M]`, float32; None
      where there is none.
    hidden: the state of the recurrence, `[B, D]`, float32.
  """

  conv: Float[Array, "B V M"] | None
  hidden: Float[Array, "B D"]


@dataclasses.dataclass(frozen=True)
class _MinRNNConfig:
  """The fields of both configurations, described in `MinGRUConfig`."""

  op: ClassVar[str | None] = "linear_scan"
  polarizes: ClassVar[str | None] = "channels"

  expand: Size = 1
  d_conv: Count = 0
  candidate: Literal["positive", "linear"] = "positive"
  forget_bias: float = 0.0
  polarization: Polarization | None = None
  init: Literal["mamba", "authors"] = "mamba"
  dtype: FloatingDType = jnp.float32
  implementation: (
    Literal["reference", "associative", "chunked", "pallas"] | None
  ) = None

  def __post_init__(self):
    check_fields(self)
    check_exact(type(self).__name__, self.polarization)


@dataclasses.dataclass(frozen=True)
class MinGRUConfig(_MinRNNConfig):
  """Sizes and choices of a `MinGRU` mixer.

  Attributes:
    expand: D / d_model, D the learned channels (with `placement="replace"`,
      all channels).
    d_conv: W, width of a short convolution before the gates, as in the
      paper's language models (4); 0 for none.
    candidate: `"positive"` is the paper's g(v) = v + ½ where v ≥ 0, σ(v)
      elsewhere, which its log-space form needs; `"linear"` is its plain form.
    forget_bias: added at initialisation to the bias of the gate that keeps
      the past (the minGRU's z lets the present in, and gets the negative);
      above 0 for a longer memory.
    polarization: channels of decay exactly 1 and 0; None for none.
    init: as in `MambaConfig`.
    dtype: dtype of activations; parameters, gates and states are float32.
    implementation: of the linear scan; None chooses.
  """

  def build(self, d_model: int, n_layers: int, rngs: nnx.Rngs) -> "MinGRU":
    """Make the mixer for a model of this width and depth."""
    return MinGRU(d_model, self, n_layers=n_layers, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class MinLSTMConfig(_MinRNNConfig):
  """Sizes and choices of a `MinLSTM` mixer; fields as in `MinGRUConfig`."""

  def build(self, d_model: int, n_layers: int, rngs: nnx.Rngs) -> "MinLSTM":
    """Make the mixer for a model of this width and depth."""
    return MinLSTM(d_model, self, n_layers=n_layers, rngs=rngs)


class _MinRNN(Module):
  """A convex mean of past and candidate: a = σ(-ℓ), Δ = σ(ℓ) = 1 - a.

  A cell is its ℓ, `_logit`, of its gates before their σ.
  """

  _config: ClassVar[type[_MinRNNConfig]]
  # Gates before the candidate, each with D channels; what the first one's
  # bias gains for a longer memory.
  _gates: ClassVar[int]
  _forget_sign: ClassVar[float]

  def __init__(
    self,
    d_model: int,
    config: _MinRNNConfig | None = None,
    *,
    n_layers: int = 1,
    rngs: nnx.Rngs,
  ):
    """Draw the parameters.

    Args:
      d_model: width of input and output.
      config: sizes and choices.
      n_layers: depth of the model around it, which scales `out_proj`.
      rngs: source of the `params` key; not kept.
    """
    config = config or self._config()
    self.config = config
    self.d_model = d_model
    channels = self._channels()
    keys = jax.random.split(rngs.params(), 6)
    own = config.init == "mamba"

    def linear(key, n_in, n_out):
      if own:
        return torch_uniform(key, (n_in, n_out), n_in)
      return normal(key, (n_in, n_out))

    if config.d_conv:
      self.conv_weight = nnx.Param(
        torch_uniform(keys[0], (config.d_conv, d_model), config.d_conv)
      )
      self.conv_bias = nnx.Param(
        torch_uniform(keys[1], (d_model,), config.d_conv),
        weight_decay=False,
      )
    width = (self._gates + 1) * channels
    self.in_proj = nnx.Param(linear(keys[2], d_model, width))
    in_bias = jnp.zeros((width,), jnp.float32)
    if own:
      in_bias = torch_uniform(keys[3], (width,), d_model)
    forget = self._forget_sign * config.forget_bias
    self.in_bias = nnx.Param(
      in_bias.at[:channels].add(forget), weight_decay=False
    )
    # One residual branch a layer (authors: two, as in GPT-2).
    scale = 1 / math.sqrt(n_layers if own else 2 * n_layers)
    self.out_proj = nnx.Param(scale * linear(keys[4], channels, d_model))

  def __call__(
    self,
    x: Float[Array, "B T M"],
    state: MinRNNState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T M"], MinRNNState]:
    """Mix over time.

    Args:
      x: `[B, T, M]`.
      state: to go on from; None for the beginning.
      segment_ids: `[B, T]`, 1-based, 0 for padding.

    Returns:
      y `[B, T, M]` of x's dtype (0 at padding) and the state after it.
    """
    check_call(self, x, state, segment_ids)
    x_dtype = x.dtype
    x, conv = self._convolve(x, state, segment_ids)
    a, dt, b = self._eq1(x)
    h, hidden = ops.linear_scan(
      a, dt * b, initial_state=None if state is None else state.hidden,
      segment_ids=segment_ids, implementation=self.config.implementation,
    )  # fmt: skip
    y = dense(h.astype(x.dtype), self.out_proj[...]).astype(x_dtype)
    return y, MinRNNState(conv, hidden)

  def step(
    self,
    x: Float[Array, "B M"],
    state: MinRNNState,
    segment_ids: Int[Array, " B"] | None = None,
  ) -> tuple[Float[Array, "B M"], MinRNNState]:
    """Mix one token, in O(1): y `[B, M]` and the new state."""
    check_step(self, x, state, segment_ids)
    x_dtype = x.dtype
    conv = state.conv
    x = clear_padding(x, segment_ids).astype(self.config.dtype)
    if conv is not None:
      x, conv = ops.causal_conv_step(
        x, self.conv_weight[...], self.conv_bias[...], state=conv,
        segment_ids=segment_ids,
      )  # fmt: skip
    a, dt, b = self._eq1(x)
    h, hidden = ops.linear_step(
      a, dt * b, state=state.hidden, segment_ids=segment_ids
    )
    y = dense(h.astype(x.dtype), self.out_proj[...]).astype(x_dtype)
    return y, MinRNNState(conv, hidden)

  def init_state(
    self, batch_size: int, max_length: int | None = None
  ) -> MinRNNState:
    """The state before any token; its size does not depend on a length."""
    del max_length
    zeros = lambda *shape: jnp.zeros((batch_size, *shape), jnp.float32)
    width = self.config.d_conv
    conv = zeros(width - 1, self.d_model) if width else None
    return MinRNNState(conv, zeros(self._channels()))

  def recurrence(self, x: Float[Array, "B T M"]) -> Recurrence:
    """Show the layer's own Eq. 1 on `x`: S = (D,), a scalar per channel.

    a (polarized) and dt = 1 - a of the channel's own decay, b the candidate
    h̃; the readout is W_out h.
    """
    name = f"{type(self).__name__}.recurrence"
    check_mixer(name, x, None, self.d_model)
    wide, _ = self._convolve(x, None, None)
    a, dt, b = self._eq1(wide)
    readout = jax.tree_util.Partial(
      _readout, self.out_proj[...], wide[:0, 0], x[:0, 0]
    )
    return Recurrence(a, dt, b, jnp.zeros_like(b[:, 0]), readout)

  def _channels(self):
    polarization = self.config.polarization or Polarization()
    return polarization.total(self.config.expand * self.d_model)

  def _convolve(self, x, state, segment_ids):
    x = clear_padding(x, segment_ids).astype(self.config.dtype)
    if not self.config.d_conv:
      return x, None
    return ops.causal_conv(
      x, self.conv_weight[...], self.conv_bias[...],
      initial_state=None if state is None else state.conv,
      segment_ids=segment_ids,
    )  # fmt: skip

  def _logit(self, *gates):
    raise NotImplementedError

  def _eq1(self, x):
    """a, dt and b in float32, from `[..., M]`."""
    y = affine(x, self.in_proj[...], self.in_bias[...], dtype=jnp.float32)
    *gates, candidate = jnp.split(y, self._gates + 1, -1)
    logit = self._logit(*gates)
    a, dt = jax.nn.sigmoid(-logit), jax.nn.sigmoid(logit)
    if self.config.polarization is not None:
      # The added channels have gates too, so all decays are there by now.
      held = dataclasses.replace(self.config.polarization, placement="replace")
      a = polarize(a, held)
    if self.config.candidate == "positive":
      candidate = _positive(candidate)
    return a, dt, candidate


class MinGRU(_MinRNN):
  """The minGRU.

  z_t = σ(W_z x + b_z),  h̃_t = g(W_h x + b_h)
  h_t = (1 - z_t) h_{t-1} + z_t h̃_t;  y = W_out h

  Polarization holds the decay 1 - z of some channels at 1 (they sum z h̃ for
  ever) and of others at 0 (they gate the present token); z stays the
  channel's own.

  Source: Feng et al. 2024 (arXiv 2410.01201), §3.1 and App. B.
  """

  _config = MinGRUConfig
  _gates = 1
  _forget_sign = -1.0

  def _logit(self, update):
    return update


class MinLSTM(_MinRNN):
  """The minLSTM, of the length-independent gates f' and i'.

  f_t = σ(W_f x + b_f),  i_t = σ(W_i x + b_i),  h̃_t = g(W_h x + b_h)
  f' = f/(f + i),  i' = i/(f + i);  h_t = f' h_{t-1} + i' h̃_t;  y = W_out h

  f' is computed as σ(log f - log i), exact where both gates underflow.

  Polarization holds the decay f' of some channels at 1 (they sum i' h̃ for
  ever) and of others at 0 (they gate the present token); i' stays the
  channel's own.

  Source: Feng et al. 2024 (arXiv 2410.01201), §3.2 and App. B.
  """

  _config = MinLSTMConfig
  _gates = 2
  _forget_sign = 1.0

  def _logit(self, forget, write):
    return jax.nn.log_sigmoid(write) - jax.nn.log_sigmoid(forget)


def _positive(v):
  """The paper's g: v + ½ where v ≥ 0, σ(v) elsewhere; both ½ at 0."""
  return jnp.where(v >= 0, v + 0.5, jax.nn.sigmoid(v))


def _readout(out_proj, wide, like, h, t):
  """The output from the state h, in the dtype of `like`; t says nothing."""
  del t
  return dense(h.astype(wide.dtype), out_proj).astype(like.dtype)
