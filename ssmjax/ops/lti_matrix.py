"""The recurrence of a time-invariant system whose A is a matrix (S4, LMU)."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from ssmjax.ops.lti_blocks import last_chunk, taps
from ssmjax.ops.partition import divided
from ssmjax.ops.segments import compacted, permute, segment_masks
from ssmjax.ops.varying import match_varying
from ssmjax.types import (
  Array,
  Float,
  Int,
  check_arrays,
  check_choice,
  check_inexact,
  check_segment_ids,
  check_shapes,
  real_dtype,
)

__all__ = ["lti_matrix_scan", "lti_matrix_scan_reference", "lti_matrix_step"]

# Tokens between two states in memory.
_CHUNK = 64


def lti_matrix_scan(
  x: Float[Array, "B T D"],
  a: Float[Array, "D N N"],
  b: Float[Array, "D N"],
  c: Float[Array, "D R N"],
  *,
  initial_state: Float[Array, "B D N"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  implementation: Literal["reference", "chunked"] | None = None,
) -> tuple[Float[Array, "B T D R"], Float[Array, "B D N"]]:
  """Run a time-invariant recurrence of a dense matrix in every channel.

  hₜ = a hₜ₋₁ + b xₜ,  yₜ = c hₜ

  `"chunked"` keeps one state in 64 tokens: from chunk to chunk it is a product
  with a⁶⁴, and both ways between states and tokens are products with tables of
  c aʲ, aʲb and c aʲb, made by doubling. A complex system is one of twice the
  size: [[Re a, -Im a], [Im a, Re a]].

  Args:
    x: inputs, `[B, T, D]`.
    a: matrices of one step, `[D, N, N]`, of a stable system (of powers that do
      not grow).
    b: input weights, `[D, N]`.
    c: R output weights, `[D, R, N]`; the identity for the states themselves.
    initial_state: h₀, `[B, D, N]`; zeros if None.
    segment_ids: `[B, T]` int, 1-based, 0 for padding: see `selective_scan`.
      What is not finite goes to later tokens of its document only; gradients
      of a, b and c are not finite then. (Without ids `"chunked"` may make NaN
      of up to 63 tokens before it, too.)
    implementation: `None` and `"chunked"` are differentiable to any order, as
      is `"reference"`.

  Returns:
    y `[B, T, D, R]` of x's dtype, and the final state `[B, D, N]`, float32 or
    wider. Both carry gradients.

  Raises:
    ValueError: an argument of the wrong shape or dtype.

  Source: Gu et al. 2021, LSSL (arXiv 2110.13985), Eq. 3; Chilkuri & Eliasmith
  2021 (arXiv 2102.11417), Eq. 19.

  >>> half = jnp.full((1, 1, 1), 0.5)
  >>> lti_matrix_scan(
  ...   jnp.ones((1, 3, 1)), half, jnp.ones((1, 1)), 2 * half
  ... )[0].ravel()
  Array([1.  , 1.5 , 1.75], dtype=float32)
  """
  _check("lti_matrix_scan", x, a, b, c, initial_state, segment_ids)
  check_choice(
    "lti_matrix_scan",
    "implementation",
    implementation,
    (None, "reference", "chunked"),
  )
  return _scan(x, a, b, c, initial_state, segment_ids, implementation)


def lti_matrix_step(
  x: Float[Array, "B D"],
  a: Float[Array, "D N N"],
  b: Float[Array, "D N"],
  c: Float[Array, "D R N"],
  *,
  state: Float[Array, "B D N"],
  segment_ids: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B D R"], Float[Array, "B D N"]]:
  """Advance `lti_matrix_scan` by one token: y `[B, D, R]` and the state."""
  _check("lti_matrix_step", x, a, b, c, state, segment_ids, time=False)
  valid = None if segment_ids is None else segment_ids > 0
  state = state.astype(real_dtype(x, a, b, c, state))
  a, b, c = (v.astype(state.dtype) for v in (a, b, c))
  state, y = _token(state, (x, valid, None), a, b, c)
  return y, state


def lti_matrix_scan_reference(
  x: Float[Array, "B T D"],
  a: Float[Array, "D N N"],
  b: Float[Array, "D N"],
  c: Float[Array, "D R N"],
  *,
  initial_state: Float[Array, "B D N"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D R"], Float[Array, "B D N"]]:
  """Define `lti_matrix_scan`: a loop of `lti_matrix_step` over the tokens."""
  _check("lti_matrix_scan_reference", x, a, b, c, initial_state, segment_ids)
  return _scan(x, a, b, c, initial_state, segment_ids, "reference")


def _loop(x, a, b, c, initial_state, segment_ids):
  state = _initial(x, a, b, c, initial_state)
  a, b, c = (v.astype(state.dtype) for v in (a, b, c))
  masks = segment_masks(segment_ids)
  time_first = lambda x: None if x is None else jnp.moveaxis(x, 1, 0)
  state, a, b, c, *xs = match_varying(
    state, a, b, c, *map(time_first, (x, *masks))
  )
  state, y = lax.scan(
    lambda state, token: _token(state, token, a, b, c), state, tuple(xs)
  )
  return jnp.moveaxis(y, 0, 1), state


def _token(state, token, a, b, c):
  """One token of the definition; no time axis."""
  x, valid, restart = token
  y_dtype = x.dtype
  x = x.astype(state.dtype)
  if valid is not None:
    x = jnp.where(valid[:, None], x, 0)
  old = state
  if restart is not None:
    old = jnp.where(restart[:, None, None], 0, old)
  new = _einsum("dnm,bdm->bdn", a, old) + b[None] * x[..., None]
  y = _einsum("drn,bdn->bdr", c, new)
  if valid is not None:
    y = jnp.where(valid[:, None, None], y, 0)
    new = jnp.where(valid[:, None, None], new, state)
  return new, y.astype(y_dtype)


@functools.partial(jax.jit, static_argnames="implementation")
def _scan(x, a, b, c, initial_state, segment_ids, implementation):
  """The scan of each device's part, if there are several."""
  reference = implementation == "reference"
  return divided(
    _loop if reference else _chunked,
    (x, a, b, c, initial_state, segment_ids),
    ("rtd", "dnn", "dn", "don", "rdn", "rt"),
    ("rtdo", "rdn"),
    only_typed=reference,
  )


