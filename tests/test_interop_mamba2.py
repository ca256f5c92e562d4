"""Mamba-2, Codestral and FalconMamba load as published, and go back."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from checks import TOLERANCE, rms_error
from interop_checkpoints import (
  assert_same,
  checkpoint,
  header_of,
)

from ssmjax.interop import load_pretrained, save_pretrained
from ssmjax.models import MambaConfig, ModelConfig

GOLDEN = pathlib.Path(__file__).with_name("golden")
HEAD = "lm_head.weight"
# As tiiuae/falcon-mamba-7b has it.
FALCON = {
  "architectures": ["FalconMambaForCausalLM"],
  "model_type": "falcon_mamba",
  "vocab_size": 24,
  "hidden_size": 8,
  "intermediate_size": 16,
  "num_hidden_layers": 2,
  "state_size": 3,
  "conv_kernel": 4,
  "expand": 2,
  "time_step_rank": 3,
  "mixer_rms_eps": 1e-2,
  "layer_norm_epsilon": 1e-5,
  "hidden_act": "silu",
  "use_bias": False,
  "use_conv_bias": True,
  "use_falcon_mambapy": False,
  "tie_word_embeddings": True,
  "torch_dtype": "bfloat16",
}


def test_falcon_mamba_gives_the_published_logits(tmp_path):
  folder = checkpoint(tmp_path / "in", FALCON, weights("falcon_mamba"))
  model = load_pretrained(folder)
  assert_published("falcon_mamba", model)
  assert model.config == falcon(tie_embeddings=True)
  save_pretrained(tmp_path / "out", model)
  fields = json.loads((tmp_path / "out" / "config.json").read_text())
  assert fields["architectures"] == ["FalconMambaForCausalLM"]
  assert fields["mixer_rms_eps"] == 1e-2
  assert_same(load_pretrained(tmp_path / "out"), model)


def test_output_matrix_of_its_own_goes_there_and_back(tmp_path):
  fields = FALCON | {"tie_word_embeddings": False}
  tensors = weights("falcon_mamba")
  tensors[HEAD] = np.flip(tensors["backbone.embeddings.weight"]).copy()
  folder = checkpoint(tmp_path / "in", fields, tensors)
  model = load_pretrained(folder)
  assert model.config == falcon(tie_embeddings=False)
  np.testing.assert_array_equal(model.head[...], tensors[HEAD])
  save_pretrained(tmp_path / "out", model)
  found = header_of(tmp_path / "out" / "model.safetensors")
  assert found.keys() - {"__metadata__"} == tensors.keys()
  assert_same(load_pretrained(tmp_path / "out"), model)
  assert load_pretrained(folder, dtype=jnp.bfloat16).head.dtype == jnp.bfloat16


def falcon(**fields):
  mixer = MambaConfig(d_state=3, dt_rank=3, norm_epsilon=1e-2)
  return ModelConfig(24, 8, 2, mixers=(mixer,), **fields)


@functools.cache
def published(name):
  with np.load(GOLDEN / f"{name}.npz") as golden:
    return dict(golden)


def weights(name):
  """The golden weights under their published names; a tied head once."""
  return {
    key.removeprefix("weight:"): array
    for key, array in published(name).items()
    if key.startswith("weight:")
  }


@functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
def forward(model, tokens):
  return model(tokens)[0]


def assert_published(name, model):
  golden = published(name)
  logits = forward(model, golden["tokens"])
  assert rms_error(logits, golden["logits"]) <= TOLERANCE[logits.dtype]
