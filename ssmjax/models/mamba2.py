"""Mamba-2: heads with one decay each, run as matrix products."""

import dataclasses
import math
from typing import Annotated, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ssmjax import ops
from ssmjax.models.doors import check_call, check_mixer, check_step
from ssmjax.models.layers import (
  ShortConv,
  check_exact,
  clear_padding,
  dense,
  linear_weight,
  output_weight,
)
from ssmjax.models.mamba import check_dt_range, log_uniform_dt_bias
from ssmjax.models.module import Module
from ssmjax.polarization import polarize
from ssmjax.types import (
  Array,
  Float,
  FloatingDType,
  Int,
  Polarization,
  Positive,
  Range,
  Recurrence,
  Size,
  check_fields,
)

__all__ = ["Mamba2", "Mamba2Config", "Mamba2State"]


class Mamba2State(NamedTuple):
  """What a Mamba-2 mixer carries from token to token.

  Attributes:
    conv: the last W-1 inputs of the convolution, `[B, W-1, H·P + 2·G·N]`,
      float32.
    ssm: the heads' states, `[B, H, P, N]`, float32.
  """

  conv: Float[Array, "B V D"]
  ssm: Float[Array, "B H P N"]


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
  """Sizes and choices of a `Mamba2` mixer.

  Attributes:
    d_state: N, width of B and C.
    d_conv: W, width of the short convolution.
    expand: inner width over d_model.
    head_dim: P, channels of a head.
    d_ssm: channels of the learned heads, a multiple of head_dim (with
      `placement="replace"`, of all heads); what is left of the inner width is
      a gated MLP beside them. None for all of the inner width.
    n_groups: G, groups of heads, which share B, C and the norm's mean square;
      a divisor of the number H of all heads.
    A_min: smallest -A at initialisation.
    A_max: largest -A at initialisation; -A is uniform between them.
    dt_min: smallest Δ at initialisation.
    dt_max: largest Δ at initialisation; Δ is log-uniform between them.
    dt_least: Δ is never less, at any time.
    dt_greatest: Δ is never greater; None for no such limit.
    norm: RMS norm of y · silu(z) (`"after_gate"`, as published), of y alone
      before it is gated (`"before_gate"`), or `"none"`.
    norm_epsilon: of that norm.
    skip_per_channel: D has a number for each channel, not for each head.
    polarization: heads of decay exactly 1 and 0; None for none.
    init: as in `MambaConfig`.
    dtype: dtype of activations; parameters and states are float32.
    implementation: of `ssmjax.ops.ssd`; None chooses.
  """

  op: ClassVar[str | None] = "ssd"
  polarizes: ClassVar[str | None] = "heads"

  d_state: Size = 128
  d_conv: Size = 4
  expand: Size = 2
  head_dim: Size = 64
  d_ssm: Size | None = None
  n_groups: Size = 1
  A_min: Positive = 1.0
  A_max: Positive = 16.0
  dt_min: Positive = 1e-3
  dt_max: Positive = 1e-1
  dt_least: Annotated[float, Range(least=0)] = 0.0
  dt_greatest: Positive | None = None
  norm: Literal["after_gate", "before_gate", "none"] = "after_gate"
  norm_epsilon: Positive = 1e-5
  skip_per_channel: bool = False
  polarization: Polarization | None = None
  init: Literal["mamba", "authors"] = "mamba"
  dtype: FloatingDType = jnp.float32
  implementation: Literal["reference", "chunked"] | None = None

  def __post_init__(self):
    check_fields(self)
    check_dt_range(self)
    if not 0 < self.A_min <= self.A_max:
      raise ValueError(
        f"Mamba2Config: A_min is {self.A_min} and A_max {self.A_max}, expected"
        " 0 < A_min <= A_max: A is minus a number between them."
      )
    least, greatest = self.dt_limits
    if not 0 <= least <= greatest:
      raise ValueError(
        f"Mamba2Config: dt_least is {least} and dt_greatest {greatest},"
        " expected 0 <= dt_least <= dt_greatest."
      )
    check_exact("Mamba2Config", self.polarization)

  @property
  def dt_limits(self) -> tuple[float, float]:
    """The least and the greatest Δ."""
    greatest = math.inf if self.dt_greatest is None else self.dt_greatest
    return self.dt_least, greatest

  def build(self, d_model: int, n_layers: int, rngs: nnx.Rngs) -> "Mamba2":
    """Make the mixer for a model of this width and depth."""
    return Mamba2(d_model, self, n_layers=n_layers, rngs=rngs)


