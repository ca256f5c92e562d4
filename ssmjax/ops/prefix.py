"""A linear recurrence by `jax.lax.associative_scan`, with restarts."""

import functools

import jax.numpy as jnp
from jax import lax

from ssmjax.types import Array, Bool, Inexact

__all__ = ["forget", "prefix_states"]


def prefix_states(
  a: Inexact[Array, "B T *S"],
  b: Inexact[Array, "B T *S"],
  state: Inexact[Array, "B *S"],
  restart: Bool[Array, "B T *R"] | None,
  *,
  reverse: bool = False,
) -> tuple[Inexact[Array, "B T *S"], Inexact[Array, "B *S"]]:
  """Compute hₜ = aₜ ∘ hₜ₋₁ + bₜ for all t at once, and the last state.

  Args:
    a: decays, broadcastable to b, of the state's dtype.
    b: inputs, `[B, T, *S]`.
    state: h₀, or h_{T+1} with `reverse`.
    restart: where the state is cleared first, with b's rank; None for nowhere.
    reverse: run from the last token to the first.
  """
  a = jnp.broadcast_to(a, b.shape)
  first = -1 if reverse else 0
  begins = None if restart is None else restart[:, first]
  carried = forget(a[:, first], begins) * forget(state, begins)
  b = b.at[:, first].add(carried)
  scan = functools.partial(lax.associative_scan, axis=1, reverse=reverse)
  if restart is None:
    _, h = scan(lambda l, r: (l[0] * r[0], r[0] * l[1] + r[1]), (a, b))
  else:
    # A piece with a restart in it has decay 0 and takes nothing from before.
    # Chosen on both sides of each product: its derivative is a product too.
    def combine(l, r):
      (a, b, cut), (c, d, cut_r) = l, r
      either = cut | cut_r
      return forget(a * c, either), c * forget(b, cut_r) + d, either

    _, h, _ = scan(combine, (forget(a, restart), b, restart))
  return h, h[:, 0 if reverse else -1]


def forget(state: Array, restart: Bool[Array, "..."] | None) -> Array:
  """0 where the state restarts, by choice: 0 times infinity is no 0."""
  if restart is None:
    return state
  return jnp.where(restart, jnp.zeros_like(state), state)
