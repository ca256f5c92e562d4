"""S4: a system of diagonal plus low rank, made of HiPPO-LegS."""

import dataclasses
from typing import ClassVar, Literal, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from ssmjax import ops
from ssmjax.models.diagonal_system import complex_normal, log_uniform, whole
from ssmjax.models.module import Module
from ssmjax.models.s4_block import S4Block, check_system
from ssmjax.types import (
  Array,
  Complex,
  Float,
  FloatingDType,
  Int,
  Positive,
  Size,
)

__all__ = ["S4", "S4Config"]


@dataclasses.dataclass(frozen=True)
class S4Config:
  """Sizes and choices of an `S4` mixer.

  Attributes:
    d_state: N, states of a channel; each stands for itself and its conjugate,
      so that it is half of the N of the paper (there 64).
    discretization: bilinear, as in the paper, or zero-order hold, for which
      matrix exponentials are taken.
    dt_min: smallest Δ at initialisation.
    dt_max: largest Δ at initialisation; Δ is log-uniform between them.
    gate: the output map is a gated linear unit; else a linear map.
    init: of the output map, as in `MambaConfig`.
    dtype: dtype of activations; parameters and states are 32 bits wide.
    implementation: `"chunked"` runs chunks of the recurrence, `"convolution"`
      makes the whole kernel by Cauchy sums and convolves by FFT; the bilinear
      rule only, and what has a state or segment ids runs chunked. None is
      chunked: on 2 CPU cores (N = 32) forward and backward take 0.020 s of CPU
      against 0.32 s by convolution at batch 1, 0.046 s against 0.32 s at 4 (32
      channels, 2048 tokens) and 0.040 s against 0.115 s at 16 (16 channels,
      1024 tokens). The kernel costs the same at any batch.
  """

  op: ClassVar[str | None] = "lti_matrix_scan"
  polarizes: ClassVar[str | None] = None

  d_state: Size = 32
  discretization: Literal["bilinear", "zoh"] = "bilinear"
  dt_min: Positive = 1e-3
  dt_max: Positive = 1e-1
  gate: bool = True
  init: Literal["mamba", "authors"] = "mamba"
  dtype: FloatingDType = jnp.float32
  implementation: Literal["reference", "chunked", "convolution"] | None = None

  def __post_init__(self):
    check_system(self)
    if self.implementation == "convolution" and self.discretization == "zoh":
      raise ValueError(
        "S4Config: implementation is 'convolution' with discretization 'zoh',"
        " expected 'bilinear', which alone has a kernel by Cauchy sums."
      )

  def build(self, d_model: int, n_layers: int, rngs: nnx.Rngs) -> "S4":
    """Make the mixer for a model of this width and depth."""
    return S4(d_model, self, n_layers=n_layers, rngs=rngs)


