"""Where batches come from, and the fixed grid of dispatches over them.

Boundaries of the grid are the multiples, in the absolute step index, of the
intervals of the configuration. A run that stops does so at a boundary and goes
on with the very dispatches that it would have made, which is what makes a
resume exact to the bit.
"""

import base64
import itertools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssmjax.training.step import Stream


class Run(NamedTuple):
  """Steps of one kind that one dispatch makes."""

  kind: Hashable
  first: int
  steps: int
  batches: Any  # host arrays [steps, B, ...]; {} for a stream


class StreamSource:
  """Cuts a `Stream` into runs."""

  def __init__(self, stream: Stream):
    self.stream = stream
    self.description = f"{type(stream).__name__}, made on the devices"

  def runs(self, first: int, last: int, size: int) -> Iterator[Run]:
    """Yields the dispatches from step `first` to `last`."""
    kinds = [self.stream.kind(step) for step in range(first, last)]
    for kind, start, steps in _cut(kinds, size):
      yield Run(kind, first + start, steps, {})

  def programs(self, first: int, last: int, size: int) -> set:
    """Names the programs that `runs` needs, if known beforehand."""
    return {(run.kind, run.steps) for run in self.runs(first, last, size)}

  def shapes(self, run: Run) -> Any:
    """Gives the shapes and dtypes of a step's batch."""
    return jax.eval_shape(
      lambda: self.stream.batch(run.kind, jnp.int32(run.first), jnp.uint32(0))
    )

  def name(self, step: int, seed: int) -> str:
    """Says how to make the batch of a step again."""
    return f"stream.batch({self.stream.kind(step)!r}, {step}, seed={seed})"

  def cursor(self) -> Any:
    """The step is the cursor."""

  def restore(self, cursor: Any) -> None:
    """The step is the cursor."""


class IteratorSource:
  """Cuts a Python iterator with a state (grain's, say) into runs."""

  stream = None

  def __init__(self, iterator: Any):
    self._iterator = iterator
    self.description = f"{type(iterator).__name__}, an iterator"

  def runs(self, first: int, last: int, size: int) -> Iterator[Run]:
    """Draws the batches from step `first` to `last`, and no more."""
    batches = []
    for step in range(first, last):
      try:
        batch = next(self._iterator)
      except StopIteration:
        raise ValueError(
          f"fit: the data ended after {step} steps; repeat it "
          "(grain: .repeat()) or ask for fewer steps."
        ) from None
      batches.append(jax.tree.map(np.asarray, batch))
    kinds = [_shapes(batch) for batch in batches]
    for kind, start, steps in _cut(kinds, size):
      stack = batches[start : start + steps]
      stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *stack)
      yield Run(kind, first + start, steps, stacked)

  def programs(self, first: int, last: int, size: int) -> set:
    """Shapes are not known before the batches are drawn."""
    return set()

  def shapes(self, run: Run) -> Any:
    """Gives the shapes and dtypes of a step's batch."""
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), run.batches
    )

  def name(self, step: int, seed: int) -> str:
    """Says which batch it was."""
    return f"the iterator's batch number {step}"

  def cursor(self) -> Any:
    """Gives the iterator's state as JSON."""
    return _to_json(self._iterator.get_state())

  def restore(self, cursor: Any) -> None:
    """Sets the iterator to a saved state."""
    self._iterator.set_state(_from_json(cursor))


def source_of(data: Any) -> StreamSource | IteratorSource:
  """Takes a `Stream` or an iterator with `get_state` and `set_state`."""
  if hasattr(data, "kind") and hasattr(data, "batch"):
    return StreamSource(data)
  needed = ("__next__", "get_state", "set_state")
  missing = [name for name in needed if not hasattr(data, name)]
  if missing:
    raise ValueError(
      f"fit: data is a {type(data).__name__} without {', '.join(missing)}; "
      "expected a Stream (kind, batch) or an iterator whose state can be saved "
      "(grain: iter(dataset))."
    )
  return IteratorSource(data)


def next_boundary(step: int, steps: int, intervals: Sequence[int]) -> int:
  """Gives the first multiple of any interval after `step`, at most `steps`."""
  return min(steps, *((step // n + 1) * n for n in intervals))


def _cut(kinds: list, size: int) -> Iterator[tuple[Any, int, int]]:
  """Cuts a cell into (kind, start, steps): whole, or step by step.

  A cell that is short or mixed goes step by step, so that a kind is compiled
  for two lengths at most and not for each that occurs.
  """
  if len(kinds) == size and len(set(kinds)) == 1:
    yield kinds[0], 0, size
    return
  for start, kind in enumerate(kinds):
    yield kind, start, 1


def _shapes(batch: Any) -> Hashable:
  leaves, tree = jax.tree.flatten(batch)
  return tree, tuple((x.shape, x.dtype.str) for x in leaves)


def count_tokens(batch: Any) -> int:
  """Counts B·T of `tokens`, or of the first array with two axes, or rows."""
  if isinstance(batch, dict) and "tokens" in batch:
    batch = batch["tokens"]
  leaves = jax.tree.leaves(batch)
  for leaf in itertools.chain((x for x in leaves if x.ndim > 1), leaves):
    return int(np.prod(leaf.shape[:2]))
  return 0


def _to_json(value: Any) -> Any:
  """Python containers, numbers, bytes and numpy values as JSON."""
  if isinstance(value, dict):
    if not all(isinstance(k, str) for k in value):
      raise ValueError(
        f"fit: the iterator's state has keys {list(value)}, expected strings."
      )
    return {k: _to_json(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_to_json(v) for v in value]
  if isinstance(value, bytes):
    return {"__bytes__": base64.b64encode(value).decode()}
  if isinstance(value, np.ndarray | np.generic):
    return {"__array__": value.tolist(), "dtype": value.dtype.str}
  if value is None or isinstance(value, bool | int | float | str):
    return value
  raise ValueError(
    f"fit: the iterator's state holds a {type(value).__name__}, expected "
    "dicts, lists, numbers, strings, bytes or numpy arrays."
  )


def _from_json(value: Any) -> Any:
  if isinstance(value, list):
    return [_from_json(v) for v in value]
  if not isinstance(value, dict):
    return value
  if "__bytes__" in value:
    return base64.b64decode(value["__bytes__"])
  if "__array__" in value:
    return np.asarray(value["__array__"], value["dtype"])
  return {k: _from_json(v) for k, v in value.items()}
