"""Text becomes rows that hold every byte once, in an order that comes back."""

import bz2
import dataclasses
import gzip
import json
import lzma
import math
import pathlib
import pickle
import sys
import types

import grain
import jax.numpy as jnp
import numpy as np
import pytest
import toy_run
from checks import assert_close, quick
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmjax.data import (
  ByteTokenizer,
  FileTokenizer,
  TextSource,
  bits_per_byte,
  encode_documents,
  read_documents,
  split_documents,
  text_dataset,
)
from ssmjax.models import (
  LanguageModel,
  ModelConfig,
  labelled_loss,
)
from ssmjax.training import FitConfig, adamw, fit, read_metrics
from ssmjax.training.sources import IteratorSource

DOCUMENTS = [bytes(range(1, n + 1)) for n in (5, 1, 13, 8, 2, 30, 1, 7)]
CORPUS = encode_documents(DOCUMENTS)
END = ByteTokenizer.boundary


def literal_rows(corpus, length):
  """Rows of (input, target, segment, weight, bytes), document by document."""
  pairs, begin = [], 0
  for number, size in enumerate(corpus.lengths):
    tokens = corpus.tokens[begin : begin + size].tolist()
    widths = [1] * size
    if corpus.token_bytes is not None:
      widths = corpus.token_bytes[begin : begin + size].tolist()
    begin += size
    inputs, targets = [corpus.boundary, *tokens], [*tokens, corpus.boundary]
    widths.append(int(corpus.tails[number]))
    for token, target, width in zip(inputs, targets, widths, strict=True):
      pairs.append((token, target, number, 1, width))
  rows = []
  for start in range(0, len(pairs), length):
    row = pairs[start : start + length]
    first = row[0][2]
    row = [(x, y, n - first + 1, w, b) for x, y, n, w, b in row]
    rows.append(row + [(0,) * 5] * (length - len(row)))
  return np.array(rows)


FIELDS = ("tokens", "targets", "segment_ids", "weights", "bytes")


def rows_of(batch):
  return np.stack([batch[name] for name in FIELDS], axis=-1)


def all_rows(source, epoch=0):
  steps = range(epoch * len(source), (epoch + 1) * len(source))
  return np.concatenate([rows_of(source.batch(step)) for step in steps])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
  st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=12),
  st.integers(1, 50),
  st.integers(1, 5),
)
def test_rows_are_those_that_a_loop_over_documents_packs(
  documents, length, size
):
  source = TextSource(encode_documents(documents), length, size)
  expected = literal_rows(source.corpus, length)
  found = all_rows(source)
  np.testing.assert_array_equal(found[: len(expected)], expected)
  assert not found[len(expected) :].any()
  assert len(found) == len(source) * size < len(expected) + size


def test_batch_has_the_names_shapes_and_types_that_losses_want():
  batch = TextSource(CORPUS, 11, 3)[0]
  assert {name: x.dtype.name for name, x in batch.items()} == {
    "tokens": "int32",
    "segment_ids": "int32",
    "positions": "int32",
    "targets": "int32",
    "weights": "float32",
    "bytes": "int32",
  }
  assert {x.shape for x in batch.values()} == {(3, 11)}
  assert (batch["positions"] == np.arange(11)).all()
  assert all(x.flags.writeable for x in batch.values())


@pytest.mark.parametrize("shuffle_seed", [None, 0, 2**32 - 1])
@pytest.mark.parametrize("epoch", [0, 3])
def test_every_epoch_has_every_byte_of_every_document_once(shuffle_seed, epoch):
  source = TextSource(CORPUS, 7, 4, shuffle_seed)
  rows = all_rows(source, epoch)
  inputs, targets, segments, weights, sizes = np.moveaxis(rows, -1, 0)
  valid = segments > 0
  assert (valid == (weights == 1)).all()
  assert valid.sum() == sum(len(d) + 1 for d in DOCUMENTS)
  assert sizes.sum() == CORPUS.num_bytes == sum(map(len, DOCUMENTS))
  assert ((sizes == 1) == (valid & (targets != END))).all()
  # These documents count up: a target is its input's successor or the end.
  after = np.where(inputs == END, 1, inputs + 1)
  assert (valid <= ((targets == after) | (targets == END))).all()
  assert ((inputs == END) & valid).sum() == len(DOCUMENTS)
  assert ((targets == END) & valid).sum() == len(DOCUMENTS)
  begun = (segments[:, 1:] != segments[:, :-1]) & valid[:, 1:]
  assert (begun == ((inputs == END) & valid)[:, 1:]).all()
  assert (segments[:, 0] <= 1).all()


