"""The running maximum that keeps exponential gates within range.

Sums of exponentials e^{bᵢ} that decay are kept divided by e^{mₜ}, where mₜ is
the largest summand's logarithm. Any mₜ gives the same quotients: it is a
choice of unit, has no gradient, and its rounding changes nothing as long as
decays and inputs are formed from differences to the very mₜ that is kept.
"""

import jax
import jax.numpy as jnp
from jax import lax

from ssmjax.ops.partition import divided
from ssmjax.ops.varying import match_varying
from ssmjax.types import Array, Bool, Float

__all__ = ["FLOOR", "running_maximum"]

# The maximum of nothing: finite, for -inf - -inf is no number.
FLOOR = -1e38


def running_maximum(
  log_a: Float[Array, "B T *S"],
  b: Float[Array, "B T *S"],
  initial: Float[Array, "B *S"],
  valid: Bool[Array, "B T"] | None = None,
  restart: Bool[Array, "B T"] | None = None,
) -> Float[Array, "B T *S"]:
  """mₜ = max(log aₜ + mₜ₋₁, bₜ), at least `FLOOR`; it has no gradient.

  Args:
    log_a: log-decays, broadcastable to b (same rank), -inf for decay 0.
    b: logarithms of the inputs; what is not finite does not enter, so that it
      reaches no other document.
    initial: m₀, `[B, *S]`.
    valid: False at padding, where m stays.
    restart: True where m₀ and all before are forgotten.
  """
  log_a, b, initial = map(lax.stop_gradient, (log_a, b, initial))
  word = "rtd____"
  return divided(
    _running_maximum, (log_a, b, initial, valid, restart),
    (word, word, "rd____", "rt", "rt"), (word[: b.ndim],), only_typed=True,
  )[0]  # fmt: skip


def _running_maximum(log_a, b, initial, valid, restart):
  """Of each device's part."""
  wide = lambda mask: lax.expand_dims(mask, range(2, b.ndim))
  log_a = jnp.where(jnp.isnan(log_a), -jnp.inf, log_a)
  # False for NaN too.
  b = jnp.where(b < jnp.inf, b, -jnp.inf)
  log_a = jnp.broadcast_to(log_a, b.shape)
  if valid is not None:
    log_a = jnp.where(wide(valid), log_a, 0)
    b = jnp.where(wide(valid), b, -jnp.inf)
  if restart is not None:
    log_a = jnp.where(wide(restart), -jnp.inf, log_a)
  m = lax.platform_dependent(
    *match_varying(log_a, b, initial), cpu=_loop, default=_associative
  )
  return (jnp.maximum(m, FLOOR),)


def _loop(log_a, b, initial):
  def step(m, token):
    m = jnp.maximum(token[0] + m, token[1])
    return m, m

  time_first = lambda x: jnp.moveaxis(x, 1, 0)
  _, m = lax.scan(step, initial, (time_first(log_a), time_first(b)))
  return jnp.moveaxis(m, 0, 1)


def _associative(log_a, b, initial):
  def combine(l, r):
    return l[0] + r[0], jnp.maximum(l[1] + r[0], r[1])

  b = b.at[:, 0].max(log_a[:, 0] + initial)
  return jax.lax.associative_scan(combine, (log_a, b), axis=1)[1]
