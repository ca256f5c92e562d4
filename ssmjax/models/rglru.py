"""Griffin's RG-LRU: a gated scalar decay per channel behind a short conv."""

import dataclasses
import math
from typing import Annotated, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import Precision

from ssmjax import ops
from ssmjax.models.doors import check_call, check_mixer, check_step
from ssmjax.models.layers import (
  affine,
  check_exact,
  clear_padding,
  normal,
  torch_uniform,
)
from ssmjax.models.module import Module
from ssmjax.ops.segments import segment_masks
from ssmjax.polarization import polarize
from ssmjax.types import (
  Array,
  Bool,
  Float,
  FloatingDType,
  Int,
  Polarization,
  Range,
  Recurrence,
  Size,
  check_fields,
)

__all__ = ["RGLRU", "RGLRUConfig", "RGLRUState"]

# c of the paper: log a = -c softplus(Λ) σ(r).
_RATE = 8.0


class RGLRUState(NamedTuple):
  """What an RG-LRU mixer carries from token to token.

  Attributes:
    conv: the last W-1 inputs of the convolution, `[B, W-1, D]`, float32.
    hidden: the state of the recurrence, `[B, D]`, float32.
    started: whether the present segment has had a token, `[B]` bool; the
      first one enters unscaled.
  """

  conv: Float[Array, "B V D"]
  hidden: Float[Array, "B D"]
  started: Bool[Array, " B"]


@dataclasses.dataclass(frozen=True)
class RGLRUConfig:
  """Sizes and choices of an `RGLRU` mixer.

  Attributes:
    width: learned channels (with `placement="replace"`, all channels); None
      for d_model.
    num_blocks: blocks of the block-diagonal gates, a divisor of the number D
      of all channels.
    d_conv: W, width of the short convolution.
    decay_min: smallest decay at initialisation where the gate is open (r → ∞).
    decay_max: largest such decay; exp(-8 softplus(Λ)) is uniform between them,
      as the paper has it. (The released code draws exp(-softplus(Λ)) there,
      whose eighth power decays faster.)
    polarization: channels of decay exactly 1 and 0; None for none.
    init: as in `MambaConfig`; with `"authors"` the gates too are N(0, 0.02²).
    dtype: dtype of activations; parameters, gates and states are float32.
    implementation: of the linear scan; None chooses.
  """

  op: ClassVar[str | None] = "linear_scan"
  polarizes: ClassVar[str | None] = "channels"

  width: Size | None = None
  num_blocks: Size = 1
  d_conv: Size = 4
  decay_min: Annotated[float, Range(above=0, below=1)] = 0.9
  decay_max: Annotated[float, Range(above=0, below=1)] = 0.999
  polarization: Polarization | None = None
  init: Literal["mamba", "authors"] = "mamba"
  dtype: FloatingDType = jnp.float32
  implementation: (
    Literal["reference", "associative", "chunked", "pallas"] | None
  ) = None

  def __post_init__(self):
    check_fields(self)
    if not 0 < self.decay_min <= self.decay_max < 1:
      raise ValueError(
        f"RGLRUConfig: decay_min is {self.decay_min} and decay_max"
        f" {self.decay_max}, expected 0 < decay_min <= decay_max < 1."
      )
    check_exact("RGLRUConfig", self.polarization)

  def build(self, d_model: int, n_layers: int, rngs: nnx.Rngs) -> "RGLRU":
    """Make the mixer for a model of this width and depth."""
    return RGLRU(d_model, self, n_layers=n_layers, rngs=rngs)


