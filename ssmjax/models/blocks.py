"""Blocks around mixers, and stacks of them: what whole models share."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ssmjax.models.config import (
  ClassifierConfig,
  MixerConfig,
  ModelConfig,
)
from ssmjax.models.doors import check_state
from ssmjax.models.gelu import gelu
from ssmjax.models.layers import LayerNorm, RMSNorm, affine, linear_weight
from ssmjax.models.module import Module
from ssmjax.ops.class_ids import known_ids
from ssmjax.types import Array, Float, Int

__all__ = [
  "MLP",
  "NORMS",
  "Block",
  "apply_blocks",
  "block_states",
  "check_states",
  "embed_tokens",
  "stack_blocks",
  "step_blocks",
]

AnyConfig = ModelConfig | ClassifierConfig
NORMS = {"rms": RMSNorm, "layer": LayerNorm}


class Block(Module):
  """x + mixer(norm(x)), then x + mlp(norm(x)) where there is an MLP.

  In parallel, x + mixer(norm(x)) + mlp(norm(x)).
  """

  def __init__(self, mixer: MixerConfig, config: AnyConfig, rngs: nnx.Rngs):
    norm = NORMS[config.block_norm]
    self.norm = norm(config.d_model, epsilon=config.norm_epsilon)
    self.mixer = mixer.build(config.d_model, config.n_layers, rngs)
    has_mlp = config.mlp_ratio or config.mlp_width
    self.mlp = MLP(config, rngs) if has_mlp else None
    self.parallel = config.parallel_residual

  def __call__(self, x, state=None, segment_ids=None, out=None):
    """Apply to a sequence: x `[B, T, M]` float32 and the mixer's state.

    A dictionary `out` is given `mixer_input`, `mixer_output`, `block_output`.
    """
    if state is not None:
      check_state("Block", self.mixer, state, x.shape[0])
    normed = self.norm(x)
    y, state = self.mixer(normed, state, segment_ids)
    x = self._rest(x, y)
    if out is not None:
      out.update(mixer_input=normed, mixer_output=y, block_output=x)
    return x, state

  def step(self, x, state, segment_ids=None):
    """Apply to one token, x `[B, M]`."""
    check_state("Block.step", self.mixer, state, x.shape[0])
    y, state = self.mixer.step(self.norm(x), state, segment_ids)
    return self._rest(x, y), state

  def _rest(self, x, y):
    mixed = x + y.astype(x.dtype)
    if self.mlp is None:
      return mixed
    return mixed + self.mlp(x if self.parallel else mixed).astype(x.dtype)


class MLP(Module):
  """W₂ f(W₁ norm(x)), or W₂ (f(Wₘ norm(x)) ∘ W₁ norm(x)) with a gate."""

  def __init__(self, config: AnyConfig, rngs: nnx.Rngs):
    keys = jax.random.split(rngs.params(), 2)
    size = config.d_model
    hidden = config.mlp_width or config.mlp_ratio * size
    zeros = lambda n, there: (
      nnx.Param(jnp.zeros(n, jnp.float32), weight_decay=False)
      if there
      else None
    )
    gated = config.mlp in ("swiglu", "geglu")
    self.norm = NORMS[config.block_norm](size, epsilon=config.norm_epsilon)
    draw = functools.partial(linear_weight, init=config.init)
    self.up_proj = nnx.Param(draw(keys[0], size, hidden))
    down_proj = draw(keys[1], hidden, size) / (2 * config.n_layers) ** 0.5
    self.down_proj = nnx.Param(down_proj)
    self.gate_proj = (
      nnx.Param(draw(rngs.params(), size, hidden)) if gated else None
    )
    self.up_bias = zeros(hidden, config.mlp_bias)
    self.gate_bias = zeros(hidden, config.mlp_bias and gated)
    self.down_bias = zeros(size, config.mlp_bias)
    self.kind = config.mlp
    self.dtype = config.dtype

  def __call__(self, x: Float[Array, "... M"]) -> Float[Array, "... M"]:
    """Apply to each token alone."""
    x = self.norm(x).astype(self.dtype)
    hidden = _affine(x, self.up_proj, self.up_bias)
    if self.gate_proj is None:
      hidden = _ACTIVATIONS[self.kind](hidden)
    else:
      gate = _affine(x, self.gate_proj, self.gate_bias)
      hidden = _ACTIVATIONS[self.kind](gate) * hidden
    return _affine(hidden, self.down_proj, self.down_bias)


def stack_blocks(config: AnyConfig, rngs: nnx.Rngs) -> nnx.List:
  """Make a model's blocks, those of one place in the pattern stacked."""
  repeats = config.n_layers // len(config.mixers)

  def one(mixer, key):
    block = Block(mixer, config, nnx.Rngs(key))
    for _, value in nnx.iter_graph(block):
      if isinstance(value, nnx.Variable):
        # So that a stack of vectors is not taken for a matrix.
        value.set_metadata(layer_axes=jnp.ndim(value[...]))
    return block

  def stack(mixer):
    keys = jax.random.split(rngs.params(), repeats)
    return jax.vmap(functools.partial(one, mixer))(keys)

  return nnx.List([stack(mixer) for mixer in config.mixers])


