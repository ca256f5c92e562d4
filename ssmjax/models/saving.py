"""Any model to a folder and back: its configuration and its parameters."""

import contextlib
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ssmjax.models.classifier import Classifier
from ssmjax.models.config_json import config_to_json
from ssmjax.models.lm import LanguageModel
from ssmjax.models.parameters import parameter_name, parameters, shardings_of
from ssmjax.models.tensor_files import (
  TensorSpec,
  read_safetensors,
  write_safetensors,
)
from ssmjax.types import describe_model, read_description

__all__ = ["load", "save"]

_CONFIG, _TENSORS = "model_config.json", "model.safetensors"
# What a file of tensors can hold.
_DTYPES = (
  *("float64", "float32", "float16", "bfloat16", "complex64", "bool"),
  *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
)
_ACTIVATIONS = ("float32", "bfloat16", "float16")
# A configuration of a thousand mixers takes some hundred kilobytes.
_LONGEST_CONFIG = 16 * 2**20
_SHOWN = 20


def save(path: str | os.PathLike, model: nnx.Module) -> None:
  """Save a model as a folder: `model_config.json` and `model.safetensors`.

  The configuration is JSON, as `config_to_json` writes it, in a description
  that names the model's kind; a parameter is a tensor of its own name, shape
  and dtype, as `blocks.0.mixer.A_log`, whose first axis is that of the layers
  stacked there. `load` gives the same bits back.

  The folder appears whole or not at all: it is written under another name
  beside its place (`.NAME.….tmp`, which a kill may leave there), flushed to
  disk, and renamed. One that is there is never written over. To replace a
  model, save to another name and rename the two.

  The devices' arrays are gathered one at a time: the host holds one parameter,
  of all layers stacked in it, beside what was there.

  Args:
    path: the folder to make; one that is there has to be empty.
    model: a `LanguageModel` or a `Classifier` of any mixers, those of your own
      that are registered (`register`) among them, or another model that
      `ssmjax.types.register_model` knows.

  Raises:
    ValueError: the path is there and no empty folder; a model, or a mixer in
      it, that is of no known kind; a model that is not as its configuration
      builds it (a stack of seeds, a changed layer); parameters that this
      process does not see whole, or that are no numbers.
    OSError: it cannot be written, as where the disk is full; nothing is left
      of it.
  """
  folder = pathlib.Path(path)
  if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(
      f"save: {folder} is there already, expected no or an empty folder. Save"
      " to another, or rename or remove it first."
    )
  description = _description(model)
  specs = _specs(model, _built(description))
  with _whole_folder(folder) as half:
    with open(half / _CONFIG, "w", encoding="utf-8") as file:
      file.write(json.dumps(description, indent=2) + "\n")
      file.flush()
      os.fsync(file.fileno())
    write_safetensors(half / _TENSORS, specs)


def load(
  path: str | os.PathLike, *, sharding: Any = None, dtype: Any = None
) -> Any:
  """Load a model that `save` has written.

  Every tensor is checked by the headers before one is read. A tensor, or a
  device's piece of one that is divided, is on the host at a time.

  Args:
    path: the folder.
    sharding: where the parameters go: a `jax.sharding.Sharding` for all of
      them, a tree of the model's structure with one for each, or a function of
      the abstract model (with `jax.ShapeDtypeStruct`s for arrays) to such a
      tree; single-device and named ones. None: the first device, or within
      `jax.set_mesh` all of its mesh.
    dtype: of activations and of the weights of projections: float32, bfloat16
      or float16. The configuration's `dtype` and its mixers' are set to it, and
      the parameters called `…_proj` or `head` are cast, but not those that
      decays and step sizes are made of (`decay_proj`, `beta_proj`,
      `rate_proj`, a mixer's `gate_proj`). All others keep the dtype that they
      were saved in. None: nothing is changed.

  Returns:
    The model: of the same class, configuration and bits.

  Raises:
    ValueError: no such folder; a file that is missing or not whole; a
      description of a later version, of a kind that is not registered here or
      with a wrong field; tensors that are missing, unused, misshapen or of
      another type, by name.
  """
  if dtype is not None:
    dtype = jnp.dtype(dtype)
    if dtype.name not in _ACTIVATIONS:
      raise ValueError(
        f"load: dtype is {dtype.name}, expected float32, bfloat16 or float16."
      )
  folder = pathlib.Path(path)
  description = _read_description(folder)
  try:
    tensors = read_safetensors(folder / _TENSORS, "load")
  except FileNotFoundError:
    raise ValueError(
      f"load: {folder} has no {_TENSORS}. The folder of a training run is read"
      " by ssmjax.training.load; one that was copied, copy again."
    ) from None
  model = _abstract(folder, description, tensors, dtype)
  _check_tensors(folder / _TENSORS, parameters(model), tensors)
  # Each in the dtype of its file, but for projections where one is asked for.
  model = jax.tree.map_with_path(
    lambda path, x: jax.ShapeDtypeStruct(
      x.shape, _dtype(path, tensors[parameter_name(path)].dtype, dtype)
    ),
    model,
  )
  shardings = shardings_of("load", model, sharding)
  return jax.tree.map_with_path(
    lambda path, x: _read(tensors, parameter_name(path), x, shardings), model
  )


