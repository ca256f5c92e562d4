"""Megalodon's CEMA: a moving average whose decays are complex."""

import dataclasses
import functools
import math
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ssmjax import ops
from ssmjax.models.doors import check_call, check_mixer, check_step
from ssmjax.models.layers import (
  RMSNorm,
  affine,
  check_exact,
  clear_padding,
  dense,
  linear_weight,
  normal,
  output_weight,
  torch_uniform,
)
from ssmjax.models.module import Module
from ssmjax.polarization import polarize
from ssmjax.types import (
  Array,
  Complex,
  Float,
  FloatingDType,
  Int,
  Polarization,
  Positive,
  Recurrence,
  Size,
  check_fields,
)

__all__ = ["CEMA", "CEMAConfig", "CEMAState"]


class CEMAState(NamedTuple):
  """What a CEMA mixer carries from token to token.

  Attributes:
    hidden: the moving averages, `[B, M, N]`, complex64.
  """

  hidden: Complex[Array, "B M N"]


@dataclasses.dataclass(frozen=True)
class CEMAConfig:
  """Sizes and choices of a `CEMA` mixer.

  Attributes:
    d_state: learned averages per channel (with `placement="replace"`, all of
      them).
    gate: whether the gated values of Megalodon's layer are there; without
      them y = W₁ m + b.
    expand: width of the gated values over d_model.
    norm_epsilon: of the RMS norm.
    polarization: averages of decay exactly 1 and 0; None for none.
    init: as in `MambaConfig`, for the projections.
    dtype: dtype of activations; parameters and states are float32 and
      complex64.
    implementation: of `lti_scan`; None chooses.
  """

  op: ClassVar[str | None] = "lti_scan"
  polarizes: ClassVar[str | None] = "channels"

  d_state: Size = 16
  gate: bool = True
  expand: Size = 2
  norm_epsilon: Positive = 1e-5
  polarization: Polarization | None = None
  init: Literal["mamba", "authors"] = "mamba"
  dtype: FloatingDType = jnp.float32
  implementation: Literal["reference", "associative", "chunked"] | None = None

  def __post_init__(self):
    check_fields(self)
    check_exact("CEMAConfig", self.polarization)

  def build(self, d_model: int, n_layers: int, rngs: nnx.Rngs) -> "CEMA":
    """Make the mixer for a model of this width and depth."""
    return CEMA(d_model, self, n_layers=n_layers, rngs=rngs)


