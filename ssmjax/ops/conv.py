"""The causal short convolution that stands before a selective scan."""

import jax
import jax.numpy as jnp

from ssmjax.ops.partition import divided
from ssmjax.ops.segments import permute, segment_masks
from ssmjax.types import (
  Array,
  Float,
  Int,
  check_arrays,
  check_inexact,
  check_segment_ids,
  check_shapes,
  real_dtype,
)

__all__ = ["causal_conv", "causal_conv_reference", "causal_conv_step"]


def causal_conv(
  x: Float[Array, "B T D"],
  weight: Float[Array, "W D"],
  bias: Float[Array, " D"] | None = None,
  *,
  initial_state: Float[Array, "B V D"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B V D"]]:
  """Convolve each channel causally with its own short filter.

  yₜ = bias + Σⱼ weightⱼ · x_{t-(W-1)+j},  j = 0 … W-1

  so the last row of `weight` meets the present token, as in the published
  Mamba checkpoints. What a token meets are the previous *non-padding* tokens
  of its own segment, wherever padding stands.

  Args:
    x: `[B, T, D]`.
    weight: `[W, D]`, W ≥ 1.
    bias: `[D]`.
    initial_state: the W-1 tokens before the first, oldest first,
      `[B, W-1, D]`; zeros if None.
    segment_ids: `[B, T]` int, 1-based, 0 for padding: see `selective_scan`.

  Returns:
    y `[B, T, D]` of x's dtype, and the last W-1 tokens of the last segment,
    `[B, W-1, D]`, float32 or wider. Both carry gradients.

  Raises:
    ValueError: an argument of the wrong shape or dtype.

  >>> y, _ = causal_conv(jnp.ones((1, 3, 1)), jnp.ones((2, 1)))
  >>> y[0, :, 0]
  Array([1., 2., 2.], dtype=float32)
  """
  _check("causal_conv", x, weight, bias, initial_state, segment_ids)
  return _causal_conv(x, weight, bias, initial_state, segment_ids)


def causal_conv_step(
  x: Float[Array, "B D"],
  weight: Float[Array, "W D"],
  bias: Float[Array, " D"] | None = None,
  *,
  state: Float[Array, "B V D"],
  segment_ids: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B D"], Float[Array, "B V D"]]:
  """Advance `causal_conv` by one token: y `[B, D]`, state `[B, W-1, D]`."""
  _check("causal_conv_step", x, weight, bias, state, segment_ids, time=False)
  valid = None if segment_ids is None else segment_ids > 0
  state = state.astype(real_dtype(x, weight, state))
  return _token(state, x, valid, None, weight, bias)


def causal_conv_reference(
  x: Float[Array, "B T D"],
  weight: Float[Array, "W D"],
  bias: Float[Array, " D"] | None = None,
  *,
  initial_state: Float[Array, "B V D"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B V D"]]:
  """Define `causal_conv`: a loop of `causal_conv_step` over the tokens."""
  _check("causal_conv_reference", x, weight, bias, initial_state, segment_ids)
  state = _initial(x, weight, initial_state)
  valid, restart = segment_masks(segment_ids)
  outputs = []
  for t in range(x.shape[1]):
    at = lambda mask, t=t: None if mask is None else mask[:, t]
    y, state = _token(state, x[:, t], at(valid), at(restart), weight, bias)
    outputs.append(y)
  return jnp.stack(outputs, 1), state


def _token(state, x, valid, restart, weight, bias):
  """One token of the definition; no time axis."""
  y_dtype = x.dtype
  column = lambda mask: mask[:, None]
  if valid is not None:
    x = jnp.where(column(valid), x, jnp.zeros_like(x))
  old = state
  if restart is not None:
    old = jnp.where(restart[:, None, None], jnp.zeros_like(old), old)
  window = jnp.concatenate([old, x[:, None].astype(state.dtype)], 1)
  y = (window * weight.astype(state.dtype)[None]).sum(1)
  if bias is not None:
    y = y + bias.astype(state.dtype)[None]
  new = window[:, 1:]
  if valid is not None:
    y = jnp.where(column(valid), y, jnp.zeros_like(y))
    new = jnp.where(valid[:, None, None], new, state)
  return y.astype(y_dtype), new


@jax.jit
def _causal_conv(x, weight, bias, initial_state, segment_ids):
  # What explicit shardings say; others the compiler divides by itself.
  return divided(
    _over_time, (x, weight, bias, initial_state, segment_ids),
    ("rtd", "_d", "d", "r_d", "rt"), ("rtd", "r_d"), only_typed=True,
  )  # fmt: skip


def _over_time(x, weight, bias, initial_state, segment_ids):
  y_dtype, length = x.dtype, x.shape[1]
  width = weight.shape[0]
  state = _initial(x, weight, initial_state)
  dtype = state.dtype
  if segment_ids is None:
    tokens = jnp.concatenate([state, x.astype(dtype)], 1)
    y = _taps(tokens, weight, length)
    final = tokens[:, length:]
    order = None
  else:
    valid, restart = segment_masks(segment_ids)
    # Padding may stand anywhere, so bring the tokens together first, last
    # tokens at the end: order is a permutation, and `back` undoes it.
    order = jnp.argsort(valid, axis=1, stable=True)
    back = jnp.argsort(order, axis=1)
    x = jnp.where(valid[..., None], x, jnp.zeros_like(x))
    x = permute(x.astype(dtype), order)
    # The carried tokens stand right before the first token, over padding.
    count = valid.sum(1)
    segment = jnp.cumsum(
      jnp.take_along_axis(restart, order, 1).astype(jnp.int32), 1
    )
    tokens = jnp.concatenate([jnp.zeros_like(state), x], 1)
    segment = jnp.pad(segment, ((0, 0), (width - 1, 0)))
    place = length - count[:, None] + jnp.arange(width - 1)[None]
    rows = jnp.arange(x.shape[0])[:, None]
    tokens = tokens.at[rows, place].set(state, unique_indices=True)
    y = _taps(tokens, weight, length, segment)
    last = segment[:, -1:]
    keep = segment[:, length:] == last
    final = tokens[:, length:]
    final = jnp.where(keep[..., None], final, jnp.zeros_like(final))
    y = permute(y, back)
  if bias is not None:
    y = y + bias.astype(dtype)[None, None]
  if order is not None:
    y = jnp.where(valid[..., None], y, jnp.zeros_like(y))
  return y.astype(y_dtype), final


def _taps(tokens, weight, length, segment=None):
  """Σⱼ weightⱼ tokensₜ₊ⱼ, over taps of the token's own segment."""
  width = weight.shape[0]
  y = None
  for j in range(width):
    tap = tokens[:, j : j + length]
    if segment is not None and j < width - 1:
      same = segment[:, j : j + length] == segment[:, width - 1 :]
      tap = jnp.where(same[..., None], tap, jnp.zeros_like(tap))
    tap = tap * weight[j].astype(tokens.dtype)[None, None]
    y = tap if y is None else y + tap
  return y


def _initial(x, weight, initial_state):
  dtype = real_dtype(x, weight, initial_state)
  if initial_state is not None:
    return initial_state.astype(dtype)
  return jnp.zeros((x.shape[0], weight.shape[0] - 1, x.shape[2]), dtype)


def check_convolution(
  function: str,
  x: Array,
  kernel: tuple[str, Array, str],
  per_channel: tuple[str, Array | None],
  state: Array | None,
  segment_ids: Array | None,
  *,
  time: bool = True,
) -> None:
  """Raise ValueError unless the arguments of a convolution fit each other.

  Args:
    function: of which they are, for the message.
    x: tokens, `[B, T, D]`, or `[B, D]` without `time`.
    kernel: its name, itself, and the letter for how many taps it has.
    per_channel: the name of `[D]` numbers, and they.
    state: the tokens before, one less than the kernel has taps.
    segment_ids: `[B, T]`, or `[B]`.
    time: whether there is an axis of time.
  """
  name, taps, letter = kernel
  state_name = "initial_state" if time else "state"
  arrays = {"x": x, name: taps, per_channel[0]: per_channel[1]}
  arrays[state_name] = state
  check_arrays(function, **{"x": x, name: taps})
  if not time:
    check_arrays(function, state=state)
  check_inexact(function, **arrays)
  for key, value in arrays.items():
    if value is not None and jnp.iscomplexobj(value):
      raise ValueError(
        f"{function}: {key} is complex, expected a real array. Run real and"
        " imaginary part apart."
      )
  axes = "B T" if time else "B"
  sizes = check_shapes(
    function,
    {
      "x": (x, f"{axes} D"),
      name: (taps, f"{letter} D"),
      per_channel[0]: (per_channel[1], "D"),
    },
  )
  count = sizes[letter]
  if count < 1:
    raise ValueError(f"{function}: {name} has no taps, expected {letter} >= 1.")
  if time and sizes["T"] < 1:
    raise ValueError(f"{function}: x has no time steps, expected T >= 1.")
  check_shapes(
    function,
    {
      "x": (x, f"{axes} D"),
      state_name: (state, f"B {count - 1} D"),
      "segment_ids": (segment_ids, axes),
    },
    {state_name: f"It holds the {letter}-1 = {count - 1} previous tokens."},
  )
  check_segment_ids(function, segment_ids)


def _check(function, x, weight, bias, state, segment_ids, *, time=True):
  check_convolution(
    function, x, ("weight", weight, "W"), ("bias", bias), state, segment_ids,
    time=time,
  )  # fmt: skip
