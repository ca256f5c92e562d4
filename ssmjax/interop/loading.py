"""Published checkpoints in: configuration, names and tensors to a model."""

import contextlib
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import (
  AxisType,
  Mesh,
  NamedSharding,
)

from ssmjax.interop.folders import read_tensors
from ssmjax.interop.naming import parameter_name
from ssmjax.interop.planning import make_plan
from ssmjax.interop.stacking import cut, insert
from ssmjax.models import LanguageModel
from ssmjax.models.parameters import shardings_of
from ssmjax.models.tensor_files import copy_piece

__all__ = ["abstract_pretrained", "load_pretrained"]


def load_pretrained(
  path: str | os.PathLike,
  *,
  revision: str | None = None,
  sharding: Any = None,
  dtype: Any = None,
) -> LanguageModel:
  """Load a published checkpoint from its folder, or from the Hub.

  The folder is what the Hugging Face Hub gives: `config.json` (or
  `params.json`) beside `model.safetensors` or, in shards,
  `model.safetensors.index.json`; where there is neither,
  `consolidated.safetensors` or `pytorch_model.bin`, the latter through
  PyTorch's weights-only reader, if it is installed: a pickle's code is never
  run. Known are

  - Mamba of the mamba_ssm package (`state-spaces/mamba-130m`), whose
    vocabulary is rounded up to a multiple of `pad_vocab_size_multiple`;
  - Mamba of transformers (`state-spaces/mamba-130m-hf`), and FalconMamba
    (`tiiuae/falcon-mamba-7b`);
  - Mamba-2 of the mamba_ssm package (`state-spaces/mamba2-130m`), of
    transformers, and as Mistral publishes it
    (`mistralai/Mamba-Codestral-7B-v0.1`, in both its forms);
  - of transformers, GPT-NeoX (`EleutherAI/pythia-160m`), RecurrentGemma
    (`google/recurrentgemma-2b`) and Mistral (`mistralai/Mistral-7B-v0.1`),
    Mistral's own form too. Their attention layers get room for `max_length`
    tokens from `init_state`;
  - RWKV-4 of transformers (`RWKV/rwkv-4-169m-pile`), of whose blocks each half
    is a layer here.

  What alters the model in a configuration of transformers 5.23 or of the
  packages is followed or refused. Passed over are fields of training, of
  generation and of lengths: dropout, initial values, tokens' numbers,
  `max_position_embeddings`; a residual is float32 whatever is said of it.

  `"org/name"` is that folder if there is one, and else the repository, which
  `huggingface_hub` fetches or finds in its cache (pip install 'ssmjax[hub]'):
  safetensors, configurations and the tokenizer, `.bin` where there is nothing
  else. Without a network, or with `HF_HUB_OFFLINE=1`, the cache alone is read.

  A RecurrentGemma attends to `attention_window_size` tokens, itself among
  them, as in transformers; Google's own code attends to one more. To have
  that, write 2049 in place of 2048 into the config.json of the folder.

  Tensors go one by one from the file into arrays of the model's own layout on
  the devices: the host has to hold one tensor of one layer (a device's piece
  of it, if it is sharded), or, of a `.bin` that cannot be mapped, one file
  (two to compare an output matrix with the embedding in another).

  Args:
    path: the folder, or a repository of the Hub as `"org/name"`.
    revision: a repository's branch, tag or commit; None for the main branch.
    sharding: where the parameters go: a `jax.sharding.Sharding` for all of
      them, a tree with one for each, or a function of the abstract model (as
      `abstract_pretrained` gives it) to such a tree; single-device and named
      ones. None: the first device, or within `jax.set_mesh` all of its mesh.
    dtype: of activations and of the weights of projections; None for float32.
      What decides about decays and the residual stays float32: A_log, D, the
      bias of Δ, norms, the convolution, the embedding. To train with
      activations in bfloat16, make the weights float32 again:
      `jax.tree.map(lambda x: x.astype(jnp.float32), model)`.

  Returns:
    The model; `save_pretrained` is the way back. Its `config.origin` is the
    folder, out of which that takes the tokenizer and the special tokens.

  Raises:
    ValueError: no such folder; a file that is not whole; a configuration with
      a field missing or wrong; tensors that are missing, unused or misshapen,
      all of them by name.
    NotImplementedError: a kind of model, or a feature of it, that is not here,
      by name: biases of projections, quantised weights, an output matrix that
      is not the embedding where the configuration ties them.
    ImportError: only a `.bin` is there, and PyTorch is not installed; or there
      is no such folder, and huggingface_hub is not installed.
  """
  plan = make_plan(path, revision, dtype)
  _check_head(plan)
  shardings = shardings_of("load_pretrained", plan.model, sharding)
  automatic = {name: _automatic(kind) for name, kind in shardings.items()}
  found: dict[str, jax.Array] = {}
  for file, names in plan.files.items():
    tensors = read_tensors(file)
    for name in names:
      if name in plan.places:
        _put(found, tensors[name], plan, plan.places[name], automatic)
    del tensors  # Before the next file is opened.
  for place in plan.absent:
    _put(found, None, plan, place, automatic)
  return jax.tree.map_with_path(
    lambda path, _: _resharded(
      found[parameter_name(path)], shardings[parameter_name(path)]
    ),
    plan.model,
  )


