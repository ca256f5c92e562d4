"""Hyena: gates between long convolutions whose kernels a network writes."""

import dataclasses
import functools
import math
from typing import Annotated, ClassVar, Literal, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ssmjax import ops
from ssmjax.models.attention import token_positions
from ssmjax.models.doors import check_call, check_step
from ssmjax.models.layers import (
  ShortConv,
  affine,
  clear_padding,
  linear_weight,
  output_weight,
  torch_uniform,
)
from ssmjax.models.module import Module
from ssmjax.types import (
  Array,
  Count,
  Float,
  FloatingDType,
  Int,
  Positive,
  Range,
  Size,
  check_fields,
)

__all__ = ["Hyena", "HyenaConfig", "HyenaState"]


class HyenaState(NamedTuple):
  """What a Hyena mixer carries from token to token.

  Attributes:
    conv: the last W-1 inputs of the short convolution, `[B, W-1, (N+1)M]`,
      float32.
    past: the last S-1 inputs of each long convolution, oldest first,
      `[B, N-1, S-1, M]`, float32; S is the capacity.
    length: tokens of the present segment so far, `[B]` int32.
  """

  conv: Float[Array, "B V E"]
  past: Float[Array, "B R S M"]
  length: Int[Array, " B"]


@dataclasses.dataclass(frozen=True)
class HyenaConfig:
  """Sizes and choices of a `Hyena` mixer.

  Attributes:
    order: N ≥ 2; there are N gates and, as in the released code, N-1 long
      convolutions.
    max_length: L, the tokens that the filters reach over, and that a state
      has room for; the filters' time runs from 0 to 1 over it.
    d_conv: W, width of the short convolution.
    filter_width: hidden units of the network that writes the filters.
    filter_layers: its layers between the first and the last.
    filter_bands: sines and cosines that it is given beside the time itself.
    frequency: initial frequency of its sine activations.
    fast_decay: time at which the window of the fastest channel has fallen to
      `decay_target`, in units of L.
    slow_decay: that of the slowest channel.
    decay_target: see there.
    window_shift: added to the window, which then ends above 0.
    init: as in `MambaConfig`, for the projections; the filters keep their
      own.
    dtype: dtype of activations; parameters, filters and states are float32.
    implementation: of the long convolution; None chooses.
  """

  op: ClassVar[str | None] = "long_conv"
  polarizes: ClassVar[str | None] = None

  order: Annotated[int, Range(least=2)] = 2
  max_length: Size = 2048
  d_conv: Size = 3
  filter_width: Size = 64
  filter_layers: Count = 2
  filter_bands: Size = 1
  frequency: float = 1.0
  fast_decay: Positive = 0.3
  slow_decay: Positive = 1.5
  decay_target: Annotated[float, Range(above=0, below=1)] = 1e-2
  window_shift: float = 0.0
  init: Literal["mamba", "authors"] = "mamba"
  dtype: FloatingDType = jnp.float32
  implementation: Literal["reference", "fft"] | None = None

  def __post_init__(self):
    check_fields(self)

  def build(self, d_model: int, n_layers: int, rngs: nnx.Rngs) -> "Hyena":
    """Make the mixer for a model of this width and depth."""
    return Hyena(d_model, self, n_layers=n_layers, rngs=rngs)


