"""A published checkpoint loads as the published model."""

import dataclasses
import json
import math
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import TOLERANCE, rms_error
from flax import nnx
from interop_checkpoints import (
  EMBEDDING,
  HEAD,
  HF,
  LAYER,
  NATIVE,
  assert_published,
  assert_same,
  checkpoint,
  dividing,
  forward,
  hollow,
  named,
  native,
  published,
  shapes_of,
  shard,
  weights,
  whole_model,
)

from ssmjax.interop import (
  abstract_pretrained,
  load_pretrained,
  save_pretrained,
)
from ssmjax.models import (
  MambaConfig,
  ModelConfig,
  generate,
)


def test_transformers_mamba_gives_the_published_logits(tmp_path):
  model = load_pretrained(checkpoint(tmp_path, HF, weights()))
  assert_published(model)


def test_native_mamba_gives_the_published_logits(tmp_path):
  model = load_pretrained(checkpoint(tmp_path, NATIVE, native()))
  assert model.config.vocab_size == 32
  assert_published(model)


def test_both_formats_give_the_configuration_of_their_fields(tmp_path):
  expected = ModelConfig(
    vocab_size=32,
    d_model=16,
    n_layers=2,
    mixers=(MambaConfig(d_state=4, dt_rank=3),),
  )
  for fields, tensors in ((HF, weights()), (NATIVE, native())):
    folder = checkpoint(
      tmp_path / fields.get("model_type", "n"), fields, tensors
    )
    # The table is padded from 27 tokens, which one format says.
    tokens = None if fields is HF else 27
    config = dataclasses.replace(expected, true_vocab_size=tokens)
    assert abstract_pretrained(folder).config == config
    (folder / "config.json").rename(folder / "params.json")
    assert abstract_pretrained(folder).config == config


def test_shards_give_what_one_file_gives(tmp_path):
  tensors = weights()
  names = sorted(tensors)
  parts = {
    f"model-0000{i + 1}-of-00003.safetensors": {
      name: tensors[name] for name in names[i::3]
    }
    for i in range(3)
  }
  folder = checkpoint(tmp_path, HF, {})
  (folder / "model.safetensors").unlink()
  shard(folder, parts)
  assert_same(load_pretrained(folder), whole_model())


def test_what_decides_about_decays_stays_float32(tmp_path):
  half = {k: v.astype(jnp.bfloat16) for k, v in weights().items()}
  folder = checkpoint(tmp_path, HF, half)
  model = load_pretrained(folder, dtype=jnp.bfloat16)
  narrow = {
    name.rpartition(".")[2]
    for name, leaf in named(model).items()
    if leaf.dtype == jnp.bfloat16
  }
  assert narrow == {"in_proj", "x_proj", "dt_proj", "out_proj"}
  wide = load_pretrained(folder)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(wide)} == {"float32"}
  A_log = half[f"{LAYER.format(1)}A_log"].astype(np.float32)
  np.testing.assert_array_equal(wide.blocks[0].mixer.A_log[1], A_log)
  logits = forward(model)
  assert logits.dtype == jnp.float32
  error = rms_error(logits, forward(wide))
  assert error <= TOLERANCE[jnp.dtype("bfloat16")]


def test_tensors_go_straight_into_sharded_arrays(tmp_path):
  mesh = jax.make_mesh((4, 2), ("data", "model"))

  def shardings(model):
    # Every axis of some parameter is divided, the stack of layers too.
    def choose(x):
      if x.ndim == 3:
        spec = (None, "data", "model")
      else:
        spec = ("model", "data")[: x.ndim]
      return jax.NamedSharding(mesh, jax.P(*dividing(mesh, spec, x.shape)))

    return jax.tree.map(choose, model)

  folder = checkpoint(tmp_path, HF, weights())
  model = load_pretrained(folder, sharding=shardings)
  in_proj = model.blocks[0].mixer.in_proj[...]
  assert in_proj.sharding.shard_shape(in_proj.shape) == (2, 4, 32)
  bias = model.blocks[0].mixer.dt_bias[...]
  assert bias.sharding.shard_shape(bias.shape) == (1, 8)
  assert_same(model, whole_model())
  replicated = jax.NamedSharding(mesh, jax.P())
  assert_same(load_pretrained(folder, sharding=replicated), whole_model())


