"""Mamba-2, Codestral and FalconMamba load as published, and go back.

What `save_pretrained` writes of Mamba, Mamba-2 and FalconMamba, tied and not,
was loaded by transformers 5.23.0 with PyTorch 2.13.0, and what that saved
again by `load_pretrained`: the logits were ours to 5e-7 and to the bit.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import TOLERANCE, rms_error
from flax import nnx
from interop_checkpoints import (
  assert_same,
  checkpoint,
  header_of,
  hollow,
  raw,
)

from ssmjax.interop import (
  abstract_pretrained,
  load_pretrained,
  save_pretrained,
)
from ssmjax.interop.folders import read_tensors
from ssmjax.models import (
  LanguageModel,
  Mamba2Config,
  MambaConfig,
  ModelConfig,
)
from ssmjax.types import Polarization

GOLDEN = pathlib.Path(__file__).with_name("golden")
HEAD = "lm_head.weight"
# As mistralai/Mamba-Codestral-7B-v0.1 has it, and transformers reads it: the
# norm comes after the gate whatever it says.
HF = {
  "architectures": ["Mamba2ForCausalLM"],
  "model_type": "mamba2",
  "vocab_size": 24,
  "hidden_size": 8,
  "num_hidden_layers": 2,
  "num_heads": 4,
  "head_dim": 4,
  "n_groups": 2,
  "state_size": 3,
  "conv_kernel": 3,
  "expand": 2,
  "chunk_size": 8,
  "time_step_limit": [0.02, 0.5],
  "layer_norm_epsilon": 1e-4,
  "hidden_act": "silu",
  "norm_before_gate": True,
  "rms_norm": True,
  "use_bias": False,
  "use_conv_bias": True,
  "residual_in_fp32": True,
  "tie_word_embeddings": False,
  "torch_dtype": "bfloat16",
}
# As state-spaces/mamba2-130m has it.
NATIVE = {
  "d_model": 8,
  "d_intermediate": 0,
  "n_layer": 2,
  "vocab_size": 20,
  "ssm_cfg": {
    "layer": "Mamba2",
    "d_state": 3,
    "d_conv": 3,
    "headdim": 4,
    "ngroups": 2,
    "dt_limit": [0.02, 0.5],
  },
  "attn_layer_idx": [],
  "attn_cfg": {},
  "rms_norm": True,
  "residual_in_fp32": True,
  "fused_add_norm": True,
  "pad_vocab_size_multiple": 12,
  "tie_embeddings": False,
}
# As params.json of Mamba-Codestral has it.
MISTRAL = {
  "dim": 32,
  "n_layers": 2,
  "vocab_size": 10,
  "n_groups": 1,
  "rms_norm": True,
  "residual_in_fp32": True,
  "fused_add_norm": True,
  "pad_vocab_size_multiple": 1,
  "tie_embeddings": False,
  "model_type": "mamba",
}
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


def test_transformers_mamba2_gives_the_published_logits(tmp_path):
  folder = checkpoint(tmp_path / "in", HF, weights("mamba2"))
  model = load_pretrained(folder)
  assert model.config == mamba2(epsilon=1e-4)
  assert_published("mamba2", model)
  save_pretrained(tmp_path / "out", model)
  fields = json.loads((tmp_path / "out" / "config.json").read_text())
  same = HF.keys() & fields.keys() - {"torch_dtype"}
  assert {name: fields[name] for name in same} == {k: HF[k] for k in same}
  assert_same(load_pretrained(tmp_path / "out"), model)


def test_native_mamba2_is_the_model_of_transformers(tmp_path):
  tensors = weights("mamba2")
  fields = HF | {"layer_norm_epsilon": 1e-5}
  expected = load_pretrained(checkpoint(tmp_path / "a", fields, tensors))
  embedding = tensors.pop("backbone.embeddings.weight")
  tensors["backbone.embedding.weight"] = embedding
  model = load_pretrained(checkpoint(tmp_path / "b", NATIVE, tensors))
  # The table is padded from 20 tokens, which one format says.
  config = dataclasses.replace(model.config, true_vocab_size=None)
  assert model.config.true_vocab_size == 20
  assert config == expected.config == mamba2(epsilon=1e-5)
  assert_same(model, expected)
  save_pretrained(tmp_path / "c", model, format="native")
  found = header_of(tmp_path / "c" / "model.safetensors")
  assert found.keys() - {"__metadata__"} == tensors.keys()
  assert_same(load_pretrained(tmp_path / "c"), model)


def test_mistrals_own_form_is_the_native_one_under_another_name(tmp_path):
  config = ModelConfig(10, 32, 2, (Mamba2Config(),), tie_embeddings=False)
  model = drawn(config)
  save_pretrained(tmp_path / "a", model, format="native", dtype=jnp.bfloat16)
  folder = tmp_path / "b"
  folder.mkdir()
  (folder / "params.json").write_text(json.dumps(MISTRAL))
  with_prefix(tmp_path / "a", folder / "consolidated.safetensors")
  again = load_pretrained(folder)
  assert again.config == config
  rounded = lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)
  assert_same(again, jax.tree.map(rounded, model))
  # The way back, from activations in bfloat16 too.
  half = load_pretrained(folder, dtype=jnp.bfloat16)
  save_pretrained(tmp_path / "c", half, format="mistral", dtype="bfloat16")
  (fields, file) = sorted((tmp_path / "c").iterdir(), reverse=True)
  assert json.loads(fields.read_text()) == MISTRAL
  found, expected = (
    {name: (x.dtype, x.shape, x[()].tobytes()) for name, x in tensors.items()}
    for tensors in map(read_tensors, (file, folder / file.name))
  )
  assert found == expected
  assert file.name == "consolidated.safetensors"


def test_mistrals_readers_get_an_output_matrix_that_is_tied(tmp_path):
  model = drawn(ModelConfig(10, 32, 1, (Mamba2Config(),)))
  save_pretrained(tmp_path / "out", model, format="mistral")
  found = read_tensors(tmp_path / "out" / "consolidated.safetensors")
  np.testing.assert_array_equal(
    found["model.lm_head.weight"], found["model.backbone.embedding.weight"]
  )
  again = load_pretrained(tmp_path / "out")
  assert again.config == model.config
  assert_same(again, model)


@pytest.mark.parametrize(
  "mixer",
  [
    Mamba2Config(
      d_state=3, head_dim=4, d_ssm=8, norm="none", dt_least=0.1
    ),
    Mamba2Config(
      d_state=3, head_dim=2, expand=1, norm="before_gate",
      skip_per_channel=True,
    ),
  ],
)  # fmt: skip
def test_options_of_the_package_go_there_and_back(tmp_path, mixer):
  model = drawn(ModelConfig(16, 8, 2, (mixer,)))
  save_pretrained(tmp_path / "out", model, format="native")
  found = header_of(tmp_path / "out" / "model.safetensors")
  norms = [name for name in found if name.endswith("mixer.norm.weight")]
  assert len(norms) == (0 if mixer.norm == "none" else 2)
  again = load_pretrained(tmp_path / "out")
  assert again.config == model.config
  assert_same(again, model)
  with pytest.raises(NotImplementedError, match="Use format='native'"):
    save_pretrained(tmp_path / "hf", model)


def test_limit_without_end_is_read_in_every_spelling(tmp_path):
  tensors = weights("mamba2")
  for greatest in (float("inf"), {"__float__": "Infinity"}):
    fields = HF | {"time_step_limit": [0.0, greatest]}
    model = abstract_pretrained(checkpoint(tmp_path, fields, tensors))
    assert model.config.mixers[0].dt_limits == (0.0, float("inf"))


def test_seven_billion_parameters_are_checked_by_their_shapes(tmp_path):
  fields = HF | {
    "vocab_size": 32768,
    "hidden_size": 4096,
    "num_hidden_layers": 64,
    "num_heads": 128,
    "head_dim": 64,
    "n_groups": 8,
    "state_size": 128,
    "conv_kernel": 4,
    "time_step_limit": [0.0, float("inf")],
    "layer_norm_epsilon": 1e-5,
  }
  (tmp_path / "config.json").write_text(json.dumps(fields))
  mixer = {
    "in_proj.weight": (18560, 4096),
    "conv1d.weight": (10240, 1, 4),
    "conv1d.bias": (10240,),
    **dict.fromkeys(("A_log", "D", "dt_bias"), (128,)),
    "norm.weight": (8192,),
    "out_proj.weight": (4096, 8192),
  }
  shapes = {
    "backbone.embeddings.weight": (32768, 4096),
    "backbone.norm_f.weight": (4096,),
    HEAD: (32768, 4096),
  }
  for i in range(64):
    layer = f"backbone.layers.{i}."
    shapes[f"{layer}norm.weight"] = (4096,)
    shapes |= {f"{layer}mixer.{name}": x for name, x in mixer.items()}
  hollow(tmp_path, shapes, "BF16", 3)
  model = abstract_pretrained(tmp_path, dtype=jnp.bfloat16)
  sizes = {leaf.dtype.name: 0 for leaf in jax.tree.leaves(model)}
  for leaf in jax.tree.leaves(model):
    sizes[leaf.dtype.name] += leaf.size
  # As the model card says: 7.3 billion.
  assert sum(sizes.values()) == 7_285_403_648
  assert sizes["float32"] < 0.02 * sizes["bfloat16"]
  assert model.blocks[0].mixer.in_proj.shape == (64, 4096, 18560)


@pytest.mark.parametrize(
  ("fields", "kind", "message"),
  [
    (HF | {"num_heads": 5}, ValueError, "num_heads is 5, expected expand"),
    (HF | {"use_bias": True}, NotImplementedError, "use_bias is true"),
    (HF | {"time_step_limit": [1, 0]}, ValueError, "time_step_limit is"),
    (HF | {"time_step_limit": 3}, ValueError, "expected two numbers"),
    (HF | {"tie_word_embeddings": 0}, ValueError, "is 0, expected true or fal"),
    (HF | {"layer_norm_epsilon": 0}, ValueError, "is 0, expected a number ab"),
    (NATIVE | {"ssm_cfg": NATIVE["ssm_cfg"] | {"bias": True}},
     NotImplementedError, "ssm_cfg.bias is true"),
    (NATIVE | {"ssm_cfg": NATIVE["ssm_cfg"] | {"lr": 1}}, NotImplementedError,
     "ssm_cfg.lr, which is no field"),
    (NATIVE | {"attn_layer_idx": [1]}, NotImplementedError, "attn_layer_idx"),
    (MISTRAL | {"rope": 1}, NotImplementedError, "rope, which is no field"),
  ],
)  # fmt: skip
def test_mamba2_that_is_not_here_is_refused_by_what_it_lacks(
  tmp_path, fields, kind, message
):
  with pytest.raises(kind, match=message):
    abstract_pretrained(checkpoint(tmp_path, fields, {}))


@pytest.mark.parametrize(
  ("mixers", "fields", "format", "message"),
  [
    ([Mamba2Config(head_dim=4, polarization=Polarization(ones=1))], {}, "hf",
     "decays that are not learned"),
    ([Mamba2Config(head_dim=4), MambaConfig()], {}, "hf",
     "a mixer of MambaConfig"),
    ([Mamba2Config(head_dim=4), Mamba2Config(head_dim=8)], {}, "native",
     "different sizes"),
    ([Mamba2Config(head_dim=4, norm_epsilon=1e-6)], {}, "hf",
     "norms with epsilons 1e-05 and 1e-06"),
    ([Mamba2Config(head_dim=4, norm_epsilon=1e-6)], {}, "native",
     "norm_epsilon of Mamba2Config is 1e-06"),
    ([Mamba2Config(head_dim=4)], {"mlp_ratio": 2}, "native", "an MLP"),
    ([MambaConfig(norm_epsilon=1e-6)], {}, "native", "no norms of B, C and Δ"),
    ([MambaConfig()], {}, "mistral", "'mistral' .* or format='hf'"),
    ([Mamba2Config(head_dim=4, dt_greatest=1.0)], {}, "mistral",
     "head_dim=4; dt_greatest=1.0. Use format='native'"),
  ],
)  # fmt: skip
def test_mamba2_that_a_format_cannot_hold_is_not_saved(
  tmp_path, mixers, fields, format, message
):
  config = ModelConfig(8, 8, 2, mixers=tuple(mixers), **fields)
  model = jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
  with pytest.raises(NotImplementedError, match=message):
    save_pretrained(tmp_path / "out", model, format=format)


def mamba2(epsilon):
  mixer = Mamba2Config(
    d_state=3, d_conv=3, head_dim=4, n_groups=2, norm_epsilon=epsilon,
    dt_least=0.02, dt_greatest=0.5,
  )  # fmt: skip
  return ModelConfig(
    24, 8, 2, (mixer,), norm_epsilon=epsilon, tie_embeddings=False
  )


def drawn(config):
  """A model whose parameters are all different."""
  random = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: jnp.asarray(random.normal(0, 0.3, x.shape), x.dtype),
    jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))),
  )


def with_prefix(folder, path):
  """The folder's file as Mistral names tensors: `model.` before each."""
  whole = (folder / "model.safetensors").read_bytes()
  start = 8 + int.from_bytes(whole[:8], "little")
  header = json.loads(whole[8:start])
  named = {
    k if k == "__metadata__" else f"model.{k}": header[k] for k in header
  }
  raw(path, json.dumps(named).encode(), whole[start:])


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
