"""What a language model is measured by: held-out text, baselines, a sample."""

import functools
import lzma
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from experiments.lm_runs import Text
from ssmjax import data, models

__all__ = ["baselines", "held_out_metrics", "sample", "text_loss"]

# What xz can look back by at preset 9; beyond, it forgets the training text.
_LZMA_WINDOW = 64 * 2**20


def text_loss(model: models.LanguageModel, batch: dict, key=None):
  """The cross-entropy of all targets, with bits per byte among the metrics."""
  loss, weight, metrics = models.labelled_loss(model, batch, key)
  bits = data.bits_per_byte(loss, batch["bytes"])
  return loss, weight, metrics | {"bits_per_byte": bits}


def held_out_metrics(
  model: models.LanguageModel, source: data.TextSource, mesh: Mesh
) -> dict[str, float]:
  """Bits per byte and accuracy on all of a source, each byte once.

  Rows are cut every T tokens and begin without what came before: the figure is
  that of a context of at most T tokens, T / 2 in the mean.

  Args:
    model: the model, wherever it is.
    source: in order, with the last batch filled up.
    mesh: over which batches are divided.
  """
  model = jax.device_put(model, NamedSharding(mesh, jax.P()))
  rows = NamedSharding(mesh, jax.P("data"))
  place = lambda x: jax.make_array_from_process_local_data(rows, x)
  parts = [
    _sums(model, jax.tree.map(place, source[index]), mesh)
    for index in range(len(source))
  ]
  sums = np.asarray(jax.device_get(parts), np.float64).sum(0)
  bits, size, right, weight = sums.tolist()
  return {"bits_per_byte": bits / size, "accuracy": right / weight}


def baselines(text: Text) -> dict[str, float | None]:
  """Bits per byte of the same held-out text without a model.

  Returns:
    `unigram`: a code of the bytes and the ends of documents by how often they
    are in the training text. `zlib` and `lzma`: at their strongest, all
    held-out documents in one, without the training text. `lzma_after_train`:
    by how much lzma's code of the training text grows where they follow it;
    None where the text is more than it can look back.
  """
  train, held_out = text.train_documents, text.held_out_documents
  size = sum(map(len, held_out))
  joined = b"\0".join(held_out)
  packed = functools.partial(lzma.compress, preset=9 | lzma.PRESET_EXTREME)
  after = None
  if sum(map(len, train)) + size <= _LZMA_WINDOW:
    before = b"\0".join(train)
    whole = packed(before + b"\0" + joined)
    after = 8 * (len(whole) - len(packed(before))) / size
  return {
    "unigram": _unigram(train, held_out) / size,
    "zlib": 8 * len(zlib.compress(joined, 9)) / size,
    "lzma": 8 * len(packed(joined)) / size,
    "lzma_after_train": after,
  }


def sample(
  model: models.LanguageModel,
  text: Text,
  seed: int,
  *,
  prompt: str | None = None,
  prompt_tokens: int = 64,
  tokens: int = 256,
  temperature: float = 0.8,
) -> dict[str, Any]:
  """Let a model go on with a text.

  Args:
    model: the model.
    text: has the tokenizer, and the held-out document that is gone on with.
    seed: of the sampling.
    prompt: what to go on with; None takes the beginning of a held-out
      document, "" begins a new one.
    prompt_tokens: of that document.
    tokens: how many to sample.
    temperature: of the sampling.
  """
  if prompt is None:
    first = text.held_out.tokens[: text.held_out.lengths[0]]
    ids = first[:prompt_tokens].astype(np.int32)
  else:
    ((found, _),) = text.tokenizer.encode([prompt.encode()])
    ids = found.astype(np.int32)
  ids = np.concatenate([[np.int32(text.tokenizer.boundary)], ids])
  # One device's copy of the parameters: the others need not do the same.
  model = jax.device_put(jax.device_get(model), jax.local_devices()[0])
  new = models.generate(
    model,
    jnp.asarray(ids)[None],
    tokens,
    key=jax.random.key(seed),
    temperature=temperature,
  )
  return {
    "prompt": text.tokenizer.decode(ids),
    "text": text.tokenizer.decode(np.asarray(new)[0]),
    "temperature": temperature,
  }


@functools.partial(jax.jit, static_argnames="mesh")
def _sums(model, batch, mesh):
  """Bits, bytes, right answers and targets of a batch, over all devices."""

  def sums(model, batch):
    _, weight, metrics = text_loss(model, batch)
    bits, size = metrics["bits_per_byte"]
    return jax.lax.psum((bits, size, metrics["accuracy"], weight), "data")

  return jax.shard_map(
    sums, mesh=mesh, in_specs=(jax.P(), jax.P("data")), out_specs=jax.P()
  )(model, batch)


def _unigram(train, held_out) -> float:
  """Bits of the held-out bytes and ends, by add-one counts of training."""
  counts = np.ones(257)
  for document in train:
    counts[:256] += np.bincount(
      np.frombuffer(document, np.uint8), minlength=256
    )
  counts[256] += len(train)
  bits = -np.log2(counts / counts.sum())
  total = len(held_out) * bits[256]
  for document in held_out:
    total += bits[np.frombuffer(document, np.uint8)].sum()
  return float(total)
