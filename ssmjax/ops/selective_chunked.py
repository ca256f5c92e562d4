"""The selective scan in chunks: its two passes by platform.

On a CPU: one block is one batch row and so many channels that its state stays
in the first-level cache. Time is cut into chunks; the forward pass keeps the
state at the chunks' starts only, the backward pass computes the inside of a
chunk again from there. `[B, T, D, N]` is never in memory.
"""

import jax

from ssmjax.ops.platform_passes import OTHERS, Passes
from ssmjax.ops.selective_chunked_backward import backward_blocks
from ssmjax.ops.selective_chunked_forward import (
  compute_dtype,
  forward_blocks,
  saved_blocks,
)
from ssmjax.ops.selective_chunks import (
  backward_chunks,
  forward_chunks,
  saved_chunks,
)

__all__ = ["CHUNKED", "RESULTS"]

CHUNKED = {
  "cpu": Passes(forward_blocks, backward_blocks, saved_blocks),
  OTHERS: Passes(forward_chunks, backward_chunks, saved_chunks, opaque=False),
}


def _forward_results(rows, shared, *, delta_softplus, ones):
  """y `[R, T, D]` of u's dtype and the final state `[R, N, D]`."""
  batch, _, channels = rows["u"].shape
  states = (batch, rows["B"].shape[-1], channels)
  dtype = compute_dtype(rows, shared)
  y = jax.ShapeDtypeStruct(rows["u"].shape, rows["u"].dtype)
  return y, jax.ShapeDtypeStruct(states, dtype)


def _backward_results(rows, shared, *, delta_softplus, ones):
  """The cotangents by name; what rows share has one for each row."""
  batch = rows["u"].shape[0]
  dtype = compute_dtype(rows, shared)
  grads = {
    name: jax.ShapeDtypeStruct(rows[name].shape, rows[name].dtype)
    for name in ("u", "delta", "z")
    if rows[name] is not None
  }
  grads |= {
    name: jax.ShapeDtypeStruct(rows[name].shape, dtype)
    for name in ("B", "C", "direct")
    if rows[name] is not None
  }
  grads |= {
    name: jax.ShapeDtypeStruct((batch, *x.shape[1:]), dtype)
    for name, x in shared.items()
    if x is not None
  }
  state = jax.ShapeDtypeStruct(rows["d_final"].shape, dtype)
  return grads | dict(initial_state=state)


RESULTS = (_forward_results, _backward_results)
