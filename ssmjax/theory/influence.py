"""The exact Jacobian of Eq. 1, factor by factor, and what it presupposes."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssmjax.theory.eq1 import canonical, outputs, states
from ssmjax.theory.extremes import largest
from ssmjax.theory.parallel import parallel_weights
from ssmjax.theory.premises import Premise, measure_premise
from ssmjax.types import (
  Array,
  Float,
  Inexact,
  Recurrence,
  gathered,
  real_dtype,
  state_dtype,
)

__all__ = [
  "Factors",
  "dependence_window",
  "influence_factors",
  "influence_sum",
  "locality_premise",
]


class Factors(NamedTuple):
  """What ∂yₜ/∂xₛ is made of; N is the product of the axes *S.

  Attributes:
    p: ∂yₜ/∂hₜ, `[B, T, D, N]`.
    q: ∂yₜ/∂h̄ₜ where h is complex, else None.
    a: decays, `[B, T, N]`.
    g: ∂hⱼ/∂xₛ at fixed hⱼ₋₁, at [j - s, s], `[B, W, T, N, M]`.
    d_a: ∂Aⱼ/∂xₛ, likewise.
    d_drive: ∂(Δⱼbⱼ)/∂xₛ, likewise.
    drive: Δₜbₜ, `[B, T, N]`.
    h0: h₀, `[B, N]`.
    real: whether y is real.
    window: W.
    local: that no part of Eq. 1 looks further back than W, nor ahead.
    channels: *S.
  """

  p: Inexact[Array, "B T D N"]
  q: Inexact[Array, "B T D N"] | None
  a: Inexact[Array, "B T N"]
  g: Inexact[Array, "B W T N M"]
  d_a: Inexact[Array, "B W T N M"]
  d_drive: Inexact[Array, "B W T N M"]
  drive: Inexact[Array, "B T N"]
  h0: Inexact[Array, "B N"]
  real: bool
  window: int
  local: Premise
  channels: tuple[int, ...]


@gathered
def dependence_window(
  layer: Callable[[Array], Recurrence], x: Float[Array, "B T M"]
) -> int:
  """Measure how many tokens back a token's part of Eq. 1 looks.

  The smallest W with ∂(Aₜ, Δₜbₜ, cₜ)/∂xₛ = 0 for every s ≤ t - W, cₜ at fixed
  states: 1 for Eq. 1 as it stands, the width of a short convolution before
  the recurrence, 3 for the Eq. 1 of RWKV-5 and 6. It is measured on this x, as
  `locality_premise` does, so that the Jacobian of the theorems on influence is
  exact along this x. `recency`, `polarized_recency` and
  `diagnostics.layer_influence` call this where no window is given.

  Args:
    layer: as in `recency`.
    x: as in `recency`, of more tokens than W.

  Returns:
    W, from 1 to T - 1 (1 of a single token).

  Raises:
    ValueError: no W is to be had: a part looks ahead, or back to the first
      token from the last (a normaliser that sums up the past, as in RWKV-4, or
      x is too short to tell), h₀ depends on x, a derivative is not finite, or
      x or the layer is traced by `jax.jit`. Also as in `recency`.

  >>> from ssmjax.theory import from_arrays
  >>> half = jnp.full((1, 5, 1), 0.5)
  >>> conv = lambda x: x + jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
  >>> dependence_window(lambda x: from_arrays(half, half, conv(x)), half)
  2
  """
  _check_input("dependence_window", x, None)
  return _window_of("dependence_window", _dependence(layer, x))


@gathered
def locality_premise(
  layer: Callable[[Array], Recurrence],
  x: Float[Array, "B T M"],
  *,
  window: int = 1,
) -> Premise:
  """Check that a token's part of Eq. 1 depends on no token but its own.

  Eq. 1 lets Aₜ, Δₜ, bₜ and cₜ depend on xₜ alone; with `window` W on the
  last W tokens. It is broken by RWKV-4 as the paper writes it (its Aₜ and Δₜ
  contain the normaliser Dₜ, a sum over the past), by a convolution wider than
  W, and by anything that looks ahead.

  Token by token, a random combination of all Aₜ, Δₜbₜ and cₜ (at fixed
  states) is differentiated by every token. The derivatives are exactly 0
  where nothing depends on it, and what lies outside of t's window is looked
  at. h₀ is no token's: if it depends on x, the premise fails at t = 1.

  Args:
    layer: as in `recency`.
    x: as in `recency`.
    window: W.

  Returns:
    The premise over the pairs [t, s], `[T, T]`; the excess is the size of the
    derivative there.

  Raises:
    ValueError: as in `recency`.
  """
  _check_input("locality_premise", x, window)
  if window is None:
    raise ValueError(
      "locality_premise: window is None, expected the one to be checked."
      " dependence_window finds the smallest for which the premise holds."
    )
  return _locality(_dependence(layer, x), window)


def influence_factors(
  function: str,
  layer: Callable[[Array], Recurrence],
  x: Float[Array, "B T M"],
  window: int | None,
) -> Factors:
  """Differentiate each token's part of Eq. 1 by the tokens in its window.

  Args:
    function: name for the messages.
    layer: as in `recency`.
    x: as in `recency`.
    window: W; None measures it.

  Returns:
    The factors of the Jacobian, and whether W is wide enough for them to be.

  Raises:
    ValueError: as in `recency`.
  """
  _check_input(function, x, window)
  dependence = _dependence(layer, x)
  if window is None:
    window = _window_of(function, dependence)
  # Not the one that is differentiated below: a readout may be a closure, whose
  # traced values must not outlive the trace.
  r = layer(x)
  d_a, d_drive = _token_derivatives(function, layer, x, window)
  a, dt, b, h0 = canonical(function, r)
  h = states(r)
  p, q, real = _readout_gradient(r, h)
  channels = b.shape[2:]
  flat = lambda v: v.reshape(*v.shape[:2], -1)
  before = jnp.concatenate([h0[:, None], h[:, :-1]], 1)
  later = jnp.minimum(
    jnp.arange(x.shape[1])[None] + jnp.arange(window)[:, None], x.shape[1] - 1
  )
  past = flat(before)[:, later][..., None]
  g = d_drive.astype(past.dtype) + d_a.astype(past.dtype) * past
  drive = dt.astype(h.dtype) * b.astype(h.dtype)
  return Factors(
    p, q, flat(a).astype(h.dtype), g, d_a, d_drive, flat(drive),
    h0.reshape(h0.shape[0], -1), real, window, _locality(dependence, window),
    channels,
  )  # fmt: skip


def influence_sum(
  factors: Factors, mask: Array | None = None
) -> Inexact[Array, "B T T D M"]:
  """Sum ∇cₜᵀ (Π Aᵣ) gⱼₛ over j and the channels of the mask `[B, N]`.

  Args:
    factors: of `influence_factors`.
    mask: channels to be counted; None for all.

  Returns:
    ∂yₜ/∂xₛ at [t, s], 0 where t < s + W: the readout's own dependence on x
    would have to be added there.
  """
  weights = parallel_weights(factors.a)
  length = weights.shape[1]
  carried = jnp.zeros((), weights.dtype)
  for j in range(factors.window):
    moved = jnp.pad(weights[:, :, j:], ((0, 0), (0, 0), (0, j), (0, 0)))
    carried = carried + moved[..., None] * factors.g[:, j, None]
  if mask is not None:
    carried = jnp.where(mask[:, None, None, :, None], carried, 0.0)
  dtype = state_dtype(factors.p, carried)
  total = jnp.einsum(
    "btdn,btsnm->btsdm", factors.p.astype(dtype), carried.astype(dtype)
  )
  if factors.q is not None:
    total = total + jnp.einsum(
      "btdn,btsnm->btsdm", factors.q.astype(dtype), carried.conj().astype(dtype)
    )
  times = jnp.arange(length)
  far = times[:, None] >= times[None] + factors.window
  total = jnp.where(far[None, :, :, None, None], total, jnp.zeros_like(total))
  return total.real if factors.real else total


def _check_input(function, x, window):
  if x.ndim != 3 or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      f"{function}: x has shape {x.shape} and dtype {x.dtype.name}, expected"
      " real (B, T, M). Pass real and imaginary parts side by side."
    )
  if 0 in x.shape:
    raise ValueError(
      f"{function}: x has shape {x.shape}, expected (B, T, M), none empty."
    )
  number = isinstance(window, int) and not isinstance(window, bool)
  if window is not None and not (number and 1 <= window <= x.shape[1]):
    raise ValueError(
      f"{function}: window is {window!r}, expected a number of tokens from 1"
      f" to T={x.shape[1]}, or None to measure it."
    )


def _dependence(layer, x):
  """The size of what t's part of Eq. 1 takes from token s, `[T, T]`."""
  # Compiled as one: outside of jit each operation would be compiled alone.
  return jax.jit(functools.partial(_measure_dependence, layer))(x)


