"""The selective scan's two passes for platforms without a kernel.

On an accelerator a loop over tokens would launch as many kernels as there are
tokens. So a chunk of tokens is one associative scan, chunk follows chunk, the
states at the chunks' starts are kept, and the backward pass computes the
inside of a chunk again. The compiler can divide all of it over devices.
"""

import jax
import jax.numpy as jnp
from jax import lax

from ssmjax.ops.selective_associative import scan_chunk
from ssmjax.ops.varying import match_varying

__all__ = ["backward_chunks", "forward_chunks", "saved_chunks"]

LONGEST = 256  # Tokens of a chunk.
_TOKENS = ("u", "delta", "B", "C", "z", "direct", "valid", "restart")


def forward_chunks(
  rows, shared, *, delta_softplus, ones, keep, longest=LONGEST
):
  """The forward pass of `selective_fused.fused`.

  With `keep`, the states at the chunks' starts, `[R, chunks, D, N]`.
  """
  length = rows["u"].shape[1]
  state, shared = _rows_of_state(rows, shared)
  chunk = _row_of_chunk(delta_softplus, ones)

  def step(state, tokens):
    after, y = chunk(state, tokens, shared)
    return after, (y, state if keep else None)

  final, (y, states) = lax.scan(step, state, _split(rows, _TOKENS, longest))
  if keep:
    states = jnp.moveaxis(states, 0, 1)
  return _joined(y, length), jnp.swapaxes(final, 1, 2), states


def backward_chunks(rows, shared, *, delta_softplus, ones, longest=LONGEST):
  """The backward pass of `selective_fused.fused`."""
  length = rows["u"].shape[1]
  states = jnp.moveaxis(rows["states"], 1, 0)
  _, shared = _rows_of_state(rows, shared)
  chunk = _row_of_chunk(delta_softplus, ones)
  tokens = _split(rows, _TOKENS, longest)
  d_y = _split(rows, ("d_y",), longest)["d_y"]
  masks = {k: tokens.pop(k) for k in ("valid", "restart")}

  def step(carry, xs):
    d_state, d_shared = carry
    state, floats, masks, d_y = xs
    run = lambda state, floats, shared: chunk(state, floats | masks, shared)
    _, pull = jax.vjp(run, state, floats, shared)
    d_state, d_floats, more = pull((d_state, d_y))
    return (d_state, jax.tree.map(jnp.add, d_shared, more)), d_floats

  d_final = jnp.swapaxes(rows["d_final"], 1, 2)
  zeros = jax.tree.map(jnp.zeros_like, shared)
  (d_state, d_shared), grads = lax.scan(
    step, (d_final, zeros), (states, tokens, masks, d_y), reverse=True
  )
  grads = jax.tree.map(lambda x: _joined(x, length), grads)
  d_shared["A"] = jnp.swapaxes(d_shared["A"], 1, 2)
  return grads | d_shared | dict(initial_state=jnp.swapaxes(d_state, 1, 2))


def saved_chunks(rows, shared, *, delta_softplus, ones, longest=LONGEST):
  """The shape of what `forward_chunks` keeps."""
  batch, length, channels = rows["u"].shape
  states = rows["B"].shape[-1]
  shape = (batch, _division(length, longest)[0], channels, states)
  return jax.ShapeDtypeStruct(shape, _dtype(rows, shared))


def _dtype(rows, shared):
  """The dtype of states: float64 if any array is, else float32."""
  wide = any(x.dtype == "float64" for x in jax.tree.leaves((rows, shared)))
  return jnp.dtype("float64" if wide else "float32")


def _rows_of_state(rows, shared):
  """The initial state `[R, D, N]`, and what groups share for each row."""
  batch, _, channels = rows["u"].shape
  groups = shared["A"].shape[0]
  dtype = _dtype(rows, shared)
  each = lambda x: jnp.repeat(x, batch // groups, 0).astype(dtype)
  shared = jax.tree.map(each, shared)
  shared["A"] = jnp.swapaxes(shared["A"], 1, 2)
  state = rows.get("initial_state")
  if state is None:
    state = jnp.zeros((batch, channels, rows["B"].shape[-1]), dtype)
    state, _ = match_varying(state, rows["u"])
  else:
    state = jnp.swapaxes(state, 1, 2).astype(dtype)
  return state, shared


def _row_of_chunk(delta_softplus, ones):
  """A chunk's `(state, tokens, shared)` to the state after it and y, by row."""

  @jax.vmap
  def run(state, tokens, shared):
    one = lambda x: None if x is None else x[None]
    final, y = scan_chunk(
      state[None], tuple(one(tokens[name]) for name in _TOKENS),
      **shared, delta_softplus=delta_softplus, ones=ones,
    )  # fmt: skip
    return final[0], y[0]

  return run


def _division(length, longest):
  """Number and length of chunks, nearly equal so that few tokens are added."""
  count = -(-length // longest)
  return count, -(-length // count)


def _split(rows, names, longest):
  """Rows `[R, T, ...]` as chunks `[chunks, R, K, ...]`; padding at the end."""
  batch, length = rows["u"].shape[:2]
  count, chunk = _division(length, longest)
  padding = count * chunk - length
  rows = {name: rows[name] for name in names}
  if padding and "valid" in rows and rows["valid"] is None:
    rows["valid"] = jnp.ones((batch, length), bool)

  def split(x):
    x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(batch, count, chunk, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  return jax.tree.map(split, rows)


def _joined(x, length):
  """Chunks as one sequence."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
