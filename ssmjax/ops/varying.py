"""Varying types under `jax.shard_map`: one cast at the door of an op.

Where data are sharded and parameters replicated, a hand-written backward
would have to sum each parameter's cotangent over the mesh axes that only the
data vary on. Casting every argument to the union of these axes *before* the
custom derivative does just that: the transpose of the cast is the sum, and
inside, all loop carries have one type.
"""

import jax
from jax import lax

__all__ = ["match_varying"]


def match_varying(*args):
  """Cast every array of `args` (None is kept) to the union of varying axes."""
  axes = frozenset()
  for leaf in jax.tree.leaves(args):
    axes |= jax.typeof(leaf).manual_axis_type.varying
  if not axes:
    return args

  def cast(x):
    missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
    return lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(cast, args)
