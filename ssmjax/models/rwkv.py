"""RWKV-5 (Eagle) and RWKV-6 (Finch): matrix memories that decay by key."""

import dataclasses
import functools
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.lax import Precision

from ssmjax import ops
from ssmjax.models.doors import check_call, check_mixer, check_step
from ssmjax.models.layers import (
  LayerNorm,
  check_exact,
  clear_padding,
  dense,
  fresh_state,
  linear_weight,
  output_weight,
)
from ssmjax.models.module import Module
from ssmjax.models.token_shift import (
  mix,
  mix_weight,
  token_shift,
  token_shift_step,
)
from ssmjax.polarization import polarize_log
from ssmjax.types import (
  Array,
  Float,
  FloatingDType,
  Int,
  Polarization,
  Recurrence,
  Size,
  check_fields,
)

__all__ = ["RWKV5", "RWKV6", "RWKV5Config", "RWKV6Config", "RWKVState"]

# Powers of i/M in the initial token shift, and what is added, of the middle
# layer (see `RWKV4`).
_MIXES = {"r": (0.25, 0.0), "k": (0.5, 0.0), "v": (0.5, 0.15), "g": (0.25, 0.0)}


class RWKVState(NamedTuple):
  """What an RWKV-5 or RWKV-6 time mix carries from token to token, float32.

  Attributes:
    shift: the last token, `[B, M]`.
    memory: S, `[B, H, K, V]`.
  """

  shift: Float[Array, "B M"]
  memory: Float[Array, "B H K V"]


@dataclasses.dataclass(frozen=True)
class _RWKVConfig:
  """The fields of both configurations, described in `RWKV5Config`."""

  op: ClassVar[str | None] = "gated_linear_attention"
  polarizes: ClassVar[str | None] = "channels"

  num_heads: Size = 4
  width: Size | None = None
  polarization: Polarization | None = None
  init: Literal["mamba", "authors"] = "mamba"
  dtype: FloatingDType = jnp.float32
  implementation: Literal["reference", "chunked"] | None = None

  def __post_init__(self):
    check_fields(self)
    check_exact(type(self).__name__, self.polarization)


