"""Mistral as transformers publishes it, and as Mistral AI itself does."""

import functools
from typing import Any

from ssmjax.interop.attention import (
  check_savable,
  embedding,
  heads,
  linear,
  projections,
  rope,
)
from ssmjax.interop.formats import (
  LINEAR,
  SAME,
  Format,
  Layout,
  Tensor,
  flag,
  lacking,
  layer_count,
  positive_number,
  refusal,
  refuse_unknown,
  whole_number,
)
from ssmjax.models import AttentionConfig, ModelConfig

__all__ = ["FORMATS"]


def _hf_config(fields: dict[str, Any], dtype: Any) -> ModelConfig:
  if fields.get("hidden_act", "silu") not in ("silu", "swish"):
    raise lacking(f"hidden_act is {fields['hidden_act']!r}", "such gate")
  d_model = whole_number(fields, "hidden_size")
  theta, fraction = rope(fields, "rope_theta", "partial_rotary_factor", 1.0)
  if fraction != 1:
    # Transformers would turn all of a head whatever this says.
    raise lacking(f"partial_rotary_factor is {fraction}", "such Mistral")
  # What transformers takes for a field that is not there.
  window = _window({"sliding_window": 4096, **fields}, "sliding_window")
  kind = "full_attention" if window is None else "sliding_attention"
  layers = layer_count(fields, "num_hidden_layers")
  if fields.get("layer_types") not in (None, [kind] * layers):
    raise lacking(
      f"layer_types is {fields['layer_types']!r} with sliding_window={window}",
      "Mistral whose layers differ",
    )
  found: dict[str, Any] = heads({"num_key_value_heads": 8, **fields}, d_model)
  return _model(
    fields, dtype, d_model, layers,
    whole_number(fields, "intermediate_size"),
    positive_number(fields, "rms_norm_eps", 1e-6),
    flag(fields, "tie_word_embeddings", False),
    window=window, rope_theta=theta, **found,
  )  # fmt: skip


def _native_config(fields: dict[str, Any], dtype: Any) -> ModelConfig:
  # Every null is a part that the model has not.
  fields = {name: value for name, value in fields.items() if value is not None}
  refuse_unknown(fields, _NATIVE_FIELDS)
  if fields.get("model_type", "transformer") != "transformer":
    raise refusal("model_type", fields["model_type"], "'transformer'")
  d_model = whole_number(fields, "dim")
  if {"sliding_window", "_sliding_window"} <= fields.keys():
    raise refusal(
      "_sliding_window", fields["_sliding_window"],
      "null where sliding_window is not",
    )  # fmt: skip
  # mistral-inference takes either name.
  name = next((n for n in fields if n.endswith("sliding_window")), "")
  window = _window(fields, name)
  theta = fields.get("rope_theta", None if window is None else 10_000.0)
  if theta is None:
    # Versions of the package take 10⁴ or 10⁶.
    raise refusal(
      "rope_theta", theta,
      "a number above 0, which the config.json of the same repository has:"
      " readers do not agree on what to take without one",
    )  # fmt: skip
  found: dict[str, Any] = heads(
    fields, d_model, ("n_heads", "n_kv_heads", "head_dim")
  )
  return _model(
    fields, dtype, d_model, layer_count(fields, "n_layers"),
    whole_number(fields, "hidden_dim"),
    positive_number(fields, "norm_eps", 1e-5),
    flag(fields, "tied_embeddings", False),
    window=window, **found,
    rope_theta=positive_number(fields, "rope_theta", theta),
  )  # fmt: skip


def _model(fields, dtype, d_model, layers, hidden, epsilon, tied, **mixer):
  return ModelConfig(
    vocab_size=whole_number(fields, "vocab_size"),
    d_model=d_model,
    n_layers=layers,
    mixers=(AttentionConfig(dtype=dtype, **mixer),),
    norm_epsilon=epsilon,
    tie_embeddings=tied,
    mlp="swiglu",
    mlp_width=hidden,
    dtype=dtype,
  )


def _window(fields: dict[str, Any], name: str) -> int | None:
  value = fields.get(name)
  if isinstance(value, list):
    raise lacking(f"{name} is {value!r}", "window for each layer")
  return None if value is None else whole_number(fields, name)


def _hf_fields(config: ModelConfig, dtype: str) -> dict[str, Any]:
  mixer: Any = _checked(config)
  return {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": config.vocab_size,
    "hidden_size": config.d_model,
    "num_hidden_layers": config.n_layers,
    "num_attention_heads": mixer.num_heads,
    "num_key_value_heads": mixer.kv_heads,
    "head_dim": mixer.head_dim or config.d_model // mixer.num_heads,
    "intermediate_size": _hidden(config),
    "hidden_act": "silu",
    "rope_theta": mixer.rope_theta,
    "sliding_window": mixer.window,
    "max_position_embeddings": mixer.max_length,
    "rms_norm_eps": config.norm_epsilon,
    "attention_dropout": 0.0,
    "tie_word_embeddings": config.tie_embeddings,
    "torch_dtype": dtype,
  }