class CEMA(Module):
  """The moving-average sub-layer of Megalodon.

  hₜ = (1 - α∘δ) e^{iθ} ∘ hₜ₋₁ + α xₜ,  uₜ = Re Σₙ γₙ hₜₙ / √N + ω xₜ
  α, δ = σ(·),  θₙ = n · 2π/N · σ(·), n = 1 … N, one angle for each channel
  m = RMSNorm(u),  y = W₁ m + b + W₂ (silu(W_v x + b_v) · silu(W_r m + b_r))

  It is Megalodon's layer whose attention sees one token, the present one: the
  memory is the moving average's alone. The timestep norm before it, which is
  a second recurrence, and the residual are the model's.

  Polarization holds the decay of some averages in every channel at 1 (they
  sum α x for ever) and of others at 0 (they pass the present token on).

  The paper's input has the factor e^{iθ}; in the released code, and here, γ
  has it.

  Source: Ma et al. 2024 (arXiv 2404.08801), §3.1; the authors'
  `MultiHeadComplexEMA` and `MovingAverageGatedAttention`.
  """

  def __init__(
    self,
    d_model: int,
    config: CEMAConfig | None = None,
    *,
    n_layers: int = 1,
    rngs: nnx.Rngs,
  ):
    """Draw the parameters.

    Args:
      d_model: width of input and output.
      config: sizes and choices.
      n_layers: depth of the model around it, which scales what is added up.
      rngs: source of the `params` key; not kept.

    Raises:
      ValueError: polarization replaces more averages than there are.
    """
    config = config or CEMAConfig()
    self.config = config
    self.d_model = d_model
    states = self._states()
    keys = jax.random.split(rngs.params(), 13)
    draw = functools.partial(normal, deviation=0.2)
    self.A_alpha = nnx.Param(
      draw(keys[0], (d_model, states)), weight_decay=False
    )
    self.A_delta = nnx.Param(
      draw(keys[1], (d_model, len(self._learned()))), weight_decay=False
    )
    self.A_theta = nnx.Param(_angles(keys[2], d_model), weight_decay=False)
    real = jax.random.normal(keys[3], (d_model, states), jnp.float32)
    self.gamma = nnx.Param(
      jnp.stack([real, jnp.zeros_like(real)], -1), weight_decay=True
    )
    # The skip ω.
    cut = jax.random.truncated_normal(keys[4], -4, 4, (d_model,), jnp.float32)
    self.D = nnx.Param(0.25 * cut, weight_decay=False)
    self.norm = RMSNorm(d_model, epsilon=config.norm_epsilon)
    own = config.init == "mamba"
    weight = functools.partial(linear_weight, init=config.init)
    out = functools.partial(output_weight, init=config.init, n_layers=n_layers)

    def bias(key, size):
      zeros = jnp.zeros((size,), jnp.float32)
      return torch_uniform(key, (size,), d_model) if own else zeros

    self.out_proj = nnx.Param(out(keys[5], d_model, d_model))
    self.out_bias = nnx.Param(
      bias(keys[6], d_model) / n_layers**0.5, weight_decay=False
    )
    if config.gate:
      inner = config.expand * d_model
      self.value_proj = nnx.Param(weight(keys[7], d_model, inner))
      self.value_bias = nnx.Param(bias(keys[8], inner), weight_decay=False)
      self.gate_proj = nnx.Param(weight(keys[9], d_model, inner))
      self.gate_bias = nnx.Param(bias(keys[10], inner), weight_decay=False)
      self.gated_proj = nnx.Param(out(keys[11], inner, d_model))

  def __call__(
    self,
    x: Float[Array, "B T M"],
    state: CEMAState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T M"], CEMAState]:
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
    x = clear_padding(x, segment_ids).astype(self.config.dtype)
    a, b, c = self._system()
    u, hidden = ops.lti_scan(
      x, a, b, c, self.D[...],
      initial_state=None if state is None else state.hidden,
      segment_ids=segment_ids, implementation=self.config.implementation,
    )  # fmt: skip
    y = clear_padding(_after(self, x, u), segment_ids)
    return y.astype(x_dtype), CEMAState(hidden)

  def step(
    self,
    x: Float[Array, "B M"],
    state: CEMAState,
    segment_ids: Int[Array, " B"] | None = None,
  ) -> tuple[Float[Array, "B M"], CEMAState]:
    """Mix one token, in O(N): y `[B, M]` and the new state."""
    check_step(self, x, state, segment_ids)
    x_dtype = x.dtype
    x = clear_padding(x, segment_ids).astype(self.config.dtype)
    a, b, c = self._system()
    u, hidden = ops.lti_step(
      x, a, b, c, self.D[...], state=state.hidden, segment_ids=segment_ids
    )
    y = clear_padding(_after(self, x, u), segment_ids)
    return y.astype(x_dtype), CEMAState(hidden)

  def init_state(
    self, batch_size: int, max_length: int | None = None
  ) -> CEMAState:
    """The state before any token; its size does not depend on a length."""
    del max_length
    shape = (batch_size, self.d_model, self._states())
    return CEMAState(jnp.zeros(shape, jnp.complex64))

  def recurrence(self, x: Float[Array, "B T M"]) -> Recurrence:
    """Show the layer's own Eq. 1 on `x`: S = (M, N), complex.

    a = (1 - α∘δ) e^{iθ} (polarized), dt = α, b = x in each of the N averages;
    the readout is all that follows the recurrence.
    """
    check_mixer("CEMA.recurrence", x, None, self.d_model)
    inputs = x.astype(self.config.dtype)
    a, dt, c = self._system()
    shape = (*x.shape, a.shape[-1])
    b = jnp.broadcast_to(inputs.astype(jnp.complex64)[..., None], shape)
    readout = jax.tree_util.Partial(_readout, self, inputs, c, x[:0, 0])
    return Recurrence(
      jnp.broadcast_to(a, shape), dt[None, None], b, jnp.zeros_like(b[:, 0]),
      readout,
    )  # fmt: skip

  def _states(self):
    polarization = self.config.polarization or Polarization()
    return polarization.total(self.config.d_state)

  def _learned(self):
    """Which of the d_state averages have a learned decay."""
    polarization = self.config.polarization
    every = range(self.config.d_state)
    if polarization is None or polarization.placement == "add":
      return every
    return every[polarization.ones : len(every) - polarization.zeros]

  def _system(self):
    """Decays, input and output weights of one step, each `[M, N]`."""
    alpha = jax.nn.sigmoid(self.A_alpha[...])
    polarization = self.config.polarization or Polarization()
    ones, learned = polarization.ones, self._learned()
    delta = jax.nn.sigmoid(self.A_delta[...])
    size = 1 - alpha[:, ones : ones + len(learned)] * delta
    wave = jnp.arange(learned.start + 1, learned.stop + 1, dtype=jnp.float32)
    turns = jax.nn.sigmoid(self.A_theta[...])[:, None] * wave
    angle = 2 * math.pi / self.config.d_state * turns
    a = jax.lax.complex(size * jnp.cos(angle), size * jnp.sin(angle))
    held = dataclasses.replace(polarization, placement="add")
    gamma = self.gamma[...] / math.sqrt(self._states())
    c = jax.lax.complex(gamma[..., 0], gamma[..., 1])
    return polarize(a, held), alpha, c


def _after(model, x, u):
  """The output from the input x and the moving average u."""
  m = model.norm(u)
  wide = functools.partial(affine, dtype=jnp.float32)
  y = wide(m, model.out_proj[...], model.out_bias[...])
  if not model.config.gate:
    return y
  v = jax.nn.silu(wide(x, model.value_proj[...], model.value_bias[...]))
  r = jax.nn.silu(wide(m, model.gate_proj[...], model.gate_bias[...]))
  gated = dense((v * r).astype(x.dtype), model.gated_proj[...])
  return y + gated.astype(jnp.float32)


def _readout(model, x, c, like, h, t):
  """The output at time t from the state h, in the dtype of `like`."""
  x = jax.lax.dynamic_index_in_dim(x, t, 1, keepdims=False)
  u = (c * h).sum(-1).real + model.D[...] * x
  return _after(model, x, u.astype(x.dtype)).astype(like.dtype)


def _angles(key, channels):
  """Logits of base angles that fall geometrically, in random order."""
  rank = jnp.arange(1, channels + 1, dtype=jnp.float32)
  share = jnp.exp(-rank * (math.log(channels) / channels))
  # Of a single channel it is 1, whose logit is infinite.
  share = jnp.minimum(share, 1 - 1e-6)
  return jax.random.permutation(key, jnp.log(share / (1 - share)))
