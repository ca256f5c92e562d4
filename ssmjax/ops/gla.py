"""Gated linear attention: a matrix state that decays and takes outer products.

The public door: shapes, padding and the choice of implementation.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from ssmjax.ops.empty import any_rows
from ssmjax.ops.gla_chunked import gla_chunked
from ssmjax.ops.partition import divided
from ssmjax.ops.reverse_only import refused_by_name
from ssmjax.ops.segments import segment_masks
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
  "gated_linear_attention",
  "gated_linear_attention_reference",
  "gated_linear_attention_step",
]

Implementation = Literal["reference", "chunked"]


def gated_linear_attention(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T H K"],
  v: Float[Array, "B T H V"],
  log_a: Float[Array, "..."] | None = None,
  *,
  bonus: Float[Array, "H K"] | None = None,
  scale: float = 1.0,
  initial_state: Float[Array, "B H K V"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
  """Run linear attention whose memory decays, over a sequence.

  Sₜ = diag(aₜ) Sₜ₋₁ + kₜ vₜᵀ,   yₜ = scale · Sₜᵀ qₜ
  or, with a bonus u for the current token,
  yₜ = scale · (Sₜ₋₁ + diag(u) kₜ vₜᵀ)ᵀ qₜ

  with aₜ = exp(log_aₜ), for each head apart. Special cases, with maps of q, k
  and v that are their layers' matter: linear attention (no log_a), RetNet
  (log_a constant by head), mLSTM before its normalisation (by head and
  token, the input gate in k), GLA and HGRN2 (by key and token), RWKV-5 (a
  constant by key, and a bonus), RWKV-6 (by key and token, and a bonus).

  In chunks of 64 tokens, as matrix products with float32 accumulation; no
  decay is ever formed as a quotient or from a difference of sums, so decays
  of exactly 1 (log_a = 0) and exactly 0 (log_a = -inf) are exact, with finite
  gradients. Memory is O(T·(K + V + 64)) and a state `[K, V]` every 64 tokens.
  float32 arguments are multiplied at full precision, bfloat16 ones in one
  pass of the matrix unit.

  Arguments on a mesh are divided over its devices by rows and heads, see
  `ssmjax.ops.partition`; whatever else is sharded is gathered.

  Args:
    q: queries, `[B, T, H, K]`, float32, bfloat16 or (under x64) float64.
    k: keys, `[B, T, H, K]`.
    v: values, `[B, T, H, V]`.
    log_a: logarithm of the decay, at most 0: `[B, T, H, K]`, `[B, T, H]` (one
      for a head), or constant in time, `[H, K]` or `[H]`; None for decay 1.
    bonus: u, `[H, K]`. With it, y reads the state *before* the token's decay.
    scale: factor of y, such as K^-½.
    initial_state: S₀, `[B, H, K, V]`; zeros if None.
    segment_ids: `[B, T]` int, 1-based, 0 for padding: see `selective_scan`.
      What is not finite in one document reaches no other. (Without ids, NaN at
      a token may reach the tokens before it in its chunk.)
    implementation: `"reference"` (a loop over tokens) or `"chunked"`; None is
      chunked. Both have reverse-mode derivatives of any order, the loop
      forward-mode ones too.

  Returns:
    y `[B, T, H, V]` of v's dtype, and the state after the last non-padding
    token, `[B, H, K, V]`, float32 or wider. Both carry gradients, to every
    array argument.

  Raises:
    ValueError: an argument of the wrong shape or dtype.
    NotImplementedError: chunks in forward mode (jvp, jacfwd, linearize).

  Source: Yang et al. 2024 (arXiv 2312.06635), Eq. 3 and §4; bonus: Peng et al.
  2024 (arXiv 2404.05892), Eq. 16; RetNet: Sun et al. 2023 (arXiv 2307.08621),
  Eq. 6.

  >>> x = jnp.ones((1, 3, 1, 1))
  >>> y, state = gated_linear_attention(x, x, x, jnp.log(jnp.array([0.5])))
  >>> y[0, :, 0, 0]
  Array([1.  , 1.5 , 1.75], dtype=float32)
  """
  _check("gated_linear_attention", q, k, v, log_a, bonus, scale,
         initial_state, segment_ids)  # fmt: skip
  if implementation is not None:
    check_choice("gated_linear_attention", "implementation", implementation,
                 ("reference", "chunked"))  # fmt: skip
  with refused_by_name("gated_linear_attention"):
    return _gated_linear_attention(
      q, k, v, log_a, bonus, initial_state, segment_ids, scale=scale,
      implementation=implementation,
    )  # fmt: skip


def gated_linear_attention_step(
  q: Float[Array, "B H K"],
  k: Float[Array, "B H K"],
  v: Float[Array, "B H V"],
  log_a: Float[Array, "..."] | None = None,
  *,
  state: Float[Array, "B H K V"],
  bonus: Float[Array, "H K"] | None = None,
  scale: float = 1.0,
  segment_ids: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
  """Advance `gated_linear_attention` by one token, in O(K·V).

  log_a is `[B, H, K]`, `[B, H]`, `[H]` or None; a constant `[H, K]` is passed
  as `[1, H, K]`, for two axes are B and H here. A row whose segment id is 0
  is padding: its state stays, its y is 0.

  Returns:
    y `[B, H, V]` of v's dtype and the new state `[B, H, K, V]`.
  """
  _check("gated_linear_attention_step", q, k, v, log_a, bonus, scale, state,
         segment_ids, time=False)  # fmt: skip
  valid = None if segment_ids is None else segment_ids > 0
  state = state.astype(_dtype(q, k, v, log_a, bonus, state))
  log_a = _spread(log_a, k, state.dtype)
  return _token(state, q, k, v, log_a, valid, None, bonus=bonus, scale=scale)


def gated_linear_attention_reference(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T H K"],
  v: Float[Array, "B T H V"],
  log_a: Float[Array, "..."] | None = None,
  *,
  bonus: Float[Array, "H K"] | None = None,
  scale: float = 1.0,
  initial_state: Float[Array, "B H K V"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
  """Define `gated_linear_attention`: a loop of its step over the tokens."""
  _check("gated_linear_attention_reference", q, k, v, log_a, bonus,
         scale, initial_state, segment_ids)  # fmt: skip
  state = _initial(q, k, v, log_a, bonus, initial_state)
  log_a = _spread(log_a, k, state.dtype)
  time_first = lambda x: None if x is None else jnp.moveaxis(x, 1, 0)
  xs = map(time_first, (q, k, v, log_a, *segment_masks(segment_ids)))
  state, bonus, *xs = match_varying(state, bonus, *xs)

  def step(state, token):
    y, state = _token(state, *token, bonus=bonus, scale=scale)
    return state, y

  state, y = lax.scan(step, state, tuple(xs))
  return jnp.moveaxis(y, 0, 1), state


def _token(state, q, k, v, log_a, valid, restart, *, bonus, scale):
  """One token of the definition; no time axis."""
  y_dtype, dtype = v.dtype, state.dtype
  where = lambda mask, x, y: jnp.where(
    mask.reshape(mask.shape + (1,) * (x.ndim - 1)), x, y
  )
  if valid is not None:
    q, k, v, log_a = (
      where(valid, x, jnp.zeros_like(x)) for x in (q, k, v, log_a)
    )
  if restart is not None:
    state = where(restart, jnp.zeros_like(state), state)
  q, k, v = (x.astype(dtype) for x in (q, k, v))
  decay = jnp.exp(log_a)
  decay = decay.reshape(*decay.shape, *(1,) * (4 - decay.ndim))
  write = k[..., None] * v[..., None, :]
  new = decay * state + write
  read = new
  if bonus is not None:
    read = state + bonus.astype(dtype)[None, :, :, None] * write
  y = (q[..., None] * read).sum(-2) * scale
  if valid is not None:
    y = where(valid, y, jnp.zeros_like(y))
  return y.astype(y_dtype), new


@functools.partial(jax.jit, static_argnames=("scale", "implementation"))
@any_rows
def _gated_linear_attention(*arrays, scale, implementation):
  """The attention of each device's part, if there are several."""

  def part(q, k, v, log_a, bonus, initial_state, segment_ids):
    if implementation == "reference":
      return gated_linear_attention_reference(
        q, k, v, log_a, bonus=bonus, scale=scale,
        initial_state=initial_state, segment_ids=segment_ids,
      )  # fmt: skip
    state = _initial(q, k, v, log_a, bonus, initial_state)
    log_a = _spread(log_a, k, state.dtype)
    masks = segment_masks(segment_ids)
    half = all(x.dtype == jnp.bfloat16 for x in (q, k, v))
    y, state = gla_chunked(
      q, k, v, log_a, bonus, state, *masks, half=half,
      op="gated_linear_attention",
    )  # fmt: skip
    return (y * scale).astype(v.dtype), state

  log_a = arrays[3]
  of_decay = {1: "d", 2: "dk", 3: "rtd", 4: "rtdk"}
  return divided(
    part, arrays,
    ("rtdk", "rtdk", "rtdv", of_decay[4 if log_a is None else log_a.ndim],
     "dk", "rdkv", "rt"),
    ("rtdv", "rdkv"), only_typed=implementation == "reference",
  )  # fmt: skip


