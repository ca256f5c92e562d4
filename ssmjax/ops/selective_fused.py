"""What makes an op of a selective scan's forward and backward pass.

Blocks on a CPU and kernels on TPU and GPU have one contract: two plain
functions, which know nothing of JAX's transformations. `fused` gives a pair
its derivative, its batching rule and the types that `shard_map` asks for.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from ssmjax.ops.varying import match_varying

__all__ = ["fused"]


def fused(forward, backward):
  """Make a form of `ops.selective`'s private contract from two passes.

  `rows` and `shared` are arrays by name. Rows lead with an axis of R batch
  rows: u, delta, z, d_y `[R, T, D]`, B, C `[R, T, N]`, direct, valid, restart
  `[R, T]`, initial_state, d_final `[R, N, D]`. What rows share leads with an
  axis of G groups of R // G rows each: A `[G, N - ones, D]`, D, delta_bias
  `[G, D]`. Absent ones are None.

  Args:
    forward: `(rows, shared, *, delta_softplus, ones, keep)` to y `[R, T, D]`
      of u's dtype, the final state `[R, N, D]` and, with `keep`, whatever
      backward wants to know of the states.
    backward: `(rows, shared, *, delta_softplus, ones)`, with `states` and the
      cotangents `d_y` and `d_final` among the rows, to the cotangents by
      name, those of A, D and delta_bias one for each row.

  Returns:
    A function of the arguments of `ops.selective`'s forms. First order,
    reverse mode: the backward pass refuses to be differentiated.
  """

  def form(
    u, delta, A, B, C, D, z, delta_bias, direct, initial_state, valid, restart,
    *, delta_softplus: bool, ones: int,
  ):  # fmt: skip
    args = match_varying(
      u, delta, A, B, C, D, z, delta_bias, direct, initial_state, valid,
      restart,
    )  # fmt: skip
    return _scan((forward, backward, delta_softplus, ones), *args)

  return form


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
      "selective_scan: the fused forms (chunked, pallas) have no second"
      ' derivative. Pass implementation="associative", which has all of them.'
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
  """y, the final state, and if `keep` what the backward pass needs of it."""
  forward, _, delta_softplus, ones = static
  (u, delta, A, B, C, D, z, delta_bias, direct, initial_state, valid,
   restart) = args  # fmt: skip
  rows = dict(
    u=u, delta=delta, B=B, C=C, z=z, direct=direct, valid=valid,
    restart=restart, initial_state=_swap(initial_state),
  )  # fmt: skip
  run = functools.partial(
    forward, delta_softplus=delta_softplus, ones=ones, keep=keep
  )
  y, final_state, states = _rows_only(run)(rows, _shared(A, D, delta_bias))
  return y, _swap(final_state), states


def _backward(static, args, states, cotangents):
  """The cotangents of all arguments."""
  _, backward, delta_softplus, ones = static
  (u, delta, A, B, C, D, z, delta_bias, direct, initial_state, valid,
   restart) = args  # fmt: skip
  d_y, d_final = cotangents
  rows = dict(
    u=u, delta=delta, B=B, C=C, z=z, direct=direct, valid=valid,
    restart=restart, states=states, d_y=d_y, d_final=_swap(d_final),
  )  # fmt: skip
  run = functools.partial(backward, delta_softplus=delta_softplus, ones=ones)
  grads = _rows_only(run)(rows, _shared(A, D, delta_bias))
  total = lambda name: grads[name].sum(0)
  named = dict(
    u=(u, lambda: grads["u"]),
    delta=(delta, lambda: grads["delta"]),
    A=(A, lambda: _swap(total("A"))),
    B=(B, lambda: grads["B"]),
    C=(C, lambda: grads["C"]),
    D=(D, lambda: total("D")),
    z=(z, lambda: grads["z"]),
    delta_bias=(delta_bias, lambda: total("delta_bias")),
    direct=(direct, lambda: grads["direct"]),
    initial_state=(initial_state, lambda: _swap(grads["initial_state"])),
  )
  floats = tuple(
    None if x is None else grad().astype(x.dtype) for x, grad in named.values()
  )
  return (*floats, None, None)


def _swap(x):
  """`[..., D, N]` and `[..., N, D]` (as the passes have it), or None."""
  return None if x is None else jnp.swapaxes(x, -1, -2)


def _shared(A, D, delta_bias):
  """What all rows of a group share, with a leading axis of groups."""
  group = lambda x: None if x is None else x[None]
  return dict(A=group(_swap(A)), D=group(D), delta_bias=group(delta_bias))


def _rows_only(run):
  """`run` for which vmap only means more rows, or more groups of rows.

  The batching rule of a loop would put the mapped axis inside a block, where
  it drives the state out of the cache; that of a GPU kernel does not exist.
  """

  @custom_vmap
  def call(rows, shared):
    return run(rows, shared)

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
    out = _rows_only(run)(rows, shared)
    split = lambda x: x.reshape(size, x.shape[0] // size, *x.shape[1:])
    return jax.tree.map(split, out), jax.tree.map(lambda _: True, out)

  return call
