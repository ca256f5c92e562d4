"""Fields and tensors that the published transformers have in common."""

from collections.abc import Iterable, Sequence
from typing import Any

from ssmjax.interop.formats import (
  LINEAR,
  SAME,
  Layout,
  Tensor,
  beyond,
  lacking,
  positive_number,
  refusal,
  whole_number,
)
from ssmjax.models import AttentionConfig, ModelConfig

__all__ = [
  "check_savable",
  "embedding",
  "heads",
  "layer_norm",
  "linear",
  "projections",
  "rope",
]


def embedding(name: str) -> Tensor:
  """The embedding."""
  return Tensor("embedding", (name,), SAME, wide=True)


def layer_norm(parameter: str, name: str) -> list[Tensor]:
  """A LayerNorm."""
  return [
    Tensor(f"{parameter}.{ours}", (f"{name}.{theirs}",), SAME, wide=True)
    for ours, theirs in (("scale", "weight"), ("bias", "bias"))
  ]


def linear(parameter: str, name: str, *, bias: bool = False) -> list[Tensor]:
  """A linear layer of PyTorch's: `x_proj` and `x_bias` for `x.weight`."""
  found = [Tensor(parameter, (f"{name}.weight",), LINEAR)]
  if bias:
    ours = f"{parameter.removesuffix('_proj')}_bias"
    found.append(Tensor(ours, (f"{name}.bias",), SAME, wide=True))
  return found


def projections(
  mixer: AttentionConfig,
  d_model: int,
  names: Iterable[str],
  layouts: tuple[Layout, ...] = (LINEAR, LINEAR, LINEAR),
) -> list[Tensor]:
  """Queries, keys and values, which are one parameter here."""
  width = mixer.head_dim or d_model // mixer.num_heads
  queries, keys = mixer.num_heads * width, mixer.kv_heads * width
  stops = (queries, queries + keys, queries + 2 * keys)
  found, start = [], 0
  for name, layout, stop in zip(names, layouts, stops, strict=True):
    entry = Tensor("mixer.in_proj", (f"{name}.weight",), layout)
    found.append(entry._replace(part=(1, start, stop)))
    if mixer.bias:
      entry = Tensor("mixer.in_bias", (f"{name}.bias",), SAME, wide=True)
      found.append(entry._replace(part=(0, start, stop)))
    start = stop
  return found


def rope(
  fields: dict[str, Any], theta: str, fraction: str, share: float
) -> tuple[float, float]:
  """Read the rotation's base and the part of a head that it turns.

  Args:
    fields: of config.json.
    theta: name of the base in files from before transformers 5, which puts
      both into `rope_parameters`.
    fraction: likewise, of the part.
    share: the part where nothing is said.
  """
  scaling = fields.get("rope_scaling")
  found = fields.get("rope_parameters") or {}
  for name, value in (("rope_scaling", scaling), ("rope_parameters", found)):
    if value is not None and not isinstance(value, dict):
      raise refusal(name, value, "an object")
    kind = (value or {}).get("rope_type", (value or {}).get("type", "default"))
    if kind != "default":
      raise lacking(f"{name} has the type {kind!r}", "scaling of positions")
  values = []
  for name, old, default in (
    ("rope_theta", theta, 10_000.0),
    ("partial_rotary_factor", fraction, share),
  ):
    value = found.get(name, fields.get(old, default))
    values.append(positive_number({name: value}, name, default))
  return values[0], values[1]


def heads(fields: dict[str, Any], d_model: int) -> dict[str, int | None]:
  """Read num_attention_heads, num_key_value_heads and head_dim."""
  count = whole_number(fields, "num_attention_heads")
  shared = fields.get("num_key_value_heads")
  if shared is not None:
    shared = whole_number(fields, "num_key_value_heads")
  width = fields.get("head_dim")
  if width is not None:
    width = whole_number(fields, "head_dim")
  return {
    "num_heads": count,
    "num_kv_heads": None if shared in (None, count) else shared,
    "head_dim": None if width in (None, d_model / count) else width,
  }


def check_savable(
  config: ModelConfig, title: str, fields: str, reasons: Sequence[str]
) -> None:
  """Raise NotImplementedError for what a format has no words for.

  Args:
    config: of the model.
    title: what the error calls the format.
    fields: names of the model's fields that the format has words for.
    reasons: what else it cannot hold.
  """
  reasons = [*reasons, *beyond(config, *fields.split())]
  if reasons:
    raise NotImplementedError(
      f"save_pretrained: the format of {title} cannot hold"
      f" {'; '.join(reasons)}. Keep such a model as a checkpoint of"
      " ssmjax.training."
    )