def test_shuffled_epochs_differ_in_what_rows_hold_and_in_their_order():
  source = TextSource(CORPUS, 7, 4, shuffle_seed=1)
  first, second = all_rows(source), all_rows(source, 1)
  assert sorted(first.tolist()) != sorted(second.tolist())
  other = all_rows(TextSource(CORPUS, 7, 4, shuffle_seed=2))
  assert sorted(first.tolist()) != sorted(other.tolist())
  plain = all_rows(TextSource(CORPUS, 7, 4))
  np.testing.assert_array_equal(all_rows(TextSource(CORPUS, 7, 4), 1), plain)
  # One document, so that nothing but the rows' order can differ.
  corpus = encode_documents([bytes(range(200))])
  shuffled = all_rows(TextSource(corpus, 3, 1, shuffle_seed=0))
  plain = all_rows(TextSource(corpus, 3, 1))
  assert (shuffled != plain).any()
  assert sorted(shuffled.tolist()) == sorted(plain.tolist())


def test_order_of_a_seed_is_the_same_on_every_machine_and_version():
  source = TextSource(CORPUS, 7, 4, shuffle_seed=5)
  tokens = source.batch(2 * len(source) + 1)["tokens"]
  assert tokens.tolist() == [
    [7, 8, 9, 10, 11, 12, 13],
    [4, 5, 6, 7, 8, END, 1],
    [13, END, 1, END, 1, END, 1],
    [1, 2, 3, 4, 5, 0, 0],
  ]


def test_shuffle_moves_every_row_anywhere():
  corpus = encode_documents([bytes(20)])
  source = TextSource(corpus, 1, 1, shuffle_seed=3)
  corpus.tokens[:] = np.arange(20)  # each row is known by its target
  counts = np.zeros((21, 21))
  epochs = 500
  for epoch in range(epochs):
    targets = all_rows(source, epoch)[:, 0, 1].astype(int)
    counts[np.arange(21), np.where(targets == END, 20, targets)] += 1
  # χ² of 441 cells with 400 degrees of freedom: mean 400, deviation 28.
  expected = epochs / 21
  assert ((counts - expected) ** 2 / expected).sum() < 400 + 5 * 28


def test_dropped_remainder_leaves_only_rows_of_the_corpus():
  kept = TextSource(CORPUS, 7, 4, shuffle_seed=1)
  source = dataclasses.replace(kept, drop_remainder=True)
  assert (len(kept), len(source)) == (3, 2)
  np.testing.assert_array_equal(all_rows(source), all_rows(kept)[:8])
  assert (all_rows(source)[:, 0, 3] == 1).all()


@pytest.mark.parametrize("count", [2, 4])
def test_processes_make_disjoint_parts_of_one_batch(count):
  whole = TextSource(CORPUS, 5, 4, shuffle_seed=1)
  parts = [
    dataclasses.replace(whole, processes=(index, count))
    for index in range(count)
  ]
  assert {len(part) for part in parts} == {len(whole)}
  for step in range(2 * len(whole)):
    joined = np.concatenate([rows_of(part.batch(step)) for part in parts])
    np.testing.assert_array_equal(joined, rows_of(whole.batch(step)))


def test_processes_are_those_of_jax_once_a_batch_is_made(monkeypatch):
  whole = TextSource(CORPUS, 5, 4)
  monkeypatch.setattr("jax.process_count", lambda: 2)
  monkeypatch.setattr("jax.process_index", lambda: 1)
  np.testing.assert_array_equal(
    rows_of(whole[0]),
    rows_of(dataclasses.replace(whole, processes=(0, 1))[0])[2:],
  )
  odd = TextSource(CORPUS, 5, 3)
  with pytest.raises(ValueError, match="batch_size=3 does not divide among 2"):
    odd[0]