def test_sharding_of_another_kind_is_refused(tmp_path):
  folder = checkpoint(tmp_path, HF, weights())
  with pytest.raises(ValueError, match=r"sharding of .* is 'all', expected a"):
    load_pretrained(folder, sharding="all")


def test_missing_unused_and_misshapen_tensors_are_all_named(tmp_path):
  tensors = weights()
  del tensors[f"{LAYER.format(0)}A_log"], tensors["backbone.norm_f.weight"]
  tensors[f"{LAYER.format(1)}x_proj.weight"] = np.zeros((12, 32), np.float32)
  tensors[f"{LAYER.format(1)}D"] = np.zeros(32, np.int8)
  tensors["backbone.layers.2.norm.weight"] = np.ones(16, np.float32)
  tensors["rotary.inv_freq"] = np.ones(4, np.float32)
  tensors[HEAD] = np.zeros((27, 16), np.float32)
  with pytest.raises(ValueError, match="MambaForCausalLM") as error:
    abstract_pretrained(checkpoint(tmp_path, HF, tensors))
  lines = {line.strip() for line in str(error.value).splitlines()[1:]}
  assert lines == {
    "missing: backbone.layers.0.mixer.A_log",
    "missing: backbone.norm_f.weight",
    "misshapen: backbone.layers.1.mixer.x_proj.weight has shape (12, 32),"
    " expected (11, 32)",
    "of another type: backbone.layers.1.mixer.D is int8, expected floating",
    "misshapen: lm_head.weight has shape (27, 16), expected (32, 16), as"
    f" {EMBEDDING}",
    "unused: backbone.layers.2.norm.weight",
    "unused: rotary.inv_freq",
  }


def test_output_matrix_has_to_be_the_embedding(tmp_path):
  tensors = weights()
  tensors[HEAD] = tensors[EMBEDDING].copy()
  folder = checkpoint(tmp_path, HF, tensors)
  assert_same(load_pretrained(folder), whole_model())
  tensors[HEAD][-1, -1] += 1
  folder = checkpoint(tmp_path, HF, tensors)
  with pytest.raises(NotImplementedError, match=f"{HEAD} is not {EMBEDDING}"):
    load_pretrained(folder)


@pytest.mark.parametrize(
  "fields",
  [HF | {"tie_word_embeddings": False}, NATIVE | {"tie_embeddings": False}],
)
def test_output_matrix_of_its_own_has_to_be_there(tmp_path, fields):
  tensors = weights() if "model_type" in fields else native()
  tensors.pop(HEAD, None)
  with pytest.raises(ValueError, match=f"missing: {HEAD}$"):
    abstract_pretrained(checkpoint(tmp_path, fields, tensors))


def test_convolution_without_bias_has_a_bias_of_zero(tmp_path):
  tensors = {k: v for k, v in weights().items() if "conv1d.bias" not in k}
  fields = HF | {"use_conv_bias": False}
  model = load_pretrained(checkpoint(tmp_path, fields, tensors))
  np.testing.assert_array_equal(model.blocks[0].mixer.conv_bias[...], 0)
  np.testing.assert_array_equal(
    model.blocks[0].mixer.conv_weight[...],
    whole_model().blocks[0].mixer.conv_weight[...],
  )


@pytest.mark.parametrize(
  ("fields", "kind", "message"),
  [
    (HF | {"model_type": "jamba"}, NotImplementedError, "model_type 'jamba'"),
    (HF | {"use_bias": True}, NotImplementedError, "use_bias is true"),
    (HF | {"hidden_act": "gelu"}, NotImplementedError, "hidden_act is 'gelu'"),
    (HF | {"intermediate_size": 40}, NotImplementedError, "no multiple of"),
    (HF | {"quantization_config": {}}, NotImplementedError, "quantised"),
    (HF | {"hidden_size": None}, ValueError, "hidden_size is None, expected"),
    (HF | {"state_size": 4.0}, ValueError, "state_size is 4.0, expected an"),
    (HF | {"layer_norm_epsilon": "x"}, ValueError, "layer_norm_epsilon is "),
    (NATIVE | {"ssm_cfg": {"layer": "Mamba3"}}, NotImplementedError, "Mamba3"),
    (NATIVE | {"ssm_cfg": {"bias": True}}, NotImplementedError, "cfg.bias is"),
    (NATIVE | {"ssm_cfg": {"gate": 1}}, NotImplementedError, "ssm_cfg.gate"),
    (NATIVE | {"ssm_cfg": 7}, ValueError, "ssm_cfg is 7"),
    (NATIVE | {"rms_norm": False}, NotImplementedError, "LayerNorm"),
    (NATIVE | {"attn_layer_idx": [1]}, NotImplementedError, "attention"),
    (NATIVE | {"d_intermediate": 64}, NotImplementedError, "MLP"),
    (NATIVE | {"bidirectional": True}, NotImplementedError, "bidirectional"),
    ({"dim": 16}, NotImplementedError, "model_type None"),
  ],
)  # fmt: skip
def test_model_that_is_not_here_is_refused_by_what_it_lacks(
  tmp_path, fields, kind, message
):
  with pytest.raises(kind, match=message):
    abstract_pretrained(checkpoint(tmp_path, fields, {}))


