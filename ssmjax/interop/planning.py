"""What is to be loaded: a checkpoint's names and shapes against a model's."""

import contextlib
import dataclasses
import functools
import pathlib
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ssmjax.interop.families import FORMATS
from ssmjax.interop.folders import (
  find_config,
  find_folder,
  list_tensors,
)
from ssmjax.interop.formats import (
  SAME,
  Format,
  Tensor,
  flag,
  lacking,
)
from ssmjax.interop.naming import layers, parameter_name, parameters
from ssmjax.interop.vocabulary import count_tokens
from ssmjax.models import LanguageModel, ModelConfig
from ssmjax.models.json_files import read_object

__all__ = ["Place", "Plan", "make_plan"]


class Place(NamedTuple):
  """Where a tensor goes: the parameter, and the layer of its stack."""

  parameter: str
  layer: int | None
  entry: Tensor


class Plan(NamedTuple):
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
  places: dict[str, Place]
  absent: list[Place]
  head: tuple[str, str] | None


def make_plan(path, revision, dtype) -> Plan:
  """Check a folder, by its configuration and its files' headers alone."""
  dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
  if dtype.name not in ("float32", "bfloat16", "float16"):
    raise ValueError(
      f"load_pretrained: dtype is {dtype.name}, expected float32, bfloat16 or"
      " float16."
    )
  folder = find_folder(path, revision)
  file = find_config(folder)
  fields = read_object(file, "load_pretrained")
  format, config = _read_config(file, fields, getattr(jnp, dtype.name))
  config = _with_tokens(config, folder)
  config = dataclasses.replace(config, origin=str(folder.absolute()))
  files = list_tensors(folder)
  model = _abstract(file, format, config, files)
  absent_parameters = format.absent(fields)
  places: list[Place] = []
  absent: list[Place] = []
  for entry in format.entries(config):
    places.append(Place(entry.parameter, None, entry))
  if not config.tie_embeddings:
    places.append(Place("head", None, Tensor("head", (format.head,), SAME)))
  for number, position, repeat in layers(model):
    for entry in format.entries(config, number):
      name = f"blocks.{position}.{entry.parameter}"
      called = tuple(text.format(number) for text in entry.names)
      place = Place(name, repeat, entry._replace(names=called))
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
  by_name, head = _match(file, format, places, shapes, files)
  names = {file: list(found) for file, found in files.items()}
  return Plan(model, shapes, names, by_name, absent, head)


def _read_config(file, fields, dtype) -> tuple[Format, ModelConfig]:
  with _named(file):
    format = _format(fields)
    return format, format.read_config(fields, dtype)


def _abstract(file, format, config, files) -> LanguageModel:
  """The model without its numbers, where its files may be of such a size."""
  with _named(file):
    _check_sizes(format, config, files)
    # Which checks what a layer's own sizes have to do with each other.
    return jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))


@contextlib.contextmanager
def _named(file):
  """Put the file's name before the errors of what it says."""
  try:
    yield
  except ValueError as error:
    raise ValueError(
      f"load_pretrained: {file}: {error} Download it again, or mend it as the"
      " model was trained."
    ) from error
  except NotImplementedError as error:
    raise NotImplementedError(
      f"load_pretrained: {file}: {error} The library that published the model"
      " loads it."
    ) from error


def _check_sizes(format, config, files):
  """Refuse sizes that the tensors come nowhere near.

  A model's structure takes time and memory with its layers, also without its
  numbers, and some of what a layer begins with is computed on the host.
  """
  tensors = sum(map(len, files.values()))
  if config.n_layers > max(tensors, 1):
    raise ValueError(
      f"{format.layers} gives {config.n_layers} layers, and its files hold"
      f" {tensors} tensors in all."
    )
  longest = max(
    (size for found in files.values() for x, _ in found.values() for size in x),
    default=0,
  )
  for part in (config, *dict.fromkeys(config.mixers)):
    for field in dataclasses.fields(part):
      size = getattr(part, field.name)
      # How far attention looks back is in no shape.
      if field.name == "window" or type(size) is not int:
        continue
      if size > max(longest, _SMALL):
        raise ValueError(
          f"it makes {field.name} of {type(part).__name__} {size}, and the"
          f" longest axis of a tensor in its files is {longest}."
        )


# Sizes up to this one are left to the comparison of shapes.
_SMALL = 2**20


@functools.lru_cache(maxsize=1024)
def _published_shape(give, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape that a tensor of a parameter's shape has there."""
  return jax.eval_shape(give, jax.ShapeDtypeStruct(shape, jnp.float32)).shape


def _with_tokens(config, folder):
  """The configuration, which knows the tokens that the tokenizer has."""
  size = count_tokens(folder)
  if config.true_vocab_size or size is None or not 0 < size < config.vocab_size:
    return config
  return dataclasses.replace(config, true_vocab_size=size)


def _match(file, format, places, shapes, files):
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
    size = place.entry.shape(shape)
    shape = _published_shape(place.entry.layout.give, size)
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
      f"load_pretrained: the tensors in {file.parent} are not those of"
      f" {format.title} of its {file.name}. The two have to be of one model,"
      " with its output matrix: no base model, classifier or adapter alone.\n  "
      + "\n  ".join(_grouped(wrong))
    )
  return by_name, head


def _grouped(lines: list[str]) -> list[str]:
  """What is wrong with every layer alike in one line: `layers.{0-63}.D`."""
  found: dict[tuple[str, ...], list[int]] = {}
  for line in lines:
    before, *rest = re.split(r"(?<=\.)(0|[1-9]\d*)(?=\.)", line, maxsplit=1)
    found.setdefault((before, *rest[1:]), []).extend(map(int, rest[:1]))
  return [_ranges(numbers).join(ends) for ends, numbers in found.items()]


def _ranges(numbers: list[int]) -> str:
  """As `{0-2, 4}`, or one alone."""
  if len(numbers) < 2:
    return "".join(map(str, numbers))
  pairs: list[list[int]] = []
  for number in sorted(numbers):
    if pairs and number == pairs[-1][-1] + 1:
      pairs[-1][1:] = [number]
    else:
      pairs.append([number])
  return f"{{{', '.join('-'.join(map(str, pair)) for pair in pairs)}}}"


def _format(fields) -> Format:
  if fields.get("quantization_config") is not None:
    raise NotImplementedError(
      "it tells of quantised weights (quantization_config). Take the checkpoint"
      " that they were made of."
    )
  if fields.get("per_layer_config"):
    raise lacking(
      f"per_layer_config is {fields['per_layer_config']!r}",
      "published model whose layers differ so",
    )
  if not flag(fields, "is_causal", True):
    raise lacking("is_causal is false", "layer that sees what comes after")
  for format in FORMATS:
    if format.matches(fields):
      return format
  titles = ", ".join(format.title for format in FORMATS)
  raise NotImplementedError(
    f"it is of model_type {fields.get('model_type')!r} and architectures"
    f" {fields.get('architectures')!r}, expected {titles}."
  )
