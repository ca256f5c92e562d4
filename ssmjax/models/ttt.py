"""TTT-linear: a layer whose state is a model that learns as it reads."""

import dataclasses
from typing import ClassVar, Literal, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import Precision

from ssmjax import ops
from ssmjax.models.doors import check_call, check_step
from ssmjax.models.layers import (
  LayerNorm,
  ShortConv,
  affine,
  clear_padding,
  dense,
  linear_weight,
  normal,
  output_weight,
  rotate_pairs,
)
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

__all__ = ["TTTLinear", "TTTLinearConfig", "TTTLinearState"]

# Of the norms, as in the published code.
_EPSILON = 1e-6


class TTTLinearState(NamedTuple):
  """What a TTT-linear mixer carries from token to token.

  Attributes:
    conv: the last W-1 inputs of the convolutions, `[B, W-1, M]`, float32; None
      where there are none.
    inner: the inner model, and its gradients over the unfinished mini-batch.
  """

  conv: Float[Array, "B V M"] | None
  inner: ops.TTTState


@dataclasses.dataclass(frozen=True)
class TTTLinearConfig:
  """Sizes and choices of a `TTTLinear` mixer.

  Attributes:
    num_heads: H, a divisor of d_model; P = d_model / H is even.
    mini_batch: tokens whose gradients are taken at the same inner model.
    base_rate: η of the inner steps, before the learned σ of each token.
    d_conv: W, width of the short convolutions that make queries and keys of
      one projection, as in the paper's Mamba backbone (4); 0 for a projection
      of each, as in its Transformer backbone.
    output_gate: gate the normalised output by gelu(W_z x), as in the Mamba
      backbone.
    rope_base: θ of the rotation of queries and keys by their place in the
      mini-batch.
    init: as in `MambaConfig`.
    dtype: dtype of activations; parameters, rates and states are float32.
    implementation: of `ttt_linear`; None chooses.
  """

  op: ClassVar[str | None] = "ttt_linear"
  polarizes: ClassVar[str | None] = None

  num_heads: Size = 4
  mini_batch: Size = 16
  base_rate: Positive = 1.0
  d_conv: Count = 0
  output_gate: bool = False
  rope_base: Positive = 10000.0
  init: Literal["mamba", "authors"] = "mamba"
  dtype: FloatingDType = jnp.float32
  implementation: Literal["reference", "chunked"] | None = None

  def __post_init__(self):
    check_fields(self)

  def build(self, d_model: int, n_layers: int, rngs: nnx.Rngs) -> "TTTLinear":
    """Make the mixer for a model of this width and depth."""
    return TTTLinear(d_model, self, n_layers=n_layers, rngs=rngs)


