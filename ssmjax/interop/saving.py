"""Trained models out, in published formats."""

import json
import os
import pathlib
import shutil
import uuid
from typing import Any, Literal

import jax
import numpy as np

from ssmjax.interop.companions import (
  copy_companions,
  find_source,
  special_tokens,
)
from ssmjax.interop.families import FORMATS
from ssmjax.interop.formats import SAME, Tensor
from ssmjax.interop.naming import layers, parameters
from ssmjax.models import AttentionConfig, LanguageModel
from ssmjax.models.tensor_files import TensorSpec, write_safetensors
from ssmjax.types import check_choice

__all__ = ["save_pretrained"]


def save_pretrained(
  path: str | os.PathLike,
  model: LanguageModel,
  *,
  format: Literal["hf", "native", "mistral"] = "hf",
  dtype: Any = None,
  shard_size: int = 5 * 10**9,
  like: str | os.PathLike | None = None,
) -> None:
  """Save a model as a folder that other libraries load.

  The folder appears whole or not at all: it is written under another name
  beside its place, flushed to disk, and renamed. Tensors leave the devices one
  layer at a time.

  Args:
    path: the folder to make; one that is there has to be empty.
    model: of Mamba (FalconMamba) or Mamba-2 layers that are all alike, or a
      transformer, RecurrentGemma or RWKV-4 as `load_pretrained` gives them.
    format: `"hf"`, which `transformers.AutoModelForCausalLM.from_pretrained`
      loads; `"native"`, the names and the configuration of the mamba_ssm
      package, whose `MambaLMHeadModel` takes the file by
      `safetensors.torch.load_model`; `"mistral"`, params.json and
      consolidated.safetensors as mistral-inference reads them, of a Mamba-2
      (as Codestral is published) or a Mistral, whose `"native"` is the same.
    dtype: of every tensor in the files: float32, bfloat16 or float16; None for
      the one that each has. A checkpoint all of one dtype is saved in it as
      it was loaded: what was widened to float32 here was rounded before.
    shard_size: bytes of tensors that a file may hold; more go into several
      files with an index (but not consolidated.safetensors). One tensor is
      never divided.
    like: the folder, or the repository of the Hub, out of which the tokenizer's
      files, generation_config.json and the numbers of the tokens that begin,
      end and pad a text are taken; None for the one that the model was loaded
      from (`model.config.origin`), if any. A model made here has none of them
      unless this says where they are.

  Raises:
    ValueError: the folder is there and not empty; `like` is none; parameters
      that this process does not see whole; a format or dtype that is not
      known; a number that the dtype asked for does not reach.
    NotImplementedError: what the format cannot hold, by name: polarized
      channels, sizes or parts that its models do not have, other layers.
  """
  check_choice("save_pretrained", "format", format, ("hf", "native", "mistral"))
  if dtype is not None:
    dtype = np.dtype(dtype)
    check_choice(
      "save_pretrained", "dtype", dtype.name, ("float32", "bfloat16", "float16")
    )
  folder = pathlib.Path(path)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(
      f"save_pretrained: {folder} is there already, expected no or an empty"
      " folder. Save to another, or remove it first."
    )
  if shard_size < 1:
    raise ValueError(
      f"save_pretrained: shard_size is {shard_size}, expected bytes, 1 or more."
    )
  chosen = _chosen(model.config, format)
  name = _dtype(model) if dtype is None else dtype.name
  config = chosen.write_config(model.config, name)
  source = find_source(model.config.origin, like)
  if format == "hf":
    config |= special_tokens(source)
  specs = _specs(chosen, model, chosen.absent(config))
  if dtype is not None:
    specs = {name: _cast(name, spec, dtype) for name, spec in specs.items()}
  folder.parent.mkdir(parents=True, exist_ok=True)
  half = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
  half.mkdir()
  try:
    _write_json(half / chosen.files[0], config)
    copy_companions(source, half, generation=format == "hf")
    _write_tensors(half, chosen.files[1], specs, shard_size)
    _flush(half)
    os.replace(half, folder)
  except BaseException:
    shutil.rmtree(half, ignore_errors=True)
    raise
  _flush(folder.parent)


