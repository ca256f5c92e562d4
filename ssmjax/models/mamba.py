"""Mamba: a selective scan behind a short convolution and a gate."""

import dataclasses
import math
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import Precision

from ssmjax import ops
from ssmjax.models.doors import check_call, check_mixer, check_step
from ssmjax.models.layers import clear_padding, dense, normal, torch_uniform
from ssmjax.models.module import Module
from ssmjax.polarization import selective_decay
from ssmjax.types import (
  Array,
  Float,
  FloatingDType,
  Int,
  Polarization,
  Positive,
  Recurrence,
  Size,
  check_fields,
)

__all__ = [
  "Mamba",
  "MambaConfig",
  "MambaState",
  "check_dt_range",
  "log_uniform_dt_bias",
]


class MambaState(NamedTuple):
  """What a Mamba mixer carries from token to token.

  Attributes:
    conv: the last W-1 inputs of the convolution, `[B, W-1, D]`, float32.
    ssm: the state of the scan, `[B, D, N]`, float32.
  """

  conv: Float[Array, "B V D"]
  ssm: Float[Array, "B D N"]


@dataclasses.dataclass(frozen=True)
class MambaConfig:
  """Sizes and choices of a `Mamba` mixer.

  Attributes:
    d_state: N, learned states per channel (with `placement="replace"`, all
      states).
    d_conv: W, width of the short convolution.
    expand: D / d_model.
    dt_rank: rank of the map to Δ; None for ⌈d_model / 16⌉.
    dt_min: smallest Δ at initialisation.
    dt_max: largest Δ at initialisation; Δ is log-uniform between them.
    norm_epsilon: of weightless RMS norms of δ, B and C, as FalconMamba has
      them; None for no norms, as Mamba.
    polarization: channels of decay exactly 1 and 0; None for none.
    init: `"mamba"` is Mamba's own initialisation; `"authors"` is what the
      released code of Wang et al. 2025 does: every linear weight N(0, 0.02²)
      and every linear bias zero, dt_proj's too, so that Δ ≈ softplus(0) =
      0.69 in place of [dt_min, dt_max].
    dtype: dtype of activations; parameters and states are float32.
    implementation: of the selective scan; None chooses.
  """

  op: ClassVar[str | None] = "selective_scan"
  polarizes: ClassVar[str | None] = "channels"

  d_state: Size = 16
  d_conv: Size = 4
  expand: Size = 2
  dt_rank: Size | None = None
  dt_min: Positive = 1e-3
  dt_max: Positive = 1e-1
  norm_epsilon: Positive | None = None
  polarization: Polarization | None = None
  init: Literal["mamba", "authors"] = "mamba"
  dtype: FloatingDType = jnp.float32
  implementation: (
    Literal["reference", "associative", "chunked", "pallas"] | None
  ) = None

  def __post_init__(self):
    check_fields(self)
    check_dt_range(self)

  def build(self, d_model: int, n_layers: int, rngs: nnx.Rngs) -> "Mamba":
    """Make the mixer for a model of this width and depth."""
    return Mamba(d_model, self, n_layers=n_layers, rngs=rngs)


