"""Mamba as it is published: by the mamba_ssm package and by transformers."""

import math
from collections.abc import Callable
from typing import Any

from ssmjax.interop.formats import (
  DEPTHWISE,
  LINEAR,
  SAME,
  Format,
  Tensor,
  beyond,
  flag,
  lacking,
  layer_count,
  positive_number,
  refusal,
  refuse_unknown,
  whole_number,
)
from ssmjax.models import MambaConfig, ModelConfig

__all__ = [
  "EMBEDDING",
  "FORMATS",
  "HF_EMBEDDING",
  "check_hf",
  "check_savable",
  "model_tensors",
  "native_fields",
  "native_model",
  "native_settings",
]


def _native_config(fields, dtype) -> ModelConfig:
  settings = native_settings(fields)
  layer = settings.get("layer", "Mamba1")
  if layer != "Mamba1":
    raise lacking(
      f"ssm_cfg.layer is {layer!r}", "layers other than 'Mamba1' and 'Mamba2'"
    )
  refuse_unknown(settings, _NATIVE_LAYER_FIELDS, "ssm_cfg.")
  rank = settings.get("dt_rank", "auto")
  mixer = MambaConfig(
    d_state=whole_number(settings, "d_state", 16),
    d_conv=whole_number(settings, "d_conv", 4),
    expand=whole_number(settings, "expand", 2),
    dt_rank=None if rank == "auto" else whole_number(settings, "dt_rank"),
    dtype=dtype,
  )
  return native_model(fields, mixer)


def _native_fields(config: ModelConfig, dtype: str) -> dict[str, Any]:
  del dtype
  _check_savable(config)
  mixer: Any = config.mixers[0]
  if mixer.norm_epsilon is not None:
    raise NotImplementedError(
      "save_pretrained: the native format has no norms of B, C and Δ"
      f" (norm_epsilon={mixer.norm_epsilon}). Use format='hf'."
    )
  settings = {
    "d_state": mixer.d_state,
    "d_conv": mixer.d_conv,
    "expand": mixer.expand,
    "dt_rank": _rank(config),
  }
  return native_fields(config, settings)


def _hf_config(fields, dtype) -> ModelConfig:
  check_hf(fields)
  # Older files also have d_model and n_layer, which may be stale.
  d_model = whole_number(fields, "hidden_size")
  inner = d_model * whole_number(fields, "expand", 2)
  inner = whole_number(fields, "intermediate_size", inner)
  if inner % d_model:
    raise lacking(
      f"intermediate_size is {inner}",
      f"inner width that is no multiple of hidden_size={d_model}",
    )
  rank = fields.get("time_step_rank", "auto")
  falcon = fields["model_type"] == "falcon_mamba"
  return ModelConfig(
    vocab_size=whole_number(fields, "vocab_size"),
    d_model=d_model,
    n_layers=layer_count(fields, "num_hidden_layers"),
    mixers=(
      MambaConfig(
        d_state=whole_number(fields, "state_size", 16),
        d_conv=whole_number(fields, "conv_kernel", 4),
        expand=inner // d_model,
        dt_rank=None
        if rank == "auto"
        else whole_number(fields, "time_step_rank"),
        norm_epsilon=positive_number(fields, "mixer_rms_eps", 1e-6)
        if falcon
        else None,
        dtype=dtype,
      ),
    ),
    norm_epsilon=positive_number(fields, "layer_norm_epsilon", 1e-5),
    tie_embeddings=flag(fields, "tie_word_embeddings", True),
    dtype=dtype,
  )


def _hf_fields(config: ModelConfig, dtype: str) -> dict[str, Any]:
  _check_savable(config)
  mixer: Any = config.mixers[0]
  kind = {
    "architectures": ["MambaForCausalLM"],
    "model_type": "mamba",
  }
  if mixer.norm_epsilon is not None:
    kind = {
      "architectures": ["FalconMambaForCausalLM"],
      "model_type": "falcon_mamba",
      "mixer_rms_eps": mixer.norm_epsilon,
    }
  return kind | {
    "vocab_size": config.vocab_size,
    "hidden_size": config.d_model,
    "intermediate_size": mixer.expand * config.d_model,
    "num_hidden_layers": config.n_layers,
    "state_size": mixer.d_state,
    "conv_kernel": mixer.d_conv,
    "expand": mixer.expand,
    "time_step_rank": _rank(config),
    "time_step_min": mixer.dt_min,
    "time_step_max": mixer.dt_max,
    "layer_norm_epsilon": config.norm_epsilon,
    "hidden_act": "silu",
    "use_bias": False,
    "use_conv_bias": True,
    "residual_in_fp32": True,
    "tie_word_embeddings": config.tie_embeddings,
    # What versions before 5 call it, too.
    "torch_dtype": dtype,
  }


