"""Cross-entropy straight from features, without the logits in memory."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from ssmjax.ops.class_ids import known_ids
from ssmjax.ops.varying import match_varying
from ssmjax.types import (
  Array,
  Float,
  Int,
  check_arrays,
  check_inexact,
  check_number,
  check_shapes,
)

__all__ = ["linear_cross_entropy"]

# Logits at once: 4 M floats, 16 MB.
_BLOCK_LOGITS = 1 << 22


def linear_cross_entropy(
  features: Float[Array, "P M"],
  weight: Float[Array, "V M"],
  targets: Int[Array, " P"],
  weights: Float[Array, " P"] | None = None,
  *,
  softcap: float | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Sum the cross-entropy of linear logits over positions.

  loss = Σₚ wₚ (log Σᵥ exp(fₚ·eᵥ) - fₚ·e_target),  in float32

  with c·tanh(fₚ·eᵥ / c) for each logit where there is a soft cap c.

  The logits of a block of positions at a time are formed, and in the same
  pass their gradient, so that P·V logits are never in memory and nothing is
  computed twice. Gather labelled positions before calling.

  Args:
    features: fₚ, `[P, M]`.
    weight: eᵥ, the tied embedding or a head of its own, `[V, M]`.
    targets: `[P]` int; out of range gives NaN where its weight is not 0.
    weights: `[P]`, 0 for positions that do not count; ones if None. They
      carry no gradient.
    softcap: c, above 0; None for logits as they are.

  Returns:
    The sum of the losses, and the sum of the weights of the positions whose
    largest logit is the target's; both scalars, float32.

  Raises:
    ValueError: an argument of the wrong shape or dtype, a soft cap that is not
      above 0.

  >>> loss, correct = linear_cross_entropy(
  ...   jnp.eye(2), jnp.eye(2), jnp.array([0, 0]))
  >>> float(correct)
  1.0
  """
  function = "linear_cross_entropy"
  check_arrays(function, features=features, weight=weight, targets=targets)
  check_inexact(function, features=features, weight=weight, weights=weights)
  check_shapes(
    function,
    {
      "features": (features, "P M"),
      "weight": (weight, "V M"),
      "targets": (targets, "P"),
      "weights": (weights, "P"),
    },
  )
  dtype = jnp.result_type(targets)
  if not jnp.issubdtype(dtype, jnp.integer):
    raise ValueError(
      f"{function}: targets has dtype {dtype.name}, expected class numbers of"
      " an integer type. Pass targets.astype(jnp.int32)."
    )
  if softcap is not None:
    check_number(function, "softcap", softcap)
  if softcap is not None and not softcap > 0:
    raise ValueError(
      f"{function}: softcap is {softcap!r}, expected a number above 0, or None."
    )
  if weights is None:
    weights = jnp.ones(targets.shape, jnp.float32)
  args = match_varying(
    features,
    weight,
    known_ids(targets, weight.shape[0]),
    weights.astype(jnp.float32),
  )
  run = functools.partial(_loss, softcap)
  mesh = _explicit_mesh(args)
  if mesh is None:
    return run(*args)
  # Sums over divided positions have no division that types could name: the
  # compiler divides, and the gradients get the arguments' division back.
  everywhere = jax.NamedSharding(mesh, jax.P())
  automatic = jax.sharding.auto_axes(
    run, axes=mesh.explicit_axes, out_sharding=(everywhere, everywhere)
  )
  return automatic(*args)


def _explicit_mesh(arrays):
  """The mesh whose explicit axes are in the types of arrays, or None."""
  for x in arrays:
    mesh = jax.typeof(x).sharding.mesh
    if mesh.explicit_axes:
      return mesh
  return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(softcap, features, weight, targets, weights):
  return _blocks(softcap, features, weight, targets, weights, False)[:2]


def _forward(softcap, features, weight, targets, weights):
  loss, correct, d_features, d_weight = _blocks(
    softcap, features, weight, targets, weights, True
  )
  return (loss, correct), (d_features, d_weight.astype(weight.dtype))


