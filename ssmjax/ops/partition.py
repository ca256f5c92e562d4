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


def divided_rows(
  run: Callable[..., Any], mesh: Any, arrays: Sequence[Any], rows: int
) -> Any:
  """Call `run(*arrays)`, each device of the mesh on its rows.

  All results lead with the rows, and so do the arguments but those that lead
  with groups, each of which serves as many rows.
  """
  groups = math.gcd(*(x.shape[0] for x in arrays))
  names = _dividing(mesh, mesh.axis_names, groups if groups > 1 else rows)
  return jax.shard_map(
    run,
    mesh=mesh,
    in_specs=tuple(jax.P(names) if x.shape[0] > 1 else jax.P() for x in arrays),
    out_specs=jax.P(names),
    check_vma=False,
  )(*arrays)


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
    if mesh.size > 1 and not mesh.manual_axes and not context.manual_axes:
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
