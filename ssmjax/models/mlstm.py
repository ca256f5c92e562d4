"""The mLSTM: a matrix memory behind exponential gates, normalised."""

import dataclasses
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
  affine,
  check_exact,
  clear_padding,
  dense,
  fresh_state,
  linear_weight,
  output_weight,
)
from ssmjax.models.module import Module
from ssmjax.ops.segments import segment_masks
from ssmjax.ops.stabiliser import running_maximum
from ssmjax.polarization import polarize_log
from ssmjax.types import (
  Array,
  Float,
  FloatingDType,
  Int,
  Polarization,
  Positive,
  Recurrence,
  Size,
  check_fields,
)

__all__ = ["MLSTM", "MLSTMConfig", "MLSTMState"]


class MLSTMState(NamedTuple):
  """What an mLSTM carries from token to token, float32.

  Attributes:
    memory: C and, as a last column, the normaliser n, in units of e^{peak},
      `[B, H, K, V+1]`.
    peak: m of the stabiliser, `[B, H]`, never below 0.
  """

  memory: Float[Array, "B H K V"]
  peak: Float[Array, "B H"]


@dataclasses.dataclass(frozen=True)
class MLSTMConfig:
  """Sizes and choices of an `MLSTM` mixer.

  Attributes:
    num_heads: learned heads (with `placement="replace"`, all heads).
    key_width: of queries and keys of these heads together; None for
      d_model / 2, as in the 7B model.
    value_width: of values; None for d_model.
    forget_gate: `"sigmoid"`, or `"exp"`, which may be above 1.
    gate_soft_cap: c of c·tanh(g/c) on the gates before their activations;
      None for none (as in the first paper).
    input_bias: initial bias of the input gate (the 7B model: -10).
    polarization: heads of decay exactly 1 and 0; None for none.
    init: as in `MambaConfig`. The forget gate's bias begins at 3 to 6.
    dtype: dtype of activations; parameters, gates and states are float32.
    implementation: of the linear attention; None chooses.
  """

  op: ClassVar[str | None] = "gated_linear_attention"
  polarizes: ClassVar[str | None] = "heads"

  num_heads: Size = 4
  key_width: Size | None = None
  value_width: Size | None = None
  forget_gate: Literal["sigmoid", "exp"] = "sigmoid"
  gate_soft_cap: Positive | None = 15.0
  input_bias: float = 0.0
  polarization: Polarization | None = None
  init: Literal["mamba", "authors"] = "mamba"
  dtype: FloatingDType = jnp.float32
  implementation: Literal["reference", "chunked"] | None = None

  def __post_init__(self):
    check_fields(self)
    check_exact("MLSTMConfig", self.polarization)

  def build(self, d_model: int, n_layers: int, rngs: nnx.Rngs) -> "MLSTM":
    """Make the mixer for a model of this width and depth."""
    return MLSTM(d_model, self, n_layers=n_layers, rngs=rngs)


