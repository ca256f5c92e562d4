"""The selective scan of Mamba (S6): over time, one step, and its definition.

The public door: shapes, padding, polarization and the choice of
implementation. The implementations share one private contract, which knows
neither segment ids nor zero-channels (see `_selective_scan`).
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from ssmjax.ops import dispatch
from ssmjax.ops.empty import any_rows
from ssmjax.ops.partition import divided
from ssmjax.ops.segments import last_valid, segment_masks
from ssmjax.ops.selective_associative import (
  selective_scan_associative,
  selective_scan_chunks,
)
from ssmjax.ops.selective_chunked import CHUNKED, RESULTS
from ssmjax.ops.selective_fused import fused
from ssmjax.ops.selective_token import advance, split_channels, token
from ssmjax.ops.varying import match_varying
from ssmjax.types import (
  Array,
  Float,
  Inexact,
  Int,
  Polarization,
  check_arrays,
  check_choice,
  check_inexact,
  check_polarization,
  check_segment_ids,
  check_shapes,
  state_dtype,
)

__all__ = ["selective_scan", "selective_scan_reference", "selective_step"]

Implementation = Literal["reference", "associative", "chunked", "pallas"]


def selective_scan(
  u: Float[Array, "B T D"],
  delta: Float[Array, "B T D"],
  A: Inexact[Array, "D M"],
  B: Inexact[Array, "B T N"],
  C: Inexact[Array, "B T N"],
  D: Float[Array, " D"] | None = None,
  *,
  z: Float[Array, "B T D"] | None = None,
  delta_bias: Float[Array, " D"] | None = None,
  delta_softplus: bool = False,
  polarization: Polarization | None = None,
  initial_state: Inexact[Array, "B D N"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T D"], Inexact[Array, "B D N"]]:
  """Run a selective state space model over a sequence.

  Δₜ = softplus(deltaₜ + delta_bias)   (or deltaₜ + delta_bias)
  hₜ = exp(Δₜ A) ∘ hₜ₋₁ + Δₜ Bₜ uₜ
  yₜ = (Re Σₙ Cₜₙ hₜₙ + D uₜ) · silu(zₜ)

  Each channel d has its own Δ, A and state; B and C are shared by all
  channels. Constant B, C and Δ give S4D; A = 0 gives an unnormalised running
  sum (linear attention). B̄ = ΔB is Euler's rule, as in Mamba, not the exact
  zero-order hold. With complex A, B or C there is no factor 2: a layer that
  keeps half of the conjugate pairs doubles y itself.

  Over a mesh (explicit shardings, or within `jax.set_mesh`) each device scans
  its rows and channels; whatever else is sharded is gathered.

  Args:
    u: inputs, `[B, T, D]`, float32, bfloat16 or (under x64) float64.
    delta: step sizes Δ before bias and softplus, `[B, T, D]`.
    A: continuous decays, `[D, M]`, real part negative; real or complex.
    B: input maps, `[B, T, N]`. N = M without polarization.
    C: output maps, `[B, T, N]`.
    D: skip, `[D]`.
    z: gate, `[B, T, D]`; y is multiplied by z · sigmoid(z).
    delta_bias: added to delta, `[D]`.
    delta_softplus: pass delta (with its bias) through softplus.
    polarization: channels of decay exactly 1 and exactly 0. B, C and the state
      have N = `polarization.total(M)` channels, in the order ones, learned,
      zeros. A zero-channel's initial state takes no part in y.
    initial_state: h₀, `[B, D, N]`; zeros if None.
    segment_ids: `[B, T]` int, 1-based, 0 for padding. Padding leaves the state
      untouched, its y is 0, and NaN there reaches nothing. The state restarts
      where a non-padding id differs from the previous non-padding id.
    implementation: `"reference"` (a loop), `"associative"`
      (`jax.lax.associative_scan`, differentiable to any order, memory
      B·T·D·N), `"chunked"` (memory B·D·N·T/chunk), `"pallas"` (fused kernel),
      or None: the kernel on TPU and GPU where there is one, else chunked.

  Returns:
    y `[B, T, D]` of u's dtype, and the state after the last non-padding token,
    `[B, D, N]`, float32 (float64, complex64, complex128 as the inputs demand).
    Both carry gradients, to every array argument.

  Raises:
    ValueError: an argument of the wrong shape or dtype.
    NotImplementedError: `"pallas"` where there is no kernel; a second
      derivative of a fused implementation, at differentiation.

  Source: Gu & Dao 2023 (arXiv 2312.00752), Algorithm 2; polarization: Wang et
  al. 2025 (arXiv 2501.00658), §6 and App. E.5.1.

  >>> x = jnp.ones((1, 3, 1))
  >>> y, state = selective_scan(x, x, jnp.zeros((1, 1)), x, x)
  >>> y[0, :, 0], state[0, 0]
  (Array([1., 2., 3.], dtype=float32), Array([3.], dtype=float32))
  """
  _check("selective_scan", u, delta, A, B, C, D, z, delta_bias,
         polarization, initial_state, segment_ids)  # fmt: skip
  check_choice("selective_scan", "implementation", implementation,
               (None, *dispatch.IMPLEMENTATIONS))  # fmt: skip
  return _selective_scan(
    u, delta, A, B, C, D, z, delta_bias, initial_state, segment_ids,
    delta_softplus=delta_softplus, polarization=polarization,
    implementation=implementation,
  )  # fmt: skip


def selective_step(
  u: Float[Array, "B D"],
  delta: Float[Array, "B D"],
  A: Inexact[Array, "D M"],
  B: Inexact[Array, "B N"],
  C: Inexact[Array, "B N"],
  D: Float[Array, " D"] | None = None,
  *,
  state: Inexact[Array, "B D N"],
  z: Float[Array, "B D"] | None = None,
  delta_bias: Float[Array, " D"] | None = None,
  delta_softplus: bool = False,
  polarization: Polarization | None = None,
  segment_ids: Int[Array, " B"] | None = None,
  implementation: Implementation | None = None,
) -> tuple[Float[Array, "B D"], Inexact[Array, "B D N"]]:
  """Advance a selective state space model by one token, in O(1).

  The equations, arguments and errors of `selective_scan`, without the time
  axis. A row whose segment id is 0 is padding: its state stays, its y is 0.
  (Ids are compared within one call, so a single token never restarts.)
  With `implementation="pallas"` a fused kernel, on TPU; None takes it where it
  is the fastest; the other names are one and the same for a single token.
  All derivatives exist in every form.

  Returns:
    y `[B, D]` of u's dtype and the new state `[B, D, N]`.
  """
  _check("selective_step", u, delta, A, B, C, D, z, delta_bias, polarization,
         state, segment_ids, time=False)  # fmt: skip
  if implementation is not None:
    check_choice("selective_step", "implementation", implementation,
                 dispatch.IMPLEMENTATIONS)  # fmt: skip
  valid = None if segment_ids is None else segment_ids > 0
  return advance(
    state.astype(state_dtype(u, A, B, C, state)), u, delta, A, B, C, D, z,
    delta_bias, valid, delta_softplus=delta_softplus,
    polarization=polarization, implementation=implementation,
  )  # fmt: skip


def selective_scan_reference(
  u: Float[Array, "B T D"],
  delta: Float[Array, "B T D"],
  A: Inexact[Array, "D M"],
  B: Inexact[Array, "B T N"],
  C: Inexact[Array, "B T N"],
  D: Float[Array, " D"] | None = None,
  *,
  z: Float[Array, "B T D"] | None = None,
  delta_bias: Float[Array, " D"] | None = None,
  delta_softplus: bool = False,
  polarization: Polarization | None = None,
  initial_state: Inexact[Array, "B D N"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Inexact[Array, "B D N"]]:
  """Define `selective_scan`: a loop of `selective_step` over the tokens."""
  _check("selective_scan_reference", u, delta, A, B, C, D, z, delta_bias,
         polarization, initial_state, segment_ids)  # fmt: skip
  dtype = state_dtype(u, A, B, C, initial_state)
  batch, _, channels = u.shape
  if initial_state is None:
    initial_state = jnp.zeros((batch, channels, B.shape[-1]), dtype)
  valid, restart = segment_masks(segment_ids)
  time_first = lambda x: None if x is None else jnp.moveaxis(x, 1, 0)

  def step(state, xs):
    y, state = token(
      state, *xs, A=A, D=D, delta_bias=delta_bias,
      delta_softplus=delta_softplus, polarization=polarization,
    )  # fmt: skip
    return state, y

  xs = tuple(map(time_first, (u, delta, B, C, z, valid, restart)))
  state, *xs_varying = match_varying(initial_state.astype(dtype), A, D,
                                     delta_bias, *xs)  # fmt: skip
  A, D, delta_bias, *xs = xs_varying
  state, y = lax.scan(step, state, tuple(xs))
  return jnp.moveaxis(y, 0, 1), state


@functools.partial(
  jax.jit,
  static_argnames=("delta_softplus", "polarization", "implementation"),
)
@any_rows
def _selective_scan(*arrays, delta_softplus, polarization, implementation):
  """The scan of each device's part, if there are several."""
  options = dict(delta_softplus=delta_softplus, polarization=polarization)

  def part(u, delta, A, B, C, D, z, delta_bias, initial_state, segment_ids):
    if implementation == "reference":
      return selective_scan_reference(
        u, delta, A, B, C, D, z=z, delta_bias=delta_bias,
        initial_state=initial_state, segment_ids=segment_ids, **options,
      )  # fmt: skip
    return _dispatch(
      u, delta, A, B, C, D, z, delta_bias, initial_state, segment_ids,
      implementation=implementation, **options,
    )  # fmt: skip

  return divided(
    part, arrays,
    ("rtd", "rtd", "dn", "rtn", "rtn", "d", "rtd", "d", "rdn", "rt"),
    ("rtd", "rdn"),
    only_typed=implementation in ("reference", "associative"),
  )  # fmt: skip