def _chunked(x, a, b, c, initial_state, segment_ids):
  y_dtype, length = x.dtype, x.shape[1]
  state = _initial(x, a, b, c, initial_state)
  valid, restart = segment_masks(segment_ids)
  x, a, b, c, state, valid, restart = match_varying(
    x, a, b, c, state, valid, restart
  )
  x, a, b, c = (v.astype(state.dtype) for v in (x, a, b, c))
  segment = count = back = None
  if valid is not None:
    x = jnp.where(valid[..., None], x, 0)
    x, segment, count, back = compacted(x, valid, restart)
  y, final = _chunks(x, a, b, c, state, segment, count)
  y = y[:, :length]
  if back is not None:
    y = permute(y, back)
    y = jnp.where(valid[..., None, None], y, 0)
  return y.astype(y_dtype), final


def _chunks(x, a, b, c, state, segment, count):
  """y and the state after `count` tokens (all if None)."""
  rows, length, channels = x.shape
  outputs = c.shape[1]
  size = min(_CHUNK, 1 << (length - 1).bit_length())
  chunks = -(-length // size)
  split = lambda x: jnp.pad(
    x,
    ((0, 0), (0, chunks * size - length)) + ((0, 0),) * (x.ndim - 2),
    mode="constant" if x.ndim == 3 else "edge",
  ).reshape(rows, chunks, size, *x.shape[2:])
  squares = [a]
  while 1 << len(squares) <= size:
    squares.append(_einsum("dnm,dmk->dnk", squares[-1], squares[-1]))
  # aʲb for j = 0 … size-1, `[D, S, N]`; c aʲ for j = 1 … size, `[D, S, R, N]`.
  reach, read = b[:, None], _einsum("drn,dnm->drm", c, a)[:, None]
  for square in squares[:-1]:
    further = _einsum("dsm,dnm->dsn", reach, square)
    reach = jnp.concatenate([reach, further], 1)
    further = _einsum("dsrn,dnm->dsrm", read, square)
    read = jnp.concatenate([read, further], 1)
  blocks = split(x)
  ids = None if segment is None else split(segment)
  arriving, kept = blocks, None
  if ids is not None:
    # What ends a chunk is of its last segment; what the state before it
    # belongs to is the last segment of the chunk before, at first 0.
    arriving = jnp.where((ids == ids[..., -1:])[..., None], blocks, 0)
    before = jnp.pad(ids[:, :-1, -1], ((0, 0), (1, 0)))
    kept = before == ids[..., -1]
  sums = _einsum("bksd,dsn->bkdn", arriving, jnp.flip(reach, 1))

  def chunk(state, token):
    own, keep = token
    new = _einsum("dnm,bdm->bdn", squares[-1], state)
    if keep is not None:
      new = jnp.where(keep[:, None, None], new, 0)
    return new + own, state

  time_first = lambda x: None if x is None else jnp.moveaxis(x, 1, 0)
  state, sums, kept = match_varying(state, time_first(sums), time_first(kept))
  _, states = lax.scan(chunk, state, (sums, kept))
  states = jnp.moveaxis(states, 0, 1)
  y = _einsum("bkdn,dsrn->bksdr", states, read)
  if ids is not None:
    y = jnp.where((ids == before[..., None])[..., None, None], y, 0)
  kernel = _einsum("drn,dsn->drs", c, reach)
  # R outputs are so many channels of the same input.
  inner = taps(jnp.repeat(blocks, outputs, -1), kernel.reshape(-1, size), ids)
  y = y + inner.reshape(y.shape)
  y = y.reshape(rows, chunks * size, channels, outputs)
  state, last, inside = last_chunk(x, states, segment, count, size)
  final = _einsum("bsd,dsn->bdn", last, reach)
  # a to a power that is each row's own.
  for bit, square in enumerate(squares):
    further = _einsum("dnm,bdm->bdn", square, state)
    state = jnp.where((inside >> bit & 1 == 1)[:, None, None], further, state)
  return y, state + final


def _einsum(spec, x, y):
  return jnp.einsum(spec, x, y, precision=lax.Precision.HIGHEST)


def _initial(x, a, b, c, state):
  if state is not None:
    return state.astype(real_dtype(x, a, b, c, state))
  return jnp.zeros((x.shape[0], *a.shape[:2]), real_dtype(x, a, b, c))


def _check(function, x, a, b, c, state, segment_ids, *, time=True):
  state_name = "initial_state" if time else "state"
  arrays = dict(x=x, a=a, b=b, c=c) | {state_name: state}
  check_arrays(function, x=x, a=a, b=b, c=c)
  if not time:
    check_arrays(function, state=state)
  check_inexact(function, **arrays)
  for name, value in arrays.items():
    if value is not None and jnp.iscomplexobj(value):
      raise ValueError(
        f"{function}: {name} is complex, expected a real array. Pass the real"
        " system of twice the size."
      )
  axes = "B T" if time else "B"
  sizes = check_shapes(
    function,
    {
      "x": (x, f"{axes} D"),
      "b": (b, "D N"),
      "a": (a, "D N N"),
      "c": (c, "D R N"),
      state_name: (state, "B D N"),
      "segment_ids": (segment_ids, axes),
    },
  )
  if time and sizes["T"] < 1:
    raise ValueError(f"{function}: x has no time steps, expected T >= 1.")
  check_segment_ids(function, segment_ids)