class MLSTM(Module):
  """xLSTM's matrix memory, in the layer of its 7B model.

  q, k, v = W_q x, W_k x, W_v x;  o = σ(W_o x)
  i = exp(cap(W_i x + b_i)),  f = σ(cap(W_f x + b_f)), of each head
  C_t = f_t C_{t-1} + i_t k vᵀ,  n_t = f_t n_{t-1} + i_t k
  h = C_tᵀ q / max(|n_tᵀ q|, 1), q scaled by K^{-½}
  y = W_out (o · LayerNorm(h) of each head)

  C and n are kept in units of e^{m}, m_t = max(log f_t + m_{t-1}, log i_t, 0),
  in which no factor exceeds 1 and the 1 of the maximum is e^{-m} ≤ 1. (Without
  the 0, as it is published, e^{-m} overflows where gates are shut.) The
  published code adds 1e-6 to the stabilised denominator, which changes h by a
  share that depends on m; here nothing is added.

  Polarization holds the forget gate of some heads at 1 (they sum i k vᵀ and
  i k for ever) and of others at 0 (they see the present token).

  Source: Beck et al. 2024 (arXiv 2405.04517), §2.3 and App. A.3; the layer
  and its soft cap: Beck et al. 2025 (arXiv 2503.13427), §3.
  """

  def __init__(
    self,
    d_model: int,
    config: MLSTMConfig | None = None,
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
      ValueError: a width does not divide into the heads.
    """
    config = config or MLSTMConfig()
    self.config = config
    self.d_model = d_model
    key_width = config.key_width or max(d_model // 2, 1)
    value_width = config.value_width or d_model
    for name, width in (
      ("key_width", key_width), ("value_width", value_width)
    ):  # fmt: skip
      if width % config.num_heads:
        raise ValueError(
          f"MLSTM: {name} is {width}, expected a multiple of"
          f" num_heads={config.num_heads}."
        )
    polarization = config.polarization or Polarization()
    self.heads = heads = polarization.total(config.num_heads)
    self.head_key = key_width // config.num_heads
    self.head_value = value_width // config.num_heads
    keys = jax.random.split(rngs.params(), 6)
    weight = lambda key, size: linear_weight(key, d_model, size, config.init)
    self.q_proj = nnx.Param(weight(keys[0], heads * self.head_key))
    self.k_proj = nnx.Param(weight(keys[1], heads * self.head_key))
    self.v_proj = nnx.Param(weight(keys[2], heads * self.head_value))
    self.o_proj = nnx.Param(weight(keys[3], heads * self.head_value))
    # Input gates, then forget gates.
    self.gate_proj = nnx.Param(weight(keys[4], 2 * heads))
    self.gate_bias = nnx.Param(
      jnp.concatenate(
        [
          jnp.full((heads,), config.input_bias, jnp.float32),
          jnp.linspace(3.0, 6.0, heads, dtype=jnp.float32),
        ]
      ),
      weight_decay=False,
    )
    self.norm = LayerNorm((heads, self.head_value), epsilon=1e-6)
    self.out_proj = nnx.Param(
      output_weight(
        keys[5], heads * self.head_value, d_model, config.init, n_layers
      )
    )

  def __call__(
    self,
    x: Float[Array, "B T M"],
    state: MLSTMState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T M"], MLSTMState]:
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
    q, k, v, o, log_i, log_f = self._before_scan(x, segment_ids)
    valid, restart = segment_masks(segment_ids)
    floored = jnp.maximum(log_i, 0)
    peak = running_maximum(log_f, floored, state.peak, valid, restart)
    before = jnp.concatenate([state.peak[:, None], peak[:, :-1]], 1)
    if restart is not None:
      # What was before is gone: it needs no unit, and no gate, which alone
      # may be above 1.
      before = jnp.where(restart[..., None], peak, before)
      log_f = jnp.where(restart[..., None], jnp.zeros_like(log_f), log_f)
    y, memory = ops.gated_linear_attention(
      q, *_stabilised(k, v, log_i, log_f, before, peak, valid),
      scale=self.head_key**-0.5, initial_state=state.memory,
      segment_ids=segment_ids, implementation=self.config.implementation,
    )  # fmt: skip
    y = self._after_scan(y, peak, o).astype(x.dtype)
    return clear_padding(y, segment_ids), MLSTMState(memory, peak[:, -1])

  def step(
    self,
    x: Float[Array, "B M"],
    state: MLSTMState,
    segment_ids: Int[Array, " B"] | None = None,
  ) -> tuple[Float[Array, "B M"], MLSTMState]:
    """Mix one token, in O(1): y `[B, M]` and the new state."""
    check_step(self, x, state, segment_ids)
    q, k, v, o, log_i, log_f = self._before_scan(x, segment_ids)
    valid = None if segment_ids is None else segment_ids > 0
    peak = jnp.maximum(jnp.maximum(log_f + state.peak, log_i), 0)
    if valid is not None:
      peak = jnp.where(valid[:, None], peak, state.peak)
    peak = lax.stop_gradient(peak)
    y, memory = ops.gated_linear_attention_step(
      q, *_stabilised(k, v, log_i, log_f, state.peak, peak, valid),
      scale=self.head_key**-0.5, state=state.memory, segment_ids=segment_ids,
    )  # fmt: skip
    y = self._after_scan(y, peak, o).astype(x.dtype)
    return clear_padding(y, segment_ids), MLSTMState(memory, peak)

  def init_state(
    self, batch_size: int, max_length: int | None = None
  ) -> MLSTMState:
    """The state before any token; its size does not depend on a length."""
    del max_length
    zeros = lambda *shape: jnp.zeros((batch_size, *shape), jnp.float32)
    return MLSTMState(
      zeros(self.heads, self.head_key, self.head_value + 1), zeros(self.heads)
    )

  def recurrence(self, x: Float[Array, "B T M"]) -> Recurrence:
    """Show the layer's own Eq. 1 on `x`: S = (H, K, V+1), C beside n.

    a = f (polarized) and dt = i of the head, b = k (v, 1)ᵀ; the readout is
    W_out (o · LayerNorm(Cᵀq / max(|nᵀq|, 1))). It is not stabilised: without
    a soft cap i overflows where its logarithm is above 88.
    """
    check_mixer("MLSTM.recurrence", x, None, self.d_model)
    q, k, v, o, log_i, log_f = self._before_scan(x, None)
    wide = lambda x: jnp.exp(x)[..., None, None]
    k, v = (x.astype(jnp.float32) for x in (k, _with_one(v)))
    b = k[..., None] * v[..., None, :]
    readout = jax.tree_util.Partial(_readout, self, q, o, x[:0, 0])
    a = jnp.broadcast_to(wide(log_f), b.shape)
    return Recurrence(a, wide(log_i), b, jnp.zeros_like(b[:, 0]), readout)

  def _before_scan(self, x, segment_ids):
    """q, k, v and o by head, and the gates' logarithms in float32."""
    x = clear_padding(x, segment_ids).astype(self.config.dtype)
    q, k, v, o = (
      dense(x, proj[...]).reshape(*x.shape[:-1], self.heads, -1)
      for proj in (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
    )
    # Few and decisive, so in float32 throughout.
    gates = affine(
      x.astype(jnp.float32), self.gate_proj[...], self.gate_bias[...],
      precision=Precision.HIGHEST,
    )  # fmt: skip
    cap = self.config.gate_soft_cap
    if cap is not None:
      gates = cap * jnp.tanh(gates / cap)
    log_i, log_f = jnp.split(gates, 2, -1)
    if self.config.forget_gate == "sigmoid":
      log_f = jax.nn.log_sigmoid(log_f)
    if self.config.polarization is not None:
      # The added heads have gates too, so all decays are there by now.
      held = dataclasses.replace(self.config.polarization, placement="replace")
      log_f = polarize_log(log_f, held)
    return q, k, v, jax.nn.sigmoid(o), log_i, log_f

  def _after_scan(self, y, peak, o):
    """The output of numerator and denominator `[..., H, V+1]`."""
    top, bottom = y[..., :-1], y[..., -1:].astype(jnp.float32)
    bottom = jnp.maximum(jnp.abs(bottom), jnp.exp(-peak)[..., None])
    h = self.norm(top.astype(jnp.float32) / bottom).astype(o.dtype)
    return dense((o * h).reshape(*o.shape[:-2], -1), self.out_proj[...])


def _with_one(v):
  """A column of ones, by which the memory carries its normaliser."""
  return jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)


def _stabilised(k, v, log_i, log_f, before, peak, valid):
  """k by its input gate, v with its one, and log f, in units of e^peak."""
  write = log_i - peak
  if valid is not None:
    # The gate of a padded token may be above the peak, which it left alone.
    write = jnp.where(valid[..., None], write, 0)
  k = (k * jnp.exp(write)[..., None]).astype(k.dtype)
  return k, _with_one(v), (before - peak) + log_f


def _readout(model, q, o, like, h, t):
  """The output at time t from the memory h, in the dtype of `like`."""
  q, o = (lax.dynamic_index_in_dim(x, t, 1, keepdims=False) for x in (q, o))
  q = q.astype(jnp.float32) * model.head_key**-0.5
  y = (q[..., None] * h).sum(-2)
  y = model._after_scan(y, jnp.zeros(y.shape[:-1], y.dtype), o)
  return y.astype(like.dtype)
