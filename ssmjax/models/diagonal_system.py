"""A learned diagonal system, time-invariant: what S4D, DSS and H3 share."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from ssmjax import ops
from ssmjax.models.module import Module
from ssmjax.polarization import polarize
from ssmjax.types import (
  Array,
  Float,
  Inexact,
  Int,
  Polarization,
  check_choice,
)

__all__ = [
  "SPECTRA",
  "DiagonalSystem",
  "complex_normal",
  "log_uniform",
  "whole",
]

SPECTRA = ("legs", "lin", "inv", "real")


class DiagonalSystem(Module):
  """h'(t) = A h(t) + B x(t),  y = 2 Re C h,  A = -exp(A_log) + i A_imag.

  N complex states stand for 2N, themselves and their conjugates; if not
  `paired`, for themselves, and there is no factor 2. With the spectrum
  `"real"` all is real, states too, again without it. Complex weights are
  pairs of real numbers, on a last axis.

  Polarized channels come before and after the learned ones. A one-channel is
  the system with A = 0, whose input is held exactly: hₜ = hₜ₋₁ + Δ B xₜ. A
  zero-channel has that input too, hₜ = Δ B xₜ (A = -∞ would let nothing in).

  Args:
    channels: D.
    d_state: N, learned states.
    spectrum: initial A; 2N is the order. `"legs"`: the eigenvalues of
      HiPPO-LegS without its low rank, with its B; `"lin"`: -½ + iπn; `"inv"`:
      -½ + i (2N/π)(2N/(2n+1) - 1); `"real"`: -(n+1).
    key: of the random numbers.
    dt_range: smallest and largest Δ, log-uniform between them.
    discretization: `"zoh"` or `"bilinear"`.
    polarization: channels of decay exactly 1 and 0.
    paired: whether a state stands for its conjugate too.
    shared: A is the same in all channels, `[1, N]`.
    learned_input: B is learned; else it is 1 (C has its place).
    softmax_length: L of DSS's softmax over positions; None for none.

  Source: Gu et al. 2022, S4D (arXiv 2206.11893), §3.3 and §4; Gupta et al.
  2022, DSS (arXiv 2203.14343), Proposition 1.
  """

  def __init__(
    self,
    channels: int,
    d_state: int,
    spectrum: Literal["legs", "lin", "inv", "real"],
    key,
    *,
    dt_range: tuple[float, float],
    discretization: Literal["zoh", "bilinear"] = "zoh",
    polarization: Polarization | None = None,
    paired: bool = True,
    shared: bool = False,
    learned_input: bool = True,
    softmax_length: int | None = None,
  ):
    """Draw the parameters."""
    check_choice("DiagonalSystem", "spectrum", spectrum, SPECTRA)
    self.discretization = discretization
    self.polarization = polarization or Polarization()
    self.paired = paired
    self.softmax_length = softmax_length
    keys = jax.random.split(key)
    self.log_dt = nnx.Param(
      log_uniform(keys[0], (channels,), *dt_range), weight_decay=False
    )
    A, B = _spectrum(spectrum, d_state)
    copies = lambda v: jnp.asarray(
      np.broadcast_to(v, (1 if shared else channels, *v.shape)), jnp.float32
    )
    self.A_log = nnx.Param(copies(np.log(-A.real)), weight_decay=False)
    states = self.polarization.total(d_state)
    # Of their own: in a stack of layers the weights have an axis more.
    self.sizes = (channels, states)
    if spectrum == "real":
      self.C = nnx.Param(
        jax.random.normal(keys[1], (channels, states), jnp.float32)
      )
    else:
      self.A_imag = nnx.Param(copies(A.imag), weight_decay=False)
      C = complex_normal(keys[1], (channels, states))
      self.C = nnx.Param(C if paired else 2**0.5 * C)
    if learned_input:
      # What is not there in `_spectrum` is a channel that is added.
      added = states - d_state
      ones = self.polarization.ones if added else 0
      B = np.pad(B, (ones, added - ones), constant_values=1.0)
      if spectrum != "real":
        B = np.stack([B, np.zeros_like(B)], -1)
      B = np.broadcast_to(B, (channels, *B.shape))
      self.B = nnx.Param(jnp.asarray(B, jnp.float32), weight_decay=False)

  def scan(self, x, D, state, segment_ids, implementation):
    """Run over time: y `[B, T, D]` and the last state `[B, D, N]`."""
    a, dt, b, c = self.weights()
    return ops.lti_scan(
      x, a, dt[:, None] * b, c, D, initial_state=state,
      segment_ids=segment_ids, implementation=implementation,
    )  # fmt: skip

  def step(
    self,
    x: Float[Array, "B D"],
    D: Float[Array, " D"],
    state: Inexact[Array, "B D N"],
    segment_ids: Int[Array, " B"] | None,
  ) -> tuple[Float[Array, "B D"], Inexact[Array, "B D N"]]:
    """Run one token."""
    a, dt, b, c = self.weights()
    return ops.lti_step(
      x, a, dt[:, None] * b, c, D, state=state, segment_ids=segment_ids
    )

  def init_state(self, batch_size: int) -> Inexact[Array, "B D N"]:
    """Zeros, complex64 or float32."""
    dtype = jnp.complex64 if hasattr(self, "A_imag") else jnp.float32
    return jnp.zeros((batch_size, *self.sizes), dtype)

  def weights(
    self,
  ) -> tuple[
    Inexact[Array, "D N"],
    Float[Array, " D"],
    Inexact[Array, "D N"],
    Inexact[Array, "D N"],
  ]:
    """The decays a, Δ, and b, c of hₜ = a hₜ₋₁ + Δ b xₜ, yₜ = Re c hₜ."""
    dt = jnp.exp(self.log_dt[...])
    A = self._held(self._A())
    rule = ops.zero_order_hold
    if self.discretization == "bilinear":
      rule = ops.bilinear
    a, gain = rule(A, jnp.ones_like(A), dt)
    b = gain / dt[:, None]
    if hasattr(self, "B"):
      b = b * whole(self.B[...])
    c = whole(self.C[...])
    if self.softmax_length is not None:
      c = c / self._total(A * dt[:, None])
    if self.paired and jnp.iscomplexobj(A):
      # The other half of the output is the conjugate of this one.
      c = 2 * c
    decays = Polarization(
      self.polarization.ones, self.polarization.zeros, "replace"
    )
    return polarize(a, decays), dt, b, c

  def _A(self):
    A = -jnp.exp(self.A_log[...])
    if hasattr(self, "A_imag"):
      A = lax.complex(A, self.A_imag[...])
    return jnp.broadcast_to(A, (self.C.shape[0], A.shape[1]))

  def _held(self, A):
    """A with 0 in the place of every polarized channel."""
    p = self.polarization
    if p.placement == "replace":
      A = A[:, p.ones : A.shape[1] - p.zeros]
    return jnp.pad(A, ((0, 0), (p.ones, p.zeros)))

  def _total(self, z):
    """Σ exp(zl) over l < L times (exp(z) - 1), for what has no z its limit."""
    p, count = self.polarization, z.shape[1]
    index = np.arange(count)[None]
    ones, zeros = index < p.ones, index >= count - p.zeros
    safe = jnp.where(ones | zeros, -1.0, z)
    total = jnp.expm1(safe * self.softmax_length)
    total = jnp.where(ones, float(self.softmax_length), total)
    return jnp.where(zeros, 1.0, total)


def log_uniform(key, shape, low: float, high: float) -> Float[Array, "..."]:
  """The logarithm of numbers log-uniform in [low, high]."""
  return jax.random.uniform(
    key, shape, jnp.float32, math.log(low), math.log(high)
  )


def complex_normal(key, shape) -> Float[Array, "*S 2"]:
  """Real and imaginary part, apart, of complex numbers of variance 1."""
  return jax.random.normal(key, (*shape, 2), jnp.float32) * 0.5**0.5


def whole(weight: Float[Array, "..."]) -> Inexact[Array, "..."]:
  """A weight as it is meant: complex if it is `[D, N, 2]`."""
  if weight.ndim == 2:
    return weight
  return lax.complex(weight[..., 0], weight[..., 1])


def _spectrum(name, size):
  """A and B, `[N]`."""
  n, order = np.arange(size), 2 * size
  if name == "legs":
    A, _, B, _ = ops.hippo_legs_dplr(order)
    return A[size:], B[size:]
  imag = {
    "lin": math.pi * n,
    "inv": order / math.pi * (order / (2 * n + 1) - 1),
    "real": 0 * n,
  }[name]
  A = -(n + 1.0) if name == "real" else -0.5 + 1j * imag
  return A, np.ones(size)
