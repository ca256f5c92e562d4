"""A digest of what a traced program computes, equal in every process.

It depends on operations, shapes, dtypes and the values of all constants (a
learning rate in a closure, say), and not on names of functions or variables,
lines of source, addresses of objects, or the mesh's devices.
"""

import dataclasses
import functools
import hashlib
import re
from typing import Any

import jax
import numpy as np

# Of operations, what says only how they came to be, or where they run.
_SKIPPED = {
  *("name", "ctx_mesh", "debug_info", "source_info", "name_and_src_info"),
  *("debug", "metadata", "effects"),
}
# Larger constants are read in part: every n-th number.
_READ_WHOLE = 1 << 24


def fingerprint(jaxpr: Any) -> str:
  """Computes the digest of a (closed) jaxpr, 64 hexadecimal digits."""
  return _digest(_Walk().value(jaxpr))


class _Walk:
  """Describes jaxprs by nested tuples; equal ones share one digest."""

  def __init__(self):
    self._known: dict[int, str] = {}

  def value(self, x: Any) -> Any:
    """Describes a parameter of an operation, or a program."""
    if x is None or isinstance(x, bool | int | float | complex | str | bytes):
      return type(x).__name__, repr(x)
    if hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns"):
      if id(x) not in self._known:
        self._known[id(x)] = _digest(self._jaxpr(x))
      return "jaxpr", self._known[id(x)]
    if isinstance(x, jax.core.Tracer):
      return "traced", _type(x.aval)
    if isinstance(x, np.ndarray | np.generic | jax.Array):
      return _array(x)
    if isinstance(x, dict):
      return tuple(
        sorted(
          (str(key), self.value(value))
          for key, value in x.items()
          if key not in _SKIPPED
        )
      )
    if isinstance(x, set | frozenset):
      return tuple(sorted(str(self.value(item)) for item in x))
    if isinstance(x, tuple | list):
      return type(x).__name__, tuple(self.value(item) for item in x)
    if isinstance(x, jax.sharding.Mesh | jax.sharding.AbstractMesh):
      return "mesh", repr(dict(x.shape))
    if isinstance(x, jax.sharding.NamedSharding):
      return self.value(x.mesh), repr(x.spec)
    if isinstance(x, functools.partial):
      return self.value(x.func), self.value(x.args), self.value(x.keywords)
    if callable(x):  # rules of derivatives, which the trace has followed
      return "function", type(x).__name__
    if dataclasses.is_dataclass(x):
      fields = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
      return type(x).__name__, self.value(fields)
    # What is left has names of places in memory at most.
    return type(x).__name__, re.sub(r"0x[0-9a-f]+", "", repr(x))

  def _jaxpr(self, x: Any) -> tuple:
    """Numbers variables in the order in which they come, as names vary."""
    consts = getattr(x, "consts", ())
    jaxpr = getattr(x, "jaxpr", x)
    numbers: dict[Any, int] = {}

    def made(variables):
      found = []
      for variable in variables:
        numbers[variable] = len(numbers)
        found.append(_type(variable.aval))
      return tuple(found)

    def used(variables):
      return tuple(
        self.value(v.val) + _type(v.aval) if hasattr(v, "val") else numbers[v]
        for v in variables
      )

    inputs = made((*jaxpr.constvars, *jaxpr.invars))
    operations = tuple(
      (
        eqn.primitive.name,
        used(eqn.invars),
        self.value(eqn.params),
        made(eqn.outvars),
      )
      for eqn in jaxpr.eqns
    )
    return (
      tuple(self.value(const) for const in consts),
      inputs,
      operations,
      used(jaxpr.outvars),
    )


def _type(aval: Any) -> tuple:
  weak = getattr(aval, "weak_type", False)
  return (
    str(getattr(aval, "dtype", type(aval).__name__)),
    getattr(aval, "shape", None),
    weak,
  )


def _array(x: Any) -> tuple:
  """A constant by dtype, shape and content, as far as this process has it."""
  kind = (str(x.dtype), tuple(x.shape))
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return kind
  if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  every = -(-x.nbytes // _READ_WHOLE)
  if every > 1:
    x = x.reshape(-1)[::every]
  return (*kind, hashlib.sha256(np.asarray(x).tobytes()).hexdigest())


def _digest(description: Any) -> str:
  return hashlib.sha256(repr(description).encode()).hexdigest()
