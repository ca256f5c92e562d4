"""Linear attention and retention: memories whose decay is not learned."""

import dataclasses
import functools
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.lax import Precision

from ssmjax.models.layers import LayerNorm, RMSNorm, rotate_pairs
from ssmjax.models.matrix_memory import (
  LinearAttentionState,
  MatrixMixer,
  MatrixMixerConfig,
  merge_heads,
)
from ssmjax.polarization import polarize_log
from ssmjax.types import Count, Polarization, Positive, Size

__all__ = [
  "LinearAttention",
  "LinearAttentionConfig",
  "LinearAttentionState",
  "RetNet",
  "RetNetConfig",
]

FeatureMap = Literal["elu", "linear", "random", "exp_mlp"]


@dataclasses.dataclass(frozen=True)
class LinearAttentionConfig(MatrixMixerConfig):
  """Sizes and choices of a `LinearAttention` mixer.

  Attributes:
    num_heads: H; a head has expand_k·d_model / H keys and
      expand_v·d_model / H values.
    init: as in `MambaConfig`.
    dtype: dtype of activations; parameters, decays and memory are float32.
    implementation: of `gated_linear_attention`; None chooses.
    expand_k: width of all heads' keys before the feature map, over d_model.
    expand_v: width of all heads' values, over d_model.
    feature_map: φ, of a head's queries and keys x. `"elu"` is 1 + ELU(x)
      (Katharopoulos et al. 2020); `"linear"` is x, for the projections are
      linear maps already; `"random"` are positive orthogonal random features,
      exp(±ωx - |x|²/2), whose products are softmax attention's on average
      (Choromanski et al. 2021, arXiv 2009.14794); `"exp_mlp"` is Hedgehog's
      exp(±(Wx + b)), divided by its sum (Zhang et al. 2024, arXiv
      2402.04347), with W, b of each head, one pair for q and one for k.
    num_features: F, the rows of ω or W; None for a head's keys. Both signs
      make 2F features.
    feature_seed: what ω is drawn from. It is a constant of the program and
      not a parameter, which weight decay would draw to zero; heads and layers
      share it.
    normalize: divide by Σ φ(q)·φ(k), so that y is a mean of values. The
      linear map has products of both signs and must do without.
    epsilon: added to that denominator.
    head_norm: an RMS norm of each head after all that.
  """

  expand_k: Positive = 1.0
  expand_v: Positive = 1.0
  feature_map: FeatureMap = "elu"
  num_features: Size | None = None
  feature_seed: Count = 0
  normalize: bool = True
  epsilon: Positive = 1e-6
  head_norm: bool = False

  def __post_init__(self):
    super().__post_init__()
    name = type(self).__name__
    if self.normalize and self.feature_map == "linear":
      raise ValueError(
        f"{name}: normalize is True with feature_map='linear', expected False:"
        " its products have both signs, and their sum may be zero."
      )

  def build(
    self, d_model: int, n_layers: int, rngs: nnx.Rngs
  ) -> "LinearAttention":
    """Make the mixer for a model of this width and depth."""
    return LinearAttention(d_model, self, n_layers=n_layers, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class RetNetConfig(MatrixMixerConfig):
  """Sizes and choices of a `RetNet` mixer.

  Attributes:
    num_heads: H, learned heads (with `placement="replace"`, all heads).
    expand_k: width of the H heads' keys over d_model; a head's is even.
    expand_v: width of the H heads' values over d_model.
    rope_theta: base of the rotation's wavelengths.
    norm: of each head: `"group"` is the paper's GroupNorm, `"rms"` what the
      released code came to have (there without a scale).
    epsilon: of the norm.
    polarization: heads of decay exactly 1 and 0; None for none.
    init, dtype, implementation: as in `LinearAttentionConfig`.
  """

  polarizes: ClassVar[str | None] = "heads"

  expand_k: Positive = 1.0
  expand_v: Positive = 2.0
  rope_theta: Positive = 10_000.0
  norm: Literal["group", "rms"] = "group"
  epsilon: Positive = 1e-6
  polarization: Polarization | None = None

  def build(self, d_model: int, n_layers: int, rngs: nnx.Rngs) -> "RetNet":
    """Make the mixer for a model of this width and depth."""
    return RetNet(d_model, self, n_layers=n_layers, rngs=rngs)


class LinearAttention(MatrixMixer):
  """Attention whose weights are products of features.

  q, k, v = W_q x, W_k x, W_v x  (in heads)
  S_t = S_{t-1} + φ(k_t) v_tᵀ,  z_t = z_{t-1} + φ(k_t)
  y_t = W_out S_tᵀ φ(q_t) / (z_t·φ(q_t) + ε)

  z is one more column of S, of values 1. Without `normalize` y is
  W_out S_tᵀ φ(q_t) / √K of K features.

  Every decay is 1, so that there is nothing to polarize: all of it is the
  running sum that a one-channel is.

  Source: Katharopoulos et al. 2020 (arXiv 2006.16236), Eq. 9 and 16-20;
  feature maps as in Wang et al. 2025 (arXiv 2501.00658), App. B.
  """

  config: LinearAttentionConfig
  _config = LinearAttentionConfig

  def __init__(
    self,
    d_model: int,
    config: LinearAttentionConfig | None = None,
    *,
    n_layers: int = 1,
    rngs: nnx.Rngs,
  ):
    super().__init__(d_model, config, n_layers=n_layers, rngs=rngs)
    config, heads = self.config, self._heads()
    width, values = self._kv()
    if config.feature_map == "exp_mlp":
      count = config.num_features or width
      eye = jnp.eye(width, count, dtype=jnp.float32)
      # The identity at first, as Hedgehog has it.
      self.feature_weight = nnx.Param(jnp.tile(eye, (2, heads, 1, 1)))
      self.feature_bias = nnx.Param(
        jnp.zeros((2, heads, count), jnp.float32), weight_decay=False
      )
    if config.head_norm:
      self.norm = RMSNorm((heads, values))

  def _kv(self):
    return (
      self._head_width("expand_k"),
      self._head_width("expand_v"),
    )

  def _parts(self):
    width, values = self._kv()
    return width, width, values

  def _memory_shape(self):
    width, values = self._kv()
    if self.config.feature_map in ("random", "exp_mlp"):
      width = 2 * (self.config.num_features or width)
    return self._heads(), width, values + self.config.normalize

  def _scale(self):
    return 1.0 if self.config.normalize else super()._scale()

  def _maps(self, x, parts, position):
    del position
    q, k, v = parts
    q, k = (self._features(p, i).astype(x.dtype) for i, p in enumerate((q, k)))
    if self.config.normalize:
      v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)
    return q, k, v, None, None

  def _features(self, x, of_keys):
    """φ in float32, of queries or of keys."""
    x = x.astype(jnp.float32)
    if self.config.feature_map == "linear":
      return x
    if self.config.feature_map == "elu":
      # ELU(x) + 1 would lose the digits of exp(x) far below zero.
      return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))
    if self.config.feature_map == "exp_mlp":
      weight, bias = self.feature_weight[of_keys], self.feature_bias[of_keys]
      y = jnp.einsum("...hk,hkf->...hf", x, weight, precision=Precision.HIGHEST)
      y = y + bias
      return jax.nn.softmax(jnp.concatenate([y, -y], -1), -1)
    width = x.shape[-1]
    count = self.config.num_features or width
    x = x * width**-0.25
    omega = _orthogonal(width, count, self.config.feature_seed)
    y = jnp.matmul(x, omega, precision=Precision.HIGHEST)
    y = jnp.concatenate([y, -y], -1)
    y = y - 0.5 * jnp.square(x).sum(-1, keepdims=True)
    y = y - 0.5 * math.log(2 * count)
    if self.config.normalize and not of_keys:
      # Of a query's features only the ratios count.
      y = y - jax.lax.stop_gradient(y.max(-1, keepdims=True))
    return jnp.exp(y)

  def _answer(self, o, gate):
    del gate
    if self.config.normalize:
      o = o[..., :-1] / (o[..., -1:] + self.config.epsilon)
    return merge_heads(self.norm(o) if self.config.head_norm else o)


