"""State space duality, Mamba-2's layer: one decay for a head and token.

The public door. Over time it is gated linear attention with q = C, k = B,
v = Δx and log a = ΔA, in the same chunks.
"""

import functools
import math
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
  Polarization,
  check_arrays,
  check_choice,
  check_inexact,
  check_number,
  check_polarization,
  check_segment_ids,
  check_shapes,
  real_dtype,
)

__all__ = ["ssd", "ssd_reference", "ssd_step"]

Implementation = Literal["reference", "chunked"]


def ssd(
  x: Float[Array, "B T H P"],
  dt: Float[Array, "B T H"],
  A: Float[Array, " M"],
  B: Float[Array, "B T G N"],
  C: Float[Array, "B T G N"],
  D: Float[Array, "H *P"] | None = None,
  *,
  z: Float[Array, "B T H P"] | None = None,
  dt_bias: Float[Array, " H"] | None = None,
  dt_softplus: bool = False,
  dt_limits: tuple[float, float] = (0.0, math.inf),
  polarization: Polarization | None = None,
  initial_state: Float[Array, "B H P N"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H P N"]]:
  """Run Mamba-2's state space model over a sequence.

  Δₜ = clip(softplus(dtₜ + dt_bias), *dt_limits)   (or without the softplus)
  hₜ = exp(Δₜ A) hₜ₋₁ + Δₜ xₜ Bₜᵀ
  yₜ = (hₜ Cₜ + D xₜ) · silu(zₜ)

  for each head apart; A is one number for a head. Heads of a group, H / G one
  after another, share B and C, which are not repeated in memory. In chunks,
  as matrix products, see `gated_linear_attention`.

  Polarization is over heads, whose decay is one number: the first have decay
  exactly 1, the last exactly 0 whatever Δ is. x, dt, D, dt_bias and the state
  then have H = `polarization.total(M)` heads in the order ones, learned,
  zeros. A zero-head's initial state takes no part in y.

  Args:
    x: inputs, `[B, T, H, P]`, float32, bfloat16 or (under x64) float64.
    dt: step sizes Δ before bias and softplus, `[B, T, H]`.
    A: continuous decays, `[M]`, negative; M = H without polarization.
    B: input maps, `[B, T, G, N]`, G a divisor of H.
    C: output maps, `[B, T, G, N]`.
    D: skip, `[H]` or `[H, P]`.
    z: gate, `[B, T, H, P]`; y is multiplied by z · sigmoid(z).
    dt_bias: added to dt, `[H]`.
    dt_softplus: pass dt (with its bias) through softplus.
    dt_limits: the least and the greatest Δ; beyond them dt has no gradient.
    polarization: heads of decay exactly 1 and exactly 0.
    initial_state: h₀, `[B, H, P, N]`; zeros if None.
    segment_ids: `[B, T]` int, 1-based, 0 for padding: see `selective_scan`.
      What is not finite in one document reaches no other.
    implementation: `"reference"` (a loop over tokens) or `"chunked"`; None is
      chunked. Both have reverse-mode derivatives of any order, the loop
      forward-mode ones too.

  Returns:
    y `[B, T, H, P]` of x's dtype, and the state after the last non-padding
    token, `[B, H, P, N]`, float32 or wider. Both carry gradients, to every
    array argument.

  Raises:
    ValueError: an argument of the wrong shape or dtype.
    NotImplementedError: chunks in forward mode (jvp, jacfwd, linearize).

  Source: Dao & Gu 2024 (arXiv 2405.21060), Eq. 1 and §6; polarization: Wang et
  al. 2025 (arXiv 2501.00658), §6.

  >>> x, one = jnp.ones((1, 3, 1, 1)), jnp.ones((1, 3, 1))
  >>> y, state = ssd(x, one, jnp.log(jnp.array([0.5])), x, x)
  >>> y[0, :, 0, 0]
  Array([1.  , 1.5 , 1.75], dtype=float32)
  """
  _check("ssd", x, dt, A, B, C, D, z, dt_bias, dt_limits, polarization,
         initial_state, segment_ids)  # fmt: skip
  if implementation is not None:
    check_choice(
      "ssd", "implementation", implementation, ("reference", "chunked")
    )
  with refused_by_name("ssd"):
    return _ssd(
      x, dt, A, B, C, D, z, dt_bias, initial_state, segment_ids,
      dt_softplus=dt_softplus, dt_limits=tuple(dt_limits),
      polarization=polarization, implementation=implementation,
    )  # fmt: skip


def ssd_step(
  x: Float[Array, "B H P"],
  dt: Float[Array, "B H"],
  A: Float[Array, " M"],
  B: Float[Array, "B G N"],
  C: Float[Array, "B G N"],
  D: Float[Array, "H *P"] | None = None,
  *,
  state: Float[Array, "B H P N"],
  z: Float[Array, "B H P"] | None = None,
  dt_bias: Float[Array, " H"] | None = None,
  dt_softplus: bool = False,
  dt_limits: tuple[float, float] = (0.0, math.inf),
  polarization: Polarization | None = None,
  segment_ids: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B H P"], Float[Array, "B H P N"]]:
  """Advance `ssd` by one token: y `[B, H, P]`, state `[B, H, P, N]`.

  A row whose segment id is 0 is padding: its state stays, its y is 0.
  """
  _check("ssd_step", x, dt, A, B, C, D, z, dt_bias, dt_limits, polarization,
         state, segment_ids, time=False)  # fmt: skip
  valid = None if segment_ids is None else segment_ids > 0
  state = state.astype(real_dtype(x, dt, A, B, C, D, z, dt_bias, state))
  return _token(
    state, x, dt, B, C, z, valid, None, rate=_rates(A, polarization), D=D,
    dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limits=dt_limits,
  )  # fmt: skip


def ssd_reference(
  x: Float[Array, "B T H P"],
  dt: Float[Array, "B T H"],
  A: Float[Array, " M"],
  B: Float[Array, "B T G N"],
  C: Float[Array, "B T G N"],
  D: Float[Array, "H *P"] | None = None,
  *,
  z: Float[Array, "B T H P"] | None = None,
  dt_bias: Float[Array, " H"] | None = None,
  dt_softplus: bool = False,
  dt_limits: tuple[float, float] = (0.0, math.inf),
  polarization: Polarization | None = None,
  initial_state: Float[Array, "B H P N"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H P N"]]:
  """Define `ssd`: a loop of `ssd_step` over the tokens."""
  _check("ssd_reference", x, dt, A, B, C, D, z, dt_bias, dt_limits,
         polarization, initial_state, segment_ids)  # fmt: skip
  state = _initial(x, dt, A, B, C, D, z, dt_bias, initial_state)
  return _loop(
    x, dt, _rates(A, polarization), B, C, D, z, dt_bias, state,
    *segment_masks(segment_ids), dt_softplus=dt_softplus, dt_limits=dt_limits,
  )  # fmt: skip


def _loop(
  x, dt, rate, B, C, D, z, dt_bias, state, valid, restart, **options
):  # fmt: skip
  time_first = lambda x: None if x is None else jnp.moveaxis(x, 1, 0)
  xs = map(time_first, (x, dt, B, C, z, valid, restart))
  state, rate, D, dt_bias, *xs = match_varying(state, rate, D, dt_bias, *xs)

  def step(state, token):
    y, state = _token(state, *token, rate=rate, D=D, dt_bias=dt_bias, **options)
    return state, y

  state, y = lax.scan(step, state, tuple(xs))
  return jnp.moveaxis(y, 0, 1), state


def _token(
  state, x, dt, B, C, z, valid, restart, *, rate, D, dt_bias, dt_softplus,
  dt_limits,
):  # fmt: skip
  """One token of the definition; no time axis."""
  y_dtype, dtype = x.dtype, state.dtype
  x, dt, B, C, z = (_where(valid, a) for a in (x, dt, B, C, z))
  if restart is not None:
    state = _where(~restart, state)
  x = x.astype(dtype)
  step, log_a = _discretise(
    dt, rate, dt_bias, valid, dtype, dt_softplus, dt_limits
  )
  groups, of_group = B.shape[1], x.shape[1] // B.shape[1]
  by_group = lambda a: a.reshape(a.shape[0], groups, of_group, *a.shape[2:])
  write = by_group(step[..., None] * x)[..., None]
  write = (write * B.astype(dtype)[:, :, None, None]).reshape(state.shape)
  state = jnp.exp(log_a)[..., None, None] * state + write
  y = (by_group(state) * C.astype(dtype)[:, :, None, None]).sum(-1)
  y = _finish(y.reshape(x.shape), x, D, z, dtype)
  return _where(valid, y).astype(y_dtype), state


@functools.partial(
  jax.jit,
  static_argnames=("dt_softplus", "dt_limits", "polarization",
                   "implementation"),
)  # fmt: skip
@any_rows
def _ssd(
  x, dt, A, B, C, D, z, dt_bias, initial_state, segment_ids, *, polarization,
  implementation, **options,
):  # fmt: skip
  """The layer of each device's part, if there are several."""
  state = _initial(x, dt, A, B, C, D, z, dt_bias, initial_state)
  groups, heads = B.shape[2], x.shape[2]
  rate = _rates(A, polarization)
  run = _loop if implementation == "reference" else _chunked

  def part(*arrays):
    *arrays, segment_ids = map(join, arrays, places)
    y, state = run(*arrays, *segment_masks(segment_ids), **options)
    return split(y, 2), split(state, 1)

  # Heads are divided over devices with their groups, where there are several.
  grouped = 1 < groups < heads

  def split(a, place):
    if a is None or place is None or not grouped:
      return a
    return a.reshape(
      *a.shape[:place], -1, heads // groups, *a.shape[place + 1 :]
    )

  def join(a, place):
    if a is None or place is None or not grouped:
      return a
    return a.reshape(*a.shape[:place], -1, *a.shape[place + 2 :])

  places = (2, 2, 0, None, None, 0, 2, 0, 1, None)
  words = ["rtdp", "rtd", "d", "rtgn", "rtgn", "dp", "rtdp", "d", "rdpn", "rt"]
  if groups > 1:
    words[3] = words[4] = "rtdn"
  out = ["rtdp", "rdpn"]
  if grouped:
    words, out = (
      [w.replace("d", "dh") if "g" not in w and w != "rtdn" else w for w in ws]
      for ws in (words, out)
    )
  arrays = (x, dt, rate, B, C, D, z, dt_bias, state, segment_ids)
  y, state = divided(
    part, tuple(map(split, arrays, places)), words, out,
    only_typed=implementation == "reference",
  )  # fmt: skip
  return join(y, 2), join(state, 1)


def _chunked(
  x, dt, rate, B, C, D, z, dt_bias, state, valid, restart, *, dt_softplus,
  dt_limits,
):  # fmt: skip
  y_dtype, dtype = x.dtype, state.dtype
  x, dt, z = (_where(valid, a) for a in (x, dt, z))
  step, log_a = _discretise(
    dt, rate, dt_bias, valid, dtype, dt_softplus, dt_limits
  )
  x_wide = x.astype(dtype)
  v = step[..., None] * x_wide
  turn = lambda state: jnp.swapaxes(state, -1, -2)
  y, state = gla_chunked(
    C, B, v, log_a, None, turn(state), valid, restart,
    half=x.dtype == B.dtype == C.dtype == jnp.bfloat16, op="ssd",
  )  # fmt: skip
  y = _finish(y, x_wide, D, z, dtype)
  return _where(valid, y).astype(y_dtype), turn(state)


def _where(mask, a):
  """a where the mask holds, else 0; a itself without a mask."""
  if mask is None or a is None:
    return a
  mask = mask.reshape(mask.shape + (1,) * (a.ndim - mask.ndim))
  return jnp.where(mask, a, jnp.zeros_like(a))


def _discretise(dt, rate, dt_bias, valid, dtype, dt_softplus, dt_limits):
  """(Δ, Δ A); both 0 at padding. -∞ · 0 is no number, so -∞ is chosen."""
  lead = (1,) * (dt.ndim - 1)
  dt = dt.astype(dtype)
  if dt_bias is not None:
    dt = dt + dt_bias.astype(dtype).reshape(*lead, -1)
  if dt_softplus:
    dt = jax.nn.softplus(dt)
  if dt_limits[0] > 0 or dt_limits[1] < math.inf:
    dt = jnp.clip(dt, *dt_limits)
  rate = rate.astype(dtype).reshape(*lead, -1)
  none = rate == -jnp.inf
  log_a = jnp.where(none, -jnp.inf, dt * jnp.where(none, 0, rate))
  return _where(valid, dt), _where(valid, log_a)


def _finish(y, x, D, z, dtype):
  """The skip and the gate."""
  if D is not None:
    D = D.astype(dtype).reshape(*D.shape, *(1,) * (2 - D.ndim))
    y = y + D.reshape((1,) * (x.ndim - 2) + D.shape) * x
  return y if z is None else y * jax.nn.silu(z.astype(dtype))


def _rates(A, polarization):
  """A of every head, -inf where the decay is exactly zero."""
  if polarization is None:
    return A
  ones, zeros = polarization.ones, polarization.zeros
  if polarization.placement == "replace":
    A = A[ones : A.shape[0] - zeros]
  leak = polarization.finite_zero
  zero = -math.inf if leak is None else leak
  full = lambda count, value: jnp.full(count, value, A.dtype)
  return jnp.concatenate([full(ones, 0.0), A, full(zeros, zero)])


def _initial(x, dt, A, B, C, D, z, dt_bias, state):
  dtype = real_dtype(x, dt, A, B, C, D, z, dt_bias, state)
  if state is not None:
    return state.astype(dtype)
  return jnp.zeros((x.shape[0], *x.shape[2:], B.shape[-1]), dtype)


def _check(
  function, x, dt, A, B, C, D, z, dt_bias, dt_limits, polarization, state,
  segment_ids, *, time=True,
):  # fmt: skip
  state_name = "initial_state" if time else "state"
  arrays = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z,
            "dt_bias": dt_bias, state_name: state}  # fmt: skip
  check_arrays(function, x=x, dt=dt, A=A, B=B, C=C)
  check_polarization(function, polarization)
  if not time:
    check_arrays(function, state=state)
  check_inexact(function, **arrays)
  for name, value in arrays.items():
    if value is not None and jnp.iscomplexobj(value):
      raise ValueError(
        f"{function}: {name} is complex, expected a real array. Complex decays"
        " are selective_scan's."
      )
  axes = "B T" if time else "B"
  sizes = check_shapes(function, {"x": (x, f"{axes} H P"), "A": (A, "M")})
  if time and sizes["T"] < 1:
    raise ValueError(f"{function}: x has no time steps, expected T >= 1.")
  heads = (polarization or Polarization()).total(sizes["M"])
  hint = {}
  if polarization is not None:
    hint["x"] = (
      f"H counts ones={polarization.ones}, the {sizes['M']} heads of A and"
      f" zeros={polarization.zeros}"
      + (", which replace heads of A."
         if polarization.placement == "replace" else ".")
    )  # fmt: skip
  sizes = check_shapes(
    function,
    {
      "x": (x, f"{axes} H={heads} P"),
      "dt": (dt, f"{axes} H"),
      "B": (B, f"{axes} G N"),
      "C": (C, f"{axes} G N"),
      "D": (D, "H" if D is None or D.ndim < 2 else "H P"),
      "z": (z, f"{axes} H P"),
      "dt_bias": (dt_bias, "H"),
      state_name: (state, "B H P N"),
      "segment_ids": (segment_ids, axes),
    },
    hint,
  )
  if sizes["G"] < 1 or heads % sizes["G"]:
    raise ValueError(
      f"{function}: B has G={sizes['G']} groups, expected a divisor of the"
      f" H={heads} heads of x."
    )
  pair = isinstance(dt_limits, (tuple, list)) and len(dt_limits) == 2
  if not pair:
    raise ValueError(
      f"{function}: dt_limits is {dt_limits!r}, expected (least, greatest)."
    )
  low, high = dt_limits
  for limit in dt_limits:
    check_number(function, "dt_limits", limit)
  if not 0 <= low <= high:
    raise ValueError(
      f"{function}: dt_limits is {dt_limits!r}, expected (least, greatest)"
      " with 0 <= least <= greatest."
    )
  check_segment_ids(function, segment_ids)
