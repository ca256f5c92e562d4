"""What a transformer's configuration says is honoured, or refused by name."""

import json
import time

import numpy as np
import pytest
from interop_checkpoints import write

from ssmjax.interop import abstract_pretrained
from ssmjax.interop.families import FORMATS
from ssmjax.models import (
  AttentionConfig,
  ModelConfig,
  RGLRUConfig,
)
from ssmjax.types import Polarization

SIZES = {
  "vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 2,
  "num_attention_heads": 2, "intermediate_size": 12,
}  # fmt: skip
NEOX = SIZES | {"model_type": "gpt_neox"}
MISTRAL = SIZES | {"model_type": "mistral", "num_key_value_heads": 2}
GEMMA_NAME = "recurrent_gemma"
GEMMA = SIZES | {"model_type": GEMMA_NAME}
NATIVE = {
  "dim": 8, "n_layers": 2, "head_dim": 4, "hidden_dim": 12, "n_heads": 2,
  "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": 8, "sliding_window": 4,
}  # fmt: skip
MAMBA = {
  "model_type": "mamba", "vocab_size": 8, "hidden_size": 8,
  "num_hidden_layers": 1, "state_size": 4,
}  # fmt: skip
RWKV = SIZES | {"model_type": "rwkv"}
YARN = {"rope_type": "yarn", "factor": 4.0}


def mixer(**fields):
  fields = {"rotary_fraction": 0.5, "bias": True, "out_bias": True} | fields
  return AttentionConfig(**{"num_heads": 2} | fields)


def local(**fields):
  return mixer(**{"window": 4, "bias": False} | fields)


def rglru(**fields):
  return RGLRUConfig(num_blocks=2, **fields)


MODEL = {
  "vocab_size": 8, "d_model": 8, "n_layers": 6, "mlp_ratio": 2,
  "mlp_bias": True,
}  # fmt: skip
NEOX_MODEL = MODEL | {
  "mixers": (mixer(),), "mlp": "gelu_exact", "final_norm": "layer",
  "block_norm": "layer",
}  # fmt: skip
GEMMA_MODEL = MODEL | {
  "mixers": (rglru(), rglru(), local()), "mlp": "geglu",
  "embedding_scale": 2.828125, "logit_softcap": 30.0,
}  # fmt: skip


