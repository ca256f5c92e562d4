"""Models out of states: as shapes, from the stack of seeds, from disk."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import optax
from flax import nnx

from ssmjax.training import step
from ssmjax.training.checkpoints import load_params


def load(
  directory: str | pathlib.Path,
  init: Callable[[int], Any],
  *,
  seeds: tuple[int, ...] = (0,),
  at: int | Literal["latest", "best"] = "latest",
  best_mode: Literal["max", "min"] = "max",
) -> tuple[Any, ...]:
  """Loads the models of a run's checkpoint, one per seed.

  Args:
    directory: the run's folder.
    init: as given to `fit`; it is not run, only its shapes are used.
    seeds: as given to `fit`.
    at: a step, or "latest", or "best" by the run's `best` metric.
    best_mode: as given to `fit`.

  Raises:
    ValueError: there is no such checkpoint, or it is not whole.
  """
  graphdef, abstract = abstract_state(init, optax.identity(), seeds)
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  params = load_params(
    directory,
    with_sharding(
      abstract.params, jax.tree.map(lambda _: device, abstract.params)
    ),
    step=at,
    best_mode=best_mode,
  )
  return unstacked(graphdef, params, len(seeds))


def abstract_state(
  init: Callable[[int], Any],
  optimizer: optax.GradientTransformation,
  seeds: tuple[int, ...],
) -> tuple[Any, step.TrainState]:
  """Structure and shapes of the state, without computing it."""
  found = []

  def build():
    graphdef, state = step.init_state(init, optimizer, seeds)
    found.append(graphdef)
    return state

  state = jax.eval_shape(build)
  return found[0], state


def with_sharding(abstract: Any, shardings: Any) -> Any:
  """Gives every shape its sharding."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    abstract,
    shardings,
  )


def unstacked(graphdef: Any, params: Any, seeds: int) -> tuple[Any, ...]:
  """Builds each seed's model; its arrays are copies."""
  return tuple(nnx.merge(graphdef, tree) for tree in _unstack(params, seeds))


@functools.partial(jax.jit, static_argnums=1)
def _unstack(params, seeds: int):
  return [jax.tree.map(lambda x, i=i: x[i], params) for i in range(seeds)]
