"""What a call of `generate` or `stream` asks for, checked at the door."""

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssmjax.models.decoding import ANY, Choices, GenerationState, Settings
from ssmjax.models.lm import ModelState
from ssmjax.models.prompts import (
  Prompt,
  TextPieces,
  encode_text,
  read_prompt,
  tokenizer_size,
)
from ssmjax.models.sampling import check_count, is_unknown, make_sampling

__all__ = ["Plan", "make_plan"]


class Plan(NamedTuple):
  """A checked call.

  Attributes:
    prompt: what is read.
    state: what it goes on from.
    choices: how tokens are chosen.
    size: S.
    settings: what is compiled.
    tokenizer: for text.
    ends: eos tokens and stop sequences, as lists.
  """

  prompt: Prompt
  state: GenerationState | ModelState | None
  choices: Choices
  size: int
  settings: Settings
  tokenizer: Any
  ends: tuple[list[int], list[list[int]]]

  def pieces(self) -> TextPieces:
    """Make what turns one row's tokens into text."""
    return TextPieces(self.tokenizer, *self.ends)


def make_plan(
  function, model, prompt, size, key, temperature, top_k, top_p, min_p,
  penalty, eos_id, stop, pad_id, segment_ids, state, keeps, max_length,
  vocab_size, tokenizer,
) -> Plan:  # fmt: skip
  """Check the arguments of `generate` and `stream`."""
  config = model.config
  size = check_count(function, "max_new_tokens", size, None)
  known = config.vocab_size
  if vocab_size is not None:
    known = check_count(function, "vocab_size", vocab_size, known)
  else:
    known = config.true_vocab_size or known
    if tokenizer is not None:
      known = min(known, tokenizer_size(tokenizer) or known)
  if top_k is not None:
    top_k = check_count(function, "top_k", top_k, known)
  if max_length is not None:
    max_length = check_count(function, "max_length", max_length, None)
  sampling = make_sampling(function, temperature, top_p, min_p, penalty)
  eos = _ids(function, "eos_id", eos_id, config.vocab_size)
  stops = _sequences(function, stop, tokenizer, config.vocab_size)
  pad = eos[0] if eos else 0
  if pad_id is not None:
    pad = _integer(function, "pad_id", pad_id, "an integer")
  if state is not None and not isinstance(state, GenerationState | ModelState):
    raise ValueError(
      f"{function}: state is a {type(state).__name__}, expected what"
      f" {function} returned, or a ModelState of prefill."
    )
  goes_on = isinstance(state, GenerationState)
  if prompt is None and not goes_on:
    raise ValueError(
      f"{function}: prompt is None, expected tokens. Only a state that"
      f" {function} returned goes on by itself."
    )
  capacity = None if state is None else _capacity(model, state)
  read = read_prompt(
    function, prompt, segment_ids, tokenizer, vocab_size=config.vocab_size,
    goes_on=goes_on,
    # The token that waits is read with the prompt.
    room=capacity if not goes_on else capacity and capacity - 1,
  )  # fmt: skip
  on_host = function == "stream" or read.text is not None
  if on_host and is_unknown(model, read.tokens, state, key):
    raise ValueError(
      f"{function}: an argument is traced, expected arrays: tokens leave the"
      " device as they come, and text is made on the host. Call it outside of"
      " jax.jit, or generate tokens."
    )
  batch = None if read.tokens is None else read.tokens.shape[0]
  _check_key(function, key, _check_rows(function, state, batch))
  needed = _needed(read, state, size)
  _check_room(function, config, needed, size, max_length, capacity)
  room = None
  if state is None:
    length = 0 if read.tokens is None else read.tokens.shape[1]
    room = _room(model, length + size, max_length, keeps)
  width = max(map(len, stops), default=0)
  rows = [[ANY] * (width - len(sequence)) + sequence for sequence in stops]
  choices = Choices(
    sampling=sampling,
    key=key,
    eos=jnp.asarray(eos, jnp.int32),
    stop=jnp.asarray(np.reshape(rows, (len(rows), width)), jnp.int32),
    pad=jnp.int32(pad),
  )
  settings = Settings(
    room=room,
    top_k=top_k,
    vocab_size=known,
    track=keeps or penalty is not None,
    masked=bool(eos or stops or goes_on),
  )
  return Plan(read, state, choices, size, settings, tokenizer, (eos, stops))


def _ids(function, name, value, size) -> list[int]:
  """A token or several, each in the vocabulary."""
  if value is None:
    return []
  several = isinstance(value, list | tuple | set | range) or np.ndim(value)
  expected = f"a token of 0 to {size - 1}, or several"
  found = [
    _integer(function, name, item, expected)
    for item in (value if several else [value])
  ]
  wrong = [item for item in found if not 0 <= item < size]
  if wrong:
    raise ValueError(
      f"{function}: {name} has token {wrong[0]}, expected 0 to {size - 1}, ids"
      f" of the vocabulary of vocab_size={size}."
    )
  return found


