"""Prefill and generation with a state of fixed size."""

import functools

import jax
import jax.numpy as jnp

from ssmjax.models.lm import LanguageModel, ModelState
from ssmjax.ops.segments import last_valid
from ssmjax.types import Array, Float, Int, check_shapes

__all__ = ["generate", "prefill"]


def prefill(
  model: LanguageModel,
  tokens: Int[Array, "B T"],
  state: ModelState | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B V"], ModelState]:
  """Read a prompt, or its next piece of any length.

  Args:
    model: the language model.
    tokens: `[B, T]`.
    state: to go on from; None for the beginning.
    segment_ids: `[B, T]`, 0 for padding on either side.

  Returns:
    The logits that follow the last non-padding token, `[B, V]`, and the state
    after it. A row of padding alone has the logits of a padding token: keep
    those of the piece before.
  """
  features, state = model.features(tokens, state, segment_ids)
  if segment_ids is None:
    last = features[:, -1]
  else:
    index, _ = last_valid(segment_ids > 0)
    last = jnp.take_along_axis(features, index[:, None, None], 1)[:, 0]
  return model.logits(last), state


def generate(
  model: LanguageModel,
  prompt: Int[Array, "B T"],
  max_new_tokens: int,
  *,
  key: Array | None = None,
  temperature: float = 1.0,
  top_k: int | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
) -> Int[Array, "B S"]:
  """Continue a prompt, greedily or by sampling.

  Args:
    model: the language model.
    prompt: `[B, T]`, T ≥ 1.
    max_new_tokens: S ≥ 1.
    key: a PRNG key to sample with; None takes the likeliest token.
    temperature: the logits are divided by it; above 0. Without a key it does
      not matter.
    top_k: sample among the k likeliest tokens only.
    segment_ids: `[B, T]`, 1-based, 0 for padding on either side. Each row
      must hold a token.

  Returns:
    The new tokens, `[B, S]` int32.

  Raises:
    ValueError: no tokens asked for, a temperature that is not above 0, a
      top_k that is not a number of tokens of the vocabulary, more tokens than
      a model with learned positions has positions for.
  """
  check_shapes(
    "generate",
    {"prompt": (prompt, "B T"), "segment_ids": (segment_ids, "B T")},
  )
  if max_new_tokens < 1:
    raise ValueError(
      f"generate: max_new_tokens is {max_new_tokens}, expected 1 or more."
    )
  if not temperature > 0:
    raise ValueError(
      f"generate: temperature is {temperature}, expected above 0. For the"
      " likeliest token, pass key=None."
    )
  vocabulary = model.config.vocab_size
  if top_k is not None and not 1 <= top_k <= vocabulary:
    raise ValueError(
      f"generate: top_k is {top_k}, expected 1 to vocab_size={vocabulary}."
    )
  positions = model.config.max_positions
  # The last new token is not read.
  needed = prompt.shape[1] + max_new_tokens - 1
  if positions is not None and needed > positions:
    raise ValueError(
      f"generate: the prompt's {prompt.shape[1]} tokens and"
      f" max_new_tokens={max_new_tokens} need {needed} positions, expected at"
      f" most max_positions={positions}. Ask for fewer, or cut the prompt."
    )
  return _generate(
    model, prompt, key, jnp.float32(temperature), segment_ids,
    max_new_tokens=max_new_tokens, top_k=top_k,
  )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "top_k"))
def _generate(
  model, prompt, key, temperature, segment_ids, *, max_new_tokens, top_k
):
  batch, length = prompt.shape
  state = model.init_state(batch, length + max_new_tokens)
  logits, state = prefill(model, prompt, state, segment_ids)

  def choose(logits, index):
    if key is None:
      return jnp.argmax(logits, -1).astype(jnp.int32)
    if top_k is not None:
      least = jax.lax.top_k(logits, top_k)[0][:, -1:]
      logits = jnp.where(logits < least, -jnp.inf, logits)
    token = jax.random.categorical(
      jax.random.fold_in(key, index), logits / temperature
    )
    return token.astype(jnp.int32)

  def step(carry, index):
    token, state = carry
    logits, state = model.step(token, state)
    token = choose(logits, index)
    return (token, state), token

  first = choose(logits, 0)
  steps = jnp.arange(1, max_new_tokens)
  _, rest = jax.lax.scan(step, (first, state), steps)
  return jnp.concatenate([first[:, None], rest.T], 1)