class Hyena(Module):
  """The Hyena operator of order N.

  x¹, …, xᴺ, v = split(shortconv(W_in input + b_in))
  v ← kⁿ ∗ (xⁿ · v) + dⁿ · (xⁿ · v),  n = N, …, 2;  y = W_out (x¹ · v) + b_out
  k(t) = MLP(t, cos(f 2πt), -sin(f 2πt)) · (exp(-δ t) + shift),  t = lag / L

  The network's activations are sin(ω ·), its ω learned and shared by its
  layers; δ differs from channel to channel and is not learned. The time of
  the window and of the network's first input is lag / (L-1).

  It has no diagonal decay, and so no polarization. The released code learns
  the sines and cosines too, at a rate of 1e-5; here they stay what they are.
  It cuts longer sequences off; here they are refused.

  Source: Poli et al. 2023 (arXiv 2302.10866), §3; the authors'
  `standalone_hyena.py`.
  """

  def __init__(
    self,
    d_model: int,
    config: HyenaConfig | None = None,
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
    """
    config = config or HyenaConfig()
    self.config = config
    self.d_model = d_model
    keys = jax.random.split(rngs.params(), 11)
    inner = (config.order + 1) * d_model
    own = config.init == "mamba"

    def bias(key, size):
      zeros = jnp.zeros((size,), jnp.float32)
      return torch_uniform(key, (size,), d_model) if own else zeros

    self.in_proj = nnx.Param(
      linear_weight(keys[0], d_model, inner, config.init)
    )
    self.in_bias = nnx.Param(bias(keys[1], inner), weight_decay=False)
    self.conv = ShortConv(inner, config.d_conv, keys[2])
    features, width = 2 * config.filter_bands + 1, config.filter_width
    draw = lambda key, shape, fan_in, **metadata: nnx.Param(
      torch_uniform(key, shape, fan_in), **metadata
    )
    self.filter_in = draw(keys[3], (features, width), features)
    self.filter_in_bias = draw(keys[4], (width,), features, weight_decay=False)
    hidden = (config.filter_layers, width)
    self.filter_hidden = draw(keys[5], (*hidden, width), width)
    self.filter_hidden_bias = draw(keys[6], hidden, width, weight_decay=False)
    self.filter_frequency = nnx.Param(
      jnp.full((width,), config.frequency, jnp.float32), weight_decay=False
    )
    outputs = (config.order - 1) * d_model
    self.filter_out = draw(keys[7], (width, outputs), width)
    self.D = nnx.Param(
      jax.random.normal(keys[8], (config.order - 1, d_model), jnp.float32),
      weight_decay=False,
    )
    self.out_proj = nnx.Param(
      output_weight(keys[9], d_model, d_model, config.init, n_layers)
    )
    self.out_bias = nnx.Param(
      bias(keys[10], d_model) / n_layers**0.5, weight_decay=False
    )

  def __call__(
    self,
    x: Float[Array, "B T M"],
    state: HyenaState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T M"], HyenaState]:
    """Mix over time.

    Args:
      x: `[B, T, M]`.
      state: to go on from; None for the beginning.
      segment_ids: `[B, T]`, 1-based, 0 for padding.

    Returns:
      y `[B, T, M]` of x's dtype (0 at padding) and the state after it. Where
      a segment has more tokens than there is room for, y is NaN from there
      on: nothing is forgotten silently.

    Raises:
      ValueError: x of another width, or one segment longer than the room.
    """
    check_call(self, x, state, segment_ids)
    batch, length, _ = x.shape
    room = self.config.max_length if state is None else _capacity(state)
    if segment_ids is None and length > room:
      raise ValueError(
        f"Hyena: x has {length} tokens, expected at most the {room} that"
        " there is room for. Use a larger max_length, of the configuration"
        " and of init_state."
      )
    x_dtype = x.dtype
    conv, past = (None, None) if state is None else state[:2]
    u = self._project(clear_padding(x, segment_ids))
    u, conv = self.conv(u, conv, segment_ids)
    y, past = self._convolve(
      u, past, room, _over_time(segment_ids, self.config)
    )
    if segment_ids is None:
      ids = jnp.ones((batch, length), jnp.int32)
    else:
      ids = segment_ids
    before = jnp.zeros((batch,), jnp.int32) if state is None else state.length
    segment, position = token_positions(ids, before)
    own = (segment == segment[:, -1:]) & (ids > 0)
    after = own.sum(1, dtype=jnp.int32)
    after += jnp.where(segment[:, -1] == 0, before, 0)
    y = _only_in_room(y.astype(x_dtype), position, ids > 0, room)
    return y, HyenaState(conv, past, after)

  def step(
    self,
    x: Float[Array, "B M"],
    state: HyenaState,
    segment_ids: Int[Array, " B"] | None = None,
  ) -> tuple[Float[Array, "B M"], HyenaState]:
    """Mix one token: y `[B, M]` and the new state.

    The convolutions are O(S M). The filters are written anew, for a state has
    no parameters: O(S F (F + M)) by networks F wide. Where a loop over tokens
    is compiled as one, as in `generate`, XLA does that once for all of them
    (at M = 64, S = 1024 on a CPU 0.12 ms a token, alone 1.9 ms).
    """
    check_step(self, x, state, segment_ids)
    x_dtype = x.dtype
    u = self._project(clear_padding(x, segment_ids))
    u, conv = self.conv.step(u, state.conv, segment_ids)

    def run(x, kernel, D, past):
      return ops.long_conv_step(
        x, kernel, D, state=past, segment_ids=segment_ids
      )

    y, past = self._convolve(u, state.past, _capacity(state), run)
    valid = jnp.ones_like(state.length, jnp.bool_)
    if segment_ids is not None:
      valid = segment_ids > 0
    y = y.astype(x_dtype)
    y = _only_in_room(y, state.length, valid, _capacity(state))
    length = state.length + valid.astype(jnp.int32)
    return y, HyenaState(conv, past, length)

  def init_state(
    self, batch_size: int, max_length: int | None = None
  ) -> HyenaState:
    """An empty state with room for `max_length` tokens.

    Raises:
      ValueError: more than the configuration's max_length, which is as far as
        the filters reach.
    """
    room = max_length or self.config.max_length
    if room > self.config.max_length:
      raise ValueError(
        f"Hyena.init_state: max_length is {room}, expected at most"
        f" {self.config.max_length}, the configuration's max_length: its"
        " filters reach no further."
      )
    past = (batch_size, self.config.order - 1, room - 1, self.d_model)
    return HyenaState(
      self.conv.init_state(batch_size),
      jnp.zeros(past, jnp.float32),
      jnp.zeros((batch_size,), jnp.int32),
    )

  def recurrence(self, x: Float[Array, "B T M"]) -> NoReturn:
    """Raise: a written kernel has no recurrence."""
    raise NotImplementedError(
      "Hyena: its kernels are any functions of the lag, not sums of decaying"
      " exponentials, so it has no state of fixed size and no diagonal Eq. 1."
    )

  def filters(self, length: int) -> Float[Array, "R L M"]:
    """The kernels' first taps, `[N-1, length, M]`, float32."""
    config = self.config
    lag = jnp.arange(length, dtype=jnp.float32)[:, None]
    time = lag / max(config.max_length - 1, 1)
    bands = np.linspace(1e-4, config.filter_bands - 1, config.filter_bands)
    turns = lag / config.max_length * jnp.asarray(bands, jnp.float32)[None]
    angle = 2 * math.pi * turns
    z = jnp.concatenate([time, jnp.cos(angle), -jnp.sin(angle)], 1)
    # A TPU by default multiplies as bfloat16: the sines would be others.
    dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
    wave = lambda z: jnp.sin(self.filter_frequency[...] * z)
    z = wave(dot(z, self.filter_in[...]) + self.filter_in_bias[...])
    for i in range(config.filter_layers):
      z = dot(z, self.filter_hidden[i]) + self.filter_hidden_bias[i]
      z = wave(z)
    kernels = dot(z, self.filter_out[...])
    target = -math.log(config.decay_target)
    decay = jnp.linspace(
      target / config.slow_decay, target / config.fast_decay, kernels.shape[1],
      dtype=jnp.float32,
    )  # fmt: skip
    kernels *= jnp.exp(-time * decay) + config.window_shift
    return jnp.moveaxis(kernels.reshape(length, -1, self.d_model), 1, 0)

  def _project(self, x):
    x = x.astype(self.config.dtype)
    return affine(x, self.in_proj[...], self.in_bias[...])

  def _convolve(self, u, past, room, run):
    """The operator after the short convolution, by `run` in time."""
    first, *gates, v = jnp.split(u, self.config.order + 1, -1)
    windows = []
    kernels = self.filters(room)
    for i, gate in enumerate(reversed(gates)):
      before = None if past is None else past[:, i]
      v, after = run(v * gate, kernels[i], self.D[i], before)
      windows.append(after)
    y = affine(
      v * first, self.out_proj[...], self.out_bias[...], dtype=jnp.float32
    )
    return y, jnp.stack(windows, 1)


def _over_time(segment_ids, config):
  """`long_conv` over time, as `_convolve` calls it."""

  def run(x, kernel, D, past):
    return ops.long_conv(
      x, kernel, D, initial_state=past, segment_ids=segment_ids,
      implementation=config.implementation,
    )  # fmt: skip

  return run


def _capacity(state):
  return state.past.shape[2] + 1


def _only_in_room(y, position, valid, room):
  """y, NaN at tokens that there is no room for and 0 at padding."""
  y = jnp.where((position < room)[..., None], y, jnp.asarray(jnp.nan, y.dtype))
  return jnp.where(valid[..., None], y, jnp.zeros_like(y))
