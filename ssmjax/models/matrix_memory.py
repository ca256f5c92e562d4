"""What mixers share whose memory is, for each head, a matrix.

S_t = diag(a_t) S_{t-1} + k_t v_tᵀ,  o_t = S_tᵀ q_t;  such a mixer is its maps
from tokens to q, k, v and a, and what it makes of o.
"""

import dataclasses
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ssmjax import ops
from ssmjax.models.attention import token_positions
from ssmjax.models.doors import check_call, check_mixer, check_step
from ssmjax.models.layers import (
  check_exact,
  clear_padding,
  dense,
  linear_weight,
  output_weight,
)
from ssmjax.models.module import Module
from ssmjax.types import (
  Array,
  Float,
  FloatingDType,
  Int,
  Recurrence,
  Size,
  check_fields,
)

__all__ = [
  "LinearAttentionState",
  "MatrixMixer",
  "MatrixMixerConfig",
  "merge_heads",
  "split_heads",
]


class LinearAttentionState(NamedTuple):
  """What a linear attention carries from token to token.

  Attributes:
    memory: the decayed sum of k vᵀ, `[B, H, K, V]`, float32.
    length: tokens of the present segment so far, `[B]` int32; None where
      nothing depends on positions.
  """

  memory: Float[Array, "B H K V"]
  length: Int[Array, " B"] | None = None


@dataclasses.dataclass(frozen=True)
class MatrixMixerConfig:
  """The fields of all configurations, described in `LinearAttentionConfig`."""

  op: ClassVar[str | None] = "gated_linear_attention"
  polarizes: ClassVar[str | None] = None

  num_heads: Size = 4
  init: Literal["mamba", "authors"] = "mamba"
  dtype: FloatingDType = jnp.float32
  implementation: Literal["reference", "chunked"] | None = None

  def __post_init__(self):
    check_fields(self)
    check_exact(type(self).__name__, getattr(self, "polarization", None))


