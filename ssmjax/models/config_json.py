"""Model configurations as JSON, so that a model can be built from a file."""

import dataclasses
import types
import typing
from typing import Any, Literal

import jax.numpy as jnp

from ssmjax.models.config import ClassifierConfig, ModelConfig
from ssmjax.models.kinds import MIXERS
from ssmjax.types import Polarization

__all__ = ["config_from_json", "config_to_json"]


def config_to_json(
  config: ModelConfig | ClassifierConfig,
) -> dict[str, Any]:
  """Write a configuration as a dictionary that JSON can hold.

  Every field by its name, also where it has its default; a dtype by its name;
  the mixers as a list, each with its kind as `mixer`.

  Args:
    config: of a `LanguageModel` or a `Classifier`.

  Returns:
    What `config_from_json` makes an equal configuration of.

  Raises:
    ValueError: a mixer is of a kind that is not this library's.

  >>> config_to_json(ModelConfig(257, 64, 2))["mixers"][0]["mixer"]
  'mamba'
  """
  if not isinstance(config, ModelConfig | ClassifierConfig):
    raise ValueError(
      f"config_to_json: config is a {type(config).__name__}, expected a"
      " ModelConfig or a ClassifierConfig."
    )
  fields = _written(config)
  mixers = zip(config.mixers, fields["mixers"], strict=True)
  return fields | {
    "mixers": [{"mixer": _kind(mixer), **value} for mixer, value in mixers]
  }


def config_from_json(fields: dict[str, Any]) -> Any:
  """Make the configuration that `config_to_json` wrote.

  One with `n_classes` is a `ClassifierConfig`, others a `ModelConfig`.

  A field that is missing has its default, so that what an earlier version
  wrote can be read; one that is not known is refused, for it says something
  about the model that would be lost.

  Args:
    fields: the dictionary, as `json.loads` gives it.

  Raises:
    ValueError: a field that is not known, or missing without a default, or of
      the wrong type, each by its name, as in `mixers[0].polarization.ones`;
      and what the configurations themselves refuse.

  >>> config = ModelConfig(257, 64, 2, dtype=jnp.bfloat16)
  >>> config_from_json(config_to_json(config)) == config
  True
  """
  fields = dict(_object(fields, "the configuration", ModelConfig))
  kind = ClassifierConfig if "n_classes" in fields else ModelConfig
  if "mixers" in fields:
    mixers = fields["mixers"]
    if not isinstance(mixers, list | tuple):
      raise _refusal("mixers", mixers, "a list of objects")
    fields["mixers"] = tuple(
      _mixer(value, f"mixers[{index}]") for index, value in enumerate(mixers)
    )
  return _read(kind, fields, "")


def _kind(mixer) -> str:
  for name, kind in MIXERS.items():
    if type(mixer) is kind:
      return name
  raise ValueError(
    f"config_to_json: a mixer is a {type(mixer).__name__}, expected one of"
    f" {', '.join(kind.__name__ for kind in MIXERS.values())}."
  )


def _mixer(value, where):
  fields = dict(_object(value, where, None))
  name = fields.pop("mixer", None)
  if not isinstance(name, str) or name not in MIXERS:
    raise _refusal(f"{where}.mixer", name, f"one of {', '.join(MIXERS)}")
  return _read(MIXERS[name], fields, f"{where}.")


def _written(value):
  if dataclasses.is_dataclass(value):
    return {
      field.name: jnp.dtype(getattr(value, field.name)).name
      if field.name == "dtype"
      else _written(getattr(value, field.name))
      for field in dataclasses.fields(value)
    }
  if isinstance(value, tuple):
    return [_written(item) for item in value]
  return value


def _read(kind, fields, where):
  """A configuration of its fields; what is no JSON is there already."""
  known = {field.name: field for field in dataclasses.fields(kind)}
  unknown = [name for name in fields if name not in known]
  if unknown:
    raise ValueError(
      f"config_from_json: {where}{unknown[0]} is no field of a"
      f" {kind.__name__}, expected some of {', '.join(known)}. It may come"
      " from a later version."
    )
  hints = typing.get_type_hints(kind)
  values = {}
  for name, field in known.items():
    if name in fields:
      values[name] = _value(hints[name], fields[name], where + name)
    elif field.default is dataclasses.MISSING:
      raise ValueError(
        f"config_from_json: {where}{name} is missing, expected"
        f" {_expected(hints[name])}."
      )
  return kind(**values)


def _value(hint, value, where):
  """A value as its annotation wants it, or the error that names it."""
  if where.rpartition(".")[2] == "dtype":
    return _dtype(value, where)
  if where == "mixers":
    return value
  options = typing.get_args(hint) if _is_union(hint) else (hint,)
  for option in options:
    if option is type(None):
      fits = value is None
    elif typing.get_origin(option) is Literal:
      fits = isinstance(value, str) and value in typing.get_args(option)
    elif dataclasses.is_dataclass(option):
      if isinstance(value, dict):
        return _read(option, value, f"{where}.")
      continue
    elif option is float:
      # JSON does not tell 1.0 from 1; True is no number.
      fits = isinstance(value, int | float) and not isinstance(value, bool)
      value = float(value) if fits else value
    else:
      fits = type(value) is option
    if fits:
      return value
  raise _refusal(where, value, _expected(hint))


def _dtype(value, where):
  found = getattr(jnp, value, None) if isinstance(value, str) else None
  try:
    if found is not None and jnp.issubdtype(found, jnp.floating):
      return found
  except TypeError:
    pass
  raise _refusal(where, value, "a floating dtype's name, as float32")


def _expected(hint) -> str:
  """An annotation as an error says it."""
  if _is_union(hint):
    return " or ".join(map(_expected, typing.get_args(hint)))
  if typing.get_origin(hint) is Literal:
    return " or ".join(map(repr, typing.get_args(hint)))
  names = {type(None): "null", int: "an integer", float: "a number"}
  names |= {bool: "true or false", Polarization: "an object"}
  return names.get(hint, getattr(hint, "__name__", str(hint)))


def _is_union(hint) -> bool:
  return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _object(value, where, kind):
  if isinstance(value, dict):
    return value
  name = kind.__name__ if kind else "mixer"
  raise _refusal(where, value, f"an object, the fields of a {name}")


def _refusal(where, value, expected) -> ValueError:
  return ValueError(
    f"config_from_json: {where} is {value!r}, expected {expected}."
  )
