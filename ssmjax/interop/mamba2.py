"""Mamba-2 as it is published: mamba_ssm, transformers, and Mistral."""

import math
from collections.abc import Callable
from typing import Any, Literal

from ssmjax.interop.formats import (
  DEPTHWISE,
  LINEAR,
  SAME,
  Format,
  flag,
  layer_count,
  positive_number,
  refusal,
  refuse_unknown,
  whole_number,
)
from ssmjax.interop.mamba import (
  EMBEDDING,
  HF_EMBEDDING,
  check_hf,
  check_savable,
  model_tensors,
  native_fields,
  native_model,
  native_settings,
)
from ssmjax.models import Mamba2Config, ModelConfig

__all__ = ["FORMATS"]


def _native_config(fields, dtype) -> ModelConfig:
  settings = native_settings(fields)
  refuse_unknown(settings, _NATIVE_LAYER_FIELDS, "ssm_cfg.")
  norm: Literal["after_gate", "before_gate", "none"] = "after_gate"
  if flag(settings, "norm_before_gate", False):
    norm = "before_gate"
  least, greatest = _limits(settings, "dt_limit")
  size = settings.get("d_ssm")
  mixer = Mamba2Config(
    d_state=whole_number(settings, "d_state", 128),
    d_conv=whole_number(settings, "d_conv", 4),
    expand=whole_number(settings, "expand", 2),
    head_dim=whole_number(settings, "headdim", 64),
    d_ssm=None if size is None else whole_number(settings, "d_ssm"),
    n_groups=whole_number(settings, "ngroups", 1),
    dt_least=least,
    dt_greatest=greatest,
    norm=norm if flag(settings, "rmsnorm", True) else "none",
    skip_per_channel=flag(settings, "D_has_hdim", False),
    dtype=dtype,
  )
  return native_model(fields, mixer)


def _native_fields(config: ModelConfig, dtype: str) -> dict[str, Any]:
  del dtype
  _check_savable(config)
  mixer: Any = config.mixers[0]
  if mixer.norm != "none" and mixer.norm_epsilon != 1e-5:
    raise NotImplementedError(
      f"save_pretrained: norm_epsilon of Mamba2Config is {mixer.norm_epsilon},"
      " and the native format has no field for it: its readers take 1e-5."
    )
  settings = {
    "layer": "Mamba2",
    "d_state": mixer.d_state,
    "d_conv": mixer.d_conv,
    "expand": mixer.expand,
    "headdim": mixer.head_dim,
    "d_ssm": mixer.d_ssm,
    "ngroups": mixer.n_groups,
    "D_has_hdim": mixer.skip_per_channel,
    "rmsnorm": mixer.norm != "none",
    "norm_before_gate": mixer.norm == "before_gate",
  }
  # JSON has no infinity: without limits there is no such field.
  if mixer.dt_limits != (0.0, math.inf):
    settings["dt_limit"] = list(mixer.dt_limits)
  return native_fields(config, settings)


def _hf_config(fields, dtype) -> ModelConfig:
  # Older files say norm_before_gate too, and were never read so.
  check_hf(fields)
  d_model = whole_number(fields, "hidden_size", 4096)
  expand = whole_number(fields, "expand", 2)
  heads = whole_number(fields, "num_heads", 128)
  head_dim = whole_number(fields, "head_dim", 64)
  if heads * head_dim != expand * d_model:
    raise refusal(
      "num_heads", heads,
      f"expand * hidden_size / head_dim = {expand * d_model / head_dim:g}",
    )  # fmt: skip
  least, greatest = _limits(fields, "time_step_limit")
  epsilon = positive_number(fields, "layer_norm_epsilon", 1e-5)
  mixer = Mamba2Config(
    d_state=whole_number(fields, "state_size", 128),
    d_conv=whole_number(fields, "conv_kernel", 4),
    expand=expand,
    head_dim=head_dim,
    n_groups=whole_number(fields, "n_groups", 8),
    dt_least=least,
    dt_greatest=greatest,
    norm_epsilon=epsilon,
    dtype=dtype,
  )
  return ModelConfig(
    vocab_size=whole_number(fields, "vocab_size"),
    d_model=d_model,
    n_layers=layer_count(fields, "num_hidden_layers"),
    mixers=(mixer,),
    norm_epsilon=epsilon,
    tie_embeddings=flag(fields, "tie_word_embeddings", False),
    dtype=dtype,
  )


