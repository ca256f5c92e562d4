"""The recurrence of a diagonal time-invariant system (S4D, DSS, EMA)."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ssmjax.ops.empty import any_rows
from ssmjax.ops.lti_blocks import last_chunk, taps
from ssmjax.ops.lti_powers import integer_powers
from ssmjax.ops.partition import divided
from ssmjax.ops.scan import linear_scan
from ssmjax.ops.segments import compacted, permute, segment_masks
from ssmjax.ops.varying import match_varying
from ssmjax.types import (
  Array,
  Float,
  Inexact,
  Int,
  check_arrays,
  check_choice,
  check_inexact,
  check_segment_ids,
  check_shapes,
  real_dtype,
  state_dtype,
)

__all__ = ["lti_scan", "lti_scan_reference", "lti_step"]

Implementation = Literal["reference", "associative", "chunked"]

# Tokens between two states in memory; each meets as many taps at most.
_CHUNK = 64


def lti_scan(
  x: Float[Array, "B T D"],
  a: Inexact[Array, "D N"],
  b: Inexact[Array, "D N"],
  c: Inexact[Array, "D N"],
  D: Float[Array, " D"] | None = None,
  *,
  initial_state: Inexact[Array, "B D N"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T D"], Inexact[Array, "B D N"]]:
  """Run a diagonal time-invariant recurrence in every channel.

  hₜ = a ∘ hₜ₋₁ + b xₜ,  yₜ = Re Σₙ cₙhₜₙ + D xₜ

  With a, b of `zero_order_hold` or `bilinear` it is S4D, the twin of the
  convolution by `s4d_kernel`; with any |a| ≤ 1 a (complex) moving average.
  `"chunked"` keeps one state in 64 tokens: from chunk to chunk it is
  `linear_scan`, and both ways between states and tokens are matrix products.

  Args:
    x: inputs, `[B, T, D]`.
    a: decays of one step, `[D, N]`, real or complex; 0 and 1 are exact.
    b: input weights, `[D, N]`.
    c: output weights, `[D, N]`; not conjugated. For one of each pair of
      conjugates pass 2c.
    D: weight of xₜ itself, `[D]`.
    initial_state: h₀, `[B, D, N]`; zeros if None.
    segment_ids: `[B, T]` int, 1-based, 0 for padding: see `selective_scan`.
      What is not finite goes to later tokens of its document only; gradients
      of a, b and c are not finite then. (Without ids `"chunked"` may make NaN
      of up to 63 tokens before it, too.)
    implementation: `None` and `"chunked"` are differentiable once;
      `"associative"` (all states in memory) and `"reference"` to any order.

  Returns:
    y `[B, T, D]` of x's dtype, and the final state `[B, D, N]`, float32 or
    wider, complex where a or b is. Both carry gradients.

  Raises:
    ValueError: an argument of the wrong shape or dtype.
    NotImplementedError: a second derivative of `"chunked"`.

  Source: Gu et al. 2022, S4D (arXiv 2206.11893), §2; Gu et al. 2021, LSSL
  (arXiv 2110.13985), Eq. 3.

  >>> half = jnp.full((1, 1), 0.5)
  >>> lti_scan(jnp.ones((1, 3, 1)), half, 2 * half, 2 * half)[0][0, :, 0]
  Array([1.  , 1.5 , 1.75], dtype=float32)
  """
  _check("lti_scan", x, a, b, c, D, initial_state, segment_ids)
  check_choice(
    "lti_scan",
    "implementation",
    implementation,
    (None, "reference", "associative", "chunked"),
  )
  return _lti_scan(x, a, b, c, D, initial_state, segment_ids, implementation)


def lti_step(
  x: Float[Array, "B D"],
  a: Inexact[Array, "D N"],
  b: Inexact[Array, "D N"],
  c: Inexact[Array, "D N"],
  D: Float[Array, " D"] | None = None,
  *,
  state: Inexact[Array, "B D N"],
  segment_ids: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B D"], Inexact[Array, "B D N"]]:
  """Advance `lti_scan` by one token: y `[B, D]`, state `[B, D, N]`."""
  _check("lti_step", x, a, b, c, D, state, segment_ids, time=False)
  valid = None if segment_ids is None else segment_ids > 0
  state = state.astype(state_dtype(a, b, state))
  state, y = _token(state, (x, valid, None), *_wide(state.dtype, a, b, c, D))
  return y, state


def lti_scan_reference(
  x: Float[Array, "B T D"],
  a: Inexact[Array, "D N"],
  b: Inexact[Array, "D N"],
  c: Inexact[Array, "D N"],
  D: Float[Array, " D"] | None = None,
  *,
  initial_state: Inexact[Array, "B D N"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Inexact[Array, "B D N"]]:
  """Define `lti_scan`: a loop of `lti_step` over the tokens."""
  _check("lti_scan_reference", x, a, b, c, D, initial_state, segment_ids)
  state = _initial(x, a, b, c, D, initial_state)
  masks = segment_masks(segment_ids)
  time_first = lambda x: None if x is None else jnp.moveaxis(x, 1, 0)
  state, *xs = match_varying(state, *map(time_first, (x, *masks)))
  weights = _wide(state.dtype, a, b, c, D)
  state, y = lax.scan(
    lambda state, token: _token(state, token, *weights), state, tuple(xs)
  )
  return jnp.moveaxis(y, 0, 1), state


def _token(state, token, a, b, c, skip):
  """One token of the definition; no time axis."""
  x, valid, restart = token
  y_dtype = x.dtype
  x = x.astype(skip.dtype)
  column = lambda mask: mask[:, None, None]
  if valid is not None:
    x = jnp.where(valid[:, None], x, 0)
  old = state
  if restart is not None:
    old = jnp.where(column(restart), 0, old)
  new = a[None] * old + b[None] * x[..., None].astype(state.dtype)
  y = (c[None] * new.astype(c.dtype)).sum(-1).real + skip[None] * x
  if valid is not None:
    y = jnp.where(valid[:, None], y, 0)
    new = jnp.where(column(valid), new, state)
  return new, y.astype(y_dtype)


@functools.partial(jax.jit, static_argnames="implementation")
@any_rows
def _lti_scan(x, a, b, c, D, initial_state, segment_ids, implementation):
  """The scan of each device's part, if there are several."""
  forms = {
    "reference": lambda *args: lti_scan_reference(
      *args[:5], initial_state=args[5], segment_ids=args[6]
    ),
    "associative": _associative,
  }
  return divided(
    forms.get(implementation or "chunked", _chunked),
    (x, a, b, c, D, initial_state, segment_ids),
    ("rtd", "dn", "dn", "dn", "d", "rdn", "rt"),
    ("rtd", "rdn"),
    only_typed=implementation in ("reference", "associative"),
  )


