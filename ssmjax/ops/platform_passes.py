"""The two passes of an op, whose code is chosen when a program is lowered.

While JAX traces a program, a pass is one equation: a primitive that knows the
shapes and dtypes of its results and nothing else. Its lowering rule traces the
code of the platform that the program is for. So a program for a CPU never
traces a kernel for TPU or GPU, a program compiled ahead of time takes the
kernel of its chip, and the rule knows how the program is divided over devices.

What the forward pass saves for the backward pass has another shape on each
platform. The equation has a result for each distinct shape; those that belong
to other platforms are zeros, which nobody reads and the compiler removes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir, xla

from ssmjax.ops.partition import divided_rows

__all__ = ["OTHERS", "Passes", "PlatformPass", "Saved"]

# The entry of a table for the platforms that have none of their own.
OTHERS = "others"


class Passes(NamedTuple):
  """The two passes of an op on one platform, in the contract of the op.

  Attributes:
    forward: `(*args, keep, **static)` to the results and, last, what the
      backward pass wants to know of the states (None unless `keep`).
    backward: `(*args, **static)` to the cotangents; what forward has saved is
      somewhere among its arguments.
    saved: `(*args, **static)` of forward to the shapes and dtypes of what it
      saves, a tree of `jax.ShapeDtypeStruct`, without tracing it.
    opaque: the compiler cannot divide the code over devices: the lowering
      rule gives each device its rows.
  """

  forward: Callable[..., Any]
  backward: Callable[..., Any]
  saved: Callable[..., Any]
  opaque: bool = True


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("slots",),
  meta_fields=("slot_of",),
)
@dataclasses.dataclass(frozen=True)
class Saved:
  """What forward passes save, for every platform that may run.

  Attributes:
    slots: a tree of arrays for each distinct tree of shapes.
    slot_of: pairs of a platform and the index of its slot.
  """

  slots: tuple[Any, ...]
  slot_of: tuple[tuple[str, int], ...]

  def of(self, platform: str) -> Any:
    """The slot of one platform."""
    return self.slots[dict(self.slot_of)[platform]]


@dataclasses.dataclass(frozen=True)
class PlatformPass:
  """One pass of an op, as a function of arrays.

  Attributes:
    op: the public function, for messages.
    backward: which of the two passes.
    results: `(*args, **static)` to the shapes and dtypes of the pass's results
      (without what is saved), a tree of `jax.ShapeDtypeStruct`.
    table: pairs of a platform and its `Passes`; `OTHERS` stands for platforms
      that are not in it. Without `OTHERS` these are refused when lowered.
  """

  op: str
  backward: bool
  results: Callable[..., Any]
  table: tuple[tuple[str, Passes], ...]

  def __call__(self, *args: Any, keep: bool = False, **static: Any) -> Any:
    """Run the pass: its results and, forward, `Saved` or None at their end."""
    if not self.backward:
      static["keep"] = keep
    out = self._shapes(args, static)
    leaves, tree = jax.tree.flatten(args)
    out_leaves, out_tree = jax.tree.flatten(out)
    found = _pass_p.bind(
      *leaves,
      one=self,
      tree=tree,
      out=tuple((x.shape, jnp.dtype(x.dtype)) for x in out_leaves),
      static=tuple(sorted(static.items())),
      x64=jax.config.jax_enable_x64,
    )
    return jax.tree.unflatten(out_tree, found)

  def _shapes(self, args, static):
    """The results' shapes and dtypes, and those of what is saved."""
    if self.backward:
      return self.results(*args, **static)
    static = dict(static)
    keep = static.pop("keep")
    saved = self._saved(args, static) if keep else None
    return (*self.results(*args, **static), saved)

  def _saved(self, args, static):
    """The shapes of every platform; those that are alike share a slot."""
    slots, slot_of = [], []
    for platform, passes in self.table:
      shapes = passes.saved(*args, **static)
      if shapes not in slots:
        slots.append(shapes)
      slot_of.append((platform, slots.index(shapes)))
    return Saved(tuple(slots), tuple(slot_of))

  def run(self, platform: str, args: Any, static: dict[str, Any]) -> Any:
    """Run one platform's code: what `__call__` returns."""
    passes = dict(self.table)[platform]
    out = self._shapes(args, static)
    args = jax.tree.map(
      lambda x: x.of(platform) if isinstance(x, Saved) else x,
      args,
      is_leaf=lambda x: isinstance(x, Saved),
    )
    if self.backward:
      return _like(out, passes.backward(*args, **static))
    *results, states = passes.forward(*args, **static)
    saved = out[-1]
    if saved is not None:
      mine = dict(saved.slot_of)[platform]
      zeros = functools.partial(jax.tree.map, lambda x: _zeros(x, results[0]))
      slots = tuple(
        states if i == mine else zeros(slot)
        for i, slot in enumerate(saved.slots)
      )
      saved = Saved(slots, saved.slot_of)
    return _like(out, (*results, saved))


