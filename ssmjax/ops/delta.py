"""The delta rule, with and without decay: a matrix state that corrects itself.

The public door and the definition; `ops.delta_chunked` has the fast form.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from ssmjax.ops.delta_chunked import delta_rule_chunked
from ssmjax.ops.empty import any_rows
from ssmjax.ops.partition import divided
from ssmjax.ops.reverse_only import refused_by_name, reverse_only
from ssmjax.ops.segments import segment_masks
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

__all__ = ["delta_rule", "delta_rule_reference", "delta_rule_step"]

Implementation = Literal["reference", "chunked"]


def delta_rule(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T H K"],
  v: Float[Array, "B T H P"],
  beta: Float[Array, "B T H"],
  log_a: Float[Array, "B T H"] | None = None,
  *,
  initial_state: Float[Array, "B H K P"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H K P"]]:
  """Run a linear attention that replaces what a key held before.

  Sₜ = aₜ (I - βₜ kₜ kₜᵀ) Sₜ₋₁ + βₜ kₜ vₜᵀ,   yₜ = Sₜᵀ qₜ,   a = exp(log_a)

  for each head. The state maps keys (rows) to values (columns), the transpose
  of the papers' S. One token is one step of gradient descent at rate β on
  ½‖Sᵀkₜ - vₜ‖², from the decayed state. Without log_a (a = 1) it is DeltaNet,
  with it gated DeltaNet. For ‖k‖ = 1 and 0 ≤ β ≤ 2 the state cannot grow by
  itself: β = 1 replaces the value of k, β > 1 gives negative eigenvalues.
  Norms, feature maps and scales of q and k are the layer's matter.

  The rule has no diagonal decay: I - βkkᵀ mixes the rows of the state by other
  directions at each token, so it has no form of Wang et al. 2025, Eq. 1, and
  polarization does not apply to it. What decays diagonally is a head as a
  whole: log_a = 0 holds its a at exactly 1 (DeltaNet), log_a = -inf at exactly
  0 (no memory: yₜ = βₜ (qₜ·kₜ) vₜ).

  Arguments on a mesh are divided over its devices by rows and heads, see
  `ssmjax.ops.partition`; whatever else is sharded is gathered.

  Args:
    q: queries, `[B, T, H, K]`, float32, bfloat16 or (under x64) float64.
    k: keys, `[B, T, H, K]`.
    v: values, `[B, T, H, P]`.
    beta: how much of a key's old value is replaced, `[B, T, H]`, 0 to 2.
    log_a: logarithm of the decay, `[B, T, H]`, 0 or less, -inf allowed; None
      for no decay.
    initial_state: S₀, `[B, H, K, P]`; zeros if None.
    segment_ids: `[B, T]` int, 1-based, 0 for padding: see `selective_scan`.
    implementation: `"reference"` (a loop, differentiable to any order),
      `"chunked"` (matrix products over chunks of 64 tokens, forward on a CPU
      16, memory linear in T, no state per token; first-order derivatives in
      reverse mode), or None: chunked.

  Returns:
    y `[B, T, H, P]` of v's dtype, and the state after the last non-padding
    token, `[B, H, K, P]`, float32 or wider. Both carry gradients. What
    is not finite goes to later tokens of its head and document only, where
    `"chunked"` makes all of y, or of a gradient, NaN. That holds for tokens
    that are not finite and for a state that has overflowed before a chunk;
    where finite tokens overflow within one chunk (β‖k‖² far above 2), NaN may
    also reach the chunk's other documents.

  Raises:
    ValueError: an argument of the wrong shape or dtype.
    NotImplementedError: a second derivative of `"chunked"`, or one in forward
      mode, at differentiation.

  Source: Schlag et al. 2021 (arXiv 2102.11174), Eq. 23-24; chunks: Yang et al.
  2024 (arXiv 2406.06484), §3; decay: Yang et al. 2024 (arXiv 2412.06464),
  Eq. 10.

  >>> x = jnp.ones((1, 3, 1, 1))
  >>> y, state = delta_rule(x, x, x, jnp.full((1, 3, 1), 0.5))
  >>> y[0, :, 0, 0]
  Array([0.5  , 0.75 , 0.875], dtype=float32)
  """
  _check("delta_rule", q, k, v, beta, log_a, initial_state, segment_ids)
  if implementation is not None:
    check_choice("delta_rule", "implementation", implementation,
                 ("reference", "chunked"))  # fmt: skip
  with refused_by_name("delta_rule"):
    return _delta_rule(
      q, k, v, beta, log_a, initial_state, segment_ids,
      implementation=implementation,
    )  # fmt: skip


def delta_rule_step(
  q: Float[Array, "B H K"],
  k: Float[Array, "B H K"],
  v: Float[Array, "B H P"],
  beta: Float[Array, "B H"],
  log_a: Float[Array, "B H"] | None = None,
  *,
  state: Float[Array, "B H K P"],
  segment_ids: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B H P"], Float[Array, "B H K P"]]:
  """Advance `delta_rule` by one token: y `[B, H, P]`, state `[B, H, K, P]`."""
  _check("delta_rule_step", q, k, v, beta, log_a, state, segment_ids,
         time=False)  # fmt: skip
  valid = None if segment_ids is None else segment_ids > 0
  state = state.astype(real_dtype(q, k, v, beta, log_a, state))
  return _token(state, q, k, v, beta, log_a, valid, None)


def delta_rule_reference(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T H K"],
  v: Float[Array, "B T H P"],
  beta: Float[Array, "B T H"],
  log_a: Float[Array, "B T H"] | None = None,
  *,
  initial_state: Float[Array, "B H K P"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H K P"]]:
  """Define `delta_rule`: a loop of `delta_rule_step` over the tokens."""
  _check("delta_rule_reference", q, k, v, beta, log_a, initial_state,
         segment_ids)  # fmt: skip
  state = _initial(q, k, v, beta, log_a, initial_state)
  xs = (q, k, v, beta, log_a, *segment_masks(segment_ids))
  time_first = lambda x: jnp.moveaxis(x, 1, 0)
  state, xs = match_varying(state, jax.tree.map(time_first, xs))

  def step(state, token):
    y, state = _token(state, *token)
    return state, y

  state, y = lax.scan(step, state, xs)
  return jnp.moveaxis(y, 0, 1), state


def _token(state, q, k, v, beta, log_a, valid, restart):
  """One token of the definition; no time axis."""
  y_dtype, old = v.dtype, state
  wide = lambda mask, x: lax.expand_dims(mask, range(1, x.ndim))
  if restart is not None:
    old = jnp.where(wide(restart, old), 0, old)
  inputs = (q, k, v, beta, log_a)
  if valid is not None:
    inputs = jax.tree.map(lambda x: jnp.where(wide(valid, x), x, 0), inputs)
  q, k, v, beta, log_a = jax.tree.map(lambda x: x.astype(state.dtype), inputs)
  if log_a is not None:
    old = jnp.exp(log_a)[..., None, None] * old
  read = lambda x, state: jnp.einsum(
    "bhk,bhkp->bhp", x, state, precision=lax.Precision.HIGHEST
  )
  write = beta[..., None] * (v - read(k, old))
  new = old + k[..., None] * write[..., None, :]
  y = read(q, new)
  if valid is not None:
    y = jnp.where(wide(valid, y), y, 0)
    new = jnp.where(wide(valid, new), new, state)
  return y.astype(y_dtype), new


@functools.partial(jax.jit, static_argnames="implementation")
@any_rows
def _delta_rule(
  q, k, v, beta, log_a, initial_state, segment_ids, *, implementation
):
  """The rule of each device's part, if there are several."""

  def part(q, k, v, beta, log_a, initial_state, segment_ids):
    if implementation == "reference":
      return delta_rule_reference(
        q, k, v, beta, log_a, initial_state=initial_state,
        segment_ids=segment_ids,
      )  # fmt: skip
    state = _initial(q, k, v, beta, log_a, initial_state)
    masks = segment_masks(segment_ids)
    args = match_varying(q, k, v, beta, log_a, state, *masks)
    mark = functools.partial(reverse_only, "delta_rule")
    return delta_rule_chunked(*jax.tree.map(mark, args[:6]), *args[6:])

  # The heads are what `divided` calls channels.
  return divided(
    part, (q, k, v, beta, log_a, initial_state, segment_ids),
    ("rtdk", "rtdk", "rtdp", "rtd", "rtd", "rdkp", "rt"), ("rtdp", "rdkp"),
    only_typed=implementation == "reference",
  )  # fmt: skip


