"""GLA and HGRN2: memories with a learned decay for every key channel."""

import dataclasses
import math
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import Precision

from ssmjax.models.layers import (
  RMSNorm,
  affine,
  dense,
  linear_weight,
  torch_uniform,
)
from ssmjax.models.matrix_memory import (
  MatrixMixer,
  MatrixMixerConfig,
  merge_heads,
)
from ssmjax.polarization import polarize_log
from ssmjax.types import Polarization, Positive, Range, Size

__all__ = ["GLA", "HGRN2", "GLAConfig", "HGRN2Config"]


@dataclasses.dataclass(frozen=True)
class GLAConfig(MatrixMixerConfig):
  """Sizes and choices of a `GLA` mixer.

  Attributes:
    num_heads: H.
    expand_k: width of all heads' learned keys over d_model (with
      `placement="replace"`, of all keys).
    expand_v: width of all heads' values over d_model.
    gate_rank: rank of the map to the gates.
    gate_temperature: τ; the larger, the slower memory fades at first.
    epsilon: of the norm.
    polarization: key channels of decay exactly 1 and 0, in each head; None
      for none.
    init: as in `MambaConfig`.
    dtype: dtype of activations; parameters, gates and memory are float32.
    implementation: of `gated_linear_attention`; None chooses.
  """

  polarizes: ClassVar[str | None] = "channels"

  expand_k: Positive = 0.5
  expand_v: Positive = 1.0
  gate_rank: Size = 16
  gate_temperature: Positive = 16.0
  epsilon: Positive = 1e-5
  polarization: Polarization | None = None

  def build(self, d_model: int, n_layers: int, rngs: nnx.Rngs) -> "GLA":
    """Make the mixer for a model of this width and depth."""
    return GLA(d_model, self, n_layers=n_layers, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class HGRN2Config(MatrixMixerConfig):
  """Sizes and choices of an `HGRN2` mixer.

  Attributes:
    num_heads: H; the paper's expansion is d_model / H, of 128.
    lower_bound: γ, the least forget gate at initialisation, in [0, 1). Above
      0 it is learned, for each channel; at 0, as in the paper's first layer,
      there is none. The paper's bounds rise from layer to layer, at first by
      equal steps: l/L in layer l of L, counted from 0, which is
      `mixers=tuple(HGRN2Config(lower_bound=l / L) for l in range(L))`.
    epsilon: of the norm.
    polarization: key channels of decay exactly 1 and 0, in each head; None
      for none.
    init, dtype, implementation: as in `GLAConfig`.
  """

  polarizes: ClassVar[str | None] = "channels"

  lower_bound: Annotated[float, Range(least=0, below=1)] = 0.0
  epsilon: Positive = 1e-5
  polarization: Polarization | None = None

  def build(self, d_model: int, n_layers: int, rngs: nnx.Rngs) -> "HGRN2":
    """Make the mixer for a model of this width and depth."""
    return HGRN2(d_model, self, n_layers=n_layers, rngs=rngs)


class GLA(MatrixMixer):
  """Gated linear attention.

  q, k, v, g = W_q x, W_k x, W_v x, W_g x  (in heads)
  log a_t = log σ(W_up W_down x_t + b) / τ
  S_t = diag(a_t) S_{t-1} + k_t v_tᵀ
  y_t = W_out (silu(g_t) · RMSNorm(S_tᵀ q_t / √K))

  Polarization holds the decay of some key channels of each head at 1 (their
  row of S sums k vᵀ for ever) and of others at 0 (their row is the present
  token's).

  Source: Yang et al. 2024 (arXiv 2312.06635), Eq. 3 and §4.4.
  """

  config: GLAConfig
  _config = GLAConfig

  def __init__(
    self,
    d_model: int,
    config: GLAConfig | None = None,
    *,
    n_layers: int = 1,
    rngs: nnx.Rngs,
  ):
    super().__init__(d_model, config, n_layers=n_layers, rngs=rngs)
    config, keys = self.config, jax.random.split(rngs.params(), 3)
    heads, values, rank = self._heads(), self._parts()[2], config.gate_rank
    width = heads * self._head_width("expand_k")
    self.gate_down = nnx.Param(
      linear_weight(keys[0], d_model, rank, config.init)
    )
    self.gate_up = nnx.Param(linear_weight(keys[1], rank, width, config.init))
    bias = jnp.zeros((width,), jnp.float32)
    if config.init == "mamba":
      bias = torch_uniform(keys[2], (width,), rank)
    self.gate_bias = nnx.Param(bias, weight_decay=False)
    self.norm = RMSNorm((heads, values), epsilon=config.epsilon)

  def _parts(self):
    polarization = self.config.polarization or Polarization()
    width = self._head_width("expand_k")
    values = self._head_width("expand_v")
    width = polarization.total(width)
    return width, width, values, values

  def _maps(self, x, parts, position):
    del position
    q, k, v, gate = parts
    exact = Precision.HIGHEST
    low = dense(x, self.gate_down[...], precision=exact).astype(jnp.float32)
    logit = affine(low, self.gate_up[...], self.gate_bias[...], precision=exact)
    log_a = jax.nn.log_sigmoid(logit) / self.config.gate_temperature
    log_a = log_a.reshape(*log_a.shape[:-1], self._heads(), -1)
    if self.config.polarization is not None:
      log_a = polarize_log(log_a, self.config.polarization)
    return q, k, v, log_a, gate

  def _answer(self, o, gate):
    return merge_heads(self.norm(o) * jax.nn.silu(gate.astype(jnp.float32)))


class HGRN2(MatrixMixer):
  """The HGRN2: one gate forgets and lets in, and is the key.

  q, z, v = W_q x, W_f x, W_i x  (in heads)
  f_t = γ + (1 - γ) σ(z_t)
  S_t = diag(f_t) S_{t-1} + (1 - f_t) v_tᵀ
  y_t = W_out RMSNorm(S_tᵀ silu(q_t) / √K)

  The norm is over all heads together. γ is learned for each channel of each
  layer by itself; in the paper one table's cumulative softmax over the layers
  keeps the bounds rising, which a mixer that does not know its place cannot.

  Polarization holds the decay f of some key channels of each head at 1 (their
  row of S sums for ever) and of others at 0 (their row is the present
  token's); the key 1 - f stays that of the channel's own gate, for 1 - 1
  would let nothing in.

  Source: Qin et al. 2024 (arXiv 2404.07904), §3; bounds, Qin et al. 2023
  (arXiv 2311.04823), §3.2; norm and scale as in its code of
  flash-linear-attention, to which the authors refer.
  """

  config: HGRN2Config
  _config = HGRN2Config

  def __init__(
    self,
    d_model: int,
    config: HGRN2Config | None = None,
    *,
    n_layers: int = 1,
    rngs: nnx.Rngs,
  ):
    super().__init__(d_model, config, n_layers=n_layers, rngs=rngs)
    heads, width, values = self._memory_shape()
    bound = self.config.lower_bound
    if bound:
      # γ = σ of it.
      logit = math.log(bound) - math.log1p(-bound)
      full = jnp.full((heads, width), logit, jnp.float32)
      self.bound_bias = nnx.Param(full, weight_decay=False)
    self.norm = RMSNorm(heads * values, epsilon=self.config.epsilon)

  def _parts(self):
    polarization = self.config.polarization or Polarization()
    width = self._head_width()
    return polarization.total(width), polarization.total(width), width

  def _maps(self, x, parts, position):
    del position
    q, forget, v = parts
    forget = forget.astype(jnp.float32)
    log_a, log_k = jax.nn.log_sigmoid(forget), jax.nn.log_sigmoid(-forget)
    if self.config.lower_bound:
      bound = self.bound_bias[...]
      log_free = jax.nn.log_sigmoid(-bound)
      log_a = jnp.logaddexp(jax.nn.log_sigmoid(bound), log_free + log_a)
      log_k = log_free + log_k
    if self.config.polarization is not None:
      # The added channels have gates too, so all decays are there by now.
      held = dataclasses.replace(self.config.polarization, placement="replace")
      log_a = polarize_log(log_a, held)
    q = jax.nn.silu(q.astype(jnp.float32))
    return q.astype(x.dtype), jnp.exp(log_k).astype(x.dtype), v, log_a, None

  def _answer(self, o, gate):
    del gate
    return self.norm(merge_heads(o))
