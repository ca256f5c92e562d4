"""What a language model's parameters are called, and where layers are."""

from collections.abc import Iterator

from ssmjax.models import LanguageModel
from ssmjax.models.parameters import parameter_name, parameters

__all__ = ["layers", "parameter_name", "parameters"]


def layers(model: LanguageModel) -> Iterator[tuple[int, int, int]]:
  """Count layers: number, position in the pattern, place in its stack."""
  for number in range(model.config.n_layers):
    repeat, position = divmod(number, len(model.config.mixers))
    yield number, position, repeat
