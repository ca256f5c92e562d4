"""The Legendre memory unit: a fixed HiPPO system, of which the past is read."""

import dataclasses
import functools
import math
from typing import ClassVar, Literal, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ssmjax import ops
from ssmjax.models.doors import check_call, check_step
from ssmjax.models.layers import (
  affine,
  clear_padding,
  dense,
  linear_weight,
  output_weight,
  torch_uniform,
)
from ssmjax.models.module import Module
from ssmjax.types import (
  Array,
  Float,
  FloatingDType,
  Int,
  Positive,
  Size,
  check_fields,
)

__all__ = ["LMU", "LMUConfig", "LMUState"]


class LMUState(NamedTuple):
  """What an LMU mixer carries from token to token.

  Attributes:
    memory: the coefficients of the past, `[B, D, N]`, float32.
  """

  memory: Float[Array, "B D N"]


@dataclasses.dataclass(frozen=True)
class LMUConfig:
  """Sizes and choices of an `LMU` mixer.

  Attributes:
    d_state: N, coefficients of each memory.
    channels: D, memories, each of its own scalar input; one in the paper.
    window: θ, in tokens: with LegT the past that is held; with LegS 1/Δ, the
      tokens in which it fades.
    measure: `"legt"`, the system of the LMU, or `"legs"`, with Δ fixed.
    activation: f of inputs and read-out; the paper's is relu.
    init: of the linear maps, as in `MambaConfig`.
    dtype: dtype of activations; parameters and memories are float32.
    implementation: of the scan; None chooses.
  """

  op: ClassVar[str | None] = "lti_matrix_scan"
  polarizes: ClassVar[str | None] = None

  d_state: Size = 64
  channels: Size = 4
  window: Positive = 128.0
  measure: Literal["legt", "legs"] = "legt"
  activation: Literal["relu", "gelu"] = "relu"
  init: Literal["mamba", "authors"] = "mamba"
  dtype: FloatingDType = jnp.float32
  implementation: Literal["reference", "chunked"] | None = None

  def __post_init__(self):
    check_fields(self)

  def build(self, d_model: int, n_layers: int, rngs: nnx.Rngs) -> "LMU":
    """Make the mixer for a model of this width and depth."""
    return LMU(d_model, self, n_layers=n_layers, rngs=rngs)