def apply_blocks(
  blocks: nnx.List,
  x: Float[Array, "B T M"],
  states: tuple[Any, ...] | None,
  segment_ids: Array | None,
  *,
  remat: bool,
  out: dict[str, Array] | None = None,
) -> tuple[Float[Array, "B T M"], tuple[Any, ...]]:
  """Run over a sequence, block after block; states None at the beginning.

  What a block puts into its `out` is stacked in that of the model, in the
  order of layers.
  """
  if states is None:
    states = (None,) * len(blocks)
  apply = Block.__call__ if out is None else _showing
  body: Callable[..., Any] = functools.partial(_layers, apply, segment_ids)
  if remat:
    body = jax.checkpoint(body)
  x, new = jax.lax.scan(body, x, (tuple(blocks), states))
  if out is not None:
    new, shown = zip(*new, strict=True)
    out.update(jax.tree.map(_in_order, *shown))
  return x, new


def step_blocks(
  blocks: nnx.List,
  x: Float[Array, "B M"],
  states: tuple[Any, ...],
  segment_ids: Array | None,
) -> tuple[Float[Array, "B M"], tuple[Any, ...]]:
  """Run over one token, block after block."""
  body = functools.partial(_layers, Block.step, segment_ids)
  return jax.lax.scan(body, x, (tuple(blocks), states))


def embed_tokens(
  table: Float[Array, "V M"], tokens: Int[Array, "B T"]
) -> Float[Array, "B T M"]:
  """Rows of a table; NaN where there is none, a negative id included.

  Where shardings are in the types, a gather cannot tell its own: it is that of
  the tokens.
  """
  # A negative id is not counted from the end.
  tokens = known_ids(tokens, table.shape[0])
  sharding = jax.typeof(tokens).sharding
  out = None
  if sharding.mesh.explicit_axes:
    out = jax.NamedSharding(sharding.mesh, jax.P(*sharding.spec, None))
  return table.at[tokens].get(mode="fill", out_sharding=out)


def block_states(
  blocks: nnx.List, repeats: int, batch_size: int, max_length: int | None
) -> tuple[Any, ...]:
  """The mixers' states before any token, stacked as their blocks are."""
  stack = lambda x: jnp.broadcast_to(x[None], (repeats, *x.shape))
  layers = (block.mixer.init_state(batch_size, max_length) for block in blocks)
  return tuple(jax.tree.map(stack, layer) for layer in layers)


def check_states(
  function: str,
  blocks: nnx.List,
  states: tuple[Any, ...],
  repeats: int,
  batch_size: int,
) -> None:
  """Raise ValueError unless the states are those of the blocks' mixers."""
  if not isinstance(states, tuple) or len(states) != len(blocks):
    found = (
      f"{len(states)} states"
      if isinstance(states, tuple)
      else f"a {type(states).__name__}"
    )
    raise ValueError(
      f"{function}: state.layers is {found}, expected a tuple of {len(blocks)},"
      f" one a position of the pattern. Pass init_state({batch_size})."
    )
  for index, (block, state) in enumerate(zip(blocks, states, strict=True)):
    check_state(
      function, block.mixer, state, batch_size,
      repeats=repeats, name=f"state.layers[{index}]",
    )  # fmt: skip


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "gelu": jax.nn.gelu,
  "gelu_exact": gelu,
  "swiglu": jax.nn.silu,
  "geglu": jax.nn.gelu,
}


def _affine(x, weight, bias):
  return affine(x, weight[...], None if bias is None else bias[...])


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