def _dispatch(
  u, delta, A, B, C, D, z, delta_bias, initial_state, segment_ids, *,
  delta_softplus, polarization, implementation,
):  # fmt: skip
  dtype = state_dtype(u, A, B, C, initial_state)
  batch, _, channels = u.shape
  total = B.shape[-1]
  polarization = polarization or Polarization()
  A, ones, zeros = split_channels(A, polarization)
  kept = total - zeros
  valid, restart = segment_masks(segment_ids)
  direct = zero_state = None
  if zeros:
    B_zero, C_zero = B[..., kept:], C[..., kept:]
    if valid is not None:
      mask = valid[..., None]
      B_zero = jnp.where(mask, B_zero, jnp.zeros_like(B_zero))
      C_zero = jnp.where(mask, C_zero, jnp.zeros_like(C_zero))
    # A zero-channel sees its own token only: y gains (C·B) Δ u.
    direct = (B_zero.astype(dtype) * C_zero.astype(dtype)).sum(-1).real
    zero_state = _zero_state(
      u, delta, B_zero, delta_bias, delta_softplus, dtype,
      None if initial_state is None else initial_state[..., kept:], valid,
    )  # fmt: skip
    B, C = B[..., :kept], C[..., :kept]
    if initial_state is not None:
      initial_state = initial_state[..., :kept]
  if initial_state is not None:
    initial_state = initial_state.astype(dtype)
  if kept and not A.shape[1]:
    # A kernel has learned channels: let the ones be learned at rate zero.
    A, ones = jnp.zeros((channels, kept), A.dtype), 0
  is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
  refused = None
  half = {x.dtype.name for x in (u, delta, B, C, D, z, delta_bias)
          if x is not None} - {"float32", "bfloat16"}  # fmt: skip
  if is_complex:
    refused = "has no kernel for complex A, B or C"
  elif half:
    refused = f"has no kernel for {', '.join(sorted(half))}"
  elif dtype != jnp.dtype("float32"):
    refused = f"has no kernel for {dtype}"
  elif not kept:
    refused = "has no kernel without a state: all channels are zero-channels"
  forms = {"associative": selective_scan_associative}
  if is_complex or not kept:
    forms["chunked"] = selective_scan_chunks
  y, state = dispatch.run(
    "selective_scan", implementation,
    u, delta, A, B, C, D, z, delta_bias, direct, initial_state, valid, restart,
    forms=forms, chunked=CHUNKED, results=RESULTS, fuse=fused,
    no_kernel=refused, delta_softplus=delta_softplus, ones=ones,
  )  # fmt: skip
  if zeros:
    state = jnp.concatenate([state, zero_state], -1)
  assert state.shape == (batch, channels, total)
  return y, state


