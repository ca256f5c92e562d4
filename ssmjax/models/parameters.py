"""What a model's parameters are called, and where they are to go."""

from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding, SingleDeviceSharding

__all__ = ["parameter_name", "parameters", "shardings_of"]


def parameters(model: nnx.Module) -> dict[str, Any]:
  """Give a model's arrays by name, as `blocks.0.mixer.A_log`."""
  leaves = jax.tree.leaves_with_path(model)
  return {parameter_name(path): leaf for path, leaf in leaves}


def parameter_name(path: tuple[Any, ...]) -> str:
  """Name the parameter that a path of JAX's leads to."""
  name = jax.tree_util.keystr(path, simple=True, separator=".")
  return name.removesuffix(".value")


def shardings_of(
  function: str, model: nnx.Module, sharding: Any
) -> dict[str, Any]:
  """Give each parameter's sharding by name.

  Args:
    function: name of the public function, for the message.
    model: abstract.
    sharding: one for all; a tree of them; a function of the abstract model to
      such a tree; None for the first device, within `jax.set_mesh` for all of
      the mesh's.

  Raises:
    ValueError: a parameter has none, or one that does not divide it.
  """
  if sharding is None:
    # Within `jax.set_mesh` nothing runs on other devices than the mesh's.
    mesh = jax.sharding.get_mesh()
    sharding = (
      SingleDeviceSharding(jax.local_devices()[0])
      if mesh.empty
      else NamedSharding(mesh, jax.P())
    )
  tree = sharding
  # A module of shardings is callable too.
  if callable(sharding) and not isinstance(sharding, nnx.Module):
    tree = sharding(model)
  if jax.tree_util.treedef_is_leaf(jax.tree.structure(tree)):
    tree = jax.tree.map(lambda _: tree, model)  # One for all.
  found = parameters(tree)
  for name, shape in parameters(model).items():
    kind = found.get(name)
    if not isinstance(kind, NamedSharding | SingleDeviceSharding):
      raise ValueError(
        f"{function}: the sharding of {name} is {kind!r}, expected a"
        " NamedSharding or SingleDeviceSharding. Pass one for all"
        " parameters, or a function that maps the abstract model to a tree"
        " of them."
      )
    kind.shard_shape(shape.shape)  # Refuses what does not divide.
  return found