def _description(model) -> dict[str, Any]:
  found = describe_model(model)
  if found is not None:
    return found
  if type(model) in (LanguageModel, Classifier):
    config_to_json(model.config)  # Says which mixer is of no known kind.
  raise ValueError(
    f"save: model is a {type(model).__name__}, expected a LanguageModel, a"
    " Classifier or another registered model. One of your own joins by"
    " ssmjax.types.register_model; of any module, jax.tree.leaves or nnx.state"
    " has the arrays."
  )


def _built(description):
  """The abstract model of a description."""
  build = read_description("save", description)
  return jax.eval_shape(lambda: build(rngs=nnx.Rngs(0)))


def _specs(model, expected) -> dict[str, TensorSpec]:
  """What is to be written, by name; or an error of what cannot be."""
  arrays = parameters(model)
  shapes = {name: x.shape for name, x in parameters(expected).items()}
  for name in [*arrays, *shapes]:
    found = jnp.shape(arrays[name]) if name in arrays else "not there"
    wanted = shapes.get(name, "none of that name")
    if found != wanted:
      raise ValueError(
        f"save: {name} is {found}, expected {wanted}, as the model's"
        " configuration has it. Save one model, not a stack of several, whose"
        " parts are as they were built."
      )
  specs = {}
  for name, array in arrays.items():
    if not getattr(array, "is_fully_addressable", True):
      raise ValueError(
        f"save: {name} lies on devices of several processes. Gather the model"
        " on each first (jax.experimental.multihost_utils.process_allgather),"
        " and save it on one."
      )
    dtype = jnp.result_type(array)
    if dtype.name not in _DTYPES:
      raise ValueError(
        f"save: {name} is of dtype {dtype.name}, expected one of"
        f" {', '.join(_DTYPES)}. A random key is no parameter: pass it to"
        " calls."
      )
    specs[name] = TensorSpec(array.shape, np.dtype(dtype), _gather(array))
  return specs


def _gather(array):
  """What copies an array to the host when its turn has come."""

  def get():
    if not isinstance(array, jax.Array):
      return np.asarray(array)
    whole = np.empty(array.shape, array.dtype)
    for shard in array.addressable_shards:
      if shard.replica_id == 0:
        # Asked for its values, an array of JAX's keeps them on the host for as
        # long as it lives. So a copy is asked.
        own = shard.data.sharding
        copy = jax.device_put(shard.data, own, may_alias=False)
        whole[shard.index] = np.asarray(copy)
    return whole

  return get


