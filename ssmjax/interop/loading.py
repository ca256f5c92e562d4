"""Published checkpoints in: configuration, names and tensors to a model."""

import os
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import (
  AxisType,
  Mesh,
  NamedSharding,
  SingleDeviceSharding,
)

from ssmjax.interop.families import FORMATS
from ssmjax.interop.folders import find_folder, list_tensors, read_config
from ssmjax.interop.formats import SAME, Format, Tensor
from ssmjax.interop.naming import layers, parameter_name, parameters
from ssmjax.interop.stacking import cut, insert
from ssmjax.interop.tensor_files import read_tensors
from ssmjax.models import LanguageModel

__all__ = ["abstract_pretrained", "load_pretrained"]


def load_pretrained(
  path: str | os.PathLike,
  *,
  sharding: Any = None,
  dtype: Any = None,
) -> LanguageModel:
  """Load a published checkpoint from its folder.

  The folder is what the Hugging Face Hub gives (`snapshot_download` of
  `huggingface_hub`): `config.json` (or `params.json`) beside
  `model.safetensors` or, in shards, `model.safetensors.index.json`; where
  there is neither, `consolidated.safetensors` or `pytorch_model.bin`, the
  latter through PyTorch's weights-only reader, if it is installed: a pickle's
  code is never run. Known are

  - Mamba of the mamba_ssm package (`state-spaces/mamba-130m`), whose
    vocabulary is rounded up to a multiple of `pad_vocab_size_multiple`;
  - Mamba of transformers (`state-spaces/mamba-130m-hf`), and FalconMamba
    (`tiiuae/falcon-mamba-7b`);
  - Mamba-2 of the mamba_ssm package (`state-spaces/mamba2-130m`), of
    transformers, and as Mistral publishes it
    (`mistralai/Mamba-Codestral-7B-v0.1`, in both its forms);
  - of transformers, GPT-NeoX (`EleutherAI/pythia-160m`), RecurrentGemma
    (`google/recurrentgemma-2b`) and Mistral (`mistralai/Mistral-7B-v0.1`),
    Mistral's own form too. Their attention layers get room for `max_length`
    tokens from `init_state`;
  - RWKV-4 of transformers (`RWKV/rwkv-4-169m-pile`), of whose blocks each half
    is a layer here.

  Tensors go one by one from the file into arrays of the model's own layout on
  the devices: the host has to hold one tensor of one layer (a device's piece
  of it, if it is sharded), or, of a `.bin` that cannot be mapped, one file
  (two to compare an output matrix with the embedding in another).

  Args:
    path: the folder.
    sharding: where the parameters go: a `jax.sharding.Sharding` for all of
      them, or a function of the abstract model (as `abstract_pretrained` gives
      it) to a tree with a sharding for each; single-device and named ones.
      None: the first device.
    dtype: of activations and of the weights of projections; None for float32.
      What decides about decays and the residual stays float32: A_log, D, the
      bias of Δ, norms, the convolution, the embedding. To train with
      activations in bfloat16, make the weights float32 again:
      `jax.tree.map(lambda x: x.astype(jnp.float32), model)`.

  Returns:
    The model; `save_pretrained` is the way back.

  Raises:
    ValueError: no such folder; a file that is not whole; a configuration with
      a field missing or wrong; tensors that are missing, unused or misshapen,
      all of them by name.
    NotImplementedError: a kind of model, or a feature of it, that is not here,
      by name: biases of projections, quantised weights, an output matrix that
      is not the embedding where the configuration ties them.
    ImportError: only a `.bin` is there, and PyTorch is not installed.
  """
  plan = _plan(path, dtype)
  _check_head(plan)
  shardings = _shardings(plan.model, sharding)
  automatic = {name: _automatic(kind) for name, kind in shardings.items()}
  found: dict[str, jax.Array] = {}
  for file, names in plan.files.items():
    tensors = read_tensors(file)
    for name in names:
      if name in plan.places:
        _put(found, tensors[name], plan, plan.places[name], automatic)
    del tensors  # Before the next file is opened.
  for place in plan.absent:
    _put(found, None, plan, place, automatic)
  return jax.tree.map_with_path(
    lambda path, _: _resharded(
      found[parameter_name(path)], shardings[parameter_name(path)]
    ),
    plan.model,
  )