def test_source_is_a_grain_source_that_says_all_it_depends_on():
  source = TextSource(CORPUS, 5, 4, shuffle_seed=1)
  assert isinstance(source, grain.sources.RandomAccessDataSource)
  assert len(list(source)) == len(source)
  np.testing.assert_array_equal(
    rows_of(source[-1]), rows_of(source[len(source) - 1])
  )
  with pytest.raises(IndexError, match="expected less than 4"):
    source[4]
  other = encode_documents([*DOCUMENTS[:-1], DOCUMENTS[-1][::-1]])
  assert repr(source) == repr(dataclasses.replace(source))
  same = encode_documents(DOCUMENTS)
  assert repr(source) == repr(dataclasses.replace(source, corpus=same))
  changes = [{"corpus": other}, {"shuffle_seed": 2}, {"length": 6}]
  for change in changes:
    changed = dataclasses.replace(source, **change)
    assert repr(changed) != repr(source)
    assert changed.identity() != source.identity()
  assert json.loads(json.dumps(source.identity())) == source.identity()
  copy = pickle.loads(pickle.dumps(source))  # for worker processes
  np.testing.assert_array_equal(rows_of(copy[1]), rows_of(source[1]))


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("taken", [0, 2, 5, 9])
def test_iterator_goes_on_from_its_saved_state(prefetch, taken):
  source = TextSource(CORPUS, 7, 4, shuffle_seed=1, processes=(1, 2))
  make = lambda: iter(text_dataset(source, prefetch=prefetch))
  first = IteratorSource(make())
  list(first.runs(0, taken, 1))
  cursor = json.loads(json.dumps(first.cursor()))
  later = [rows_of(batch) for batch, _ in zip(make(), range(99), strict=False)]
  second = make()
  next(second)
  IteratorSource(second).restore(cursor)
  for step in range(taken, taken + 7):
    np.testing.assert_array_equal(rows_of(next(second)), later[step])
    np.testing.assert_array_equal(rows_of(source.batch(step)), later[step])


def test_state_of_two_processes_goes_on_in_one():
  whole = TextSource(CORPUS, 5, 4, shuffle_seed=1)
  part = iter(text_dataset(dataclasses.replace(whole, processes=(1, 2))))
  for _ in range(6):
    next(part)
  alone = iter(text_dataset(whole))
  alone.set_state(part.get_state())
  np.testing.assert_array_equal(rows_of(next(alone))[2:], rows_of(next(part)))


def test_dataset_ends_after_its_epochs():
  source = TextSource(CORPUS, 7, 4)
  assert len(list(text_dataset(source, epochs=2))) == 2 * len(source)


def test_everything_but_the_dataset_works_without_grain(monkeypatch):
  monkeypatch.setitem(sys.modules, "grain", None)
  source = TextSource(CORPUS, 7, 4)
  assert source[0]["tokens"].shape == (4, 7)
  with pytest.raises(ImportError, match="pip install grain"):
    text_dataset(source)


def test_loss_of_packed_rows_is_the_sum_over_documents_alone():
  config = ModelConfig(vocab_size=257, d_model=8, n_layers=1)
  model = LanguageModel(config, rngs=nnx.Rngs(0))
  documents = DOCUMENTS[:5]
  corpus = encode_documents(documents)
  # 34 pairs in one row of 37, and a batch with a row of padding only.
  batch = TextSource(corpus, 37, 2)[0]
  run = quick(labelled_loss)  # one compilation: all batches are of one shape
  loss, weight, _ = run(model, batch)
  assert weight == 34
  alone = 0.0
  for document in documents:
    row = TextSource(encode_documents([document]), 37, 2)[0]
    alone += run(model, row)[0]
  assert_close(loss, alone)
  bits, size = bits_per_byte(loss, batch["bytes"])
  assert size == sum(map(len, documents))
  assert_close(bits, alone / math.log(2))


