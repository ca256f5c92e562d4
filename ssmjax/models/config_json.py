"""Model configurations as JSON, so that a model can be built from a file."""

import dataclasses
import typing
from typing import Any

import jax.numpy as jnp
import numpy as np

from ssmjax.models.config import ClassifierConfig, ModelConfig
from ssmjax.models.kinds import MIXERS, kind_of, kinds
from ssmjax.types import FloatingDType, check_value, field_annotations

__all__ = [
  "config_from_json",
  "config_to_json",
  "describe_config",
  "read_config",
]


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
    ValueError: a mixer is of a kind that is neither this library's nor
      registered, or a field holds what does not come back from JSON.

  >>> config_to_json(ModelConfig(257, 64, 2))["mixers"][0]["mixer"]
  'mamba'
  """
  if not isinstance(config, ModelConfig | ClassifierConfig):
    raise ValueError(
      f"config_to_json: config is a {type(config).__name__}, expected a"
      " ModelConfig or a ClassifierConfig."
    )
  names = [_kind(mixer) for mixer in config.mixers]
  fields = _written(config, "")
  mixers = zip(names, fields["mixers"], strict=True)
  fields["mixers"] = [{"mixer": name, **value} for name, value in mixers]
  for index, (name, mixer) in enumerate(zip(names, config.mixers, strict=True)):
    if name not in MIXERS:
      _check_read(mixer, fields["mixers"][index], f"mixers[{index}]")
  return fields


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


def describe_config(
  config: ModelConfig | ClassifierConfig,
) -> dict[str, Any] | None:
  """As `config_to_json`, but None where a mixer's kind is not registered."""
  if not all(map(kind_of, config.mixers)):
    return None
  return config_to_json(config)


def read_config(fields: dict[str, Any], kind: type) -> Any:
  """As `config_from_json`, of one class alone."""
  config = config_from_json(fields)
  if type(config) is not kind:
    raise ValueError(
      f"config_from_json: the fields are those of a {type(config).__name__},"
      f" expected a {kind.__name__}."
    )
  return config


def _kind(mixer) -> str:
  name = kind_of(mixer)
  if name is None:
    raise ValueError(
      f"config_to_json: a mixer is a {type(mixer).__name__}, expected one of"
      f" {', '.join(kind.__name__ for kind in kinds().values())}. A mixer of"
      " your own joins by ssmjax.models.register."
    )
  return name


def _check_read(mixer, fields, where):
  """Raise ValueError unless a registered mixer comes back from its fields."""
  try:
    again = _mixer(fields, where)
  except ValueError as error:
    raise ValueError(
      f"config_to_json: {where}, a {type(mixer).__name__}, cannot be read"
      f" again: {error} Annotate fields as int, float, bool, str, None,"
      " Literal, tuples of these, Polarization or other dataclasses."
    ) from error
  if again != mixer:
    raise ValueError(
      f"config_to_json: {where} is {mixer}, and {again} when it is read again,"
      " expected the same."
    )


def _mixer(value, where):
  fields = dict(_object(value, where, None))
  name = fields.pop("mixer", None)
  known = kinds()
  if not isinstance(name, str) or name not in known:
    raise _refusal(
      f"{where}.mixer",
      name,
      f"one of {', '.join(known)}",
      " A mixer of your own is known once the module that registers it"
      " (ssmjax.models.register) is imported.",
    )
  return _read(known[name], fields, f"{where}.")


def _written(value, where):
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    start = f"{where}." if where else ""
    return {
      field.name: jnp.dtype(getattr(value, field.name)).name
      if field.name == "dtype"
      else _written(getattr(value, field.name), start + field.name)
      for field in dataclasses.fields(value)
    }
  if isinstance(value, tuple):
    return [_written(v, f"{where}[{i}]") for i, v in enumerate(value)]
  if isinstance(value, np.bool_ | np.integer | np.floating):
    return value.item()
  if value is None or isinstance(value, bool | int | float | str):
    return value
  raise ValueError(
    f"config_to_json: {where} is {value!r}, expected a number, a string, true,"
    " false, None, a tuple or a dataclass of these, or a dtype in a field of"
    " that name."
  )


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
  hints = field_annotations(kind)
  values = {}
  for name, field in known.items():
    if name in fields:
      values[name] = _value(hints[name], fields[name], where + name)
    elif field.default is field.default_factory is dataclasses.MISSING:
      raise ValueError(
        f"config_from_json: {where}{name} is missing, a {kind.__name__} has no"
        " default for it."
      )
  return kind(**values)


def _value(hint, value, where):
  """A value as its annotation wants it, or the error that names it."""
  if where == "mixers":
    return value
  options = typing.get_args(hint) or (hint,)
  for option in (hint, *options):
    if isinstance(value, dict) and dataclasses.is_dataclass(option):
      return _read(option, value, f"{where}.")
    if isinstance(value, list) and tuple in (option, typing.get_origin(option)):
      return _tuple(typing.get_args(option), value, where)
  if hint is Any and isinstance(value, list):
    return _tuple((), value, where)
  if hint is Any and where.rpartition(".")[2] == "dtype":
    # Of a user's configuration that does not check its fields: as most write
    # it, for jnp.float32 and a NumPy dtype are equal and their hashes are not.
    dtype = check_value(f"config_from_json: {where}", FloatingDType, value)
    return getattr(jnp, dtype.name, dtype)
  return check_value(f"config_from_json: {where}", hint, value)


def _tuple(hints, values, where):
  """A list as the tuple that its annotation wants."""
  if not hints:
    hints = (Any, ...)
  if len(hints) == 2 and hints[1] is ...:
    hints = hints[:1] * len(values)
  if len(hints) != len(values):
    raise _refusal(where, values, f"a list of {len(hints)}")
  pairs = enumerate(zip(hints, values, strict=True))
  return tuple(_value(hint, v, f"{where}[{i}]") for i, (hint, v) in pairs)


def _object(value, where, kind):
  if isinstance(value, dict):
    return value
  name = kind.__name__ if kind else "mixer"
  raise _refusal(where, value, f"an object, the fields of a {name}")


def _refusal(where, value, expected, way="") -> ValueError:
  return ValueError(
    f"config_from_json: {where} is {value!r}, expected {expected}.{way}"
  )
