"""Tokens and text come piece by piece, and rows of states can be taken."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.recall_zoo import SIZES
from ssmjax.data import ByteTokenizer
from ssmjax.models import (
  LanguageModel,
  MinGRUConfig,
  ModelConfig,
  ModelState,
  generate,
  stream,
  take_rows,
)
from ssmjax.models.kinds import MIXERS
from ssmjax.models.prompts import TextPieces, encode_text

KEY = jax.random.key(0)
PROMPT = np.array([[72, 105], [79, 104]], np.int32)


@functools.cache
def model():
  config = ModelConfig(257, 8, 1, mixers=(MinGRUConfig(),))
  return LanguageModel(config, rngs=nnx.Rngs(0))


def test_stream_gives_the_tokens_of_generate_and_its_state():
  settings = {"key": KEY, "eos_id": list(range(40)), "pad_id": 300}
  tokens, state = generate(model(), PROMPT, 20, return_state=True, **settings)
  found, steps = [], stream(model(), PROMPT, 20, chunk=3, **settings)
  while True:
    try:
      found.append(next(steps))
    except StopIteration as end:
      last = end.value
      break
  made = int(state.made.max())
  assert 1 < made < 20
  np.testing.assert_array_equal(np.stack(found, 1), tokens[:, :made])
  np.testing.assert_array_equal(last.last, state.last)
  assert found[0].dtype == np.int32


def test_stream_compiles_one_chunk_and_no_remainder():
  traces = []

  class Counted(LanguageModel):
    def step(self, *args, **kwargs):
      traces.append("step")
      return super().step(*args, **kwargs)

  lm = Counted(model().config, rngs=nnx.Rngs(0))
  take = lambda size: len(list(stream(lm, PROMPT, size, chunk=4, key=KEY)))
  assert take(1) == 1
  assert not traces
  assert take(6) == 6
  first = len(traces)
  assert take(11) == 11
  assert len(traces) == first


def test_stream_checks_when_it_is_called():
  with pytest.raises(ValueError, match="stream: chunk is 0, expected 1 or"):
    stream(model(), PROMPT, 4, chunk=0)
  with pytest.raises(ValueError, match="stream: top_p is 2, expected above 0"):
    stream(model(), PROMPT, 4, top_p=2)
  with pytest.raises(ValueError, match="stream: an argument is traced, exp"):
    jax.jit(lambda prompt: next(stream(model(), prompt, 4)))(PROMPT)


def test_text_goes_in_and_comes_out_whole_and_in_pieces():
  tokenizer = ByteTokenizer()
  settings = {"tokenizer": tokenizer, "key": KEY, "eos_id": tokenizer.boundary}
  text = generate(model(), "Hi", 12, **settings)
  ids = generate(model(), [[72, 105]], 12, key=KEY, eos_id=256)
  assert text == tokenizer.decode(np.asarray(ids)[0])
  pieces = list(stream(model(), "Hi", 12, chunk=2, **settings))
  assert "".join(pieces) == text
  assert all(pieces)
  texts, state = generate(
    model(), ["Hi", "Hello"], 12, return_state=True, **settings
  )
  assert texts[0] == text
  rows = list(stream(model(), ["Hi", "Hello"], 12, **settings))
  assert ["".join(row) for row in zip(*rows, strict=True)] == texts
  # A conversation: what is said next, no more.
  more = generate(model(), ["\n", ""], 3, state=state, **settings)
  assert [type(row) for row in more] == [str, str]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_pieces_of_text_join_to_the_whole(size):
  tokenizer = ByteTokenizer()
  whole = "aé€😀\N{REPLACEMENT CHARACTER}b"
  ids = [*whole.encode(), 0xE2, 0x82]
  pieces = TextPieces(tokenizer, [256], [[7, 8]])
  found = [pieces.add(ids[i : i + size]) for i in range(0, len(ids), size)]
  assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found[:2])
  found.append(pieces.add([], ended=True))
  assert "".join(found) == tokenizer.decode(ids)
  assert found[-1]


def test_text_is_without_the_sequence_that_ended_it():
  ids = list(b"one\n\ntwo")
  pieces = TextPieces(ByteTokenizer(), [256], [[10, 10, 33], [10, 33]])
  found = [pieces.add([i]) for i in [*ids, 10, 10]]
  assert "".join(found) == "one\n\ntwo"
  assert pieces.add([33], ended=True) == ""
  pieces = TextPieces(ByteTokenizer(), [256], [])
  assert pieces.add([*ids, 256], ended=True) == "one\n\ntwo"


def test_tokenizers_of_other_libraries_serve():
  tokenizers = pytest.importorskip("tokenizers")
  made = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({"Hi": 72, "there": 105, "?": 0}, "?")
  )
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  text = generate(model(), "Hi there", 6, tokenizer=made, key=KEY)
  # No more ids than the tokenizer has, 106 of the model's 257.
  ids = generate(model(), [[72, 105]], 6, vocab_size=106, key=KEY)
  assert text == made.decode(np.asarray(ids)[0].tolist())

  class Slow:
    """The interface of transformers."""

    def encode(self, text, add_special_tokens=True):
      ids = [72, 105][: len(text)]
      return [1, *ids] if add_special_tokens else ids

  encode = lambda begins: encode_text(
    "generate", "prompt", Slow(), "Hi", begins=begins
  ).tolist()
  assert encode(True) == [1, 72, 105]
  # No token of a beginning stands inside.
  assert encode(False) == [72, 105]


@pytest.mark.parametrize("kind", MIXERS)
def test_rows_of_a_state_are_its_second_axis_in_every_kind(kind):
  mixer = MIXERS[kind](**SIZES.get(kind, {}))
  shapes = jax.eval_shape(
    lambda: LanguageModel(
      ModelConfig(16, 64, 4, mixers=(mixer, MinGRUConfig())), rngs=nnx.Rngs(0)
    )
  )
  make = lambda rows: jax.eval_shape(lambda m: m.init_state(rows, 8), shapes)
  state = make(5)
  number = lambda x, axis: np.broadcast_to(
    np.arange(5).reshape(5, *[1] * (len(x.shape) - axis - 1)), x.shape
  ).astype(x.dtype)
  numbered = ModelState(
    jax.tree.map(lambda x: number(x, 1), state.layers), number(state.length, 0)
  )
  taken = take_rows(numbered, [3, 0, 3])
  like = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert like(taken) == like(make(3))
  for leaf in jax.tree.leaves(taken.layers):
    rows = np.asarray(leaf).reshape(*leaf.shape[:2], -1)
    wanted = np.array([3, 0, 3]).astype(leaf.dtype)[None, :, None]
    np.testing.assert_array_equal(rows, np.broadcast_to(wanted, rows.shape))
  np.testing.assert_array_equal(taken.length, [3, 0, 3])


def test_rows_that_have_ended_are_dropped_and_the_others_go_on():
  keys = jax.random.split(KEY, 2)
  settings = {"eos_id": list(range(128)), "key": keys, "return_state": True}
  _, state = generate(model(), PROMPT, 3, **settings)
  keep = ~np.asarray(state.done)
  assert keep.sum() == 1, "another key"
  whole = np.asarray(generate(model(), None, 3, state=state, **settings)[0])
  settings["key"] = keys[keep]
  part, _ = generate(model(), None, 3, state=take_rows(state, keep), **settings)
  np.testing.assert_array_equal(part, whole[keep])


def test_rows_may_be_a_slice_or_traced_or_counted_from_the_end():
  state = model().init_state(4)
  state = state._replace(length=jnp.arange(4, dtype=jnp.int32))
  rows = lambda which: take_rows(state, which).length
  np.testing.assert_array_equal(rows(slice(1, None, 2)), [1, 3])
  np.testing.assert_array_equal(rows([-1, 0]), [3, 0])
  np.testing.assert_array_equal(rows(np.array([], np.int32)), [])
  np.testing.assert_array_equal(jax.jit(rows)(np.array([2, -2])), [2, 2])
  for wrong, message in [
    ([4], "rows has 4, expected numbers of the 4 rows"),
    ([-5], "rows has -5, expected"),
    ([0.5], r"rows has shape \(1,\) and dtype float64"),
    ([True], r"rows has shape \(1,\) and dtype bool"),
    (2, r"rows has shape \(\) and dtype int64"),
  ]:
    with pytest.raises(ValueError, match="take_rows: " + message):
      rows(wrong)
  with pytest.raises(ValueError, match="take_rows: state is a MinRNNState"):
    take_rows(state.layers[0], [0])