def _measure_dependence(layer, x):
  h = states(layer(x))
  times = jnp.arange(x.shape[1])

  def parts(x):
    r = layer(x)
    a, dt, b, h0 = canonical("dependence_window", r)
    dtype = state_dtype(dt, b)
    drive = dt.astype(dtype) * b.astype(dtype)
    by_token = _real_parts(a, drive, outputs(r, h))
    return by_token, _real_parts(h0)

  values, pull = jax.vjp(parts, x)
  leaves, tree = jax.tree.flatten(values)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  weights = tree.unflatten([
    jax.random.normal(key, v.shape, v.dtype)
    for key, v in zip(keys, leaves, strict=True)
  ])  # fmt: skip

  def moved(by_token, start):
    # Of what the seeds leave: 0 · inf would be NaN for every token.
    (moved,) = pull((tuple(by_token), tuple(start)))
    return largest(jnp.abs(moved), (0, 2))

  by_token, start = weights
  nothing = [jnp.zeros_like(v) for v in start]

  def row(t):
    here = lambda v: (times == t).reshape(1, -1, *(1,) * (v.ndim - 2))
    seeds = [jnp.where(here(v), v, jnp.zeros_like(v)) for v in by_token]
    return moved(seeds, nothing)

  rows = jax.lax.map(row, times)
  # h₀ enters with the first token, before which there is none: all of what it
  # takes from tokens counts as looking ahead.
  ahead = largest(moved([jnp.zeros_like(v) for v in by_token], start))
  if len(times) == 1:
    return rows
  return rows.at[0, -1].set(jnp.maximum(rows[0, -1], ahead))


