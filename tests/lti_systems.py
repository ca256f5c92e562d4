"""Systems to test with, and their discretisation as it is written."""

import jax
import jax.numpy as jnp
import numpy as np
from checks import quick
from jax import lax

D, N = 3, 4


def in_float64(function, *args):
  """function(*args) with every array at 64 bits."""
  with (
    jax.enable_x64(True),
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    wide = lambda x: jnp.asarray(
      np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64)
    )
    return jax.device_get(quick(function)(*jax.tree.map(wide, args)))


def pulled(function):
  """Values, and gradients for cotangents cos 0, cos 1, … of each result."""

  def run(*args):
    out, vjp = jax.vjp(function, *args)

    def wave(x):
      real = jnp.cos(jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape))
      both = lax.complex(real, jnp.flip(real))
      return (both if jnp.iscomplexobj(x) else real).astype(x.dtype)

    return out, vjp(jax.tree.map(wave, out))

  return run


def draw(shape, kind="c", seed=0):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=shape)
  if kind == "r":
    return x.astype(np.float32)
  return (x + 1j * rng.normal(size=shape)).astype(np.complex64)


def system(kind="c", seed=0):
  """A with fast, slow and still modes, B, C and dt."""
  rng = np.random.default_rng(seed)
  A = -(10.0 ** rng.uniform(-2, 1.5, (D, N)))
  if kind == "c":
    A = A + 1j * rng.normal(size=(D, N)) * 30
  A = A.astype(np.complex64 if kind == "c" else np.float32)
  A[0, 0] = 0
  dt = (10.0 ** rng.uniform(-3, -1, D)).astype(np.float32)
  return A, draw((D, N), kind, 1), draw((D, N), kind, 2), dt


def held(A, B, dt):
  """Zero-order hold as it is written; where A is 0, its limit."""
  z = dt[..., None] * A
  safe = jnp.where(z == 0, 1, z)
  # The series to third order is for A = 0 alone, gradient and all.
  ratio = jnp.where(z == 0, 1 + z / 2 + z * z / 6, (jnp.exp(safe) - 1) / safe)
  return jnp.exp(z), dt[..., None] * ratio * B


def trapezoid(A, B, dt):
  z = dt[..., None] * A / 2
  return (1 + z) / (1 - z), dt[..., None] * B / (1 - z)
