"""What XLA itself thinks that a TPU program costs, read off the program.

libtpu's compiler leaves on every op the cycles that its cost model gives it,
by which it has chosen layouts and tiles. It counts copies from and to memory
and what starting an op takes, other than the estimates of kernels' bundles in
`static_tpu`; the two are not to be compared. An op within a loop counts once
for each trip.
"""

import re
from typing import Any

__all__ = ["costs"]


def costs(text: str) -> dict[str, Any]:
  """Add up the estimates of all ops of a compiled program.

  Args:
    text: of the compiled program.

  Returns:
    `cycles`, of everything; `product_cycles`, of the ops that multiply
    matrices (with what is fused into them); `ops`, how many are run, loops
    followed.

  Raises:
    RuntimeError: the text has no estimates, or a loop's trips are not told.
  """
  computations, entry = _computations(text)
  products = set()
  for name, lines in computations.items():
    if any(_MULTIPLIES.search(line) for line in lines):
      products.add(name)
  found = {"cycles": 0, "product_cycles": 0, "ops": 0}

  def follow(name, trips):
    for line in computations[name]:
      if loop := _LOOP.search(line):
        follow(loop[2], trips * _trips(computations[loop[1]]))
      elif estimate := _ESTIMATE.search(line):
        cycles = trips * int(estimate[1])
        found["cycles"] += cycles
        found["ops"] += trips
        if _reaches(line, computations, products):
          found["product_cycles"] += cycles

  follow(entry, 1)
  if not found["ops"]:
    raise RuntimeError("static: no 'estimated_cycles' in the program.")
  return found


_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
_LOOP = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
_CALLS = re.compile(r"calls=%?([\w.-]+)")
# XLA takes every other row of an array by a product as well, which is none of
# the program's.
_MULTIPLIES = re.compile(r" (?:dot|convolution)\(.*op_name=\"[^\"]*dot_general")


def _computations(text):
  """The lines of every computation, and the name of the first to run."""
  found: dict[str, list[str]] = {}
  name = entry = ""
  for line in text.splitlines():
    head = re.match(r"(ENTRY )?%?([\w.-]+) .*{$", line)
    if head:
      name = head[2]
      found[name] = []
      entry = name if head[1] else entry
    elif line.startswith(" ") and name:
      found[name].append(line)
  if not entry:
    raise RuntimeError("static: no 'ENTRY' in the program.")
  return found, entry


def _trips(condition):
  """How often a loop runs that counts from 0 to a constant."""
  bounds = re.findall(r" s32\[\]\S* constant\((\d+)\)", "\n".join(condition))
  if len(bounds) != 1:
    raise RuntimeError(
      f"static: a loop's condition has {len(bounds)} constants, expected one,"
      f" its trips: {' '.join(condition)}"
    )
  return int(bounds[0])


def _reaches(line, computations, wanted):
  """Whether an op or what it calls is among the wanted computations."""
  if _MULTIPLIES.search(line):
    return True
  return any(
    name in wanted
    or any(
      _reaches(inner, computations, wanted) for inner in computations[name]
    )
    for name in _CALLS.findall(line)
  )
