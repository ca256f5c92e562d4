"""The language model around any mixer: embed, blocks, norm, logits."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from ssmjax.models.attention import token_positions
from ssmjax.models.layers import (
  LayerNorm,
  RMSNorm,
  dense,
  normal,
  torch_uniform,
)
from ssmjax.models.mamba import MambaConfig
from ssmjax.types import (
  Array,
  Float,
  Int,
  check_choice,
  check_segment_ids,
  check_shapes,
)

__all__ = ["Block", "LanguageModel", "ModelConfig", "ModelState"]


class MixerConfig(Protocol):
  """The configuration of a mixer, which builds it."""

  def build(self, d_model: int, n_layers: int, rngs: nnx.Rngs) -> Any:
    """Make the mixer for a model of this width and depth."""


class ModelState(NamedTuple):
  """What a model carries from token to token.

  Attributes:
    layers: one mixer state per position of the layer pattern, each stacked
      over the repeats of the pattern on a leading axis.
    length: tokens of the present segment so far, `[B]` int32.
  """

  layers: tuple[Any, ...]
  length: Int[Array, " B"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Sizes and choices of a `LanguageModel`.

  Attributes:
    vocab_size: V.
    d_model: width.
    n_layers: blocks, a multiple of the pattern's length.
    mixers: the pattern of mixers, repeated; one entry for a uniform model.
    mlp_ratio: hidden width of each block's MLP over d_model; 0 for no MLP.
    max_positions: size of a table of learned positions added to the
      embedding; None for none.
    norm_epsilon: of every norm.
    final_norm: `"rms"`, or `"layer"` (what the recall experiments of Wang et
      al. 2025 have).
    init: as in `MambaConfig`, for what is not inside a mixer.
    remat: recompute each block in the backward pass; keeps one activation a
      block in memory.
    dtype: dtype of activations outside the mixers; the residual is float32.
  """

  vocab_size: int
  d_model: int
  n_layers: int
  mixers: tuple[MixerConfig, ...] = (MambaConfig(),)
  mlp_ratio: int = 0
  max_positions: int | None = None
  norm_epsilon: float = 1e-5
  final_norm: Literal["rms", "layer"] = "rms"
  init: Literal["mamba", "authors"] = "mamba"
  remat: bool = True
  dtype: Any = jnp.float32

  def __post_init__(self):
    check_choice("ModelConfig", "final_norm", self.final_norm, ("rms", "layer"))
    check_choice("ModelConfig", "init", self.init, ("mamba", "authors"))
    least = {"vocab_size": 1, "d_model": 1, "n_layers": 1, "mlp_ratio": 0}
    if self.max_positions is not None:
      least["max_positions"] = 1
    for name, number in least.items():
      if getattr(self, name) < number:
        raise ValueError(
          f"ModelConfig: {name} is {getattr(self, name)}, expected {number} or"
          " more."
        )
    if not self.mixers or self.n_layers % len(self.mixers):
      raise ValueError(
        f"ModelConfig: n_layers is {self.n_layers}, expected a multiple of"
        f" the pattern of {len(self.mixers)} mixers. Change n_layers, or"
        " write the whole pattern out in mixers."
      )


class Block(nnx.Module):
  """x + mixer(norm(x)), and x + mlp(norm(x)) where there is an MLP."""

  def __init__(self, mixer: MixerConfig, config: ModelConfig, rngs: nnx.Rngs):
    self.norm = RMSNorm(config.d_model, epsilon=config.norm_epsilon)
    self.mixer = mixer.build(config.d_model, config.n_layers, rngs)
    self.mlp = MLP(config, rngs) if config.mlp_ratio else None

  def __call__(self, x, state=None, segment_ids=None, out=None):
    """Apply to a sequence: x `[B, T, M]` float32 and the mixer's state.

    A dictionary `out` is given `mixer_input`, `mixer_output`, `block_output`.
    """
    normed = self.norm(x)
    y, state = self.mixer(normed, state, segment_ids)
    x = self._rest(x + y.astype(x.dtype))
    if out is not None:
      out.update(mixer_input=normed, mixer_output=y, block_output=x)
    return x, state

  def step(self, x, state, segment_ids=None):
    """Apply to one token, x `[B, M]`."""
    y, state = self.mixer.step(self.norm(x), state, segment_ids)
    return self._rest(x + y.astype(x.dtype)), state

  def _rest(self, x):
    return x if self.mlp is None else x + self.mlp(x).astype(x.dtype)


