"""An error that says the way out where forward mode meets a custom backward.

JAX refuses a jvp of a `custom_vjp` function too, but late and without a name.
"""

import contextlib
import functools

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ssmjax.types import Array

__all__ = ["refused_by_name", "reverse_only"]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def reverse_only(op: str, x: Array) -> Array:
  """Return x, whose tangents can be transposed but not computed.

  Reverse mode transposes the mark on a tangent away; in forward mode it is
  what comes first, and raises. Derivatives of what reverse mode computes are
  not concerned, forward ones included.

  Args:
    op: the function's name, and what it is to do in place, for the message.
    x: an argument of a function with a backward of its own.

  Raises:
    NotImplementedError: a tangent of x is computed, when it is lowered.
  """
  return x


@contextlib.contextmanager
def refused_by_name(op: str):
  """Around the call of an op whose arguments are marked: say its name.

  Where a `vmap` is around forward mode, as in `jacfwd`, JAX's own refusal comes
  before that of the mark.
  """
  try:
    yield
  except TypeError as error:
    if "forward-mode" not in str(error):
      raise
    _refuse(op=op, cause=error)


@reverse_only.defjvp
def _mark_tangent(op, primals, tangents):
  # The value goes on without a mark: what comes next has all derivatives.
  return primals[0], _tangent_p.bind(tangents[0], op=op)


_tangent_p = Primitive("ssmjax_reverse_only")
_tangent_p.def_abstract_eval(lambda x, *, op: x)
ad.deflinear2(_tangent_p, lambda ct, x, *, op: [ct])


def _refuse(*_, op, cause=None):
  raise NotImplementedError(
    f"{op}: forward-mode derivatives (jvp, jacfwd, linearize) go through the"
    " reference alone. Pass implementation='reference', or use reverse mode"
    " (grad, vjp, jacrev)."
  ) from cause


_tangent_p.def_impl(_refuse)


def _batched(args, dims, *, op):
  """Still a mark: `grad` of a `vmap` transposes it away as well."""
  return _tangent_p.bind(*args, op=op), dims[0]


batching.primitive_batchers[_tangent_p] = _batched
mlir.register_lowering(_tangent_p, lambda ctx, x, *, op: _refuse(op=op))
