"""The linear recurrence hₜ = aₜ hₜ₋₁ + bₜ, elementwise, of any shape."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from ssmjax.ops import dispatch
from ssmjax.ops.empty import any_rows
from ssmjax.ops.partition import divided
from ssmjax.ops.platform_passes import OTHERS, Passes
from ssmjax.ops.prefix import forget, prefix_states
from ssmjax.ops.scan_fused import flattened_kernel, fused
from ssmjax.ops.segments import segment_masks
from ssmjax.ops.varying import match_varying
from ssmjax.types import (
  Array,
  Inexact,
  Int,
  check_arrays,
  check_choice,
  check_inexact,
  check_segment_ids,
  check_shapes,
  state_dtype,
)

__all__ = ["linear_scan", "linear_scan_reference", "linear_step"]

Implementation = Literal["reference", "associative", "chunked", "pallas"]


def linear_scan(
  a: Inexact[Array, "B T *S"],
  b: Inexact[Array, "B T *S"],
  *,
  initial_state: Inexact[Array, "B *S"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  reverse: bool = False,
  implementation: Implementation | None = None,
) -> tuple[Inexact[Array, "B T *S"], Inexact[Array, "B *S"]]:
  """Run an elementwise linear recurrence over a sequence.

  hₜ = aₜ ∘ hₜ₋₁ + bₜ,  yₜ = hₜ

  With b = Δ·B·u and a = exp(ΔA) it is S6's state; with a = σ(g) an RG-LRU or
  minGRU; with a = 1 a running sum.

  Args:
    a: decays, broadcastable to b (same rank; an axis of 1 is shared), real or
      complex.
    b: inputs, `[B, T, *S]`.
    initial_state: h₀ (h_{T+1} with `reverse`), `[B, *S]`; zeros if None.
    segment_ids: `[B, T]` int, 1-based, 0 for padding: see `selective_scan`.
    reverse: run from the last token to the first.
    implementation: as in `selective_scan`.

  Returns:
    y `[B, T, *S]` of b's dtype (complex if a, b or the state is) and the
    final state `[B, *S]`, float32 or wider. Both carry gradients.

  Raises:
    ValueError: an argument of the wrong shape or dtype.
    NotImplementedError: `"pallas"` where there is no kernel; a second
      derivative of `"chunked"`, at differentiation.

  Source: Blelloch 1990, "Prefix sums and their applications", §1.4.

  >>> y, state = linear_scan(jnp.full((1, 3), 0.5), jnp.ones((1, 3)))
  >>> y
  Array([[1.  , 1.5 , 1.75]], dtype=float32)
  """
  _check("linear_scan", a, b, initial_state, segment_ids)
  check_choice("linear_scan", "implementation", implementation,
               (None, *dispatch.IMPLEMENTATIONS))  # fmt: skip
  return _linear_scan(
    a, b, initial_state, segment_ids, reverse=reverse,
    implementation=implementation,
  )  # fmt: skip


def linear_step(
  a: Inexact[Array, "B *S"],
  b: Inexact[Array, "B *S"],
  *,
  state: Inexact[Array, "B *S"],
  segment_ids: Int[Array, " B"] | None = None,
) -> tuple[Inexact[Array, "B *S"], Inexact[Array, "B *S"]]:
  """Advance `linear_scan` by one token: y, state, both `[B, *S]`."""
  _check("linear_step", a, b, state, segment_ids, time=False)
  valid = None if segment_ids is None else segment_ids > 0
  y_dtype = _y_dtype(a, b, state)
  state = state.astype(state_dtype(a, b, state))
  y, state = _token(state, a, b, valid, None)
  return y.astype(y_dtype), state


def linear_scan_reference(
  a: Inexact[Array, "B T *S"],
  b: Inexact[Array, "B T *S"],
  *,
  initial_state: Inexact[Array, "B *S"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  reverse: bool = False,
) -> tuple[Inexact[Array, "B T *S"], Inexact[Array, "B *S"]]:
  """Define `linear_scan`: a loop of `linear_step` over the tokens."""
  _check("linear_scan_reference", a, b, initial_state, segment_ids)
  dtype = state_dtype(a, b, initial_state)
  y_dtype = _y_dtype(a, b, initial_state)
  if initial_state is None:
    initial_state = jnp.zeros((b.shape[0], *b.shape[2:]), dtype)
  a = jnp.broadcast_to(a, (a.shape[0], b.shape[1], *a.shape[2:]))
  masks = segment_masks(segment_ids, reverse=reverse)
  time_first = lambda x: None if x is None else jnp.moveaxis(x, 1, 0)
  state, *xs = match_varying(
    initial_state.astype(dtype), *map(time_first, (a, b, *masks))
  )

  def step(state, token):
    y, state = _token(state, *token)
    return state, y

  state, y = lax.scan(step, state, tuple(xs), reverse=reverse)
  return jnp.moveaxis(y, 0, 1).astype(y_dtype), state


def _token(state, a, b, valid, restart):
  """One token of the definition; no time axis."""
  column = lambda mask: mask.reshape(mask.shape + (1,) * (b.ndim - 1))
  if valid is not None:
    a = jnp.where(column(valid), a, jnp.ones_like(a))
    b = jnp.where(column(valid), b, jnp.zeros_like(b))
  if restart is not None:
    state = jnp.where(column(restart), jnp.zeros_like(state), state)
  a, b = a.astype(_part(a, state)), b.astype(_part(b, state))
  # 1 · h + 0 is h to the bit, so padding leaves the state untouched.
  state = a.astype(state.dtype) * state + b.astype(state.dtype)
  if valid is None:
    return state, state
  return jnp.where(column(valid), state, jnp.zeros_like(state)), state


@functools.partial(jax.jit, static_argnames=("reverse", "implementation"))
@functools.partial(any_rows, place=1)
def _linear_scan(a, b, initial_state, segment_ids, *, reverse, implementation):
  """The scan of each device's part, if there are several."""

  def part(a, b, initial_state, segment_ids):
    if implementation == "reference":
      return linear_scan_reference(
        a, b, initial_state=initial_state, segment_ids=segment_ids,
        reverse=reverse,
      )  # fmt: skip
    return _dispatch(a, b, initial_state, segment_ids, reverse, implementation)

  of_tokens, of_state = ("rtd____"[: b.ndim], "rd____"[: b.ndim - 1])
  return divided(
    part, (a, b, initial_state, segment_ids),
    (of_tokens, of_tokens, of_state, "rt"), (of_tokens, of_state),
    only_typed=implementation in ("reference", "associative"),
  )  # fmt: skip


