"""Models out of states: as shapes, from the stack of seeds, from disk."""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import optax
from flax import nnx

from ssmjax.training import files, sharding, step
from ssmjax.training.checkpoints import load_params, refuse_other
from ssmjax.types import describe_model, read_description

_MODEL = "model_config.json"


def load(
  directory: str | pathlib.Path,
  init: Callable[[int], Any] | None = None,
  *,
  seeds: tuple[int, ...] | None = None,
  at: int | Literal["latest", "best"] = "latest",
  best_mode: Literal["max", "min"] = "max",
) -> tuple[Any, ...]:
  """Loads the models of a run's checkpoint, one per seed.

  `fit` writes what its models are into the folder, `model_config.json`, where
  they can be described: a `LanguageModel` or a `Classifier` of the library's
  mixers and of registered ones (`ssmjax.models.register`), and any class that
  `ssmjax.types.register_model` knows. What registers a mixer or a model of
  your own has to be imported first. Of other models, and of a run from before
  there was this file, `init` says what they are.

  Args:
    directory: the run's folder.
    init: as given to `fit`; it is not run, only its shapes are used. None for
      the models that the folder describes.
    seeds: as given to `fit`; None for those that the folder has.
    at: a step, or "latest", or "best" by the run's `best` metric.
    best_mode: as given to `fit`.

  Returns:
    The models, on the first device; within `jax.set_mesh` on all of the mesh's.

  Raises:
    ValueError: there is no such checkpoint, or it is not whole; the folder
      does not describe its models, and there is no `init`.
  """
  folder = pathlib.Path(directory)
  if init is None:
    init = _described_init(folder)
  seeds = _seeds(folder) if seeds is None else seeds
  graphdef, abstract = abstract_state(init, optax.identity(), seeds)
  # Within `jax.set_mesh` nothing runs on other devices than the mesh's.
  mesh = sharding.context_mesh()
  device: jax.sharding.Sharding = jax.sharding.SingleDeviceSharding(
    jax.local_devices()[0]
  )
  if mesh is not None:
    device = jax.NamedSharding(mesh, jax.P())
  params = load_params(
    directory,
    with_sharding(
      abstract.params, jax.tree.map(lambda _: device, abstract.params)
    ),
    step=at,
    best_mode=best_mode,
  )
  return unstacked(graphdef, params, len(seeds))


def keep_description(
  directory: pathlib.Path, graphdef: Any, params: Any
) -> None:
  """Writes what a run's models are, or checks it against what is there.

  Args:
    directory: the run's folder.
    graphdef: structure of the models.
    params: their parameters, or shapes of them.

  Raises:
    ValueError: the folder belongs to models of another configuration, whose
      differing fields are named, or its file cannot be read.
  """
  expected = describe_model(nnx.merge(graphdef, params))
  path = directory / _MODEL
  if not path.exists():
    # Not there at the beginning of a run, and in folders older than this.
    if expected is not None:
      files.write_json(path, expected)
    return
  found = _read_description(path, "fit")
  if expected is None:
    raise ValueError(
      f"fit: {path} describes the models of this folder, and those of init have"
      " no description. Run with a model of the kind found, whose mixers are"
      " registered, or choose another folder."
    )
  expected = json.loads(json.dumps(expected))
  if found != expected:
    # What is missing there has its default, as where a later version of
    # ssmjax has more fields.
    _, model = _abstract_model(path, "fit", found)
    _, ours = _abstract_model(path, "fit", expected)
    if nnx.graphdef(model) == nnx.graphdef(ours):
      # They differ in what is not compared: where they were loaded from.
      return
    found = json.loads(json.dumps(describe_model(model)))
    refuse_other(path, found, expected)


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


def _described_init(folder: pathlib.Path) -> Callable[[int], Any]:
  """Gives what builds the models that a folder describes."""
  path = folder / _MODEL
  if not path.exists():
    raise ValueError(
      f"load: {folder} has no {_MODEL}, expected that of a run whose models can"
      " be described. Pass init=, as given to fit; a model of your own is"
      " described by ssmjax.types.register_model, a mixer by"
      " ssmjax.models.register."
    )
  found = _read_description(path, "load")
  build, _ = _abstract_model(path, "load", found)
  return lambda seed: build(rngs=nnx.Rngs(seed))


def _abstract_model(path, function, found) -> tuple[Callable[..., Any], Any]:
  """What builds a described model, and its shapes; errors name the file."""
  try:
    build = read_description(function, found)
    return build, jax.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
  except Exception as error:
    # A file from somewhere: any of its fields may be what fails.
    why = str(error).removeprefix(f"{function}: ")
    if not isinstance(error, ValueError):
      why = f"the model cannot be built, {type(error).__name__}: {why}"
    raise ValueError(f"{function}: {path}: {why}") from error


def _read_description(path: pathlib.Path, function: str) -> dict[str, Any]:
  try:
    found = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f"{function}: {path} is no JSON: {error}. Pass init= to load; for fit,"
      " delete it, and it is written anew."
    ) from error
  if not isinstance(found, dict):
    raise ValueError(
      f"{function}: {path} holds {found!r:.60}, expected an object. Pass init="
      " to load; for fit, delete it, and it is written anew."
    )
  return found


def _seeds(folder: pathlib.Path) -> tuple[int, ...]:
  """Gives the seeds of a run; (0,) where its configuration does not say."""
  try:
    found = json.loads((folder / "config.json").read_bytes())
    seeds = found["config"]["fit"]["seeds"]
  except (OSError, ValueError, RecursionError, KeyError, TypeError):
    return (0,)
  if not isinstance(seeds, list) or not all(type(s) is int for s in seeds):
    return (0,)
  return tuple(seeds) or (0,)
