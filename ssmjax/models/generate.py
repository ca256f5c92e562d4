"""Generation with a state of fixed size: whole, or token by token."""

import functools
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssmjax.models.decoding import GenerationState, advance, begin, prefill
from ssmjax.models.generation_plan import make_plan
from ssmjax.models.lm import LanguageModel, ModelState
from ssmjax.models.prompts import TextPieces
from ssmjax.models.sampling import check_count
from ssmjax.types import Array, Int

__all__ = ["GenerationState", "generate", "prefill", "stream"]

# Prompts, stop sequences and ends as a caller may write them.
type Tokens = Int[Array, "B T"] | Sequence[Sequence[int]]
type Sequences = Sequence[int] | Sequence[Sequence[int]] | str | Sequence[str]


def generate(
  model: LanguageModel,
  prompt: Tokens | str | Sequence[str] | None,
  max_new_tokens: int,
  *,
  key: Array | None = None,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  min_p: float | None = None,
  repetition_penalty: float | None = None,
  eos_id: int | Sequence[int] | None = None,
  stop: Sequences | None = None,
  pad_id: int | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  state: GenerationState | ModelState | None = None,
  return_state: bool = False,
  max_length: int | None = None,
  vocab_size: int | None = None,
  tokenizer: Any = None,
) -> Any:
  """Continue a prompt, greedily or by sampling.

  The logits pass through, in this order: the repetition penalty, the division
  by the temperature, top_k, top_p, min_p. The definitions are those of the
  transformers library, and stand in `ssmjax.models.sampling.choose_tokens`.

  Other numbers, keys, ends and stop sequences of the same length do not compile
  anew. Rows do not see each other: each continues as it would alone, up to
  rounding.

  Args:
    model: the language model.
    prompt: tokens `[B, T]` of any integer type, T ≥ 1; or a list of rows of
      any lengths; or, with a tokenizer, a text or a list of texts; or None,
      where a state goes on without new tokens.
    max_new_tokens: S ≥ 1.
    key: a PRNG key to sample with, or an array of keys, one a row; None takes
      the likeliest token. A row's i-th token is drawn with `fold_in(k, i)`, k
      being its own key, or the one key folded with the row's number.
    temperature: the logits are divided by it; 0 takes the likeliest token.
      Without a key it does not matter.
    top_k: keep the k largest logits, of equal ones the lower tokens.
    top_p: keep the fewest of the likeliest tokens whose probabilities add up
      to this, in (0, 1].
    min_p: keep the tokens that have this share, in [0, 1], of the largest
      probability.
    repetition_penalty: divide the positive logits of tokens that are in the
      row already, prompt included, by it, and multiply the negative ones;
      above 0, 1 for none.
    eos_id: a token, or several, that end a row; it is the row's last.
    stop: a sequence of tokens, or several, that end a row when they were
      generated in a row, their last token being the row's last. With a
      tokenizer they may be texts, which are encoded: a text that comes out in
      other tokens is not noticed.
    pad_id: what an ended row gives; the first eos_id by default, 0 where
      there is none. No more is computed when all rows have ended.
    segment_ids: `[B, T]`, 1-based, 0 for padding on either side, of a prompt
      that is an array. Each row must hold a token.
    state: to go on from. One that `generate` returned has read all tokens of
      its rows but the last, which is read before the prompt: pass just what
      is said next, or None. A `ModelState`, of `prefill` or of the model, has
      read all; a repetition penalty does not know its tokens. For several
      rows of one prefix see `take_rows`.
    return_state: also return the state.
    max_length: tokens that attention's and Hyena's layers have room for, in a
      new state; recurrent layers do not care. By default what this call needs,
      with return_state also what the layers' configurations say.
    vocab_size: tokens that there are; ones from there on are not chosen. By
      default what the model's configuration says (`true_vocab_size`, else
      `vocab_size`) and a tokenizer has.
    tokenizer: for texts: an object with `encode` and `decode`, as ours, those
      of the tokenizers library and of transformers.

  Returns:
    The new tokens, `[B, S]` int32. -1 from there on where a row's logits are
    not finite (weights that are NaN, a token outside the vocabulary, attention
    without room). For a text the text that follows, for a list of texts (and
    for no prompt but a tokenizer) a list of them, without the token or the
    sequence that ended it. With return_state, that and a `GenerationState`:
    generating 4 tokens and then 6 more with prompt=None, the state and the same
    settings gives what generating 10 gives, key included.

  Raises:
    ValueError: an argument that cannot be, by its name: no tokens asked for,
      ids outside the vocabulary, a row without a token, numbers out of range,
      text without a tokenizer, more tokens than learned positions, the
      max_length or a state has room for. What is traced is not checked.
  """
  plan = make_plan(
    "generate", model, prompt, max_new_tokens, key, temperature, top_k, top_p,
    min_p, repetition_penalty, eos_id, stop, pad_id, segment_ids, state,
    return_state, max_length, vocab_size, tokenizer,
  )  # fmt: skip
  tokens, made, state = _whole(
    model, plan.prompt.tokens, plan.prompt.segment_ids, plan.state,
    plan.choices, size=plan.size, keep=return_state, settings=plan.settings,
  )  # fmt: skip
  result: Any = tokens
  if plan.prompt.text is not None:
    rows, made = np.asarray(tokens), np.asarray(made)
    texts = [
      plan.pieces().add(row[:count], ended=True)
      for row, count in zip(rows, made, strict=True)
    ]
    result = texts[0] if plan.prompt.text == "one" else texts
  return (result, state) if return_state else result


