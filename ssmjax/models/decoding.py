"""The loop of generation: read, choose, stop; a few tokens a dispatch."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ssmjax.models.attention import token_positions
from ssmjax.models.lm import LanguageModel, ModelState
from ssmjax.models.sampling import Sampling, choose_tokens, row_keys
from ssmjax.ops.segments import last_valid
from ssmjax.ops.varying import match_varying
from ssmjax.types import Array, Bool, Float, Int

__all__ = [
  "ANY",
  "Choices",
  "GenerationState",
  "Settings",
  "advance",
  "begin",
  "prefill",
]

# In `Choices.stop`, a place that any token fits.
ANY = -2


class GenerationState(NamedTuple):
  """What `generate` goes on from: all that was said, the last token apart.

  Attributes:
    model: the model's state, after every token of the row but the last.
    last: the last token, which the model has not read yet, `[B]` int32; -1
      where a row's logits were not finite.
    made: tokens that were generated in a row, `[B]` int32; a row's next token
      is drawn with its key folded with this number.
    done: rows that have ended, `[B]` bool.
    seen: tokens that are there, for the repetition penalty, `[B, V]` bool.
    tail: the last tokens that were generated, for stop sequences, `[B, L]`
      int32; -1 where there is none.
  """

  model: ModelState
  last: Int[Array, " B"]
  made: Int[Array, " B"]
  done: Bool[Array, " B"]
  seen: Bool[Array, "B V"]
  tail: Int[Array, "B L"]


class Choices(NamedTuple):
  """How tokens are chosen and where rows end; arrays, which do not recompile.

  Attributes:
    sampling: the numbers of the sampling.
    key: one key, or one a row; None for the likeliest token.
    eos: tokens that end a row, `[E]` int32.
    stop: sequences that end a row, `[S, L]` int32, `ANY` before the shorter.
    pad: what an ended row gives, a scalar int32.
  """

  sampling: Sampling
  key: Array | None
  eos: Int[Array, " E"]
  stop: Int[Array, "S L"]
  pad: Int[Array, ""]


class Settings(NamedTuple):
  """What a loop is compiled for.

  Attributes:
    room: tokens that a new state has room for; None for its own choice.
    top_k: k, or None.
    vocab_size: tokens that there are.
    track: whether to keep which tokens are there.
    masked: whether ended rows have to keep their state.
  """

  room: int | None
  top_k: int | None
  vocab_size: int
  track: bool
  masked: bool


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


@functools.partial(jax.jit, static_argnames="settings")
def begin(
  model: LanguageModel,
  tokens: Int[Array, "B T"],
  segment_ids: Int[Array, "B T"] | None,
  state: GenerationState | ModelState | None,
  choices: Choices,
  *,
  settings: Settings,
) -> tuple[GenerationState, Int[Array, " B"]]:
  """Read a prompt and choose the token after it.

  Args:
    model: the language model.
    tokens: the prompt, `[B, T]` int32.
    segment_ids: its padding, or None.
    state: a `GenerationState` or `ModelState` to go on from; None.
    choices: how tokens are chosen.
    settings: what is compiled.

  Returns:
    The `GenerationState` after it and the tokens, `[B]`.
  """
  batch = tokens.shape[0]
  rows = None
  if state is None:
    state = model.init_state(batch, settings.room)
  if isinstance(state, GenerationState):
    # What was said last comes first.
    rows, state = state, state.model
    tokens, segment_ids = _with_last(tokens, segment_ids, rows)
  logits, inner = prefill(model, tokens, state, segment_ids)
  if segment_ids is not None:
    # Nothing follows a row without a token.
    _, there = last_valid(segment_ids > 0)
    logits = jnp.where(there[:, None], logits, jnp.nan)
  # Made of the rows, to lie on the devices where they do.
  zeros = tokens[:, 0] * 0
  size = model.config.vocab_size if settings.track else 0
  seen = (zeros > 0)[:, None] & jnp.zeros((size,), jnp.bool_)
  if settings.track:
    before = None if rows is None or not rows.seen.size else rows.seen
    seen = _seen(seen, before, tokens, segment_ids, state.length)
  width = choices.stop.shape[1]
  started = GenerationState(
    model=inner,
    last=zeros,
    made=zeros if rows is None else rows.made,
    done=zeros > 0,
    seen=seen,
    tail=zeros[:, None] - jnp.ones((width,), jnp.int32),
  )
  return _accept(started, inner, logits, choices, settings)


@functools.partial(jax.jit, static_argnames=("size", "settings"))
def advance(
  model: LanguageModel,
  state: GenerationState,
  choices: Choices,
  limit: int | Int[Array, ""],
  *,
  size: int,
  settings: Settings,
) -> tuple[GenerationState, Int[Array, "B S"], Int[Array, ""]]:
  """Go on by up to `size` tokens; early where all rows have ended.

  Args:
    model: the language model.
    state: to go on from.
    choices: how tokens are chosen.
    limit: tokens to make, at most `size`; another does not compile anew.
    size: S, of the result.
    settings: what is compiled.

  Returns:
    The state, the tokens `[B, S]`, of which `limit` count, and how many were
    made before all rows had ended.
  """
  state = state._replace(tail=_fitted(state.tail, choices.stop.shape[1]))
  # Inside shard_map a counter may be everyone's until a row ends.
  (state,) = match_varying(state)

  def unfinished(carry):
    index, state, _ = carry
    return (index < limit) & ~state.done.all()

  def step(carry):
    index, state, tokens = carry
    # To an ended row its token is padding: its state stays.
    ids = jnp.where(state.done, 0, 1) if settings.masked else None
    logits, inner = model.step(jnp.maximum(state.last, 0), state.model, ids)
    state, token = _accept(state, inner, logits, choices, settings)
    place = jnp.arange(size, dtype=jnp.int32) == index
    return index + 1, state, jnp.where(place, token[:, None], tokens)

  tokens = state.last[:, None] * jnp.zeros((size,), jnp.int32)
  index, state, tokens = jax.lax.while_loop(
    unfinished, step, (jnp.int32(0), state, tokens)
  )
  # Where all rows had ended before the limit, the rest is theirs.
  made = jnp.arange(size, dtype=jnp.int32) < index
  rest = _after_end(state, choices)[:, None]
  return state, jnp.where(made, tokens, rest), index


def _accept(state, inner, logits, choices, settings):
  """Choose a token after `inner`, and note it: the new state, the tokens."""
  keys = row_keys(choices.key, state.made)
  seen = state.seen if state.seen.size else None
  token = choose_tokens(
    logits, keys, choices.sampling, seen,
    top_k=settings.top_k, vocab_size=settings.vocab_size,
  )  # fmt: skip
  failed = token < 0
  going = ~state.done
  given = jnp.where(going, token, _after_end(state, choices))
  made = going & ~failed
  if seen is not None:
    column = jnp.arange(seen.shape[1], dtype=jnp.int32)
    seen |= made[:, None] & (token[:, None] == column)
  tail = state.tail
  if tail.shape[1]:
    shifted = jnp.concatenate([tail[:, 1:], token[:, None]], 1)
    tail = jnp.where(made[:, None], shifted, tail)
  ended = (token[:, None] == choices.eos).any(-1)
  fits = (tail[:, None] == choices.stop) | (choices.stop == ANY)
  ended |= fits.all(-1).any(-1) if choices.stop.size else ended
  state = GenerationState(
    model=inner,
    last=jnp.where(going, token, state.last),
    made=state.made + made,
    done=state.done | ended | failed,
    seen=state.seen if seen is None else seen,
    tail=tail,
  )
  return state, given


def _after_end(state, choices):
  """What ended rows give: -1 where logits were not finite, else the pad."""
  return jnp.where(state.last < 0, state.last, choices.pad)


def _with_last(tokens, segment_ids, state):
  """Put the token that was not read yet before a prompt."""
  tokens = jnp.concatenate([state.last[:, None], tokens], 1)
  if segment_ids is not None:
    # It is of the document that goes on: no restart between the two.
    first = jnp.argmax(segment_ids > 0, 1)[:, None]
    own = jnp.maximum(jnp.take_along_axis(segment_ids, first, 1), 1)
    segment_ids = jnp.concatenate([own, segment_ids], 1)
  return tokens, segment_ids


def _seen(seen, before, tokens, segment_ids, length):
  """Mark the tokens of each row's present document, `[B, V]`."""
  kept = jnp.ones_like(tokens, jnp.bool_)
  if segment_ids is not None:
    segment, _ = token_positions(segment_ids, length)
    kept = (segment_ids > 0) & (segment == segment[:, -1:])
    if before is not None:
      before &= (segment[:, -1] == 0)[:, None]
  # A negative index would count from the end.
  place = jnp.where(kept & (tokens >= 0), tokens, seen.shape[1])
  mark = lambda row, at: row.at[at].set(True, mode="drop")
  seen = jax.vmap(mark)(seen, place)
  return seen if before is None else seen | before


def _fitted(tail, width):
  """The last `width` columns, with -1 before where there are fewer."""
  missing = max(width - tail.shape[1], 0)
  tail = jnp.pad(tail, ((0, 0), (missing, 0)), constant_values=-1)
  return tail[:, tail.shape[1] - width :]
