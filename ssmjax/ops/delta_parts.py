"""What both forms of the delta rule in chunks are made of."""

import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = [
  "inverses",
  "inverses_at_once",
  "parts",
  "product",
  "spoil",
  "valid_only",
]


def inverses(blocks):
  """(I + L)⁻¹ of `[…, c, c]`, a small c, L below the diagonal; by rows."""
  size = blocks.shape[-1]
  eye = np.eye(size, dtype=blocks.dtype)
  rows = []
  for i in range(size):
    row = jnp.broadcast_to(eye[i], (*blocks.shape[:-2], size))
    for j in range(i):
      row = row - blocks[..., i, j, None] * rows[j]
    # Or each row would form those before it again.
    rows.append(lax.optimization_barrier(row))
  return jnp.stack(rows, -2)


def inverses_at_once(blocks):
  """As `inverses`; systems are the last axis, which fills a TPU's lanes."""
  size = blocks.shape[-1]
  systems = jnp.moveaxis(blocks.reshape(-1, size, size), 0, -1)
  eye = np.eye(size, dtype=blocks.dtype)[..., None]
  inverse = jnp.broadcast_to(eye, systems.shape)
  for i in range(1, size):
    known = systems[i, :i, None] * inverse[:i]
    inverse = inverse.at[i].add(-known.sum(0))
  return jnp.moveaxis(inverse, -1, 0).reshape(blocks.shape)


def parts(restart, shape):
  """Which tokens of a chunk are of one document, as masks `[B, 1, n, C]`.

  Args:
    restart: whether a document starts with the token, `[B, n, C]`, or None.
    shape: B, n and C.

  Returns:
    start, end: first and last index of the token's part; sees, leaves: whether
    it is the first or the last of the chunk; stays: whether there is only one,
    `[B, 1, n]`; mask: whether i is in t's part and not after t, `[…, t, i]`.
  """
  batch, chunks, size = shape
  time = np.arange(size, dtype=np.int32)
  mask = (time[:, None] >= time[None])[None, None, None]
  if restart is None:
    full = lambda value: jnp.full((batch, 1, chunks, size), value)
    yes = full(True)
    return dict(
      mask=mask, start=full(np.int32(0)), end=full(time[-1]), sees=yes,
      leaves=yes, stays=yes[..., 0],
    )  # fmt: skip
  restart = restart[:, None]
  time = jnp.broadcast_to(time[None, None, None], restart.shape)
  number = jnp.cumsum(restart.astype(jnp.int32), -1)
  start = lax.cummax(jnp.where(restart, time, 0), axis=3)
  ends = jnp.pad(restart[..., 1:], ((0, 0),) * 3 + ((0, 1),))
  end = lax.cummin(jnp.where(ends, time, size - 1), axis=3, reverse=True)
  return dict(
    mask=mask & (number[..., :, None] == number[..., None, :]),
    start=start, end=end, sees=number == 0,
    leaves=number == number[..., -1:], stays=number[..., -1] == 0,
  )  # fmt: skip


def spoil(x, where):
  """x, NaN at what the mask's axes, x's first ones, tell."""
  return jnp.where(_like(where, x), jnp.nan, x)


def valid_only(x, valid, *, head_axis=1):
  """x, 0 at padding: `valid` is `[B, …]` without the axis of heads, or None."""
  if valid is None:
    return x
  valid = _like(jnp.expand_dims(valid, head_axis), x)
  return jnp.where(valid, x, jnp.zeros_like(x))


def _like(mask, x):
  """The mask with x's rank."""
  return lax.expand_dims(mask, range(mask.ndim, x.ndim))


def product(axes, x, y, precision=lax.Precision.HIGHEST):
  """Multiply matrices, with all their leading axes; float32 sums."""
  x_axes, rest = axes.split(",")
  y_axes, out = rest.split("->")
  return jnp.einsum(
    f"...{x_axes},...{y_axes}->...{out}", x, y, precision=precision,
    preferred_element_type=x.dtype,
  )  # fmt: skip