@pytest.mark.parametrize(
  ("fields", "changes", "message"),
  [
    (NEOX, {"hidden_act": "relu"}, "hidden_act is 'relu'"),
    (NEOX, {"rope_scaling": {"type": "linear"}}, "rope_scaling has the type"),
    (NEOX, {"head_dim": 3}, "head_dim is 3"),
    (NEOX, {"num_key_value_heads": 1}, "num_key_value_heads is 1"),
    (NEOX, {"per_layer_config": {"0": {"hidden_act": "relu"}}}, "per_layer_c"),
    (NEOX, {"is_causal": False}, "is_causal is false"),
    (MISTRAL, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    (MISTRAL, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    (MISTRAL, {"rope_parameters": YARN}, "rope_parameters has the type 'yarn'"),
    (MISTRAL, {"rope_parameters": {"full_attention": {}}}, "layer to layer"),
    (MISTRAL, {"layer_types": ["full_attention"] * 2}, "layer_types is"),
    (MISTRAL, {"sliding_window": [4, None]}, "sliding_window is .4, None."),
    (GEMMA, {"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
    (GEMMA, {"embeddings_scale_by_sqrt_dim": False}, "scale_by_sqrt_dim is"),
    (GEMMA, {"head_dim": 3}, "head_dim is 3"),
    (GEMMA, {"rope_scaling": YARN}, "rope_scaling has the type 'yarn'"),
    (NATIVE, {"moe": {"num_experts": 8}}, "it has moe, which is no field"),
    (NATIVE, {"_sliding_window": [4, 8], "sliding_window": None}, "each layer"),
  ],
)
def test_feature_that_is_not_here_is_refused(
  tmp_path, fields, changes, message
):
  file = described(tmp_path, fields | changes)
  with pytest.raises(NotImplementedError, match=message) as error:
    abstract_pretrained(tmp_path)
  assert str(error.value).startswith(f"load_pretrained: {file}: ")


@pytest.mark.parametrize(
  ("fields", "changes", "message"),
  [
    (NEOX, {"layer_norm_eps": 0.0}, "layer_norm_eps is 0.0, expected a number"),
    (NEOX, {"use_parallel_residual": None}, "use_parallel_residual is None"),
    (NEOX, {"attention_bias": 1}, "attention_bias is 1, expected true or"),
    (NEOX, {"rotary_pct": 1.5}, "AttentionConfig: rotary_fraction is 1.5"),
    (NEOX, {"rope_theta": 5e5}, "rope_theta is 500000.0, expected 10000.0"),
    (NEOX, {"hidden_size": 9}, "expected a multiple of num_heads=2"),
    (MISTRAL, {"rope_theta": "1e6"}, "rope_theta is '1e6', expected a number"),
    (MISTRAL, {"rope_scaling": 2.0}, "rope_scaling is 2.0, expected an object"),
    (MISTRAL, {"sliding_window": 0}, "sliding_window is 0, expected an"),
    (MISTRAL, {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
    (MISTRAL, {"num_attention_heads": None}, "num_attention_heads is None"),
    (MISTRAL, {"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0, expected a"),
    (GEMMA, {"block_types": ["mlp"]}, "block_types is .'mlp'., expected a"),
    (GEMMA, {"block_types": []}, "block_types is"),
    (GEMMA, {"layer_types": ["full_attention"]}, "layer_types is"),
    (GEMMA, {"attention_window_size": 0}, "attention_window_size is 0"),
    (GEMMA, {"sliding_window": 0}, "sliding_window is 0"),
    (GEMMA, {"logits_soft_cap": None}, "logits_soft_cap is None"),
    (GEMMA, {"lru_width": 9}, "expected a multiple of num_blocks=2"),
    (NATIVE, {"n_heads": None}, "n_heads is None, expected an integer"),
    (NATIVE, {"n_kv_heads": 0}, "n_kv_heads is 0, expected an integer"),
    (NATIVE, {"model_type": "moe"}, "model_type is 'moe', expected 'tr"),
    (NATIVE, {"sliding_window": None}, "rope_theta is None, expected a number"),
    (NATIVE, {"_sliding_window": 4}, "_sliding_window is 4, expected null"),
    (NATIVE, {"norm_eps": "1e-5"}, "norm_eps is '1e-5', expected a number"),
  ],
)
def test_field_that_is_wrong_is_named_with_its_file(
  tmp_path, fields, changes, message
):
  file = described(tmp_path, fields | changes)
  tensors = {name: np.ones(1, np.float32) for name in "abc"}
  write(tmp_path / "model.safetensors", tensors)
  with pytest.raises(ValueError, match=message) as error:
    abstract_pretrained(tmp_path)
  assert str(error.value).startswith(f"load_pretrained: {file}: ")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"mixers": (mixer(), mixer(rope_theta=2.0))}, "layers that are not alike"),
    ({"mixers": (mixer(num_kv_heads=1),)}, "num_kv_heads=1"),
    ({"mixers": (mixer(head_dim=2),)}, "head_dim=2"),
    ({"mixers": (mixer(window=3),)}, "window=3"),
    ({"mixers": (mixer(positions="none"),)}, "positions='none'"),
    ({"mixers": (mixer(out_bias=False),)}, "bias=True with out_bias=False"),
    ({"mlp": "swiglu", "mlp_bias": False}, "a gated MLP"),
    ({"mlp_bias": False}, "one without biases"),
    ({"mlp_ratio": 0}, "none"),
    ({"final_norm": "rms"}, "final_norm='rms'"),
    ({"logit_softcap": 2.0}, "logit_softcap=2.0"),
    ({"max_positions": 4}, "learned positions"),
  ],
)
def test_model_that_gpt_neox_cannot_hold_is_not_saved(changes, message):
  with pytest.raises(NotImplementedError, match=message):
    fields_of("gpt_neox", NEOX_MODEL | changes)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"mixers": (rglru(), rglru(d_conv=3), local())}, "other than of one"),
    ({"mixers": (rglru(polarization=Polarization(ones=1)),)}, "not learned"),
    ({"mixers": (rglru(), local(window=None))}, "attention without a window"),
    ({"mixers": (rglru(), local(out_bias=False))}, "without a bias at its end"),
    (
      {"mixers": (rglru(), local(num_heads=4))},
      "num_heads=4 with num_blocks=2",
    ),
    ({"mixers": (rglru(), local(head_dim=2))}, "head_dim=2"),
    ({"mixers": (rglru(), local(positions="none"))}, "positions='none'"),
    ({"mlp": "swiglu"}, "mlp='swiglu', not 'geglu'"),
    ({"mlp_bias": False}, "mlp_bias=False, not True"),
    ({"embedding_scale": 1.0}, "embedding_scale=1.0, not 2.828125"),
    ({"mlp_ratio": 0}, "no MLP"),
    ({"logit_softcap": None}, "or no soft cap"),
    ({"final_norm": "layer"}, "final_norm='layer'"),
  ],
)
def test_model_that_recurrent_gemma_cannot_hold_is_not_saved(changes, message):
  with pytest.raises(NotImplementedError, match=message):
    fields_of(GEMMA_NAME, GEMMA_MODEL | changes)


