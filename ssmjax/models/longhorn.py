"""Longhorn: the decay and the step that solve online regression."""

import dataclasses
import math
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import Precision

from ssmjax import ops
from ssmjax.models.doors import check_call, check_mixer, check_step
from ssmjax.models.layers import (
  ShortConv,
  affine,
  check_exact,
  clear_padding,
  dense,
  linear_weight,
  output_weight,
)
from ssmjax.models.module import Module
from ssmjax.ops.segments import segment_masks
from ssmjax.ops.varying import match_varying
from ssmjax.polarization import polarize
from ssmjax.types import (
  Array,
  Float,
  FloatingDType,
  Int,
  Polarization,
  Recurrence,
  Size,
  check_fields,
)

__all__ = ["Longhorn", "LonghornConfig", "LonghornState"]

# Tokens whose decays and states are in memory at once.
_CHUNK = 64


class LonghornState(NamedTuple):
  """What a Longhorn mixer carries from token to token.

  Attributes:
    conv: the last W-1 inputs of the convolution, `[B, W-1, D]`, float32.
    ssm: the state of the recurrence, `[B, D, N]`, float32.
  """

  conv: Float[Array, "B V D"]
  ssm: Float[Array, "B D N"]


@dataclasses.dataclass(frozen=True)
class LonghornConfig:
  """Sizes and choices of a `Longhorn` mixer.

  Attributes:
    d_state: N, width of k and q (with `placement="replace"`, polarized
      channels included).
    d_conv: W, width of the short convolution.
    expand: D / d_model.
    dt_rank: rank of the map to β; None for ⌈d_model / 16⌉.
    polarization: channels of decay exactly 1 and 0; None for none.
    init: as in `MambaConfig`.
    dtype: dtype of activations; parameters, decays and states are float32.
    implementation: of the linear scan; None chooses.
  """

  op: ClassVar[str | None] = "linear_scan"
  polarizes: ClassVar[str | None] = "channels"

  d_state: Size = 16
  d_conv: Size = 4
  expand: Size = 2
  dt_rank: Size | None = None
  polarization: Polarization | None = None
  init: Literal["mamba", "authors"] = "mamba"
  dtype: FloatingDType = jnp.float32
  implementation: (
    Literal["reference", "associative", "chunked", "pallas"] | None
  ) = None

  def __post_init__(self):
    check_fields(self)
    check_exact("LonghornConfig", self.polarization)

  def build(self, d_model: int, n_layers: int, rngs: nnx.Rngs) -> "Longhorn":
    """Make the mixer for a model of this width and depth."""
    return Longhorn(d_model, self, n_layers=n_layers, rngs=rngs)