def stream(
  model: LanguageModel,
  prompt: Tokens | str | Sequence[str] | None,
  max_new_tokens: int,
  *,
  chunk: int = 8,
  key: Array | None = None,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  min_p: float | None = None,
  repetition_penalty: float | None = None,
  eos_id: int | Sequence[int] | None = None,
  stop: Sequences | None = None,
  pad_id: int | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  state: GenerationState | ModelState | None = None,
  max_length: int | None = None,
  vocab_size: int | None = None,
  tokenizer: Any = None,
) -> Iterator[Any]:
  """Continue a prompt and give tokens as they come.

  The first token is given as soon as the prompt is read, the others by `chunk`
  a dispatch: a small one gives them sooner, a large one costs less. All that
  is compiled are the reading of the prompt and one chunk.

  Args:
    model: as in `generate`, like all that is not said here.
    prompt: tokens, rows, text or texts.
    max_new_tokens: S ≥ 1, the most that are given.
    chunk: tokens a dispatch, 1 or more.
    key: for sampling.
    temperature: of it.
    top_k: of it.
    top_p: of it.
    min_p: of it.
    repetition_penalty: of tokens that are there.
    eos_id: what ends a row.
    stop: sequences that end a row.
    pad_id: what an ended row gives while others go on.
    segment_ids: padding of the prompt.
    state: to go on from.
    max_length: tokens to have room for.
    vocab_size: tokens that there are.
    tokenizer: for text.

  Returns:
    An iterator of the tokens of all rows, `[B]` NumPy int32, one by one, which
    together are what `generate` gives, until all rows have ended. For a text
    an iterator of its pieces, none empty, for a list of texts of lists with a
    piece a row, some empty; joined they are what `generate` gives. It returns
    the state at its end: `state = yield from stream(...)`.

  Raises:
    ValueError: as `generate`, when it is called.
  """
  chunk = check_count("stream", "chunk", chunk, None)
  plan = make_plan(
    "stream", model, prompt, max_new_tokens, key, temperature, top_k, top_p,
    min_p, repetition_penalty, eos_id, stop, pad_id, segment_ids, state,
    True, max_length, vocab_size, tokenizer,
  )  # fmt: skip
  blocks = _blocks(model, plan, chunk)
  return _tokens(blocks) if plan.prompt.text is None else _texts(blocks, plan)


@functools.partial(jax.jit, static_argnames=("size", "keep", "settings"))
def _whole(model, tokens, segment_ids, state, choices, *, size, keep, settings):
  """All tokens, how many of each row are its own, and the state."""
  before = state.made if isinstance(state, GenerationState) else 0
  new = []
  if tokens is not None:
    state, first = begin(
      model, tokens, segment_ids, state, choices, settings=settings
    )
    new.append(first[:, None])
  if size > len(new):
    state, rest, _ = advance(
      model, state, choices, size - len(new),
      size=size - len(new), settings=settings,
    )  # fmt: skip
    new.append(rest)
  tokens = jnp.concatenate(new, 1)
  return tokens, state.made - before, state if keep else None


class _Block(NamedTuple):
  """A few tokens of all rows, on the host.

  Attributes:
    tokens: `[B, n]`.
    made: how many of each row are its own, `[B]`.
    done: which rows have ended.
  """

  tokens: np.ndarray
  made: np.ndarray
  done: np.ndarray


def _blocks(model, plan, chunk) -> Generator[_Block, None, GenerationState]:
  """Tokens of all rows, as many as a dispatch makes; then the state."""
  state, prompt, left = plan.state, plan.prompt, plan.size
  count = np.asarray(state.made) if isinstance(state, GenerationState) else 0
  if prompt.tokens is not None:
    state, first = begin(
      model, prompt.tokens, prompt.segment_ids, state, plan.choices,
      settings=plan.settings,
    )  # fmt: skip
    left -= 1
    made = np.asarray(state.made)
    yield _Block(
      np.asarray(first)[:, None], made - count, np.asarray(state.done)
    )
    count = made
  while left and not np.asarray(state.done).all():
    limit = min(chunk, left)
    state, tokens, steps = advance(
      model, state, plan.choices, limit, size=chunk, settings=plan.settings
    )
    left -= limit
    made = np.asarray(state.made)
    yield _Block(
      np.asarray(tokens)[:, : int(steps)], made - count, np.asarray(state.done)
    )
    count = made
  return state


def _tokens(blocks):
  """Tokens of all rows, `[B]`, one by one; returns the state."""
  while True:
    try:
      block = next(blocks)
    except StopIteration as end:
      return end.value
    yield from np.ascontiguousarray(block.tokens.T)


def _texts(blocks, plan):
  """Pieces of the rows' texts; returns the state."""
  rows: list[TextPieces] = []
  open_rows: set[int] = set()
  shown = lambda pieces: pieces[0] if plan.prompt.text == "one" else pieces
  while True:
    try:
      block = next(blocks)
    except StopIteration as end:
      pieces = [
        row.add((), ended=True) if number in open_rows else ""
        for number, row in enumerate(rows)
      ]
      if any(pieces):
        yield shown(pieces)
      return end.value
    if not rows:
      rows = [plan.pieces() for _ in block.tokens]
      open_rows = set(range(len(rows)))
    pieces = [""] * len(rows)
    for number in sorted(open_rows):
      own = block.tokens[number, : block.made[number]]
      ended = bool(block.done[number])
      pieces[number] = rows[number].add(own, ended=ended)
      if ended:
        open_rows.remove(number)
    if any(pieces):
      yield shown(pieces)
