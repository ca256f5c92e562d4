"""What a language model's parameters are called, and where layers are."""

from collections.abc import Iterator
from typing import Any

import jax

from ssmjax.models import LanguageModel

__all__ = ["layers", "parameter_name", "parameters"]


def parameters(model: LanguageModel) -> dict[str, Any]:
  """Give a model's arrays by name, as `blocks.0.mixer.A_log`."""
  leaves = jax.tree.leaves_with_path(model)
  return {parameter_name(path): leaf for path, leaf in leaves}


def parameter_name(path: tuple[Any, ...]) -> str:
  """Name the parameter that a path of JAX's leads to."""
  name = jax.tree_util.keystr(path, simple=True, separator=".")
  return name.removesuffix(".value")


def layers(model: LanguageModel) -> Iterator[tuple[int, int, int]]:
  """Count layers: number, position in the pattern, place in its stack."""
  for number in range(model.config.n_layers):
    repeat, position = divmod(number, len(model.config.mixers))
    yield number, position, repeat
