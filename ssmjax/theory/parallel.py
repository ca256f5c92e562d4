"""Lemma D.1: the recurrence as a weighted sum over all past tokens."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ssmjax.theory.eq1 import canonical, outputs, states
from ssmjax.types import Array, Inexact, Recurrence, gathered

__all__ = ["ParallelForm", "parallel_form", "parallel_weights"]


class ParallelForm(NamedTuple):
  """Both sides of Lemma D.1.

  Attributes:
    weights: Π_{r=s+1}^t Aᵣ at [t, s], 0 where s > t, `[B, T, T, *S]`.
    initial_weights: Π_{r=1}^t Aᵣ, the weight of h₀, `[B, T, *S]`.
    states: left: h of the recurrence, token by token, `[B, T, *S]`.
    parallel_states: right: the weighted sums.
    outputs: left: cₜ of the former, `[B, T, D]`.
    parallel_outputs: right: cₜ of the latter.
  """

  weights: Inexact[Array, "B T T *S"]
  initial_weights: Inexact[Array, "B T *S"]
  states: Inexact[Array, "B T *S"]
  parallel_states: Inexact[Array, "B T *S"]
  outputs: Inexact[Array, "B T D"]
  parallel_outputs: Inexact[Array, "B T D"]


@gathered
def parallel_weights(
  a: Inexact[Array, "B T *S"],
) -> Inexact[Array, "B T T *S"]:
  """Materialise the weights with which tokens enter states.

  W_ts = Π_{r=s+1}^t Aᵣ for s ≤ t (1 at s = t), 0 for s > t

  The products are taken as products, row t from row t - 1, so that decays of
  exactly 0 and 1, negative and complex ones are as good as others; sums of
  logarithms, as in the paper's proof, need A ≠ 0.

  The paper's remark: for 0 < A < 1, W_ts is strictly smaller the further s
  lies back, so that "SSMs assign strictly higher attention to the nearer
  tokens". That holds of W alone. A token's whole weight is W_ts Δₛ, and a
  large Δₛ can outweigh any number of later decays; what is true is that no
  token's weight ever grows again as t goes on.

  Args:
    a: decays, `[B, T, *S]`.

  Returns:
    Weights `[B, T, T, *S]`, t before s: memory O(T²).

  >>> parallel_weights(jnp.array([[0.5, 0.5, 0.5]]))[0]
  Array([[1.  , 0.  , 0.  ],
         [0.5 , 1.  , 0.  ],
         [0.25, 0.5 , 1.  ]], dtype=float32)
  """
  batch, length, *channels = a.shape
  places = jnp.arange(length)

  def row(weights, token):
    a, t = token
    here = (places == t).reshape((1, length) + (1,) * len(channels))
    weights = jnp.where(here, jnp.ones_like(weights), a[:, None] * weights)
    return weights, weights

  zeros = jnp.zeros((batch, length, *channels), a.dtype)
  _, rows = lax.scan(row, zeros, (jnp.moveaxis(a, 1, 0), places))
  return jnp.moveaxis(rows, 0, 1)


@gathered
def parallel_form(recurrence: Recurrence) -> ParallelForm:
  """Evaluate both sides of Lemma D.1.

  yₜ = cₜ(Σ_{s≤t} (Π_{r=s+1}^t Aᵣ) Δₛ bₛ(xₛ) + (Π_{r=1}^t Aᵣ) h₀)

  By induction: it is true of t = 0, where the sum is empty and the product 1,
  and Aₜ times the sum for t - 1, plus Δₜbₜ, is the sum for t. Nothing is asked
  of A but that it be diagonal, so the lemma has no premise to check; the paper
  has h₀ = 0.

  Args:
    recurrence: of T tokens; memory is O(T²) for each channel.

  Returns:
    Both sides, which agree to rounding.

  Source: Wang et al. 2025, Lemma D.1 (Eq. 5).
  """
  a, dt, b, h = canonical("parallel_form", recurrence)
  weights = parallel_weights(a)
  initial = jnp.cumprod(a, 1)
  drive = dt.astype(h.dtype) * b.astype(h.dtype)
  summed = jax.vmap(lambda rows: (rows.astype(h.dtype) * drive).sum(1), 1, 1)(
    weights
  )
  summed = summed + initial.astype(h.dtype) * h[:, None]
  sequential = states(recurrence)
  return ParallelForm(
    weights, initial, sequential, summed,
    outputs(recurrence, sequential), outputs(recurrence, summed),
  )  # fmt: skip