def abstract_pretrained(
  path: str | os.PathLike, *, dtype: Any = None
) -> LanguageModel:
  """Check a published checkpoint and show the model that it would be.

  Reads its configuration and the headers of its files, no tensor, and checks
  all of what `load_pretrained` checks but the output matrix.

  Args:
    path: as `load_pretrained` takes it.
    dtype: likewise.

  Returns:
    The model with `jax.ShapeDtypeStruct`s for arrays.

  Raises:
    ValueError: as `load_pretrained`.
    NotImplementedError: likewise.
    ImportError: likewise.
  """
  return _plan(path, dtype).model


class _Place(NamedTuple):
  """Where a tensor goes: the parameter, and the layer of its stack."""

  parameter: str
  layer: int | None
  entry: Tensor


class _Plan(NamedTuple):
  """What is to be loaded.

  Attributes:
    model: abstract.
    shapes: of the parameters, by name.
    files: what each holds.
    places: of tensors, by their names.
    absent: places of the tensors that the configuration rules out.
    head: names of the output matrix, if there is one that has to repeat the
      embedding, and of the embedding.
  """

  model: LanguageModel
  shapes: dict[str, jax.ShapeDtypeStruct]
  files: dict[pathlib.Path, list[str]]
  places: dict[str, _Place]
  absent: list[_Place]
  head: tuple[str, str] | None


def _plan(path, dtype) -> _Plan:
  folder = find_folder(path)
  fields = read_config(folder)
  format = _format(folder, fields)
  dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
  if dtype.name not in ("float32", "bfloat16", "float16"):
    raise ValueError(
      f"load_pretrained: dtype is {dtype.name}, expected float32, bfloat16 or"
      " float16."
    )
  config = format.read_config(fields, getattr(jnp, dtype.name))
  model = jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
  absent_parameters = format.absent(fields)
  places: list[_Place] = []
  absent: list[_Place] = []
  for entry in format.entries(config):
    places.append(_Place(entry.parameter, None, entry))
  if not config.tie_embeddings:
    places.append(_Place("head", None, Tensor("head", (format.head,), SAME)))
  for number, position, repeat in layers(model):
    for entry in format.entries(config, number):
      name = f"blocks.{position}.{entry.parameter}"
      called = tuple(text.format(number) for text in entry.names)
      place = _Place(name, repeat, entry._replace(names=called))
      if entry.parameter not in absent_parameters:
        places.append(place)
      elif entry.default is not None:
        absent.append(place)
  narrow = {p.parameter for p in (*places, *absent) if not p.entry.wide}
  model = jax.tree.map_with_path(
    lambda path, x: jax.ShapeDtypeStruct(
      x.shape, dtype if parameter_name(path) in narrow else x.dtype
    ),
    model,
  )
  shapes = parameters(model)
  files = list_tensors(folder)
  by_name, head = _match(folder, format, places, shapes, files)
  names = {file: list(found) for file, found in files.items()}
  return _Plan(model, shapes, names, by_name, absent, head)


def _match(folder, format, places, shapes, files):
  """Places by the names that are there, or one error with all that is wrong."""
  there = {name: x for found in files.values() for name, x in found.items()}
  by_name = {}
  missing, misshapen = [], []
  for place in places:
    name = next((n for n in place.entry.names if n in there), None)
    if name is None:
      missing.append(f"missing: {' or '.join(place.entry.names)}")
      continue
    by_name[name] = place
    shape = shapes[place.parameter].shape
    if place.layer is not None:
      shape = shape[1:]
    # As many zeros as are wanted in the memory of one.
    zeros = np.broadcast_to(np.int8(0), place.entry.shape(shape))
    shape = place.entry.layout.give(zeros).shape
    found, dtype = there[name]
    if found != shape:
      misshapen.append(f"misshapen: {name} has shape {found}, expected {shape}")
    elif not jnp.issubdtype(dtype, jnp.floating):
      misshapen.append(
        f"of another type: {name} is {dtype.name}, expected floating"
      )
  head = None
  embeddings = [n for n, p in by_name.items() if p.parameter == "embedding"]
  if format.head in there and format.head not in by_name and embeddings:
    head = (format.head, embeddings[0])
    found, expected = (there[name][0] for name in head)
    if found != expected:
      misshapen.append(
        f"misshapen: {head[0]} has shape {found}, expected {expected}, as"
        f" {head[1]}"
      )
  used = {*by_name, format.head}
  unused = [
    f"unused: {name}"
    for name in there
    if name not in used
    and not (format.ignored and re.search(format.ignored, name))
  ]
  wrong = [*missing, *misshapen, *unused]
  if wrong:
    raise ValueError(
      f"load_pretrained: the tensors in {folder} are not those of"
      f" {format.title} of its configuration:\n  " + "\n  ".join(wrong)
    )
  return by_name, head