def _chosen(config, name):
  """The format of this name that holds layers of this kind."""
  kinds = {type(mixer) for mixer in config.mixers}
  fitting = [
    format
    for format in FORMATS
    if format.mixer in kinds and format.holds(config)
  ]
  # RecurrentGemma's holds attention too, and may begin with it.
  fitting.sort(key=lambda format: format.mixer is AttentionConfig)
  for format in fitting:
    if name in (format.name, *format.also):
      return format
  names = dict.fromkeys(f"format={format.name!r}" for format in fitting)
  raise NotImplementedError(
    f"save_pretrained: no published format that is called {name!r} is known for"
    f" layers of {' and '.join(sorted(kind.__name__ for kind in kinds))}."
    + (
      f" Use {' or '.join(names)}."
      if names
      else " Keep the model as a checkpoint of ssmjax.training."
    )
  )


def _specs(format, model, absent) -> dict[str, TensorSpec]:
  """What is to be written, by name."""
  arrays = parameters(model)
  for name, array in arrays.items():
    if not getattr(array, "is_fully_addressable", True):
      raise ValueError(
        f"save_pretrained: {name} lies on devices of several processes."
        " Gather the model on each first"
        " (jax.experimental.multihost_utils.process_allgather), and save it on"
        " one."
      )
  specs = {}
  for entry in format.entries(model.config):
    specs[entry.names[0]] = _spec(entry, arrays[entry.parameter], None)
  for number, position, repeat in layers(model):
    for entry in format.entries(model.config, number):
      if entry.parameter in absent:
        continue
      array = arrays[f"blocks.{position}.{entry.parameter}"]
      specs[entry.names[0].format(number)] = _spec(entry, array, repeat)
  tied = model.config.tie_embeddings
  if not tied or format.repeats_head:
    entry = Tensor("embedding" if tied else "head", (format.head,), SAME)
    specs[format.head] = _spec(entry, arrays[entry.parameter], None)
  return specs


def _spec(entry, array, repeat) -> TensorSpec:
  shape = array.shape if repeat is None else array.shape[1:]
  like = entry.layout.give(np.broadcast_to(np.int8(0), entry.shape(shape)))

  def get():
    part = array if repeat is None else array[repeat]
    if entry.part is not None:
      axis, start, stop = entry.part
      part = jax.lax.slice_in_dim(part, start, stop, axis=axis)
    return entry.layout.give(np.asarray(jax.device_get(part)))

  return TensorSpec(like.shape, np.dtype(array.dtype), get)


def _cast(name, spec, dtype) -> TensorSpec:
  def get():
    array = spec.get()
    with np.errstate(over="ignore"):
      cast = array.astype(dtype)
    if np.isinf(cast).sum() > np.isinf(array).sum():
      raise ValueError(
        f"save_pretrained: {name} has numbers beyond {dtype.name}, which dtype"
        " asks for. Use dtype='bfloat16', or None."
      )
    return cast

  return spec._replace(dtype=dtype, get=get)


def _dtype(model) -> str:
  """The dtype of most parameters, as the configuration names it."""
  sizes: dict[str, int] = {}
  for array in parameters(model).values():
    name = np.dtype(array.dtype).name
    sizes[name] = sizes.get(name, 0) + array.size
  return max(sizes, key=lambda name: sizes[name])


def _write_tensors(folder, whole, specs, shard_size):
  """One file, or several and the index that says which tensor is in which."""
  shards: list[dict[str, TensorSpec]] = [{}]
  filled = 0
  for name, spec in specs.items():
    if shards[-1] and filled + spec.size > shard_size:
      shards.append({})
      filled = 0
    shards[-1][name] = spec
    filled += spec.size
  if len(shards) == 1 or whole == "consolidated.safetensors":
    # Mistral's own readers know no index.
    write_safetensors(folder / whole, specs)
    return
  table: dict[str, str] = {}
  for number, shard in enumerate(shards, 1):
    file = f"model-{number:05}-of-{len(shards):05}.safetensors"
    write_safetensors(folder / file, shard)
    table.update(dict.fromkeys(shard, file))
  total = sum(spec.size for spec in specs.values())
  index = {"metadata": {"total_size": total}, "weight_map": table}
  _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: pathlib.Path, value: Any) -> None:
  with open(path, "w", encoding="utf-8") as file:
    file.write(json.dumps(value, indent=2) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _flush(folder: pathlib.Path) -> None:
  """Make what a folder lists survive a loss of power."""
  handle = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)