class Mamba2(Module):
  """The Mamba-2 mixer.

  m, n, z, (x, B, C), δ = split(W_in input);  x, B, C = silu(conv(x, B, C))
  Δ = clip(softplus(δ + b_Δ), dt_least, dt_greatest)
  h_t = exp(ΔA) h_{t-1} + Δ x Bᵀ
  y = W_out [silu(m) n, norm((h C + D x) · silu(z))]

  for each head apart, with m and n only where `d_ssm` leaves them room.

  Polarization holds the decay of some heads at 1 (they sum Δ x Bᵀ for ever)
  and of others at 0 (they gate the present token). A head that is added has
  x, z, Δ, D and a place in W_out of its own, and shares B and C with its group.
  Groups divide all heads in their order, so that with G > 1 added heads move
  the borders between them. The norm's mean square is that of all heads of a
  group, polarized ones included: where a one-head's sum grows, what the others
  of its group write becomes smaller.

  Source: Dao & Gu 2024 (arXiv 2405.21060), §7; Wang et al. 2025 (arXiv
  2501.00658), §6.
  """

  def __init__(
    self,
    d_model: int,
    config: Mamba2Config | None = None,
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
      ValueError: channels that do not divide into heads, heads that do not
        divide into groups, or more channels of heads than there are.
    """
    config = config or Mamba2Config()
    self.config = config
    self.d_model = d_model
    inner = config.expand * d_model
    learned = inner if config.d_ssm is None else config.d_ssm
    if learned % config.head_dim or learned > inner:
      raise ValueError(
        f"Mamba2: the heads have {learned} channels together, expected a"
        f" multiple of head_dim={config.head_dim}, no more than the inner"
        f" width of {inner}."
      )
    heads = self._heads()
    if heads % config.n_groups:
      raise ValueError(
        f"Mamba2: there are {heads} heads, polarized ones included, expected a"
        f" multiple of n_groups={config.n_groups}."
      )
    width, mlp = heads * config.head_dim, inner - learned
    shared = 2 * config.n_groups * config.d_state
    keys = jax.random.split(rngs.params(), 5)
    own = config.init == "mamba"
    # Their order: m, n, z, x, B, C, δ.
    size = 2 * mlp + 2 * width + shared + heads
    self.in_proj = nnx.Param(linear_weight(keys[0], d_model, size, config.init))
    self.conv = ShortConv(width + shared, config.d_conv, keys[1])
    self.dt_bias = nnx.Param(
      log_uniform_dt_bias(keys[2], heads, config)
      if own
      else jnp.zeros((heads,), jnp.float32),
      weight_decay=False,
    )
    A = jax.random.uniform(
      keys[3], (learned // config.head_dim,), jnp.float32, config.A_min,
      config.A_max,
    )  # fmt: skip
    self.A_log = nnx.Param(jnp.log(A), weight_decay=False)
    skips = width if config.skip_per_channel else heads
    self.D = nnx.Param(jnp.ones((skips,), jnp.float32), weight_decay=False)
    self.norm_scale = (
      None
      if config.norm == "none"
      else nnx.Param(jnp.ones((width,), jnp.float32), weight_decay=False)
    )
    self.out_proj = nnx.Param(
      output_weight(keys[4], mlp + width, d_model, config.init, n_layers)
    )

  def __call__(
    self,
    x: Float[Array, "B T M"],
    state: Mamba2State | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T M"], Mamba2State]:
    """Mix over time.

    Args:
      x: `[B, T, M]`.
      state: to go on from; None for the beginning.
      segment_ids: `[B, T]`, 1-based, 0 for padding.

    Returns:
      y `[B, T, M]` of x's dtype (0 at padding) and the state after it.
    """
    check_call(self, x, state, segment_ids)
    mlp, z, u, delta = self._split_input(clear_padding(x, segment_ids))
    u, conv = self.conv(u, None if state is None else state.conv, segment_ids)
    arguments, options = self._select(u, z, delta)
    y, ssm = ops.ssd(
      *arguments, **options,
      initial_state=None if state is None else state.ssm,
      segment_ids=segment_ids, implementation=self.config.implementation,
    )  # fmt: skip
    return self._project(mlp, y, z, x.dtype), Mamba2State(conv, ssm)

  def step(
    self,
    x: Float[Array, "B M"],
    state: Mamba2State,
    segment_ids: Int[Array, " B"] | None = None,
  ) -> tuple[Float[Array, "B M"], Mamba2State]:
    """Mix one token, in O(1): y `[B, M]` and the new state."""
    check_step(self, x, state, segment_ids)
    mlp, z, u, delta = self._split_input(clear_padding(x, segment_ids))
    u, conv = self.conv.step(u, state.conv, segment_ids)
    arguments, options = self._select(u, z, delta)
    y, ssm = ops.ssd_step(
      *arguments, **options, state=state.ssm, segment_ids=segment_ids
    )
    return self._project(mlp, y, z, x.dtype), Mamba2State(conv, ssm)

  def init_state(
    self, batch_size: int, max_length: int | None = None
  ) -> Mamba2State:
    """The state before any token; its size does not depend on a length."""
    del max_length
    heads, config = self._heads(), self.config
    shape = (batch_size, heads, config.head_dim, config.d_state)
    return Mamba2State(
      self.conv.init_state(batch_size), jnp.zeros(shape, jnp.float32)
    )

  def recurrence(self, x: Float[Array, "B T M"]) -> Recurrence:
    """Show the layer's own Eq. 1 on `x`: S = (H, P, N), one Δ per head.

    a = exp(ΔA) (polarized), dt = Δ, b = x Bᵀ; the readout is
    W_out [silu(m) n, norm((h C + D x) · silu(z))].
    """
    check_mixer("Mamba2.recurrence", x, None, self.d_model)
    mlp, z, u, delta = self._split_input(x)
    (u, delta, A, B, C, _), options = self._select(self.conv(u)[0], z, delta)
    dt = jax.nn.softplus(delta.astype(jnp.float32) + options["dt_bias"])
    dt = jnp.clip(dt, *self.config.dt_limits)
    polarization = self.config.polarization or Polarization()
    learned = dt
    if polarization.placement == "add":
      end = dt.shape[-1] - polarization.zeros
      learned = dt[..., polarization.ones : end]
    a = polarize(jnp.exp(learned * A), polarization)
    B = _to_heads(B.astype(jnp.float32), u.shape[-2])
    b = u.astype(jnp.float32)[..., None] * B[..., None, :]
    a = jnp.broadcast_to(a[..., None, None], b.shape)
    readout = jax.tree_util.Partial(_readout, self, mlp, z, u, C, x[:0, 0])
    return Recurrence(
      a, dt[..., None, None], b, jnp.zeros_like(b[:, 0]), readout
    )

  def _heads(self):
    config = self.config
    width = config.d_ssm or config.expand * self.d_model
    polarization = config.polarization or Polarization()
    return polarization.total(width // config.head_dim)

  def _split_input(self, x):
    """The MLP's output, the gate, what is to be convolved, δ."""
    config, heads = self.config, self._heads()
    width = heads * config.head_dim
    shared = 2 * config.n_groups * config.d_state
    projected = dense(x.astype(config.dtype), self.in_proj[...])
    mlp = (projected.shape[-1] - 2 * width - shared - heads) // 2
    ends = np.cumsum([mlp, mlp, width, width + shared])
    m, n, z, u, delta = jnp.split(projected, ends, -1)
    return jax.nn.silu(m) * n, z, u, delta

  def _select(self, u, z, delta):
    """The arguments of `ops.ssd` after the convolution."""
    config = self.config
    width = self._heads() * config.head_dim
    shared = config.n_groups * config.d_state
    u, B, C = jnp.split(jax.nn.silu(u), [width, width + shared], -1)
    by_head = lambda v: v.reshape(*v.shape[:-1], -1, config.head_dim)
    by_group = lambda v: v.reshape(*v.shape[:-1], config.n_groups, -1)
    A, D = -jnp.exp(self.A_log[...]), self._skips()
    arguments = (by_head(u), delta, A, by_group(B), by_group(C), D)
    return arguments, {
      "z": by_head(z) if config.norm == "none" else None,
      "dt_bias": self.dt_bias[...],
      "dt_softplus": True,
      "dt_limits": config.dt_limits,
      "polarization": config.polarization,
    }

  def _skips(self):
    D = self.D[...]
    per_channel = self.config.skip_per_channel
    return D.reshape(-1, self.config.head_dim) if per_channel else D

  def _project(self, mlp, y, z, dtype):
    """Norm and gate, W_out."""
    y = y.reshape(z.shape)
    if self.config.norm != "none":
      y = self._normed(y.astype(jnp.float32), z.astype(jnp.float32))
    y = jnp.concatenate([mlp, y.astype(z.dtype)], -1)
    return dense(y, self.out_proj[...]).astype(dtype)

  def _normed(self, y, z):
    gate = jax.nn.silu(z)
    if self.config.norm == "after_gate":
      y = y * gate
    groups = y.reshape(*y.shape[:-1], self.config.n_groups, -1)
    mean_square = jnp.mean(jnp.square(groups), -1, keepdims=True)
    groups = groups * jax.lax.rsqrt(mean_square + self.config.norm_epsilon)
    y = groups.reshape(y.shape) * self.norm_scale[...]
    return y if self.config.norm == "after_gate" else y * gate


def _to_heads(v, heads):
  """B or C of each head, `[..., H, N]`, of those of its group."""
  return jnp.repeat(v, heads // v.shape[-2], -2)


def _readout(model, mlp, z, u, C, like, h, t):
  """The output at time t from the state h, in the dtype of `like`."""
  mlp, z, u, C = (
    jax.lax.dynamic_index_in_dim(v, t, 1, keepdims=False)
    for v in (mlp, z, u, C)
  )
  C = _to_heads(C.astype(jnp.float32), h.shape[1])
  D = model._skips()
  y = (h * C[..., None, :]).sum(-1)
  y = y + D.reshape(len(D), -1) * u.astype(jnp.float32)
  if model.config.norm == "none":
    y = y * jax.nn.silu(z.astype(jnp.float32)).reshape(y.shape)
  return model._project(mlp, y.astype(z.dtype), z, like.dtype)
