"""The selective scan for CPUs: blocks of channels, chunks of time.

One block is one batch row and so many channels that its state stays in the
first-level cache. Time is cut into chunks; the forward pass keeps the state
at the chunks' starts only, the backward pass recomputes the inside of a chunk
from there. `[B, T, D, N]` is never in memory.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from ssmjax.ops.selective_chunked_backward import backward_blocks
from ssmjax.ops.selective_chunked_forward import forward_blocks
from ssmjax.ops.varying import match_varying

__all__ = ["selective_scan_chunked"]


def selective_scan_chunked(
  u, delta, A, B, C, D, z, delta_bias, direct, initial_state, valid, restart,
  *, delta_softplus: bool, ones: int,
):  # fmt: skip
  """Run the private contract of `ops.selective` in blocks of channels.

  First order, reverse mode; the backward pass refuses to be differentiated.

  Returns:
    y `[B, T, D]` in u's dtype and the state after the last step `[B, D, N]`.
  """
  args = match_varying(
    u, delta, A, B, C, D, z, delta_bias, direct, initial_state, valid, restart
  )
  return _scan((delta_softplus, ones), *args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(static, *args):
  y, final_state, _ = _forward(static, False, args)
  return y, final_state


def _once(function):
  """`function`, with an error that says the way out where it is derived."""
  function = jax.custom_jvp(function, nondiff_argnums=(0,))

  @function.defjvp
  def _refuse(static, primals, tangents):
    raise NotImplementedError(
      "selective_scan: the chunked form has no second derivative. Pass"
      ' implementation="associative", which has all of them.'
    )

  return function


@_once
def _scan_forward(static, *args):
  y, final_state, states = _forward(static, True, args)
  return (y, final_state), (args, states)


@_once
def _scan_backward(static, residuals, cotangents):
  return _backward(static, *residuals, cotangents)


_scan.defvjp(_scan_forward, _scan_backward)


def _forward(static, keep, args):
  """y, the final state, and if `keep` the states at the chunks' starts."""
  (u, delta, A, B, C, D, z, delta_bias, direct, initial_state, valid,
   restart) = args  # fmt: skip
  rows = dict(
    u=u, delta=delta, B=B, C=C, z=z, direct=direct, valid=valid,
    restart=restart, initial_state=_swap(initial_state),
  )  # fmt: skip
  y, final_state, states = _rows_only(forward_blocks, (*static, keep))(
    rows, _shared(A, D, delta_bias)
  )
  return y, _swap(final_state), states


def _backward(static, args, states, cotangents):
  """The cotangents of all arguments."""
  (u, delta, A, B, C, D, z, delta_bias, direct, initial_state, valid,
   restart) = args  # fmt: skip
  d_y, d_final = cotangents
  rows = dict(
    u=u, delta=delta, B=B, C=C, z=z, direct=direct, valid=valid,
    restart=restart, states=states, d_y=d_y, d_final=_swap(d_final),
  )  # fmt: skip
  grads = _rows_only(backward_blocks, static)(rows, _shared(A, D, delta_bias))
  grads["A"] = _swap(grads["A"].sum(0))
  grads["D"] = grads["D"].sum(0)
  grads["delta_bias"] = grads["delta_bias"].sum(0)
  grads["initial_state"] = _swap(grads["initial_state"])
  named = dict(
    u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias,
    direct=direct, initial_state=initial_state,
  )  # fmt: skip
  floats = tuple(
    None if x is None else grads[name].astype(x.dtype)
    for name, x in named.items()
  )
  return (*floats, None, None)


def _swap(x):
  """`[..., D, N]` and `[..., N, D]` (as the blocks have it), or None."""
  return None if x is None else jnp.swapaxes(x, -1, -2)


def _shared(A, D, delta_bias):
  """What all rows of a group share, with a leading axis of groups."""
  group = lambda x: None if x is None else x[None]
  return dict(A=group(_swap(A)), D=group(D), delta_bias=group(delta_bias))


def _rows_only(blocks, static):
  """`blocks` for which vmap only means more rows, or more groups of rows.

  The batching rule of a loop would put the mapped axis inside a block, where
  it drives the state out of the cache.
  """

  @custom_vmap
  def call(rows, shared):
    return blocks(static, rows, shared)

  @call.def_vmap
  def _vmap(size, batched, rows, shared):
    def merge(x, is_batched):
      if not is_batched:
        x = jnp.broadcast_to(x[None], (size, *x.shape))
      return x.reshape(size * x.shape[1], *x.shape[2:])

    rows = jax.tree.map(merge, rows, batched[0])
    # One group serves any number of rows; more must be repeated with them.
    if any(jax.tree.leaves(batched[1])) or shared["A"].shape[0] > 1:
      shared = jax.tree.map(merge, shared, batched[1])
    out = _rows_only(blocks, static)(rows, shared)
    split = lambda x: x.reshape(size, x.shape[0] // size, *x.shape[1:])
    return jax.tree.map(split, out), jax.tree.map(lambda _: True, out)

  return call
