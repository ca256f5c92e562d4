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
  lacking,
  refusal,
  whole_number,
)
from ssmjax.models import MambaConfig, ModelConfig

__all__ = ["FORMATS"]


def _native_config(fields, dtype) -> ModelConfig:
  _refuse_unknown(fields, _NATIVE_FIELDS, "")
  settings = fields.get("ssm_cfg") or {}
  if not isinstance(settings, dict):
    raise refusal("ssm_cfg", settings, "an object")
  layer = settings.get("layer", "Mamba1")
  if layer != "Mamba1":
    raise lacking(f"ssm_cfg.layer is {layer!r}", "layers other than 'Mamba1'")
  _refuse_unknown(settings, _NATIVE_LAYER_FIELDS, "ssm_cfg.")
  if not fields.get("rms_norm", True):
    raise lacking("rms_norm is false", "blocks with LayerNorm")
  if settings.get("bias", False):
    raise lacking("ssm_cfg.bias is true", "biases of in_proj and out_proj")
  if fields.get("attn_layer_idx"):
    raise lacking("attn_layer_idx is not empty", "attention in this format")
  if fields.get("d_intermediate", 0):
    raise lacking("d_intermediate is not 0", "a gated MLP in each block")
  rank = settings.get("dt_rank", "auto")
  multiple = whole_number(fields, "pad_vocab_size_multiple", 8)
  vocabulary = whole_number(fields, "vocab_size")
  return ModelConfig(
    vocab_size=math.ceil(vocabulary / multiple) * multiple,
    d_model=whole_number(fields, "d_model"),
    n_layers=whole_number(fields, "n_layer"),
    mixers=(
      MambaConfig(
        d_state=whole_number(settings, "d_state", 16),
        d_conv=whole_number(settings, "d_conv", 4),
        expand=whole_number(settings, "expand", 2),
        dt_rank=None if rank == "auto" else whole_number(settings, "dt_rank"),
        dtype=dtype,
      ),
    ),
    dtype=dtype,
  )


def _native_fields(config: ModelConfig, dtype: str) -> dict[str, Any]:
  del dtype
  _check_savable(config)
  mixer: Any = config.mixers[0]
  if config.norm_epsilon != 1e-5:
    raise NotImplementedError(
      f"save_pretrained: norm_epsilon is {config.norm_epsilon}, and the native"
      " format has no field for it: its readers take 1e-5. Use format='hf'."
    )
  # No more than every version of the package reads: it refuses the rest.
  return {
    "d_model": config.d_model,
    "n_layer": config.n_layers,
    "vocab_size": config.vocab_size,
    "ssm_cfg": {
      "d_state": mixer.d_state,
      "d_conv": mixer.d_conv,
      "expand": mixer.expand,
      "dt_rank": _rank(config),
    },
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    # The rows that the table has are all that there are.
    "pad_vocab_size_multiple": 1,
  }


def _hf_config(fields, dtype) -> ModelConfig:
  if fields.get("hidden_act", "silu") not in ("silu", "swish"):
    raise lacking(
      f"hidden_act is {fields['hidden_act']!r}", "activations other than silu"
    )
  if fields.get("use_bias", False):
    raise lacking("use_bias is true", "biases of in_proj and out_proj")
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
  epsilon = fields.get("layer_norm_epsilon", 1e-5)
  if type(epsilon) not in (int, float) or epsilon < 0:
    raise refusal("layer_norm_epsilon", epsilon, "a number, 0 or more")
  return ModelConfig(
    vocab_size=whole_number(fields, "vocab_size"),
    d_model=d_model,
    n_layers=whole_number(fields, "num_hidden_layers"),
    mixers=(
      MambaConfig(
        d_state=whole_number(fields, "state_size", 16),
        d_conv=whole_number(fields, "conv_kernel", 4),
        expand=inner // d_model,
        dt_rank=None
        if rank == "auto"
        else whole_number(fields, "time_step_rank"),
        dtype=dtype,
      ),
    ),
    norm_epsilon=float(epsilon),
    dtype=dtype,
  )


def _hf_fields(config: ModelConfig, dtype: str) -> dict[str, Any]:
  _check_savable(config)
  mixer: Any = config.mixers[0]
  return {
    "architectures": ["MambaForCausalLM"],
    "model_type": "mamba",
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
    "tie_word_embeddings": True,
    # What versions before 5 call it, too.
    "torch_dtype": dtype,
  }