def _sequences(function, stop, tokenizer, size) -> list[list[int]]:
  """Stop sequences as lists of tokens, none empty."""
  if stop is None:
    return []
  if isinstance(stop, str) or not any(
    isinstance(item, str) or np.ndim(item) for item in stop
  ):
    # One sequence.
    stop = [stop] if len(stop) else []
  found = []
  for item in stop:
    if isinstance(item, str):
      item = encode_text(function, "stop", tokenizer, item, begins=False)
    sequence = _ids(function, "stop", item, size)
    if not sequence:
      raise ValueError(
        f"{function}: stop has an empty sequence, expected a token or more."
      )
    found.append(sequence)
  return found


def _integer(function, name, value, expected) -> int:
  try:
    if not isinstance(value, bool | np.bool):
      return operator.index(value)
  except TypeError:
    pass
  raise ValueError(f"{function}: {name} is {value!r}, expected {expected}.")


def _check_rows(function, state, batch) -> int:
  """How many rows there are: those of the prompt, or of the state."""
  if state is None:
    return batch
  inner = state.model if isinstance(state, GenerationState) else state
  rows = inner.length.shape[0]
  if batch is not None and rows != batch:
    raise ValueError(
      f"{function}: state has {rows} rows, expected B={batch}, those of the"
      " prompt. For one state to several prompts, use take_rows(state, [0] *"
      f" {batch})."
    )
  return rows


def _check_key(function, key, rows):
  """Raise unless the key is one, or one a row."""
  if key is None:
    return
  expected = f"a key (jax.random.key(0)), or an array of {rows}, one a row"
  dtype = getattr(key, "dtype", None)
  if dtype is None:
    raise ValueError(
      f"{function}: key is a {type(key).__name__}, expected {expected}."
    )
  shape = key.shape
  if not jnp.issubdtype(dtype, jax.dtypes.prng_key):
    # Of the older kind the last axis is the key's own.
    fits = jnp.issubdtype(dtype, jnp.uint32) and key.ndim
    shape = key.shape[:-1] if fits else (-1,)
  if shape not in ((), (rows,)):
    raise ValueError(
      f"{function}: key has shape {key.shape} and dtype {dtype}, expected"
      f" {expected}."
    )


def _needed(prompt, state, size) -> int | None:
  """Most tokens that a row will have read; None where it is not known."""
  inner = state.model if isinstance(state, GenerationState) else state
  if inner is not None and is_unknown(inner.length):
    return None
  read = np.int64(0) if inner is None else np.asarray(inner.length, np.int64)
  if isinstance(state, GenerationState):
    read = read + 1
  if prompt.tokens is not None:
    length = prompt.tokens.shape[1]
    ids = prompt.segment_ids
    if ids is not None and not is_unknown(ids):
      length = (np.asarray(ids) > 0).sum(1)
    read = read + length
  # The last new token is not read.
  return int(np.max(read)) + size - 1


def _check_room(function, config, needed, size, max_length, capacity):
  """Raise where there are more tokens than positions or room."""
  if needed is None:
    return
  limits = {
    "max_positions": config.max_positions,
    "max_length": max_length,
    "the state's room of": capacity,
  }
  for name, limit in limits.items():
    if limit is not None and needed > limit:
      named = f"{name}={limit}" if "_" in name else f"{name} {limit}"
      way_out = (
        " Make the state with a larger max_length."
        if limit is capacity
        else " Ask for fewer, or cut the prompt."
      )
      raise ValueError(
        f"{function}: the tokens so far, the prompt's {needed - size + 1}"
        f" and max_new_tokens={size} need {needed} positions, expected at most"
        f" {named}.{way_out}"
      )


def _shapes(model, length):
  """The shapes of a state of one row with room for `length` tokens."""
  state = jax.eval_shape(lambda m: m.init_state(1, length), model)
  return [leaf.shape for leaf in jax.tree.leaves(state)]


def _grows(model) -> bool:
  """Whether a state's size depends on how many tokens it has room for."""
  return _shapes(model, 1) != _shapes(model, 2)


def _capacity(model, state) -> int | None:
  """Tokens that a state has room for; None where any number."""
  inner = state.model if isinstance(state, GenerationState) else state
  # A size that grows by one with the room tells it.
  rooms = [
    found.shape[axis] - one[axis] + 1
    for found, one, two in zip(
      jax.tree.leaves(inner), _shapes(model, 1), _shapes(model, 2), strict=True
    )
    for axis in range(len(one))
    if two[axis] == one[axis] + 1
  ]
  return min(rooms, default=None)


def _room(model, needed, max_length, keeps) -> int | None:
  """Room for a new state; None for what the layers' configurations say."""
  if not _grows(model):
    return None  # Or another length would compile anew.
  if max_length is not None:
    return max(needed, max_length)
  own = [
    mixer.max_length
    for mixer in model.config.mixers
    if getattr(mixer, "max_length", None) is not None
    and getattr(mixer, "window", None) is None
  ]
  return None if keeps and needed <= min(own, default=0) else needed
