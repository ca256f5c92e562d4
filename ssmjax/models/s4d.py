"""S4D and DSS: diagonal time-invariant systems, one in every channel."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ssmjax.models.diagonal_system import DiagonalSystem
from ssmjax.models.doors import check_mixer
from ssmjax.models.s4_block import S4Block, check_system, write
from ssmjax.types import (
  Array,
  Float,
  FloatingDType,
  Polarization,
  Positive,
  Recurrence,
  Size,
)

__all__ = ["DSS", "S4D", "DSSConfig", "S4DConfig"]


@dataclasses.dataclass(frozen=True)
class S4DConfig:
  """Sizes and choices of an `S4D` mixer.

  Attributes:
    d_state: N, learned states of a channel (with `placement="replace"`, all
      states); each stands for itself and its conjugate, so that it is half of
      the N of the paper (there 64).
    spectrum: A at initialisation: S4D-LegS, S4D-Lin, S4D-Inv or S4D-Real,
      which is real throughout: see `DiagonalSystem`.
    discretization: zero-order hold or bilinear.
    dt_min: smallest Δ at initialisation.
    dt_max: largest Δ at initialisation; Δ is log-uniform between them.
    gate: the output map is a gated linear unit; else a linear map.
    polarization: channels of decay exactly 1 and 0; None for none.
    init: of the output map, as in `MambaConfig`.
    dtype: dtype of activations; parameters and states are 32 bits wide.
    implementation: of the scan; None chooses.
  """

  op: ClassVar[str | None] = "lti_scan"
  polarizes: ClassVar[str | None] = "channels"

  d_state: Size = 32
  spectrum: Literal["legs", "lin", "inv", "real"] = "legs"
  discretization: Literal["zoh", "bilinear"] = "zoh"
  dt_min: Positive = 1e-3
  dt_max: Positive = 1e-1
  gate: bool = True
  polarization: Polarization | None = None
  init: Literal["mamba", "authors"] = "mamba"
  dtype: FloatingDType = jnp.float32
  implementation: Literal["reference", "associative", "chunked"] | None = None

  def __post_init__(self):
    check_system(self)

  def build(self, d_model: int, n_layers: int, rngs: nnx.Rngs) -> "S4D":
    """Make the mixer for a model of this width and depth."""
    return S4D(d_model, self, n_layers=n_layers, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class DSSConfig:
  """Sizes and choices of a `DSS` mixer.

  Attributes:
    d_state: N, learned states of a channel (with `placement="replace"`, all
      states), which stand for themselves alone.
    version: `"exp"`, or `"softmax"`, whose modes are divided by their sum over
      positions.
    softmax_length: L, the positions of that softmax: the length of the
      sequences that are trained on. The published layer takes it from each
      call, so that outputs change where a sequence grows; here it is fixed.
    dt_min: as in `S4DConfig`.
    dt_max: as in `S4DConfig`.
    gate: as in `S4DConfig`; the published layer has a linear map.
    polarization: channels of decay exactly 1 and 0; None for none.
    init: of the output map, as in `MambaConfig`.
    dtype: dtype of activations; parameters and states are 32 bits wide.
    implementation: of the scan; None chooses.
  """

  op: ClassVar[str | None] = "lti_scan"
  polarizes: ClassVar[str | None] = "channels"

  d_state: Size = 64
  version: Literal["exp", "softmax"] = "exp"
  softmax_length: Size = 1024
  dt_min: Positive = 1e-3
  dt_max: Positive = 1e-1
  gate: bool = False
  polarization: Polarization | None = None
  init: Literal["mamba", "authors"] = "mamba"
  dtype: FloatingDType = jnp.float32
  implementation: Literal["reference", "associative", "chunked"] | None = None

  def __post_init__(self):
    check_system(self)

  def build(self, d_model: int, n_layers: int, rngs: nnx.Rngs) -> "DSS":
    """Make the mixer for a model of this width and depth."""
    return DSS(d_model, self, n_layers=n_layers, rngs=rngs)


class _Diagonal(S4Block):
  """A block whose system has a diagonal Eq. 1."""

  def recurrence(self, x: Float[Array, "B T M"]) -> Recurrence:
    """Show the layer's own Eq. 1 on `x`: S = (D, N), one Δ per channel.

    a is the decay of one step (polarized), dt = Δ, b = (B̄/Δ) x; the readout
    is the block's output for 2 Re C h + D x.
    """
    check_mixer(f"{type(self).__name__}.recurrence", x, None, self.d_model)
    u = x.astype(self.config.dtype)
    a, dt, b, c = self.system.weights()
    b = b * u[..., None].astype(jnp.float32)
    readout = jax.tree_util.Partial(
      _readout, c, u, self.D[...], self.out_proj[...], self.out_bias[...],
      x[:0, 0],
    )  # fmt: skip
    return Recurrence(
      jnp.broadcast_to(a, b.shape),
      jnp.broadcast_to(dt[:, None], (*u.shape, 1)),
      b,
      self.system.init_state(x.shape[0]),
      readout,
    )


class S4D(_Diagonal):
  """S4D: a diagonal state space model in every channel.

  A = -exp(A_log) + i A_imag,  Ā, B̄ by zero-order hold or bilinear
  h_t = Ā h_{t-1} + B̄ x_t;  y = glu(W_out gelu(2 Re C h + D x) + b_out)

  Polarization holds the decay of some channels at 1 (they sum Δ B x for ever)
  and of others at 0 (they see Δ B x of the present token).

  Source: Gu et al. 2022 (arXiv 2206.11893), §3 and §4; the block of the
  released code.
  """

  def __init__(
    self,
    d_model: int,
    config: S4DConfig | None = None,
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
    config = config or S4DConfig()
    keys = jax.random.split(rngs.params())
    system = DiagonalSystem(
      d_model,
      config.d_state,
      config.spectrum,
      keys[0],
      dt_range=(config.dt_min, config.dt_max),
      discretization=config.discretization,
      polarization=config.polarization,
    )
    super().__init__(d_model, config, system, keys[1], n_layers)


class DSS(_Diagonal):
  """DSS: a diagonal state space whose Λ all channels share.

  Λ = -exp(A_log) + i A_imag, the eigenvalues of HiPPO-LegS at first
  h_t = exp(ΔΛ) h_{t-1} + Λ⁻¹(exp(ΔΛ) - 1) x_t;  y = W_out gelu(Re C h + D x)
  C = W (`"exp"`), or W/(exp(LΔΛ) - 1) (`"softmax"`), whose kernel is
  Re Σₙ W/Λ softmaxₗ(lΔΛ), l < L, for as long as the sequence goes on.

  Polarization holds the decay of some channels at 1 (they sum Δ x for ever; in
  the softmax their weight is 1/L) and of others at 0 (they see Δ x).

  The published softmax leaves Re Λ free; a growing mode is no recurrence that
  float32 can hold, so that here it is negative in both versions.

  Source: Gupta et al. 2022 (arXiv 2203.14343), Proposition 1 and §3.
  """

  def __init__(
    self,
    d_model: int,
    config: DSSConfig | None = None,
    *,
    n_layers: int = 1,
    rngs: nnx.Rngs,
  ):
    """Draw the parameters; the arguments are those of `S4D`."""
    config = config or DSSConfig()
    keys = jax.random.split(rngs.params())
    softmax = config.version == "softmax"
    system = DiagonalSystem(
      d_model,
      config.d_state,
      "legs",
      keys[0],
      dt_range=(config.dt_min, config.dt_max),
      polarization=config.polarization,
      paired=False,
      shared=True,
      learned_input=False,
      softmax_length=config.softmax_length if softmax else None,
    )
    super().__init__(d_model, config, system, keys[1], n_layers)


def _readout(c, u, D, out_proj, out_bias, like, h, t):
  """The output at time t from the state h, in the dtype of `like`."""
  u = jax.lax.dynamic_index_in_dim(u, t, 1, keepdims=False)
  y = (c * h).sum(-1).real + D * u.astype(jnp.float32)
  return write(y.astype(u.dtype), out_proj, out_bias).astype(like.dtype)