def _locality(dependence, window):
  times = jnp.arange(len(dependence))
  lag = times[:, None] - times[None]
  inside = (lag >= 0) & (lag < window)
  excess = jnp.where(inside, jnp.zeros_like(dependence), dependence)
  return measure_premise(excess <= 0, excess.astype(jnp.float32), 2)


def _window_of(function, dependence):
  """W by what was measured; ValueError where there is none to be had."""
  give = "Pass window= a number of tokens"
  if isinstance(dependence, jax.core.Tracer):
    raise ValueError(
      f"{function}: window is None, but x or the layer is traced by jax.jit or"
      f" another transformation, where none can be measured. {give}, such as"
      " theory.dependence_window(layer, x) outside of it."
    )
  found = np.asarray(dependence)
  if not np.isfinite(found).all():
    t, s = np.argwhere(~np.isfinite(found))[0]
    raise ValueError(
      f"{function}: what token {t} takes from token {s} has a derivative that"
      f" is not finite, expected finite ones to measure the window by. {give}."
    )
  t, s = np.nonzero(found)
  if (s > t).any():
    raise ValueError(
      f"{function}: token {t[s > t][0]} (or the initial state) depends on"
      f" token {s[s > t][0]}, expected no later one: the layer is not of Eq. 1."
    )
  window = int((t - s).max(initial=0)) + 1
  length = len(found)
  if window == length > 1:
    raise ValueError(
      f"{function}: the last of T={length} tokens depends on the first other"
      " than through the state, expected a window of fewer tokens. The layer"
      " looks back without end, as a normaliser does (RWKV-4's), or x is too"
      f" short to tell: pass one of more tokens. {give} to go on regardless."
    )
  return window