def _zero_state(
  u, delta, B, delta_bias, delta_softplus, dtype, initial_state, valid
):
  """Δ·B·u of the last token, the state of the zero-channels."""
  if valid is None:
    u, delta, B = u[:, -1], delta[:, -1], B[:, -1]
  else:
    index, any_valid = last_valid(valid)
    pick = lambda x: jnp.take_along_axis(x, index[:, None, None], 1)[:, 0]
    clean = lambda x: jnp.where(any_valid[:, None], x, jnp.zeros_like(x))
    u, delta, B = clean(pick(u)), clean(pick(delta)), clean(pick(B))
  real = jnp.finfo(dtype).dtype
  delta = delta.astype(real)
  if delta_bias is not None:
    delta = delta + delta_bias.astype(real)[None]
  if delta_softplus:
    delta = jax.nn.softplus(delta)
  write = delta * u.astype(real)
  state = write[..., None].astype(dtype) * B.astype(dtype)[:, None]
  if valid is None:
    return state
  if initial_state is None:
    initial_state = jnp.zeros_like(state)
  return jnp.where(any_valid[:, None, None], state, initial_state.astype(dtype))


def _check(
  function, u, delta, A, B, C, D, z, delta_bias, polarization, state,
  segment_ids, *, time=True,
):  # fmt: skip
  state_name = "initial_state" if time else "state"
  check_arrays(function, u=u, delta=delta, A=A, B=B, C=C)
  check_polarization(function, polarization)
  if not time:
    check_arrays(function, state=state)
  check_inexact(function, u=u, delta=delta, A=A, B=B, C=C, D=D, z=z,
                delta_bias=delta_bias, **{state_name: state})  # fmt: skip
  for name, value in dict(
    u=u, delta=delta, D=D, z=z, delta_bias=delta_bias
  ).items():
    if value is not None and jnp.iscomplexobj(value):
      raise ValueError(
        f"{function}: {name} is complex, expected a real array: only A, B, C"
        " and the state may be complex. Run real and imaginary part apart."
      )
  shape = jnp.shape(A)
  if len(shape) != 2:
    raise ValueError(f"{function}: A has shape {shape}, expected (D, N).")
  total = (polarization or Polarization()).total(shape[1])
  hint = {}
  if polarization is not None:
    hint = dict.fromkeys(
      ("B", "C", state_name),
      f"N counts ones={polarization.ones}, the {shape[1]} columns of A and"
      f" zeros={polarization.zeros}"
      + (
        "."
        if polarization.placement == "add"
        else ", which replace columns of A."
      ),
    )
  channels = f"N={total}"
  axes = "B T" if time else "B"
  check_shapes(
    function,
    {
      "u": (u, f"{axes} D"),
      "delta": (delta, f"{axes} D"),
      "A": (A, f"D {shape[1]}"),
      "B": (B, f"{axes} {channels}"),
      "C": (C, f"{axes} {channels}"),
      "D": (D, "D"),
      "z": (z, f"{axes} D"),
      "delta_bias": (delta_bias, "D"),
      state_name: (state, f"B D {channels}"),
      "segment_ids": (segment_ids, axes),
    },
    hint,
  )
  if time and u.shape[1] == 0:
    raise ValueError(f"{function}: u has no time steps, expected T >= 1.")
  check_segment_ids(function, segment_ids)