class Longhorn(Module):
  """The Longhorn mixer: Mamba's block with another recurrence.

  u, z = split(W_in input);  u = silu(conv(u));  δ, k, q = split(W_x u)
  β = σ(W_β δ + b_β);  Δ = β / (1 + β kᵀk)
  h_t = (1 - Δ k²) h_{t-1} + Δ u k;  y = W_out ((q·h + D u) · silu(z))

  in every channel: the state moves so that kᵀh comes close to u, and 1 - Δ k²
  is the diagonal of the exact solution's I - Δ k kᵀ.

  Decays and states, N numbers for each channel and token, are never kept for
  a whole sequence: chunks of it are computed again for their gradient.

  Polarization holds the decay of some channels at 1 (they sum Δ u k for ever)
  and of others at 0 (they gate the present token); their k is part of kᵀk.

  Source: Liu et al. 2024 (arXiv 2407.14207), §3.2 and Algorithm 1.
  """

  def __init__(
    self,
    d_model: int,
    config: LonghornConfig | None = None,
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
    config = config or LonghornConfig()
    self.config = config
    self.d_model = d_model
    inner = config.expand * d_model
    rank = config.dt_rank or math.ceil(d_model / 16)
    keys = jax.random.split(rngs.params(), 5)
    linear = lambda key, n_in, n_out: nnx.Param(
      linear_weight(key, n_in, n_out, config.init)
    )
    self.in_proj = linear(keys[0], d_model, 2 * inner)
    self.conv = ShortConv(inner, config.d_conv, keys[1])
    self.x_proj = linear(keys[2], inner, rank + 2 * self._states())
    self.beta_proj = linear(keys[3], rank, inner)
    self.beta_bias = nnx.Param(
      jnp.zeros((inner,), jnp.float32), weight_decay=False
    )
    self.D = nnx.Param(jnp.ones((inner,), jnp.float32), weight_decay=False)
    self.out_proj = nnx.Param(
      output_weight(keys[4], inner, d_model, config.init, n_layers)
    )

  def __call__(
    self,
    x: Float[Array, "B T M"],
    state: LonghornState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T M"], LonghornState]:
    """Mix over time.

    Args:
      x: `[B, T, M]`.
      state: to go on from; None for the beginning.
      segment_ids: `[B, T]`, 1-based, 0 for padding.

    Returns:
      y `[B, T, M]` of x's dtype (0 at padding) and the state after it.
    """
    check_call(self, x, state, segment_ids)
    u, z = self._split_input(clear_padding(x, segment_ids))
    u, conv = self.conv(u, None if state is None else state.conv, segment_ids)
    u, dt, k, q = self._select(u)
    shape = (x.shape[0], u.shape[-1], k.shape[-1])
    ssm = jnp.zeros(shape, jnp.float32) if state is None else state.ssm
    y, ssm = _scan(u, dt, k, q, ssm, segment_ids, self.config)
    y = _project(self, y, u, z, x.dtype)
    return y, LonghornState(conv, ssm)

  def step(
    self,
    x: Float[Array, "B M"],
    state: LonghornState,
    segment_ids: Int[Array, " B"] | None = None,
  ) -> tuple[Float[Array, "B M"], LonghornState]:
    """Mix one token, in O(1): y `[B, M]` and the new state."""
    check_step(self, x, state, segment_ids)
    u, z = self._split_input(clear_padding(x, segment_ids))
    u, conv = self.conv.step(u, state.conv, segment_ids)
    u, dt, k, q = self._select(u)
    a, b = _eq1(u, dt, k, self.config.polarization)
    h, ssm = ops.linear_step(
      a, dt[..., None] * b, state=state.ssm, segment_ids=segment_ids
    )
    y = _project(self, _read(h, q), u, z, x.dtype)
    return y, LonghornState(conv, ssm)

  def init_state(
    self, batch_size: int, max_length: int | None = None
  ) -> LonghornState:
    """The state before any token; its size does not depend on a length."""
    del max_length
    shape = (batch_size, self.config.expand * self.d_model, self._states())
    return LonghornState(
      self.conv.init_state(batch_size), jnp.zeros(shape, jnp.float32)
    )

  def recurrence(self, x: Float[Array, "B T M"]) -> Recurrence:
    """Show the layer's own Eq. 1 on `x`: S = (D, N), one Δ per channel.

    a = 1 - Δ k² (polarized), dt = Δ, b = u k; the readout is
    W_out ((q·h + D u) · silu(z)).
    """
    check_mixer("Longhorn.recurrence", x, None, self.d_model)
    u, z = self._split_input(x)
    u, dt, k, q = self._select(self.conv(u)[0])
    a, b = _eq1(u, dt, k, self.config.polarization)
    readout = jax.tree_util.Partial(_readout, self, q, u, z, x[:0, 0])
    return Recurrence(a, dt[..., None], b, jnp.zeros_like(b[:, 0]), readout)

  def _states(self):
    polarization = self.config.polarization or Polarization()
    return polarization.total(self.config.d_state)

  def _split_input(self, x):
    x = x.astype(self.config.dtype)
    u, z = jnp.split(dense(x, self.in_proj[...]), 2, -1)
    return u, z

  def _select(self, u):
    """u after its activation, Δ, k and q; all but u in float32."""
    u = jax.nn.silu(u)
    rank = self.beta_proj.shape[0]
    x = dense(u, self.x_proj[...])
    delta, k, q = jnp.split(x, [rank, (rank + x.shape[-1]) // 2], -1)
    beta = affine(
      delta, self.beta_proj[...], self.beta_bias[...], dtype=jnp.float32,
      precision=Precision.HIGHEST,
    )  # fmt: skip
    beta = jax.nn.sigmoid(beta)
    k, q = k.astype(jnp.float32), q.astype(jnp.float32)
    square = jnp.sum(jnp.square(k), -1, keepdims=True)
    return u, beta / (1 + beta * square), k, q


def _scan(u, dt, k, q, state, segment_ids, config):
  """q·h of every token, and the last state, chunk by chunk."""
  tokens = (u, dt, k, q, segment_ids, *segment_masks(segment_ids))
  state, *tokens = match_varying(state, *tokens)

  @jax.checkpoint
  def run(state, tokens):
    u, dt, k, q, ids, valid, restart = tokens
    if ids is not None:
      # Whether the chunk's first token begins a document only the whole tells.
      first = valid & (jnp.cumsum(valid, 1, dtype=jnp.int32) == 1)
      begins = (first & restart).any(1)[:, None, None]
      state = jnp.where(begins, jnp.zeros_like(state), state)
    a, b = _eq1(u, dt, k, config.polarization)
    h, state = ops.linear_scan(
      a, dt[..., None] * b, initial_state=state, segment_ids=ids,
      implementation=config.implementation,
    )  # fmt: skip
    return state, _read(h, q)

  length = u.shape[1]
  whole = length // _CHUNK * _CHUNK if length > _CHUNK else 0
  ys = []
  if whole:
    chunks = jax.tree.map(lambda v: _chunks(v[:, :whole]), tuple(tokens))
    state, y = jax.lax.scan(run, state, chunks)
    ys.append(jnp.moveaxis(y, 0, 1).reshape(y.shape[1], whole, -1))
  if whole < length:
    rest = jax.tree.map(lambda v: v[:, whole:], tuple(tokens))
    state, y = run(state, rest)
    ys.append(y)
  return jnp.concatenate(ys, 1), state


def _chunks(v):
  v = v.reshape(v.shape[0], -1, _CHUNK, *v.shape[2:])
  return jnp.moveaxis(v, 1, 0)


def _eq1(u, dt, k, polarization):
  """a and b of Eq. 1, `[..., D, N]`, float32."""
  k = k[..., None, :]
  a = 1 - dt[..., None] * jnp.square(k)
  if polarization is not None:
    # The added channels have a k too, so all decays are there by now.
    a = polarize(a, dataclasses.replace(polarization, placement="replace"))
  return a, u.astype(jnp.float32)[..., None] * k


def _read(h, q):
  return (h * q[..., None, :]).sum(-1)


def _project(model, y, u, z, dtype):
  """The skip, the gate, W_out."""
  y = y + model.D[...] * u.astype(jnp.float32)
  y = (y * jax.nn.silu(z.astype(jnp.float32))).astype(z.dtype)
  return dense(y, model.out_proj[...]).astype(dtype)


def _readout(model, q, u, z, like, h, t):
  """The output at time t from the state h, in the dtype of `like`."""
  q, u, z = (
    jax.lax.dynamic_index_in_dim(v, t, 1, keepdims=False) for v in (q, u, z)
  )
  return _project(model, _read(h, q), u, z, like.dtype)
