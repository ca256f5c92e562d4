"""What it means that a premise of a theorem holds on a given layer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ssmjax.theory.extremes import largest
from ssmjax.types import Array, Bool, Float, Int

__all__ = ["Premise", "measure_premise"]


class Premise(NamedTuple):
  """Where a premise holds, and where it is missed by most.

  The entries are usually the pairs (t, n) of a time and a channel, for every
  row of the batch; a premise about a whole sequence has none for t.

  Attributes:
    holds: whether it holds at every entry, to the tolerance of the check;
      true if nothing is asked, as of one token where it is about t ≥ 2.
    fraction: share of the entries at which it holds, in [0, 1]; 1 of none.
    worst: index `(row, t, *n)` of the worst offender; where all hold, of the
      entry that comes nearest to missing; -1 where there is no entry.
    excess: by how much it is missed there, in the unit that the check names;
      0 or less where it holds, -inf where there is no entry.
    by_channel: `fraction` of each channel, `*S`.
  """

  holds: Bool[Array, ""]
  fraction: Float[Array, ""]
  worst: Int[Array, " axes"]
  excess: Float[Array, ""]
  by_channel: Float[Array, "*S"]


def measure_premise(
  holds: Bool[Array, "..."],
  excess: Float[Array, "..."],
  leading: int,
  *,
  first: int = 0,
) -> Premise:
  """Summarise a premise that was checked entry by entry.

  Args:
    holds: whether it holds, at each entry. NaN in `excess` should not hold.
    excess: by how much it is missed; the largest is the worst.
    leading: axes before those of the channels: 2 for `[B, T, *S]`.
    first: t of the first entry along axis 1, where a premise is about later
      ones only.

  >>> measure_premise(jnp.array([True, False]), jnp.array([-1., 2.]), 0).excess
  Array(2., dtype=float32)
  """
  if not holds.size:
    return Premise(
      jnp.asarray(True),
      jnp.ones((), jnp.float32),
      jnp.full((holds.ndim,), -1, jnp.int32),
      jnp.full((), -jnp.inf, excess.dtype),
      jnp.ones(holds.shape[leading:], jnp.float32),
    )
  # One axis at a time: a float32 count of all entries would stop at 2²⁴.
  share = holds.astype(jnp.float32)
  for _ in range(leading):
    share = share.mean(0)
  by_channel = share
  while share.ndim:
    share = share.mean(0)
  # NaN is the worst of all: argmax finds it, `largest` does not lose it.
  worst, at_worst = [], excess
  while at_worst.ndim:
    peaks = largest(at_worst, tuple(range(1, at_worst.ndim)))
    worst.append(peaks.argmax())
    at_worst = jax.lax.dynamic_index_in_dim(at_worst, worst[-1], keepdims=False)
  index = jnp.stack(worst) if worst else jnp.zeros((0,), jnp.int32)
  if first:
    index = index.at[1].add(first)
  return Premise(holds.all(), share, index, at_worst, by_channel)
