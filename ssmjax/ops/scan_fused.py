"""What makes a form of the linear scan of a kernel's two passes.

The kernels on TPU and GPU are plain functions of rows of channels, which know
nothing of JAX's transformations. `fused` gives a pair its derivative and its
batching rule; the types that `shard_map` asks for are settled before, where
all arguments are cast to one set of varying axes.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

__all__ = ["first_order", "fused"]


def fused(forward, backward):
  """Make a form of `ops.scan`'s private contract from two passes.

  Rows are batch rows: b and dy `[R, T, D]`, state and dfinal `[R, D]`
  float32, valid and restart `[R, T]` bool or None. a is `[G, T, D]` or
  `[G, 1, D]`: each of its G groups serves R // G rows one after another. a,
  b and dy are float32 or bfloat16.

  Args:
    forward: `(a, b, state, valid, restart, *, reverse, keep)` to y
      `[R, T, D]` of b's dtype, the final state `[R, D]` and, with `keep`,
      whatever backward wants to know of the states (rows first).
    backward: `(a, b, states, valid, restart, dy, dfinal, *, reverse)` to the
      cotangents of a (one for each row, a's dtype or float32), of b and of
      the initial state.

  Returns:
    A function of the arguments of `ops.scan`'s forms. First order, reverse
    mode: the backward pass refuses to be differentiated.
  """

  def form(a, b, state, valid, restart, *, reverse):
    if not b.size:
      return b, state
    channels = b.shape[2:]
    flat = lambda x, axes: _readable(x).reshape(
      *x.shape[:axes], math.prod(channels)
    )
    a = jnp.broadcast_to(a, (*a.shape[:2], *channels))
    y, final = _scan(
      (forward, backward, reverse),
      flat(a, 2), flat(b, 2), flat(state, 1), valid, restart,
    )  # fmt: skip
    return y.reshape(b.shape).astype(b.dtype), final.reshape(state.shape)

  return form


def first_order(function):
  """A backward pass, with an error that says the way out where it is derived.

  A custom_jvp refuses a second derivative in either mode.
  """
  function = jax.custom_jvp(function, nondiff_argnums=(0,))

  @function.defjvp
  def _refuse(static, primals, tangents):
    raise NotImplementedError(
      "linear_scan: the fused forms (chunked, pallas) have first-order"
      " derivatives only. Pass implementation='associative' to differentiate"
      " again."
    )

  return function


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(static, a, b, state, valid, restart):
  y, final, _ = _forward(static, False, a, b, state, valid, restart)
  return y, final


@first_order
def _scan_forward(static, a, b, state, valid, restart):
  y, final, states = _forward(static, True, a, b, state, valid, restart)
  return (y, final), (a, b, states, valid, restart)


@first_order
def _scan_backward(static, residuals, cotangents):
  _, backward, reverse = static
  a, *rows = residuals
  run = _rows_only(functools.partial(backward, reverse=reverse))
  da, db, dstate = run(a, (*rows, *cotangents))
  groups = da.reshape(a.shape[0], -1, *a.shape[1:])
  if groups.shape[1] > 1:
    groups = groups.astype(jnp.float32)
  # None for the masks.
  return groups.sum(1).astype(a.dtype), db, dstate, None, None


_scan.defvjp(_scan_forward, _scan_backward)


def _forward(static, keep, a, *rows):
  forward, _, reverse = static
  run = functools.partial(forward, reverse=reverse, keep=keep)
  return _rows_only(run)(a, rows)


def _rows_only(run):
  """`run` for which vmap only means more rows, or more groups of rows."""

  @custom_vmap
  def call(a, rows):
    return run(a, *rows)

  @call.def_vmap
  def _vmap(size, batched, a, rows):
    def merge(x, is_batched):
      if not is_batched:
        x = jnp.broadcast_to(x[None], (size, *x.shape))
      return x.reshape(size * x.shape[1], *x.shape[2:])

    # One group serves any number of rows; more must be repeated with them.
    if batched[0] or a.shape[0] > 1:
      a = merge(a, batched[0])
    out = _rows_only(run)(a, jax.tree.map(merge, rows, tuple(batched[1])))
    split = lambda x: x.reshape(size, x.shape[0] // size, *x.shape[1:])
    return jax.tree.map(split, out), jax.tree.map(lambda _: True, out)

  return call


def _readable(x):
  """x in a dtype that kernels read: float16 is none."""
  return x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)
