"""What is checked where a mixer, a block or a model is called."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from ssmjax.types import Array, Float, Int, check_segment_ids, check_shapes

__all__ = ["check_call", "check_mixer", "check_state", "check_step"]


def check_mixer(
  name: str,
  x: Float[Array, "..."],
  segment_ids: Int[Array, "..."] | None,
  d_model: int,
  letters: Literal["B T", "B"] = "B T",
) -> None:
  """Raise ValueError unless a mixer's inputs fit it and each other."""
  check_shapes(
    name, {"x": (x, f"{letters} M={d_model}"),
           "segment_ids": (segment_ids, letters)}
  )  # fmt: skip
  check_segment_ids(name, segment_ids)


def check_call(
  mixer: Any,
  x: Float[Array, "B T M"],
  state: Any,
  segment_ids: Int[Array, "B T"] | None,
) -> None:
  """Raise ValueError unless a mixer's call is given what fits it."""
  name = type(mixer).__name__
  check_mixer(name, x, segment_ids, mixer.d_model)
  if state is not None:
    check_state(name, mixer, state, x.shape[0])


def check_step(
  mixer: Any,
  x: Float[Array, "B M"],
  state: Any,
  segment_ids: Int[Array, " B"] | None,
) -> None:
  """Raise ValueError unless a mixer's step is given what fits it."""
  name = f"{type(mixer).__name__}.step"
  check_mixer(name, x, segment_ids, mixer.d_model, "B")
  check_state(name, mixer, state, x.shape[0])


def check_state(
  function: str,
  mixer: Any,
  state: Any,
  batch_size: int,
  *,
  repeats: int | None = None,
  name: str = "state",
) -> None:
  """Raise ValueError unless a state is one that its mixer makes.

  It has the structure, the shapes and the dtypes of `init_state(batch_size)`,
  or of `init_state(batch_size, n)` for some n. A wider dtype of the same kind
  is taken, too (float64 where types are wide). Nothing is computed.

  Args:
    function: the public function, for the message.
    mixer: anything with `init_state`.
    state: what was found.
    batch_size: B of the other arguments.
    repeats: size of the leading axis of a stack of states; None for no stack.
    name: of the argument, for the message.
  """
  make = lambda length: jax.eval_shape(
    lambda: mixer.init_state(batch_size, length)
  )
  expected, way_out = make(None), f"Pass init_state({batch_size})"
  structure: Any = jax.tree.structure(state)
  if structure != jax.tree.structure(expected):
    raise ValueError(
      f"{function}: {name} is {_outline(state)}, expected"
      f" {_outline(expected)}. {way_out}, or the state of a call."
    )
  misfit = _misfit(state, expected, repeats)
  room = _room(make, state, repeats) if misfit else None
  if room is not None:
    # Of a mixer that keeps tokens, where the state says how many.
    misfit = _misfit(state, make(room), repeats)
    way_out = f"Pass init_state({batch_size}, {room})"
  if misfit:
    raise ValueError(
      f"{function}: {name}{misfit}. {way_out}, or the state of a call on as"
      " many rows."
    )


def _outline(state) -> str:
  """A state's type and the names of its arrays."""
  paths = jax.tree_util.tree_leaves_with_path(state)
  names = [jax.tree_util.keystr(path) or "itself" for path, _ in paths]
  if state is None:
    return "None"
  kind = type(state).__name__
  return f"a {kind} of {', '.join(names) or 'no arrays'}"


def _misfit(state, expected, repeats) -> str:
  """What is wrong with the first array of a state that does not fit, or ""."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  for (path, leaf), like in zip(leaves, jax.tree.leaves(expected), strict=True):
    shape = like.shape if repeats is None else (repeats, *like.shape)
    found, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    if found != shape or not _holds(dtype, like.dtype):
      found = f"a {type(leaf).__name__}" if dtype is None else f"{dtype}{found}"
      where = jax.tree_util.keystr(path)
      return f"{where} is {found}, expected {like.dtype}{shape}"
  return ""


def _room(make, state, repeats) -> int | None:
  """How many tokens a state has room for, by its first axis that grows.

  None for a state of one size, and for one that no length gives.
  """
  first = 0 if repeats is None else 1
  try:
    one, two = (jax.tree.leaves(make(length)) for length in (1, 2))
    for leaf, small, large in zip(
      jax.tree.leaves(state), one, two, strict=True
    ):
      sizes = getattr(leaf, "shape", ())[first:]
      for size, less, more in zip(
        sizes, small.shape, large.shape, strict=False
      ):
        if less != more:
          room = 1 + (size - less) // (more - less)
          make(room)
          return room if room > 0 else None
  except ValueError:
    # It has no room for so many, which `init_state` says.
    pass
  return None


def _holds(found, expected) -> bool:
  """Whether a dtype is the expected one, or a wider one of its kind."""
  if found is None or found == expected:
    return found is not None
  found = jnp.dtype(found)
  return found.kind == expected.kind and found.itemsize > expected.itemsize