def _backward(softcap, gradients, cotangents):
  del softcap
  d_features, d_weight = gradients
  scale = lambda g: (g.astype(jnp.float32) * cotangents[0]).astype(g.dtype)
  return scale(d_features), scale(d_weight), None, None


_loss.defvjp(_forward, _backward)


def _blocks(softcap, features, weight, targets, weights, differentiate):
  """(loss, correct) and, on request, (d_features, d_weight in float32)."""
  positions = features.shape[0]
  size = max(1, min(positions, _BLOCK_LOGITS // weight.shape[0]))
  count = -(-positions // size)
  block = functools.partial(_block, weight, softcap, differentiate)
  if count == 1:
    return block(features, targets, weights)
  padding = count * size - positions
  split = lambda x: jnp.pad(
    x, ((0, padding),) + ((0, 0),) * (x.ndim - 1)
  ).reshape(count, size, *x.shape[1:])

  def step(totals, xs):
    loss, correct, *gradients = block(*xs)
    sums = (loss, correct, *gradients[1:])
    totals = jax.tree.map(jnp.add, totals, sums)
    return totals, gradients[:1]

  xs = (split(features), split(targets), split(weights))
  zero = jnp.zeros((), jnp.float32)
  totals = (zero, zero)
  if differentiate:
    totals += (jnp.zeros(weight.shape, jnp.float32),)
  totals = match_varying(*totals, xs[2])[: len(totals)]
  (loss, correct, *d_weight), d_features = lax.scan(step, totals, xs)
  if not differentiate:
    return loss, correct
  d_features = d_features[0].reshape(-1, features.shape[1])[:positions]
  return loss, correct, d_features, d_weight[0]


def _block(weight, softcap, differentiate, features, targets, weights):
  counts = weights != 0
  # 0 · NaN would be NaN in the gradient of the embedding.
  features = jnp.where(counts[:, None], features, jnp.zeros_like(features))
  logits = jnp.einsum(
    "pm,vm->pv", features, weight.astype(features.dtype),
    preferred_element_type=jnp.float32,
  )  # fmt: skip
  if softcap is not None:
    slope = jnp.tanh(logits / softcap)
    logits = softcap * slope
    slope = 1 - jnp.square(slope)
  largest = lax.stop_gradient(logits.max(-1, keepdims=True))
  exponentials = jnp.exp(logits - largest)
  total = exponentials.sum(-1, keepdims=True)
  vocabulary = jnp.arange(weight.shape[0], dtype=jnp.int32)
  hit = targets[:, None] == vocabulary[None]
  target_logit = jnp.where(hit, logits, jnp.zeros_like(logits)).sum(-1)
  known = (targets >= 0) & (targets < weight.shape[0])
  target_logit = jnp.where(known, target_logit, jnp.nan)
  nll = (jnp.log(total) + largest)[:, 0] - target_logit
  loss = jnp.where(counts, weights * nll, jnp.zeros_like(nll)).sum()
  # Ties go to the first, as argmax has it.
  best = jnp.argmax(logits, -1).astype(targets.dtype)
  correct = jnp.where(best == targets, weights, jnp.zeros_like(weights)).sum()
  if not differentiate:
    return loss, correct
  d_logits = exponentials / total - hit.astype(jnp.float32)
  scale = jnp.where(counts & ~known, jnp.nan, weights)
  d_logits = d_logits * scale[:, None]
  if softcap is not None:
    d_logits = d_logits * slope
  d_logits = d_logits.astype(features.dtype)
  d_features = jnp.einsum(
    "pv,vm->pm", d_logits, weight.astype(features.dtype),
    preferred_element_type=jnp.float32,
  ).astype(features.dtype)  # fmt: skip
  d_weight = jnp.einsum(
    "pv,pm->vm", d_logits, features, preferred_element_type=jnp.float32
  )
  return loss, correct, d_features, d_weight