class MLP(nnx.Module):
  """W₂ gelu(W₁ norm(x))."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    keys = jax.random.split(rngs.params(), 2)
    size, hidden = config.d_model, config.mlp_ratio * config.d_model
    own = config.init == "mamba"
    draw = lambda key, n_in, n_out: (
      torch_uniform(key, (n_in, n_out), n_in)
      if own
      else normal(key, (n_in, n_out))
    )
    self.norm = RMSNorm(size, epsilon=config.norm_epsilon)
    self.up_proj = nnx.Param(draw(keys[0], size, hidden))
    down_proj = draw(keys[1], hidden, size) / (2 * config.n_layers) ** 0.5
    self.down_proj = nnx.Param(down_proj)
    self.dtype = config.dtype

  def __call__(self, x: Float[Array, "... M"]) -> Float[Array, "... M"]:
    """Apply to each token alone."""
    x = self.norm(x).astype(self.dtype)
    x = jax.nn.gelu(dense(x, self.up_proj[...]))
    return dense(x, self.down_proj[...])


class LanguageModel(nnx.Module):
  """A causal language model with tied embedding.

  x = E[tokens];  x = x + mixer(norm(x)) for each block;  logits = norm(x) Eᵀ

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
    repeats = config.n_layers // len(config.mixers)

    def stack(mixer):
      keys = jax.random.split(rngs.params(), repeats)
      return jax.vmap(lambda key: Block(mixer, config, nnx.Rngs(key)))(keys)

    self.blocks = nnx.List([stack(mixer) for mixer in config.mixers])
    norm = {"rms": RMSNorm, "layer": LayerNorm}[config.final_norm]
    self.norm = norm(config.d_model, epsilon=config.norm_epsilon)

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
    ids = None if segment_ids is None else segment_ids[:, None]
    x, length = self._embed(tokens[:, None], state.length, ids)
    body = functools.partial(_layers, Block.step, segment_ids)
    x, layers = jax.lax.scan(body, x[:, 0], (tuple(self.blocks), state.layers))
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
      embeddings: what enters the first block, positions included, in place of
        the tokens' own: to differentiate by it.
      out: a dictionary to be given what passes through the layers: `embeddings`
        `[B, T, M]`, and `mixer_input` (after the norm), `mixer_output` and
        `block_output`, `[n_layers, B, T, M]`. Return it from the function that
        is jitted; what is left out there costs no memory. `block(i)` has the
        layer that belongs to entry i.
    """
    _check("LanguageModel", tokens, segment_ids, "B T")
    if state is None:
      start = jnp.zeros(tokens.shape[:1], jnp.int32)
      state = ModelState((None,) * len(self.blocks), start)
    x, length = self._embed(tokens, state.length, segment_ids)
    if embeddings is not None:
      check_shapes(
        "LanguageModel",
        {"tokens": (tokens, "B T"),
         "embeddings": (embeddings, f"B T M={self.config.d_model}")},
      )  # fmt: skip
      x = embeddings.astype(x.dtype)
    if out is not None:
      out["embeddings"] = x
    body: Callable[..., Any]
    apply = Block.__call__ if out is None else _showing
    body = functools.partial(_layers, apply, segment_ids)
    if self.config.remat:
      body = jax.checkpoint(body)
    x, layers = jax.lax.scan(body, x, (tuple(self.blocks), state.layers))
    if out is not None:
      layers, shown = zip(*layers, strict=True)
      out.update(jax.tree.map(_in_order, *shown))
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
    return jnp.einsum(
      "...m,vm->...v", features, self.embedding[...].astype(features.dtype),
      preferred_element_type=jnp.float32,
    )  # fmt: skip

  def init_state(
    self, batch_size: int, max_length: int | None = None
  ) -> ModelState:
    """The state before any token.

    Args:
      batch_size: B.
      max_length: tokens that attention layers must have room for; recurrent
        layers do not care.
    """
    repeats = self.config.n_layers // len(self.blocks)
    stack = lambda x: jnp.broadcast_to(x[None], (repeats, *x.shape))

    layers = (
      block.mixer.init_state(batch_size, max_length) for block in self.blocks
    )
    return ModelState(
      tuple(jax.tree.map(stack, layer) for layer in layers),
      jnp.zeros((batch_size,), jnp.int32),
    )

  def _embed(self, tokens, length, segment_ids):
    """The start of the residual and the new length."""
    ids = segment_ids
    if ids is None:
      ids = jnp.ones(tokens.shape, jnp.int32)
    segment, position = token_positions(ids, length)
    # Out of range is NaN, not a neighbour's embedding; a negative id is not
    # counted from the end.
    tokens = jnp.where(tokens < 0, self.config.vocab_size, tokens)
    x = _rows(self.embedding[...], tokens)
    if self.positions is not None:
      x = x + jnp.take(self.positions[...], position, axis=0, mode="fill")
    valid = ids > 0
    x = jnp.where(valid[..., None], x, jnp.zeros_like(x))
    inside = valid & (segment == segment[:, -1:])
    restarted = segment[:, -1] > 0
    length = jnp.where(restarted, 0, length) + inside.sum(1, dtype=jnp.int32)
    return x, length


def _rows(table, indices):
  """Rows of a table; NaN where there is none.

  Where shardings are in the types, a gather cannot tell its own: it is that of
  the indices.
  """
  sharding = jax.typeof(indices).sharding
  out = None
  if sharding.mesh.explicit_axes:
    out = jax.NamedSharding(sharding.mesh, jax.P(*sharding.spec, None))
  return table.at[indices].get(mode="fill", out_sharding=out)


def _layers(apply, segment_ids, x, xs):
  """One repeat of the layer pattern, as `lax.scan` wants it."""
  blocks, states = xs
  new = []
  for block, state in zip(blocks, states, strict=True):
    x, state = apply(block, x, state, segment_ids)
    new.append(state)
  return x, tuple(new)


def _showing(block, x, state, segment_ids):
  """A block whose intermediates leave the scan beside its state."""
  out: dict[str, Array] = {}
  x, state = block(x, state, segment_ids, out)
  return x, (state, out)


def _in_order(*stacks):
  """Positions of the pattern, each `[repeats, …]`, to `[n_layers, …]`."""
  return jnp.stack(stacks, 1).reshape(-1, *stacks[0].shape[1:])


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