class LMU(Module):
  """The Legendre memory unit, in its form without a nonlinear loop.

  u_t = f(W_u x_t + b_u);  m_t = Ā m_{t-1} + B̄ u_t
  y_t = W_out f(W_m m_t + W_x x_t + b_h)

  Ā and B̄ are HiPPO's, held within a step, and not learned: m_t is what is
  left of each u's past in Legendre polynomials. W_out, which the paper's layer
  has not, lets it write what is below 0 to the residual. Ā is a full matrix:
  there is no polarization and no diagonal Eq. 1.

  Source: Voelker et al. 2019 (NeurIPS), Eq. 1-2; Chilkuri & Eliasmith 2021
  (arXiv 2102.11417), Eq. 18-20; Gu et al. 2020, HiPPO (arXiv 2008.07669).
  """

  def __init__(
    self,
    d_model: int,
    config: LMUConfig | None = None,
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
    config = config or LMUConfig()
    self.config = config
    self.d_model = d_model
    keys = jax.random.split(rngs.params(), 6)
    own = config.init == "mamba"
    inner = d_model + config.channels * config.d_state

    def bias(key, size, fan_in):
      zeros = jnp.zeros((size,), jnp.float32)
      return torch_uniform(key, (size,), fan_in) if own else zeros

    self.in_proj = nnx.Param(
      linear_weight(keys[0], d_model, config.channels, config.init)
    )
    self.in_bias = nnx.Param(
      bias(keys[1], config.channels, d_model), weight_decay=False
    )
    # W_m above W_x.
    self.read_proj = nnx.Param(
      linear_weight(keys[2], inner, d_model, config.init)
    )
    self.read_bias = nnx.Param(
      bias(keys[3], d_model, inner), weight_decay=False
    )
    self.out_proj = nnx.Param(
      output_weight(keys[4], d_model, d_model, config.init, n_layers)
    )

  def __call__(
    self,
    x: Float[Array, "B T M"],
    state: LMUState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T M"], LMUState]:
    """Mix over time.

    Args:
      x: `[B, T, M]`.
      state: to go on from; None for the beginning.
      segment_ids: `[B, T]`, 1-based, 0 for padding.

    Returns:
      y `[B, T, M]` of x's dtype (0 at padding) and the state after it.
    """
    check_call(self, x, state, segment_ids)
    wide, u = self._encode(x, segment_ids)
    # Memories are rows of one system.
    batch, length, channels = u.shape
    rows = jnp.moveaxis(u, 2, 1).reshape(-1, length, 1)
    ids = segment_ids
    memory = None if state is None else state.memory.reshape(len(rows), 1, -1)
    if ids is not None:
      ids = jnp.repeat(ids, channels, 0)
    m, memory = ops.lti_matrix_scan(
      rows, *_system(self.config), initial_state=memory, segment_ids=ids,
      implementation=self.config.implementation,
    )  # fmt: skip
    m = jnp.moveaxis(m.reshape(batch, channels, length, -1), 1, 2)
    y = self._read(m, wide).astype(x.dtype)
    memory = memory.reshape(batch, channels, -1)
    return clear_padding(y, segment_ids), LMUState(memory)

  def step(
    self,
    x: Float[Array, "B M"],
    state: LMUState,
    segment_ids: Int[Array, " B"] | None = None,
  ) -> tuple[Float[Array, "B M"], LMUState]:
    """Mix one token, in O(1): y `[B, M]` and the new state."""
    check_step(self, x, state, segment_ids)
    wide, u = self._encode(x, segment_ids)
    batch, channels = u.shape
    ids = segment_ids
    if ids is not None:
      ids = jnp.repeat(ids, channels, 0)
    m, memory = ops.lti_matrix_step(
      u.reshape(-1, 1), *_system(self.config),
      state=state.memory.reshape(batch * channels, 1, -1), segment_ids=ids,
    )  # fmt: skip
    y = self._read(m.reshape(batch, channels, -1), wide).astype(x.dtype)
    memory = memory.reshape(batch, channels, -1)
    return clear_padding(y, segment_ids), LMUState(memory)

  def init_state(
    self, batch_size: int, max_length: int | None = None
  ) -> LMUState:
    """The state before any token; its size does not depend on a length."""
    del max_length
    sizes = (self.config.channels, self.config.d_state)
    return LMUState(jnp.zeros((batch_size, *sizes), jnp.float32))

  def recurrence(self, x: Float[Array, "B T M"]) -> NoReturn:
    """Raise: the state matrix is full."""
    del x
    raise NotImplementedError(
      "LMU.recurrence: there is no diagonal Eq. 1, for HiPPO's matrix is full,"
      " and its eigenvectors are too ill-conditioned to make it diagonal."
    )

  def _encode(self, x, segment_ids):
    """x at the dtype of activations and u in float32."""
    wide = clear_padding(x, segment_ids).astype(self.config.dtype)
    u = affine(wide, self.in_proj[...], self.in_bias[...], dtype=jnp.float32)
    return wide, self._activate(u)

  def _read(self, m, x):
    m = m.reshape(*x.shape[:-1], -1).astype(x.dtype)
    y = affine(
      jnp.concatenate([m, x], -1), self.read_proj[...], self.read_bias[...],
      dtype=jnp.float32,
    )  # fmt: skip
    y = self._activate(y)
    return dense(y.astype(x.dtype), self.out_proj[...])

  def _activate(self, x):
    return (
      jax.nn.relu(x) if self.config.activation == "relu" else jax.nn.gelu(x)
    )


def _system(config):
  """Ā `[1, N, N]`, B̄ `[1, N]` and the read-out of all states, float32."""
  a, b = _held(config.measure, config.d_state, config.window)
  unit = np.eye(config.d_state)
  return tuple(jnp.asarray(v[None], jnp.float32) for v in (a, b, unit))


@functools.cache
def _held(measure, size, window):
  """HiPPO's Ā and B̄ of one token, by one exponential in float64."""
  if measure == "legt":
    A, B = ops.hippo_legt(size, window)
  else:
    A, B = (v / window for v in ops.hippo_legs(size))
  # Van Loan's: [[A, B], [0, 0]] holds both. `ops.zero_order_hold` is float32.
  whole = np.zeros((size + 1, size + 1))
  whole[:size, :size], whole[:size, size] = A, B
  norm = np.abs(whole).sum(0).max()
  halvings = max(0, math.ceil(math.log2(norm)) + 1)
  small = whole / 2.0**halvings
  power = total = np.eye(size + 1)
  for k in range(1, 17):
    power = power @ small / k
    total = total + power
  for _ in range(halvings):
    total = total @ total
  return total[:size, :size], total[:size, size]
