"""Losses with training's signature: (sum, weight, metric sums)."""

import jax.numpy as jnp

from ssmjax import ops
from ssmjax.models.lm import LanguageModel
from ssmjax.types import Array, Float, Int, check_shapes

__all__ = ["gather_labels", "labelled_loss"]


def labelled_loss(
  model: LanguageModel, batch: dict[str, Array], key: Array | None = None
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Array]]:
  """Cross-entropy at labelled positions, gathered before the projection.

  Dense logits are most of the memory and of the work of a small model on a
  large vocabulary: at 64 labels in 1024 tokens, gathering first does 1/16.

  Args:
    model: the language model.
    batch: `tokens [B, T]`, `positions [B, Q]` of the labels and their
      `targets [B, Q]`; optionally `weights [B, Q]` and `segment_ids [B, T]`.
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
  features = jnp.take_along_axis(features, batch["positions"][..., None], 1)
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
    labels: `[B, T]` int, `ignore` where there is no label.
    max_labels: Q, the most labels a row can have; more are dropped, last
      first.
    ignore: the value of an unlabelled position.

  Returns:
    `positions`, `targets`, `weights`, all `[B, Q]`; weight 0 fills up rows
    with fewer labels.
  """
  labelled = labels != ignore
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