def _no_falcon(fields, dtype) -> ModelConfig:
  del fields, dtype
  raise NotImplementedError(
    "load_pretrained: config.json is of a FalconMamba, and Mamba here has no"
    " RMS norms of B, C and Δ (mixer_rms_eps) between x_proj and dt_proj."
    " Without them the weights would give other outputs than the published"
    " ones, so they are not loaded."
  )


def _check_savable(config: ModelConfig) -> None:
  """Raise NotImplementedError for what Mamba's formats have no words for."""
  reasons = []
  for mixer in dict.fromkeys(config.mixers):
    if not isinstance(mixer, MambaConfig):
      reasons.append(f"a mixer of {type(mixer).__name__}")
    elif mixer.polarization and (
      mixer.polarization.ones or mixer.polarization.zeros
    ):
      reasons.append(
        f"channels whose decay is not learned: {mixer.polarization}"
      )
  sizes = {
    (mixer.d_state, mixer.d_conv, mixer.expand, mixer.dt_rank)
    for mixer in config.mixers
    if isinstance(mixer, MambaConfig)
  }
  if len(sizes) > 1:
    reasons.append("layers of different sizes")
  reasons += beyond(config)
  if reasons:
    raise NotImplementedError(
      "save_pretrained: the published formats of Mamba cannot hold "
      + "; ".join(reasons)
      + ". Keep such a model as a checkpoint of ssmjax.training."
    )


def _table(embedding: tuple[str, ...]):
  """Mamba's tensors, whose embedding has these names."""
  mixer = "backbone.layers.{}.mixer."
  return {
    "tensors": (
      Tensor("embedding", embedding, SAME, wide=True),
      Tensor("norm.scale", ("backbone.norm_f.weight",), SAME, wide=True),
    ),
    "layer_tensors": (
      Tensor(
        "norm.scale", ("backbone.layers.{}.norm.weight",), SAME, wide=True
      ),
      *(
        Tensor(f"mixer.{ours}", (mixer + theirs,), layout, wide, default)
        for ours, theirs, layout, wide, default in (
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
      ),
    ),
  }


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
  # the head by its values, and the rest is about no number.
  *("residual_in_fp32", "attn_cfg", "tie_embeddings", "fused_add_norm"),
  *("torch_dtype", "dtype", "transformers_version", "_name_or_path"),
}


def _no_bias(field: str, settings: Callable[[dict], dict]):
  """The convolution's bias is absent where `field` says so."""
  return lambda fields: (
    set() if settings(fields).get(field, True) else {"mixer.conv_bias"}
  )


def _rank(config: ModelConfig) -> int:
  mixer: Any = config.mixers[0]
  return mixer.dt_rank or math.ceil(config.d_model / 16)


def _refuse_unknown(fields, known, where):
  unknown = sorted(set(fields) - known)
  if unknown:
    raise NotImplementedError(
      f"load_pretrained: config.json has {where}{unknown[0]}, which is no field"
      " of a Mamba that is known here; it may say something about the model"
      " that would be lost."
    )


_EMBEDDING = "backbone.embedding.weight"
FORMATS = (
  Format(
    name="native",
    title="a Mamba of the mamba_ssm package",
    matches=lambda fields: "d_model" in fields and "model_type" not in fields,
    read_config=_native_config,
    mixer=MambaConfig,
    write_config=_native_fields,
    absent=_no_bias("conv_bias", lambda fields: fields.get("ssm_cfg") or {}),
    tied=lambda fields: fields.get("tie_embeddings", True),
    **_table((_EMBEDDING,)),
  ),
  Format(
    name="hf",
    title="a MambaForCausalLM of transformers",
    matches=lambda fields: fields.get("model_type") == "mamba",
    read_config=_hf_config,
    mixer=MambaConfig,
    write_config=_hf_fields,
    absent=_no_bias("use_conv_bias", lambda fields: fields),
    tied=lambda fields: fields.get("tie_word_embeddings", True),
    # transformers itself reads both.
    **_table(("backbone.embeddings.weight", _EMBEDDING)),
  ),
  Format(
    name="falcon_mamba",
    title="a FalconMambaForCausalLM of transformers",
    matches=lambda fields: fields.get("model_type") == "falcon_mamba",
    read_config=_no_falcon,
  ),
)
