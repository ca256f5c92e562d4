"""Rows of a model's state: to drop, to copy and to reorder."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssmjax.models.decoding import GenerationState
from ssmjax.models.lm import ModelState
from ssmjax.models.sampling import is_unknown
from ssmjax.types import Array, Int

__all__ = ["take_rows"]


def take_rows[State: (ModelState, GenerationState)](
  state: State, rows: Int[Array, " R"] | Sequence[int] | slice
) -> State:
  """Take rows of the batch out of a state.

  A model's layers are stacked, so rows are the second axis of their arrays
  and the first of all others: `tree.map(lambda x: x[rows], state)` takes
  layers.

  Args:
    state: what a `LanguageModel` carries, or what `generate` returns.
    rows: numbers of rows, `[R]`, in any order and as often as wanted, counted
      from the end where negative; or which to keep, `[B]` bool; or a slice.
      `[0] * R` gives one prefix to R rows, `[3, 3, 1]` reorders beams, and
      `~state.done` drops finished rows (not under jit, where R has to be
      known).

  Returns:
    The state of those rows. With one key for all rows `generate` numbers them
    anew; with a key a row, take the keys' rows too.

  Raises:
    ValueError: what is no such state, or rows that it does not have.

  >>> from flax import nnx
  >>> from ssmjax.models import LanguageModel, ModelConfig
  >>> model = LanguageModel(ModelConfig(16, 8, 2), rngs=nnx.Rngs(0))
  >>> take_rows(model.init_state(3), [2, 0]).length.shape
  (2,)
  """
  if not isinstance(state, ModelState | GenerationState):
    raise ValueError(
      f"take_rows: state is a {type(state).__name__}, expected a ModelState or"
      " a GenerationState. A mixer's own state has its rows first: use"
      " jax.tree.map(lambda x: x[rows], state)."
    )
  model = state.model if isinstance(state, GenerationState) else state
  index = _row_numbers(rows, model.length.shape[0])
  first = lambda x: _take(x, index, 0)
  layers = jax.tree.map(lambda x: _take(x, index, 1), model.layers)
  model = ModelState(layers, first(model.length))
  if isinstance(state, ModelState):
    return model
  return GenerationState(model, *map(first, state[1:]))


def _row_numbers(rows: Any, batch: int) -> Any:
  """Numbers of rows, `[R]` int32, from 0."""
  expected = f"numbers of the {batch} rows, [R], or [{batch}] bool"
  if isinstance(rows, slice):
    return np.arange(batch, dtype=np.int32)[rows]
  traced = is_unknown(rows)
  if not traced:
    rows = np.asarray(rows)
    if rows.dtype == np.bool and rows.shape == (batch,):
      return np.flatnonzero(rows).astype(np.int32)
    if not rows.size:
      rows = rows.astype(np.int32)
  if rows.ndim != 1 or not jnp.issubdtype(rows.dtype, jnp.integer):
    raise ValueError(
      f"take_rows: rows has shape {rows.shape} and dtype {rows.dtype.name},"
      f" expected {expected}."
    )
  if not traced:
    wrong = rows[(rows < -batch) | (rows >= batch)]
    if len(wrong):
      raise ValueError(
        f"take_rows: rows has {wrong[0]}, expected {expected}, {-batch} to"
        f" {batch - 1}."
      )
  rows = rows.astype(np.int32)
  # One outside, which only a traced index can be, gives the last row.
  return jnp.where(rows < 0, rows + batch, rows)


def _take(x, index, axis):
  """x at these places of an axis, its layout kept where types have one."""
  x = jnp.asarray(x)
  sharding = jax.typeof(x).sharding
  out = sharding if sharding.mesh.explicit_axes else None
  place = (slice(None),) * axis + (index,)
  return x.at[place].get(mode="clip", out_sharding=out)
