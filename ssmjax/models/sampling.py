"""How the next token is chosen from logits: cuts, penalty and draw."""

import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssmjax.types import Array, Bool, Float, Int

__all__ = [
  "Sampling",
  "check_count",
  "choose_tokens",
  "is_unknown",
  "make_sampling",
  "row_keys",
]


class Sampling(NamedTuple):
  """How to choose among tokens; arrays, so that no value recompiles.

  Attributes:
    temperature: what logits are divided by, 0 for the likeliest token.
    top_p: share of the probability to keep; None for all.
    min_p: least probability in units of the largest; None for none.
    repetition_penalty: of tokens that are there already; None for none.
  """

  temperature: Any
  top_p: Any = None
  min_p: Any = None
  repetition_penalty: Any = None


def make_sampling(
  function: str,
  temperature: Any,
  top_p: Any,
  min_p: Any,
  repetition_penalty: Any,
) -> Sampling:
  """Check the numbers of a sampling, those that are known."""
  check = lambda name, value, expected, fits: _number(
    function, name, value, expected, fits
  )
  return Sampling(
    check(
      "temperature", temperature,
      "a finite number, 0 (the likeliest token) or more",
      lambda x: 0 <= x < math.inf,
    ),
    check(
      "top_p", top_p, "above 0 and at most 1, or None", lambda x: 0 < x <= 1
    ),
    check("min_p", min_p, "0 to 1, or None", lambda x: 0 <= x <= 1),
    check(
      "repetition_penalty", repetition_penalty,
      "a finite number above 0 (1 changes nothing), or None",
      lambda x: 0 < x < math.inf,
    ),
  )  # fmt: skip


def choose_tokens(
  logits: Float[Array, "B V"],
  keys: Array | None,
  sampling: Sampling,
  seen: Bool[Array, "B V"] | None,
  *,
  top_k: int | None,
  vocab_size: int,
) -> Int[Array, " B"]:
  """Choose one token a row.

      lᵥ → lᵥ / r where lᵥ > 0, lᵥ r elsewhere,   for v that are there already
      lᵥ → lᵥ / temperature
      keep the k largest; of them the fewest with Σ softmax(l)ᵥ ≥ top_p;
      of them those with softmax(l)ᵥ ≥ min_p max softmax(l)
      v ~ softmax(l) over what is kept

  in this order, which is that of the transformers library. Of equal logits,
  the lower token comes first, so that exactly k are kept.

  Sources: r, Keskar et al. 2019 (arXiv 1909.05858, §4.1), with the sign's case
  as transformers has it; k, Fan et al. 2018 (arXiv 1805.04833); top_p, Holtzman
  et al. 2020 (arXiv 1904.09751, §3.1); min_p, Nguyen et al. 2024 (arXiv
  2407.01082, §3).

  Args:
    logits: `[B, V]` float32.
    keys: a key a row, `[B]`; None takes the likeliest token.
    sampling: the numbers.
    seen: the tokens that are there already, for the penalty.
    top_k: k.
    vocab_size: tokens that there are; later columns are never chosen.

  Returns:
    `[B]` int32, -1 for a row whose logits are not finite.
  """
  there = jnp.arange(logits.shape[-1], dtype=jnp.int32) < vocab_size
  zeros = jnp.zeros_like(logits)
  finite = jnp.isfinite(jnp.where(there, logits, zeros)).all(-1)
  # Rows without a choice must not make NaNs that debuggers stop at.
  logits = jnp.where(finite[:, None], logits, zeros)
  penalty = sampling.repetition_penalty
  if penalty is not None and seen is not None:
    punished = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(seen, punished, logits)
  logits = jnp.where(there, logits, -jnp.inf)
  token = jnp.argmax(logits, -1).astype(jnp.int32)
  if keys is not None:
    drawn = _draw(logits, keys, sampling, top_k)
    cold = sampling.temperature < np.finfo(np.float32).tiny
    token = jnp.where(cold, token, drawn)
  return jnp.where(finite, token, -1)


def row_keys(key: Array | None, count: Int[Array, " B"]) -> Array | None:
  """Give each row the key of its next token, from how many it has drawn.

  One key for all is folded with the row's number; of an array of keys each
  row has its own, so that it draws as it would alone.
  """
  if key is None:
    return None
  if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    key = jax.random.wrap_key_data(key)
  if key.ndim == 0:
    # Made of the counts, to lie on the same devices.
    row = jnp.arange(count.shape[0], dtype=jnp.int32) + count * 0
    key = jax.vmap(jax.random.fold_in, (None, 0))(key, row)
  return jax.vmap(jax.random.fold_in)(key, count)


def is_unknown(*values: Any) -> bool:
  """Whether any array cannot be looked at: traced, or on other hosts too."""
  return any(
    isinstance(x, jax.core.Tracer)
    or not getattr(x, "is_fully_addressable", True)
    for x in jax.tree.leaves(values)
  )


def check_count(function: str, name: str, value: Any, most: int | None) -> int:
  """Check a number of tokens, 1 or more, and at most `most`."""
  expected = "1 or more" if most is None else f"1 to vocab_size={most}"
  try:
    number = operator.index(value)
  except TypeError:
    number = 0
  known = not isinstance(value, bool) and number >= 1
  if not known or (most is not None and number > most):
    raise ValueError(f"{function}: {name} is {value!r}, expected {expected}.")
  return number


def _draw(logits, keys, sampling, top_k):
  """Draw a token a row from what the cuts leave of its logits."""
  temperature = jnp.maximum(sampling.temperature, np.finfo(np.float32).tiny)
  # Differences first: a small temperature must not make inf - inf.
  scores = (logits - logits.max(-1, keepdims=True)) / temperature
  order = None
  if top_k is not None or sampling.top_p is not None:
    # Largest first and of equal ones the lower token: a cut is a prefix.
    scores, order = jax.lax.top_k(scores, top_k or scores.shape[-1])
  if sampling.top_p is not None:
    # A token stays where those before it do not have that share yet. Summed
    # from the small end, or rounding would cut the tail at top_p = 1.
    probability = jax.nn.softmax(scores, -1)
    rest = jax.lax.cumsum(probability, probability.ndim - 1, reverse=True)
    first = jnp.arange(scores.shape[-1], dtype=jnp.int32) == 0
    kept = first | (rest > 1 - sampling.top_p)
    scores = jnp.where(kept, scores, -jnp.inf)
  if sampling.min_p is not None:
    # The largest score is 0: pᵥ ≥ min_p max p, without the division.
    scores = jnp.where(scores >= jnp.log(sampling.min_p), scores, -jnp.inf)
  # The largest of scores with Gumbel noise is a draw from their softmax.
  noise = jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[1:]))(keys)
  choice = jnp.argmax(scores + noise, -1)
  if order is not None:
    # No gather: one would have to be told of explicit shardings.
    place = jnp.arange(order.shape[-1], dtype=choice.dtype)
    choice = jnp.where(choice[:, None] == place, order, 0).sum(-1)
  return choice.astype(jnp.int32)


def _number(function, name, value, expected, fits):
  """A number as float32 array, checked where it is known."""
  if value is None or is_unknown(value):
    if value is None and name == "temperature":
      raise ValueError(f"{function}: {name} is None, expected {expected}.")
    return value if value is None else jnp.float32(value)
  try:
    number = float(value)
  except (TypeError, ValueError):
    number = math.nan
  if isinstance(value, bool) or not fits(number):
    raise ValueError(f"{function}: {name} is {value!r}, expected {expected}.")
  return jnp.float32(number)
