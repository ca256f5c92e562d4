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
  found: dict[str, Any] = {}
  for name in ("rope_parameters", "rope_scaling"):
    value = fields.get(name)
    if value is not None and not isinstance(value, dict):
      raise refusal(name, value, "an object")
    # The latter, the older name, wins there too.
    found = value or found
    kind = found.get("rope_type", found.get("type", "default"))
    if kind != "default":
      raise lacking(f"{name} has the type {kind!r}", "scaling of positions")
    if any(isinstance(inner, dict) for inner in found.values()):
      raise lacking(
        f"{name} is {value!r}", "rotation that differs from layer to layer"
      )
  values = []
  for name, old, default in (
    ("rope_theta", theta, 10_000.0),
    ("partial_rotary_factor", fraction, share),
  ):
    value = positive_number(
      {name: found.get(name, fields.get(old, default))}, name, default
    )
    # Written beside its older name, it is the same, or one of them is lost.
    if fields.get(name) not in (None, value):
      raise refusal(
        name, fields[name], f"{value}, as rope_parameters or {old} has it"
      )
    values.append(value)
  return values[0], values[1]


def heads(
  fields: dict[str, Any],
  d_model: int,
  names: tuple[str, str, str] = (
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
  ),
) -> dict[str, int | None]:
  """Read how many heads there are, how many of keys, and how wide one is."""
  count = whole_number(fields, names[0])
  shared, width = (
    None if fields.get(name) is None else whole_number(fields, name)
    for name in names[1:]
  )
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