class Mamba(Module):
  """The Mamba mixer.

  x, z = split(W_in input);  u = silu(conv(x));  δ, B, C = split(W_x u)
  Δ = softplus(W_Δ δ + b_Δ);  h_t = exp(ΔA) h_{t-1} + Δ B u
  y = W_out ((C·h + D u) · silu(z))

  With `norm_epsilon` δ, B and C are divided by their root mean square. (The
  fused training kernel of transformers norms W_Δ δ instead of δ, and passes
  no gradient through the norms: unlike its own inference.)

  Polarization holds the decay of some channels at 1 (they sum Δ B u for
  ever) and of others at 0 (they gate the present token).

  Source: Gu & Dao 2023 (arXiv 2312.00752); Wang et al. 2025, §6 and App.
  E.5.1; the norms: Zuo et al. 2024 (FalconMamba, arXiv 2410.05355), §2.
  """

  def __init__(
    self,
    d_model: int,
    config: MambaConfig | None = None,
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
    config = config or MambaConfig()
    self.config = config
    self.d_model = d_model
    inner = config.expand * d_model
    rank = config.dt_rank or math.ceil(d_model / 16)
    polarization = config.polarization or Polarization()
    states = polarization.total(config.d_state)
    keys = jax.random.split(rngs.params(), 8)
    own = config.init == "mamba"

    def linear(key, n_in, n_out):
      if own:
        return torch_uniform(key, (n_in, n_out), n_in)
      return normal(key, (n_in, n_out))

    self.in_proj = nnx.Param(linear(keys[0], d_model, 2 * inner))
    self.conv_weight = nnx.Param(
      torch_uniform(keys[1], (config.d_conv, inner), config.d_conv)
    )
    self.conv_bias = nnx.Param(
      torch_uniform(keys[2], (inner,), config.d_conv), weight_decay=False
    )
    self.x_proj = nnx.Param(linear(keys[3], inner, rank + 2 * states))
    self.dt_proj = nnx.Param(linear(keys[4], rank, inner))
    self.dt_bias = nnx.Param(
      log_uniform_dt_bias(keys[5], inner, config)
      if own
      else jnp.zeros((inner,), jnp.float32),
      weight_decay=False,
    )
    # S4D-real: A_dn = -n (Gu et al. 2022, arXiv 2206.11893).
    levels = jnp.arange(1, config.d_state + 1, dtype=jnp.float32)
    self.A_log = nnx.Param(
      jnp.broadcast_to(jnp.log(levels)[None], (inner, config.d_state)) + 0.0,
      weight_decay=False,
    )
    self.D = nnx.Param(jnp.ones((inner,), jnp.float32), weight_decay=False)
    out_proj = linear(keys[6], inner, d_model)
    # One residual branch a layer (authors: two, as in GPT-2).
    out_proj = out_proj / math.sqrt(n_layers if own else 2 * n_layers)
    self.out_proj = nnx.Param(out_proj)

  def __call__(
    self,
    x: Float[Array, "B T M"],
    state: MambaState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T M"], MambaState]:
    """Mix over time.

    Args:
      x: `[B, T, M]`.
      state: to go on from; None for the beginning.
      segment_ids: `[B, T]`, 1-based, 0 for padding.

    Returns:
      y `[B, T, M]` of x's dtype (0 at padding) and the state after it.
    """
    check_call(self, x, state, segment_ids)
    u, z, delta, B, C, conv_state = self._before_scan(x, state, segment_ids)
    y, ssm_state = ops.selective_scan(
      u, delta, self._A(), B, C, self.D[...], z=z,
      delta_bias=self.dt_bias[...], delta_softplus=True,
      polarization=self.config.polarization,
      initial_state=None if state is None else state.ssm,
      segment_ids=segment_ids, implementation=self.config.implementation,
    )  # fmt: skip
    y = dense(y, self.out_proj[...]).astype(x.dtype)
    return y, MambaState(conv_state, ssm_state)

  def step(
    self,
    x: Float[Array, "B M"],
    state: MambaState,
    segment_ids: Int[Array, " B"] | None = None,
  ) -> tuple[Float[Array, "B M"], MambaState]:
    """Mix one token, in O(1): y `[B, M]` and the new state."""
    check_step(self, x, state, segment_ids)
    x_dtype = x.dtype
    u, z = self._split_input(clear_padding(x, segment_ids))
    u, conv_state = ops.causal_conv_step(
      u, self.conv_weight[...], self.conv_bias[...], state=state.conv,
      segment_ids=segment_ids,
    )  # fmt: skip
    u = jax.nn.silu(u)
    delta, B, C = self._select(u)
    y, ssm_state = ops.selective_step(
      u, delta, self._A(), B, C, self.D[...], state=state.ssm, z=z,
      delta_bias=self.dt_bias[...], delta_softplus=True,
      polarization=self.config.polarization, segment_ids=segment_ids,
    )  # fmt: skip
    y = dense(y, self.out_proj[...]).astype(x_dtype)
    return y, MambaState(conv_state, ssm_state)

  def init_state(
    self, batch_size: int, max_length: int | None = None
  ) -> MambaState:
    """The state before any token; its size does not depend on a length."""
    del max_length
    inner = self.config.expand * self.d_model
    polarization = self.config.polarization or Polarization()
    states = polarization.total(self.config.d_state)
    return MambaState(
      jnp.zeros((batch_size, self.config.d_conv - 1, inner), jnp.float32),
      jnp.zeros((batch_size, inner, states), jnp.float32),
    )

  def recurrence(self, x: Float[Array, "B T M"]) -> Recurrence:
    """Show the layer's own Eq. 1 on `x`: S = (D, N), one Δ per channel.

    a = exp(ΔA) (polarized), dt = Δ, b = B u; the readout is
    W_out ((C·h + D u) · silu(z)).
    """
    check_mixer("Mamba.recurrence", x, None, self.d_model)
    u, z, delta, B, C, _ = self._before_scan(x, None, None)
    dt = jax.nn.softplus(delta.astype(jnp.float32) + self.dt_bias[...])
    a = selective_decay(dt, self._A(), self.config.polarization)
    b = u[..., None].astype(jnp.float32) * B[:, :, None].astype(jnp.float32)

    readout = jax.tree_util.Partial(
      _readout, C, u, self.D[...], z, self.out_proj[...], x[:0, 0]
    )
    initial_state = jnp.zeros((a.shape[0], *a.shape[2:]), jnp.float32)
    return Recurrence(a, dt[..., None], b, initial_state, readout)

  def _before_scan(self, x, state, segment_ids):
    """u, z, Δ (before bias and softplus), B, C and the convolution's state."""
    u, z = self._split_input(clear_padding(x, segment_ids))
    u, conv_state = ops.causal_conv(
      u, self.conv_weight[...], self.conv_bias[...],
      initial_state=None if state is None else state.conv,
      segment_ids=segment_ids,
    )  # fmt: skip
    u = jax.nn.silu(u)
    return u, z, *self._select(u), conv_state

  def _split_input(self, x):
    x = x.astype(self.config.dtype)
    u, z = jnp.split(dense(x, self.in_proj[...]), 2, -1)
    return u, z

  def _select(self, u):
    """The input-dependent Δ (before bias and softplus), B and C."""
    rank = self.dt_proj.shape[0]
    x = dense(u, self.x_proj[...])
    parts = jnp.split(x, [rank, (rank + x.shape[-1]) // 2], -1)
    delta, B, C = map(self._normed, parts)
    dt = dense(delta, self.dt_proj[...], precision=Precision.HIGHEST)
    return dt, B, C

  def _normed(self, x):
    epsilon = self.config.norm_epsilon
    if epsilon is None:
      return x
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), -1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + epsilon)).astype(x.dtype)

  def _A(self):
    return -jnp.exp(self.A_log[...])


def check_dt_range(config) -> None:
  """Raise ValueError unless a configuration's Δ is drawn from some range."""
  if not 0 < config.dt_min <= config.dt_max:
    raise ValueError(
      f"{type(config).__name__}: dt_min is {config.dt_min} and dt_max"
      f" {config.dt_max}, expected 0 < dt_min <= dt_max."
    )


def log_uniform_dt_bias(key, size: int, config) -> Array:
  """Draw the bias whose softplus is log-uniform in [dt_min, dt_max]."""
  low, high = math.log(config.dt_min), math.log(config.dt_max)
  dt = jnp.exp(jax.random.uniform(key, (size,), jnp.float32, low, high))
  return dt + jnp.log(-jnp.expm1(-dt))


def _readout(C, u, D, z, out_proj, like, h, t):
  """The output at time t from the state h, in the dtype of `like`."""
  at = lambda v: jax.lax.dynamic_index_in_dim(v, t, 1, keepdims=False)
  y = (at(C).astype(jnp.float32)[:, None] * h).sum(-1)
  y = y + D * at(u).astype(jnp.float32)
  y = (y * jax.nn.silu(at(z).astype(jnp.float32))).astype(z.dtype)
  return dense(y, out_proj).astype(like.dtype)