def _associative(x, a, b, c, D, initial_state, segment_ids):
  """All states in memory; differentiable to any order."""
  state = _initial(x, a, b, c, D, initial_state)
  valid, _ = segment_masks(segment_ids)
  y_dtype = x.dtype
  a, b, c, skip = _wide(state.dtype, a, b, c, D)
  x = _without_padding(x.astype(skip.dtype), valid)
  inputs = b[None, None] * x[..., None].astype(state.dtype)
  states, final = linear_scan(
    a[None, None], inputs, initial_state=state, segment_ids=segment_ids,
    implementation="associative",
  )  # fmt: skip
  y = _einsum("btdn,dn->btd", states.astype(c.dtype), c)
  y = _without_padding(y + skip[None, None] * x, valid)
  return y.astype(y_dtype), final


def _chunked(x, a, b, c, D, initial_state, segment_ids):
  y_dtype, length = x.dtype, x.shape[1]
  state = _initial(x, a, b, c, D, initial_state)
  valid, restart = segment_masks(segment_ids)
  x, a, b, c, D, state, valid, restart = match_varying(
    x, a, b, c, D, state, valid, restart
  )
  a, b, c, skip = _wide(state.dtype, a, b, c, D)
  x = _without_padding(x.astype(skip.dtype), valid)
  segment = count = back = None
  tokens = x
  if valid is not None:
    tokens, segment, count, back = compacted(x, valid, restart)
  y, final = _chunks(tokens, a, b, c, state, segment, count)
  y = y[:, :length]
  if back is not None:
    y = permute(y, back)
  y = _without_padding(y + skip[None, None] * x, valid)
  return y.astype(y_dtype), final