def _like(out, found):
  """`found` with the structure, shapes and dtypes of `out`."""
  if isinstance(out, dict):
    # A pass may give more cotangents than there are arguments.
    found = {name: found[name] for name in out}

  def cast(shape, x):
    if x.shape != shape.shape:
      raise AssertionError(f"A pass gave {x.shape}, expected {shape.shape}.")
    return x.astype(shape.dtype)

  return jax.tree.map(cast, out, found)


def _zeros(shape, like):
  """Zeros of a shape that vary over the same mesh axes as `like`."""
  return jnp.zeros_like(like, shape.dtype, shape=shape.shape)


_pass_p = Primitive("ssmjax_pass")
_pass_p.multiple_results = True
_pass_p.def_impl(functools.partial(xla.apply_primitive, _pass_p))


@_pass_p.def_abstract_eval
def _abstract(*avals, out, **params):
  # Inside a `shard_map` all arguments vary over the same axes, and so do the
  # results.
  like = avals[0]
  return [
    like.update(
      shape=shape,
      dtype=dtype,
      weak_type=False,
      sharding=like.sharding.update(spec=jax.P(*(None,) * len(shape))),
    )
    for shape, dtype in out
  ]


def _lower(ctx, *leaves, one, tree, static, out, x64, platform=None):
  table = dict(one.table)
  name = platform
  if platform == "cuda" and visible_gpu_is_old():
    name = None
  name = name if name in table else OTHERS
  if name not in table:
    _refuse(one, platform or ", ".join(ctx.module_context.platforms))
  is_kernel = name in ("tpu", "cuda")
  rows_over = None
  if table[name].opaque:
    rows_over = _compilers_mesh(ctx)
    if rows_over is _UNKNOWN:
      if is_kernel:
        raise NotImplementedError(_undivided(one.op))
      name, rows_over = OTHERS, None
  run = functools.partial(_run, one=one, name=name, tree=tree, static=static)
  if rows_over is not None:
    run = functools.partial(divided_rows, run, rows_over)
  context = ctx.module_context
  if is_kernel:
    # Of an export for several platforms, this is the branch of one of them.
    context = context.replace(platforms=(platform,))
  # Kernels count in 32 bits, where Python's integers would be int64.
  with jax.enable_x64(x64 and not is_kernel):
    lower = mlir.lower_fun(run, multiple_results=True)
    return lower(ctx.replace(module_context=context), *leaves)


# Under a jit of its own: programs trace the same pass of the same shapes once.
@functools.partial(jax.jit, static_argnames=("one", "name", "tree", "static"))
def _run(*leaves, one, name, tree, static):
  """The results' leaves of one platform's code."""
  args = jax.tree.unflatten(tree, leaves)
  return jax.tree.leaves(one.run(name, args, dict(static)))


mlir.register_lowering(_pass_p, _lower)
for _platform in ("cpu", "tpu", "cuda"):
  mlir.register_lowering(
    _pass_p,
    functools.partial(_lower, platform=_platform),
    platform=_platform,
  )


def visible_gpu_is_old() -> bool:
  """Whether a CUDA device is here that the kernels' instructions lack."""
  try:
    devices = jax.local_devices(backend="cuda")
  except RuntimeError:  # No such backend: ahead-of-time code keeps the kernel.
    return False
  return any(float(d.compute_capability) < 8.0 for d in devices)


def _refuse(one, platform):
  have = ", ".join(sorted(name for name, _ in one.table))
  raise NotImplementedError(
    f"{one.op}: implementation='pallas' has no kernel for {platform}; it has"
    f" {'kernels for ' + have if have else 'none here'} (on GPUs, for sm_80 and"
    " newer). Pass implementation='chunked', or None to choose by platform."
  )


def _undivided(op):
  return (
    f"{op}: the compiler cannot divide a kernel over several devices. Enter"
    " their mesh by jax.set_mesh, call it inside a jax.shard_map over all axes"
    " of the mesh, or pass implementation='chunked'."
  )


_UNKNOWN = object()


def _compilers_mesh(ctx):
  """The mesh of a program that the compiler divides, None if it does not."""
  context = ctx.module_context.axis_context
  if isinstance(context, mlir.SPMDAxisContext):
    manual = context.manual_axes | set(context.mesh.manual_axes)
    # A `shard_map` cannot be opened inside one over some of the axes.
    return None if manual.issuperset(context.mesh.axis_names) else _UNKNOWN
  if not isinstance(context, mlir.ShardingContext) or context.num_devices < 2:
    return None
  for x in ctx.avals_in:
    if x.sharding.mesh.size == context.num_devices:
      return x.sharding.mesh
  devices = context.device_assignment
  if devices is None:
    return _UNKNOWN
  # No argument says how it is divided: the devices in their order will do.
  return jax.sharding.Mesh(np.array(devices), ("devices",))