def test_models_that_those_formats_hold_are_described():
  for fields, kind in ((NEOX_MODEL, "gpt_neox"), (GEMMA_MODEL, GEMMA_NAME)):
    assert fields_of(kind, fields)["model_type"] == kind


def fields_of(kind, fields):
  """What `save_pretrained` writes first, and refuses by."""
  (format,) = (x for x in FORMATS if x.matches({"model_type": kind}))
  return format.write_config(ModelConfig(**fields), "float32")


def described(folder, fields):
  """A folder with nothing but a configuration."""
  file = folder / ("params.json" if "dim" in fields else "config.json")
  file.write_text(json.dumps(fields))
  return file


@pytest.mark.parametrize("size", [10**6, 10**9, 10**400])
@pytest.mark.parametrize(
  ("fields", "name"),
  [
    (NEOX, "num_hidden_layers"),
    (MISTRAL, "num_hidden_layers"),
    (GEMMA, "num_hidden_layers"),
    (NATIVE, "n_layers"),
    (RWKV, "num_hidden_layers"),
    (MAMBA, "num_hidden_layers"),
    (MAMBA, "state_size"),
    (MAMBA, "conv_kernel"),
    (MAMBA, "hidden_size"),
    (MAMBA, "vocab_size"),
  ],
)
def test_size_that_no_tensor_has_is_refused_at_once(
  tmp_path, fields, name, size
):
  file = described(tmp_path, fields | {name: size})
  write(tmp_path / "model.safetensors", {"D": np.ones(1, np.float32)})
  start = time.process_time()
  with pytest.raises(ValueError, match="load_pretrained: ") as error:
    abstract_pretrained(tmp_path)
  assert time.process_time() - start < 2
  assert str(file.parent) in str(error.value)
  assert len(str(error.value)) < 2000


def test_more_layers_than_tensors_are_refused(tmp_path):
  described(tmp_path, MAMBA | {"num_hidden_layers": 20_000})
  write(tmp_path / "model.safetensors", {"D": np.ones(1, np.float32)})
  with pytest.raises(ValueError, match="20000 layers, and its files hold 1 "):
    abstract_pretrained(tmp_path)


@pytest.mark.parametrize("depth", [70, 5000, 200_000])
@pytest.mark.parametrize(
  "file", ["config.json", "params.json", "model.safetensors.index.json"]
)
def test_json_that_nests_without_end_is_refused(tmp_path, file, depth):
  described(tmp_path, MAMBA)
  deep = b'{"layer_types": ' + b"[" * depth + b"]" * depth + b"}"
  if file == "params.json":
    (tmp_path / "config.json").unlink()
  (tmp_path / file).write_bytes(deep)
  with pytest.raises(ValueError, match=rf"{file} (is no JSON|nests more than)"):
    abstract_pretrained(tmp_path)