def _check_savable(config: ModelConfig) -> None:
  sizes = ("d_state", "d_conv", "expand", "dt_rank", "norm_epsilon")
  check_savable(config, MambaConfig, "Mamba", sizes)


def native_settings(fields: dict[str, Any]) -> dict[str, Any]:
  """Check what the package's models have in common; give `ssm_cfg`."""
  refuse_unknown(fields, _NATIVE_FIELDS)
  settings = fields.get("ssm_cfg") or {}
  if not isinstance(settings, dict):
    raise refusal("ssm_cfg", settings, "an object")
  if not flag(fields, "rms_norm", True):
    raise lacking("rms_norm is false", "blocks with LayerNorm")
  if flag(settings, "bias", False):
    raise lacking("ssm_cfg.bias is true", "biases of in_proj and out_proj")
  if fields.get("attn_layer_idx"):
    raise lacking("attn_layer_idx is not empty", "attention in this format")
  if fields.get("d_intermediate", 0):
    raise lacking("d_intermediate is not 0", "a gated MLP in each block")
  return settings


def native_model(fields: dict[str, Any], mixer) -> ModelConfig:
  """Make the configuration of the package's model of such a mixer."""
  multiple = whole_number(fields, "pad_vocab_size_multiple", 8)
  vocabulary = whole_number(fields, "vocab_size")
  rows = math.ceil(vocabulary / multiple) * multiple
  return ModelConfig(
    vocab_size=rows,
    true_vocab_size=None if rows == vocabulary else vocabulary,
    d_model=whole_number(fields, "d_model"),
    n_layers=layer_count(fields, "n_layer"),
    mixers=(mixer,),
    tie_embeddings=flag(fields, "tie_embeddings", True),
    dtype=mixer.dtype,
  )


def native_fields(config: ModelConfig, settings) -> dict[str, Any]:
  """Write the package's fields of a model whose `ssm_cfg` is given."""
  if config.norm_epsilon != 1e-5:
    raise NotImplementedError(
      f"save_pretrained: norm_epsilon is {config.norm_epsilon}, and the native"
      " format has no field for it: its readers take 1e-5. Use format='hf'."
    )
  rows = config.vocab_size
  vocabulary = config.true_vocab_size or rows
  # As published ones have it, where that gives the rows that the table has.
  multiples = (
    m for m in (1, 8, 16, rows) if -vocabulary % m + vocabulary == rows
  )
  # No more than every version of the package reads: it refuses the rest.
  fields = {
    "d_model": config.d_model,
    "n_layer": config.n_layers,
    "vocab_size": vocabulary,
    "ssm_cfg": settings,
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": next(multiples),
  }
  return fields if config.tie_embeddings else fields | {"tie_embeddings": False}


def check_hf(fields: dict[str, Any]) -> None:
  """Refuse what no Mamba of transformers is read with."""
  if fields.get("hidden_act", "silu") not in ("silu", "swish"):
    raise lacking(
      f"hidden_act is {fields['hidden_act']!r}", "activations other than silu"
    )
  if flag(fields, "use_bias", False):
    raise lacking("use_bias is true", "biases of in_proj and out_proj")


def check_savable(
  config: ModelConfig, kind: type, name: str, sizes: tuple[str, ...]
) -> None:
  """Raise NotImplementedError for what a kind's formats have no words for."""
  reasons = []
  for mixer in dict.fromkeys(config.mixers):
    held = getattr(mixer, "polarization", None)
    if not isinstance(mixer, kind):
      reasons.append(f"a mixer of {type(mixer).__name__}")
    elif held and (held.ones or held.zeros):
      reasons.append(f"decays that are not learned: {held}")
  found = {
    tuple(getattr(mixer, size) for size in sizes)
    for mixer in config.mixers
    if isinstance(mixer, kind)
  }
  if len(found) > 1:
    reasons.append("layers of different sizes")
  reasons += beyond(config, "tie_embeddings")
  if reasons:
    raise NotImplementedError(
      f"save_pretrained: the published formats of {name} cannot hold "
      + "; ".join(reasons)
      + ". Keep such a model as a checkpoint of ssmjax.training."
    )


