"""Published transformers load, compute what they should, and save."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick, rms_error
from flax import nnx
from interop_checkpoints import (
  assert_same,
  checkpoint,
  dividing,
  hollow,
  named,
  write,
)

from ssmjax.interop import (
  abstract_pretrained,
  load_pretrained,
  save_pretrained,
)
from ssmjax.interop.folders import read_tensors
from ssmjax.models import AttentionConfig, LanguageModel, ModelConfig

GOLDEN = pathlib.Path(__file__).with_name("golden")
LATE = pytest.mark.nightly
FAMILIES = ("gpt_neox", "mistral", "recurrentgemma")


@functools.cache
def published(family):
  with np.load(GOLDEN / f"{family}.npz") as golden:
    return dict(golden)


def folder_of(family, tmp_path):
  """The folder that transformers wrote."""
  folder = tmp_path / family
  folder.mkdir()
  golden = published(family)
  (folder / "config.json").write_text(str(golden["config"]))
  (folder / "model.safetensors").write_bytes(golden["checkpoint"].tobytes())
  return folder


def tensors_of(folder, file="model.safetensors"):
  return {k: np.array(x) for k, x in read_tensors(folder / file).items()}


def config_of(folder):
  return json.loads((folder / "config.json").read_text())


def changed(folder, fields=(), tensors=None):
  """The folder with other fields and tensors."""
  fields = config_of(folder) | dict(fields)
  tensors = tensors_of(folder) if tensors is None else tensors
  return checkpoint(folder.parent / "changed", fields, tensors)


@quick
def forward(model, tokens):
  return model(tokens)[0]


@quick
@jax.value_and_grad
def loss(model, tokens):
  logits = jax.nn.log_softmax(model(tokens)[0][:, :-1])
  chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], -1)
  return -chosen.mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_transformer_gives_published_logits(family, tmp_path):
  golden = published(family)
  model = load_pretrained(folder_of(family, tmp_path))
  logits = forward(model, jnp.asarray(golden["tokens"]))
  assert rms_error(logits, golden["logits"]) <= 1e-5


# By day the one that has most: groups, a window, a gated MLP.
@pytest.mark.parametrize(
  "family",
  ["mistral", *(pytest.param(n, marks=LATE) for n in FAMILIES if n[0] != "m")],
)
def test_transformer_gives_published_gradients(family, tmp_path):
  golden = published(family)
  model = load_pretrained(folder_of(family, tmp_path))
  found, grads = loss(model, jnp.asarray(golden["tokens"]))
  assert rms_error(found, golden["loss"]) <= 1e-5
  # A gradient lies where its weight does: written, it has published names.
  # What a norm has beyond 1 is a number of another kind.
  if family == "recurrentgemma":
    grads = jax.tree.map_with_path(plus_one, grads)
  save_pretrained(tmp_path / "gradients", grads)
  found = tensors_of(tmp_path / "gradients")
  file = tmp_path / "expected.safetensors"
  file.write_bytes(golden["gradients"].tobytes())
  expected = {k: np.array(x) for k, x in read_tensors(file).items()}
  assert expected
  for name, gradient in expected.items():
    assert rms_error(found[name], gradient) <= 1e-4, name


def plus_one(path, x):
  return x + 1 if "scale" in jax.tree_util.keystr(path) else x


@pytest.mark.parametrize("family", FAMILIES)
def test_transformer_saved_again_is_the_published_one(family, tmp_path):
  folder = folder_of(family, tmp_path)
  model = load_pretrained(folder)
  save_pretrained(tmp_path / "again", model)
  found, expected = tensors_of(tmp_path / "again"), tensors_of(folder)
  assert found.keys() == expected.keys()
  for name, tensor in expected.items():
    np.testing.assert_allclose(found[name], tensor, rtol=0, atol=1e-7)
  again = load_pretrained(tmp_path / "again")
  # Their lengths are fields of their own, which decide nothing.
  assert again.config == model.config
  assert_close(named(again), named(model), jnp.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_unused_and_misshapen_tensors_are_named(family, tmp_path):
  folder = folder_of(family, tmp_path)
  tensors = tensors_of(folder)
  gone, short = list(tensors)[1], list(tensors)[2]
  del tensors[gone]
  tensors[short] = tensors[short][..., :1]
  tensors["model.layers.9.norm.weight"] = np.zeros(3, np.float32)
  with pytest.raises(ValueError, match="missing") as error:
    load_pretrained(changed(folder, (), tensors))
  for text in (
    f"missing: {gone}",
    f"misshapen: {short}",
    "unused: model.layers.9.norm.weight",
  ):
    assert text in str(error.value)


def test_masks_and_frequencies_of_old_files_are_no_weights(tmp_path):
  folder = folder_of("gpt_neox", tmp_path)
  tensors = tensors_of(folder)
  attention = "gpt_neox.layers.0.attention."
  tensors[attention + "bias"] = np.ones((1, 1, 4, 4), np.int8)
  tensors[attention + "masked_bias"] = np.float32(-1e9)[None]
  tensors[attention + "rotary_emb.inv_freq"] = np.ones(2, np.float32)
  found = load_pretrained(changed(folder, (), tensors))
  assert_same(found, load_pretrained(folder))


def test_old_fields_of_positions_say_the_same_as_new_ones(tmp_path):
  folder = folder_of("gpt_neox", tmp_path)
  fields = {"rope_parameters": None, "rotary_pct": 0.7}
  fields |= {"rotary_emb_base": 10000}
  found = abstract_pretrained(changed(folder, fields))
  assert found.config == abstract_pretrained(folder).config


def test_mistral_of_params_json_equals_that_of_transformers(tmp_path):
  folder = folder_of("mistral", tmp_path)
  expected = load_pretrained(folder)
  fields = {"dim": 12, "n_layers": 2, "head_dim": 4, "hidden_dim": 20}
  fields |= {"n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-6}
  fields |= {"vocab_size": 23, "sliding_window": 5}
  native = tmp_path / "native"
  native.mkdir()
  (native / "params.json").write_text(json.dumps(fields))
  write(native / "consolidated.safetensors", native_tensors(folder))
  assert_same(load_pretrained(native), expected)
  save_pretrained(tmp_path / "saved", expected, format="mistral")
  found = tensors_of(tmp_path / "saved", "consolidated.safetensors")
  wanted = tensors_of(native, "consolidated.safetensors")
  assert_same_tensors(found, wanted)
  assert_same(load_pretrained(tmp_path / "saved"), expected)


def assert_same_tensors(found, expected):
  assert found.keys() == expected.keys()
  for name, tensor in expected.items():
    np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def native_tensors(folder):
  """As Mistral's own files have it: neighbours of a head turn together.

  Of a head's four channels, 0 and 2, 1 and 3 are pairs in halves.
  """
  names = {
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm",
    "lm_head": "output", "model.layers": "layers",
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm", "input_layernorm": "attention_norm",
    "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
  }  # fmt: skip
  found = {}
  for name, tensor in tensors_of(folder).items():
    if "q_proj" in name or "k_proj" in name:
      order = [4 * (i // 4) + (0, 2, 1, 3)[i % 4] for i in range(len(tensor))]
      tensor = np.ascontiguousarray(tensor[order])
    for theirs, native in names.items():
      name = name.replace(theirs, native)
    found[name] = tensor
  return found


def test_mistral_without_a_window_attends_to_all(tmp_path):
  folder = folder_of("mistral", tmp_path)
  found = abstract_pretrained(changed(folder, {"sliding_window": None}))
  assert found.config.mixers[0].window is None


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"mlp": "gelu"}, "gelu"),
    ({"block_norm": "layer", "mlp": "gelu", "mlp_bias": True}, "final_norm"),
    ({"logit_softcap": 2.0}, "logit_softcap=2.0"),
    ({"mixers": (AttentionConfig(2, positions="none"),)}, "positions='none'"),
  ],
)
def test_model_that_no_format_holds_is_not_saved(fields, message, tmp_path):
  fields = {"mlp": "swiglu", "mlp_ratio": 2} | fields
  fields = {"mixers": (AttentionConfig(2),)} | fields
  config = ModelConfig(8, 8, 2, **fields)
  model = jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
  with pytest.raises(NotImplementedError, match=message):
    save_pretrained(tmp_path / "out", model)
  assert not (tmp_path / "out").exists()


def test_seven_billion_parameters_are_checked_by_their_shapes(tmp_path):
  fields = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral",
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
  }  # fmt: skip
  layer = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096), "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336), "input_layernorm": (4096,),
    "post_attention_layernorm": (4096,),
  }  # fmt: skip
  shapes = {
    "model.embed_tokens.weight": (32000, 4096),
    "lm_head.weight": (32000, 4096),
    "model.norm.weight": (4096,),
  }
  for i in range(32):
    shapes |= {f"model.layers.{i}.{k}.weight": v for k, v in layer.items()}
  (tmp_path / "config.json").write_text(json.dumps(fields))
  hollow(tmp_path, shapes, "BF16", 3)
  model = abstract_pretrained(tmp_path, dtype=jnp.bfloat16)
  sizes = [x.size for x in jax.tree.leaves(model)]
  assert sum(sizes) == 7_241_732_096
  assert named(model)["blocks.0.mixer.in_proj"].shape == (32, 4096, 6144)


def test_parts_of_a_parameter_go_to_the_devices_that_hold_them(tmp_path):
  folder = folder_of("mistral", tmp_path)
  mesh = jax.make_mesh((4,), ("model",), (jax.sharding.AxisType.Explicit,))

  def shardings(model):
    spec = lambda x: dividing(mesh, ("model",) * x.ndim, x.shape)

    def one(x):
      axes = spec(x)
      last = max((i for i, a in enumerate(axes) if a), default=None)
      axes = [a if i == last else None for i, a in enumerate(axes)]
      return jax.NamedSharding(mesh, jax.P(*axes))

    return jax.tree.map(one, model)

  found = load_pretrained(folder, sharding=shardings)
  # The keys, columns 16 to 24 of 32, lie on one of four devices.
  in_proj = found.blocks[0].mixer.in_proj[...]
  assert in_proj.sharding.spec == jax.P(None, None, "model")
  assert_same(jax.device_get(found), jax.device_get(load_pretrained(folder)))
