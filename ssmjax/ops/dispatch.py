"""Which implementation of an op runs, and where that is decided.

A name is that implementation or an error. Without a name, what dtype and
shape allow is settled while tracing, and the platform by
`jax.lax.platform_dependent` at lowering: code that is compiled ahead of time
for a chip on a host without one takes the chip's kernel. No globals, no
environment switches.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

import kernels_pallas
from ssmjax.ops.partition import divided_rows
from ssmjax.types import check_choice

__all__ = ["IMPLEMENTATIONS", "run"]

IMPLEMENTATIONS = ("reference", "associative", "chunked", "pallas")


def run(
  op: str,
  implementation: str | None,
  forms: Mapping[str, Callable[..., Any]],
  *args: Any,
  fuse: Callable[..., Callable[..., Any]],
  no_kernel: str | None = None,
  **static: Any,
) -> Any:
  """Call one of `forms`, or the fused kernel, on `args`.

  Args:
    op: the public function, for messages and to find its kernels.
    implementation: a name of `IMPLEMENTATIONS`, or None to choose.
    forms: implementations other than pallas, called `form(*args, **static)`;
      `"chunked"` is the fall-back.
    *args: arrays and None.
    fuse: makes a form of a kernel's passes, `fuse(forward, backward)`.
    no_kernel: why the kernels cannot take these arguments, or None if they
      can.
    **static: keyword arguments of every form.

  Raises:
    ValueError: for a name that does not exist.
    NotImplementedError: for `"pallas"` where the arguments have no kernel
      (here), or where the platform has none (when it is lowered).
  """
  if implementation is not None:
    check_choice(op, "implementation", implementation, IMPLEMENTATIONS)
  if implementation not in (None, "pallas"):
    return forms[implementation](*args, **static)
  kernels = kernels_pallas.kernels(op)
  chunked = functools.partial(forms["chunked"], **static)
  if implementation == "pallas":
    if no_kernel is not None:
      raise NotImplementedError(
        f"{op}: implementation='pallas' {no_kernel}. Pass"
        " implementation='chunked', or None to choose."
      )
  elif no_kernel is not None:
    return chunked(*args)
  if "cuda" in kernels and _visible_gpu_is_old():
    kernels = {k: v for k, v in kernels.items() if k != "cuda"}
  fallback: Callable[..., Any] = chunked
  if implementation == "pallas":
    refuse = functools.partial(
      _refuse_p.bind, op=op, have=tuple(sorted(kernels))
    )
    fallback = lambda *a: jax.tree.map(refuse, chunked(*a))
  if not kernels:
    return fallback(*args)
  branches = {
    platform: functools.partial(
      fuse(*(_only_on(op, platform, function) for function in kernel)),
      **static,
    )
    for platform, kernel in kernels.items()
  }
  return lax.platform_dependent(*args, default=fallback, **branches)


def _visible_gpu_is_old() -> bool:
  """Whether a CUDA device is here that the kernels' instructions lack."""
  try:
    devices = jax.local_devices(backend="cuda")
  except RuntimeError:  # No such backend: ahead-of-time code keeps the kernel.
    return False
  return any(float(d.compute_capability) < 8.0 for d in devices)


@functools.cache
def _only_on(op, platform, function):
  """`function`, which is lowered for its own platform and no other.

  Exported for several platforms, a program keeps all branches, and JAX lowers
  each for all of them: a TPU's kernel for the CPU too, which is an error.
  """

  @functools.wraps(function)
  def call(*args, **static):
    leaves, tree = jax.tree.flatten(args)
    run = lambda *leaves: function(*jax.tree.unflatten(tree, leaves), **static)
    with jax.enable_x64(False):  # Where Python's integers would be int64.
      jaxpr, out = jax.make_jaxpr(run, return_shape=True)(*leaves)
    leaves = _kernel_p.bind(
      *leaves, jaxpr=jaxpr, run=run, op=op, platform=platform
    )
    return jax.tree.unflatten(jax.tree.structure(out), leaves)

  return call


_kernel_p = Primitive("ssmjax_kernel")
_kernel_p.multiple_results = True
_kernel_p.def_abstract_eval(lambda *args, jaxpr, **params: jaxpr.out_avals)


def _kernel_lowering(ctx, *args, jaxpr, run, op, platform, lowered_for=None):
  if lowered_for == platform:
    context = ctx.module_context.replace(platforms=(platform,))
    function = jaxpr_as_fun(jaxpr)
    mesh = _compilers_mesh(ctx, op)
    if mesh is not None:
      rows = jaxpr.out_avals[0].shape[0]
      leaves = lambda *x: jax.tree.leaves(run(*x))
      function = lambda *x: divided_rows(leaves, mesh, x, rows)
    lower = mlir.lower_fun(function, multiple_results=True)
    with jax.enable_x64(False):
      return lower(ctx.replace(module_context=context), *args)
  # In a branch of another platform, which nobody takes.
  zeros = lambda *_: [jnp.zeros(x.shape, x.dtype) for x in jaxpr.out_avals]
  return mlir.lower_fun(zeros, multiple_results=True)(ctx, *args)


def _compilers_mesh(ctx, op):
  """The mesh of a program that the compiler divides, None if it does not."""
  context = ctx.module_context.axis_context
  if isinstance(context, mlir.SPMDAxisContext):
    manual = context.manual_axes | set(context.mesh.manual_axes)
    if manual.issuperset(context.mesh.axis_names):
      return None
  elif not isinstance(context, mlir.ShardingContext) or context.num_devices < 2:
    return None
  else:
    for x in ctx.avals_in:
      if x.sharding.mesh.size == context.num_devices:
        return x.sharding.mesh
  raise NotImplementedError(
    f"{op}: the compiler cannot divide a kernel over several devices. Enter"
    " their mesh by jax.set_mesh, call it inside a jax.shard_map over all axes"
    " of the mesh, or pass implementation='chunked'."
  )


mlir.register_lowering(_kernel_p, _kernel_lowering)
for _platform in ("tpu", "cuda"):
  mlir.register_lowering(
    _kernel_p,
    functools.partial(_kernel_lowering, lowered_for=_platform),
    platform=_platform,
  )


# An identity that cannot be lowered. It stands behind the fall-back of
# implementation="pallas": differentiated, batched and traced like any other
# branch, and an error only where that branch would have had to run.
_refuse_p = Primitive("ssmjax_no_kernel_for_this_platform")
_refuse_p.def_impl(lambda x, **params: _refuse_eagerly(x, **params))
_refuse_p.def_abstract_eval(lambda x, **params: x)
# The cotangent is refused too: a gradient may not need the value.
ad.deflinear2(_refuse_p, lambda ct, x, **params: [_refuse_p.bind(ct, **params)])
batching.defvectorized(_refuse_p)


def _refuse_eagerly(x, **params):
  return jax.jit(functools.partial(_refuse_p.bind, **params))(x)


def _refuse_lowering(ctx, x, *, op, have):
  platforms = ctx.module_context.platforms
  raise NotImplementedError(
    f"{op}: implementation='pallas' has no kernel for"
    f" {', '.join(platforms)}; it has"
    f" {'kernels for ' + ', '.join(have) if have else 'none here'} (on GPUs,"
    " for sm_80 and newer). Pass"
    " implementation='chunked', or None to choose by platform."
  )


mlir.register_lowering(_refuse_p, _refuse_lowering)
