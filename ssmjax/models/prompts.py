"""Prompts as rows of tokens, and text in and out of them."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssmjax.models.sampling import is_unknown
from ssmjax.types import Array, Int, check_segment_ids, check_shapes

__all__ = [
  "Prompt",
  "TextPieces",
  "encode_text",
  "read_prompt",
  "tokenizer_size",
]


class Prompt(NamedTuple):
  """A prompt as the model reads it.

  Attributes:
    tokens: `[B, T]` int32; None where nothing new is said.
    segment_ids: `[B, T]` int32, or None where there is no padding.
    text: `"one"` or `"many"` where it was a text or a list of texts.
  """

  tokens: Int[Array, "B T"] | None
  segment_ids: Int[Array, "B T"] | None
  text: str | None


def read_prompt(
  function: str,
  prompt: Any,
  segment_ids: Any,
  tokenizer: Any,
  *,
  vocab_size: int,
  goes_on: bool,
  room: int | None,
) -> Prompt:
  """Make rows of tokens of a prompt and check them where they are known.

  Args:
    function: the public function, for errors.
    prompt: an array `[B, T]`, a list of rows of any lengths, a text, a list of
      texts, or None.
    segment_ids: of an array.
    tokenizer: for text.
    vocab_size: rows of the embedding.
    goes_on: whether rows may be empty, for a token is waiting to be read.
    room: most tokens that a row may be padded to.
  """
  text = None
  if prompt is None:
    return Prompt(None, None, None if tokenizer is None else "many")
  if isinstance(prompt, str):
    text, prompt = "one", [prompt]
  elif isinstance(prompt, list | tuple) and any(
    isinstance(row, str) for row in prompt
  ):
    text = "many"
  if text is not None:
    prompt = [
      encode_text(function, "prompt", tokenizer, row, begins=not goes_on)
      for row in prompt
    ]
  # Lists of numbers alone go on as arrays, and are refused by their shape.
  if isinstance(prompt, list | tuple) and (
    text is not None or any(np.ndim(row) == 1 or row == [] for row in prompt)
  ):
    if segment_ids is not None:
      raise ValueError(
        f"{function}: segment_ids are given with a prompt of rows, expected"
        " None: rows of any lengths need no padding. Pass an array [B, T] for"
        " padding of your own."
      )
    prompt, segment_ids = _padded(function, prompt, goes_on, room)
  if not isinstance(prompt, jax.Array):
    prompt = np.asarray(prompt)
  check_shapes(
    function,
    {"prompt": (prompt, "B T"), "segment_ids": (segment_ids, "B T")},
  )
  if not jnp.issubdtype(prompt.dtype, jnp.integer):
    raise ValueError(
      f"{function}: prompt has dtype {prompt.dtype.name}, expected an integer"
      " type. Pass prompt.astype(jnp.int32)."
    )
  if 0 in prompt.shape:
    raise ValueError(
      f"{function}: prompt has shape {prompt.shape}, expected no empty axis."
    )
  check_segment_ids(function, segment_ids)
  _check_known(function, prompt, segment_ids, vocab_size, goes_on)
  as_int32 = lambda x: None if x is None else jnp.asarray(x, jnp.int32)
  return Prompt(_token_ids(prompt), as_int32(segment_ids), text)


def encode_text(
  function: str, name: str, tokenizer: Any, text: Any, *, begins: bool
) -> np.ndarray:
  """Make tokens of one text, by any tokenizer that has `encode`.

  What a tokenizer puts around a text is kept at the beginning only.
  """
  if not isinstance(text, str):
    raise ValueError(
      f"{function}: {name} is a {type(text).__name__} among texts, expected"
      " str."
    )
  if not callable(getattr(tokenizer, "encode", None)):
    raise ValueError(
      f"{function}: {name} is text and tokenizer is"
      f" {type(tokenizer).__name__}, expected an object with encode and"
      " decode. Pass tokenizer=, or tokens."
    )
  if begins:
    found = tokenizer.encode(text)
  else:
    try:
      found = tokenizer.encode(text, add_special_tokens=False)
    except TypeError:
      found = tokenizer.encode(text)
  # The tokenizers library gives an object that holds them.
  ids = np.asarray(getattr(found, "ids", found))
  if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
    raise ValueError(
      f"{function}: tokenizer.encode gave {type(found).__name__}, expected a"
      " list of token ids, or an object with such a list as `ids`."
    )
  return ids.astype(np.int64)


def tokenizer_size(tokenizer: Any) -> int | None:
  """One more than a tokenizer's largest id; None where it does not say."""
  if callable(getattr(tokenizer, "get_vocab", None)):
    return max(tokenizer.get_vocab().values(), default=-1) + 1 or None
  size = getattr(tokenizer, "vocab_size", None)
  return size if isinstance(size, int) else None