def _initial(q, k, v, log_a, bonus, initial_state):
  dtype = _dtype(q, k, v, log_a, bonus, initial_state)
  if initial_state is not None:
    return initial_state.astype(dtype)
  return jnp.zeros((v.shape[0], *k.shape[2:], v.shape[-1]), dtype)


def _dtype(*arrays):
  return real_dtype(*(x for x in arrays if x is not None))


def _spread(log_a, k, dtype):
  """log_a for every row and token: k's shape, or that without the last axis."""
  heads = k.shape[:-1]
  if log_a is None:
    return jnp.zeros(heads, dtype)
  by_key = log_a.ndim == k.ndim or (log_a.ndim == 2 and k.ndim == 4)
  wanted = k.shape if by_key else heads
  lead = (1,) * (len(wanted) - log_a.ndim)
  log_a = log_a.astype(dtype).reshape(*lead, *log_a.shape)
  return jnp.broadcast_to(log_a, wanted)


def _check(
  function, q, k, v, log_a, bonus, scale, state, segment_ids, *, time=True
):  # fmt: skip
  state_name = "initial_state" if time else "state"
  arrays = {"q": q, "k": k, "v": v, "log_a": log_a, "bonus": bonus,
            state_name: state}  # fmt: skip
  check_arrays(function, q=q, k=k, v=v)
  check_number(function, "scale", scale)
  if not time:
    check_arrays(function, state=state)
  check_inexact(function, **arrays)
  for name, value in arrays.items():
    if value is not None and jnp.iscomplexobj(value):
      raise ValueError(
        f"{function}: {name} is complex, expected a real array. Run real and"
        " imaginary part of the values apart."
      )
  axes = "B T" if time else "B"
  sizes = check_shapes(
    function,
    {"q": (q, f"{axes} H K"), "k": (k, f"{axes} H K"), "v": (v, f"{axes} H V")},
  )
  if time and sizes["T"] < 1:
    raise ValueError(f"{function}: q has no time steps, expected T >= 1.")
  heads, width = sizes["H"], sizes["K"]
  if log_a is not None:
    lead = q.shape[:-1]
    constant = (heads, width) if time else (1, heads, width)
    allowed = [(*lead, width), lead, constant, (heads,)]
    if jnp.shape(log_a) not in allowed:
      raise ValueError(
        f"{function}: log_a has shape {jnp.shape(log_a)}, expected by key and"
        f" token {allowed[0]}, by token {allowed[1]}, or constant,"
        f" {allowed[2]} or {allowed[3]}. Add axes that are shared by"
        " jnp.broadcast_to."
      )
  check_shapes(
    function,
    {
      "q": (q, f"{axes} H K"),
      "v": (v, f"{axes} H V"),
      "bonus": (bonus, "H K"),
      state_name: (state, "B H K V"),
      "segment_ids": (segment_ids, axes),
    },
  )
  check_segment_ids(function, segment_ids)