@contextlib.contextmanager
def _whole_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder to write into, which takes its name when all is on disk."""
  half = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    half.mkdir()
    yield half
    _flush(half)
    os.replace(half, folder)
    _flush(folder.parent)
  except BaseException as error:
    shutil.rmtree(half, ignore_errors=True)
    if isinstance(error, OSError):
      raise OSError(
        error.errno,
        f"save: {folder} could not be written, and nothing of it is left:"
        f" {error.strerror}. Free the disk, or save elsewhere",
      ) from error
    raise


def _flush(folder: pathlib.Path) -> None:
  """Make what a folder lists survive a loss of power."""
  handle = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def _read_description(folder: pathlib.Path) -> dict[str, Any]:
  """The description in a folder, an object at least."""
  path = folder / _CONFIG
  try:
    with open(path, "rb") as file:
      text = file.read(_LONGEST_CONFIG + 1)
  except (FileNotFoundError, NotADirectoryError):
    what = f"has no {_CONFIG}" if folder.is_dir() else "is no folder"
    raise ValueError(
      f"load: {folder} {what}, expected one that ssmjax.models.save has"
      " written. A published checkpoint is read by"
      " ssmjax.interop.load_pretrained."
    ) from None
  if len(text) > _LONGEST_CONFIG:
    raise ValueError(
      f"load: {path} has more than {_LONGEST_CONFIG} bytes, expected a"
      " configuration."
    )
  try:
    found = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f"load: {path} is no JSON: {error}. Copy or save it again."
    ) from error
  if not isinstance(found, dict):
    raise ValueError(f"load: {path} holds no object. Copy or save it again.")
  return found


def _abstract(folder, description, tensors, dtype):
  """The model that a description tells of; an error names the file."""
  path = folder / _CONFIG
  try:
    build = read_description("load", description)
    config = description["config"]
    _check_count(config, tensors)
    if dtype is not None:
      build = read_description(
        "load", description | {"config": _with_dtype(config, dtype.name)}
      )
    return jax.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
  except Exception as error:
    # The fields of a file from somewhere: any of them may be what fails.
    why = str(error).removeprefix("load: ")
    if not isinstance(error, ValueError):
      why = f"the model cannot be built, {type(error).__name__}: {why}"
    raise ValueError(f"load: {path}: {why}") from error


def _check_count(config, tensors) -> None:
  """Refuse more mixers than tensors, before they are built one by one."""
  mixers = config.get("mixers") if isinstance(config, dict) else None
  if isinstance(mixers, list) and len(mixers) > len(tensors):
    raise ValueError(
      f"mixers has {len(mixers)} entries, expected no more than there are"
      f" tensors, {len(tensors)}."
    )


def _with_dtype(config, name: str) -> dict[str, Any]:
  """A configuration's fields with another dtype of activations."""
  if not isinstance(config, dict) or "dtype" not in config:
    raise ValueError(
      f"the configuration has no dtype to become {name}. Pass dtype=None."
    )
  mixers = config.get("mixers")
  if isinstance(mixers, list):
    config = config | {
      "mixers": [
        mixer | {"dtype": name}
        if isinstance(mixer, dict) and "dtype" in mixer
        else mixer
        for mixer in mixers
      ]
    }
  return config | {"dtype": name}


def _check_tensors(path, expected, found) -> None:
  """One error with all in which a file differs from the model."""
  wrong = [f"missing: {name}" for name in expected if name not in found]
  wrong += [f"unused: {name:.200}" for name in found if name not in expected]
  for name, tensor in found.items():
    if name not in expected:
      continue
    shape, dtype = expected[name].shape, expected[name].dtype
    if tuple(tensor.shape) != shape:
      wrong.append(
        f"misshapen: {name} has shape {tensor.shape}, expected {shape}"
      )
    elif not _like(tensor.dtype, dtype):
      wrong.append(
        f"of another type: {name} is {tensor.dtype.name}, expected"
        f" {'floating' if jnp.issubdtype(dtype, jnp.floating) else dtype.name}"
      )
    elif jax.dtypes.canonicalize_dtype(tensor.dtype) != tensor.dtype:
      wrong.append(
        f"too wide: {name} is {tensor.dtype.name}, which JAX has only with"
        " jax_enable_x64"
      )
  if wrong:
    more = len(wrong) - _SHOWN
    wrong[_SHOWN:] = [f"and {more} more"] if more > 0 else []
    raise ValueError(
      f"load: the tensors in {path} are not those of the model in {_CONFIG}"
      " beside it. The two have to be of one save.\n  " + "\n  ".join(wrong)
    )


def _like(found, expected) -> bool:
  """Whether values of one dtype can stand for another's."""
  floating = jnp.floating
  if jnp.issubdtype(expected, floating):
    return jnp.issubdtype(found, floating)
  return found == expected


def _dtype(path, found, dtype):
  """The dtype of a parameter that is `found` in the file."""
  if dtype is None or not jnp.issubdtype(found, jnp.floating):
    return found
  return dtype if _is_projection(parameter_name(path)) else found


def _is_projection(name: str) -> bool:
  """Whether a parameter is the weight of a projection, by its name.

  Not those that decays and step sizes alone are made of.
  """
  *_, place, last = ("", *name.split("."))
  if last in ("decay_proj", "beta_proj", "rate_proj"):
    return False
  if last == "gate_proj":
    return place != "mixer"
  return last.endswith("_proj") or name == "head"


def _read(tensors, name, like, shardings) -> jax.Array:
  """One parameter, a device's piece at a time, straight from the file."""
  tensor = tensors[name]

  def piece(index):
    # A NaN may be cast, without a warning. Copied in any case, or on a CPU the
    # array could be the file itself.
    with np.errstate(invalid="ignore"):
      return np.array(tensor[index], like.dtype, order="C")

  array = jax.make_array_from_callback(like.shape, shardings[name], piece)
  # Or the host would read ahead, and hold what the device has yet to take.
  return array.block_until_ready()
