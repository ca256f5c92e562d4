"""Eq. 1 itself, and other ways to write the same layer.

hₜ = Aₜ hₜ₋₁ + Δₜ bₜ(xₜ),  yₜ = cₜ(hₜ)   (Wang et al. 2025, arXiv 2501.00658)

Every function of this room takes the `Recurrence` that a layer shows on a
given input, or one made of bare arrays by `from_arrays`. A row of the batch is
a sequence of its own, and the axes `*S` together are the paper's channels n.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ssmjax.types import (
  Array,
  Inexact,
  Recurrence,
  check_inexact,
  gathered,
  real_dtype,
  state_dtype,
)

__all__ = [
  "canonical",
  "from_arrays",
  "outputs",
  "rotating_frame",
  "states",
  "zero_order_hold",
]


@gathered
def from_arrays(
  a: Inexact[Array, "B T *S"],
  dt: Inexact[Array, "B T *S"],
  b: Inexact[Array, "B T *S"],
  c: Inexact[Array, "B T *S"] | None = None,
  *,
  initial_state: Inexact[Array, "B *S"] | None = None,
) -> Recurrence:
  """Make a `Recurrence` of Eq. 1's four arrays.

  hₜ = aₜ ∘ hₜ₋₁ + dtₜ ∘ bₜ,  yₜ = Σₙ cₜₙ hₜₙ

  Args:
    a: decays, real or complex, broadcastable to b (same rank).
    dt: step sizes Δ, broadcastable to b (same rank).
    b: inputs, `[B, T, *S]`, real or complex.
    c: output weights, broadcastable to b (same rank); not conjugated. Without
      them y is the state itself.
    initial_state: h₀, `[B, *S]`; zeros if None (the paper's).

  Returns:
    The recurrence, whose readout gives `[B, 1]`, or `[B, N]` without c.

  Raises:
    ValueError: a shape that does not fit or an integer dtype.

  >>> half = jnp.full((1, 3, 1), 0.5)
  >>> states(from_arrays(half, half, jnp.ones((1, 3, 1)))).ravel()
  Array([0.5  , 0.75 , 0.875], dtype=float32)
  """
  check_inexact("from_arrays", a=a, dt=dt, b=b, c=c)
  if initial_state is None:
    initial_state = jnp.zeros((b.shape[0], *b.shape[2:]), state_dtype(a, b))
  if c is not None:
    _check_fits("from_arrays", "c", c, b)
    c = jnp.broadcast_to(c, b.shape)
  readout = jax.tree_util.Partial(_weigh if c is not None else _flatten, c)
  recurrence = Recurrence(a, dt, b, initial_state, readout)
  _check("from_arrays", recurrence)
  return Recurrence(jnp.broadcast_to(a, b.shape), dt, b, initial_state, readout)


def canonical(
  function: str, recurrence: Recurrence, *, real_decay: bool = False
) -> tuple[Array, Array, Array, Array]:
  """The arrays a, dt, b, h₀ in float32 or wider, dt broadcast to b's shape.

  Args:
    function: name for the messages.
    recurrence: to be checked.
    real_decay: refuse complex decays and complex steps.

  Returns:
    a and b `[B, T, *S]`, each complex only if it was; dt `[B, T, *S]`, of
    the same kind; h₀ `[B, *S]` of the state's dtype.

  Raises:
    ValueError: shapes that do not fit, an integer dtype, or a complex decay
      where a real one is needed.
  """
  r = recurrence
  _check(function, r)
  if real_decay and jnp.iscomplexobj(r.a):
    raise ValueError(
      f"{function}: a is complex, expected real decays: the theorem is false"
      " for complex ones. Pass rotating_frame(recurrence)."
    )
  if real_decay and jnp.iscomplexobj(r.dt):
    raise ValueError(
      f"{function}: dt is complex, expected real steps. Let b have the factor."
    )
  real = real_dtype(r.a, r.dt, r.b, r.initial_state)
  wide = lambda v: v.astype(state_dtype(v, jnp.zeros((), real)))
  dt = jnp.broadcast_to(wide(r.dt), r.b.shape)
  h = r.initial_state.astype(state_dtype(r.a, r.dt, r.b, r.initial_state))
  return jnp.broadcast_to(wide(r.a), r.b.shape), dt, wide(r.b), h


@gathered
def states(recurrence: Recurrence) -> Inexact[Array, "B T *S"]:
  """Run Eq. 1 as it is written, token by token: h₁ to h_T."""
  a, dt, b, h = canonical("states", recurrence)
  drive = dt.astype(h.dtype) * b.astype(h.dtype)

  def step(h, token):
    h = token[0] * h + token[1]
    return h, h

  time_first = lambda v: jnp.moveaxis(v, 1, 0)
  xs = time_first(a.astype(h.dtype)), time_first(drive)
  return jnp.moveaxis(lax.scan(step, h, xs)[1], 0, 1)


@gathered
def outputs(
  recurrence: Recurrence, h: Inexact[Array, "B T *S"] | None = None
) -> Inexact[Array, "B T D"]:
  """Read every yₜ = cₜ(hₜ) from the states `h`, by default the layer's own."""
  if h is None:
    h = states(recurrence)
  times = jnp.arange(h.shape[1])
  return jax.vmap(recurrence.readout, (1, 0), 1)(h, times)


@gathered
def rotating_frame(recurrence: Recurrence) -> Recurrence:
  """Write a layer of complex decays as one whose decays are their moduli.

  With uₜ = Π_{r≤t} aᵣ/|aᵣ| (1 where aᵣ = 0), h̃ₜ = ūₜ hₜ obeys

    h̃ₜ = |aₜ| h̃ₜ₋₁ + Δₜ ūₜ bₜ,   yₜ = cₜ(uₜ h̃ₜ),

  for ūₜ aₜ uₜ₋₁ = |aₜ|. |h̃ₜ| = |hₜ|, so whatever is shown of sizes holds of
  the layer itself, and spreads are those that an observer sees who turns with
  the state. The paper states Theorem 4.2 for real decays alone. It is false
  for complex and for negative ones: bₜ = exp(iωt) through a decay
  α exp(iω), Δ = 1 - α and h₁ = b₁ gives hₜ = bₜ, which is not smoothed at all.
  In the rotating frame it is a theorem again.

  Args:
    recurrence: of real or complex decays; negative ones turn by -1.

  Returns:
    The same layer, with the same outputs, in its rotating frame.
  """
  a, dt, b, h = canonical("rotating_frame", recurrence)
  size = jnp.abs(a)
  some = size > 0
  unit = jnp.where(
    some, a / jnp.where(some, size, 1.0).astype(a.dtype), jnp.ones_like(a)
  )
  turn = lax.associative_scan(jnp.multiply, unit, axis=1)
  turn = turn / jnp.abs(turn).astype(turn.dtype)
  # A real turn is ±1 and leaves a real input real.
  turned = turn.conj().astype(state_dtype(b, turn))
  readout = jax.tree_util.Partial(_turned_back, recurrence.readout, turn)
  return Recurrence(size, dt, turned * b.astype(turned.dtype), h, readout)


@gathered
def zero_order_hold(recurrence: Recurrence) -> Recurrence:
  """Discretise the same layer exactly, where it has taken an Euler step.

  A layer whose decay is a = exp(-ρΔ) and whose input is Δb (S6, Mamba-2) has
  Euler's input; that of a held input is Δ̄b with Δ̄ = (1 - a)/ρ, and
  a + ρΔ̄ = 1. Writing Δ̄b = (1 - a)(b/ρ), the layer is

    hₜ = aₜ hₜ₋₁ + (1 - aₜ)(bₜ/ρ),   ρ = -log(aₜ)/Δₜ,

  which meets A + Δ ≤ 1 with equality whatever Δ is, so that Theorem 4.2 (ii)
  applies to every channel whose b is centred (ρ is constant over time in
  those layers). Polarized channels, whose decay is exactly 0 or 1, are kept.

  Args:
    recurrence: of real decays in [0, 1].

  Returns:
    The layer with dt = 1 - a and b/ρ; the readout is the same.
  """
  a, dt, b, h = canonical("zero_order_hold", recurrence, real_decay=True)
  kept = (a == 0) | (a == 1)
  inner = jnp.where(kept, jnp.full_like(a, 0.5), a)
  scale = jnp.where(kept, jnp.ones_like(a), -dt / jnp.log(inner))
  step = jnp.where(kept, dt, 1 - inner)
  return Recurrence(a, step, scale.astype(b.dtype) * b, h, recurrence.readout)


def _check(function, r):
  check_inexact(function, a=r.a, dt=r.dt, b=r.b)
  if r.b.ndim < 2 or 0 in r.b.shape:
    raise ValueError(
      f"{function}: b has shape {r.b.shape}, expected (B, T, *S) with at least"
      " one token and one channel."
    )
  _check_fits(function, "a", r.a, r.b)
  _check_fits(function, "dt", r.dt, r.b)
  expected = (r.b.shape[0], *r.b.shape[2:])
  if r.initial_state.shape != expected:
    raise ValueError(
      f"{function}: initial_state has shape {r.initial_state.shape}, expected"
      f" {expected}, that of b without time."
    )


def _check_fits(function, name, value, b):
  fits = value.ndim == b.ndim and all(
    n in (1, m) for n, m in zip(value.shape, b.shape, strict=True)
  )
  if not fits:
    raise ValueError(
      f"{function}: {name} has shape {value.shape}, expected one that"
      f" broadcasts to b's {b.shape} and has its rank."
    )


def _weigh(c: Any, h, t):
  c = lax.dynamic_index_in_dim(c, t, 1, keepdims=False)
  dtype = state_dtype(c, h)
  y = c.astype(dtype) * h.astype(dtype)
  return y.sum(tuple(range(1, y.ndim)))[:, None]


def _flatten(_, h, t):
  del t
  return h.reshape(h.shape[0], -1)


def _turned_back(readout, turn, h, t):
  turn = lax.dynamic_index_in_dim(turn, t, 1, keepdims=False)
  dtype = state_dtype(h, turn)
  return readout(turn.astype(dtype) * h.astype(dtype), t)