def test_seven_billion_parameters_are_checked_by_shapes_alone(tmp_path):
  config = HF | {
    "vocab_size": 65024,
    "hidden_size": 4096,
    "intermediate_size": 8192,
    "num_hidden_layers": 64,
    "state_size": 16,
    "time_step_rank": 256,
  }
  folder = checkpoint(tmp_path, config, {})
  (folder / "model.safetensors").unlink()
  hollow(folder, shapes_of(config), "BF16", files=3)
  model = abstract_pretrained(folder, dtype=jnp.bfloat16)
  leaves = jax.tree.leaves(model)
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
  assert model.blocks[0].mixer.in_proj.shape == (64, 4096, 16384)
  assert 7.0e9 < sum(leaf.size for leaf in leaves) < 7.1e9


def test_host_holds_no_more_than_one_tensor(tmp_path):
  config = HF | {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 24,
    "time_step_rank": 16,
  }
  folder = checkpoint(tmp_path, config, {})
  (folder / "model.safetensors").unlink()
  shapes = shapes_of(config)
  hollow(folder, shapes, "F32", files=2)
  largest = 4 * max(math.prod(shape) for shape in shapes.values())
  whole = 4 * sum(math.prod(shape) for shape in shapes.values())
  load_pretrained(folder)  # What compiling leaves behind is not counted.
  tracemalloc.start()
  model = load_pretrained(folder)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert sum(leaf.nbytes for leaf in jax.tree.leaves(model)) == whole
  # Python's own objects, of 24 layers' names and shapes, are about 1 MB.
  assert peak < largest + 2e6 < whole / 10


def test_loaded_model_generates(tmp_path):
  model = load_pretrained(checkpoint(tmp_path, HF, weights()))
  prompt = published()["tokens"][:, :5]
  tokens = generate(model, prompt, 2)
  # The likeliest tokens, one after the other, of the published logits.
  np.testing.assert_array_equal(tokens[:, 0], forward(model)[:, 4].argmax(-1))


def test_rows_that_pad_a_published_vocabulary_are_not_generated(tmp_path):
  model = load_pretrained(checkpoint(tmp_path / "a", NATIVE, native()))
  assert model.config.true_vocab_size == 27
  # Of 32 rows the last 5 are no tokens, and here likelier than the others.
  model.embedding = nnx.Param(model.embedding[...].at[27:].multiply(100.0))
  logits = forward(model)
  assert (logits.argmax(-1) >= 27).any()
  found = generate(model, [[1, 2]], 8, key=jax.random.key(0), temperature=9.0)
  assert int(found.max()) < 27
  # Saved natively it is as it was.
  save_pretrained(tmp_path / "b", model, format="native")
  fields = json.loads((tmp_path / "b" / "config.json").read_text())
  assert (fields["vocab_size"], fields["pad_vocab_size_multiple"]) == (27, 8)
  # In transformers' form the tokenizer beside it tells.
  save_pretrained(tmp_path / "c", model)
  assert load_pretrained(tmp_path / "c").config.true_vocab_size is None
  for text, expected in [
    ({"model": {"vocab": {"a": 0, "b": 20}}, "added_tokens": [{"id": 22}]}, 23),
    ({"model": {"vocab": [["a", 0.5], ["b", 0.1]]}}, 2),
    ({"model": {"vocab": {"a": 40}}}, None),
    ({"model": []}, None),
  ]:
    (tmp_path / "c" / "tokenizer.json").write_text(json.dumps(text))
    config = abstract_pretrained(tmp_path / "c").config
    assert config.true_vocab_size == expected
