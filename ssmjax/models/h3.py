"""H3: a shift and a diagonal system between two products."""

import dataclasses
from typing import ClassVar, Literal, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from flax import nnx

from ssmjax.models.diagonal_system import DiagonalSystem
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
from ssmjax.models.s4_block import check_system
from ssmjax.types import (
  Array,
  Float,
  FloatingDType,
  Inexact,
  Int,
  Polarization,
  Positive,
  Size,
)

__all__ = ["H3", "H3Config", "H3State"]


class H3State(NamedTuple):
  """What an H3 mixer carries from token to token.

  Attributes:
    conv: the last W-1 keys before the shift system, `[B, W-1, M]`, float32.
    hidden: the state of the diagonal system, `[B, H, P, P, N]`, complex64
      (float32 where the system is real).
  """

  conv: Float[Array, "B V M"]
  hidden: Inexact[Array, "B H P P N"]


@dataclasses.dataclass(frozen=True)
class H3Config:
  """Sizes and choices of an `H3` mixer.

  Attributes:
    d_state: N, learned states of a head's system (with `placement="replace"`,
      all); each stands for itself and its conjugate, so that it is half of
      the N of the paper (there 64).
    head_dim: P, channels of a head, a divisor of d_model.
    d_conv: W, the shift system's memory. (In the released code it is N.)
    spectrum: of the diagonal system at initialisation: see `S4DConfig`.
    discretization: bilinear, as in the released code, or zero-order hold.
    dt_min: smallest Δ at initialisation.
    dt_max: largest Δ at initialisation; Δ is log-uniform between them.
    polarization: channels of the diagonal system with decay exactly 1 and 0.
    init: of the linear maps, as in `MambaConfig`.
    dtype: dtype of activations; parameters and states are 32 bits wide.
    implementation: of the diagonal system's scan; None chooses.
  """

  op: ClassVar[str | None] = "lti_scan"
  polarizes: ClassVar[str | None] = "channels"

  d_state: Size = 32
  head_dim: Size = 1
  d_conv: Size = 4
  spectrum: Literal["legs", "lin", "inv", "real"] = "lin"
  discretization: Literal["bilinear", "zoh"] = "bilinear"
  dt_min: Positive = 1e-3
  dt_max: Positive = 1e-1
  polarization: Polarization | None = None
  init: Literal["mamba", "authors"] = "mamba"
  dtype: FloatingDType = jnp.float32
  implementation: Literal["reference", "associative", "chunked"] | None = None

  def __post_init__(self):
    check_system(self)

  def build(self, d_model: int, n_layers: int, rngs: nnx.Rngs) -> "H3":
    """Make the mixer for a model of this width and depth."""
    return H3(d_model, self, n_layers=n_layers, rngs=rngs)