def _native_fields(config: ModelConfig, dtype: str) -> dict[str, Any]:
  del dtype
  mixer: Any = _checked(config)
  if config.tie_embeddings:
    check_savable(config, "Mistral's params.json", "", ["tie_embeddings=True"])
  fields = {
    "dim": config.d_model,
    "n_layers": config.n_layers,
    "head_dim": mixer.head_dim or config.d_model // mixer.num_heads,
    "hidden_dim": _hidden(config),
    "n_heads": mixer.num_heads,
    "n_kv_heads": mixer.kv_heads,
    "norm_eps": config.norm_epsilon,
    "vocab_size": config.vocab_size,
    "rope_theta": mixer.rope_theta,
  }
  if mixer.window is not None:
    fields["sliding_window"] = mixer.window
  return fields


def _checked(config: ModelConfig) -> Any:
  """The mixer of a model that both formats can hold."""
  mixer: Any = config.mixers[0]
  reasons = []
  if len(set(config.mixers)) > 1:
    reasons.append("layers that are not alike")
  for field, value in (
    ("positions", "rope"), ("rotary_fraction", 1.0), ("bias", False),
    ("out_bias", False),
  ):  # fmt: skip
    if getattr(mixer, field) != value:
      reasons.append(f"{field}={getattr(mixer, field)!r}")
  if config.mlp != "swiglu" or not _hidden(config):
    reasons.append(f"an MLP that is not swiglu ({config.mlp})")
  fields = "tie_embeddings mlp mlp_ratio mlp_width"
  check_savable(config, "Mistral", fields, reasons)
  return mixer


def _hidden(config: ModelConfig) -> int:
  return config.mlp_width or config.mlp_ratio * config.d_model


def _hf_table(config: ModelConfig, number: int | None) -> tuple[Tensor, ...]:
  if number is None:
    return embedding("model.embed_tokens.weight"), _norm("norm", "model.norm")
  layer = f"model.layers.{number}"
  names = (f"{layer}.self_attn.{x}_proj" for x in "qkv")
  return (
    _norm("norm", f"{layer}.input_layernorm"),
    *projections(_mixer(config), config.d_model, names),
    *linear("mixer.out_proj", f"{layer}.self_attn.o_proj"),
    _norm("mlp.norm", f"{layer}.post_attention_layernorm"),
    *linear("mlp.gate_proj", f"{layer}.mlp.gate_proj"),
    *linear("mlp.up_proj", f"{layer}.mlp.up_proj"),
    *linear("mlp.down_proj", f"{layer}.mlp.down_proj"),
  )


def _native_table(
  config: ModelConfig, number: int | None
) -> tuple[Tensor, ...]:
  if number is None:
    return embedding("tok_embeddings.weight"), _norm("norm", "norm")
  mixer = _mixer(config)
  names = (f"layers.{number}.attention.{x}" for x in ("wq", "wk", "wv"))
  layouts = (_pairs(mixer.num_heads), _pairs(mixer.kv_heads), LINEAR)
  mlp = f"layers.{number}.feed_forward"
  return (
    _norm("norm", f"layers.{number}.attention_norm"),
    *projections(mixer, config.d_model, names, layouts),
    *linear("mixer.out_proj", f"layers.{number}.attention.wo"),
    _norm("mlp.norm", f"layers.{number}.ffn_norm"),
    *linear("mlp.gate_proj", f"{mlp}.w1"),
    *linear("mlp.up_proj", f"{mlp}.w3"),
    *linear("mlp.down_proj", f"{mlp}.w2"),
  )


def _mixer(config: ModelConfig) -> Any:
  return config.mixers[0]


def _norm(parameter: str, name: str) -> Tensor:
  return Tensor(f"{parameter}.scale", (f"{name}.weight",), SAME, wide=True)


@functools.cache
def _pairs(heads: int) -> Layout:
  """Neighbours turn together there, a head's halves here; `[H·K, M]` there."""

  def take(x):
    split = x.reshape(heads, -1, 2, x.shape[-1]).swapaxes(1, 2)
    return split.reshape(x.shape).T

  def give(x):
    split = x.T.reshape(heads, 2, -1, len(x)).swapaxes(1, 2)
    return split.reshape(x.T.shape)

  return Layout(take, give)


_NATIVE_FIELDS = {
  *("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads"),
  *("norm_eps", "vocab_size", "rope_theta", "sliding_window"),
  *("_sliding_window", "tied_embeddings", "model_type"),
  # About no number.
  *("max_batch_size", "max_position_embeddings", "max_seq_len"),
}
_SHARED: dict[str, Any] = {
  "mixer": AttentionConfig,
  "holds": lambda config: config.block_norm == "rms",
  "ignored": r"rotary_emb\.inv_freq$",
}
FORMATS = (
  Format(
    name="hf",
    title="a MistralForCausalLM of transformers",
    matches=lambda fields: fields.get("model_type") == "mistral",
    read_config=_hf_config,
    write_config=_hf_fields,
    table=_hf_table,
    **_SHARED,
  ),
  Format(
    name="native",
    also=("mistral",),
    title="a Mistral of params.json",
    matches=lambda fields: {"dim", "n_heads", "hidden_dim"} <= fields.keys(),
    read_config=_native_config,
    write_config=_native_fields,
    table=_native_table,
    head="output.weight",
    layers="n_layers",
    files=("params.json", "consolidated.safetensors"),
    **_SHARED,
  ),
)
