"""TTT-linear: a linear model that learns from the tokens as they come.

The public door and the definition; `ops.ttt_windows` has the fast form.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ssmjax.ops.empty import any_rows
from ssmjax.ops.partition import divided
from ssmjax.ops.segments import segment_masks
from ssmjax.ops.ttt_windows import TTTState, inner_output, inner_slope, windows
from ssmjax.ops.varying import match_varying
from ssmjax.types import (
  Array,
  Float,
  Int,
  check_arrays,
  check_choice,
  check_inexact,
  check_number,
  check_segment_ids,
  check_shapes,
  real_dtype,
)

__all__ = [
  "TTTLearner",
  "TTTState",
  "ttt_linear",
  "ttt_linear_reference",
  "ttt_linear_step",
  "ttt_positions",
]


class TTTLearner(NamedTuple):
  """What the inner model starts from, and what it does not learn.

  Attributes:
    weight: W₀, `[H, P, P]`, keys to values.
    bias: b₀, `[H, P]`.
    norm_scale: γ of the inner norm, `[H, P]`.
    norm_bias: its bias, `[H, P]`.
    token_scale: τ, `[N]`, how much of the mini-batch's sum of gradients the
      token at each of its N places goes down; 1 / (1 + place) is their mean.
  """

  weight: Float[Array, "H P P"]
  bias: Float[Array, "H P"]
  norm_scale: Float[Array, "H P"]
  norm_bias: Float[Array, "H P"]
  token_scale: Float[Array, " N"]


def ttt_linear(
  q: Float[Array, "B T H P"],
  k: Float[Array, "B T H P"],
  v: Float[Array, "B T H P"],
  rate: Float[Array, "B T H"],
  learner: TTTLearner,
  *,
  initial_state: TTTState | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  implementation: Literal["reference", "chunked"] | None = None,
) -> tuple[Float[Array, "B T H P"], TTTState]:
  """Run a linear model that takes a gradient step at each token.

  f(x; W, b) = x + LN(xW + b),   ℓₜ(W, b) = ½‖f(kₜ; W, b) - vₜ‖²
  (Wₜ, bₜ) = (W, b) - τₜ Σᵢ rateᵢ ∇ℓᵢ(W, b),   yₜ = f(qₜ; Wₜ, bₜ)

  for each head. The sum is over the tokens of the mini-batch up to t, τₜ is
  that of t's place in it, and all gradients are taken at (W, b), what the last
  token of the mini-batch before left, so that those of a mini-batch are
  computed side by side (the dual form: no Wₜ of a token is made).

  The norm makes the step nonlinear in W: there is no linear recurrence, and no
  form of Wang et al. 2025, Eq. 1.

  Mini-batches begin with a document and count its tokens alone: padding is
  none, and the state knows how far the unfinished one has come, so that the
  result does not depend on the pieces in which a document is given.

  Args:
    q: queries, `[B, T, H, P]`, float32 or bfloat16 or (under x64) float64.
    k: keys, `[B, T, H, P]`.
    v: values, `[B, T, H, P]`.
    rate: the inner learning rate of each token, `[B, T, H]`.
    learner: W₀, b₀, the norm and τ; the length of τ is the mini-batch.
    initial_state: to go on from; None for the beginning.
    segment_ids: `[B, T]` int, 1-based, 0 for padding: see `selective_scan`.
    implementation: `"reference"` (a loop with a gradient after the other),
      `"chunked"` (a mini-batch at once), or None: chunked. Both are
      differentiable to any order; memory is a state for every mini-batch.

  Returns:
    y `[B, T, H, P]` of v's dtype and the state after the last token, float32
    or wider. Both carry gradients. What is not finite in a token makes NaN of
    y from there on, in its head and document only, and of the state; in
    `"chunked"` no gradient comes from there.

  Raises:
    ValueError: an argument of the wrong shape or dtype.

  Source: Sun et al. 2024 (arXiv 2407.04620), §2.4-2.7 and Eq. 7.
  """
  _check("ttt_linear", q, k, v, rate, learner, initial_state, segment_ids)
  if implementation is not None:
    check_choice("ttt_linear", "implementation", implementation,
                 ("reference", "chunked"))  # fmt: skip
  return _ttt_linear(
    q, k, v, rate, learner, initial_state, segment_ids,
    implementation=implementation,
  )  # fmt: skip


def ttt_linear_step(
  q: Float[Array, "B H P"],
  k: Float[Array, "B H P"],
  v: Float[Array, "B H P"],
  rate: Float[Array, "B H"],
  learner: TTTLearner,
  *,
  state: TTTState,
  segment_ids: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B H P"], TTTState]:
  """Advance `ttt_linear` by one token: y `[B, H, P]` and the new state."""
  _check("ttt_linear_step", q, k, v, rate, learner, state, segment_ids,
         time=False)  # fmt: skip
  valid = None if segment_ids is None else segment_ids > 0
  state = _widened(state, real_dtype(q, k, v, rate, *state[:4]))
  return _token(learner, state, q, k, v, rate, valid, None)


def ttt_linear_reference(
  q: Float[Array, "B T H P"],
  k: Float[Array, "B T H P"],
  v: Float[Array, "B T H P"],
  rate: Float[Array, "B T H"],
  learner: TTTLearner,
  *,
  initial_state: TTTState | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T H P"], TTTState]:
  """Define `ttt_linear`: a loop of `ttt_linear_step` over the tokens."""
  _check("ttt_linear_reference", q, k, v, rate, learner, initial_state,
         segment_ids)  # fmt: skip
  state = _initial(q, k, v, rate, initial_state)
  xs = (q, k, v, rate, *segment_masks(segment_ids))
  time_first = lambda x: jnp.moveaxis(x, 1, 0)
  learner, state, xs = match_varying(
    learner, state, jax.tree.map(time_first, xs)
  )

  def step(state, token):
    y, state = _token(learner, state, *token)
    return state, y

  state, y = lax.scan(step, state, xs)
  return jnp.moveaxis(y, 0, 1), state


def ttt_positions(
  size: int,
  shape: tuple[int, int],
  start: Int[Array, " B"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
) -> Int[Array, "B T"]:
  """Say at which place of its mini-batch each token stands, 0 to size - 1.

  Args:
    size: tokens of a mini-batch.
    shape: B and T.
    start: place of the first token, a `TTTState.position`; 0 if None.
    segment_ids: as for `ttt_linear`. Padding has the place of the token
      before it.
  """
  function = "ttt_positions"
  check_number(function, "size", size, whole=True)
  if size < 1:
    raise ValueError(f"{function}: size is {size}, expected 1 or more tokens.")
  if not isinstance(shape, tuple) or len(shape) != 2:
    raise ValueError(f"{function}: shape is {shape!r}, expected (B, T).")
  for length in shape:
    check_number(function, "shape", length, whole=True)
  check_segment_ids(function, segment_ids)
  check_shapes(
    function,
    {
      "start": (start, f"B={shape[0]}"),
      "segment_ids": (segment_ids, f"B={shape[0]} T={shape[1]}"),
    },
  )
  if start is not None and not jnp.issubdtype(start.dtype, jnp.integer):
    raise ValueError(
      f"{function}: start has dtype {start.dtype.name}, expected int32."
    )
  if start is None:
    start = jnp.zeros((shape[0],), jnp.int32)
  valid, restart = segment_masks(segment_ids)
  if valid is None or restart is None:
    count = jnp.broadcast_to(
      jnp.arange(1, shape[1] + 1, dtype=jnp.int32)[None], shape
    )
    before = jnp.broadcast_to(-start[:, None], shape)
  else:
    count = jnp.cumsum(valid, 1, dtype=jnp.int32)
    # Tokens before the document: at least one, if it is not the first.
    before = lax.cummax(jnp.where(restart, count - 1, 0), axis=1)
    before = jnp.where(before > 0, before, -start[:, None])
  return (count - 1 - before) % size


def _token(learner, state, q, k, v, rate, valid, restart):
  """One token of the definition; no time axis."""
  y_dtype, dtype, old = v.dtype, state.weight.dtype, state
  at = lambda mask, x: lax.expand_dims(mask, range(1, x.ndim))
  clear = lambda mask: lambda x: jnp.where(at(mask, x), jnp.zeros_like(x), x)
  if restart is not None:
    state = jax.tree.map(clear(restart), state)
  tokens = (q, k, v, rate)
  if valid is not None:
    tokens = jax.tree.map(clear(~valid), tokens)
  q, k, v, rate = (x.astype(dtype) for x in tokens)
  learner = TTTLearner(*(jnp.asarray(x, dtype) for x in learner))
  row = lambda x: jnp.broadcast_to(x[None], (k.shape[0], *x.shape))
  base_weight, base_bias = row(learner.weight), row(learner.bias)
  norm = row(learner.norm_scale), row(learner.norm_bias)
  read = lambda x, weight: jnp.einsum(
    "bhp,bhpr->bhr", x, weight, precision=lax.Precision.HIGHEST
  )
  weight, bias = base_weight + state.weight, base_bias + state.bias
  slope = inner_slope(read(k, weight) + bias, v - k, *norm)
  slope = rate[..., None] * slope
  weight_sum = state.weight_sum + k[..., None] * slope[..., None, :]
  bias_sum = state.bias_sum + slope
  # By comparison, not by indexing: it is divided over rows as the state is.
  scale = learner.token_scale
  places = jnp.arange(scale.shape[0], dtype=jnp.int32)
  here = state.position[:, None] == places
  scale = jnp.where(here, scale[None], jnp.zeros_like(scale[None])).sum(1)
  down = lambda x: at(scale, x) * x
  new_weight = state.weight - down(weight_sum)
  new_bias = state.bias - down(bias_sum)
  z = read(q, base_weight + new_weight) + base_bias + new_bias
  y = inner_output(q, z, *norm)
  size = learner.token_scale.shape[0]
  done = state.position == size - 1
  pick = lambda x, other: jnp.where(at(done, x), x, other)
  new = TTTState(
    pick(new_weight, state.weight),
    pick(new_bias, state.bias),
    clear(done)(weight_sum),
    clear(done)(bias_sum),
    (state.position + 1) % size,
  )
  if valid is not None:
    y = clear(~valid)(y)
    new = jax.tree.map(lambda n, o: jnp.where(at(valid, n), n, o), new, old)
  return y.astype(y_dtype), new


@functools.partial(jax.jit, static_argnames="implementation")
@any_rows
def _ttt_linear(
  q, k, v, rate, learner, initial_state, segment_ids, *, implementation
):
  """The op of each device's part, if there are several."""
  words = ("rdpp", "rdp", "rdpp", "rdp", "r")
  arrays, tree = jax.tree.flatten(initial_state)

  def part(q, k, v, rate, segment_ids, *arrays):
    learner = TTTLearner(*arrays[: len(TTTLearner._fields)])
    state = jax.tree.unflatten(tree, arrays[len(learner) :])
    y, state = _part(
      q, k, v, rate, learner, state, segment_ids, implementation=implementation
    )
    return y, *state

  # The heads are what `divided` calls channels.
  y, *state = divided(
    part, (q, k, v, rate, segment_ids, *learner, *arrays),
    ("rtdp", "rtdp", "rtdp", "rtd", "rt", "dpp", "dp", "dp", "dp", "_",
     *words[: len(arrays)]),
    ("rtdp", *words), only_typed=True,
  )  # fmt: skip
  return y, TTTState(*state)


