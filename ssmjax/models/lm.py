"""The language model around any mixer: embed, blocks, norm, logits."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ssmjax.models.attention import token_positions
from ssmjax.models.blocks import (
  NORMS,
  Block,
  apply_blocks,
  block_states,
  check_states,
  embed_tokens,
  stack_blocks,
  step_blocks,
)
from ssmjax.models.config import MixerConfig, ModelConfig
from ssmjax.models.config_json import describe_config, read_config
from ssmjax.models.layers import LayerNorm, clear_padding, linear_weight, normal
from ssmjax.models.module import Module
from ssmjax.types import (
  Array,
  Float,
  Int,
  check_segment_ids,
  check_shapes,
  register_model,
)

__all__ = ["Block", "LanguageModel", "MixerConfig", "ModelConfig", "ModelState"]


class ModelState(NamedTuple):
  """What a model carries from token to token.

  Attributes:
    layers: one mixer state per position of the layer pattern, each stacked
      over the repeats of the pattern on a leading axis.
    length: tokens of the present segment so far, `[B]` int32.
  """

  layers: tuple[Any, ...]
  length: Int[Array, " B"]


@register_model("language_model")
class LanguageModel(Module):
  """A causal language model.

  x = E[tokens];  x = x + mixer(norm(x)) for each block;  logits = norm(x) Eᵀ

  with W for E at the end where embeddings are not tied (`head`, `[V, M]`).

  Blocks of one position of the layer pattern are stacked on a leading axis
  and run by `jax.lax.scan`, so that compile time does not grow with depth.
  The model is a pytree and nothing mutates in a call: `jax.jit`, `jax.grad`,
  `jax.vmap` and `jax.shard_map` take it as it is.

  >>> config = ModelConfig(vocab_size=16, d_model=8, n_layers=2)
  >>> model = LanguageModel(config, rngs=nnx.Rngs(0))
  >>> logits, state = model(jnp.zeros((1, 5), jnp.int32))
  >>> logits, state = model.step(jnp.zeros((1,), jnp.int32), state)
  >>> logits.shape
  (1, 16)
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    key = rngs.params()
    self.embedding = nnx.Param(normal(key, (config.vocab_size, config.d_model)))
    shape = (config.max_positions, config.d_model)
    self.positions = (
      None
      if config.max_positions is None
      else nnx.Param(normal(rngs.params(), shape))
    )
    self.blocks = stack_blocks(config, rngs)
    epsilon = config.norm_epsilon
    self.norm = NORMS[config.final_norm](config.d_model, epsilon=epsilon)
    self.embedding_norm = (
      LayerNorm(config.d_model, epsilon=epsilon)
      if config.embedding_norm
      else None
    )
    self.head = (
      None if config.tie_embeddings else nnx.Param(_head(rngs.params(), config))
    )

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    state: ModelState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T V"], ModelState]:
    """Run over a sequence, or over its next piece of any length.

    Args:
      tokens: `[B, T]` int; an id outside the vocabulary gives NaN.
      state: to go on from, as returned by a call, a step or `init_state`;
        None for the beginning.
      segment_ids: `[B, T]` int, 1-based, 0 for padding (left, right or
        between): documents of one row do not see each other.

    Returns:
      logits `[B, T, V]` float32 and the state after the last token.
    """
    features, state = self.features(tokens, state, segment_ids)
    return self.logits(features), state

  def step(
    self,
    tokens: Int[Array, " B"],
    state: ModelState,
    segment_ids: Int[Array, " B"] | None = None,
  ) -> tuple[Float[Array, "B V"], ModelState]:
    """Run over one token: logits `[B, V]` and the new state."""
    _check("LanguageModel.step", tokens, segment_ids, "B")
    self._check_state("LanguageModel.step", state, tokens.shape[0])
    ids = None if segment_ids is None else segment_ids[:, None]
    x, length = self._embed(tokens[:, None], state.length, ids)
    x, layers = step_blocks(self.blocks, x[:, 0], state.layers, segment_ids)
    return self.logits(self.norm(x)), ModelState(layers, length)

  def features(
    self,
    tokens: Int[Array, "B T"],
    state: ModelState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    embeddings: Float[Array, "B T M"] | None = None,
    out: dict[str, Array] | None = None,
  ) -> tuple[Float[Array, "B T M"], ModelState]:
    """As a call, without the projection to logits: `[B, T, M]`.

    Args:
      tokens: as in a call.
      state: as in a call.
      segment_ids: as in a call.
      embeddings: what enters the first block, positions and norm included, in
        place of the tokens' own: to differentiate by it.
      out: a dictionary to be given what passes through the layers: `embeddings`
        `[B, T, M]`, and `mixer_input` (after the norm), `mixer_output` and
        `block_output`, `[n_layers, B, T, M]`. Return it from the function that
        is jitted; what is left out there costs no memory. `block(i)` has the
        layer that belongs to entry i.
    """
    _check("LanguageModel", tokens, segment_ids, "B T")
    if state is None:
      layers, start = None, jnp.zeros(tokens.shape[:1], jnp.int32)
    else:
      self._check_state("LanguageModel", state, tokens.shape[0])
      layers, start = state
    x, length = self._embed(tokens, start, segment_ids)
    if embeddings is not None:
      check_shapes(
        "LanguageModel",
        {"tokens": (tokens, "B T"),
         "embeddings": (embeddings, f"B T M={self.config.d_model}")},
      )  # fmt: skip
      x = embeddings.astype(x.dtype)
    if out is not None:
      out["embeddings"] = x
    x, layers = apply_blocks(
      self.blocks, x, layers, segment_ids, remat=self.config.remat, out=out
    )
    return self.norm(x), ModelState(layers, length)

  def block(self, index: int) -> Block:
    """Take one layer out of the stack, by its place from 0 on."""
    if not 0 <= index < self.config.n_layers:
      raise ValueError(
        f"LanguageModel.block: index is {index}, expected 0 to"
        f" {self.config.n_layers - 1}."
      )
    repeat, position = divmod(index, len(self.blocks))
    return jax.tree.map(lambda v: v[repeat], self.blocks[position])

  def logits(self, features: Float[Array, "... M"]) -> Float[Array, "... V"]:
    """Project features to logits over the vocabulary, float32."""
    features = features.astype(self.config.dtype)
    logits = jnp.einsum(
      "...m,vm->...v", features, self.unembedding.astype(features.dtype),
      preferred_element_type=jnp.float32,
    )  # fmt: skip
    cap = self.config.logit_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)

  @property
  def unembedding(self) -> Float[Array, "V M"]:
    """The matrix from features to logits: the head, or the embedding."""
    return (self.embedding if self.head is None else self.head)[...]

  def init_state(
    self, batch_size: int, max_length: int | None = None
  ) -> ModelState:
    """The state before any token.

    Args:
      batch_size: B.
      max_length: tokens that attention's and Hyena's layers must have room
        for; recurrent layers do not care.
    """
    layers = block_states(self.blocks, self._repeats, batch_size, max_length)
    return ModelState(layers, jnp.zeros((batch_size,), jnp.int32))

  def description(self) -> dict[str, Any] | None:
    """Describe the model as JSON; None if a mixer's kind is not registered.

    This is what `config_to_json` gives of its configuration; with
    `from_description`, what `ssmjax.types.register_model` asks for.
    """
    return describe_config(self.config)

  @classmethod
  def from_description(
    cls, description: dict[str, Any], *, rngs: nnx.Rngs
  ) -> "LanguageModel":
    """Build the model that was described, with fresh parameters."""
    return cls(read_config(description, ModelConfig), rngs=rngs)

  @property
  def _repeats(self) -> int:
    """How often the layer pattern is repeated."""
    return self.config.n_layers // len(self.blocks)

  def _check_state(self, function, state, batch_size):
    if not isinstance(state, ModelState):
      found = "None" if state is None else f"a {type(state).__name__}"
      raise ValueError(
        f"{function}: state is {found}, expected a ModelState. Pass"
        f" init_state({batch_size}), or the state of a call."
      )
    check_states(function, self.blocks, state.layers, self._repeats, batch_size)
    check_shapes(
      function,
      {"state.length": (state.length, f"B={batch_size}")},
      {"state.length": f"Pass init_state({batch_size})."},
    )

  def _embed(self, tokens, length, segment_ids):
    """The start of the residual and the new length."""
    ids = segment_ids
    if ids is None:
      ids = jnp.ones(tokens.shape, jnp.int32)
    segment, position = token_positions(ids, length)
    x = embed_tokens(self.embedding[...], tokens)
    if self.config.embedding_scale != 1.0:
      x = x * self.config.embedding_scale
    if self.positions is not None:
      x = x + jnp.take(self.positions[...], position, axis=0, mode="fill")
    valid = ids > 0
    x = clear_padding(x, ids)
    if self.embedding_norm is not None:
      # Its bias stands at padding too, and a NaN before it would reach scale.
      x = clear_padding(self.embedding_norm(x), ids)
    inside = valid & (segment == segment[:, -1:])
    restarted = segment[:, -1] > 0
    length = jnp.where(restarted, 0, length) + inside.sum(1, dtype=jnp.int32)
    return x, length


def _head(key, config):
  size, vocabulary = config.d_model, config.vocab_size
  return linear_weight(key, size, vocabulary, config.init).T


def _check(function, tokens, segment_ids, letters):
  check_shapes(
    function,
    {"tokens": (tokens, letters), "segment_ids": (segment_ids, letters)},
  )
  if 0 in tokens.shape:
    raise ValueError(
      f"{function}: tokens has shape {tokens.shape}, expected no empty axis."
    )
  if not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(
      f"{function}: tokens has dtype {tokens.dtype.name}, expected an integer"
      " type. Pass tokens.astype(jnp.int32)."
    )
  check_segment_ids(function, segment_ids)