class Bigram(nnx.Module):
  """Logits of the next token by the present one."""

  def __init__(self, seed):
    self.logits = nnx.Param(jnp.zeros((257, 257)))

  def loss(self, batch, key):
    logits = self.logits[...][batch["tokens"]]
    picked = jnp.take_along_axis(logits, batch["targets"][..., None], 2)[..., 0]
    nll = nnx.logsumexp(logits, axis=2) - picked
    total = (nll * batch["weights"]).sum()
    metrics = {"bits_per_byte": bits_per_byte(total, batch["bytes"])}
    return total, batch["weights"].sum(), metrics


def test_fit_stopped_in_an_epoch_goes_on_with_the_batches_to_come(tmp_path):
  source = TextSource(CORPUS, 7, 4, shuffle_seed=1)

  class Crash(Exception):
    pass

  def crash(step, models):
    raise Crash

  def run(folder, hooks=()):
    return fit(
      Bigram,
      Bigram.loss,
      adamw(0.1),
      iter(text_dataset(source)),
      FitConfig(
        steps=10,
        steps_per_dispatch=2,
        log_every=2,
        save_every=4,
        progress=False,
      ),
      tmp_path / folder,
      settings={"data": source.identity()},
      hooks=hooks,
      mesh=toy_run.two_devices(),
    )

  whole = run("whole")
  with pytest.raises(Crash):
    run("broken", [lambda step, models: step == 6 and crash(step, models)])
  broken = run("broken")
  np.testing.assert_array_equal(
    broken.models[0].logits[...], whole.models[0].logits[...]
  )
  lines = [
    read_metrics(tmp_path / folder, wall_clock=False)
    for folder in ("whole", "broken")
  ]
  assert lines[0] == lines[1]
  # Of the first step all logits are 0, of the second not any more.
  batches = [source.batch(step) for step in (0, 1)]
  pairs, size = (
    sum(batch[name].sum() for batch in batches) for name in ("weights", "bytes")
  )
  line = lines[0][0]
  assert_close(
    np.float32(line["bits_per_byte"]),
    np.float32(line["loss"] / math.log(2) * pairs / size),
  )
  source = dataclasses.replace(source, corpus=encode_documents([b"other"] * 9))
  with pytest.raises(ValueError, match=r"settings\.data\.corpus"):
    run("whole")


@pytest.mark.usefixtures("strict")
def test_uniform_model_takes_the_bits_of_its_vocabulary():
  batch = TextSource(CORPUS, 7, 99)[0]
  pairs = batch["weights"].sum()
  loss = jnp.log(jnp.float32(257)) * pairs
  bits, size = bits_per_byte(loss, batch["bytes"])
  expected = math.log2(257) * (1 + len(DOCUMENTS) / CORPUS.num_bytes)
  assert_close(bits / size, np.float32(expected))


def test_folder_is_read_in_order_packed_or_not(tmp_path):
  (tmp_path / "b").mkdir()
  (tmp_path / "b.d").mkdir()
  (tmp_path / ".git").mkdir()
  files = {
    "b/two.txt": b"two",
    "a.md.gz": gzip.compress(b"one"),
    "b.d/three.py.xz": lzma.compress(b"\xff\x00three"),
    "c.TXT.bz2": bz2.compress(b"four\r\n<|endoftext|>\r\nfive"),
    "d.jpg": b"no text",
    ".hidden.txt": b"hidden",
    ".git/head.txt": b"hidden",
    "empty.txt": b"",
  }
  for name, content in files.items():
    (tmp_path / name).write_bytes(content)
  texts = (b"one", b"two", b"\xff\x00three", b"four\r\n", b"five")
  assert read_documents(tmp_path) == texts
  assert read_documents(tmp_path / "d.jpg", str(tmp_path / "b")) == (
    *(b"no text", b"two"),
  )
  assert read_documents(tmp_path, suffixes=(".jpg",)) == (b"no text",)


@pytest.mark.parametrize(
  ("separator", "expected"),
  [
    ("<|endoftext|>", (b"a\n\nb <|endoftext|>\n", b"c\n")),
    ("", (b"a\n", b"b <|endoftext|>\n<|endoftext|>\nc\n<|endoftext|>\n")),
    (None, (b"a\n\nb <|endoftext|>\n<|endoftext|>\nc\n<|endoftext|>\n",)),
  ],
)
def test_line_of_the_separator_alone_ends_a_document(
  tmp_path, separator, expected
):
  path = tmp_path / "text"
  path.write_bytes(b"a\n\nb <|endoftext|>\n<|endoftext|>\nc\n<|endoftext|>\n")
  assert read_documents(path, separator=separator) == expected


