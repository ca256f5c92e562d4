"""A classifier of sequences around any mixer: embed, blocks, pool, head."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from ssmjax.models.attention import token_positions
from ssmjax.models.blocks import NORMS, apply_blocks, embed_tokens, stack_blocks
from ssmjax.models.config import ClassifierConfig
from ssmjax.models.config_json import describe_config, read_config
from ssmjax.models.layers import (
  LayerNorm,
  clear_padding,
  dense,
  linear_weight,
  normal,
)
from ssmjax.models.module import Module
from ssmjax.ops.segments import last_valid
from ssmjax.types import (
  Array,
  Float,
  Int,
  check_inexact,
  check_segment_ids,
  check_shapes,
  register_model,
)

__all__ = ["Classifier"]


@register_model("classifier")
class Classifier(Module):
  """Classes of whole sequences, of tokens or of real features.

  x = E[tokens] or W features + b;  x = blocks(x);
  logits = W_head pool(norm(x)) + b_head

  The pool is the mean over a row's tokens, or its last token, or a learned
  token that is appended to the row, behind its last one (with causal mixers
  it is the one that has seen all; in the image experiments of Wang et al.
  2025 it stands there). Padding, wherever it is, takes no part. A row is one
  sequence: for packed ones, pass a row for each.

  >>> config = ClassifierConfig(10, d_model=8, n_layers=2, n_features=3)
  >>> model = Classifier(config, rngs=nnx.Rngs(0))
  >>> model(jnp.zeros((4, 32, 3))).shape
  (4, 10)
  """

  def __init__(self, config: ClassifierConfig, *, rngs: nnx.Rngs):
    self.config = config
    size = config.d_model
    zeros = lambda n: nnx.Param(jnp.zeros(n, jnp.float32), weight_decay=False)
    key = rngs.params()
    tokens, features = config.vocab_size, config.n_features
    self.embedding = (
      None if tokens is None else nnx.Param(normal(key, (tokens, size)))
    )
    self.in_proj = (
      None
      if features is None
      else nnx.Param(linear_weight(key, features, size, config.init))
    )
    self.in_bias = None if features is None else zeros(size)
    self.positions = (
      None
      if config.max_positions is None
      else nnx.Param(normal(rngs.params(), (config.max_positions, size)))
    )
    self.class_token = (
      nnx.Param(normal(rngs.params(), (size,), 1.0), weight_decay=False)
      if config.pooling == "token"
      else None
    )
    self.blocks = stack_blocks(config, rngs)
    epsilon = config.norm_epsilon
    self.norm = NORMS[config.final_norm](size, epsilon=epsilon)
    self.embedding_norm = (
      LayerNorm(size, epsilon=epsilon) if config.embedding_norm else None
    )
    self.head = nnx.Param(
      linear_weight(rngs.params(), size, config.n_classes, config.init)
    )
    self.head_bias = zeros(config.n_classes)

  def __call__(
    self,
    inputs: Int[Array, "B T"] | Float[Array, "B T F"],
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> Float[Array, "B C"]:
    """Classify rows.

    Args:
      inputs: tokens `[B, T]` int, an id outside the vocabulary gives NaN; or
        features `[B, T, F]`.
      segment_ids: `[B, T]` int, 1 at tokens and 0 at padding (left, right or
        between).

    Returns:
      logits `[B, C]`, float32; of a row of padding alone, those of zeros (with
      a class token, of that token).

    Raises:
      ValueError: inputs of another shape or dtype than the configuration's.
    """
    return self.logits(self.features(inputs, segment_ids))

  def features(
    self,
    inputs: Int[Array, "B T"] | Float[Array, "B T F"],
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> Float[Array, "B M"]:
    """What is pooled of each row, before the head."""
    self._check(inputs, segment_ids)
    ids = segment_ids
    if ids is None:
      ids = jnp.ones(inputs.shape[:2], jnp.int32)
    ids = (ids > 0).astype(jnp.int32)
    x = clear_padding(self._embed(inputs, ids), ids)
    if self.embedding_norm is not None:
      x = clear_padding(self.embedding_norm(x), ids)
    if self.class_token is not None:
      token = self.class_token[...].astype(x.dtype)
      token = jnp.broadcast_to(token, (x.shape[0], 1, x.shape[2]))
      x = jnp.concatenate([x, token], 1)
      ids = jnp.pad(ids, ((0, 0), (0, 1)), constant_values=1)
    # Without padding, mixers need not look for it.
    inside = None if segment_ids is None else ids
    x, _ = apply_blocks(self.blocks, x, None, inside, remat=self.config.remat)
    return _pool(self.norm(x), ids, self.config.pooling)

  def logits(self, features: Float[Array, "B M"]) -> Float[Array, "B C"]:
    """Project pooled features to classes, float32."""
    y = dense(features.astype(self.config.dtype), self.head[...])
    return y.astype(jnp.float32) + self.head_bias[...]

  def description(self) -> dict[str, Any] | None:
    """Describe the model as JSON, see `LanguageModel.description`."""
    return describe_config(self.config)

  @classmethod
  def from_description(
    cls, description: dict[str, Any], *, rngs: nnx.Rngs
  ) -> "Classifier":
    """Build the model that was described, with fresh parameters."""
    return cls(read_config(description, ClassifierConfig), rngs=rngs)

  def _embed(self, inputs, ids):
    """Tokens or features, and positions, `[B, T, M]` float32."""
    if self.embedding is not None:
      x = embed_tokens(self.embedding[...], inputs)
    else:
      inputs = clear_padding(inputs, ids).astype(self.config.dtype)
      x = dense(inputs, self.in_proj[...]).astype(jnp.float32)
      x = x + self.in_bias[...]
    if self.positions is not None:
      _, position = token_positions(ids, jnp.zeros_like(ids[:, 0]))
      x = x + jnp.take(self.positions[...], position, axis=0, mode="fill")
    return x

  def _check(self, inputs, segment_ids):
    config = self.config
    letters = "B T"
    if config.n_features is not None:
      letters = f"B T F={config.n_features}"
      check_inexact("Classifier", inputs=inputs)
    elif not jnp.issubdtype(inputs.dtype, jnp.integer):
      raise ValueError(
        f"Classifier: inputs has dtype {inputs.dtype.name}, expected tokens of"
        " an integer type. For features, give n_features in place of"
        " vocab_size."
      )
    check_shapes(
      "Classifier",
      {"inputs": (inputs, letters), "segment_ids": (segment_ids, "B T")},
    )
    check_segment_ids("Classifier", segment_ids)
    if 0 in inputs.shape:
      raise ValueError(
        f"Classifier: inputs has shape {inputs.shape}, expected no empty axis."
      )


def _pool(x, ids, pooling):
  """One vector a row, `[B, M]`."""
  if pooling == "token":
    return x[:, -1]
  x = clear_padding(x, ids)
  if pooling == "mean":
    return x.sum(1) / jnp.maximum(ids.sum(1), 1)[:, None].astype(x.dtype)
  index, _ = last_valid(ids > 0)
  return jnp.take_along_axis(x, index[:, None, None], 1)[:, 0]
