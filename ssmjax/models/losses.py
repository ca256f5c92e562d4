"""Losses with training's signature: (sum, weight, metric sums)."""

import jax
import jax.numpy as jnp

from ssmjax import ops
from ssmjax.models.classifier import Classifier
from ssmjax.models.lm import LanguageModel
from ssmjax.ops.class_ids import known_ids
from ssmjax.types import Array, Float, Int, check_shapes

__all__ = ["classification_loss", "gather_labels", "labelled_loss"]


def classification_loss(
  model: Classifier,
  batch: dict[str, Array],
  key: Array | None = None,
  *,
  label_smoothing: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Array]]:
  """Cross-entropy of whole sequences' classes, and how many are right.

      Σ_b w_b ((1 - s) (-log p(label_b)) + s mean_c (-log p(c))),   float32

  Args:
    model: the classifier.
    batch: `inputs [B, T]` tokens or `[B, T, F]` features, `labels [B]` of any
      integer type; optionally `weights [B]`, 0 for rows that only fill up a
      batch, and `segment_ids [B, T]`, 0 for padding. A label outside
      0 … C - 1 gives NaN where its weight is not 0.
    key: not used; training passes one.
    label_smoothing: s in [0, 1), of Szegedy et al. 2016 (arXiv 1512.00567,
      §7). Another one compiles anew.

  Returns:
    The sum of losses, the sum of weights, and `{"accuracy": weight of right
    answers}`; of equal logits the first class is the answer.

  Raises:
    ValueError: an array of the wrong shape, labels that are no integers, or a
      label_smoothing out of range.
  """
  del key
  function = "classification_loss"
  if not 0 <= label_smoothing < 1:
    raise ValueError(
      f"{function}: label_smoothing is {label_smoothing}, expected 0 or more"
      " and below 1."
    )
  inputs, labels = batch["inputs"], batch["labels"]
  features = "B T" if model.config.n_features is None else "B T F"
  check_shapes(
    function,
    {
      "inputs": (inputs, features),
      "labels": (labels, "B"),
      "weights": (batch.get("weights"), "B"),
      "segment_ids": (batch.get("segment_ids"), "B T"),
    },
  )
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(
      f"{function}: labels has dtype {labels.dtype.name}, expected class"
      " numbers of an integer type. Of one-hot rows pass labels.argmax(-1)."
    )
  weights = batch.get("weights")
  if weights is None:
    weights = jnp.ones_like(labels, jnp.float32)
  weights = weights.astype(jnp.float32)
  counts = weights != 0
  pooled = model.features(inputs, batch.get("segment_ids"))
  # 0 · NaN would be NaN in the gradient of the head.
  pooled = jnp.where(counts[:, None], pooled, jnp.zeros_like(pooled))
  logits = model.logits(pooled)
  # The label's own log-probability, NaN where there is no such class.
  log_p = jax.nn.log_softmax(logits, -1)
  labels = known_ids(labels, logits.shape[-1])
  hit = labels[:, None] == jnp.arange(logits.shape[-1], dtype=jnp.int32)
  own = jnp.where(hit, log_p, jnp.zeros_like(log_p)).sum(-1)
  own = jnp.where(labels < logits.shape[-1], own, jnp.nan)
  nll = -own
  if label_smoothing:
    nll = (1 - label_smoothing) * nll - label_smoothing * log_p.mean(-1)
  loss = jnp.where(counts, weights * nll, jnp.zeros_like(nll)).sum()
  right = jnp.argmax(logits, -1).astype(labels.dtype) == labels
  correct = jnp.where(right, weights, jnp.zeros_like(weights)).sum()
  return loss, weights.sum(), {"accuracy": correct}


def labelled_loss(
  model: LanguageModel, batch: dict[str, Array], key: Array | None = None
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Array]]:
  """Cross-entropy at labelled positions, gathered before the projection.

  Dense logits are most of the memory and of the work of a small model on a
  large vocabulary: at 64 labels in 1024 tokens, gathering first does 1/16.

  Args:
    model: the language model.
    batch: `tokens [B, T]`, `positions [B, Q]` of the labels and their
      `targets [B, Q]`, of any integer type; optionally `weights [B, Q]` and
      `segment_ids [B, T]`. A position outside 0 … T - 1 and a target outside
      the vocabulary give NaN where their weight is not 0.
    key: not used; training passes one.

  Returns:
    The sum of losses, the sum of weights, and `{"accuracy": weight of right
    answers}`.
  """
  del key
  check_shapes(
    "labelled_loss",
    {
      "tokens": (batch["tokens"], "B T"),
      "positions": (batch["positions"], "B Q"),
      "targets": (batch["targets"], "B Q"),
      "weights": (batch.get("weights"), "B Q"),
    },
  )
  features, _ = model.features(
    batch["tokens"], segment_ids=batch.get("segment_ids")
  )
  # A negative position is not counted from the end.
  positions = known_ids(batch["positions"], features.shape[1])
  features = jnp.take_along_axis(
    features, positions[..., None], 1, mode="fill", fill_value=jnp.nan
  )
  features = features.astype(model.config.dtype)
  weights = batch.get("weights")
  if weights is None:
    weights = jnp.ones(batch["targets"].shape, jnp.float32)
  loss, correct = ops.linear_cross_entropy(
    features.reshape(-1, features.shape[-1]),
    model.unembedding,
    batch["targets"].reshape(-1),
    weights.reshape(-1),
    softcap=model.config.logit_softcap,
  )
  return loss, weights.sum(), {"accuracy": correct}


def gather_labels(
  labels: Int[Array, "B T"], max_labels: int, *, ignore: int = -100
) -> dict[str, Array]:
  """Turn dense labels into `positions`, `targets` and `weights`.

  Args:
    labels: `[B, T]`, of any integer type, `ignore` where there is no label.
    max_labels: Q, the most labels a row can have; more are dropped, last
      first.
    ignore: the value of an unlabelled position.

  Returns:
    `positions`, `targets`, `weights`, all `[B, Q]`; weight 0 fills up rows
    with fewer labels.
  """
  if labels.dtype.itemsize < 4:
    # Which cannot hold every `ignore`.
    labels = labels.astype(jnp.int32)
  never = ignore < 0 and jnp.issubdtype(labels.dtype, jnp.unsignedinteger)
  labelled = jnp.ones(labels.shape, bool) if never else labels != ignore
  order = jnp.argsort(~labelled, axis=1, stable=True)[:, :max_labels]
  weights = jnp.take_along_axis(labelled, order, 1)
  targets = jnp.take_along_axis(labels, order, 1)
  missing = max_labels - order.shape[1]
  fill = lambda x, dtype: jnp.pad(x.astype(dtype), ((0, 0), (0, missing)))
  return {
    "positions": fill(order, jnp.int32),
    "targets": fill(jnp.where(weights, targets, 0), jnp.int32),
    "weights": fill(weights, jnp.float32),
  }