def model_tensors(
  embedding: tuple[str, ...], layer_tensors, prefix: str = ""
) -> dict[str, Any]:
  """The tables of a format whose mixers have these tensors.

  Args:
    embedding: its names there.
    layer_tensors: ours, theirs, layout, wide and default of each.
    prefix: of every name.
  """
  layer = prefix + "backbone.layers.{}."
  name = (f"{prefix}backbone.norm_f.weight",)
  return {
    "tensors": (
      Tensor("embedding", embedding, SAME, wide=True),
      Tensor("norm.scale", name, SAME, wide=True),
    ),
    "layer_tensors": (
      Tensor("norm.scale", (f"{layer}norm.weight",), SAME, wide=True),
      *(
        Tensor(f"mixer.{ours}", (f"{layer}mixer.{theirs}",), *how)
        for ours, theirs, *how in layer_tensors
      ),
    ),
  }


_LAYER_TENSORS = (
  ("in_proj", "in_proj.weight", LINEAR, False, None),
  ("conv_weight", "conv1d.weight", DEPTHWISE, True, None),
  ("conv_bias", "conv1d.bias", SAME, True, 0.0),
  ("x_proj", "x_proj.weight", LINEAR, False, None),
  ("dt_proj", "dt_proj.weight", LINEAR, False, None),
  ("dt_bias", "dt_proj.bias", SAME, True, None),
  ("A_log", "A_log", SAME, True, None),
  ("D", "D", SAME, True, None),
  ("out_proj", "out_proj.weight", LINEAR, False, None),
)
_NATIVE_LAYER_FIELDS = {
  *("layer", "d_state", "d_conv", "expand", "dt_rank", "bias", "conv_bias"),
  # Of initial values and of how it is computed.
  *("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor"),
  "use_fast_path",
}
_NATIVE_FIELDS = {
  *("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple"),
  *("ssm_cfg", "rms_norm", "d_intermediate", "attn_layer_idx"),
  # The residual is float32 here, attention is refused by its layers' numbers,
  # and the rest is about no number.
  *("residual_in_fp32", "attn_cfg", "tie_embeddings", "fused_add_norm"),
  *("torch_dtype", "dtype", "transformers_version", "_name_or_path"),
}


def _no_bias(field: str, settings: Callable[[dict], dict]):
  """The convolution's bias is absent where `field` says so."""
  return lambda fields: (
    set() if settings(fields).get(field, True) else {"mixer.conv_bias"}
  )


def _epsilon(config: ModelConfig) -> float | None:
  mixer: Any = config.mixers[0]
  return mixer.norm_epsilon


def _rank(config: ModelConfig) -> int:
  mixer: Any = config.mixers[0]
  return mixer.dt_rank or math.ceil(config.d_model / 16)


EMBEDDING = "backbone.embedding.weight"
# transformers itself reads both.
HF_EMBEDDING = ("backbone.embeddings.weight", EMBEDDING)
FORMATS = (
  Format(
    name="native",
    title="a Mamba of the mamba_ssm package",
    matches=lambda fields: "d_model" in fields and "model_type" not in fields,
    read_config=_native_config,
    mixer=MambaConfig,
    write_config=_native_fields,
    absent=_no_bias("conv_bias", lambda fields: fields.get("ssm_cfg") or {}),
    layers="n_layer",
    **model_tensors((EMBEDDING,), _LAYER_TENSORS),
  ),
  Format(
    name="hf",
    title="a MambaForCausalLM of transformers",
    matches=lambda fields: fields.get("model_type") == "mamba",
    read_config=_hf_config,
    mixer=MambaConfig,
    write_config=_hf_fields,
    absent=_no_bias("use_conv_bias", lambda fields: fields),
    holds=lambda config: _epsilon(config) is None,
    **model_tensors(HF_EMBEDDING, _LAYER_TENSORS),
  ),
  Format(
    name="hf",
    title="a FalconMambaForCausalLM of transformers",
    matches=lambda fields: fields.get("model_type") == "falcon_mamba",
    read_config=_hf_config,
    mixer=MambaConfig,
    write_config=_hf_fields,
    absent=_no_bias("use_conv_bias", lambda fields: fields),
    holds=lambda config: _epsilon(config) is not None,
    **model_tensors(HF_EMBEDDING, _LAYER_TENSORS),
  ),
)
