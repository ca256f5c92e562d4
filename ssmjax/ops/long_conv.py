"""The causal convolution by a kernel that may be as long as the sequence."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from ssmjax.ops.conv import check_convolution
from ssmjax.ops.empty import any_rows
from ssmjax.ops.long_conv_fft import convolve
from ssmjax.ops.partition import divided
from ssmjax.ops.segments import segment_masks
from ssmjax.ops.varying import match_varying
from ssmjax.types import (
  Array,
  Float,
  Int,
  check_choice,
  real_dtype,
)

__all__ = ["long_conv", "long_conv_reference", "long_conv_step"]

Implementation = Literal["reference", "fft"]


def long_conv(
  x: Float[Array, "B T D"],
  kernel: Float[Array, "L D"],
  D: Float[Array, " D"] | None = None,
  *,
  initial_state: Float[Array, "B V D"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B V D"]]:
  """Convolve each channel causally with a long kernel of its own.

  yₜ = Σⱼ kernelⱼ x_{t-j} + D xₜ,  j = 0 … L-1

  so the first row of `kernel` meets the present token (the last row of
  `causal_conv`'s weight does). What a token meets are the previous
  *non-padding* tokens of its own segment, wherever padding stands.

  `"fft"` takes O(T log T). With `segment_ids` it takes O(T log² T): the left
  half of each block of 2, 4, 8, … tokens acts on the right half by a product
  that holds tokens of one document only, whose others are chosen away before
  and after, so that documents do not meet in rounding errors either.

  Its recurrent twin, where the kernel is a sum of N decaying exponentials,
  kernelⱼ = Re Σₙ cₙ bₙ aₙʲ (S4D, DSS, EMA), is `lti_scan`, whose state and
  step are O(N); any other kernel needs its window of tokens.

  Args:
    x: inputs, `[B, T, D]`.
    kernel: `[L, D]`, L ≥ 1, less than, equal to or more than T.
    D: weight of xₜ itself, `[D]`.
    initial_state: the L-1 tokens before the first, oldest first,
      `[B, L-1, D]`; zeros if None, which is cheaper.
    segment_ids: `[B, T]` int, 1-based, 0 for padding: see `selective_scan`.
    implementation: `"fft"` (None) or `"reference"`, both differentiable to
      any order.

  Returns:
    y `[B, T, D]` of x's dtype, and the last L-1 tokens of the last segment,
    `[B, L-1, D]`, float32 or wider. Both carry gradients. A token that is not
    finite makes NaN of what meets it, and of nothing else.

  Raises:
    ValueError: an argument of the wrong shape or dtype.

  Source: Poli et al. 2023, Hyena (arXiv 2302.10866), §2.1; the halves as in
  van der Hoeven 2002, "Relax, but don't be too lazy", §4.

  >>> y, _ = long_conv(jnp.ones((1, 3, 1)), jnp.array([[1.0], [0.5], [0.25]]))
  >>> y[0, :, 0]
  Array([1.  , 1.5 , 1.75], dtype=float32)
  """
  _check("long_conv", x, kernel, D, initial_state, segment_ids)
  check_choice(
    "long_conv", "implementation", implementation, (None, "reference", "fft")
  )
  return _long_conv(x, kernel, D, initial_state, segment_ids, implementation)


def long_conv_step(
  x: Float[Array, "B D"],
  kernel: Float[Array, "L D"],
  D: Float[Array, " D"] | None = None,
  *,
  state: Float[Array, "B V D"],
  segment_ids: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B D"], Float[Array, "B V D"]]:
  """Advance `long_conv` by one token, in O(L).

  y `[B, D]` and the window moved on by a token, `[B, L-1, D]`. In O(N) where
  the kernel has a recurrence: see `lti_step`.
  """
  _check("long_conv_step", x, kernel, D, state, segment_ids, time=False)
  valid = None if segment_ids is None else segment_ids > 0
  state = state.astype(real_dtype(x, kernel, D, state))
  state, y = _token(state, (x, valid, None), *_weights(state, kernel, D))
  return y, state


def long_conv_reference(
  x: Float[Array, "B T D"],
  kernel: Float[Array, "L D"],
  D: Float[Array, " D"] | None = None,
  *,
  initial_state: Float[Array, "B V D"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B V D"]]:
  """Define `long_conv`: a loop of `long_conv_step` over the tokens."""
  _check("long_conv_reference", x, kernel, D, initial_state, segment_ids)
  dtype = real_dtype(x, kernel, D, initial_state)
  shape = (x.shape[0], kernel.shape[0] - 1, x.shape[2])
  state = jnp.zeros(shape, dtype)
  if initial_state is not None:
    state = initial_state.astype(dtype)
  masks = segment_masks(segment_ids)
  time_first = lambda x: None if x is None else jnp.moveaxis(x, 1, 0)
  weights = _weights(state, kernel, D)
  inputs = (*map(time_first, (x, *masks)),)
  state, weights, inputs = match_varying(state, weights, inputs)
  state, y = lax.scan(
    lambda state, token: _token(state, token, *weights), state, inputs
  )
  return jnp.moveaxis(y, 0, 1), state


def _token(state, token, oldest_first, skip):
  """One token of the definition; no time axis."""
  x, valid, restart = token
  y_dtype = x.dtype
  x = x.astype(state.dtype)
  column = lambda mask: mask[:, None, None]
  if valid is not None:
    x = jnp.where(valid[:, None], x, 0)
  old = state
  if restart is not None:
    old = jnp.where(column(restart), 0, old)
  window = jnp.concatenate([old, x[:, None]], 1)
  y = (window * oldest_first[None]).sum(1) + skip[None] * x
  new = window[:, 1:]
  if valid is not None:
    y = jnp.where(valid[:, None], y, 0)
    new = jnp.where(column(valid), new, state)
  return new, y.astype(y_dtype)


@functools.partial(jax.jit, static_argnames="implementation")
@any_rows
def _long_conv(x, kernel, D, initial_state, segment_ids, implementation):
  """The convolution of each device's part, if there are several."""

  def part(x, kernel, D, state, segment_ids):
    if implementation == "reference":
      return long_conv_reference(
        x, kernel, D, initial_state=state, segment_ids=segment_ids
      )
    return _fft(x, kernel, D, state, segment_ids)

  return divided(
    part, (x, kernel, D, initial_state, segment_ids),
    ("rtd", "ld", "d", "rvd", "rt"), ("rtd", "rvd"),
    only_typed=implementation == "reference",
  )  # fmt: skip


def _fft(x, kernel, D, state, segment_ids):
  y_dtype = x.dtype
  dtype = real_dtype(x, kernel, D, state)
  wide = lambda x: None if x is None else x.astype(dtype)
  x, kernel, D, state = map(wide, (x, kernel, D, state))
  x, kernel, D, state, segment_ids = match_varying(
    x, kernel, D, state, segment_ids
  )
  valid, restart = segment_masks(segment_ids)
  if valid is not None:
    x = jnp.where(valid[..., None], x, 0)
  y, final = convolve(x, kernel, state, valid, restart)
  if D is not None:
    # What is not finite is NaN in y by now; D's gradient is not to meet it.
    y = y + D[None, None] * jnp.where(jnp.isfinite(x), x, 0)
  if valid is not None:
    y = jnp.where(valid[..., None], y, 0)
  return y.astype(y_dtype), final


def _weights(state, kernel, D):
  """The kernel from its last tap to its first, and a D that is not None."""
  skip = jnp.zeros(kernel.shape[1], state.dtype) if D is None else D
  return jnp.flip(kernel, 0).astype(state.dtype), skip.astype(state.dtype)


def _check(function, x, kernel, D, state, segment_ids, *, time=True):
  check_convolution(
    function, x, ("kernel", kernel, "L"), ("D", D), state, segment_ids,
    time=time,
  )  # fmt: skip