def test_default_corpus_is_the_standard_librarys_own_sources():
  documents = read_documents()
  assert documents == read_documents()
  assert pathlib.Path(dataclasses.__file__).read_bytes() in documents
  assert 2e6 < sum(map(len, documents)) < 3e7
  for module in (grain, np.testing):
    assert pathlib.Path(module.__file__).read_bytes() not in documents


def test_python_without_its_sources_says_what_to_do(tmp_path, monkeypatch):
  monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "zip"))
  with pytest.raises(ValueError, match=r"expected \.py files\. Give a path"):
    read_documents()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
  st.lists(st.binary(min_size=1, max_size=9), min_size=2, max_size=30),
  st.floats(0.01, 0.99),
  st.integers(0, 2**32 - 1),
  st.randoms(use_true_random=False),
)
def test_split_is_of_documents_by_their_content(documents, share, seed, random):
  if len(set(documents)) < 2:
    return
  train, valid = split_documents(documents, share, seed)
  assert sorted(train + valid) == sorted(documents)
  assert not set(train) & set(valid)
  assert train
  assert valid
  if len(set(valid)) > 1:
    assert sum(map(len, valid)) <= share * sum(map(len, documents))
  held = set(valid)
  assert train == tuple(d for d in documents if d not in held)
  random.shuffle(documents)
  assert set(split_documents(documents, share, seed)[1]) == held


def test_split_takes_about_its_share_and_another_by_another_seed():
  documents = [str(i).encode() * (1 + i % 17) for i in range(2000)]
  total = sum(map(len, documents))
  sides = [split_documents(documents, 0.1, seed)[1] for seed in (0, 1)]
  for side in sides:
    assert 0.098 < sum(map(len, side)) / total <= 0.1
  common = set(sides[0]) & set(sides[1])
  assert len(common) < 0.3 * len(sides[0])


class Words:
  """A stand-in for tokenizers.Tokenizer: words, without spaces between."""

  encode_special_tokens = False
  padded = truncated = True

  @staticmethod
  def from_str(text):
    if text != "words":
      raise Exception("expected value at line 1 column 1")
    return Words()

  def no_truncation(self):
    self.truncated = False

  def no_padding(self):
    self.padded = False

  def get_vocab(self, with_added_tokens):
    return {"<|endoftext|>": 0, "x": 70_000}

  def get_added_tokens_decoder(self):
    special = types.SimpleNamespace(content="<|endoftext|>", special=True)
    return {0: special}

  def encode_batch(self, texts, add_special_tokens):
    assert self.encode_special_tokens
    assert not add_special_tokens
    assert (self.padded, self.truncated) == (False, False)
    encodings = []
    for text in texts:
      offsets, at = [], 0
      for word in text.split():
        start = text.index(word, at)
        at = start + len(word)
        # Two tokens that share their characters, as of a letter in bytes.
        offsets += [(start, at)] * (2 if word == "ß" else 1)
      ids = [65_536 + i for i in range(len(offsets))]
      if "bad" in text:
        ids[0] = 0
      encodings.append(types.SimpleNamespace(ids=ids, offsets=offsets))
    return encodings

  def decode(self, ids, skip_special_tokens):
    return " ".join(map(str, ids))


@pytest.fixture
def words(tmp_path, monkeypatch):
  """A path that FileTokenizer reads with the stand-in."""
  module = types.SimpleNamespace(Tokenizer=Words)
  monkeypatch.setitem(sys.modules, "tokenizers", module)
  path = tmp_path / "tokenizer.json.gz"
  path.write_bytes(gzip.compress(b"words"))
  return path