def _readout_gradient(r, h):
  """∂y/∂h and ∂y/∂h̄ at every t, and whether y is real."""
  complex_state = jnp.iscomplexobj(h)
  shape = jax.eval_shape(r.readout, h[:, 0], jnp.int32(0))
  real = not jnp.iscomplexobj(shape)
  dtype = real_dtype(h, shape)

  def parts(v):
    pair = (v.real, v.imag) if jnp.iscomplexobj(v) else (v,)
    return tuple(part.astype(dtype) for part in pair)

  def gradient(h_t, t):
    def read(*state):
      return parts(
        r.readout(jax.lax.complex(*state) if complex_state else state[0], t)
      )

    state = parts(h_t)
    y, pull = jax.vjp(read, *state)
    unit = jnp.eye(y[0].shape[-1], dtype=dtype)[:, None]
    unit = jnp.broadcast_to(unit, (unit.shape[0], *y[0].shape))
    by_part = []
    for k in range(len(y)):
      seeds = tuple(
        unit if i == k else jnp.zeros_like(unit) for i in range(len(y))
      )
      by_part.append(jax.vmap(pull)(seeds))
    if real:
      return by_part[0]
    return tuple(map(jax.lax.complex, *by_part))

  grads = jax.vmap(gradient, (1, 0), 1)(h, jnp.arange(h.shape[1]))
  # [D, T, B, *S] to [B, T, D, N].
  grads = [v.reshape(*v.shape[:3], -1) for v in grads]
  grads = [jnp.transpose(v, (2, 1, 0, 3)) for v in grads]
  if not complex_state:
    return grads[0], None, real
  by_real, by_imaginary = (_complex(v) for v in grads)
  p = (by_real - 1j * by_imaginary) / 2
  q = (by_real + 1j * by_imaginary) / 2
  return p, q, real


def _complex(v):
  return v if jnp.iscomplexobj(v) else jax.lax.complex(v, jnp.zeros_like(v))


def _token_derivatives(function, layer, x, window):
  """∂Aⱼ/∂xₛ and ∂(Δⱼbⱼ)/∂xₛ at [j - s, s], `[B, W, T, N, M]`.

  Times j that are W apart share a derivative: no s is in the windows of both.
  """
  length = x.shape[1]

  def parts(x):
    r = layer(x)
    a, dt, b, _ = canonical(function, r)
    dtype = state_dtype(dt, b)
    flat = lambda v: v.reshape(*v.shape[:2], -1)
    a, drive = flat(a), flat(dt.astype(dtype) * b.astype(dtype))
    return _real_parts(a), _real_parts(drive)

  # Reverse mode, a channel at a time: fused layers know no other.
  values, pull = jax.vjp(parts, x)
  leaves, tree = jax.tree.flatten(values)
  offsets = jnp.arange(length)[None] % window == jnp.arange(window)[:, None]

  def derivative(channel):
    seeds = []
    for k, v in enumerate(leaves):
      here = jnp.arange(v.shape[2]) == channel
      here = (offsets[:, None, :, None] & here[None, None, None]).astype(
        v.dtype
      )
      here = jnp.broadcast_to(here, (window, *v.shape))
      before, after = k * window, (len(leaves) - 1 - k) * window
      seeds.append(jnp.pad(here, ((before, after), *((0, 0),) * v.ndim)))
    return jax.vmap(lambda *seeds: pull(tree.unflatten(seeds))[0])(*seeds)

  moved = jax.lax.map(derivative, jnp.arange(leaves[0].shape[2]))
  moved = moved.reshape(moved.shape[0], len(leaves), window, *x.shape)
  start = jnp.arange(length)[None]
  later = start + jnp.arange(window)[:, None]
  exists = (later < length)[None, :, :, None, None]
  start = jnp.broadcast_to(start, later.shape)

  def gather(v):
    # [N, W, B, T, M] at [:, j % W, :, s] is [j - s, s, N, B, M].
    v = v[:, later % window, :, start]
    v = jnp.transpose(v, (3, 0, 1, 2, 4))
    return jnp.where(exists, v, jnp.zeros_like(v))

  each = tree.unflatten([gather(moved[:, k]) for k in range(len(leaves))])
  whole = lambda v: jax.lax.complex(*v) if len(v) == 2 else v[0]
  return tuple(map(whole, each))


def _real_parts(*values):
  """Every array, or its real and imaginary parts: vjp as one would expect."""
  parts = []
  for v in values:
    parts += [v.real, v.imag] if jnp.iscomplexobj(v) else [v]
  return tuple(parts)