@dataclasses.dataclass(frozen=True)
class RWKV5Config(_RWKVConfig):
  """Sizes and choices of an `RWKV5` mixer.

  Attributes:
    num_heads: H (the released models have heads of 64 channels).
    width: values of all heads and, with K = V, learned keys; None for
      d_model.
    polarization: key channels of each head of decay exactly 1 and 0; None for
      none.
    init: as in `MambaConfig`, of the projections. Decays, bonus and token
      shift begin as the released code has them in the middle of a model.
    dtype: dtype of activations; parameters, decays and states are float32.
    implementation: of the linear attention; None chooses.
  """

  def build(self, d_model: int, n_layers: int, rngs: nnx.Rngs) -> "RWKV5":
    """Make the mixer for a model of this width and depth."""
    return RWKV5(d_model, self, n_layers=n_layers, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class RWKV6Config(_RWKVConfig):
  """Sizes and choices of an `RWKV6` mixer; others as in `RWKV5Config`.

  Attributes:
    mix_rank: of the token shift's dependence on the token.
    decay_rank: of the decay's.
  """

  mix_rank: Size = 32
  decay_rank: Size = 64

  def build(self, d_model: int, n_layers: int, rngs: nnx.Rngs) -> "RWKV6":
    """Make the mixer for a model of this width and depth."""
    return RWKV6(d_model, self, n_layers=n_layers, rngs=rngs)


class _RWKV(Module):
  """What both have in common; a version is its token shift and its decay."""

  _config: ClassVar[type[_RWKVConfig]]

  def __init__(
    self,
    d_model: int,
    config: _RWKVConfig | None = None,
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
      ValueError: the width does not divide into the heads.
    """
    config = config or self._config()
    self.config = config
    self.d_model = d_model
    width, heads = config.width or d_model, config.num_heads
    if width % heads:
      raise ValueError(
        f"{type(self).__name__}: width is {width}, expected a multiple of"
        f" num_heads={heads}."
      )
    self.head_value = width // heads
    polarization = config.polarization or Polarization()
    self.head_key = polarization.total(self.head_value)
    keys_width = heads * self.head_key
    keys = jax.random.split(rngs.params(), 6)
    for name in _MIXES:
      setattr(
        self,
        f"mix_{name}",
        nnx.Param(mix_weight(d_model, *_MIXES[name]), weight_decay=False),
      )
    n = jnp.arange(keys_width, dtype=jnp.float32)
    place = n / max(keys_width - 1, 1)
    by_head = lambda x: nnx.Param(
      x.reshape(heads, self.head_key), weight_decay=False
    )
    self.time_decay = by_head(-6 + 5 * place**1.35)
    self.bonus = by_head((1 - place) / 2 + 0.1 * ((n + 1) % 3 - 1))
    draw = lambda key, size: linear_weight(key, d_model, size, config.init)
    self.r_proj = nnx.Param(draw(keys[0], keys_width))
    self.k_proj = nnx.Param(draw(keys[1], keys_width))
    self.v_proj = nnx.Param(draw(keys[2], width))
    self.g_proj = nnx.Param(draw(keys[3], width))
    # The released code divides by 8 before a norm of 1e-5.
    self.norm = LayerNorm((heads, self.head_value), epsilon=64e-5)
    self.out_proj = nnx.Param(
      output_weight(keys[4], width, d_model, config.init, n_layers)
    )
    self._draw_more(keys[5])

  def __call__(
    self,
    x: Float[Array, "B T M"],
    state: RWKVState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T M"], RWKVState]:
    """Mix over time.

    Args:
      x: `[B, T, M]`.
      state: to go on from; None for the beginning.
      segment_ids: `[B, T]`, 1-based, 0 for padding.

    Returns:
      y `[B, T, M]` of x's dtype (0 at padding) and the state after it.
    """
    check_call(self, x, state, segment_ids)
    if state is None:
      state = fresh_state(self, x)
    r, k, v, g, log_a, last = self._before_scan(x, state.shift, segment_ids)
    y, memory = ops.gated_linear_attention(
      r, k, v, log_a, bonus=self.bonus[...], initial_state=state.memory,
      segment_ids=segment_ids, implementation=self.config.implementation,
    )  # fmt: skip
    y = clear_padding(self._after_scan(y, g).astype(x.dtype), segment_ids)
    return y, RWKVState(last, memory)

  def step(
    self,
    x: Float[Array, "B M"],
    state: RWKVState,
    segment_ids: Int[Array, " B"] | None = None,
  ) -> tuple[Float[Array, "B M"], RWKVState]:
    """Mix one token, in O(1): y `[B, M]` and the new state."""
    check_step(self, x, state, segment_ids)
    r, k, v, g, log_a, last = self._before_scan(x, state.shift, segment_ids)
    y, memory = ops.gated_linear_attention_step(
      r, k, v, log_a if log_a.ndim == 3 else log_a[None],
      bonus=self.bonus[...], state=state.memory, segment_ids=segment_ids,
    )  # fmt: skip
    y = clear_padding(self._after_scan(y, g).astype(x.dtype), segment_ids)
    return y, RWKVState(last, memory)

  def init_state(
    self, batch_size: int, max_length: int | None = None
  ) -> RWKVState:
    """The state before any token; its size does not depend on a length."""
    del max_length
    zeros = lambda *shape: jnp.zeros((batch_size, *shape), jnp.float32)
    return RWKVState(
      zeros(self.d_model),
      zeros(self.config.num_heads, self.head_key, self.head_value),
    )

  def recurrence(self, x: Float[Array, "B T M"]) -> Recurrence:
    """Show the layer's own Eq. 1 on `x`: S = (H, K, V).

    h_t is the memory that token t reads, which is of the tokens before it, so
    that its a, dt = 1 and b = k vᵀ are those of token t-1 (b = 0 at first),
    and tokens enter it through x_{t-1} and x_{t-2}: theorems on influence
    speak of it with a window of 3. The readout adds the present token by the
    bonus, then norm, gate and W_o.
    """
    check_mixer(f"{type(self).__name__}.recurrence", x, None, self.d_model)
    state = fresh_state(self, x)
    r, k, v, g, log_a, _ = self._before_scan(x, state.shift, None)
    r, k, v = (value.astype(jnp.float32) for value in (r, k, v))
    write = k[..., None] * v[..., None, :]
    a = jnp.broadcast_to(jnp.exp(log_a), k.shape)[..., None]
    a = jnp.broadcast_to(a, write.shape)
    later = lambda v, first: jnp.concatenate([first, v[:, :-1]], 1)
    readout = jax.tree_util.Partial(_readout, self, r, write, g, x[:0, 0])
    return Recurrence(
      later(a, a[:, :1]), jnp.ones_like(a[:1, :1, :1, :1]),
      later(write, jnp.zeros_like(write[:, :1])), state.memory, readout,
    )  # fmt: skip

  def _draw_more(self, key):
    """Parameters of this version alone."""
    del key

  def _before_scan(self, x, state, segment_ids):
    """r, k, v and g by head, log-decays in float32, the shift's state."""
    x = clear_padding(x, segment_ids).astype(self.config.dtype)
    shift = token_shift if x.ndim == 3 else token_shift_step
    shifted, last = shift(x, state, segment_ids)
    mixed, log_a = self._mixed(x, shifted)
    r, k, v, g = (
      dense(mixed[name], proj[...]).reshape(
        *x.shape[:-1], self.config.num_heads, -1
      )
      for name, proj in (
        ("r", self.r_proj), ("k", self.k_proj), ("v", self.v_proj),
        ("g", self.g_proj),
      )
    )  # fmt: skip
    if self.config.polarization is not None:
      # The added channels have decays too, so all of them are there by now.
      held = dataclasses.replace(self.config.polarization, placement="replace")
      log_a = polarize_log(log_a, held)
    return r, k, v, jax.nn.silu(g), log_a, last

  def _mixed(self, x, shifted):
    raise NotImplementedError

  def _after_scan(self, y, g):
    h = self.norm(y.astype(jnp.float32)).astype(g.dtype) * g
    return dense(h.reshape(*h.shape[:-2], -1), self.out_proj[...])


class RWKV5(_RWKV):
  """RWKV-5's time mix (Eagle): a learned decay of each key channel.

  x̃ = μ x_t + (1 - μ) x_{t-1}, its own μ for each of r, k, v and g
  r, k, v = W x̃ by head;  g = silu(W_g x̃);  a = exp(-exp(time_decay))
  S_t = diag(a) S_{t-1} + k vᵀ,  h = (S_{t-1} + diag(u) k vᵀ)ᵀ r
  y = W_o (g · LayerNorm(h) of each head)

  Polarization holds a of some key channels of each head at 1 (they sum k vᵀ
  for ever) and of others at 0 (they see the token before and, by the bonus u,
  the present one: RWKV reads its memory before the token enters it).

  Source: Peng et al. 2024 (arXiv 2404.05892), §3 and App. A.
  """

  _config = RWKV5Config

  def _mixed(self, x, shifted):
    mixed = {
      name: mix(x, shifted, getattr(self, f"mix_{name}")[...])
      for name in _MIXES
    }
    return mixed, -jnp.exp(self.time_decay[...])


class RWKV6(_RWKV):
  """RWKV-6's time mix (Finch): token shift and decay that see the token.

  x̃ = x_t + (1 - μ + tanh(x̂ A) B) (x_{t-1} - x_t) for each of r, k, v, g and
  w, where x̂ = μ_x x_t + (1 - μ_x) x_{t-1}; μ, A and B of its own each
  a_t = exp(-exp(time_decay + tanh(x̃_w C) D)), and the rest as in `RWKV5`

  Polarization holds a of some key channels of each head at 1 and of others at
  0, see `RWKV5`.

  Source: Peng et al. 2024 (arXiv 2404.05892), §4 and App. A.
  """

  _config = RWKV6Config
  config: RWKV6Config

  def _draw_more(self, key):
    rank, low = self.config.mix_rank, self.config.decay_rank
    keys = jax.random.split(key, 4)
    draw = lambda key, bound, *shape: nnx.Param(
      jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    )
    self.mix_w = nnx.Param(mix_weight(self.d_model, 0.5), weight_decay=False)
    self.mix_x = nnx.Param(mix_weight(self.d_model, 0.5), weight_decay=False)
    # The released code begins the first matrices at 0, or here.
    self.mix_down = draw(keys[0], 1e-4, self.d_model, 5 * rank)
    self.mix_up = draw(keys[1], 1e-2, 5, rank, self.d_model)
    self.decay_down = draw(keys[2], 1e-4, self.d_model, low)
    self.decay_up = draw(keys[3], 1e-2, low, self.time_decay.size)

  def _mixed(self, x, shifted):
    exact = functools.partial(dense, precision=Precision.HIGHEST)
    low = jnp.tanh(exact(mix(x, shifted, self.mix_x[...]), self.mix_down[...]))
    low = low.reshape(*x.shape[:-1], 5, -1)
    mixed = {}
    for i, name in enumerate("wkvrg"):
      more = exact(low[..., i, :], self.mix_up[i]).astype(jnp.float32)
      mu = getattr(self, f"mix_{name}")[...]
      mixed[name] = mix(x, shifted, mu - more)
    # Twice exponentiated, so in float32.
    w = jnp.tanh(exact(mixed["w"].astype(jnp.float32), self.decay_down[...]))
    w = exact(w, self.decay_up[...])
    decay = self.time_decay[...]
    return mixed, -jnp.exp(decay + w.reshape(*x.shape[:-1], *decay.shape))


def _readout(model, r, write, g, like, h, t):
  """The output at time t from the memory before it, in `like`'s dtype."""
  r, write, g = (
    lax.dynamic_index_in_dim(x, t, 1, keepdims=False) for x in (r, write, g)
  )
  read = h + model.bonus[...][..., None] * write
  y = (r[..., None] * read).sum(-2)
  return model._after_scan(y, g).astype(like.dtype)