def _chunks(x, a, b, c, state, segment, count):
  """y and the state after `count` tokens (all if None), without a skip."""
  rows, length, channels = x.shape
  size = min(_CHUNK, length)
  chunks = -(-length // size)
  split = lambda x: jnp.pad(
    x,
    ((0, 0), (0, chunks * size - length)) + ((0, 0),) * (x.ndim - 2),
    mode="constant" if x.ndim == 3 else "edge",
  ).reshape(rows, chunks, size, *x.shape[2:])
  # a to the 0, 1, …, size: `[D, N, size + 1]`.
  table = integer_powers(a, 1, size + 1)
  blocks = split(x)
  arriving, before = blocks, None
  if segment is not None:
    ids = split(segment)
    # What ends a chunk is of its last segment; what the state before it
    # belongs to is the last segment of the chunk before, at first 0.
    arriving = jnp.where((ids == ids[..., -1:])[..., None], blocks, 0)
    before = jnp.pad(ids[:, :-1, -1], ((0, 0), (1, 0)))
  weights = b[..., None] * jnp.flip(table[..., :size], -1)
  sums = _einsum("bksd,dns->bkdn", arriving, weights)
  # The initial state comes as an input, so that the first chunk may forget it.
  sums = jnp.concatenate([state[:, None], sums], 1)
  restarts = None
  if segment is not None:
    restarts = jnp.pad(ids[..., -1], ((0, 0), (1, 0))) + 1
  step = table[None, None, ..., size]
  states, _ = linear_scan(step, sums, segment_ids=restarts)
  states = states[:, :-1]
  leaving = c[..., None] * table[..., 1:].astype(c.dtype)
  y = _einsum("bkdn,dnt->bktd", states, leaving)
  if segment is not None:
    y = jnp.where((ids == before[..., None])[..., None], y, 0)
  kernel = (c[..., None] * (b[..., None] * table).astype(c.dtype)).sum(1).real
  y = y + taps(blocks, kernel[:, :size], None if segment is None else ids)
  y = y.reshape(rows, -1, channels)
  return y, _final(x, b, table, states, segment, count, size)


def _final(x, b, table, states, segment, count, size):
  """The state after the last token: the last chunk's, up to there."""
  state, last, inside = last_chunk(x, states, segment, count, size)
  decay = jnp.moveaxis(table, -1, 0)[inside]
  weights = b[..., None] * table[..., :size]
  return decay * state + _einsum("bsd,dns->bdn", last, weights)


def _einsum(spec, x, y):
  """In real numbers: from a real x, or to a real result."""
  # Fused with the product, powers would be formed again for each chunk.
  y = lax.optimization_barrier(y)
  run = functools.partial(jnp.einsum, spec, precision=lax.Precision.HIGHEST)
  if not jnp.iscomplexobj(x):
    if jnp.iscomplexobj(y):
      if spec.endswith("bktd"):
        return run(x, y.real)
      return lax.complex(run(x, y.real), run(x, y.imag))
    return run(x, y)
  return run(x.real, y.real) - run(x.imag, y.imag)


def _without_padding(x, valid):
  return x if valid is None else jnp.where(valid[..., None], x, 0)


def _initial(x, a, b, c, D, state):
  dtype = np.result_type(state_dtype(a, b, state), real_dtype(x, c, D))
  if state is not None:
    return state.astype(dtype)
  return jnp.zeros((x.shape[0], *a.shape), dtype)


def _wide(dtype, a, b, c, D):
  """a, b in the state's dtype, c in its precision, D real and never None."""
  real = jnp.finfo(dtype).dtype
  c_dtype = np.result_type(dtype, np.complex64 if jnp.iscomplexobj(c) else real)
  skip = jnp.zeros(a.shape[0], real) if D is None else D.astype(real)
  return a.astype(dtype), b.astype(dtype), c.astype(c_dtype), skip


def _check(function, x, a, b, c, D, state, segment_ids, *, time=True):
  state_name = "initial_state" if time else "state"
  arrays = dict(x=x, a=a, b=b, c=c, D=D)
  check_arrays(function, x=x, a=a, b=b, c=c)
  if not time:
    check_arrays(function, state=state)
  check_inexact(function, **arrays, **{state_name: state})
  for name in "xD":
    if arrays[name] is not None and jnp.iscomplexobj(arrays[name]):
      raise ValueError(
        f"{function}: {name} is complex, expected a real array. Run real and"
        " imaginary part apart."
      )
  axes = "B T" if time else "B"
  sizes = check_shapes(
    function,
    {
      "x": (x, f"{axes} D"),
      "a": (a, "D N"),
      "b": (b, "D N"),
      "c": (c, "D N"),
      "D": (D, "D"),
      state_name: (state, "B D N"),
      "segment_ids": (segment_ids, axes),
    },
  )
  if time and sizes["T"] < 1:
    raise ValueError(f"{function}: x has no time steps, expected T >= 1.")
  check_segment_ids(function, segment_ids)