class S4(S4Block):
  """S4: a structured state space model in every channel.

  𝐀 = diag(Λ) - P Pᴴ,  Λ = -exp(A_log) + i A_imag;  Ā, B̄ bilinear
  h_t = Ā h_{t-1} + B̄ x_t;  y = glu(W_out gelu(2 Re C h + D x) + b_out)

  Λ, P and B are those of HiPPO-LegS at first, and tied P keeps it stable. 𝐀 is
  not diagonal (its eigenvectors are too ill-conditioned to make it so), so
  there is no polarization and no diagonal Eq. 1.

  The published layer learns C̃ = C (I - Ā^L) for the length L of its first
  call; here C itself is learned, so that no length is in the parameters.

  Source: Gu et al. 2022 (arXiv 2111.00396), Theorems 1 and 3, §3.4; P = Q of
  Goel et al. 2022 (arXiv 2202.09729), §4.2, as in the released code.
  """

  def __init__(
    self,
    d_model: int,
    config: S4Config | None = None,
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
    config = config or S4Config()
    keys = jax.random.split(rngs.params())
    system = _DPLRSystem(d_model, config, keys[0])
    super().__init__(d_model, config, system, keys[1], n_layers)

  def recurrence(self, x: Float[Array, "B T M"]) -> NoReturn:
    """Raise: the state matrix is not diagonal."""
    del x
    raise NotImplementedError(
      "S4.recurrence: there is no diagonal Eq. 1, for the low rank binds the"
      " states to each other. S4D is the layer without it."
    )


class _DPLRSystem(Module):
  """hₜ = Ā hₜ₋₁ + B̄ xₜ,  y = 2 Re C h + D x, `[D, N]` halves of pairs."""

  def __init__(self, channels: int, config: S4Config, key):
    self.discretization = config.discretization
    keys = jax.random.split(key)
    size = config.d_state
    A, P, B, _ = ops.hippo_legs_dplr(2 * size)
    copies = lambda v: jnp.asarray(
      np.broadcast_to(v, (channels, *v.shape)), jnp.float32
    )
    pair = lambda v: copies(np.stack([v, np.zeros_like(v)], -1))
    self.log_dt = nnx.Param(
      log_uniform(keys[0], (channels,), config.dt_min, config.dt_max),
      weight_decay=False,
    )
    # Of their own: in a stack of layers the weights have an axis more.
    self.sizes = (channels, size)
    self.A_log = nnx.Param(copies(np.log(-A.real[size:])), weight_decay=False)
    self.A_imag = nnx.Param(copies(A.imag[size:]), weight_decay=False)
    self.P = nnx.Param(pair(P[size:]), weight_decay=False)
    self.B = nnx.Param(pair(B[size:]), weight_decay=False)
    self.C = nnx.Param(complex_normal(keys[1], (channels, size)))

  def scan(self, x, D, state, segment_ids, implementation):
    """Run over time: y `[B, T, D]` and the last state `[B, D, N]`."""
    alone = state is None and segment_ids is None
    convolved = implementation == "convolution"
    y, hidden = ops.lti_matrix_scan(
      x.astype(jnp.float32), *self._matrices(),
      initial_state=None if state is None else _halves(state),
      segment_ids=segment_ids,
      implementation=None if convolved else implementation,
    )  # fmt: skip
    y = y[..., 0]
    if convolved and alone:
      y, _ = ops.long_conv(x.astype(jnp.float32), self.kernel(x.shape[1]).T)
    hidden = lax.complex(*jnp.split(hidden, 2, -1))
    return (y + D * x.astype(jnp.float32)).astype(x.dtype), hidden

  def kernel(self, length: int) -> Float[Array, "D L"]:
    """The system's convolution kernel, by Cauchy sums."""
    A, P, B, C, dt = self._continuous()
    return ops.s4_dplr_kernel(A, P, B, C, dt, length, conjugate_pairs=True)

  def step(
    self,
    x: Float[Array, "B D"],
    D: Float[Array, " D"],
    state: Complex[Array, "B D N"],
    segment_ids: Int[Array, " B"] | None,
  ) -> tuple[Float[Array, "B D"], Complex[Array, "B D N"]]:
    """Run one token, by the bilinear rule in O(N).

    By zero-order hold it is O(N²) and a matrix exponential besides, O(N³),
    which XLA takes out of a loop over tokens that is compiled as one (64
    channels, N = 32, on a CPU: 0.95 ms a token, alone 140 ms).
    """
    wide = x.astype(jnp.float32)
    if self.discretization == "zoh":
      y, new = ops.lti_matrix_step(
        wide, *self._matrices(), state=_halves(state), segment_ids=segment_ids
      )
      y, new = y[..., 0], lax.complex(*jnp.split(new, 2, -1))
    else:
      A, P, B, C, dt = self._continuous()
      a, u, v, b = ops.bilinear_dplr(A, P, B, dt, conjugate_pairs=True)
      bound = 2 * (v.conj() * state).sum(-1, keepdims=True).real
      new = a * state - u * bound + b * wide[..., None]
      if segment_ids is not None:
        new = jnp.where(segment_ids[:, None, None] > 0, new, state)
      y = 2 * (C * new).sum(-1).real
    return (y + D * wide).astype(x.dtype), new

  def init_state(self, batch_size: int) -> Complex[Array, "B D N"]:
    """Zeros."""
    return jnp.zeros((batch_size, *self.sizes), jnp.complex64)

  def _continuous(self):
    A = lax.complex(-jnp.exp(self.A_log[...]), self.A_imag[...])
    P, B, C = (whole(v[...]) for v in (self.P, self.B, self.C))
    return A, P, B, C, jnp.exp(self.log_dt[...])

  def _matrices(self):
    """Ā, B̄ and C of the real system: real parts first, then imaginary."""
    A, P, B, C, dt = self._continuous()
    c = 2 * _halves(C.conj())[:, None]
    if self.discretization == "zoh":
      a, b = ops.zero_order_hold(
        _real_matrix(A, P, P), _halves(B), dt, dense=True
      )
      return a, b, c
    a, u, v, b = ops.bilinear_dplr(A, P, B, dt, conjugate_pairs=True)
    return _real_matrix(a, u, v), _halves(b), c


def _halves(z):
  return jnp.concatenate([z.real, z.imag], -1)


def _real_matrix(diagonal, left, right):
  """What takes h to diagonal∘h - left · 2 Re(rightᴴ h), in real numbers."""
  spread = lambda v: v[..., None] * jnp.eye(v.shape[-1], dtype=v.dtype)
  real, imag = spread(diagonal.real), spread(diagonal.imag)
  turn = jnp.concatenate(
    [jnp.concatenate([real, -imag], -1), jnp.concatenate([imag, real], -1)], -2
  )
  return turn - 2 * _halves(left)[..., None] * _halves(right)[..., None, :]