class TTTLinear(Module):
  """TTT-linear: the state is a linear model, its update a gradient step.

  q, k, v = R_i W_q x, R_i W_k x, W_v x,  R_i the rotation by the place i in
  the mini-batch;  η_t = base σ(W_η x + b_η) / P
  f(x; W, b) = x + LN(xW + b),  ℓ_t = ½‖f(k; W, b) - v‖²
  (W_t, b_t) = (W, b) - τ_i Σ_{j≤t} η_j ∇ℓ_j(W, b),  τ_i = max(1/(1+i) + δ_i, 0)
  y = W_o LN(f(q; W_t, b_t))  (times gelu(W_z x) with a gate)

  Each head learns from its own W_0, b_0, one mini-batch after the other: the
  gradients of a mini-batch, and the sum over its tokens so far, are taken at
  the W, b that the one before left.

  There is no polarization: the gradient is nonlinear in the state, which so
  has no decay at all.

  Mini-batches begin with each document and do not count padding; the state
  holds the gradients of an unfinished one, so that a document may be cut
  anywhere (the published code takes up an unfinished one token by token only).

  Source: Sun et al. 2024 (arXiv 2407.04620), §2 and App. C.
  """

  def __init__(
    self,
    d_model: int,
    config: TTTLinearConfig | None = None,
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
      ValueError: the width does not divide into heads of even width.
    """
    config = config or TTTLinearConfig()
    heads = config.num_heads
    if d_model % (2 * heads):
      raise ValueError(
        f"TTTLinear: d_model is {d_model}, expected a multiple of twice"
        f" num_heads={heads}: rotations turn pairs of channels."
      )
    self.config = config
    self.d_model = d_model
    width = d_model // heads
    keys = jax.random.split(rngs.params(), 6)
    parts = (2 if config.d_conv else 3) + config.output_gate
    self.in_proj = nnx.Param(
      linear_weight(keys[0], d_model, parts * d_model, config.init)
    )
    conv = lambda key: (
      ShortConv(d_model, config.d_conv, key) if config.d_conv else None
    )
    self.query_conv, self.key_conv = conv(keys[1]), conv(keys[2])
    zeros = lambda *shape: nnx.Param(
      jnp.zeros(shape, jnp.float32), weight_decay=False
    )
    self.rate_proj = nnx.Param(normal(keys[3], (d_model, heads)))
    self.rate_bias = zeros(heads)
    self.token_scale = zeros(config.mini_batch)
    self.inner_weight = nnx.Param(normal(keys[4], (heads, width, width)))
    self.inner_bias = zeros(heads, width)
    self.inner_norm = LayerNorm((heads, width), epsilon=_EPSILON)
    self.norm = LayerNorm(d_model, epsilon=_EPSILON)
    self.out_proj = nnx.Param(
      output_weight(keys[5], d_model, d_model, config.init, n_layers)
    )

  def __call__(
    self,
    x: Float[Array, "B T M"],
    state: TTTLinearState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T M"], TTTLinearState]:
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
    inner = None if state is None else state.inner
    position = ops.ttt_positions(
      self.config.mini_batch, (x.shape[0], x.shape[1]),
      None if inner is None else inner.position, segment_ids,
    )  # fmt: skip
    q, k, v, z = self._split_input(x)
    conv = None
    if self.query_conv and self.key_conv:
      conv = None if state is None else state.conv
      k, _ = self.key_conv(q, conv, segment_ids)
      q, conv = self.query_conv(q, conv, segment_ids)
    q, k, v = self._heads(q, k, v, position)
    y, inner = ops.ttt_linear(
      q, k, v, self._rate(x), self._learner(),
      initial_state=inner, segment_ids=segment_ids,
      implementation=self.config.implementation,
    )  # fmt: skip
    y = clear_padding(self._output(y, z), segment_ids)
    return y.astype(x_dtype), TTTLinearState(conv, inner)

  def step(
    self,
    x: Float[Array, "B M"],
    state: TTTLinearState,
    segment_ids: Int[Array, " B"] | None = None,
  ) -> tuple[Float[Array, "B M"], TTTLinearState]:
    """Mix one token, in O(1): y `[B, M]` and the new state."""
    check_step(self, x, state, segment_ids)
    x_dtype, x = x.dtype, clear_padding(x, segment_ids)
    q, k, v, z = self._split_input(x)
    conv = state.conv
    if conv is not None and self.query_conv and self.key_conv:
      k, _ = self.key_conv.step(q, conv, segment_ids)
      q, conv = self.query_conv.step(q, conv, segment_ids)
    q, k, v = self._heads(q, k, v, state.inner.position)
    y, inner = ops.ttt_linear_step(
      q, k, v, self._rate(x), self._learner(), state=state.inner,
      segment_ids=segment_ids,
    )  # fmt: skip
    y = clear_padding(self._output(y, z), segment_ids)
    return y.astype(x_dtype), TTTLinearState(conv, inner)

  def init_state(
    self, batch_size: int, max_length: int | None = None
  ) -> TTTLinearState:
    """The state before any token; its size does not depend on a length."""
    del max_length
    heads = self.config.num_heads
    width = self.d_model // heads
    zeros = lambda *shape: jnp.zeros((batch_size, *shape), jnp.float32)
    inner = ops.TTTState(
      zeros(heads, width, width), zeros(heads, width),
      zeros(heads, width, width), zeros(heads, width),
      jnp.zeros((batch_size,), jnp.int32),
    )  # fmt: skip
    conv = None
    if self.config.d_conv:
      conv = zeros(self.config.d_conv - 1, self.d_model)
    return TTTLinearState(conv, inner)

  def recurrence(self, x: Float[Array, "B T M"]) -> NoReturn:
    """Raise NotImplementedError: a gradient step has no diagonal Eq. 1."""
    raise NotImplementedError(
      "TTTLinear: the state's update is the gradient of a loss behind a norm,"
      " nonlinear in the state, so it has no diagonal Eq. 1."
    )

  def _split_input(self, x):
    """q, k, v and the output gate or None; k is q before the convolutions."""
    x = dense(x.astype(self.config.dtype), self.in_proj[...])
    parts = jnp.split(x, x.shape[-1] // self.d_model, -1)
    z = parts.pop() if self.config.output_gate else None
    return parts[0], parts[-2], parts[-1], z

  def _heads(self, q, k, v, position):
    """Heads of q, k and v, q and k rotated by their place, `[B, (T)]`."""
    heads = self.config.num_heads
    q, k, v = (x.reshape(*x.shape[:-1], heads, -1) for x in (q, k, v))
    pairs = q.shape[-1] // 2
    power = jnp.arange(pairs, dtype=jnp.float32) / pairs
    angle = position[..., None, None] / self.config.rope_base**power
    q, k = (rotate_pairs(part, angle).astype(part.dtype) for part in (q, k))
    return q, k, v

  def _rate(self, x):
    rate = affine(
      x.astype(jnp.float32), self.rate_proj[...], self.rate_bias[...],
      precision=Precision.HIGHEST,
    )  # fmt: skip
    rate = jax.nn.sigmoid(rate)
    return (
      self.config.base_rate * rate / (self.d_model // self.config.num_heads)
    )

  def _learner(self):
    places = jnp.arange(1, self.config.mini_batch + 1, dtype=jnp.float32)
    return ops.TTTLearner(
      self.inner_weight[...], self.inner_bias[...],
      self.inner_norm.scale[...], self.inner_norm.bias[...],
      jnp.maximum(1 / places + self.token_scale[...], 0),
    )  # fmt: skip

  def _output(self, y, z):
    y = self.norm(y.reshape(*y.shape[:-2], -1))
    if z is not None:
      gate = jax.nn.gelu(z.astype(jnp.float32))
      y = (y.astype(jnp.float32) * gate).astype(y.dtype)
    return dense(y, self.out_proj[...])
