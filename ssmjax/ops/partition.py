"""How several devices divide a scan where the user does not say.

Under `jax.shard_map` each device scans its part. Under `jax.jit` alone the
compiler divides a program, but to it a kernel is a black box, and so are loops
over blocks (a rule for it by `custom_partitioning` does not reach TPUs). Rows
and channels of a scan are independent; so where the mesh is known when an op
is traced, by `jax.set_mesh` or from explicit shardings, the op gets a
`shard_map` of its own, and what is sharded otherwise is moved there and back.

Without `set_mesh`, automatic shardings are known only when a program is
lowered (the mesh in the type of an array may be one that it has left): there
`divided_rows` divides a kernel over its rows.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["divided", "divided_rows"]


def divided(
  run: Callable[..., Any],
  args: Sequence[Any],
  axes: Sequence[str],
  out: Sequence[str],
  *,
  only_typed: bool,
) -> Any:
  """Call `run(*args)`, each device on its rows and channels.

  A word of a letter for each axis tells of an array which is r, the batch
  rows, and d, the channels; others are not divided, nor axes of size 1.

  A mesh axis that is `AxisType.Explicit` divides what it divides in the types
  of the arguments. For the others that is not known: rows take the first, as
  many as divide them, for data come first in most meshes, and channels take
  what divides them of the rest.

  Args:
    run: a function of any sizes r and d, which are independent.
    args: its arguments, arrays or None.
    axes: a word for each argument.
    out: a word for each result.
    only_typed: leave axes that are not explicit to the compiler.

  Returns:
    `run(*args)`; where the arguments are on one device, or within a
    `shard_map`, just that.
  """
  mesh = _mesh(args, only_typed)
  if mesh is None:
    return run(*args)
  have = [i for i, x in enumerate(args) if x is not None]
  arrays = [args[i] for i in have]
  words = [axes[i][: args[i].ndim] for i in have]
  over = _division(mesh, arrays, words)

  def spec(word, undivided=()):
    return jax.P(
      *(None if i in undivided else over.get(x) for i, x in enumerate(word))
    )

  def part(*arrays):
    full = list(args)
    for i, x in zip(have, arrays, strict=True):
      full[i] = x
    return run(*full)

  specs = [
    spec(word, [i for i, n in enumerate(x.shape) if n == 1])
    for word, x in zip(words, arrays, strict=True)
  ]
  if mesh.explicit_axes:
    arrays = [
      jax.sharding.reshard(x, jax.NamedSharding(mesh, s))
      for x, s in zip(arrays, specs, strict=True)
    ]
  return jax.shard_map(
    part,
    mesh=mesh,
    in_specs=tuple(specs),
    out_specs=tuple(map(spec, out)),
  )(*arrays)


def divided_rows(run: Callable[..., Any], mesh: Any, *arrays: jax.Array) -> Any:
  """Call `run(*arrays)`, each device of the mesh on its rows.

  Arguments and results lead with the rows, or with groups, each of which
  serves as many rows. What leads with one group is whole on every device; of
  a result, it is the sum over the devices.
  """
  out = jax.eval_shape(run, *arrays)
  sizes = {x.shape[0] for x in (*arrays, *jax.tree.leaves(out))} - {1}
  names: tuple[str, ...] = ()
  if sizes:
    names = _dividing(mesh, mesh.axis_names, math.gcd(*sizes))
  spec = lambda x: jax.P(names) if x.shape[0] > 1 else jax.P()

  def part(*arrays):
    return jax.tree.map(
      lambda shape, x: x if shape.shape[0] > 1 else _summed(x, names),
      out,
      run(*arrays),
    )

  return jax.shard_map(
    part,
    mesh=mesh,
    in_specs=tuple(map(spec, arrays)),
    out_specs=jax.tree.map(spec, out),
    check_vma=False,
  )(*arrays)


def _summed(x, names):
  """The sum over mesh axes, at the precision of float32 or more."""
  if not names:
    return x
  wide = jnp.promote_types(x.dtype, jnp.float32)
  return lax.psum(x.astype(wide), names).astype(x.dtype)


def _mesh(args, only_typed):
  """The mesh that a scan is to be divided over here, or None.

  Within a `shard_map` over some axes the others stay the compiler's: JAX
  cannot differentiate one `shard_map` in another yet.
  """
  context = jax.sharding.get_abstract_mesh()
  meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(args)]
  meshes = [x for x in meshes if x.explicit_axes]
  if not only_typed:
    meshes = [context, *meshes]
  for mesh in meshes:
    # On one device explicit shardings still are types, which loops refuse.
    is_divided = mesh.size > 1 or mesh.explicit_axes
    if is_divided and not mesh.manual_axes and not context.manual_axes:
      return mesh
  return None


def _division(mesh, arrays, words):
  """The mesh axes that r and d are divided over."""
  explicit = set(mesh.explicit_axes)
  free = [name for name in mesh.axis_names if name not in explicit]
  over = {}
  for letter in "rd":
    with_it = [
      (x, word.index(letter))
      for x, word in zip(arrays, words, strict=True)
      if letter in word
    ]
    size = max((x.shape[axis] for x, axis in with_it), default=1)
    typed: tuple[str, ...] = ()
    for x, axis in sorted(with_it, key=lambda found: -found[0].size):
      typed = typed or _names(jax.typeof(x).sharding.spec, axis)
    typed = _dividing(mesh, [x for x in typed if x in explicit], size)
    over[letter] = typed + _dividing(mesh, free, size, typed)
    free = [name for name in free if name not in over[letter]]
  return {letter: names or None for letter, names in over.items()}


def _names(spec, axis):
  """The mesh axes in one place of a PartitionSpec."""
  names = spec[axis] if axis < len(spec) else None
  return (names,) if isinstance(names, str) else tuple(names or ())


def _dividing(mesh, names, size, taken=()):
  """The first of these axes of the mesh, as far as they divide `size`."""
  found: tuple[str, ...] = ()
  for name in names:
    if size % math.prod(mesh.shape[x] for x in (*taken, *found, name)):
      break
    found = (*found, name)
  return found
