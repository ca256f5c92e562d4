"""Causal attention, the transformer's mixer and the baseline."""

import dataclasses
import functools
import math
from typing import Annotated, ClassVar, Literal, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from flax import nnx

from ssmjax.models.doors import check_call, check_step
from ssmjax.models.layers import affine, normal, torch_uniform
from ssmjax.models.module import Module
from ssmjax.models.softmax import attend, attend_window
from ssmjax.ops.segments import segment_masks
from ssmjax.types import (
  Array,
  Float,
  FloatingDType,
  Int,
  Positive,
  Range,
  Size,
  check_fields,
)

__all__ = ["Attention", "AttentionConfig", "AttentionState", "token_positions"]


class AttentionState(NamedTuple):
  """Keys and values of the tokens of the present segment.

  Attributes:
    keys: `[B, S, G, K]`, S the capacity, G heads of keys and values, in the
      compute dtype. With a window, S is the window and the slots are a ring:
      token n is in slot n mod S.
    values: `[B, S, G, K]`.
    length: tokens of the segment so far, `[B]` int32; with a window it goes
      on past S.
  """

  keys: Float[Array, "B S G K"]
  values: Float[Array, "B S G K"]
  length: Int[Array, " B"]


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Sizes and choices of an `Attention` mixer.

  Attributes:
    num_heads: H; the width must be a multiple of it, or head_dim be given.
    positions: `"rope"` rotates queries and keys (Su et al. 2021, arXiv
      2104.09864); `"none"` leaves positions to the model (learned ones are
      added to the embedding, see `ModelConfig.max_positions`).
    rope_theta: base of the rotation's wavelengths.
    max_length: tokens that a state has room for; with a window nothing.
    window: tokens that a token attends to, itself included, as in Griffin's
      local attention and Mistral; None for all of its past. The state then
      holds that many tokens, and a sequence may be of any length.
    init: as in `MambaConfig`.
    dtype: dtype of activations; parameters are float32.
    num_kv_heads: G, heads of keys and values, each for H/G heads of queries
      (Ainslie et al. 2023, arXiv 2305.13245); None for H.
    head_dim: K, channels of a head; None for d_model / H.
    rotary_fraction: the part of a head's channels, its first ones, that
      `"rope"` rotates; the others carry no position.
    bias: biases of queries, keys and values.
    out_bias: a bias of the output.

  Pythia's layer is `AttentionConfig(H, rotary_fraction=0.25, bias=True,
  out_bias=True)` in a model with a parallel residual, LayerNorm and
  `mlp="gelu_exact"`; Mistral's `AttentionConfig(32, num_kv_heads=8,
  window=4096)` in one with `mlp="swiglu"`.
  """

  op: ClassVar[str | None] = None
  polarizes: ClassVar[str | None] = None

  num_heads: Size = 1
  positions: Literal["rope", "none"] = "rope"
  rope_theta: Positive = 10_000.0
  max_length: Size = 2048
  window: Size | None = None
  init: Literal["mamba", "authors"] = "mamba"
  dtype: FloatingDType = jnp.float32
  num_kv_heads: Size | None = None
  head_dim: Size | None = None
  rotary_fraction: Annotated[float, Range(above=0, most=1)] = 1.0
  bias: bool = False
  out_bias: bool = False

  def __post_init__(self):
    check_fields(self)
    if self.num_heads % self.kv_heads:
      raise ValueError(
        f"AttentionConfig: num_heads is {self.num_heads}, expected a multiple"
        f" of num_kv_heads={self.num_kv_heads}."
      )

  @property
  def kv_heads(self) -> int:
    """Heads of keys and values."""
    return self.num_kv_heads or self.num_heads

  def build(self, d_model: int, n_layers: int, rngs: nnx.Rngs) -> "Attention":
    """Make the mixer for a model of this width and depth."""
    return Attention(d_model, self, n_layers=n_layers, rngs=rngs)


class Attention(Module):
  """Causal multi-head softmax attention with a key-value state.

  yₜ = W_out Σ_{s ≤ t} softmax_s(qₜ · k_s / √K) v_s

  H heads of queries share G of keys and values. A token attends to its own
  segment only, and with a window to t - s < window: there time and memory of a
  long sequence grow with T·window.

  Source: Vaswani et al. 2017 (arXiv 1706.03762); windows, Beltagy et al. 2020
  (arXiv 2004.05150).
  """

  def __init__(
    self,
    d_model: int,
    config: AttentionConfig | None = None,
    *,
    n_layers: int = 1,
    rngs: nnx.Rngs,
  ):
    config = config or AttentionConfig()
    if config.head_dim is None and d_model % config.num_heads:
      raise ValueError(
        f"Attention: d_model is {d_model}, expected a multiple of"
        f" num_heads={config.num_heads}, or give head_dim."
      )
    self.head_dim = config.head_dim or d_model // config.num_heads
    self.rotary = int(self.head_dim * config.rotary_fraction)
    if config.positions == "rope" and (self.rotary % 2 or not self.rotary):
      raise ValueError(
        f"Attention: heads have {self.rotary} channels to rotate,"
        " expected an even number, 2 or more. Use positions='none' or other"
        " sizes."
      )
    self.config = config
    self.d_model = d_model
    keys = jax.random.split(rngs.params(), 2)
    own = config.init == "mamba"
    draw = functools.partial(torch_uniform, fan_in=d_model) if own else normal
    inner = config.num_heads * self.head_dim
    wide = inner + 2 * config.kv_heads * self.head_dim
    self.in_proj = nnx.Param(draw(keys[0], (d_model, wide)))
    self.out_proj = nnx.Param(
      draw(keys[1], (inner, d_model)) / math.sqrt(2 * n_layers)
    )
    zeros = lambda n, there: (
      nnx.Param(jnp.zeros(n, jnp.float32), weight_decay=False)
      if there
      else None
    )
    self.in_bias = zeros(wide, config.bias)
    self.out_bias = zeros(d_model, config.out_bias)

  def __call__(
    self,
    x: Float[Array, "B T M"],
    state: AttentionState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T M"], AttentionState]:
    """Mix over time.

    Args:
      x: `[B, T, M]`.
      state: to go on from; None for the beginning.
      segment_ids: `[B, T]`, 1-based, 0 for padding.

    Returns:
      y `[B, T, M]` of x's dtype (0 at padding) and the state after it. Where
      a state has no room for a token, y is NaN from there on: nothing is
      forgotten silently. With a window there is always room.

    Raises:
      ValueError: x of another width, or longer than a given state's capacity
        (without one, it becomes at least x's length).
    """
    check_call(self, x, state, segment_ids)
    batch, length, _ = x.shape
    window = self.config.window
    if state is None:
      state = self.init_state(batch, max(length, self.config.max_length))
      fresh = True
    else:
      fresh = False
    if window is None and length > state.keys.shape[1]:
      raise ValueError(
        f"Attention: x has {length} tokens, expected at most the state's"
        f" capacity of {state.keys.shape[1]}. Use init_state(batch_size,"
        " max_length)."
      )
    padded = segment_ids is not None and length > 1
    if segment_ids is None:
      segment_ids = jnp.ones_like(x[..., 0], jnp.int32)
    valid = segment_ids > 0
    x_dtype = x.dtype
    segment, position = token_positions(segment_ids, state.length)
    capacity = state.keys.shape[1]
    full = (segment == 0) & (position >= capacity) & valid
    if window is not None:
      full = jnp.zeros_like(valid)
    # A NaN key or value, masked or not, would reach the tokens before it.
    x = jnp.where((valid & ~full)[..., None], x, jnp.zeros_like(x))
    q, k, v = self._project(x, position)
    # A token of the first segment goes on from the state.
    old = None if fresh else (state.keys, state.values, state.length)
    if window is None or (fresh and length <= window):
      y = attend(q, k, v, segment, valid, old)
    else:
      y = attend_window(q, k, v, segment, valid, old, window, padded)
    state = _append(state, k, v, segment, position, valid, window)
    y = y.reshape(batch, length, -1)
    y = _affine(y, self.out_proj, self.out_bias).astype(x_dtype)
    y = jnp.where(full[..., None], jnp.asarray(jnp.nan, y.dtype), y)
    return jnp.where(valid[..., None], y, jnp.zeros_like(y)), state

  def step(
    self,
    x: Float[Array, "B M"],
    state: AttentionState,
    segment_ids: Int[Array, " B"] | None = None,
  ) -> tuple[Float[Array, "B M"], AttentionState]:
    """Mix one token: y `[B, M]` and the new state."""
    check_step(self, x, state, segment_ids)
    if segment_ids is not None:
      segment_ids = segment_ids[:, None]
    y, state = self(x[:, None], state, segment_ids)
    return y[:, 0], state

  def init_state(
    self, batch_size: int, max_length: int | None = None
  ) -> AttentionState:
    """An empty state with room for `max_length` tokens, or for a window."""
    shape = (
      batch_size,
      self.config.window or max_length or self.config.max_length,
      self.config.kv_heads,
      self.head_dim,
    )
    zeros = jnp.zeros(shape, self.config.dtype)
    return AttentionState(zeros, zeros, jnp.zeros((batch_size,), jnp.int32))

  def recurrence(self, x: Float[Array, "B T M"]) -> NoReturn:
    """Raise: attention has no diagonal recurrence."""
    raise NotImplementedError(
      "Attention: softmax attention keeps every key and value, so it has no"
      " state of fixed size and no diagonal Eq. 1."
    )

  def _project(self, x, position):
    x = x.astype(self.config.dtype)
    heads, kv_heads = self.config.num_heads, self.config.kv_heads
    qkv = _affine(x, self.in_proj, self.in_bias)
    qkv = qkv.reshape(*x.shape[:2], heads + 2 * kv_heads, self.head_dim)
    q, k, v = jnp.split(qkv, (heads, heads + kv_heads), 2)
    if self.config.positions == "rope":
      rotate = functools.partial(
        _rotate,
        position=position,
        theta=self.config.rope_theta,
        channels=self.rotary,
      )
      q, k = rotate(q), rotate(k)
    return q, k, v


def token_positions(
  segment_ids: Int[Array, "B T"], length: Int[Array, " B"]
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
  """Number segments from 0 and the tokens within each.

  Args:
    segment_ids: `[B, T]`, 1-based, 0 for padding.
    length: tokens of segment 0 that earlier calls have seen, `[B]`.

  Returns:
    segment and position, both `[B, T]` int32; padding does not count.
  """
  valid, restart = segment_masks(segment_ids)
  assert valid is not None  # For mypy: there are ids.
  assert restart is not None
  segment = jnp.cumsum(restart.astype(jnp.int32), 1)
  rank = jnp.cumsum(valid.astype(jnp.int32), 1) - 1
  start = jax.lax.cummax(jnp.where(restart, rank, 0), axis=1)
  position = rank - start + jnp.where(segment == 0, length[:, None], 0)
  return segment, position


def _append(state, k, v, segment, position, valid, window):
  """Keep the tokens of the last segment, at their positions."""
  last = segment[:, -1:]
  restarted = last[:, 0] > 0
  kept = valid & (segment == last)
  length = jnp.where(restarted, 0, state.length) + kept.sum(1, dtype=jnp.int32)
  slot = position
  if window is not None:
    # Each slot is written once: of two writes, which is last is not said.
    kept &= position >= length[:, None] - window
    slot = position % window
  slot = jnp.where(kept, slot, state.keys.shape[1])
  rows = jnp.arange(k.shape[0])[:, None]
  write = lambda old, new: old.at[rows, slot].set(
    new.astype(old.dtype),
    mode="drop",
    out_sharding=_explicit(old) or _explicit(new),
  )
  return AttentionState(write(state.keys, k), write(state.values, v), length)


def _explicit(x):
  """Its sharding where shardings are in the types, which a scatter asks for."""
  sharding = jax.typeof(x).sharding
  return sharding if sharding.mesh.explicit_axes else None


def _affine(x, weight, bias):
  return affine(x, weight[...], None if bias is None else bias[...])


def _rotate(x, position, theta, channels):
  """Rotary positions, halves paired as in GPT-NeoX; in float32."""
  half = channels // 2
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = position.astype(jnp.float32)[..., None, None] * frequency
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  wide = x[..., :channels].astype(jnp.float32)
  left, right = jnp.split(wide, 2, -1)
  rotated = jnp.concatenate(
    [left * cos - right * sin, right * cos + left * sin], -1
  ).astype(x.dtype)
  if channels == x.shape[-1]:
    return rotated
  return jnp.concatenate([rotated, x[..., channels:]], -1)
