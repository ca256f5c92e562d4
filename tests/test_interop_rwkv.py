"""RWKV-4 loads as it is published, and goes back."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from flax import nnx
from interop_checkpoints import assert_same, checkpoint

from ssmjax.interop import (
  abstract_pretrained,
  load_pretrained,
  save_pretrained,
)
from ssmjax.interop.folders import read_tensors
from ssmjax.models import (
  LanguageModel,
  ModelConfig,
  RWKV4Config,
  RWKVChannelMixConfig,
)
from ssmjax.types import Polarization

GOLDEN = pathlib.Path(__file__).with_name("golden") / "rwkv4_model.npz"
# As RWKV/rwkv-4-169m-pile has it.
FIELDS = {
  "architectures": ["RwkvForCausalLM"],
  "attention_hidden_size": 8,
  "bos_token_id": 0,
  "context_length": 1024,
  "eos_token_id": 0,
  "hidden_size": 6,
  "intermediate_size": 10,
  "layer_norm_epsilon": 1e-05,
  "model_type": "rwkv",
  "num_hidden_layers": 2,
  "rescale_every": 6,
  "tie_word_embeddings": False,
  "torch_dtype": "float32",
  "use_cache": True,
  "vocab_size": 13,
}
CONFIG = ModelConfig(
  vocab_size=13,
  d_model=6,
  n_layers=4,
  mixers=(RWKV4Config(8), RWKVChannelMixConfig(10)),
  final_norm="layer",
  block_norm="layer",
  embedding_norm=True,
  tie_embeddings=False,
)


def test_rwkv4_of_transformers_gives_the_published_logits(tmp_path):
  golden = published()
  model = load_pretrained(checkpoint(tmp_path / "in", FIELDS, arrays("weight")))
  assert model.config == CONFIG

  def loss(model):
    logits, _ = model(golden["tokens"])
    chosen = jax.nn.log_softmax(logits[:, :-1])
    chosen = jnp.take_along_axis(chosen, golden["tokens"][:, 1:, None], -1)
    return -chosen.mean(), logits

  grads, logits = quick(jax.grad(loss, has_aux=True))(model)
  assert_close(logits, golden["logits"], jnp.float32)
  # A gradient is a model too, and gets its published names on the way out.
  save_pretrained(tmp_path / "gradient", grads)
  found = read_tensors(tmp_path / "gradient" / "model.safetensors")
  for name, gradient in arrays("gradient").items():
    assert_close(found[name], gradient, jnp.float32, name)


def test_rwkv4_goes_out_as_it_came_in(tmp_path):
  folder = checkpoint(tmp_path / "in", FIELDS, arrays("weight"))
  model = load_pretrained(folder)
  save_pretrained(tmp_path / "out", model)
  found = read_tensors(tmp_path / "out" / "model.safetensors")
  expected = arrays("weight")
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(found[name], array, err_msg=name)
  fields = json.loads((tmp_path / "out" / "config.json").read_text())
  assert {name: FIELDS[name] for name in fields} == fields
  assert_same(load_pretrained(tmp_path / "out"), model)


def test_what_decides_about_rwkv4s_decays_stays_float32(tmp_path):
  folder = checkpoint(tmp_path, FIELDS, arrays("weight"))
  model = abstract_pretrained(folder, dtype=jnp.bfloat16)
  mixer = model.blocks[0].mixer
  assert mixer.k_proj.dtype == jnp.bfloat16
  for name in ("time_decay", "bonus", "mix_key"):
    assert getattr(mixer, name).dtype == jnp.float32


def test_widths_of_rwkv4_may_be_left_out(tmp_path):
  fields = FIELDS | {"attention_hidden_size": None, "num_hidden_layers": 1}
  del fields["intermediate_size"]
  config = dataclasses.replace(
    CONFIG, n_layers=2, mixers=(RWKV4Config(6), RWKVChannelMixConfig(24))
  )
  model = jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), model)
  save_pretrained(tmp_path / "model", zeros)
  (tmp_path / "model" / "config.json").write_text(json.dumps(fields))
  assert abstract_pretrained(tmp_path / "model").config == config


def test_wrong_tensors_of_rwkv4_are_all_named(tmp_path):
  tensors = arrays("weight")
  time = "rwkv.blocks.1.attention.time_decay"
  del tensors["rwkv.blocks.0.pre_ln.bias"]
  tensors[time] = tensors[time][1:]
  tensors["rwkv.blocks.1.pre_ln.bias"] = np.zeros(6, np.float32)
  with pytest.raises(ValueError, match="are not those of a Rwkv") as error:
    load_pretrained(checkpoint(tmp_path, FIELDS, tensors))
  for line in (
    "missing: rwkv.blocks.0.pre_ln.bias",
    f"misshapen: {time} has shape (7,), expected (8,)",
    "unused: rwkv.blocks.1.pre_ln.bias",
  ):
    assert line in str(error.value)


def test_epsilon_that_the_last_norm_would_not_have_is_refused(tmp_path):
  fields = FIELDS | {"layer_norm_epsilon": 1e-3}
  with pytest.raises(NotImplementedError, match="layer_norm_epsilon is 0"):
    load_pretrained(checkpoint(tmp_path, fields, arrays("weight")))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"block_norm": "rms"}, "block_norm='rms'"),
    ({"embedding_norm": False}, "embedding_norm=False"),
    ({"norm_epsilon": 1e-3}, r"norm_epsilon=0.001 \(its readers take 1e-05"),
    ({"mlp_ratio": 2}, "an MLP in each block, mlp_ratio=2"),
    ({"mixers": (RWKV4Config(),)}, "a block of RWKV4Config, RWKV4Config"),
    (
      {
        "mixers": (
          RWKV4Config(polarization=Polarization(ones=1)),
          RWKVChannelMixConfig(),
        )
      },
      "channels whose decay is not learned",
    ),
    (
      {
        "mixers": (
          *(RWKV4Config(8), RWKVChannelMixConfig()),
          *(RWKV4Config(), RWKVChannelMixConfig()),
        )
      },
      "layers of different sizes",
    ),
  ],
)
def test_rwkv4_that_the_format_cannot_hold_is_not_saved(
  tmp_path, changes, message
):
  config = dataclasses.replace(CONFIG, **changes)
  model = jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
  with pytest.raises(NotImplementedError, match=message):
    save_pretrained(tmp_path / "model", model)


def arrays(sort):
  """The golden file's arrays under their published names."""
  return {
    name.removeprefix(f"{sort}:"): array
    for name, array in published().items()
    if name.startswith(f"{sort}:")
  }


@functools.cache
def published():
  with np.load(GOLDEN) as golden:
    return dict(golden)
