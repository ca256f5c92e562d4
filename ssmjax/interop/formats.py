"""What a published format of checkpoints is: two maps and a table.

A format maps configurations there and back, and has a table of tensors: what
each is called there, where it is here, and how the two lie to each other.
"""

import dataclasses
import reprlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ssmjax.models import ModelConfig

__all__ = [
  "DEPTHWISE",
  "LINEAR",
  "SAME",
  "Format",
  "Layout",
  "Tensor",
  "beyond",
  "flag",
  "lacking",
  "layer_count",
  "positive_number",
  "refusal",
  "refuse_unknown",
  "whole_number",
]


# A slice for each axis.
Index = tuple[slice, ...]


class Layout(NamedTuple):
  """How a published tensor lies to the parameter: two views of one another.

  Attributes:
    take: from the published tensor to the parameter of one layer.
    give: the way back.
    piece: from an index of the parameter to that of the published tensor, of
      which `give` makes a view; None where only a whole tensor can be taken.
  """

  take: Callable[[np.ndarray], np.ndarray]
  give: Callable[[np.ndarray], np.ndarray]
  piece: Callable[[Index], Index] | None = None


class Tensor(NamedTuple):
  """One line of a table.

  Attributes:
    parameter: its name here, in the model or in a block of it.
    names: its names there; the first is the one that is written.
    layout: how the two lie.
    wide: float32 whatever dtype is asked for.
    default: what a parameter without its tensor is filled with, where the
      configuration says that there is none.
    part: (axis, start, stop) where it is but that part of a layer's parameter,
      as keys are of what projects to queries, keys and values.
  """

  parameter: str
  names: tuple[str, ...]
  layout: Layout
  wide: bool = False
  default: float | None = None
  part: tuple[int, int, int] | None = None

  def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Say how large it is in a parameter of this shape."""
    if self.part is None:
      return shape
    axis, start, stop = self.part
    return (*shape[:axis], stop - start, *shape[axis + 1 :])


@dataclasses.dataclass(frozen=True)
class Format:
  """A published format.

  Attributes:
    name: as `save_pretrained` takes it.
    also: other names that it goes by there.
    title: what errors call it.
    matches: whether a configuration file is of this format.
    read_config: a configuration file's fields and the dtype of activations to
      the model's configuration.
    mixer: the kind of layer that it holds.
    write_config: the way back, given the name of the weights' dtype; refuses
      what the format cannot hold.
    tensors: of the model outside its layers.
    layer_tensors: of each layer, in which `{}` is its number.
    table: from the configuration and a layer's number, None for what is
      outside of layers, to the tensors; in place of `tensors` and
      `layer_tensors`, where sizes matter or layers are not all alike.
    head: name of the output matrix; where embeddings are tied it repeats the
      embedding, or is left out.
    repeats_head: it is written then, for readers that want every name.
    absent: from the fields, parameters of layers that have no tensor. One
      whose entry has no default is not in the model either.
    holds: whether it has words for such a model; of the formats of a name and
      a kind of layer, the first that does writes it.
    ignored: a pattern of the names of tensors that are no weights: masks and
      frequencies that old versions kept.
    layers: the field that counts layers, each of one tensor or more.
    files: what the configuration and the tensors are written to.
  """

  name: str
  title: str
  matches: Callable[[dict[str, Any]], bool]
  read_config: Callable[[dict[str, Any], Any], ModelConfig]
  mixer: type
  write_config: Callable[[ModelConfig, str], dict[str, Any]]
  tensors: tuple[Tensor, ...] = ()
  layer_tensors: tuple[Tensor, ...] = ()
  table: Callable[[ModelConfig, int | None], tuple[Tensor, ...]] | None = None
  also: tuple[str, ...] = ()
  head: str = "lm_head.weight"
  repeats_head: bool = False
  absent: Callable[[dict[str, Any]], set[str]] = lambda fields: set()
  holds: Callable[[ModelConfig], bool] = lambda config: True
  ignored: str | None = None
  layers: str = "num_hidden_layers"
  files: tuple[str, str] = ("config.json", "model.safetensors")

  def entries(
    self, config: ModelConfig, number: int | None = None
  ) -> tuple[Tensor, ...]:
    """List the tensors of a layer, or those outside of layers."""
    if self.table is not None:
      return self.table(config, number)
    return self.tensors if number is None else self.layer_tensors


# Fields of a model that formats know or that say nothing about its numbers.
_EVERY = {
  *("vocab_size", "d_model", "n_layers", "mixers", "norm_epsilon"),
  *("init", "remat", "dtype", "true_vocab_size", "origin"),
}
_NAMES = {
  "mlp_ratio": "an MLP in each block, ",
  "mlp_width": "an MLP in each block, ",
  "max_positions": "learned positions, ",
}

SAME = Layout(lambda x: x, lambda x: x, lambda index: index)
# PyTorch's linear layers hold (out, in), ours (in, out).
LINEAR = Layout(lambda x: x.T, lambda x: x.T, lambda index: index[::-1])
# [D, 1, W] there, [W, D] here.
DEPTHWISE = Layout(
  lambda x: x[:, 0].T,
  lambda x: x.T[:, None],
  lambda index: (index[1], slice(None), index[0]),
)


def beyond(config: ModelConfig, *fields: str) -> list[str]:
  """List what a model has beside the fields that a format has words for."""
  reasons = []
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if field.name not in {*_EVERY, *fields} and value != field.default:
      reasons.append(f"{_NAMES.get(field.name, '')}{field.name}={value!r}")
  return reasons


def whole_number(
  fields: dict[str, Any],
  name: str,
  default: int | None = None,
  most: int = 2**31 - 1,
) -> int:
  """Read a field that is a number of something, at least one."""
  value = fields.get(name, default)
  if type(value) is not int or not 1 <= value <= most:
    raise refusal(name, value, f"an integer, 1 to {most}")
  return value


def layer_count(fields: dict[str, Any], name: str) -> int:
  """Read how many layers there are; lists of that length are made of it."""
  return whole_number(fields, name, most=2**16)


def flag(fields: dict[str, Any], name: str, default: bool) -> bool:
  """Read a field that is true or false."""
  value = fields.get(name, default)
  if type(value) is not bool:
    raise refusal(name, value, "true or false")
  return value


def positive_number(fields: dict[str, Any], name: str, default: float) -> float:
  """Read a field that is a number, as an epsilon, above 0."""
  value = fields.get(name, default)
  # An integer of JSON may be too long for a float.
  if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
    raise refusal(name, value, "a number above 0")
  return float(value)


def refuse_unknown(fields, known: set[str], where: str = "") -> None:
  """Raise NotImplementedError for a field that nothing here reads."""
  unknown = sorted(set(fields) - known)
  if unknown:
    raise NotImplementedError(
      f"it has {where}{unknown[0]}, which is no field of such a model that is"
      " known here; it may say something about the model that would be lost."
    )


def refusal(name: str, value: Any, expected: str) -> ValueError:
  """Make the error of a field that is not what it should be.

  `load_pretrained` puts the file's name before it.
  """
  return ValueError(f"{name} is {reprlib.repr(value)}, expected {expected}.")


def lacking(found: str, what: str) -> NotImplementedError:
  """Make the error of a feature that the layers here do not have."""
  return NotImplementedError(f"{found}, and there is no {what} here.")