class RGLRU(Module):
  """Griffin's recurrent block around the Real-Gated Linear Recurrent Unit.

  x, z = split(W_in input + b_in);  u = conv(x)
  r = σ(W_r u + b_r),  i = σ(W_i u + b_i)  (block-diagonal)
  a_t = exp(-8 softplus(Λ) r),  Δ_t = √(1 - a_t²),  Δ = 1 at a segment's start
  h_t = a_t h_{t-1} + Δ_t (i u);  y = W_out (h · gelu(z)) + b_out

  Polarization holds the decay of some channels at 1 (they sum Δ i u for ever)
  and of others at 0 (they gate the present token). It holds the decay alone:
  Δ stays that of the channel's own gate, for √(1 - 1²) would let nothing in.

  The released code bounds the slope of √(1 - a²) by 1000, which alters
  gradients where 1 - a² < 2.5e-7. Here 1 - a² is formed without cancellation
  and the slope, which the gate's own slope tames, is exact.

  Source: De et al. 2024 (arXiv 2402.19427), §2.4; the start of a segment as in
  RecurrentGemma (Botev et al. 2024, arXiv 2404.07839).
  """

  def __init__(
    self,
    d_model: int,
    config: RGLRUConfig | None = None,
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
      ValueError: the channels do not divide into the gates' blocks.
    """
    config = config or RGLRUConfig()
    self.config = config
    self.d_model = d_model
    channels = self._channels()
    if channels % config.num_blocks:
      raise ValueError(
        f"RGLRU: there are {channels} channels, polarized ones included,"
        f" expected a multiple of num_blocks={config.num_blocks}."
      )
    block = channels // config.num_blocks
    keys = jax.random.split(rngs.params(), 8)
    own = config.init == "mamba"

    def linear(key, shape):
      return torch_uniform(key, shape, shape[-2]) if own else normal(key, shape)

    def bias(key, shape, fan_in):
      zeros = jnp.zeros(shape, jnp.float32)
      return torch_uniform(key, shape, fan_in) if own else zeros

    self.in_proj = nnx.Param(linear(keys[0], (d_model, 2 * channels)))
    self.in_bias = nnx.Param(
      bias(keys[1], (2 * channels,), d_model), weight_decay=False
    )
    self.conv_weight = nnx.Param(
      torch_uniform(keys[2], (config.d_conv, channels), config.d_conv)
    )
    self.conv_bias = nnx.Param(
      torch_uniform(keys[3], (channels,), config.d_conv), weight_decay=False
    )
    gates = (config.num_blocks, block, 2 * block)
    # LeCun's deviation, as in the released code.
    gate_proj = normal(keys[4], gates, block**-0.5 if own else 0.02)
    self.gate_proj = nnx.Param(gate_proj)
    self.gate_bias = nnx.Param(
      jnp.zeros((config.num_blocks, 2 * block), jnp.float32), weight_decay=False
    )
    self.decay_param = nnx.Param(
      _decay_param(keys[5], channels, config), weight_decay=False
    )
    # One residual branch a layer (authors: two, as in GPT-2).
    scale = 1 / math.sqrt(n_layers if own else 2 * n_layers)
    out_proj = scale * linear(keys[6], (channels, d_model))
    self.out_proj = nnx.Param(out_proj)
    self.out_bias = nnx.Param(
      scale * bias(keys[7], (d_model,), channels), weight_decay=False
    )

  def __call__(
    self,
    x: Float[Array, "B T M"],
    state: RGLRUState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T M"], RGLRUState]:
    """Mix over time.

    Args:
      x: `[B, T, M]`.
      state: to go on from; None for the beginning.
      segment_ids: `[B, T]`, 1-based, 0 for padding.

    Returns:
      y `[B, T, M]` of x's dtype (0 at padding) and the state after it.
    """
    check_call(self, x, state, segment_ids)
    u, z, conv = self._before_scan(x, state, segment_ids)
    started = None if state is None else state.started
    start, started = _starts(x.shape[:2], started, segment_ids)
    a, dt, b = self._eq1(u, start)
    h, hidden = ops.linear_scan(
      a, dt * b, initial_state=None if state is None else state.hidden,
      segment_ids=segment_ids, implementation=self.config.implementation,
    )  # fmt: skip
    y = clear_padding(self._after_scan(h, z, x.dtype), segment_ids)
    return y, RGLRUState(conv, hidden, started)

  def step(
    self,
    x: Float[Array, "B M"],
    state: RGLRUState,
    segment_ids: Int[Array, " B"] | None = None,
  ) -> tuple[Float[Array, "B M"], RGLRUState]:
    """Mix one token, in O(1): y `[B, M]` and the new state."""
    check_step(self, x, state, segment_ids)
    x_dtype = x.dtype
    u, z = self._split_input(clear_padding(x, segment_ids))
    u, conv = ops.causal_conv_step(
      u, self.conv_weight[...], self.conv_bias[...], state=state.conv,
      segment_ids=segment_ids,
    )  # fmt: skip
    a, dt, b = self._eq1(u, ~state.started)
    h, hidden = ops.linear_step(
      a, dt * b, state=state.hidden, segment_ids=segment_ids
    )
    y = clear_padding(self._after_scan(h, z, x_dtype), segment_ids)
    valid = True if segment_ids is None else segment_ids > 0
    return y, RGLRUState(conv, hidden, state.started | valid)

  def init_state(
    self, batch_size: int, max_length: int | None = None
  ) -> RGLRUState:
    """The state before any token; its size does not depend on a length."""
    del max_length
    channels = self._channels()
    return RGLRUState(
      jnp.zeros((batch_size, self.config.d_conv - 1, channels), jnp.float32),
      jnp.zeros((batch_size, channels), jnp.float32),
      jnp.zeros((batch_size,), jnp.bool_),
    )

  def recurrence(self, x: Float[Array, "B T M"]) -> Recurrence:
    """Show the layer's own Eq. 1 on `x`: S = (D,), a scalar per channel.

    a = exp(-8 softplus(Λ) r) (polarized), dt = √(1 - a²) of the channel's own
    decay (1 at the first token), b = i u; the readout is
    W_out (h · gelu(z)) + b_out.
    """
    check_mixer("RGLRU.recurrence", x, None, self.d_model)
    u, z, _ = self._before_scan(x, None, None)
    start, _ = _starts(x.shape[:2], None, None)
    a, dt, b = self._eq1(u, start)
    readout = jax.tree_util.Partial(
      _readout, z, self.out_proj[...], self.out_bias[...], x[:0, 0]
    )
    return Recurrence(a, dt, b, jnp.zeros_like(b[:, 0]), readout)

  def _channels(self):
    polarization = self.config.polarization or Polarization()
    return polarization.total(self.config.width or self.d_model)

  def _before_scan(self, x, state, segment_ids):
    """The convolved u, the output gate's z and the convolution's state."""
    u, z = self._split_input(clear_padding(x, segment_ids))
    u, conv = ops.causal_conv(
      u, self.conv_weight[...], self.conv_bias[...],
      initial_state=None if state is None else state.conv,
      segment_ids=segment_ids,
    )  # fmt: skip
    return u, z, conv

  def _split_input(self, x):
    x = x.astype(self.config.dtype)
    y = affine(x, self.in_proj[...], self.in_bias[...])
    u, z = jnp.split(y, 2, -1)
    return u, z

  def _eq1(self, u, start):
    """a, dt and b in float32, from `[..., D]`; `start` has no channels."""
    gates = _block_dense(u, self.gate_proj[...], self.gate_bias[...])
    r, i = jax.nn.sigmoid(gates)
    rate = _RATE * jax.nn.softplus(self.decay_param[...]) * r
    dt = jnp.where(start[..., None], jnp.ones_like(rate), _input_scale(rate))
    a = jnp.exp(-rate)
    if self.config.polarization is not None:
      # The added channels have gates too, so all decays are there by now.
      held = dataclasses.replace(self.config.polarization, placement="replace")
      a = polarize(a, held)
    return a, dt, i * u.astype(jnp.float32)

  def _after_scan(self, h, z, dtype):
    return _project(h, z, self.out_proj[...], self.out_bias[...]).astype(dtype)


def _starts(shape, started, segment_ids):
  """Which tokens begin a segment, `[B, T]`, and whether one has begun."""
  batch, length = shape
  if started is None:
    started = jnp.zeros((batch,), jnp.bool_)
  valid, restart = segment_masks(segment_ids)
  if valid is None:
    first = jnp.arange(length, dtype=jnp.int32)[None] == 0
    return first & ~started[:, None], jnp.ones_like(started)
  first = valid & (jnp.cumsum(valid, 1, dtype=jnp.int32) == 1)
  return restart | (first & ~started[:, None]), started | valid.any(1)


def _block_dense(u, weight, bias):
  """Both gates before their σ, float32 `[2, ..., D]`."""
  blocks, block, _ = weight.shape
  # Float32 in any case, for XLA:CPU has no wide sum for blocks of bfloat16;
  # for such u a TPU is to multiply in one pass, as it does by default.
  exact = u.dtype == jnp.float32
  precision = Precision.HIGHEST if exact else Precision.DEFAULT
  x = u.astype(jnp.float32).reshape(-1, blocks, block)
  y = jnp.einsum("nhk,hkj->nhj", x, weight, precision=precision)
  y = (y + bias).reshape(-1, blocks, 2, block)
  return jnp.moveaxis(y, 2, 0).reshape(2, *u.shape)


def _input_scale(rate):
  """√(1 - a²) for a = exp(-rate), its gradient 0 where the rate underflows."""
  square = -jnp.expm1(-2 * rate)
  positive = square > 0
  root = jnp.sqrt(jnp.where(positive, square, jnp.ones_like(square)))
  return jnp.where(positive, root, jnp.zeros_like(root))


def _project(h, z, out_proj, out_bias):
  y = h * jax.nn.gelu(z.astype(jnp.float32))
  return affine(y.astype(z.dtype), out_proj, out_bias, dtype=jnp.float32)


def _readout(z, out_proj, out_bias, like, h, t):
  """The output at time t from the state h, in the dtype of `like`."""
  z = jax.lax.dynamic_index_in_dim(z, t, 1, keepdims=False)
  return _project(h, z, out_proj, out_bias).astype(like.dtype)


def _decay_param(key, channels, config):
  """Λ, whose exp(-8 softplus(Λ)) is uniform in [decay_min, decay_max]."""
  decay = jax.random.uniform(
    key, (channels,), jnp.float32, config.decay_min, config.decay_max
  )
  rate = -jnp.log(decay) / _RATE
  # The inverse of softplus.
  return rate + jnp.log(-jnp.expm1(-rate))
