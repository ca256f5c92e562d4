"""Ops of no batch rows at all: their results are known by their shapes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["any_rows"]


def any_rows(function: Callable[..., Any], place: int = 0):
  """Let a function of arrays take a batch of no rows.

  What blocks, chunks and kernels divide by is never 0 then: for no rows, the
  function is traced for one, and its results of no rows are returned.

  Args:
    function: of arrays, some of which lead with the batch rows, as all results
      do.
    place: of an argument that leads with the rows.
  """

  @functools.wraps(function)
  def run(*args, **static):
    if args[place].shape[0]:
      return function(*args, **static)
    leaves, tree = jax.tree.flatten(args)
    places = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)]

    def of_arrays(*arrays):
      full = list(leaves)
      for i, x in zip(places, arrays, strict=True):
        full[i] = x
      return function(*jax.tree.unflatten(tree, full), **static)

    def one_row(x):
      shape = (1, *x.shape[1:]) if x.shape[:1] == (0,) else x.shape
      return jax.ShapeDtypeStruct(shape, x.dtype)

    results = jax.eval_shape(of_arrays, *(one_row(leaves[i]) for i in places))
    return jax.tree.map(
      lambda x: jnp.zeros((0, *x.shape[1:]), x.dtype), results
    )

  return run
