"""RecurrentGemma as transformers publishes it.

Its window is that of transformers: a token attends to `attention_window_size`
tokens, lags 0 to W - 1. Google's own code (github.com/google-deepmind/
recurrentgemma) also attends to lag W, so the two differ from there on.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from ssmjax.interop.attention import (
  check_savable,
  embedding,
  heads,
  linear,
  projections,
  rope,
)
from ssmjax.interop.formats import (
  DEPTHWISE,
  SAME,
  Format,
  Layout,
  Tensor,
  flag,
  lacking,
  layer_count,
  positive_number,
  refusal,
  whole_number,
)
from ssmjax.models import AttentionConfig, ModelConfig, RGLRUConfig

__all__ = ["FORMATS"]

_KINDS: dict[str, type] = {
  "recurrent": RGLRUConfig,
  "attention": AttentionConfig,
}
_DEFAULT = ("recurrent", "recurrent", "attention")


def _config(fields: dict[str, Any], dtype: Any) -> ModelConfig:
  activation = fields.get("hidden_activation", "gelu_pytorch_tanh")
  if activation != "gelu_pytorch_tanh":
    raise lacking(f"hidden_activation is {activation!r}", "such activation")
  if not flag(fields, "embeddings_scale_by_sqrt_dim", True):
    raise lacking(
      "embeddings_scale_by_sqrt_dim is false", "such RecurrentGemma"
    )
  d_model = whole_number(fields, "hidden_size")
  layers = layer_count(fields, "num_hidden_layers")
  hidden = whole_number(fields, "intermediate_size")
  theta, fraction = rope(fields, "rope_theta", "partial_rotary_factor", 0.5)
  found: dict[str, Any] = heads(fields, d_model)
  if found["head_dim"] is not None:
    raise lacking(f"head_dim is {found['head_dim']}", "such RecurrentGemma")
  for name in ("layer_types", "layers_block_type"):
    if name in fields:
      raise refusal(name, fields[name], "none: block_types says what they are")
  window = "attention_window_size"
  if "sliding_window" in fields:
    window = "sliding_window"  # Its other name there, which wins.
  width = fields.get("lru_width")
  kinds: dict[str, Any] = {
    "recurrent": RGLRUConfig(
      width=None if width is None else whole_number(fields, "lru_width"),
      num_blocks=found["num_heads"],
      d_conv=whole_number(fields, "conv1d_width", 4),
      dtype=dtype,
    ),
    "attention": AttentionConfig(
      **found,
      rope_theta=theta,
      rotary_fraction=fraction,
      window=whole_number(fields, window, 2048),
      bias=flag(fields, "attention_bias", False),
      out_bias=True,
      dtype=dtype,
    ),
  }
  pattern = fields.get("block_types", list(_DEFAULT))
  listed = isinstance(pattern, list) and pattern
  if not listed or any(str(name) not in kinds for name in pattern):
    raise refusal("block_types", pattern, "a list of 'recurrent', 'attention'")
  if layers % len(pattern):
    # The published 26 layers end within a pattern of three.
    pattern = (pattern * layers)[:layers]
  return ModelConfig(
    vocab_size=whole_number(fields, "vocab_size"),
    d_model=d_model,
    n_layers=layers,
    mixers=tuple(kinds[name] for name in pattern),
    norm_epsilon=positive_number(fields, "rms_norm_eps", 1e-6),
    tie_embeddings=flag(fields, "tie_word_embeddings", True),
    embedding_scale=_scale(d_model),
    logit_softcap=positive_number(fields, "logits_soft_cap", 30.0),
    mlp="geglu",
    # The field counts both gate and input.
    mlp_width=hidden // 2,
    mlp_bias=True,
    dtype=dtype,
  )


def _fields(config: ModelConfig, dtype: str) -> dict[str, Any]:
  kinds = {type(mixer): mixer for mixer in config.mixers}
  rglru: Any = kinds[RGLRUConfig]
  attention: Any = kinds.get(AttentionConfig)
  reasons = []
  if len(set(config.mixers)) > len(kinds) or not {*kinds} <= {*_KINDS.values()}:
    reasons.append("layers other than of one RG-LRU and one attention")
  held = rglru.polarization
  if held and (held.ones or held.zeros):
    reasons.append(f"channels whose decay is not learned: {held}")
  if attention is not None:
    if attention.window is None or not attention.out_bias:
      reasons.append("attention without a window, or without a bias at its end")
    if attention.num_heads != rglru.num_blocks:
      reasons.append(
        f"num_heads={attention.num_heads} with num_blocks={rglru.num_blocks}"
      )
    if attention.head_dim not in (None, config.d_model / attention.num_heads):
      reasons.append(f"head_dim={attention.head_dim}")
    if attention.positions != "rope":
      reasons.append(f"positions={attention.positions!r}")
  width = config.mlp_width or config.mlp_ratio * config.d_model
  for field, value in (
    ("mlp", "geglu"), ("mlp_bias", True),
    ("embedding_scale", _scale(config.d_model)),
  ):  # fmt: skip
    if getattr(config, field) != value:
      reasons.append(f"{field}={getattr(config, field)!r}, not {value!r}")
  if config.logit_softcap is None or not width:
    reasons.append("no MLP, or no soft cap")
  check_savable(
    config, "RecurrentGemma",
    "tie_embeddings embedding_scale logit_softcap mlp mlp_ratio mlp_width"
    " mlp_bias", reasons,
  )  # fmt: skip
  attention = attention or AttentionConfig(
    rglru.num_blocks, rotary_fraction=0.5, window=2048
  )
  names = {kind: name for name, kind in _KINDS.items()}
  return {
    "architectures": ["RecurrentGemmaForCausalLM"],
    "model_type": "recurrent_gemma",
    "vocab_size": config.vocab_size,
    "hidden_size": config.d_model,
    "intermediate_size": 2 * width,
    "num_hidden_layers": config.n_layers,
    "num_attention_heads": rglru.num_blocks,
    "num_key_value_heads": attention.kv_heads,
    "head_dim": config.d_model // rglru.num_blocks,
    "lru_width": rglru.width or config.d_model,
    "conv1d_width": rglru.d_conv,
    "block_types": [names[type(mixer)] for mixer in config.mixers],
    "attention_window_size": attention.window,
    "attention_bias": attention.bias,
    "attention_dropout": 0.0,
    "rope_theta": attention.rope_theta,
    "partial_rotary_factor": attention.rotary_fraction,
    "hidden_activation": "gelu_pytorch_tanh",
    "logits_soft_cap": config.logit_softcap,
    "rms_norm_eps": config.norm_epsilon,
    "tie_word_embeddings": config.tie_embeddings,
    "torch_dtype": dtype,
  }


def _scale(d_model: int) -> float:
  """√M as the published code keeps it, in bfloat16."""
  return float(jnp.bfloat16(math.sqrt(d_model)))


def _table(config: ModelConfig, number: int | None) -> tuple[Tensor, ...]:
  if number is None:
    norm = _norm("norm", "model.final_norm")
    return embedding("model.embed_tokens.weight"), norm
  mixer = config.mixers[number % len(config.mixers)]
  layer = f"model.layers.{number}"
  block, mlp = f"{layer}.temporal_block", f"{layer}.mlp_block"
  return (
    _norm("norm", f"{layer}.temporal_pre_norm"),
    *(
      _recurrent(mixer, config.d_model, block)
      if isinstance(mixer, RGLRUConfig)
      else _attention(mixer, config.d_model, block)
    ),
    _norm("mlp.norm", f"{layer}.channel_pre_norm"),
    *linear("mlp.gate_proj", f"{mlp}.gate_proj", bias=True),
    *linear("mlp.up_proj", f"{mlp}.up_proj", bias=True),
    *linear("mlp.down_proj", f"{mlp}.down_proj", bias=True),
  )


def _recurrent(mixer, d_model, block):
  width = mixer.width or d_model
  size = width // mixer.num_blocks
  found = []
  for place, name in enumerate(("linear_x", "linear_y")):
    for entry in linear("mixer.in_proj", f"{block}.{name}", bias=True):
      axis = 0 if entry.wide else 1
      part = (axis, place * width, (place + 1) * width)
      found.append(entry._replace(part=part))
  for place, gate in enumerate(("recurrent", "input")):
    part = (place * size, (place + 1) * size)
    for ours, theirs, axis in (
      ("gate_proj", "weight", 2), ("gate_bias", "bias", 1)
    ):  # fmt: skip
      name = f"{block}.rg_lru.{gate}_gate_{theirs}"
      found.append(
        Tensor(f"mixer.{ours}", (name,), SAME, True, None, (axis, *part))
      )
  wide = (
    ("conv_weight", "conv_1d.weight", DEPTHWISE),
    ("conv_bias", "conv_1d.bias", SAME),
    ("decay_param", "rg_lru.recurrent_param", SAME),
  )
  return (
    *found,
    *(Tensor(f"mixer.{a}", (f"{block}.{b}",), x, True) for a, b, x in wide),
    *linear("mixer.out_proj", f"{block}.linear_out", bias=True),
  )


def _attention(mixer, d_model, block):
  names = (f"{block}.{x}_proj" for x in "qkv")
  return (
    *projections(mixer, d_model, names),
    *linear("mixer.out_proj", f"{block}.o_proj", bias=True),
  )


def _norm(parameter: str, name: str) -> Tensor:
  return Tensor(f"{parameter}.scale", (f"{name}.weight",), _FROM_ONE, wide=True)


# A norm's scale there is what it has beyond 1.
_FROM_ONE = Layout(
  lambda x: x.astype(np.float32) + np.float32(1),
  lambda x: (x.astype(np.float32) - np.float32(1)).astype(x.dtype),
)
FORMATS = (
  Format(
    name="hf",
    title="a RecurrentGemmaForCausalLM of transformers",
    matches=lambda fields: fields.get("model_type") == "recurrent_gemma",
    read_config=_config,
    mixer=RGLRUConfig,
    write_config=_fields,
    table=_table,
  ),
)
