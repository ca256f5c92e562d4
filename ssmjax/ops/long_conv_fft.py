"""Long convolutions by Fourier transforms, of rows with documents too.

A transform mixes all that it holds: a token that is not finite would reach
those before it, and a large document the rounding errors of a small one. So
tokens that are not finite are taken out, and NaN is written where they are
met; and each product holds tokens of one document.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ssmjax.ops.segments import compacted, permute

__all__ = ["convolve"]

# Up to this many tokens, a block acts on the next as a matrix.
_MATRIX = 32


def convolve(x, kernel, state, valid, restart):
  """y `[B, T, D]` and the last L-1 tokens, all of one real dtype.

  Padding is zero in x, and what y has there is not of use.
  """
  taps, length = kernel.shape[0], x.shape[1]
  kernel = kernel.T
  past = None if state is None or taps == 1 else jnp.moveaxis(state, 2, 0)
  back = segment = None
  if valid is not None:
    x, segment, _, back = compacted(x, valid, restart)
  tokens = jnp.moveaxis(x, 2, 0)
  if segment is None:
    y = _document(tokens, kernel, past)
  else:
    y = _documents(tokens, segment, kernel, past)
  y = jnp.moveaxis(y, 0, 2)
  if state is None:
    state = jnp.zeros_like(x, shape=(x.shape[0], taps - 1, x.shape[2]))
  whole = jnp.concatenate([state, x], 1)
  if segment is None:
    return y, whole[:, length:]
  return permute(y, back), _window(whole, segment, valid, taps)


def _document(x, kernel, past):
  """Each row `[D, B, T]` is one document, after `past` `[D, B, V]`."""
  length = x.shape[-1]
  if past is not None:
    x = jnp.concatenate([past, x], -1)
  before = x.shape[-1] - length
  kernel = kernel[:, : x.shape[-1]]
  fine = jnp.isfinite(x)
  y = _product(jnp.where(fine, x, 0), kernel, before, length)
  sick = _reached(~fine, None, kernel.shape[-1])[..., before:]
  return jnp.where(sick, jnp.nan, y)


def _documents(x, segment, kernel, past):
  """Rows of several documents, numbered from 0 on in `segment` `[B, T]`."""
  length = x.shape[-1]
  taps = min(kernel.shape[-1], length)
  fine = jnp.isfinite(x)
  clean = jnp.where(fine, x, 0)
  y = kernel[:, :1, None] * clean
  size, lags = 1, taps - 1
  while size < length and lags:
    # A block that is as long as the kernel acts on the next block only.
    last = size >= lags
    stride = size if last else 2 * size
    y = y + _blocks(clean, segment, kernel[:, :taps], size, stride)
    if last:
      break
    size *= 2
  time = jnp.arange(length, dtype=jnp.int32)
  new = segment[:, 1:] != segment[:, :-1]
  start = jnp.where(jnp.pad(new, ((0, 0), (1, 0))), time[None], 0)
  sick = _reached(~fine, lax.cummax(start, axis=1)[None], taps)
  if past is not None:
    sound = jnp.isfinite(past)
    reach = min(length, past.shape[-1])
    more = _product(jnp.where(sound, past, 0), kernel, past.shape[-1], reach)
    more = jnp.pad(more, ((0, 0), (0, 0), (0, length - reach)))
    first = (segment == 0)[None]
    y = y + jnp.where(first, more, 0)
    place = jnp.arange(past.shape[-1], dtype=jnp.int32)
    until = jnp.where(sound, -1, place[None, None]).max(-1, keepdims=True)
    sick |= first & (time[None, None] <= until)
  return jnp.where(sick, jnp.nan, y)


# Recomputed: a spectrum takes twice the memory of what it is of.
@functools.partial(jax.checkpoint, static_argnums=(2, 3))
def _product(x, kernel, skip, count):
  """`count` terms of x * kernel, along the last axis, after `skip`."""
  # Longer products wrap around, onto the terms that are skipped.
  size = max(skip + count, x.shape[-1] + kernel.shape[-1] - 1 - skip)
  size = _fft_size(size)
  spectrum = jnp.fft.rfft(x, size) * jnp.fft.rfft(kernel, size)[:, None]
  return jnp.fft.irfft(spectrum, size)[..., skip : skip + count]


@functools.partial(jax.checkpoint, static_argnums=(3, 4))
def _blocks(x, segment, kernel, size, stride):
  """What blocks of `size` tokens, one in `stride`, add to their next blocks.

  It is its last document only that goes on beyond a block.
  """
  length = x.shape[-1]
  count = -(-(length - size) // stride)
  pad = max(0, (count - 1) * stride + 2 * size - length)

  def pair(x):
    x = jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, pad),))
    if stride == size:
      x = x.reshape(*x.shape[:-1], -1, size)
      return x[..., :-1, :], x[..., 1:, :]
    x = x[..., : count * stride].reshape(*x.shape[:-1], count, 2, size)
    return x[..., 0, :], x[..., 1, :]

  left, _ = pair(x)
  ids, ids_after = pair(segment)
  last = ids[..., -1:]
  left = jnp.where((ids == last)[None], left, 0)
  kernel = jnp.pad(kernel, ((0, 0), (0, max(0, 2 * size - kernel.shape[-1]))))
  kernel = kernel[:, : 2 * size]
  if size <= _MATRIX:
    at = np.arange(size)
    y = jnp.einsum(
      "dbks,dst->dbkt", left, kernel[:, size + at[None] - at[:, None]],
      precision=lax.Precision.HIGHEST,
    )  # fmt: skip
  else:
    spectrum = jnp.fft.rfft(kernel)[:, None, None]
    spectrum = spectrum * jnp.fft.rfft(left, 2 * size)
    y = jnp.fft.irfft(spectrum, 2 * size)[..., size:]
  y = jnp.where((ids_after == last)[None], y, 0)
  if stride == size:
    y = y.reshape(*x.shape[:-1], -1)
    y = jnp.pad(y, ((0, 0), (0, 0), (size, 0)))
  else:
    y = jnp.stack([jnp.zeros_like(y), y], -2).reshape(*x.shape[:-1], -1)
  more = max(0, length - y.shape[-1])
  return jnp.pad(y, ((0, 0), (0, 0), (0, more)))[..., :length]


def _reached(sick, start, window):
  """Where a sick token is met, from its document's `start` on."""
  length = sick.shape[-1]
  time = jnp.arange(length, dtype=jnp.int32)[None, None]
  if start is None and window >= length:
    first = jnp.argmax(sick, -1, keepdims=True).astype(jnp.int32)
    return (time >= first) & sick.any(-1, keepdims=True)
  since = jnp.maximum(time - (window - 1), 0)
  if start is not None:
    since = jnp.maximum(since, start)
  return lax.cummax(jnp.where(sick, time, -1), axis=2) >= since


def _window(whole, segment, valid, taps):
  """The L-1 tokens that end the last document of each row."""
  rows = jnp.arange(whole.shape[0], dtype=jnp.int32)[:, None]
  count = valid.sum(1, keepdims=True, dtype=jnp.int32)
  place = count + jnp.arange(taps - 1, dtype=jnp.int32)[None]
  # The tokens from before the call are of the first document.
  segment = jnp.pad(segment, ((0, 0), (taps - 1, 0)))
  keep = segment[rows, place] == segment[:, -1:]
  return jnp.where(keep[..., None], whole[rows, place], 0)


def _fft_size(least):
  """A number of small factors, at least this one."""
  sizes = [m << max(0, -(-least // m) - 1).bit_length() for m in (1, 3, 5)]
  return min(sizes)
