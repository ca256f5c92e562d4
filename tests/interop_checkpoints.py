"""Small checkpoints in the published formats, of the golden weights."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from checks import TOLERANCE, rms_error
from flax import nnx

from ssmjax.models import (
  LanguageModel,
  MambaConfig,
  ModelConfig,
)

GOLDEN = pathlib.Path(__file__).with_name("golden") / "mamba.npz"
# As state-spaces/mamba-130m-hf has it, stale fields too.
HF = {
  "architectures": ["MambaForCausalLM"],
  "model_type": "mamba",
  "d_model": 768,
  "n_layer": 24,
  "vocab_size": 32,
  "hidden_size": 16,
  "intermediate_size": 32,
  "num_hidden_layers": 2,
  "state_size": 4,
  "conv_kernel": 4,
  "expand": 2,
  "time_step_rank": 3,
  "layer_norm_epsilon": 1e-5,
  "hidden_act": "silu",
  "use_bias": False,
  "use_conv_bias": True,
  "residual_in_fp32": True,
  "pad_vocab_size_multiple": 8,
  "torch_dtype": "float32",
}
# As state-spaces/mamba-130m has it; 27 is rounded up to 32.
NATIVE = {
  "d_model": 16,
  "n_layer": 2,
  "vocab_size": 27,
  "ssm_cfg": {"d_state": 4, "dt_rank": 3},
  "rms_norm": True,
  "residual_in_fp32": True,
  "fused_add_norm": True,
  "pad_vocab_size_multiple": 8,
}
HEAD, EMBEDDING = "lm_head.weight", "backbone.embeddings.weight"
LAYER = "backbone.layers.{}.mixer."
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8"}


@functools.cache
def published():
  with np.load(GOLDEN) as golden:
    return dict(golden)


def weights():
  """The golden weights under their published names."""
  return {
    name.removeprefix("weight:"): array
    for name, array in published().items()
    if name.startswith("weight:") and HEAD not in name
  }


def native():
  """The same as the mamba_ssm package names them, the head twice."""
  tensors = weights()
  embedding = tensors.pop(EMBEDDING)
  return tensors | {"backbone.embedding.weight": embedding, HEAD: embedding}


@functools.cache
def whole_model():
  """The golden model, by hand."""
  config = ModelConfig(
    vocab_size=32,
    d_model=16,
    n_layers=2,
    mixers=(MambaConfig(d_state=4, dt_rank=3),),
  )
  model = jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
  tensors = weights()
  ours = {
    "in_proj": ("in_proj.weight", np.transpose),
    "conv_weight": ("conv1d.weight", lambda x: x[:, 0].T),
    "conv_bias": ("conv1d.bias", np.asarray),
    "x_proj": ("x_proj.weight", np.transpose),
    "dt_proj": ("dt_proj.weight", np.transpose),
    "dt_bias": ("dt_proj.bias", np.asarray),
    "A_log": ("A_log", np.asarray),
    "D": ("D", np.asarray),
    "out_proj": ("out_proj.weight", np.transpose),
  }
  block = model.blocks[0]
  for name, (theirs, change) in ours.items():
    stack = [change(tensors[LAYER.format(i) + theirs]) for i in range(2)]
    setattr(block.mixer, name, nnx.Param(jnp.asarray(np.stack(stack))))
  norms = [tensors[f"backbone.layers.{i}.norm.weight"] for i in range(2)]
  block.norm.scale = nnx.Param(jnp.asarray(np.stack(norms)))
  model.norm.scale = nnx.Param(jnp.asarray(tensors["backbone.norm_f.weight"]))
  model.embedding = nnx.Param(jnp.asarray(tensors[EMBEDDING]))
  return model


def forward(model):
  tokens = published()["tokens"] % model.config.vocab_size
  return _forward(model, tokens)


@functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
def _forward(model, tokens):
  return model(tokens)[0]


def assert_published(model):
  logits = forward(model)
  assert rms_error(logits, published()["logits"]) <= TOLERANCE[logits.dtype]


def assert_same(found, expected):
  """Bit by bit."""
  found, expected = named(found), named(expected)
  assert found.keys() == expected.keys()
  for name, leaf in found.items():
    assert leaf.dtype == expected[name].dtype
    np.testing.assert_array_equal(leaf, expected[name], err_msg=name)


def named(model):
  return {
    jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(
      ".value"
    ): leaf
    for path, leaf in jax.tree.leaves_with_path(model)
  }


def checkpoint(folder, fields, tensors):
  """A folder as the Hub gives it."""
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(fields))
  write(folder / "model.safetensors", tensors)
  return folder


def write(path, tensors):
  """A safetensors file, in the words of the format's own page."""
  header, data = {"__metadata__": {"format": "pt"}}, b""
  for name, array in tensors.items():
    place = [len(data), len(data) + array.nbytes]
    header[name] = {
      "dtype": CODES[array.dtype.name],
      "shape": list(array.shape),
      "data_offsets": place,
    }
    data += array.tobytes()
  raw(path, json.dumps(header).encode(), data)


def raw(path, header, data):
  path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def shard(folder, parts):
  table = {}
  for file, tensors in parts.items():
    write(folder / file, tensors)
    table |= dict.fromkeys(tensors, file)
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": table}))


def hollow(folder, shapes, code, files):
  """Shards of zeros that take no room on the disk."""
  names, table = list(shapes), {}
  for i in range(files):
    header, end = {}, 0
    for name in names[i::files]:
      size = math.prod(shapes[name]) * {"F32": 4, "BF16": 2}[code]
      header[name] = {
        "dtype": code,
        "shape": shapes[name],
        "data_offsets": [end, end + size],
      }
      end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = folder / f"model-{i}.safetensors"
    with open(path, "wb") as file:
      file.write(len(text).to_bytes(8, "little") + text)
      file.truncate(8 + len(text) + end)
    table |= dict.fromkeys(header, path.name)
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": table}))


def shapes_of(config):
  """Names and shapes of a transformers checkpoint of this configuration."""
  size, inner = config["hidden_size"], config["intermediate_size"]
  rank, states = config["time_step_rank"], config["state_size"]
  shapes = {
    EMBEDDING: (config["vocab_size"], size),
    "backbone.norm_f.weight": (size,),
  }
  for i in range(config["num_hidden_layers"]):
    shapes[f"backbone.layers.{i}.norm.weight"] = (size,)
    mixer = {
      "in_proj.weight": (2 * inner, size),
      "conv1d.weight": (inner, 1, 4),
      "conv1d.bias": (inner,),
      "x_proj.weight": (rank + 2 * states, inner),
      "dt_proj.weight": (inner, rank),
      "dt_proj.bias": (inner,),
      "A_log": (inner, states),
      "D": (inner,),
      "out_proj.weight": (size, inner),
    }
    shapes |= {LAYER.format(i) + name: x for name, x in mixer.items()}
  return shapes


def header_of(path):
  data = path.read_bytes()
  return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def dividing(mesh, spec, shape):
  """The axes of `spec` that divide their dimension."""
  return [
    axis if axis and size % mesh.shape[axis] == 0 else None
    for axis, size in zip(spec, shape, strict=True)
  ]
