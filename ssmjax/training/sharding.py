"""Data parallelism: one mesh, one axis, one program per device.

The program of a device sees its share of the batch and whole parameters, and
sums over the mesh by `jax.lax.psum`. `jax.shard_map` lays it over the mesh;
`jax.pmap` does the same for those who come from there.

Several processes: call `jax.distributed.initialize()` first and use a folder
that all of them see. The default mesh then spans every device of every process.
Streams work unchanged (each device cuts its share out of the batch that it
makes), iterators give each process its own part of the batch, and process 0
alone writes metrics.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

Strategy = Literal["shard_map", "pmap"]

AXIS = "data"


def data_mesh(devices: Any = None) -> Mesh:
  """Makes a mesh with the one axis "data" over `devices`.

  By default over `jax.devices()`: every device of every process.
  """
  devices = np.asarray(jax.devices() if devices is None else devices)
  return Mesh(devices.reshape(-1), (AXIS,), axis_types=(AxisType.Auto,))


def state_sharding(tree: Any, mesh: Mesh) -> Any:
  """Gives every leaf of a train state its sharding: replicated.

  This one function decides how state lies on the mesh. Sharded parameters
  (FSDP) are another answer of it plus a gather in the step.
  """
  return jax.tree.map(lambda _: NamedSharding(mesh, jax.P()), tree)


def parallel(
  program: Callable[[Any, Any], tuple[Any, Any]],
  mesh: Mesh,
  strategy: Strategy = "shard_map",
) -> Callable[[Any, Any], tuple[Any, Any]]:
  """Compiles `program(state, batches) -> (state, metrics)` over a mesh.

  Args:
    program: what one device does. State and results are the same on all
      devices; `batches` holds arrays `[steps, B/devices, ...]`, or is empty.
    mesh: has an axis "data"; over any other axes the work is repeated.
    strategy: "shard_map", or "pmap", which today is a jit of a shard_map too
      and is offered for those who know it. Prefer the default: it checks
      replication (`check_vma`) and takes any mesh.

  Returns:
    The compiled function. It takes batches as `place` returns them and
    *donates* its state: the caller's state is gone after the call.
  """
  check_strategy(strategy)
  if strategy == "shard_map":
    return jax.jit(
      jax.shard_map(
        program,
        mesh=mesh,
        in_specs=(jax.P(), jax.P(None, AXIS)),
        out_specs=jax.P(),
      ),
      donate_argnums=0,
    )
  _check_plain(mesh)
  # pmap wants one argument with a device axis, and streams have no batches.
  mapped = jax.pmap(
    lambda index, state, batches: program(state, batches),
    axis_name=AXIS,
    in_axes=(0, None, 0),
    out_axes=None,
    devices=list(mesh.devices.flat),
    donate_argnums=1,
  )
  index = np.arange(mesh.size)
  return lambda state, batches: mapped(index, state, batches)


def place(batches: Any, mesh: Mesh, strategy: Strategy) -> Any:
  """Puts host batches `[steps, B, ...]` where the program wants them."""
  if strategy == "pmap":
    count = mesh.shape[AXIS]

    def split(x):
      shape = (x.shape[0], count, x.shape[1] // count, *x.shape[2:])
      return np.swapaxes(x.reshape(shape), 0, 1)

    return jax.tree.map(split, batches)
  sharding = NamedSharding(mesh, jax.P(None, AXIS))
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batches
  )


def share(batch: Any, axis: str | None, count: int) -> Any:
  """Cuts this device's part out of the whole batch, along the leading axis."""
  if axis is None or count == 1:
    return batch
  index = jax.lax.axis_index(axis)

  def cut(x):
    size = x.shape[0] // count
    return jax.lax.dynamic_slice_in_dim(x, index * size, size)

  return jax.tree.map(cut, batch)


def check_batch(batch: Any, devices: int, microbatches: int) -> None:
  """Raises unless every leaf divides among devices and microbatches."""
  sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(batch)}
  if len(sizes) != 1 or () in sizes:
    raise ValueError(
      "fit: the arrays of a batch have leading axes of sizes "
      f"{sorted(size[0] if size else 0 for size in sizes)}, expected one size."
    )
  ((size,),) = sizes
  if size % (devices * microbatches):
    raise ValueError(
      f"fit: a batch of {size} examples does not divide among {devices} "
      f"devices × {microbatches} microbatches. Take a multiple of "
      f"{devices * microbatches} (pad with examples of weight 0), or a mesh of "
      "fewer devices: fit(..., mesh=data_mesh(jax.devices()[:n]))."
    )


def context_mesh() -> Mesh | None:
  """Gives the mesh of `jax.set_mesh`, if one is set."""
  mesh = jax.sharding.get_mesh()
  return None if mesh.empty else mesh


def check_mesh(mesh: Mesh) -> None:
  """Raises unless batches can be divided over the mesh, here."""
  context = context_mesh()
  if context is not None and context != mesh:
    raise ValueError(
      f"fit: mesh is {mesh}, and within jax.set_mesh of {context}: expected "
      "the same. Leave mesh= out, or call fit outside of jax.set_mesh."
    )
  if AXIS not in mesh.axis_names:
    raise ValueError(
      f"fit: mesh has the axes {mesh.axis_names}, expected one named {AXIS!r}; "
      "data_mesh() makes one (outside of jax.set_mesh of another)."
    )


def check_strategy(strategy: str) -> None:
  """Raises unless there is such a strategy."""
  if strategy not in get_args(Strategy):
    raise ValueError(
      f"fit: strategy is {strategy!r}, expected one of {get_args(Strategy)}."
    )


def _check_plain(mesh: Mesh) -> None:
  if mesh.axis_names != (AXIS,) or jax.process_count() > 1:
    raise NotImplementedError(
      f"fit: strategy 'pmap' found mesh axes {mesh.axis_names} and "
      f"{jax.process_count()} processes, expected ('{AXIS}',) and one process; "
      "use strategy='shard_map'."
    )
