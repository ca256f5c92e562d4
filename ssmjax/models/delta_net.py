"""DeltaNet and gated DeltaNet: a memory that replaces what a key held."""

import dataclasses
import functools
import math
from typing import ClassVar, Literal, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import Precision

from ssmjax import ops
from ssmjax.models.doors import check_call, check_step
from ssmjax.models.layers import (
  RMSNorm,
  ShortConv,
  affine,
  clear_padding,
  dense,
  linear_weight,
  output_weight,
)
from ssmjax.models.mamba import check_dt_range, log_uniform_dt_bias
from ssmjax.models.module import Module
from ssmjax.types import (
  Array,
  Count,
  Float,
  FloatingDType,
  Int,
  Positive,
  Size,
  check_fields,
)

__all__ = [
  "DeltaNet",
  "DeltaNetConfig",
  "DeltaNetState",
  "GatedDeltaNet",
  "GatedDeltaNetConfig",
]

# Added to ‖·‖² under its root, as in the published code.
_EPSILON = 1e-6


class DeltaNetState(NamedTuple):
  """What a DeltaNet mixer carries from token to token.

  Attributes:
    conv: the last W-1 queries, keys and values before their convolution,
      `[B, W-1, 2GK + HP]`, float32; None where there is none.
    memory: the state of the delta rule, `[B, H, K, P]`, float32.
  """

  conv: Float[Array, "B V D"] | None
  memory: Float[Array, "B H K P"]


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig:
  """Sizes and choices of a `DeltaNet` mixer.

  Attributes:
    num_heads: H, heads of values, each with a memory.
    num_key_heads: G, heads of queries and keys, a divisor of H: H / G heads of
      values share one. None for H.
    key_dim: K, width of a key; None for d_model / G.
    expand_v: P / K, P the width of a value.
    d_conv: W, width of the short convolution of queries, keys and values; 0
      for none.
    feature_map: of queries and keys: `"silu"`, or `"elu"` for 1 + elu. Values
      have silu.
    normalize: queries and keys by their `"l2"` norm, or by their `"sum"`,
      which 1 + elu alone keeps away from 0.
    allow_negative: twice the β, up to 2: a direction may change its sign, so
      that a layer can count modulo 2 (Grazzi et al. 2024, arXiv 2411.12537).
    output_gate: gate the normalised output by silu(W_z x).
    init: as in `MambaConfig`.
    dtype: dtype of activations; parameters, β, decays and states are float32.
    implementation: of the delta rule; None chooses.
  """

  op: ClassVar[str | None] = "delta_rule"
  polarizes: ClassVar[str | None] = None

  num_heads: Size = 4
  num_key_heads: Size | None = None
  key_dim: Size | None = None
  expand_v: Positive = 1.0
  d_conv: Count = 4
  feature_map: Literal["silu", "elu"] = "silu"
  normalize: Literal["l2", "sum"] = "l2"
  allow_negative: bool = False
  output_gate: bool = False
  init: Literal["mamba", "authors"] = "mamba"
  dtype: FloatingDType = jnp.float32
  implementation: Literal["reference", "chunked"] | None = None

  def __post_init__(self):
    function = type(self).__name__
    check_fields(self)
    if self.num_key_heads and self.num_heads % self.num_key_heads:
      raise ValueError(
        f"{function}: num_key_heads is {self.num_key_heads}, expected a"
        f" divisor of num_heads={self.num_heads}."
      )
    if self.normalize == "sum" and self.feature_map == "silu":
      raise ValueError(
        f"{function}: normalize is 'sum' with feature_map='silu', whose sum"
        " may be 0, expected 'l2'. Or pass feature_map='elu'."
      )

  def build(self, d_model: int, n_layers: int, rngs: nnx.Rngs) -> "DeltaNet":
    """Make the mixer for a model of this width and depth."""
    return DeltaNet(d_model, self, n_layers=n_layers, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class GatedDeltaNetConfig(DeltaNetConfig):
  """Sizes and choices of a `GatedDeltaNet` mixer.

  Fields as in `DeltaNetConfig`, with values of twice the keys' width and an
  output gate. The paper has keys of ¾ d_model in all heads together.

  Attributes:
    dt_min: smallest Δ at initialisation.
    dt_max: largest Δ at initialisation; Δ is log-uniform between them.
    rate_min: smallest rate exp(A_log) of decay at initialisation.
    rate_max: largest rate at initialisation; it is uniform between them.
  """

  expand_v: Positive = 2.0
  output_gate: bool = True
  dt_min: Positive = 1e-3
  dt_max: Positive = 1e-1
  rate_min: Positive = 0.01
  rate_max: Positive = 16.0

  def __post_init__(self):
    super().__post_init__()
    check_dt_range(self)
    if not 0 < self.rate_min <= self.rate_max:
      raise ValueError(
        f"GatedDeltaNetConfig: rate_min is {self.rate_min} and rate_max"
        f" {self.rate_max}, expected 0 < rate_min <= rate_max."
      )

  def build(
    self, d_model: int, n_layers: int, rngs: nnx.Rngs
  ) -> "GatedDeltaNet":
    """Make the mixer for a model of this width and depth."""
    return GatedDeltaNet(d_model, self, n_layers=n_layers, rngs=rngs)


class DeltaNet(Module):
  """DeltaNet: linear attention whose memory replaces a key's old value.

  q, k = φ(conv(W_q x)) / ‖·‖, φ(conv(W_k x)) / ‖·‖;  v = silu(conv(W_v x))
  β = σ(W_β x)  (doubled with `allow_negative`)
  S_t = (I - β k kᵀ) S_{t-1} + β k vᵀ;  y = W_o norm(S_tᵀ q / √K)

  The norm is an RMS norm of each head's values, with a gate silu(W_z x) behind
  it if the configuration asks for one.

  There is no polarization: I - βkkᵀ mixes the rows of the state by other
  directions at each token, so that no decay is diagonal.

  Source: Yang et al. 2024 (arXiv 2406.06484), §3.3 and §4; φ = 1 + elu with
  the norm by the sum is that of Schlag et al. 2021 (arXiv 2102.11174).
  """

  def __init__(
    self,
    d_model: int,
    config: DeltaNetConfig | None = None,
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

    Raises:
      ValueError: a width of keys or values that is not a whole number.
    """
    config = config or DeltaNetConfig()
    self.config = config
    self.d_model = d_model
    self._check_widths()
    groups, keys, values = self._widths()
    channels = 2 * groups * keys + config.num_heads * values
    inner = config.num_heads * values
    key = jax.random.split(rngs.params(), 4)
    linear = functools.partial(linear_weight, init=config.init)
    gate = inner if config.output_gate else 0
    self.in_proj = nnx.Param(linear(key[0], d_model, channels + gate))
    self.beta_proj = nnx.Param(linear(key[1], d_model, config.num_heads))
    self.conv = (
      ShortConv(channels, config.d_conv, key[2], bias=False)
      if config.d_conv
      else None
    )
    self.norm = RMSNorm(values)
    self.out_proj = nnx.Param(
      output_weight(key[3], inner, d_model, config.init, n_layers)
    )

  def __call__(
    self,
    x: Float[Array, "B T M"],
    state: DeltaNetState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T M"], DeltaNetState]:
    """Mix over time.

    Args:
      x: `[B, T, M]`.
      state: to go on from; None for the beginning.
      segment_ids: `[B, T]`, 1-based, 0 for padding.

    Returns:
      y `[B, T, M]` of x's dtype (0 at padding) and the state after it.
    """
    check_call(self, x, state, segment_ids)
    x_dtype, x = x.dtype, clear_padding(x, segment_ids)
    qkv, z = self._split_input(x)
    conv = None
    if self.conv is not None:
      conv = None if state is None else state.conv
      qkv, conv = self.conv(qkv, conv, segment_ids)
    y, memory = ops.delta_rule(
      *self._qkv(qkv), *self._rates(x),
      initial_state=None if state is None else state.memory,
      segment_ids=segment_ids, implementation=self.config.implementation,
    )  # fmt: skip
    return self._output(y, z).astype(x_dtype), DeltaNetState(conv, memory)

  def step(
    self,
    x: Float[Array, "B M"],
    state: DeltaNetState,
    segment_ids: Int[Array, " B"] | None = None,
  ) -> tuple[Float[Array, "B M"], DeltaNetState]:
    """Mix one token, in O(1): y `[B, M]` and the new state."""
    check_step(self, x, state, segment_ids)
    x_dtype, x = x.dtype, clear_padding(x, segment_ids)
    qkv, z = self._split_input(x)
    conv = state.conv
    if conv is not None and self.conv:
      qkv, conv = self.conv.step(qkv, conv, segment_ids)
    y, memory = ops.delta_rule_step(
      *self._qkv(qkv), *self._rates(x), state=state.memory,
      segment_ids=segment_ids,
    )  # fmt: skip
    return self._output(y, z).astype(x_dtype), DeltaNetState(conv, memory)

  def init_state(
    self, batch_size: int, max_length: int | None = None
  ) -> DeltaNetState:
    """The state before any token; its size does not depend on a length."""
    del max_length
    _, keys, values = self._widths()
    shape = batch_size, self.config.num_heads, keys, values
    conv = None if self.conv is None else self.conv.init_state(batch_size)
    return DeltaNetState(conv, jnp.zeros(shape, jnp.float32))

  def recurrence(self, x: Float[Array, "B T M"]) -> NoReturn:
    """Raise NotImplementedError: the delta rule has no diagonal Eq. 1."""
    raise NotImplementedError(
      f"{type(self).__name__}: the delta rule's I - βkkᵀ mixes the rows of its"
      " state by another direction at each token, so it has no diagonal Eq. 1."
    )

  def _widths(self):
    """G, K and P."""
    groups = self.config.num_key_heads or self.config.num_heads
    keys = self.config.key_dim or self.d_model // groups
    return groups, keys, round(self.config.expand_v * keys)

  def _check_widths(self):
    name = type(self).__name__
    groups, keys, values = self._widths()
    if self.config.key_dim is None and groups * keys != self.d_model:
      raise ValueError(
        f"{name}: d_model is {self.d_model}, expected a multiple of the"
        f" {groups} heads of keys. Or pass key_dim."
      )
    if values < 1 or not math.isclose(values, self.config.expand_v * keys):
      raise ValueError(
        f"{name}: expand_v is {self.config.expand_v}, expected a whole number"
        f" when multiplied by the keys' width of {keys}."
      )

  def _split_input(self, x):
    """Queries, keys and values in one, and the output gate or None."""
    x = dense(x.astype(self.config.dtype), self.in_proj[...])
    groups, keys, values = self._widths()
    channels = 2 * groups * keys + self.config.num_heads * values
    if not self.config.output_gate:
      return x, None
    qkv, z = jnp.split(x, [channels], -1)
    return qkv, z

  def _qkv(self, qkv):
    groups, width, _ = self._widths()
    q, k, v = jnp.split(qkv, [groups * width, 2 * groups * width], -1)
    q, k = (self._features(x, groups) for x in (q, k))
    v = jax.nn.silu(v).reshape(*v.shape[:-1], self.config.num_heads, -1)
    # Of no matter to the norm, but for its epsilon.
    q = q * width**-0.5
    return q.astype(v.dtype), k.astype(v.dtype), v

  def _features(self, x, groups):
    """The normalised features of every head of values, float32."""
    x = x.astype(jnp.float32).reshape(*x.shape[:-1], groups, -1)
    if self.config.feature_map == "silu":
      x = jax.nn.silu(x)
    else:
      # 1 + elu, without the 1 - 1 of a negative x.
      x = jnp.where(x > 0, 1 + x, jnp.exp(jnp.minimum(x, 0)))
    if self.config.normalize == "l2":
      square = jnp.square(x).sum(-1, keepdims=True)
      x = x * jax.lax.rsqrt(square + _EPSILON)
    else:
      x = x / jnp.maximum(x.sum(-1, keepdims=True), _EPSILON)
    return jnp.repeat(x, self.config.num_heads // groups, -2)

  def _rates(self, x):
    """β and the logarithm of the decay, float32."""
    logit = dense(
      x.astype(jnp.float32), self.beta_proj[...], precision=Precision.HIGHEST
    )
    beta = jax.nn.sigmoid(logit)
    return 2 * beta if self.config.allow_negative else beta, None

  def _output(self, y, z):
    y = self.norm(y)
    y = y.reshape(*y.shape[:-2], -1)
    if z is not None:
      gate = jax.nn.silu(z.astype(jnp.float32))
      y = (y.astype(jnp.float32) * gate).astype(y.dtype)
    return dense(y, self.out_proj[...])


class GatedDeltaNet(DeltaNet):
  """Gated DeltaNet: the delta rule on a memory that decays.

  As `DeltaNet`, with S_t = a_t (I - β k kᵀ) S_{t-1} + β k vᵀ, where
  a_t = exp(-exp(A_log) softplus(W_a x + b_Δ)) for each head, as in Mamba-2,
  and y = W_o (norm(S_tᵀ q / √K) · silu(W_z x)).

  There is no polarization: a_t scales a head as a whole, and I - βkkᵀ mixes
  its rows, so that no decay is diagonal.

  Source: Yang et al. 2024 (arXiv 2412.06464), Eq. 10 and §3.4.
  """

  def __init__(
    self,
    d_model: int,
    config: GatedDeltaNetConfig | None = None,
    *,
    n_layers: int = 1,
    rngs: nnx.Rngs,
  ):
    """Draw the parameters, see `DeltaNet`."""
    config = config or GatedDeltaNetConfig()
    super().__init__(d_model, config, n_layers=n_layers, rngs=rngs)
    heads = config.num_heads
    keys = jax.random.split(rngs.params(), 3)
    self.decay_proj = nnx.Param(
      linear_weight(keys[0], d_model, heads, config.init)
    )
    rate = jax.random.uniform(
      keys[1], (heads,), jnp.float32, config.rate_min, config.rate_max
    )
    self.A_log = nnx.Param(jnp.log(rate), weight_decay=False)
    self.dt_bias = nnx.Param(
      log_uniform_dt_bias(keys[2], heads, config), weight_decay=False
    )

  def _rates(self, x):
    beta, _ = super()._rates(x)
    dt = affine(
      x.astype(jnp.float32), self.decay_proj[...], self.dt_bias[...],
      precision=Precision.HIGHEST,
    )  # fmt: skip
    return beta, -jnp.exp(self.A_log[...]) * jax.nn.softplus(dt)