def _dispatch(a, b, initial_state, segment_ids, reverse, implementation):
  dtype = state_dtype(a, b, initial_state)
  state = initial_state
  if state is None:
    state = jnp.zeros((b.shape[0], *b.shape[2:]), dtype)
  masks = segment_masks(segment_ids, reverse=reverse)
  refused = None
  if jnp.issubdtype(dtype, jnp.complexfloating):
    refused = "has no kernel for complex a or b"
  elif dtype == jnp.dtype("float64"):
    refused = "has no kernel for float64"
  return dispatch.run(
    "linear_scan", implementation,
    *match_varying(a, b, state.astype(dtype), *masks),
    forms={"associative": _associative}, chunked=_CHUNKED, results=_RESULTS,
    fuse=fused, no_kernel=refused, adapt=flattened_kernel, reverse=reverse,
  )  # fmt: skip


def _associative(a, b, state, valid, restart, *, reverse):
  """All of T at once; differentiable to any order."""
  y_dtype = _y_dtype(a, b, state)
  a, b = _without_padding(a, b, state, valid)
  y, final = prefix_states(a, b, state, _wide(restart, b), reverse=reverse)
  return _zero_padding(y, valid).astype(y_dtype), final


def _without_padding(a, b, state, valid):
  """a and b in the state's dtype, 1 and 0 at padding."""
  a, b = a.astype(state.dtype), b.astype(state.dtype)
  if valid is None:
    return a, b
  valid = _wide(valid, b)
  return jnp.where(valid, a, 1), jnp.where(valid, b, 0)


def _zero_padding(y, valid):
  return y if valid is None else jnp.where(_wide(valid, y), y, 0)


