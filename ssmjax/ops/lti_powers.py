"""Powers exp(lΔA) for many l, right to the last of them.

In float32 the product Δ·Im A carries an error of 2⁻²⁵, and l times as much of
it is an angle: at l = 16,384 nothing would be left of a fast mode that decays
slowly. So angles are counted in turns, of which whole ones may be forgotten:
in integers, whose overflow does just that.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ssmjax.types import Array, Float, Inexact

__all__ = ["integer_powers", "powers"]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def powers(
  A: Inexact[Array, "D N"], dt: Float[Array, "D 1"], step: int, count: int
) -> Inexact[Array, "D N E"]:
  """exp(l·Δ·A) for l = 0, step, … (count - 1)·step."""
  exponents = jnp.arange(count, dtype=jnp.int32)[None, None] * step
  real = dt.dtype
  grow = (dt * A.real)[..., None] * exponents.astype(real)
  if not jnp.iscomplexobj(A):
    return jnp.exp(grow)
  if real == jnp.dtype("float64"):
    angle = (dt * A.imag)[..., None] * exponents.astype(real)
  else:
    whole, rest = _turns(A.imag, jnp.broadcast_to(dt, A.shape))
    # Wraps modulo 2³², which is one turn.
    turns = (whole[..., None] * exponents).astype(real) * 2.0**-32
    angle = turns + rest[..., None] * exponents.astype(real)
    angle = 2 * math.pi * angle
  size = jnp.exp(grow)
  return lax.complex(size * jnp.cos(angle), size * jnp.sin(angle))


@powers.defjvp
def _powers_jvp(step, count, primals, tangents):
  """d exp(lΔA) = l exp(lΔA) (dΔ A + Δ dA)."""
  A, dt = primals
  dA, d_dt = tangents
  out = powers(A, dt, step, count)
  exponents = jnp.arange(count, dtype=jnp.int32)[None, None] * step
  dz = dt.astype(A.dtype) * dA + d_dt.astype(A.dtype) * A
  return out, out * exponents.astype(A.dtype) * dz[..., None]


def integer_powers(
  a: Inexact[Array, "*S"], step: int, count: int
) -> Inexact[Array, "*S E"]:
  """aˡ for l = 0, step, … (count - 1)·step, by products only.

  a = 0 needs no logarithm then, and has its gradient: 0⁰ is 1, 0¹ has 1.
  """
  base = _power(a, step)[..., None]
  table = jnp.ones_like(base)
  while table.shape[-1] < count:
    table = jnp.concatenate([table, base * table], -1)
    base = base * base
  return table[..., :count]


def _power(a, exponent):
  """a to an exponent of at least 1, by squaring."""
  if exponent == 1:
    return a
  half = _power(a, exponent // 2)
  return half * half * a if exponent % 2 else half * half


def _turns(a, b):
  """a·b/2π modulo 1, as an int32 in units of 2⁻³² and a small float32.

  Every product is of two numbers of 12 bits and so exact in 24, whether the
  compiler fuses multiplication and addition or not.
  """
  parts = [x * y for x in _halves(a) for y in _halves(b)]
  parts = jnp.stack([half for x in parts for half in _halves(x)], -1)
  parts = parts[..., None] * np.asarray(_TURN, np.float32)[None, None, None]
  parts = parts.reshape(*a.shape, -1)
  scaled = (parts - jnp.round(parts)) * 2.0**31
  whole = scaled.astype(jnp.int32)
  rest = (scaled - whole.astype(scaled.dtype)).sum(-1) * 2.0**-31
  return whole.sum(-1, dtype=jnp.int32) * 2, rest


def _halves(x):
  """x as the sum of two numbers of 12 bits each."""
  high = lax.bitcast_convert_type(x, jnp.int32) & np.int32(-(1 << 12))
  high = lax.bitcast_convert_type(high, jnp.float32)
  return high, x - high


def _pieces(x, count):
  """x as a sum of numbers of 12 bits, the largest first."""
  pieces = []
  for _ in range(count):
    unit = 2.0 ** (math.frexp(x)[1] - 12)
    pieces.append(math.floor(x / unit) * unit)
    x -= pieces[-1]
  return pieces


# 1/2π to 48 bits.
_TURN = _pieces(0.5 / math.pi, 4)