def test_bytes_of_tokens_and_ends_add_up_to_the_documents(words):
  texts = ["ab  cde ", "ß\tÄ😀 x", " \n", "é", *(["a b"] * 40), "y" * 300]
  documents = [text.encode() for text in texts]
  corpus = encode_documents(documents, FileTokenizer(words))
  assert corpus.tokens.dtype == np.uint32
  assert corpus.lengths[:4].tolist() == [2, 4, 0, 1]
  assert corpus.token_bytes[:7].tolist() == [2, 5, 2, 0, 7, 2, 2]
  assert corpus.tails[:4].tolist() == [1, 0, 2, 0]
  assert corpus.sizes.tolist() == [len(d) for d in documents]
  assert corpus.num_bytes == corpus.tails.sum() + corpus.token_bytes.sum()
  assert corpus.vocab_size == 70_001
  for length in (1, 3, 64):
    source = TextSource(corpus, length, 3)
    expected = literal_rows(corpus, length)
    np.testing.assert_array_equal(all_rows(source)[: len(expected)], expected)
  shuffled = all_rows(TextSource(corpus, 5, 3, shuffle_seed=0))
  assert shuffled[..., 4].sum() == corpus.num_bytes


def test_tokenizer_file_that_cannot_serve_says_why(words, monkeypatch):
  tokenizer = FileTokenizer(words)
  with pytest.raises(ValueError, match=r"document 1 is not UTF-8 .* at byte 2"):
    encode_documents([b"ok", b"ab\xff"], tokenizer)
  with pytest.raises(ValueError, match="document 1 holds the boundary's id 0"):
    encode_documents([b"ok", b"bad"], tokenizer)
  with pytest.raises(ValueError, match=r"no token boundary='</s>'.*endoftext"):
    FileTokenizer(words, boundary="</s>")
  plain = words.with_name("plain.json")
  plain.write_bytes(b"{}")
  with pytest.raises(ValueError, match=r"plain\.json.*expected value at line"):
    FileTokenizer(plain)
  with pytest.raises(FileNotFoundError, match="FileTokenizer: there is no"):
    FileTokenizer(words.with_name("none.json"))
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(ImportError, match=r"ssmjax\[interop\]"):
    FileTokenizer(words)


def test_tokenizers_own_file_encodes_all_text_and_only_text(tmp_path):
  tokenizers = pytest.importorskip("tokenizers")
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
  made.decoder = tokenizers.decoders.ByteLevel()
  made.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
  made.normalizer = tokenizers.normalizers.NFC()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=["<|endoftext|>"],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  made.train_from_iterator(["the cat and the hat"] * 9, trainer)
  made.enable_truncation(3)
  made.enable_padding(length=3)
  path = tmp_path / "tokenizer.json"
  made.save(str(path))
  tokenizer = FileTokenizer(path)
  texts = ["the cat", "naïve 😀😀 e\u0301 ", "a<|endoftext|>b", "\n\n"]
  documents = [text.encode() for text in texts]
  corpus = encode_documents(documents, tokenizer)
  assert corpus.sizes.tolist() == [len(d) for d in documents]
  ends = np.cumsum(corpus.lengths)
  for i, text in enumerate(texts):
    part = slice(ends[i] - corpus.lengths[i], ends[i])
    decoded = tokenizer.decode(corpus.tokens[part])
    assert decoded.strip() == text.replace("e\u0301", "é").strip()
    size = int(corpus.token_bytes[part].sum()) + corpus.tails[i]
    assert size == len(documents[i])
  assert tokenizer.boundary not in corpus.tokens


def test_bytes_are_decoded_to_the_text_that_they_were():
  tokenizer = ByteTokenizer()
  ids, _ = next(tokenizer.encode(["Ä\n".encode()]))
  assert tokenizer.decode([END, *ids, END]) == "Ä\n"
  assert tokenizer.decode(ids[:1]) == "\N{REPLACEMENT CHARACTER}"
  with pytest.raises(ValueError, match="id 300, expected 0 to 256"):
    tokenizer.decode([300])