def _wide(mask, b):
  """A mask `[B, T]` with b's rank, or None."""
  return None if mask is None else lax.expand_dims(mask, range(2, b.ndim))


def _forward_pass(scan, a, b, state, valid, restart, *, reverse, keep):
  """The forward pass of `scan_fused.fused`; it keeps every state."""
  y_dtype = _y_dtype(a, b, state)
  a = _by_row_or_shared(a, b)
  a, b = _without_padding(a, b, state, valid)
  y, final = scan(a, b, state, _wide(restart, b), reverse=reverse)
  kept = (y, state) if keep else None
  return _zero_padding(y, valid).astype(y_dtype), final, kept


def _backward_pass(adjoint, a, b, kept, valid, restart, dy, dfinal, *, reverse):
  """The backward pass of `scan_fused.fused`.

  gₜ = ȳₜ + aₜ₊₁ gₜ₊₁;  āₜ = gₜ hₜ₋₁,  b̄ₜ = gₜ;  h̄₀ = a₁ g₁
  """
  y, state = kept
  rows = _by_row_or_shared(a, b)
  wide, _ = _without_padding(rows, b, state, valid)
  dy = _zero_padding(dy.astype(state.dtype), valid)
  da, db, dstate = adjoint(
    wide, y, state, _wide(restart, b), dy, dfinal, reverse=reverse
  )
  da, db = _zero_padding(da, valid), _zero_padding(db, valid)
  # What shares a decay adds up: first where the mask had widened it, then the
  # rows of a group.
  da = _sum_to(da, rows.shape)
  da = da.reshape(a.shape[0], -1, *a.shape[1:]).sum(1)
  # A real argument of a complex recurrence has a real cotangent.
  real = lambda x, like: x if jnp.iscomplexobj(like) else x.real
  return real(da, a), real(db, b), dstate