class TextPieces:
  """One row's text, piece by piece, as its tokens come.

  A piece is given when no later token can change it: a character of several
  tokens waits for its last one, and what may be the beginning of a stop
  sequence waits too.

  Args:
    tokenizer: has `decode`.
    eos: tokens that are no text.
    stop: sequences that are no text where a row ends in them.
  """

  def __init__(
    self, tokenizer: Any, eos: Iterable[int], stop: Sequence[Sequence[int]]
  ):
    self._decode = tokenizer.decode
    self._eos = set(eos)
    self._stop = [list(sequence) for sequence in stop]
    self._ids: list[int] = []
    self._given = ""

  def add(self, ids: Iterable[int], *, ended: bool = False) -> str:
    """Take further tokens and give the text that is settled; all at the end."""
    self._ids += [int(i) for i in ids if i >= 0]
    kept = self._ids
    if ended:
      whole = [s for s in self._stop if kept[-len(s) :] == s]
      cut = max(map(len, whole), default=0)
      if not cut and kept and kept[-1] in self._eos:
        cut = 1
    else:
      cut = max((_begun(kept, s) for s in self._stop), default=0)
    text = self._decode(kept[: len(kept) - cut]) if len(kept) > cut else ""
    if not ended:
      # Bytes of a character that is not whole.
      text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    piece = text[len(self._given) :]
    self._given += piece
    return piece


def _begun(ids: list[int], stop: list[int]) -> int:
  """How much of a stop sequence the last tokens are."""
  for size in range(min(len(stop) - 1, len(ids)), 0, -1):
    if ids[-size:] == stop[:size]:
      return size
  return 0


def _padded(function, rows, goes_on, room):
  """Rows of any lengths as one array, padded on the left, and its ids."""
  rows = [np.asarray(row, np.int64 if not len(row) else None) for row in rows]
  for number, row in enumerate(rows):
    if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
      raise ValueError(
        f"{function}: row {number} of prompt has shape {row.shape} and dtype"
        f" {row.dtype.name}, expected a list of token ids."
      )
    if not len(row) and not goes_on:
      raise ValueError(
        f"{function}: row {number} of prompt is empty, expected a token or"
        " more. Begin with the boundary or the bos token."
      )
  longest = max(1, *map(len, rows))
  # Few lengths, or each text would be compiled anew.
  length = max(8, 1 << (longest - 1).bit_length())
  if room is not None:
    length = max(longest, min(length, room))
  tokens = np.zeros((len(rows), length), np.int64)
  segment_ids = np.zeros((len(rows), length), np.int32)
  for number, row in enumerate(rows):
    tokens[number, length - len(row) :] = row
    segment_ids[number, length - len(row) :] = 1
  return tokens, segment_ids


def _check_known(function, prompt, segment_ids, vocab_size, goes_on):
  """Raise for ids outside the vocabulary and for rows without a token."""
  if is_unknown(segment_ids):
    return
  valid = np.True_
  if segment_ids is not None:
    valid = np.asarray(segment_ids) > 0
    empty = np.flatnonzero(~valid.any(1))
    if len(empty) and not goes_on:
      raise ValueError(
        f"{function}: segment_ids has no token in row {empty[0]}, expected one"
        " or more. Leave the row out."
      )
  if is_unknown(prompt):
    return
  values = np.asarray(prompt)
  wrong = valid & ((values < 0) | (values >= vocab_size))
  if wrong.any():
    row, time = np.argwhere(wrong)[0]
    raise ValueError(
      f"{function}: prompt has token {values[row, time]} at"
      f" [{row}, {time}], expected 0 to {vocab_size - 1}, ids of the"
      f" vocabulary of vocab_size={vocab_size}. Use the model's own"
      " tokenizer; for padding, pass segment_ids with 0 there."
    )


def _token_ids(tokens):
  """Tokens of any integer type as int32; none becomes another's id."""
  if isinstance(tokens, np.ndarray) and tokens.dtype.itemsize > 4:
    # Padding may hold anything.
    tokens = np.clip(tokens, -1, np.iinfo(np.int32).max)
  return jnp.asarray(tokens).astype(jnp.int32)