def _hf_fields(config: ModelConfig, dtype: str) -> dict[str, Any]:
  _check_savable(config)
  mixer: Any = config.mixers[0]
  inner = mixer.expand * config.d_model
  reasons = []
  if mixer.d_ssm not in (None, inner):
    reasons.append(f"heads on a part of the channels (d_ssm={mixer.d_ssm})")
  if mixer.norm != "after_gate":
    reasons.append(f"norm={mixer.norm!r}")
  if mixer.skip_per_channel:
    reasons.append("a skip for each channel (skip_per_channel)")
  if mixer.norm_epsilon != config.norm_epsilon:
    reasons.append(
      f"norms with epsilons {config.norm_epsilon} and {mixer.norm_epsilon}"
    )
  if reasons:
    raise NotImplementedError(
      "save_pretrained: transformers' Mamba-2 cannot hold "
      + "; ".join(reasons)
      + ". Use format='native'."
    )
  fields = {
    "architectures": ["Mamba2ForCausalLM"],
    "model_type": "mamba2",
    "vocab_size": config.vocab_size,
    "hidden_size": config.d_model,
    "num_hidden_layers": config.n_layers,
    "num_heads": inner // mixer.head_dim,
    "head_dim": mixer.head_dim,
    "n_groups": mixer.n_groups,
    "state_size": mixer.d_state,
    "conv_kernel": mixer.d_conv,
    "expand": mixer.expand,
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
  if mixer.dt_limits != (0.0, math.inf):
    # Version 5's word for infinity; a list of numbers is everyone's.
    fields["time_step_limit"] = [
      {"__float__": "Infinity"} if limit == math.inf else limit
      for limit in mixer.dt_limits
    ]
  return fields


def _mistral_config(fields, dtype) -> ModelConfig:
  refuse_unknown(fields, _MISTRAL_FIELDS)
  return _native_config(
    {
      "d_model": whole_number(fields, "dim"),
      "n_layer": layer_count(fields, "n_layers"),
      "ssm_cfg": {"ngroups": whole_number(fields, "n_groups")},
      **{name: fields[name] for name in _MISTRAL_SHARED & fields.keys()},
    },
    dtype,
  )


def _mistral_fields(config: ModelConfig, dtype: str) -> dict[str, Any]:
  fields = _native_fields(config, dtype)
  mixer: Any = config.mixers[0]
  # Of a layer it says the groups alone, and its readers take these defaults.
  whole = mixer.d_ssm in (None, mixer.expand * config.d_model)
  reasons = [
    f"{size}={getattr(mixer, size)!r}"
    for size in _SIZES
    if size != "n_groups"
    and not (size == "d_ssm" and whole)
    and getattr(mixer, size) != getattr(Mamba2Config(), size)
  ]
  if reasons:
    raise NotImplementedError(
      "save_pretrained: Mistral's own form of a Mamba-2 cannot hold"
      f" {'; '.join(reasons)}. Use format='native'."
    )
  return {
    "dim": config.d_model,
    "n_layers": config.n_layers,
    **{name: fields[name] for name in _MISTRAL_SHARED & fields.keys()},
    "n_groups": mixer.n_groups,
    # Its readers want this, too, where the package has a default.
    "tie_embeddings": config.tie_embeddings,
    "model_type": "mamba",
  }


def _check_savable(config: ModelConfig) -> None:
  check_savable(config, Mamba2Config, "Mamba-2", _SIZES)


def _limits(fields, name) -> tuple[float, float | None]:
  """The least Δ and the greatest; None for no such limit."""
  value = fields.get(name, (0.0, math.inf))
  if isinstance(value, list | tuple) and len(value) == 2:
    # Version 5 of transformers writes infinity so, others as no JSON has it.
    least, greatest = (
      math.inf if x == {"__float__": "Infinity"} else x for x in value
    )
    numbers = all(type(x) in (int, float) for x in (least, greatest))
    if numbers and 0 <= least <= greatest and least < math.inf:
      return float(least), None if greatest == math.inf else float(greatest)
  raise refusal(name, value, "two numbers, the least and the greatest Δ")


def _absent(settings: Callable[[dict], dict]):
  """What has no tensor where the layer's settings say so."""

  def absent(fields):
    found = settings(fields)
    gone = set()
    if not found.get("use_conv_bias", found.get("conv_bias", True)):
      gone.add("mixer.conv.bias")
    if not found.get("rmsnorm", True):
      gone.add("mixer.norm_scale")
    return gone

  return absent


# What is only about initial values, or how it is computed, may differ.
_SIZES = (
  *("d_state", "d_conv", "expand", "head_dim", "d_ssm", "n_groups"),
  *("dt_least", "dt_greatest", "norm", "norm_epsilon", "skip_per_channel"),
)
_LAYER_TENSORS = (
  ("in_proj", "in_proj.weight", LINEAR, False, None),
  ("conv.weight", "conv1d.weight", DEPTHWISE, True, None),
  ("conv.bias", "conv1d.bias", SAME, True, 0.0),
  ("dt_bias", "dt_bias", SAME, True, None),
  ("A_log", "A_log", SAME, True, None),
  ("D", "D", SAME, True, None),
  ("norm_scale", "norm.weight", SAME, True, None),
  ("out_proj", "out_proj.weight", LINEAR, False, None),
)
_NATIVE_LAYER_FIELDS = {
  *("layer", "d_state", "d_conv", "expand", "headdim", "d_ssm", "ngroups"),
  *("D_has_hdim", "rmsnorm", "norm_before_gate", "dt_limit"),
  *("bias", "conv_bias"),
  # Of initial values and of how it is computed.
  *("conv_init", "A_init_range", "dt_min", "dt_max", "dt_init_floor"),
  *("chunk_size", "use_mem_eff_path", "sequence_parallel"),
}
_MISTRAL_SHARED = {
  *("vocab_size", "rms_norm", "residual_in_fp32", "fused_add_norm"),
  *("pad_vocab_size_multiple", "tie_embeddings"),
}
_MISTRAL_FIELDS = {
  *("dim", "n_layers", "n_groups", "model_type"),
  *_MISTRAL_SHARED,
}
_NATIVE = Format(
  name="native",
  title="a Mamba-2 of the mamba_ssm package",
  matches=lambda fields: (
    "d_model" in fields
    and "model_type" not in fields
    and isinstance(fields.get("ssm_cfg"), dict)
    and fields["ssm_cfg"].get("layer") == "Mamba2"
  ),
  read_config=_native_config,
  mixer=Mamba2Config,
  write_config=_native_fields,
  absent=_absent(lambda fields: fields.get("ssm_cfg") or {}),
  layers="n_layer",
  **model_tensors((EMBEDDING,), _LAYER_TENSORS),
)
FORMATS = (
  _NATIVE,
  Format(
    name="hf",
    title="a Mamba2ForCausalLM of transformers",
    matches=lambda fields: fields.get("model_type") == "mamba2",
    read_config=_hf_config,
    mixer=Mamba2Config,
    write_config=_hf_fields,
    absent=_absent(lambda fields: fields),
    **model_tensors(HF_EMBEDDING, _LAYER_TENSORS),
  ),
  Format(
    name="mistral",
    title="a Mamba-2 of Mistral's own form",
    matches=lambda fields: (
      fields.get("model_type", "mamba") == "mamba"
      and {"dim", "n_groups"} <= fields.keys()
    ),
    read_config=_mistral_config,
    mixer=Mamba2Config,
    write_config=_mistral_fields,
    head="model.lm_head.weight",
    repeats_head=True,
    layers="n_layers",
    files=("params.json", "consolidated.safetensors"),
    **model_tensors((f"model.{EMBEDDING}",), _LAYER_TENSORS, "model."),
  ),
)