def _part(
  q, k, v, rate, learner, initial_state, segment_ids, *, implementation
):
  if implementation == "reference":
    return ttt_linear_reference(
      q, k, v, rate, learner, initial_state=initial_state,
      segment_ids=segment_ids,
    )  # fmt: skip
  state = _initial(q, k, v, rate, initial_state)
  dtype = state.weight.dtype
  learner = TTTLearner(*(x.astype(dtype) for x in learner))
  start = None if initial_state is None else initial_state.position
  size = learner.token_scale.shape[0]
  position = ttt_positions(size, q.shape[:2], start, segment_ids)
  aligned = initial_state is None and segment_ids is None
  masks = segment_masks(segment_ids)
  args = match_varying(q, k, v, rate, learner, state, position, *masks)
  return windows(*args, aligned=aligned)


def _initial(q, k, v, rate, state):
  if state is not None:
    return _widened(state, real_dtype(q, k, v, rate, *state[:4]))
  batch, _, heads, width = k.shape
  dtype = real_dtype(q, k, v, rate)
  weight = jnp.zeros((batch, heads, width, width), dtype)
  bias = jnp.zeros((batch, heads, width), dtype)
  position = jnp.zeros((batch,), jnp.int32)
  return TTTState(weight, bias, weight, bias, position)


