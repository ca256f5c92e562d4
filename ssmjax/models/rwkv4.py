"""RWKV-4: a mean of the past by exponential keys, and its channel mix."""

import dataclasses
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from ssmjax import ops
from ssmjax.models.doors import check_call, check_mixer, check_step
from ssmjax.models.layers import (
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
from ssmjax.ops.segments import segment_masks
from ssmjax.ops.stabiliser import FLOOR, running_maximum
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

__all__ = ["RWKV4", "RWKV4Config", "RWKV4State"]


class RWKV4State(NamedTuple):
  """What an RWKV-4 time mix carries from token to token, float32.

  Attributes:
    shift: the last token, `[B, M]`.
    numerator: Σ e^{k} v, decayed, in units of e^{peak}, `[B, A]`.
    denominator: Σ e^{k}, likewise.
    peak: the running maximum, `[B, A]`; -1e38 before any token.
  """

  shift: Float[Array, "B M"]
  numerator: Float[Array, "B A"]
  denominator: Float[Array, "B A"]
  peak: Float[Array, "B A"]


@dataclasses.dataclass(frozen=True)
class RWKV4Config:
  """Sizes and choices of an `RWKV4` mixer.

  Attributes:
    width: learned channels (with `placement="replace"`, all channels); None
      for d_model.
    polarization: channels of decay e^{-w} exactly 1 and 0; None for none.
    init: as in `MambaConfig`, of the projections. Decays, bonus and token
      shift begin as the released code has them in the middle of a model.
    dtype: dtype of activations; parameters, keys and states are float32.
    implementation: of the linear scan; None chooses.
  """

  op: ClassVar[str | None] = "linear_scan"
  polarizes: ClassVar[str | None] = "channels"

  width: Size | None = None
  polarization: Polarization | None = None
  init: Literal["mamba", "authors"] = "mamba"
  dtype: FloatingDType = jnp.float32
  implementation: (
    Literal["reference", "associative", "chunked", "pallas"] | None
  ) = None

  def __post_init__(self):
    check_fields(self)
    check_exact("RWKV4Config", self.polarization)

  def build(self, d_model: int, n_layers: int, rngs: nnx.Rngs) -> "RWKV4":
    """Make the mixer for a model of this width and depth."""
    return RWKV4(d_model, self, n_layers=n_layers, rngs=rngs)


class RWKV4(Module):
  """RWKV-4's time mix.

  x̃ = μ x_t + (1 - μ) x_{t-1}, its own μ for each of k, v and r
  k, v = W_k x̃, W_v x̃;  r = σ(W_r x̃);  w = exp(time_decay)
  D_t = e^{-w} D_{t-1} + e^{k_t}
  h_t = e^{-w} (D_{t-1}/D_t) h_{t-1} + (e^{k_t}/D_t) v_t
  y = W_o (r · (D_{t-1} h_{t-1} + e^{u + k_t} v_t) / (D_{t-1} + e^{u + k_t}))

  D and D h are kept in units of e^{m}, m_t = max(m_{t-1} - w, k_t), in which
  no exponential exceeds 1: keys of any size are exact.

  Polarization holds e^{-w} of some channels at 1 (they are means of the whole
  past) and of others at 0 (they see the token before and the present one:
  RWKV reads its memory before the token enters it).

  Source: Peng et al. 2023 (arXiv 2305.13048), §3.1 and App. D.
  """

  def __init__(
    self,
    d_model: int,
    config: RWKV4Config | None = None,
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
    config = config or RWKV4Config()
    self.config = config
    self.d_model = d_model
    channels = self._channels()
    keys = jax.random.split(rngs.params(), 4)
    # The released code grades these from the first layer to the last; a mixer
    # does not know its place, so it takes the middle's.
    self.mix_key = nnx.Param(mix_weight(d_model, 0.5), weight_decay=False)
    self.mix_value = nnx.Param(
      mix_weight(d_model, 0.5, 0.15), weight_decay=False
    )
    self.mix_receptance = nnx.Param(
      mix_weight(d_model, 0.25), weight_decay=False
    )
    n = jnp.arange(channels, dtype=jnp.float32)
    place = n / max(channels - 1, 1)
    self.time_decay = nnx.Param(-5 + 8 * place**1.35, weight_decay=False)
    self.bonus = nnx.Param(
      jnp.log(0.3) + 0.5 * ((n + 1) % 3 - 1), weight_decay=False
    )
    weight = lambda key: linear_weight(key, d_model, channels, config.init)
    self.k_proj = nnx.Param(weight(keys[0]))
    self.v_proj = nnx.Param(weight(keys[1]))
    self.r_proj = nnx.Param(weight(keys[2]))
    self.out_proj = nnx.Param(
      output_weight(keys[3], channels, d_model, config.init, n_layers)
    )

  def __call__(
    self,
    x: Float[Array, "B T M"],
    state: RWKV4State | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T M"], RWKV4State]:
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
    k, v, r, last = self._before_scan(x, state.shift, segment_ids)
    valid, restart = segment_masks(segment_ids)
    sums = _sums(state)
    log_a = self._log_decay()[None, None]
    peak = running_maximum(log_a, k, state.peak, valid, restart)
    before = jnp.concatenate([state.peak[:, None], peak[:, :-1]], 1)
    if restart is not None:
      before = jnp.where(restart[..., None], FLOOR, before)
    after, final = ops.linear_scan(
      *_decay_and_write(log_a, k, v, before, peak, valid),
      initial_state=sums, segment_ids=_without_gaps(segment_ids),
      implementation=self.config.implementation,
    )  # fmt: skip
    past = jnp.concatenate([sums[:, None], after[:, :-1]], 1)
    if restart is not None:
      past = jnp.where(restart[..., None, None], 0, past)
    y = self._after_scan(past, before, k, v, r, x.dtype)
    new = RWKV4State(last, final[:, 0], final[:, 1], peak[:, -1])
    return clear_padding(y, segment_ids), new

  def step(
    self,
    x: Float[Array, "B M"],
    state: RWKV4State,
    segment_ids: Int[Array, " B"] | None = None,
  ) -> tuple[Float[Array, "B M"], RWKV4State]:
    """Mix one token, in O(1): y `[B, M]` and the new state."""
    check_step(self, x, state, segment_ids)
    k, v, r, last = self._before_scan(x, state.shift, segment_ids)
    valid = None if segment_ids is None else segment_ids > 0
    sums = _sums(state)
    log_a = self._log_decay()[None]
    peak = jnp.maximum(state.peak + log_a, k)
    if valid is not None:
      peak = jnp.where(valid[:, None], peak, state.peak)
    peak = jnp.maximum(lax.stop_gradient(peak), FLOOR)
    a, b = _decay_and_write(log_a, k, v, state.peak, peak, valid)
    _, final = ops.linear_step(a, b, state=sums, segment_ids=segment_ids)
    y = self._after_scan(sums, state.peak, k, v, r, x.dtype)
    new = RWKV4State(last, final[:, 0], final[:, 1], peak)
    return clear_padding(y, segment_ids), new

  def init_state(
    self, batch_size: int, max_length: int | None = None
  ) -> RWKV4State:
    """The state before any token; its size does not depend on a length."""
    del max_length
    zeros = lambda size: jnp.zeros((batch_size, size), jnp.float32)
    channels = self._channels()
    return RWKV4State(
      zeros(self.d_model), zeros(channels), zeros(channels),
      jnp.full((batch_size, channels), FLOOR, jnp.float32),
    )  # fmt: skip

  def recurrence(self, x: Float[Array, "B T M"]) -> Recurrence:
    """Show the layer's own Eq. 1 on `x`: S = (A,), normalised as in App. B.

    h_t is the mean that token t reads, which is of the tokens before it:

      a_t = e^{-w} D_{t-2}/D_{t-1},  dt_t = e^{k_{t-1}}/D_{t-1},  b_t = v_{t-1}

    and a + dt = 1; at first a = 0, dt = 1, b = 0. The readout weighs h_t
    against v_t by D_{t-1} and e^{u + k_t}. (Read off the state that has token
    t in it already, h_{t-1} would have to be divided by a decay that may be
    1e-9 or 0.) As D is a sum over the past, the theorems on influence, whose
    A_t depends on token t alone, do not speak of it; those on smoothing do.
    """
    check_mixer("RWKV4.recurrence", x, None, self.d_model)
    state = fresh_state(self, x)
    k, v, r, _ = self._before_scan(x, state.shift, None)
    log_a = self._log_decay()[None, None]
    peak = running_maximum(log_a, k, state.peak)
    before = jnp.concatenate([state.peak[:, None], peak[:, :-1]], 1)
    a, b = _decay_and_write(log_a, k, v, before, peak, None)
    total, _ = ops.linear_scan(
      a[:, :, 0], b[:, :, 1], implementation=self.config.implementation
    )
    # log D; where its token is the first, nothing is before it.
    total = peak + jnp.log(total)
    first = jnp.full_like(total[:, :1], -jnp.inf)
    past = jnp.concatenate([first, total[:, :-1]], 1)
    dt = jax.nn.sigmoid(k - (past + log_a))
    a = jax.nn.sigmoid(past + log_a - k)
    later = lambda v, first: jnp.concatenate([first, v[:, :-1]], 1)
    readout = jax.tree_util.Partial(
      _readout, (self.bonus[...] + k) - past, v, r, self.out_proj[...],
      x[:0, 0],
    )  # fmt: skip
    return Recurrence(
      later(a, a[:, :1]), later(dt, dt[:, :1]),
      later(v, jnp.zeros_like(v[:, :1])), jnp.zeros_like(v[:, 0]), readout,
    )  # fmt: skip

  def _channels(self):
    polarization = self.config.polarization or Polarization()
    return polarization.total(self.config.width or self.d_model)

  def _log_decay(self):
    """-w, float32 `[A]`."""
    log_a = -jnp.exp(self.time_decay[...])
    if self.config.polarization is None:
      return log_a
    # The added channels have keys too, so all decays are there by now.
    held = dataclasses.replace(self.config.polarization, placement="replace")
    return polarize_log(log_a, held)

  def _before_scan(self, x, state, segment_ids):
    """k and v in float32, r and the token shift's state."""
    x = clear_padding(x, segment_ids).astype(self.config.dtype)
    shift = token_shift if x.ndim == 3 else token_shift_step
    shifted, last = shift(x, state, segment_ids)
    k, v, r = (
      dense(mix(x, shifted, weight[...]), proj[...])
      for weight, proj in (
        (self.mix_key, self.k_proj),
        (self.mix_value, self.v_proj),
        (self.mix_receptance, self.r_proj),
      )
    )
    wide = jnp.float32
    return k.astype(wide), v.astype(wide), jax.nn.sigmoid(r), last

  def _after_scan(self, past, before, k, v, r, dtype):
    """y of the sums before the token, `[..., 2, A]`, in units of e^before."""
    bonus = self.bonus[...]
    unit = lax.stop_gradient(jnp.maximum(before, k + bonus))
    # k - unit first: next to a k of 1e3 the bonus would lose its digits.
    old, new = jnp.exp(before - unit), jnp.exp((k - unit) + bonus)
    numerator = old * past[..., 0, :] + new * v
    denominator = old * past[..., 1, :] + new
    y = r * (numerator / denominator).astype(r.dtype)
    return dense(y, self.out_proj[...]).astype(dtype)


def _sums(state):
  return jnp.stack([state.numerator, state.denominator], 1)


def _decay_and_write(log_a, k, v, before, peak, valid):
  """The sums' decay `[..., 1, A]` and what enters them, `[..., 2, A]`."""
  decay, write = (before - peak) + log_a, k - peak
  if valid is not None:
    decay = jnp.where(valid[..., None], decay, 0)
    write = jnp.where(valid[..., None], write, -jnp.inf)
  write = jnp.exp(write)
  b = jnp.stack([write * v, write], -2)
  return jnp.exp(decay)[..., None, :], b


def _without_gaps(segment_ids):
  """Padding with the id of the token before it (or first): sums pass on."""
  if segment_ids is None:
    return None
  valid = segment_ids > 0
  time = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
  seen = lax.cummax(jnp.where(valid, time, -1), axis=1)
  first = jnp.argmax(valid, 1).astype(jnp.int32)[:, None]
  ids = jnp.take_along_axis(segment_ids, jnp.where(seen < 0, first, seen), 1)
  return jnp.maximum(ids, 1)


def _readout(logit, v, r, out_proj, like, h, t):
  """The output at time t from the mean h, in the dtype of `like`."""
  logit, v, r = (
    lax.dynamic_index_in_dim(x, t, 1, keepdims=False) for x in (logit, v, r)
  )
  wkv = jax.nn.sigmoid(-logit) * h + jax.nn.sigmoid(logit) * v
  return dense(r * wkv.astype(r.dtype), out_proj).astype(like.dtype)
