"""The selective scan by `jax.lax.associative_scan`, whole and in chunks.

Both take the private contract of `selective._selective_scan`: zero-channels
are folded into `direct`, the first `ones` channels of B, C and the state have
decay exactly 1, and `valid` and `restart` are masks `[B, T]` or None.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from ssmjax.ops.prefix import prefix_states
from ssmjax.ops.varying import match_varying
from ssmjax.types import state_dtype

__all__ = [
  "scan_chunk",
  "selective_scan_associative",
  "selective_scan_chunks",
]


def selective_scan_associative(
  u, delta, A, B, C, D, z, delta_bias, direct, initial_state, valid, restart,
  *, delta_softplus, ones,
):  # fmt: skip
  """Scan all of T at once; every state is in memory, `[B, T, D, N]`."""
  dtype = state_dtype(u, A, B, C, initial_state)
  state = _initial(u, B, initial_state, dtype)
  u, delta, A, B, C, D, z, delta_bias, direct, state, valid, restart = (
    match_varying(
      u, delta, A, B, C, D, z, delta_bias, direct, state, valid, restart
    )
  )
  return scan_chunk(
    state, (u, delta, B, C, z, direct, valid, restart), A=A, D=D,
    delta_bias=delta_bias, delta_softplus=delta_softplus, ones=ones,
  )[::-1]  # fmt: skip


def selective_scan_chunks(
  u, delta, A, B, C, D, z, delta_bias, direct, initial_state, valid, restart,
  *, delta_softplus, ones, chunk=256,
):  # fmt: skip
  """Scan chunk after chunk; the backward recomputes inside each.

  Memory is one chunk's states and one state per chunk. It is the form for an
  accelerator without a fused kernel, where a loop over tokens would launch
  as many kernels as there are tokens.
  """
  dtype = state_dtype(u, A, B, C, initial_state)
  batch, length, channels = u.shape
  state = _initial(u, B, initial_state, dtype)
  # Chunks of nearly equal length, so that little padding is computed.
  count = -(-length // chunk)
  chunk = -(-length // count)
  padding = count * chunk - length
  if padding and valid is None:
    valid = jnp.ones((batch, length), bool)
    restart = jnp.zeros((batch, length), bool)

  def split(x):
    if x is None:
      return None
    x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(batch, count, chunk, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  chunks = tuple(map(split, (u, delta, B, C, z, direct, valid, restart)))
  state, A, D, delta_bias, *chunks = match_varying(
    state, A, D, delta_bias, *chunks
  )
  body = functools.partial(scan_chunk, delta_softplus=delta_softplus, ones=ones)

  @jax.checkpoint
  def step(state, xs):
    return body(state, xs, A=A, D=D, delta_bias=delta_bias)

  state, y = lax.scan(step, state, tuple(chunks))
  y = jnp.moveaxis(y, 0, 1).reshape(batch, count * chunk, channels)
  return y[:, :length], state


def scan_chunk(state, xs, *, A, D, delta_bias, delta_softplus, ones):
  """(state, y) after one stretch of tokens."""
  u, delta, B, C, z, direct, valid, restart = xs
  y_dtype, dtype = u.dtype, state.dtype
  real = jnp.finfo(dtype).dtype
  if valid is not None:
    clean = lambda x: jnp.where(valid[..., None], x, jnp.zeros_like(x))
    u, delta, B, C = clean(u), clean(delta), clean(B), clean(C)
    z = None if z is None else clean(z)
  u, dt = u.astype(real), delta.astype(real)
  if delta_bias is not None:
    dt = dt + delta_bias.astype(real)[None, None]
  if delta_softplus:
    dt = jax.nn.softplus(dt)
  if valid is not None:
    dt = jnp.where(valid[..., None], dt, jnp.zeros_like(dt))
  A = A.astype(dtype if jnp.iscomplexobj(A) else real)
  a = jnp.exp(dt[..., None].astype(A.dtype) * A[None, None]).astype(dtype)
  a = jnp.concatenate([jnp.ones((*dt.shape, ones), dtype), a], -1)
  b = (dt * u)[..., None].astype(dtype) * B.astype(dtype)[:, :, None]
  if restart is not None:
    restart = restart[..., None, None]
  h, state = prefix_states(a, b, state, restart)
  # A product and a sum: a matmul of this shape is slower on every backend.
  y = (C.astype(dtype)[:, :, None] * h).sum(-1).real
  skip = None
  if direct is not None:
    skip = direct.astype(real)[..., None] * dt
  if D is not None:
    D = jnp.broadcast_to(D.astype(real)[None, None], dt.shape)
    skip = D if skip is None else skip + D
  if skip is not None:
    y = y + skip * u
  if z is not None:
    y = y * jax.nn.silu(z.astype(real))
  if valid is not None:
    y = jnp.where(valid[..., None], y, jnp.zeros_like(y))
  return state, y.astype(y_dtype)


def _initial(u, B, initial_state, dtype):
  if initial_state is not None:
    return initial_state.astype(dtype)
  return jnp.zeros((u.shape[0], u.shape[2], B.shape[2]), dtype)