def _widened(state, dtype):
  *sums, position = state
  return TTTState(*(x.astype(dtype) for x in sums), position)


def _check(function, q, k, v, rate, learner, state, segment_ids, *, time=True):
  arrays = dict(q=q, k=k, v=v, rate=rate)
  state_name = "initial_state" if time else "state"
  check_arrays(function, **arrays)
  if not isinstance(learner, TTTLearner):
    raise ValueError(
      f"{function}: learner is a {type(learner).__name__}, expected a"
      " TTTLearner of five arrays."
    )
  if not isinstance(state, TTTState) and not (time and state is None):
    raise ValueError(
      f"{function}: {state_name} is a {type(state).__name__}, expected a"
      " TTTState. Pass what the call before returned."
    )
  named = {f"learner.{name}": x for name, x in learner._asdict().items()}
  check_arrays(function, **named)
  check_inexact(function, **arrays, **named)
  axes = "B T" if time else "B"
  wanted = {name: (x, f"{axes} H P") for name, x in arrays.items()}
  wanted["rate"] = (rate, f"{axes} H")
  letters = ("H P P", "H P", "H P", "H P", "N")
  wanted |= dict(zip(named, zip(named.values(), letters, strict=True),
                     strict=True))  # fmt: skip
  if state is not None:
    fields = {f"{state_name}.{k}": x for k, x in state._asdict().items()}
    check_arrays(function, **fields)
    position = fields.pop(f"{state_name}.position")
    check_inexact(function, **fields)
    if not jnp.issubdtype(position.dtype, jnp.integer):
      raise ValueError(
        f"{function}: {state_name}.position has dtype {position.dtype.name},"
        " expected int32."
      )
    letters = ("B H P P", "B H P", "B H P P", "B H P", "B")
    for field, value, letter in zip(
      TTTState._fields, state, letters, strict=True
    ):
      wanted[f"{state_name}.{field}"] = (value, letter)
  wanted["segment_ids"] = (segment_ids, axes)
  sizes = check_shapes(function, wanted)
  if time and sizes["T"] == 0:
    raise ValueError(f"{function}: q has no time steps, expected T >= 1.")
  check_segment_ids(function, segment_ids)
