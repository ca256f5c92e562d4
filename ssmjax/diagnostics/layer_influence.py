"""The influence of token on token in one layer, taken apart."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ssmjax.diagnostics.norms import norm
from ssmjax.theory import Premise, outputs, parallel_weights
from ssmjax.theory.eq1 import canonical
from ssmjax.theory.extremes import largest
from ssmjax.theory.influence import influence_factors, influence_sum
from ssmjax.types import (
  Array,
  Float,
  Inexact,
  Recurrence,
  gathered,
  state_dtype,
)

__all__ = [
  "LayerInfluence",
  "autodiff_jacobian",
  "layer_influence",
  "log_a_max",
  "log_decay",
]


class LayerInfluence(NamedTuple):
  """|∂yₜ/∂xₛ| of one layer in three ways, at [t, s], `[B, T, T]`.

  Attributes:
    decay: maxₙ |Π_{r=s+1}^t (Aᵣ)ₙₙ|, the closed form of what Theorem 3.1 is
      about: 1 at t = s, 0 where s > t.
    kernel: ∇cₜᵀ (Π_{r=s+1}^t Aᵣ) Δₛbₛ, signed, for each output,
      `[B, T, T, D]`: what token s has written and token t reads. Where the
      readout is linear in the state, its sum over s is yₜ less what does not
      pass through the state (and less h₀'s part).
    closed_form: ‖∂yₜ/∂xₛ‖_F by the factorised Jacobian of `theory.recency`,
      which holds for t ≥ s + W; 0 elsewhere.
    autodiff: ‖∂yₜ/∂xₛ‖_F by reverse-mode differentiation of the same layer,
      skip connection, gate and lags below W included.
    log_a_max: log max |(Aₜ)ₙₙ| over n and t ≥ 2, `[B]`.
    window: W.
    local: the premise of `closed_form`: no part of the layer's Eq. 1 looks
      further back than W, nor ahead.
  """

  decay: Float[Array, "B T T"]
  kernel: Inexact[Array, "B T T D"]
  closed_form: Float[Array, "B T T"]
  autodiff: Float[Array, "B T T"]
  log_a_max: Float[Array, " B"]
  window: int
  local: Premise


@gathered
def layer_influence(
  layer: Callable[[Array], Recurrence],
  x: Float[Array, "B T M"],
  *,
  window: int | None = None,
) -> LayerInfluence:
  """Measure the influence of every token on every other in one layer.

  ∂yₜ/∂xₛ = ∇cₜ(hₜ)ᵀ (Π_{r=s+1}^t Aᵣ) gₛ,  gₛ = ∂(Δₛbₛ)/∂xₛ + (∂Aₛ/∂xₛ)hₛ₋₁

  The closed form and autodiff agree for t ≥ s + W; that they do says that the
  layer is Eq. 1, with all of its dependence on x within its window.

  Args:
    layer: maps x to the layer's recurrence on it, such as a mixer's
      `recurrence`; each row for itself.
    x: real inputs, `[B, T, M]`.
    window: W, tokens back (itself included) on which a token's Aₜ, Δₜ, bₜ and
      cₜ depend: 1 for Eq. 1 as it stands, d_conv with a short convolution.
      None measures it by `theory.dependence_window`, which takes values: under
      `jax.jit` it has to be given.

  Returns:
    All of them; memory O(T²(D + N)M), for small layers. `log_decay` and
    `influence` do large ones.

  Raises:
    ValueError: x is not real of shape `[B, T, M]`, window does not fit, or it
      is None and none can be measured.

  Source: Wang et al. 2025, Theorem D.2; the kernel, Ali et al. 2024 (arXiv
  2403.01590), there for S6.
  """
  factors = influence_factors("layer_influence", layer, x, window)
  weights = parallel_weights(factors.a)
  written = weights * factors.drive[:, None].astype(weights.dtype)
  contract = lambda p, v: jnp.einsum(
    "btdn,btsn->btsd", p.astype(state_dtype(p, v)), v.astype(state_dtype(p, v))
  )
  kernel = contract(factors.p, written)
  if factors.q is not None:
    kernel = kernel + contract(factors.q, written.conj())
  shape = (*factors.a.shape[:2], *factors.channels)
  return LayerInfluence(
    decay=largest(jnp.abs(weights), -1),
    kernel=kernel.real if factors.real else kernel,
    closed_form=norm(influence_sum(factors), (-1, -2)),
    autodiff=norm(autodiff_jacobian(layer, x), (-1, -2)),
    log_a_max=_log_a_max(factors.a.reshape(shape)),
    window=factors.window,
    local=factors.local,
  )


@gathered
def autodiff_jacobian(
  layer: Callable[[Array], Recurrence], x: Float[Array, "B T M"]
) -> Inexact[Array, "B T T D M"]:
  """Differentiate a layer's outputs, run as Eq. 1 is written, by its inputs.

  Args:
    layer: as in `layer_influence`.
    x: as in `layer_influence`.

  Returns:
    ∂yₜ/∂xₛ at [t, s, output, input]; complex where y is. Reverse mode, a pair
    of time and output after the other: memory O(T²DM).
  """

  def parts(x):
    y = outputs(layer(x))
    return (y.real, y.imag) if jnp.iscomplexobj(y) else (y,)

  y, pull = jax.vjp(parts, x)
  _, length, width = y[0].shape

  def row(index):
    t, d = index // width, index % width
    grads = []
    for k in range(len(y)):
      seeds = [jnp.zeros_like(v) for v in y]
      seeds[k] = seeds[k].at[:, t, d].set(1)
      grads.append(pull(tuple(seeds))[0])
    return jax.lax.complex(*grads) if len(grads) == 2 else grads[0]

  rows = jax.lax.map(row, jnp.arange(length * width))
  rows = rows.reshape(length, width, *x.shape)
  return jnp.transpose(rows, (2, 0, 3, 1, 4))


@gathered
def log_decay(recurrence: Recurrence, time: int = -1) -> Float[Array, "B T *S"]:
  """Evaluate the closed form's logarithm for one t and every s, in O(T).

  log |Π_{r=s+1}^t (Aᵣ)ₙₙ| = Σ_{r=s+1}^t log |(Aᵣ)ₙₙ|

  In the logarithm far products do not underflow: at lag 16,000 and A = 1/2
  the product is 10⁻⁴⁸¹⁶.

  Args:
    recurrence: of real or complex decays.
    time: t; negative from the end.

  Returns:
    `[B, T, *S]`: 0 at s = t, -inf where s > t or a decay between is 0.

  Raises:
    ValueError: a time outside the sequence.
  """
  a = canonical("log_decay", recurrence)[0]
  length = a.shape[1]
  if not -length <= time < length:
    raise ValueError(
      f"log_decay: time is {time}, expected {-length} to {length - 1}."
    )
  time = time % length
  logs = jnp.log(jnp.abs(a[:, 1 : time + 1]))
  sums = jnp.cumsum(logs[:, ::-1], 1)[:, ::-1]
  sums = jnp.concatenate([sums, jnp.zeros_like(a[:, :1].real)], 1)
  after = ((0, 0), (0, length - 1 - time), *((0, 0),) * (a.ndim - 2))
  return jnp.pad(sums, after, constant_values=-jnp.inf)


@gathered
def log_a_max(recurrence: Recurrence) -> Float[Array, " B"]:
  """Find log A_max, the slope that Theorem 3.1 allows: max over n and t ≥ 2.

  0 for a layer with a channel of decay 1, -inf for a single token.
  """
  return _log_a_max(canonical("log_a_max", recurrence)[0])


def _log_a_max(a):
  if a.shape[1] == 1:
    return jnp.full(a.shape[:1], -jnp.inf, a.real.dtype)
  return jnp.log(largest(jnp.abs(a[:, 1:]), tuple(range(1, a.ndim))))