class H3(Module):
  """H3: keys shifted, then multiplied by values, summed, and by queries.

  q, k, v = split(W_in x + b_in);  k̂ = shift(k)
  h_t = Ā h_{t-1} + B̄ (k̂_t v_tᵀ);  o_t = q_tᵀ (2 Re C h_t + D k̂_t v_tᵀ)
  y = W_out o + b_out

  with one system (Ā, B̄, C, D) a head, for each of the P² products. The shift
  system is a convolution of W taps; its skip is the tap of the present token,
  and the published input vector, at first e₁, is in the taps.

  Polarization holds the decay of some channels of the diagonal system at 1
  (they sum Δ B k̂ v for ever) and of others at 0. The layer as a whole has no
  diagonal Eq. 1: the matrix of a shift is nilpotent.

  Source: Fu et al. 2023 (arXiv 2212.14052), §3.1 and Algorithm 1.
  """

  def __init__(
    self,
    d_model: int,
    config: H3Config | None = None,
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
      ValueError: d_model does not divide into heads.
    """
    config = config or H3Config()
    self.config = config
    self.d_model = d_model
    if d_model % config.head_dim:
      raise ValueError(
        f"H3: d_model is {d_model}, expected a multiple of"
        f" head_dim={config.head_dim}."
      )
    heads = d_model // config.head_dim
    keys = jax.random.split(rngs.params(), 8)
    own = config.init == "mamba"

    def bias(key, size):
      zeros = jnp.zeros((size,), jnp.float32)
      return torch_uniform(key, (size,), d_model) if own else zeros

    self.in_proj = nnx.Param(
      linear_weight(keys[0], d_model, 3 * d_model, config.init)
    )
    self.in_bias = nnx.Param(bias(keys[1], 3 * d_model), weight_decay=False)
    self.shift = ShortConv(d_model, config.d_conv, keys[2], bias=False)
    # The shift system's skip, N(0, 1) in the released code.
    skip = jax.random.normal(keys[3], (d_model,), jnp.float32)
    self.shift.weight = nnx.Param(self.shift.weight[...].at[-1].add(skip))
    self.system = DiagonalSystem(
      heads,
      config.d_state,
      config.spectrum,
      keys[4],
      dt_range=(config.dt_min, config.dt_max),
      discretization=config.discretization,
      polarization=config.polarization,
    )
    self.D = nnx.Param(
      jax.random.normal(keys[5], (heads,), jnp.float32), weight_decay=False
    )
    self.out_proj = nnx.Param(
      output_weight(keys[6], d_model, d_model, config.init, n_layers)
    )
    self.out_bias = nnx.Param(
      bias(keys[7], d_model) / n_layers**0.5, weight_decay=False
    )

  def __call__(
    self,
    x: Float[Array, "B T M"],
    state: H3State | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T M"], H3State]:
    """Mix over time.

    Args:
      x: `[B, T, M]`.
      state: to go on from; None for the beginning.
      segment_ids: `[B, T]`, 1-based, 0 for padding.

    Returns:
      y `[B, T, M]` of x's dtype (0 at padding) and the state after it.
    """
    check_call(self, x, state, segment_ids)
    q, k, v = self._split(clear_padding(x, segment_ids))
    k, conv = self.shift(k, None if state is None else state.conv, segment_ids)
    products = self._products(k, v)
    width = self.config.head_dim**2
    ids = None if segment_ids is None else jnp.repeat(segment_ids, width, 0)
    y, hidden = self.system.scan(
      _fold(products),
      self.D[...],
      None if state is None else _fold(state.hidden, 1),
      ids,
      self.config.implementation,
    )
    y = self._write(q, self._unfold(y, x.shape[0]), x.dtype)
    hidden = self._unfold(hidden, x.shape[0], 1)
    return clear_padding(y, segment_ids), H3State(conv, hidden)

  def step(
    self,
    x: Float[Array, "B M"],
    state: H3State,
    segment_ids: Int[Array, " B"] | None = None,
  ) -> tuple[Float[Array, "B M"], H3State]:
    """Mix one token, in O(1): y `[B, M]` and the new state."""
    check_step(self, x, state, segment_ids)
    q, k, v = self._split(clear_padding(x, segment_ids))
    k, conv = self.shift.step(k, state.conv, segment_ids)
    products = self._products(k, v)
    width = self.config.head_dim**2
    ids = None if segment_ids is None else jnp.repeat(segment_ids, width, 0)
    y, hidden = self.system.step(
      _fold(products), self.D[...], _fold(state.hidden, 1), ids
    )
    y = self._write(q, self._unfold(y, x.shape[0]), x.dtype)
    hidden = self._unfold(hidden, x.shape[0], 1)
    return clear_padding(y, segment_ids), H3State(conv, hidden)

  def init_state(
    self, batch_size: int, max_length: int | None = None
  ) -> H3State:
    """The state before any token; its size does not depend on a length."""
    del max_length
    width = self.config.head_dim**2
    hidden = self.system.init_state(batch_size * width)
    return H3State(
      self.shift.init_state(batch_size), self._unfold(hidden, batch_size, 1)
    )

  def recurrence(self, x: Float[Array, "B T M"]) -> NoReturn:
    """Raise: the shift system is not diagonal."""
    del x
    raise NotImplementedError(
      "H3.recurrence: there is no diagonal Eq. 1 of the layer, for the matrix"
      " of its shift system is nilpotent. S4D shows that of its other system."
    )

  def _split(self, x):
    x = x.astype(self.config.dtype)
    y = affine(x, self.in_proj[...], self.in_bias[...])
    return jnp.split(y, 3, -1)

  def _heads(self, x):
    return x.reshape(*x.shape[:-1], -1, self.config.head_dim)

  def _products(self, k, v):
    """Each head's keys by values, `[..., H, P, P]`."""
    return self._heads(k)[..., :, None] * self._heads(v)[..., None, :]

  def _unfold(self, x, rows, trailing=0):
    """What `_fold` has done, undone."""
    width = self.config.head_dim
    x = x.reshape(rows, width, width, *x.shape[1:])
    axis = x.ndim - trailing
    return jnp.moveaxis(x, (1, 2), (axis - 2, axis - 1))

  def _write(self, q, y, dtype):
    o = (self._heads(q)[..., None].astype(jnp.float32) * y).sum(-2)
    o = o.reshape(q.shape).astype(q.dtype)
    return affine(o, self.out_proj[...], self.out_bias[...], dtype=dtype)


def _fold(x, trailing=0):
  """The P² products of a head as rows: `[B, ..., P, P]` to `[B·P², ...]`.

  `trailing` axes behind them stay where they are.
  """
  axis = x.ndim - trailing
  x = jnp.moveaxis(x, (axis - 2, axis - 1), (1, 2))
  return x.reshape(-1, *x.shape[3:])