def _initial(q, k, v, beta, log_a, initial_state):
  dtype = real_dtype(q, k, v, beta, log_a, initial_state)
  if initial_state is not None:
    return initial_state.astype(dtype)
  batch, _, heads, keys = k.shape
  return jnp.zeros((batch, heads, keys, v.shape[-1]), dtype)


def _check(function, q, k, v, beta, log_a, state, segment_ids, *, time=True):
  state_name = "initial_state" if time else "state"
  arrays = dict(q=q, k=k, v=v, beta=beta, log_a=log_a)
  arrays[state_name] = state
  check_arrays(function, q=q, k=k, v=v, beta=beta)
  if not time:
    check_arrays(function, state=state)
  check_inexact(function, **arrays)
  for name, value in arrays.items():
    if value is not None and jnp.iscomplexobj(value):
      raise ValueError(
        f"{function}: {name} is complex, expected a real array. Pass"
        f" {name}.real, or real and imaginary part as two halves of K and P."
      )
  axes = "B T" if time else "B"
  sizes = check_shapes(
    function,
    {
      "q": (q, f"{axes} H K"),
      "k": (k, f"{axes} H K"),
      "v": (v, f"{axes} H P"),
      "beta": (beta, f"{axes} H"),
      "log_a": (log_a, f"{axes} H"),
      state_name: (state, "B H K P"),
      "segment_ids": (segment_ids, axes),
    },
    {
      "k": "Repeat keys and values of grouped heads with jnp.repeat(k, n, -2).",
      "log_a": "There is one decay for each head and token.",
      state_name: "It maps keys to values, [K, P] for each head.",
    },
  )
  if time and sizes["T"] == 0:
    raise ValueError(f"{function}: q has no time steps, expected T >= 1.")
  check_segment_ids(function, segment_ids)