def _by_row_or_shared(a, b):
  """Decays `[R, ...]` or `[1, ...]`, of any number of groups."""
  rows, groups = b.shape[0], a.shape[0]
  return a if groups in (1, rows) else jnp.repeat(a, rows // groups, 0)


def _kept_shapes(a, b, state, valid, restart, *, reverse):
  """The shapes of what `_forward_pass` keeps: every state, and the first."""
  like = lambda x: jax.ShapeDtypeStruct(x.shape, state.dtype)
  return like(b), like(state)


def _forward_results(a, b, state, valid, restart, *, reverse):
  """The shapes of y and of the final state."""
  y = jax.ShapeDtypeStruct(b.shape, _y_dtype(a, b, state))
  return y, jax.ShapeDtypeStruct(state.shape, state.dtype)


def _backward_results(a, b, kept, valid, restart, dy, dfinal, *, reverse):
  """The shapes of the cotangents of a, b and the initial state."""
  like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  return like(a), like(b), like(dfinal)


def _backward_associative(a, y, state, restart, dy, dfinal, *, reverse):
  full = jnp.broadcast_to(a, (a.shape[0], y.shape[1], *a.shape[2:]))
  # The decay into the token *after* t, and the state before t.
  after = _shift(full, jnp.ones_like(full[:, 0]), back=not reverse)
  before = _shift(y, state, back=reverse)
  cut = None
  if restart is not None:
    before = forget(before, restart)
    never = jnp.zeros_like(restart[:, 0])
    cut = _shift(restart, never, back=not reverse)
  # A cotangent in JAX pairs without conjugation, so complex a needs none.
  g, _ = prefix_states(after, dy, dfinal, cut, reverse=not reverse)
  da = _sum_to(g * before, a.shape)
  first = -1 if reverse else 0
  dstate = full[:, first] * g[:, first]
  return da, g, dstate


def _shift(x, end, *, back):
  """x one token later, or earlier with `back`; `end` fills the gap."""
  parts = (x[:, 1:], end[:, None]) if back else (end[:, None], x[:, :-1])
  return jnp.concatenate(parts, 1)


def _loop(a, b, state, restart, *, reverse):
  """One row of time after another, written in place."""
  length = b.shape[1]
  a = jnp.broadcast_to(a, (a.shape[0], length, *a.shape[2:]))

  def body(i, carry):
    h, y = carry
    t = length - 1 - i if reverse else i
    row = functools.partial(_row, t=t)
    h = row(a) * forget(h, row(restart)) + row(b)
    return h, lax.dynamic_update_index_in_dim(y, h, t, 1)

  h, y = lax.fori_loop(0, length, body, (state, jnp.zeros_like(b)))
  return y, h


def _backward_loop(a, y, state, restart, dy, dfinal, *, reverse):
  """The adjoint in the same manner: no shifted copy of a or y is made."""
  length = y.shape[1]
  shared = a.shape[1] == 1

  def body(i, carry):
    incoming, da, db = carry
    t = i if reverse else length - 1 - i
    previous = t + 1 if reverse else t - 1
    g = _row(dy, t) + incoming
    # The state before the first token is not in y; the index is clamped.
    before = jnp.where(i == length - 1, state, _row(y, previous))
    cut = _row(restart, t)
    at = 0 if shared else t
    part = _sum_to(g * forget(before, cut), (a.shape[0], *a.shape[2:]))
    if shared:
      part = part + _row(da, 0)
    da = lax.dynamic_update_index_in_dim(da, part, at, 1)
    db = lax.dynamic_update_index_in_dim(db, g, t, 1)
    return forget(_row(a, at) * g, cut), da, db

  zeros = (jnp.zeros_like(a), jnp.zeros_like(y))
  dstate, da, db = lax.fori_loop(0, length, body, (dfinal, *zeros))
  return da, db, dstate


def _row(x, t):
  """Time t of x, or None."""
  if x is None:
    return None
  return lax.dynamic_index_in_dim(x, t, 1, keepdims=False)


def _sum_to(x, shape):
  """Sum the axes that a broadcast of `shape` to x's shape had added to."""
  axes = tuple(
    i for i, (n, m) in enumerate(zip(shape, x.shape, strict=True)) if n != m
  )
  return x.sum(axes, keepdims=True) if axes else x


def _passes(scan, adjoint):
  return Passes(
    functools.partial(_forward_pass, scan),
    functools.partial(_backward_pass, adjoint),
    _kept_shapes,
    opaque=False,
  )


_RESULTS = (_forward_results, _backward_results)
_CHUNKED = {
  "cpu": _passes(_loop, _backward_loop),
  OTHERS: _passes(prefix_states, _backward_associative),
}


def _part(x, state):
  """x's own kind, real or complex, at the precision of the state."""
  return state.dtype if jnp.iscomplexobj(x) else jnp.finfo(state.dtype).dtype


def _y_dtype(a, b, state):
  dtype = state_dtype(a, b, state)
  if jnp.issubdtype(dtype, jnp.complexfloating) and not jnp.iscomplexobj(b):
    return dtype
  return b.dtype


def _check(function, a, b, state, segment_ids, *, time=True):
  state_name = "initial_state" if time else "state"
  check_arrays(function, a=a, b=b)
  if not time:
    check_arrays(function, state=state)
  check_inexact(function, a=a, b=b, **{state_name: state})
  shape, decay = jnp.shape(b), jnp.shape(a)
  axes = "B T" if time else "B"
  if len(shape) < len(axes.split()):
    expected = "(B, T, ...)" if time else "(B, ...)"
    raise ValueError(f"{function}: b has shape {shape}, expected {expected}.")
  if len(decay) != len(shape) or any(
    n not in (1, m) for n, m in zip(decay, shape, strict=True)
  ):
    raise ValueError(
      f"{function}: a has shape {decay}, expected {shape} or 1 along axes that"
      " b's other entries share. Add axes with a[..., None]."
    )
  if time and shape[1] == 0:
    raise ValueError(f"{function}: b has no time steps, expected T >= 1.")
  rest = " ".join(map(str, shape[len(axes.split()) :]))
  check_shapes(
    function,
    {
      "b": (b, f"{axes} {rest}"),
      state_name: (state, f"B {rest}"),
      "segment_ids": (segment_ids, axes),
    },
  )
  check_segment_ids(function, segment_ids)