def _check_head(plan):
  """Refuse an output matrix that is not the embedding, by its values."""
  if plan.head is None:
    return
  opened = {}
  for name in plan.head:
    file = next(f for f, names in plan.files.items() if name in names)
    opened[name] = read_tensors(file)[name]
  head, embedding = (opened[name] for name in plan.head)
  same = head.shape == embedding.shape and head.dtype == embedding.dtype
  rows = max(1, 2**24 // max(1, embedding[0].nbytes)) if same else 1
  for start in range(0, len(embedding), rows) if same else ():
    # Bit by bit, for NaN too is equal to itself.
    a, b = (
      np.ascontiguousarray(x[start : start + rows]).view(np.uint8)
      for x in (head, embedding)
    )
    if not np.array_equal(a, b):
      same = False
      break
  if not same:
    raise NotImplementedError(
      f"load_pretrained: {plan.head[0]} is not {plan.head[1]}, though the"
      " configuration ties them (tie_word_embeddings or tie_embeddings); say"
      " false there if the model was trained with two matrices."
    )


def _put(found, tensor, plan, place, shardings):
  """Put one tensor where it belongs, straight from the file."""
  shape = plan.shapes[place.parameter]
  sharding = shardings[place.parameter]
  size = shape.shape if place.layer is None else shape.shape[1:]
  if tensor is None:
    whole = place.entry.shape(size)
    view = np.broadcast_to(np.float32(place.entry.default), whole)
  else:
    view = place.entry.layout.take(tensor)
  part = sharding
  if place.layer is not None and isinstance(sharding, NamedSharding):
    part = NamedSharding(
      sharding.mesh,
      jax.P(*sharding.spec[1:]),
      memory_kind=sharding.memory_kind,
    )
  # Copied, or on a CPU the array would be the file itself.
  array = jax.make_array_from_callback(
    size,
    part,
    lambda index: cut(view, index, size, place.entry.part, shape.dtype),
  )
  if place.layer is None:
    found[place.parameter] = array
    return
  if place.parameter not in found:
    found[place.parameter] = jnp.zeros(
      shape.shape, shape.dtype, device=sharding
    )
  found[place.parameter] = insert(sharding, place.entry.part)(
    found[place.parameter], array, np.int32(place.layer)
  )
  # Or the host would read ahead, and hold what the device has yet to take.
  found[place.parameter].block_until_ready()


def _automatic(sharding):
  """The same places on a mesh of automatic axes.

  On explicit ones a layer cannot be put into a stack whose layers are divided.
  """
  if not isinstance(sharding, NamedSharding):
    return sharding
  mesh = sharding.mesh
  kinds = (AxisType.Auto,) * len(mesh.axis_names)
  return NamedSharding(
    Mesh(mesh.devices, mesh.axis_names, axis_types=kinds),
    sharding.spec,
    memory_kind=sharding.memory_kind,
  )


def _resharded(array, sharding) -> jax.Array:
  """The array as one of `sharding`, which has it in the same places."""
  return jax.make_array_from_single_device_arrays(
    array.shape, sharding, [shard.data for shard in array.addressable_shards]
  )


def _shardings(model, sharding) -> dict[str, Any]:
  """Each parameter's sharding by name."""
  if sharding is None:
    sharding = SingleDeviceSharding(jax.local_devices()[0])
  if callable(sharding):
    tree = sharding(model)
  else:
    tree = jax.tree.map(lambda _: sharding, model)
  found = parameters(tree)
  for name, shape in parameters(model).items():
    kind = found.get(name)
    if not isinstance(kind, NamedSharding | SingleDeviceSharding):
      raise ValueError(
        f"load_pretrained: the sharding of {name} is {kind!r}, expected a"
        " NamedSharding or SingleDeviceSharding. Pass one for all"
        " parameters, or a function that maps the abstract model to a tree"
        " of them."
      )
    kind.shard_shape(shape.shape)  # Refuses what does not divide.
  return found


def _format(folder, fields) -> Format:
  if "quantization_config" in fields:
    raise NotImplementedError(
      f"load_pretrained: {folder} holds quantised weights"
      " (quantization_config); take the checkpoint that they were made of."
    )
  for format in FORMATS:
    if format.matches(fields):
      return format
  raise NotImplementedError(
    f"load_pretrained: {folder} is of model_type {fields.get('model_type')!r}"
    f" and architectures {fields.get('architectures')!r}, expected"
    f" {', '.join(f.title for f in FORMATS)}."
  )
