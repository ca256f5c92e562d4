"""GPT-NeoX, and so Pythia, as transformers publishes them."""

from typing import Any, Literal

from ssmjax.interop.attention import (
  check_savable,
  embedding,
  heads,
  layer_norm,
  linear,
  rope,
)
from ssmjax.interop.formats import (
  Format,
  Layout,
  Tensor,
  flag,
  lacking,
  layer_count,
  positive_number,
  whole_number,
)
from ssmjax.models import AttentionConfig, ModelConfig

__all__ = ["FORMATS"]

# gelu_fast and gelu_new are other ways to write the tanh form.
_ACTIVATIONS: dict[str, Literal["gelu", "gelu_exact"]] = {
  "gelu": "gelu_exact",
  "gelu_pytorch_tanh": "gelu",
  "gelu_new": "gelu",
  "gelu_fast": "gelu",
}


def _config(fields: dict[str, Any], dtype: Any) -> ModelConfig:
  activation = str(fields.get("hidden_act", "gelu"))
  if activation not in _ACTIVATIONS:
    raise lacking(f"hidden_act is {activation!r}", "such activation")
  d_model = whole_number(fields, "hidden_size")
  theta, fraction = rope(fields, "rotary_emb_base", "rotary_pct", 0.25)
  # Not its fields; but the rotation there would be of head_dim channels.
  found: dict[str, Any] = heads(
    {"num_key_value_heads": None, **fields}, d_model
  )
  for name, field in (
    ("num_kv_heads", "num_key_value_heads"), ("head_dim", "head_dim")
  ):  # fmt: skip
    if found[name] is not None:
      raise lacking(f"{field} is {found[name]}", "such GPT-NeoX")
  bias = flag(fields, "attention_bias", True)
  mixer = AttentionConfig(
    **found, rope_theta=theta, rotary_fraction=fraction, bias=bias,
    out_bias=bias, dtype=dtype,
  )  # fmt: skip
  return ModelConfig(
    vocab_size=whole_number(fields, "vocab_size"),
    d_model=d_model,
    n_layers=layer_count(fields, "num_hidden_layers"),
    mixers=(mixer,),
    norm_epsilon=positive_number(fields, "layer_norm_eps", 1e-5),
    final_norm="layer",
    block_norm="layer",
    tie_embeddings=flag(fields, "tie_word_embeddings", False),
    mlp=_ACTIVATIONS[activation],
    mlp_width=whole_number(fields, "intermediate_size"),
    mlp_bias=True,
    parallel_residual=flag(fields, "use_parallel_residual", True),
    dtype=dtype,
  )


def _fields(config: ModelConfig, dtype: str) -> dict[str, Any]:
  mixer: Any = config.mixers[0]
  width = config.mlp_width or config.mlp_ratio * config.d_model
  reasons = []
  if len(set(config.mixers)) > 1:
    reasons.append("layers that are not alike")
  if mixer.num_kv_heads not in (None, mixer.num_heads):
    reasons.append(f"num_kv_heads={mixer.num_kv_heads}")
  if mixer.head_dim not in (None, config.d_model / mixer.num_heads):
    reasons.append(f"head_dim={mixer.head_dim}")
  if mixer.window is not None:
    reasons.append(f"window={mixer.window}")
  if mixer.positions != "rope":
    reasons.append(f"positions={mixer.positions!r}")
  if mixer.bias != mixer.out_bias:
    reasons.append(f"bias={mixer.bias} with out_bias={mixer.out_bias}")
  if not width or not config.mlp_bias or config.mlp in ("swiglu", "geglu"):
    reasons.append(f"a gated MLP, none, or one without biases ({config.mlp})")
  if config.final_norm != "layer":
    reasons.append(f"final_norm={config.final_norm!r}")
  check_savable(
    config, "GPT-NeoX",
    "final_norm block_norm tie_embeddings mlp mlp_ratio mlp_width mlp_bias"
    " parallel_residual", reasons,
  )  # fmt: skip
  return {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "vocab_size": config.vocab_size,
    "hidden_size": config.d_model,
    "num_hidden_layers": config.n_layers,
    "num_attention_heads": mixer.num_heads,
    "intermediate_size": width,
    "hidden_act": "gelu" if config.mlp == "gelu_exact" else "gelu_pytorch_tanh",
    "rotary_pct": mixer.rotary_fraction,
    "rotary_emb_base": mixer.rope_theta,
    "max_position_embeddings": mixer.max_length,
    "layer_norm_eps": config.norm_epsilon,
    "use_parallel_residual": config.parallel_residual,
    "attention_bias": mixer.bias,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "tie_word_embeddings": config.tie_embeddings,
    "torch_dtype": dtype,
  }


def _table(config: ModelConfig, number: int | None) -> tuple[Tensor, ...]:
  if number is None:
    norm = layer_norm("norm", "gpt_neox.final_layer_norm")
    return (embedding("gpt_neox.embed_in.weight"), *norm)
  mixer: Any = config.mixers[number % len(config.mixers)]
  layer = f"gpt_neox.layers.{number}"
  bias = mixer.bias
  joint = _by_head(mixer.num_heads)
  qkv = linear("mixer.in_proj", f"{layer}.attention.query_key_value", bias=bias)
  return (
    *layer_norm("norm", f"{layer}.input_layernorm"),
    *(entry._replace(layout=joint) for entry in qkv),
    *linear("mixer.out_proj", f"{layer}.attention.dense", bias=bias),
    *layer_norm("mlp.norm", f"{layer}.post_attention_layernorm"),
    *linear("mlp.up_proj", f"{layer}.mlp.dense_h_to_4h", bias=True),
    *linear("mlp.down_proj", f"{layer}.mlp.dense_4h_to_h", bias=True),
  )


def _by_head(heads: int) -> Layout:
  """Rows there: head, then query, key, value; columns here: these, then head.

  For a matrix, or its bias.
  """

  def take(x):
    split = x.reshape(heads, 3, -1, *x.shape[1:]).swapaxes(0, 1)
    return split.reshape(x.shape).T

  def give(x):
    split = x.T.reshape(3, heads, -1, *x.shape[:-1]).swapaxes(0, 1)
    return split.reshape(x.T.shape)

  return Layout(take, give)


FORMATS = (
  Format(
    name="hf",
    title="a GPTNeoXForCausalLM of transformers",
    matches=lambda fields: fields.get("model_type") == "gpt_neox",
    read_config=_config,
    mixer=AttentionConfig,
    write_config=_fields,
    table=_table,
    head="embed_out.weight",
    holds=lambda config: config.block_norm == "layer",
    ignored=r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",
  ),
)