@pytest.mark.parametrize(
  ("call", "match"),
  [
    (lambda p: read_documents(p / "no"), "read_documents: there is no"),
    (lambda p: read_documents(p), r"has no file that ends in \.txt"),
    (lambda p: read_documents(p / "empty"), "hold no text"),
    (lambda p: read_documents(p / "bad.xz"), "bad.xz' cannot be unpacked"),
    (lambda p: read_documents(p / "bad.gz"), "bad.gz' cannot be unpacked"),
    (lambda p: read_documents(p / "bad.bz2"), "bad.bz2' cannot be unpacked"),
    (lambda p: read_documents(p, suffixes=".txt"), "expected several endings"),
    (lambda p: read_documents(p, separator="a\n"), "has a line end"),
    (lambda p: split_documents([b"a", b"a"]), "2 documents with 1 different"),
    (lambda p: split_documents([b"a", b"b"], 1.0), "validation=1.0, expected"),
    (lambda p: split_documents([b"a", b"b"], math.nan), "validation=nan"),
    (lambda p: split_documents([b"a", b"b"], seed=-1), "seed=-1, expected 0"),
    (lambda p: split_documents("ab"), "documents is one str"),
    (lambda p: encode_documents(b"ab"), "documents is one bytes"),
    (lambda p: encode_documents(["a"]), r"document 0 is a str.*text\.encode"),
    (lambda p: encode_documents([b""]), "1 documents without a token"),
    (lambda p: TextSource(CORPUS, 0, 1), "length is 0, expected an integer"),
    (lambda p: TextSource(CORPUS, 1, 2.0), "batch_size is 2.0, expected an"),
    (lambda p: TextSource(CORPUS, 1, 1, -1), "shuffle_seed is -1, expected"),
    (
      lambda p: TextSource(CORPUS, 50, 3, drop_remainder=True),
      "fills 2 rows of length=50, expected at least batch_size=3",
    ),
    (lambda p: TextSource(CORPUS, 1, 4, processes=(2, 2)), r"=\(2, 2\), exp"),
    (lambda p: TextSource(CORPUS, 1, 4, processes=(0, 3)), "among 3 processes"),
    (lambda p: TextSource(CORPUS, 1, 4, processes=2), "processes is 2, expect"),
    (lambda p: TextSource(CORPUS, 1, 4).batch(-1), "step=-1, expected 0"),
    (
      lambda p: text_dataset(TextSource(CORPUS, 1, 4), epochs=0),
      "epochs=0, expected an int >= 1",
    ),
    (
      lambda p: text_dataset(TextSource(CORPUS, 1, 4), prefetch=-1),
      "prefetch=-1, expected a number",
    ),
  ],
)
def test_bad_input_is_refused_by_name(tmp_path, call, match):
  (tmp_path / "empty").write_bytes(b"")
  for ending in ("xz", "gz", "bz2"):
    (tmp_path / f"bad.{ending}").write_bytes(b"not packed at all")
  with pytest.raises((ValueError, FileNotFoundError), match=match):
    call(tmp_path)


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, bz2.compress])
def test_file_that_ends_too_early_is_refused(tmp_path, pack):
  ending = {gzip.compress: "gz", lzma.compress: "xz", bz2.compress: "bz2"}
  path = tmp_path / f"half.{ending[pack]}"
  path.write_bytes(pack(bytes(range(256)) * 9)[:-20])
  with pytest.raises(ValueError, match="cannot be unpacked"):
    read_documents(path)


def test_one_text_gives_its_ids_and_one_document_is_refused(words):
  for tokenizer in (ByteTokenizer(), FileTokenizer(words)):
    ids = tokenizer.encode("ab ab")
    ((found, _),) = tokenizer.encode([b"ab ab"])
    np.testing.assert_array_equal(ids, found)
    assert ids.dtype == np.int32
    name = type(tokenizer).__name__
    with pytest.raises(ValueError, match=f"{name}.encode: documents is one by"):
      tokenizer.encode(b"ab ab")
    with pytest.raises(ValueError, match=f"{name}.encode: document 1 is a str"):
      tokenizer.encode([b"ab", "ab"])
  assert ByteTokenizer().decode(ByteTokenizer().encode("Ä b")) == "Ä b"
  for use in (encode_documents, split_documents, ByteTokenizer().encode):
    with pytest.raises(ValueError, match="documents is a generator, expected"):
      use(text for text in [b"a", b"b"])
