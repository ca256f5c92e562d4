"""What makes a differentiable linear scan of a forward and a backward pass.

Loops on a CPU and kernels on TPU and GPU are plain functions, which know
nothing of JAX's transformations. `fused` gives a pair its derivative and its
rule under `vmap`; the types that `shard_map` asks for are settled before,
where all arguments are cast to one set of varying axes. `flattened` brings a
kernel, which knows rows of channels only, to the contract of the loops.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from ssmjax.ops.platform_passes import Passes

__all__ = ["first_order", "flattened", "flattened_kernel", "fused"]


def fused(forward, backward):
  """Make a form of `ops.scan`'s private contract from two passes.

  Rows are batch rows: b and dy `[R, T, *S]`, state and dfinal `[R, *S]`, valid
  and restart `[R, T]` bool or None. a is `[G, T, *S]` or `[G, 1, *S]`, each
  axis of S its own or 1: each of its G groups serves R // G rows one after
  another.

  Args:
    forward: `(a, b, state, valid, restart, *, reverse, keep)` to y
      `[R, T, *S]`, the final state `[R, *S]` and, with `keep`, whatever
      backward wants to know of the states (rows first).
    backward: `(a, b, states, valid, restart, dy, dfinal, *, reverse)` to the
      cotangents of a, of b and of the initial state.

  Returns:
    A function of the arguments of `ops.scan`'s forms. First order, reverse
    mode: the backward pass refuses to be differentiated.
  """

  def form(a, b, state, valid, restart, *, reverse):
    if not b.size:
      return b, state
    return _scan((forward, backward, reverse), a, b, state, valid, restart)

  return form


def flattened(forward, backward):
  """Bring a kernel's two passes to the contract of `fused`.

  To the kernel all channels are one axis, a and b are float32 or bfloat16, the
  state is float32, and the cotangents of a are one for each row, in a's dtype
  or float32.
  """
  return (
    functools.partial(_forward_flat, forward),
    functools.partial(_backward_flat, backward),
  )


@functools.cache
def flattened_kernel(kernel):
  """Bring one of `kernels_pallas.kernels` to the contract of `fused`."""

  def saved(a, b, state, valid, restart, **static):
    width = math.prod(b.shape[2:])
    flat = lambda x: jax.ShapeDtypeStruct(
      (*x.shape[:2], width), _readable(x.dtype)
    )
    return kernel.saved(flat(a), flat(b), **static)

  return Passes(*flattened(kernel.forward, kernel.backward), saved)


def _readable(dtype):
  """The dtype in which a kernel reads a or b: float16 is none."""
  return jnp.dtype(dtype if dtype == jnp.bfloat16 else jnp.float32)


def _flat(a, b):
  """Functions that flatten, for a kernel, decays, rows and states."""
  channels = b.shape[2:]

  def flat(x, axes):
    x = x.astype(_readable(x.dtype))
    return x.reshape(*x.shape[:axes], math.prod(channels))

  wide = jnp.broadcast_to(a, (*a.shape[:2], *channels))
  return flat(wide, 2), lambda x: flat(x, 2), lambda x: flat(x, 1)


def _forward_flat(
  kernel, a, b, state, valid, restart, *, reverse, keep, **options
):
  decays, rows, states = _flat(a, b)
  y, final, saved = kernel(
    decays, rows(b), states(state), valid, restart, reverse=reverse, keep=keep,
    **options,
  )  # fmt: skip
  y = y.reshape(b.shape).astype(b.dtype)
  return y, final.reshape(state.shape), saved


def _backward_flat(
  kernel, a, b, saved, valid, restart, dy, dfinal, *, reverse, **options
):
  decays, rows, states = _flat(a, b)
  da, db, dstate = kernel(
    decays, rows(b), saved, valid, restart, rows(dy), states(dfinal),
    reverse=reverse, **options,
  )  # fmt: skip
  # The cotangents of a: one for each row and channel, summed over what shares
  # a decay.
  da = da.reshape(a.shape[0], -1, a.shape[1], *b.shape[2:])
  shared = [i for i, n in enumerate(a.shape) if i > 1 and n < b.shape[i]]
  if da.shape[1] > 1 or shared:
    da = da.astype(jnp.float32)
  da = da.sum(1).sum(shared, keepdims=True)
  return da, db.reshape(b.shape), dstate.reshape(dfinal.shape)


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
  run = _rows_only(functools.partial(backward, reverse=reverse), pull=True)
  da, db, dstate = run(a, (*rows, *cotangents))
  # None for the masks.
  return da.astype(a.dtype), db.astype(rows[0].dtype), dstate, None, None


_scan.defvjp(_scan_forward, _scan_backward)


def _forward(static, keep, a, *rows):
  forward, _, reverse = static
  run = functools.partial(forward, reverse=reverse, keep=keep)
  return _rows_only(run)(a, rows)


def _rows_only(run, *, pull=False):
  """`run` for which vmap only means more rows, or more groups of rows.

  With `pull`, the first result is the cotangent of a: one for each group.
  """

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
    if batched[0] or a.shape[0] > 1 or pull:
      a = merge(a, batched[0])
    out = _rows_only(run, pull=pull)(
      a, jax.tree.map(merge, rows, tuple(batched[1]))
    )
    split = lambda x: x.reshape(size, x.shape[0] // size, *x.shape[1:])
    return jax.tree.map(split, out), jax.tree.map(lambda _: True, out)

  return call