class MatrixMixer(Module):
  """One product to the heads' parts, the recurrence, one product back.

  A layer says how wide its parts and its memory are, `_parts` and
  `_memory_shape`, how the parts become q, k, v, log a and a gate, `_maps`,
  and what becomes of the memory's answer, `_answer`.
  """

  _config: ClassVar[type[MatrixMixerConfig]]
  # Whether the maps depend on a token's position in its segment.
  _counts: ClassVar[bool] = False

  def __init__(
    self,
    d_model: int,
    config: MatrixMixerConfig | None = None,
    *,
    n_layers: int = 1,
    rngs: nnx.Rngs,
  ):
    """Draw the parameters.

    Args:
      d_model: width of input and output.
      config: sizes and choices.
      n_layers: depth of the model around it, which scales `out_proj`.
      rngs: source of the `params` key; not kept.

    Raises:
      ValueError: the heads do not divide the width.
    """
    config = config or self._config()
    self.config = config
    self.d_model = d_model
    keys = jax.random.split(rngs.params())
    heads, parts = self._heads(), self._parts()
    self.in_proj = nnx.Param(
      linear_weight(keys[0], d_model, heads * sum(parts), config.init)
    )
    self.out_proj = nnx.Param(
      output_weight(keys[1], heads * parts[2], d_model, config.init, n_layers)
    )

  def __call__(
    self,
    x: Float[Array, "B T M"],
    state: LinearAttentionState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T M"], LinearAttentionState]:
    """Mix over time.

    Args:
      x: `[B, T, M]`.
      state: to go on from; None for the beginning.
      segment_ids: `[B, T]`, 1-based, 0 for padding.

    Returns:
      y `[B, T, M]` of x's dtype (0 at padding) and the state after it.
    """
    check_call(self, x, state, segment_ids)
    position, length = self._positions(x, state, segment_ids)
    q, k, v, log_a, gate = self._mapped(x, position, segment_ids)
    o, memory = ops.gated_linear_attention(
      q, k, v, log_a, scale=self._scale(),
      initial_state=None if state is None else state.memory,
      segment_ids=segment_ids, implementation=self.config.implementation,
    )  # fmt: skip
    y = _project(self, o, gate).astype(x.dtype)
    return clear_padding(y, segment_ids), LinearAttentionState(memory, length)

  def step(
    self,
    x: Float[Array, "B M"],
    state: LinearAttentionState,
    segment_ids: Int[Array, " B"] | None = None,
  ) -> tuple[Float[Array, "B M"], LinearAttentionState]:
    """Mix one token, in O(1): y `[B, M]` and the new state."""
    check_step(self, x, state, segment_ids)
    length = state.length
    if length is not None:
      length = length + (1 if segment_ids is None else segment_ids > 0)
    q, k, v, log_a, gate = self._mapped(x, state.length, segment_ids)
    o, memory = ops.gated_linear_attention_step(
      q, k, v, log_a, scale=self._scale(), state=state.memory,
      segment_ids=segment_ids,
    )  # fmt: skip
    y = _project(self, o, gate).astype(x.dtype)
    return clear_padding(y, segment_ids), LinearAttentionState(memory, length)

  def init_state(
    self, batch_size: int, max_length: int | None = None
  ) -> LinearAttentionState:
    """The state before any token; its size does not depend on a length."""
    del max_length
    memory = jnp.zeros((batch_size, *self._memory_shape()), jnp.float32)
    length = jnp.zeros((batch_size,), jnp.int32) if self._counts else None
    return LinearAttentionState(memory, length)

  def recurrence(self, x: Float[Array, "B T M"]) -> Recurrence:
    """Show the layer's own Eq. 1 on `x`: S = (H, K, V), the memory.

    a is the decay (polarized) of a head or of a key channel, the same for all
    values; dt = 1 and b = k vᵀ. The readout is what q takes out of the state,
    and all that follows it.
    """
    check_mixer(f"{type(self).__name__}.recurrence", x, None, self.d_model)
    position, _ = self._positions(x, None, None)
    q, k, v, log_a, gate = self._mapped(x, position, None)
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    b = k[..., None] * v[..., None, :]
    a = jnp.ones((), jnp.float32) if log_a is None else jnp.exp(log_a)
    if a.ndim in (1, 3):  # A decay for a head.
      a = a[..., None]
    a = jnp.broadcast_to(a[..., None], b.shape)
    readout = jax.tree_util.Partial(_readout, self, q, gate, x[:0, 0])
    dt = jnp.ones((1,) * b.ndim, jnp.float32)
    return Recurrence(a, dt, b, jnp.zeros_like(b[:, 0]), readout)

  def _heads(self):
    return self.config.num_heads

  def _parts(self) -> tuple[int, ...]:
    """Widths in a head of what `in_proj` gives; the third is the value's."""
    raise NotImplementedError

  def _memory_shape(self):
    keys, _, values = self._parts()[:3]
    return self._heads(), keys, values

  def _scale(self):
    return self._memory_shape()[1] ** -0.5

  def _maps(self, x, parts, position):
    """q, k, v, log a (or None) and a gate (or None) of x's `parts`."""
    raise NotImplementedError

  def _answer(self, o, gate):
    """`[..., H, V]` that the memory answers, as `[..., H·V]` in float32."""
    raise NotImplementedError

  def _mapped(self, x, position, segment_ids):
    x = clear_padding(x, segment_ids).astype(self.config.dtype)
    parts = split_heads(
      dense(x, self.in_proj[...]), self._heads(), self._parts()
    )
    return self._maps(x, parts, position)

  def _positions(self, x, state, segment_ids):
    """Each token's position in its segment `[B, T]`, and the new length."""
    if not self._counts:
      return None, None
    batch, time = x.shape[:2]
    length = jnp.zeros((batch,), jnp.int32) if state is None else state.length
    if segment_ids is None:
      steps = jnp.arange(time, dtype=jnp.int32)
      position = steps[None] + length[:, None]
    else:
      position = token_positions(segment_ids, length)[1]
    # Padding at the end has the position of the last token.
    return position, position[:, -1] + 1

  def _head_width(self, name=None):
    """Channels of a head that has its share of config.name · d_model."""
    factor = getattr(self.config, name) if name else 1
    width, heads = factor * self.d_model, self.config.num_heads
    if width < heads or width % heads:
      raise ValueError(
        f"{type(self).__name__}: d_model={self.d_model}"
        + (f" times {name}={factor} is {width:g}" if name else "")
        + f", expected a multiple of num_heads={heads}."
      )
    return int(width) // heads


def split_heads(
  x: Float[Array, "... W"], heads: int, widths: tuple[int, ...]
) -> list[Float[Array, "... H K"]]:
  """Parts of x, each with its width for every head."""
  ends = [heads * sum(widths[: i + 1]) for i in range(len(widths) - 1)]
  return [
    part.reshape(*part.shape[:-1], heads, -1) for part in jnp.split(x, ends, -1)
  ]


def merge_heads(x: Float[Array, "... H K"]) -> Float[Array, "... D"]:
  """Heads side by side."""
  return x.reshape(*x.shape[:-2], -1)


def _project(mixer, o, gate):
  y = mixer._answer(o.astype(jnp.float32), gate)
  return dense(y.astype(o.dtype), mixer.out_proj[...])


def _readout(mixer, q, gate, like, h, t):
  """The output at time t from the state h, in the dtype of `like`."""
  at = lambda x: jax.lax.dynamic_index_in_dim(x, t, 1, keepdims=False)
  o = (at(q).astype(h.dtype)[..., None] * h).sum(-2) * mixer._scale()
  gate = None if gate is None else at(gate)
  return _project(mixer, o.astype(q.dtype), gate).astype(like.dtype)