def abstract_pretrained(
  path: str | os.PathLike,
  *,
  revision: str | None = None,
  dtype: Any = None,
) -> LanguageModel:
  """Check a published checkpoint and show the model that it would be.

  Reads its configuration and the headers of its files, no tensor, and checks
  all of what `load_pretrained` checks but the output matrix. A repository of
  the Hub is fetched whole.

  Args:
    path: as `load_pretrained` takes it.
    revision: likewise.
    dtype: likewise.

  Returns:
    The model with `jax.ShapeDtypeStruct`s for arrays.

  Raises:
    ValueError: as `load_pretrained`.
    NotImplementedError: likewise.
    ImportError: likewise.
  """
  return make_plan(path, revision, dtype).model


def _check_head(plan):
  """Refuse an output matrix that is not the embedding, by its values."""
  if plan.head is None:
    return
  opened = {}
  for name in plan.head:
    file = next(f for f, names in plan.files.items() if name in names)
    opened[name] = read_tensors(file)[name]
  head, embedding = (opened[name] for name in plan.head)
  same = head.shape == embedding.shape and head.dtype == embedding.dtype
  width = math.prod(embedding.shape[1:]) * embedding.dtype.itemsize
  rows = max(1, 2**24 // max(1, width))
  for start in range(0, embedding.shape[0], rows) if same else ():
    # Bit by bit, for NaN too is equal to itself.
    a, b = (
      np.ascontiguousarray(x[start : start + rows]).view(np.uint8)
      for x in (head, embedding)
    )
    if not np.array_equal(a, b):
      same = False
      break
  if not same:
    raise NotImplementedError(
      f"load_pretrained: {plan.head[0]} is not {plan.head[1]}, though the"
      " configuration ties them (tie_word_embeddings or tie_embeddings); say"
      " false there if the model was trained with two matrices."
    )


def _put(found, tensor, plan, place, shardings):
  """Put one tensor where it belongs, straight from the file."""
  shape = plan.shapes[place.parameter]
  sharding = shardings[place.parameter]
  size = shape.shape if place.layer is None else shape.shape[1:]
  fill = _filler(place, tensor)
  part = sharding
  if place.layer is not None and isinstance(sharding, NamedSharding):
    part = NamedSharding(
      sharding.mesh,
      jax.P(*sharding.spec[1:]),
      memory_kind=sharding.memory_kind,
    )
  array = jax.make_array_from_callback(
    size,
    part,
    lambda index: cut(fill, index, size, place.entry.part, shape.dtype),
  )
  if place.layer is None:
    found[place.parameter] = array
    return
  with _on_mesh_of(sharding):
    if place.parameter not in found:
      found[place.parameter] = jnp.zeros(
        shape.shape, shape.dtype, device=sharding
      )
    found[place.parameter] = insert(sharding, place.entry.part)(
      found[place.parameter], array, np.int32(place.layer)
    )
  # Or the host would read ahead, and hold what the device has yet to take.
  found[place.parameter].block_until_ready()


def _on_mesh_of(sharding):
  """Within `jax.set_mesh`, computations have to be on the mesh that is set."""
  if isinstance(sharding, NamedSharding) and not jax.sharding.get_mesh().empty:
    return jax.set_mesh(sharding.mesh)
  return contextlib.nullcontext()


def _filler(place, tensor):
  """Make what copies a piece of a tensor, or of its default, to an array."""
  layout = place.entry.layout
  if tensor is None:
    whole = np.float32(place.entry.default)
    return lambda out, index: np.copyto(out, whole, casting="unsafe")
  if layout.piece is None:
    whole = layout.take(np.asarray(tensor))
    return lambda out, index: np.copyto(out, whole[index], casting="unsafe")
  return lambda out, index: copy_piece(
    layout.give(out), tensor, layout.piece(index)
  )


def _automatic(sharding):
  """The same places on a mesh of automatic axes.

  On explicit ones a layer cannot be put into a stack whose layers are divided.
  """
  if not isinstance(sharding, NamedSharding):
    return sharding
  mesh = sharding.mesh
  kinds = (AxisType.Auto,) * len(mesh.axis_names)
  return NamedSharding(
    Mesh(mesh.devices, mesh.axis_names, axis_types=kinds),
    sharding.spec,
    memory_kind=sharding.memory_kind,
  )


def _resharded(array, sharding) -> jax.Array:
  """The array as one of `sharding`, which has it in the same places."""
  return jax.make_array_from_single_device_arrays(
    array.shape, sharding, [shard.data for shard in array.addressable_shards]
  )