class RetNet(MatrixMixer):
  """Multi-scale retention.

  q, k, v, g = W_q x, W_k x, W_v x, W_g x  (in heads);  q, k rotated by nθ
  S_n = γ S_{n-1} + k_n v_nᵀ,  γ = 1 - 2^(-5-h) in head h
  y_n = W_out (silu(g_n) · norm(S_nᵀ q_n / √K))

  n counts the tokens of a segment, and goes on from the state. Pairs of
  neighbouring channels rotate, and θ falls from 1 to 1/rope_theta, as in the
  released code. That divides attention's rows besides, by numbers that the
  norm behind takes out again; they are left out.

  Polarization holds the decay γ of some heads at 1 (they sum k vᵀ for ever)
  and of others at 0 (they see the present token only).

  Source: Sun et al. 2023 (arXiv 2307.08621), Eq. 5-8.
  """

  config: RetNetConfig
  _config = RetNetConfig
  _counts = True

  def __init__(
    self,
    d_model: int,
    config: RetNetConfig | None = None,
    *,
    n_layers: int = 1,
    rngs: nnx.Rngs,
  ):
    super().__init__(d_model, config, n_layers=n_layers, rngs=rngs)
    kind = LayerNorm if self.config.norm == "group" else RMSNorm
    size = (self._heads(), self._parts()[2])
    self.norm = kind(size, epsilon=self.config.epsilon)

  def _heads(self):
    polarization = self.config.polarization or Polarization()
    return polarization.total(self.config.num_heads)

  def _parts(self):
    width = self._head_width("expand_k")
    values = self._head_width("expand_v")
    if width % 2:
      raise ValueError(
        f"RetNet: heads have {width} keys, expected an even number to rotate."
        " Use another expand_k or num_heads."
      )
    return width, width, values, values

  def _maps(self, x, parts, position):
    q, k, v, gate = parts
    angle = _turn(position, q.shape[-1], self.config.rope_theta)
    q, k = (rotate_pairs(part, angle).astype(x.dtype) for part in (q, k))
    exponent = -5.0 - np.arange(self.config.num_heads)
    log_a = jnp.asarray(np.log1p(-(2.0**exponent)), jnp.float32)
    if self.config.polarization is not None:
      log_a = polarize_log(log_a, self.config.polarization)
    return q, k, v, log_a, gate

  def _answer(self, o, gate):
    return merge_heads(self.norm(o) * jax.nn.silu(gate.astype(jnp.float32)))


@functools.cache
def _orthogonal(width, count, seed):
  """ω `[K, F]`: columns at right angles, with lengths of normal vectors."""
  # Of all generators' streams, this one is promised never to change.
  draw = np.random.RandomState(seed)
  blocks = []
  for _ in range(-(-count // width)):
    block = draw.standard_normal((width, width))
    q, r = np.linalg.qr(block)
    blocks.append(q * np.sign(np.diag(r)) * np.linalg.norm(block, axis=0))
  return np.concatenate(blocks, 1)[:, :count].astype(np.float32)


def _turn(position, width, theta):
  """Angles for positions `[...]` and pairs of channels, `[..., 1, K/2]`."""
  frequency = theta ** -np.linspace(0, 1, width // 2)
  angle = position.astype(jnp.float32)[..., None, None]
  return angle * jnp.asarray(frequency, jnp.float32)
