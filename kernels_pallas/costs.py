"""The work of each op, told to XLA: its cost analysis can't see into a kernel.

Counts are of the algorithm, not of an implementation: what a roofline needs.
"""

import jax
from jax.experimental import pallas as pl

__all__ = ["linear_scan_cost", "selective_scan_cost"]


def selective_scan_cost(
  rows, shared, *, ones: int, backward: bool = False
) -> pl.CostEstimate:
  """Work of a selective scan's pass over `rows` and `shared` (its arguments).

  For each of the R·T·D elements and N states: ΔA, its exponential, the update
  of h and the product with C; the backward pass does that again and the
  adjoint of each. Bytes are those of all arguments and results, once.
  """
  batch, length, channels = rows["u"].shape
  states = rows["B"].shape[-1]
  elements = batch * length * channels
  # Δ, gate and skip: a softplus and a sigmoid, some ten operations.
  flops = elements * ((17 if backward else 6) * states + 10)
  transcendentals = elements * (states - ones + 4)
  arguments = sum(map(_bytes, jax.tree.leaves((rows, shared))))
  floats = [rows[k] for k in ("u", "delta", "z") if rows[k] is not None]
  if backward:
    results = sum(map(_bytes, floats)) + 8 * batch * length * states
  else:
    results = _bytes(rows["u"])
  results += 4 * batch * channels * states * (2 if backward else 1)
  return pl.CostEstimate(
    flops=flops,
    transcendentals=transcendentals,
    bytes_accessed=arguments + results,
  )


def linear_scan_cost(*arrays, results: int, flops: int) -> pl.CostEstimate:
  """Work of a linear scan: it reads `arrays` and writes `results` bytes."""
  arguments = sum(map(_bytes, jax.tree.leaves(arrays)))
  return pl.CostEstimate(
    flops=flops, transcendentals=0, bytes_accessed=arguments + results
  )


def _bytes(x) -> int:
  return x.size * x.dtype.itemsize
