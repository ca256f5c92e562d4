"""One token of the selective scan: its definition, and the choice of its form.

XLA fuses the definition well on most platforms; for TPUs there is a kernel. A
program for several devices that leaves its division to the compiler (and not
to `jax.shard_map`) has the definition, without asking: a token is little work.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.extend.core import Primitive
from jax.interpreters import mlir

from ssmjax.ops.varying import match_varying
from ssmjax.polarization import selective_decay
from ssmjax.types import Polarization

__all__ = ["advance", "split_channels", "token"]


def token(
  state, u, delta, B, C, z, valid, restart, *, A, D, delta_bias,
  delta_softplus, polarization,
):  # fmt: skip
  """One token of the definition; no time axis."""
  dtype = state.dtype
  real = jnp.finfo(dtype).dtype
  y_dtype = u.dtype
  row = lambda mask: mask[:, None]
  if valid is not None:
    clean = lambda x: jnp.where(row(valid), x, jnp.zeros_like(x))
    u, delta, B, C = clean(u), clean(delta), clean(B), clean(C)
    z = None if z is None else clean(z)
  if restart is not None:
    state = jnp.where(restart[:, None, None], jnp.zeros_like(state), state)
  u, delta = u.astype(real), delta.astype(real)
  if delta_bias is not None:
    delta = delta + delta_bias.astype(real)[None]
  if delta_softplus:
    delta = jax.nn.softplus(delta)
  decay = selective_decay(delta, A.astype(_of(A, dtype)), polarization)
  write = (delta * u)[..., None].astype(dtype) * B.astype(dtype)[:, None]
  new = decay.astype(dtype) * state + write
  if polarization is not None and polarization.finite_zero is None:
    # 0 · h would still let an infinite h through.
    zero = jnp.arange(new.shape[-1]) >= new.shape[-1] - polarization.zeros
    new = jnp.where(zero[None, None], write, new)
  if valid is not None:
    new = jnp.where(valid[:, None, None], new, state)
  y = (C.astype(dtype)[:, None] * new).sum(-1).real
  if D is not None:
    y = y + D.astype(real)[None] * u
  if z is not None:
    y = y * jax.nn.silu(z.astype(real))
  if valid is not None:
    y = jnp.where(row(valid), y, jnp.zeros_like(y))
  return y.astype(y_dtype), new


def advance(
  state, u, delta, A, B, C, D, z, delta_bias, valid, *, delta_softplus,
  polarization, implementation,
):  # fmt: skip
  """One token, by the definition or by a kernel that equals it.

  Raises:
    NotImplementedError: for `"pallas"` where the arguments have no kernel
      (here), or where the program has none (when it is lowered).
  """
  arrays = (state, u, delta, A, B, C, D, z, delta_bias, valid)
  static = (delta_softplus, polarization)
  refused = _no_kernel(arrays)
  if implementation == "pallas" and refused:
    raise NotImplementedError(
      f"selective_step: implementation='pallas' {refused}. Pass"
      " implementation='reference', or None to choose."
    )
  if implementation == "pallas":
    return _jitted((*static, True), *match_varying(*arrays))
  if implementation is None and not refused and _suits_the_kernel(B.shape[1]):
    return _jitted((*static, False), *match_varying(*arrays))
  return _definition(static, *arrays)


def split_channels(A, polarization: Polarization):
  """The columns of A that stay learned, and the counts of exact channels."""
  ones, zeros = polarization.ones, polarization.zeros
  if polarization.placement == "replace":
    A = A[:, ones : A.shape[1] - zeros]
  if polarization.finite_zero is not None:
    leak = jnp.full((A.shape[0], zeros), polarization.finite_zero, A.dtype)
    return jnp.concatenate([A, leak], 1), ones, 0
  return A, ones, zeros


def _no_kernel(arrays):
  """Why the kernel cannot take these arguments, or None."""
  dtypes = {x.dtype.name for x in arrays[1:9] if x is not None}
  if arrays[0].dtype != jnp.dtype("float32"):
    return f"has no kernel for a state of {arrays[0].dtype}"
  if others := dtypes - {"float32", "bfloat16"}:
    return f"has no kernel for {', '.join(sorted(others))}"
  for x in arrays:
    if x is None:
      continue
    mesh = jax.typeof(x).sharding.mesh
    if mesh.size > 1 and not mesh.are_all_axes_manual:
      return (
        "is not divided by the compiler: call it in jax.shard_map, or on one"
        " device"
      )
  return None


def _suits_the_kernel(states):
  """Whether a TPU keeps a state `[B, D, N]` with channels on its lanes."""
  return states % 8 == 0 and states % 128 != 0


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _run(static, *arrays):
  """The kernel where the program is lowered for a TPU; all derivatives."""

  # More rows, as far as the kernel knows: `vmap` of what rows share is rare,
  # and has the definition.
  @custom_vmap
  def call(rows, shared):
    return _bind(static, *_ordered(rows, shared))

  @call.def_vmap
  def _vmap(size, batched, rows, shared):
    if any(jax.tree.leaves(batched[1])):
      axes = jax.tree.map(lambda b: 0 if b else None, tuple(batched))
      run = lambda rows, shared: _definition(
        static[:2], *_ordered(rows, shared)
      )
      return jax.vmap(run, axes)(rows, shared), (True, True)

    def merge(x, is_batched):
      if not is_batched:
        x = jnp.broadcast_to(x[None], (size, *x.shape))
      return x.reshape(size * x.shape[1], *x.shape[2:])

    out = call(jax.tree.map(merge, rows, batched[0]), shared)
    split = lambda x: x.reshape(size, x.shape[0] // size, *x.shape[1:])
    return jax.tree.map(split, out), (True, True)

  state, u, delta, A, B, C, D, z, delta_bias, valid = arrays
  return call((state, u, delta, B, C, z, valid), (A, D, delta_bias))


@_run.defjvp
def _run_jvp(static, primals, tangents):
  run = functools.partial(_definition, static[:2])
  return jax.jvp(run, primals, tangents)


# Outside of a jit too: the primitive has no other way to run.
_jitted = jax.jit(_run, static_argnums=0)


def _ordered(rows, shared):
  state, u, delta, B, C, z, valid = rows
  A, D, delta_bias = shared
  return state, u, delta, A, B, C, D, z, delta_bias, valid


def _definition(static, state, u, delta, A, B, C, D, z, delta_bias, valid):
  delta_softplus, polarization = static
  return token(
    state, u, delta, B, C, z, valid, None, A=A, D=D, delta_bias=delta_bias,
    delta_softplus=delta_softplus, polarization=polarization,
  )  # fmt: skip


def _kernel(static, state, u, delta, A, B, C, D, z, delta_bias, valid):
  from kernels_pallas.selective_step_tpu import forward

  delta_softplus, polarization = static
  A, ones, zeros = split_channels(A, polarization or Polarization())
  # What stands in the place of exact channels is not used.
  A = jnp.pad(A, ((0, 0), (ones, zeros)))
  y, state = forward(
    dict(u=u, delta=delta, B=B, C=C, z=z, valid=valid,
         state=jnp.swapaxes(state, 1, 2)),
    dict(A=A.T, D=D, delta_bias=delta_bias),
    delta_softplus=delta_softplus, ones=ones, zeros=zeros,
  )  # fmt: skip
  return y, jnp.swapaxes(state, 1, 2)


def _bind(static, *arrays):
  """One equation, whose form is chosen and traced when it is lowered."""
  *static, required = static
  leaves, tree = jax.tree.flatten(arrays)
  return tuple(
    _step_p.bind(*leaves, tree=tree, static=tuple(static), required=required)
  )


@functools.partial(jax.jit, static_argnames=("form", "tree", "static"))
def _run_form(*leaves, form, tree, static):
  """y and the new state by one of the forms."""
  return form(static, *jax.tree.unflatten(tree, leaves))


_step_p = Primitive("ssmjax_selective_step")
_step_p.multiple_results = True


@_step_p.def_abstract_eval
def _abstract(*avals, tree, **params):
  state, u, *_ = jax.tree.unflatten(tree, avals)
  return u, state


def _lowering(ctx, *args, tree, static, required, platform: Any = None):
  divided = _is_divided(ctx.module_context.axis_context)
  form, context = _kernel, ctx.module_context
  if platform is None or divided:
    if required:
      raise NotImplementedError(
        "selective_step: implementation='pallas' has no kernel for"
        f" {platform or ', '.join(ctx.module_context.platforms)}"
        + (" on several devices outside jax.shard_map" if divided else "")
        + "; it has one for tpu. Pass implementation='reference', or None to"
        " choose by platform."
      )
    form = _definition
  else:
    # In an export for several platforms, each is lowered for all of them.
    context = context.replace(platforms=(platform,))
  run = functools.partial(_run_form, form=form, tree=tree, static=static)
  lower = mlir.lower_fun(run, multiple_results=True)
  return lower(ctx.replace(module_context=context), *args)


def _is_divided(context):
  """Whether the compiler would have to divide what it lowers here."""
  if hasattr(context, "num_devices"):
    return context.num_devices > 1
  mesh = getattr(context, "mesh", None)
  if mesh is None or mesh.size == 1:
    return False
  manual = set(context.manual_axes) | set(mesh.manual_axes)
  return manual != set(mesh.axis_names)


mlir.register_lowering(_step_p, _lowering)
mlir.register_lowering(
  _step_p, functools.partial(_lowering, platform="tpu"), platform="tpu"
)


def _of(x, dtype):
  """The dtype of x at the precision of the state's `dtype`."""
  real = jnp.finfo(dtype).dtype
  if not jnp.iscomplexobj(x):
    return real
  return jnp.dtype("complex128" if real == "float64" else "complex64")
