"""Polarization: decays held at exactly 1 and exactly 0.

A state space model forgets (recency: every decay is below 1) and smooths
(every decay is above 0). One channel with decay 1 keeps a running sum of its
inputs for ever, one with decay 0 sees its own token only; together they mend
both (Wang et al. 2025, §6). Everything here is a pure map on decays, so it
serves every diagonal recurrence, not only Mamba's.
"""

import jax.numpy as jnp

from ssmjax.types import (
  Array,
  Inexact,
  Polarization,
  check_inexact,
  check_shapes,
  state_dtype,
)

__all__ = ["Polarization", "polarize", "polarize_log", "selective_decay"]


def polarize(
  a: Inexact[Array, "..."], polarization: Polarization, *, axis: int = -1
) -> Inexact[Array, "..."]:
  """Hold the first decays along `axis` at 1 and the last at 0.

  a'ₙ = 1 for n < ones,  a'ₙ = 0 for n ≥ N - zeros,  aₙ between

  Args:
    a: linear decays of any shape; for a model whose unit of decay is a head,
      `axis` is the axis of heads.
    polarization: how many, and whether they are added to the channels of `a`
      or take the place of some. With `placement="add"`, `axis` grows by
      ones + zeros.
    axis: the axis of channels.

  Returns:
    The polarized decays, of a's dtype. A replaced decay has gradient zero.

  Raises:
    ValueError: where more channels are replaced than there are, or for a
      compatibility mode, which is defined by A·Δ: see `selective_decay`.

  >>> polarize(jnp.array([0.5, 0.25]), Polarization(ones=1, zeros=1))
  Array([1.  , 0.5 , 0.25, 0.  ], dtype=float32)
  """
  return _with_constants("polarize", a, polarization, axis, one=1.0, zero=0.0)


def polarize_log(
  log_a: Inexact[Array, "..."], polarization: Polarization, *, axis: int = -1
) -> Inexact[Array, "..."]:
  """As `polarize`, for decays given by their logarithm.

  A one-channel has log-decay 0, a zero-channel -∞, whose exponential is
  exactly 0. Differences of cumulative sums must not meet the -∞ (∞ - ∞ is not
  a number): take the exponential first, or keep zero-channels out of the sum.

  Args:
    log_a: log-decays of any shape.
    polarization: see `polarize`.
    axis: the axis of channels.

  Returns:
    The polarized log-decays, of log_a's dtype.
  """
  return _with_constants(
    "polarize_log", log_a, polarization, axis, one=0.0, zero=-jnp.inf
  )


def selective_decay(
  delta: Inexact[Array, "*B D"],
  A: Inexact[Array, "D M"],
  polarization: Polarization | None = None,
) -> Inexact[Array, "*B D N"]:
  """The decays exp(ΔₜA) of an S6 layer, polarized.

  Aₜ = exp(Δₜ A) on learned channels, 1 on one-channels, 0 on zero-channels
  (Wang et al. 2025, Eq. 3 and App. E.5.1). The product is formed for learned
  channels only, so a zero-channel is exactly 0 whatever Δ is, Δ = 0 included.

  Args:
    delta: step sizes Δ after softplus, `[B, T, D]` or `[B, D]`.
    A: learned continuous decays, `[D, M]`, negative real part.
    polarization: None for none. The compatibility modes give exp(-100 Δ) and
      exp(-1000 Δ) in place of 0.

  Returns:
    `[B, T, D, N]` (or `[B, D, N]`), N as `polarization.total(M)`, float32 or
    wider. It is meant for inspection; the fused scans never form it.

  Raises:
    ValueError: where delta and A do not fit, or more channels are replaced
      than there are.
  """
  check_inexact("selective_decay", delta=delta, A=A)
  check_shapes(
    "selective_decay",
    {
      "A": (A, "D M"),
      "delta": (delta, " ".join(map(str, delta.shape[:-1])) + " D"),
    },
  )
  dtype = state_dtype(delta, A)
  A = A.astype(dtype).reshape((1,) * (delta.ndim - 1) + A.shape)
  delta = delta.astype(jnp.finfo(dtype).dtype)
  a = jnp.exp(delta[..., None].astype(dtype) * A)
  if polarization is None:
    return a
  if polarization.finite_zero is None:
    return polarize(a, polarization)
  leak = jnp.exp(delta * polarization.finite_zero)[..., None]
  leak = jnp.broadcast_to(leak, (*delta.shape, polarization.zeros))
  learned = _learned(a, polarization, -1)
  ones = _constant(a, a.ndim - 1, polarization.ones, 1)
  return jnp.concatenate([ones, learned, leak.astype(a.dtype)], -1)


def _with_constants(function, a, polarization, axis, one, zero):
  if polarization.finite_zero is not None:
    raise ValueError(
      f"{function}: zero_decay is {polarization.zero_decay!r}, expected"
      " 'exact'. The compatibility modes set A, not the decay: use"
      " selective_decay."
    )
  check_inexact(function, a=a)
  if not -a.ndim <= axis < a.ndim:
    raise ValueError(
      f"{function}: axis is {axis}, expected one of the {a.ndim} axes of the"
      f" decays, whose shape is {a.shape}."
    )
  axis = axis % a.ndim
  block = lambda count, value: _constant(a, axis, count, value)
  return jnp.concatenate(
    [
      block(polarization.ones, one),
      _learned(a, polarization, axis),
      block(polarization.zeros, zero),
    ],
    axis,
  )


def _constant(a, axis, count, value):
  """`count` channels of one value, divided by a mesh as those of `a` are."""
  shape = (*a.shape[:axis], count, *a.shape[axis + 1 :])
  zero = jnp.zeros_like(a).sum(axis, keepdims=True)
  return jnp.broadcast_to(zero + jnp.asarray(value, a.dtype), shape)


def _learned(a, polarization, axis):
  """The channels that stay learned."""
  channels = a.shape[axis]
  polarization.total(channels)
  if polarization.placement == "add":
    return a
  index = [slice(None)] * a.ndim
  index[axis] = slice(polarization.ones, channels - polarization.zeros)
  return a[tuple(index)]
