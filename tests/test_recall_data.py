import dataclasses
import functools
import itertools
import sys

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmjax.data import (
  AUTHORS_MIX,
  IGNORE,
  PAPER_MIX,
  TEST_MIX,
  RecallConfig,
  RecallMix,
  RecallSource,
  RecallStream,
  recall_batch,
  recall_dataset,
  recall_example,
  recall_examples,
)

SMALL = RecallConfig(length=32, num_pairs=4, vocab_size=40)
# Segments whose sizes are no multiples of the batch of 4 that goes with it.
MIX = RecallMix(
  (
    (SMALL, 18),
    (RecallConfig(16, 2, 40), 7),
    (SMALL, 13),
  )
)


@st.composite
def configs(draw):
  pairs = draw(st.integers(1, 6))
  length = 2 * draw(st.integers(2 * pairs, 2 * pairs + 6))
  slots = length // 2 - pairs
  queries = draw(st.none() | st.integers(1, pairs))
  key_low = draw(st.integers(0, pairs - (queries or pairs)))
  slot_low = draw(st.integers(0, slots - (queries or pairs)))
  return RecallConfig(
    length=length,
    num_pairs=pairs,
    vocab_size=draw(st.integers(2 * pairs + 2, 60)),
    power=draw(st.sampled_from([0.01, 0.0, 1.0])),
    random_fillers=draw(st.booleans()),
    query_keys=(key_low, pairs) if queries else None,
    query_slots=(slot_low, slots),
    num_queries=queries,
  )


@settings(max_examples=6, deadline=None, derandomize=True)
@given(configs(), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 9))
def test_every_query_is_a_key_of_the_context_and_labelled_with_its_value(
  config, seed, start
):
  batch = _host(recall_batch(config, seed, start, 8))
  for row in range(8):
    _check_example(config, **{name: v[row] for name, v in batch.items()})


def _check_example(config, tokens, labels, positions, targets, distances):
  pairs, half = config.num_pairs, config.vocab_size // 2
  assert 4 * pairs <= config.length == len(tokens) == len(labels)
  keys, values = tokens[: 2 * pairs].reshape(pairs, 2).T
  assert len(set(keys)) == len(set(values)) == pairs
  assert np.all((keys >= 1) & (keys < half))
  assert np.all((half <= values) & (values < config.vocab_size))

  # Exactly the queries are labelled, each in a slot of its own.
  assert len(positions) == config.queries
  assert np.array_equal(np.flatnonzero(labels != IGNORE), positions)
  assert np.array_equal(labels[positions], targets)
  slots, odd = np.divmod(positions - 2 * pairs, 2)
  assert not odd.any()
  low, high = config.query_slots or (0, config.num_slots)
  assert np.all((low <= slots) & (slots < high))

  # Each key is asked at most once, and its label is its value.
  asked = np.array([list(keys).index(key) for key in tokens[positions]])
  assert len(set(asked)) == config.queries
  assert np.array_equal(values[asked], targets)
  assert np.array_equal(positions - 2 * asked, distances)
  low, high = config.query_keys or (0, pairs)
  assert np.all((low <= asked) & (asked < high))

  fillers = np.delete(tokens[2 * pairs :], positions - 2 * pairs)
  if config.random_fillers:
    assert np.all((half <= fillers) & (fillers < config.vocab_size))
  else:
    assert not fillers.any()


def literal_example(random, length, num_pairs, vocab_size, power):
  """MQAR word by word: (keys, values, the slot of each pair's query)."""
  keys = random.choice(np.arange(1, vocab_size // 2), num_pairs, replace=False)
  values = random.choice(
    np.arange(vocab_size // 2, vocab_size), num_pairs, replace=False
  )
  slots = (length - 2 * num_pairs) // 2
  p = power * np.arange(1, slots + 1) ** (power - 1)
  gaps = random.choice(slots, num_pairs, replace=False, p=p / p.sum())
  return keys, values, gaps


@pytest.fixture(scope="module")
def drawn_twice():
  """(keys, values, slots by pair) of ours and of the literal generator."""
  count = 12_000
  batch = _host(recall_batch(SMALL, 3, 0, count))
  context = batch["tokens"][:, : 2 * SMALL.num_pairs]
  context = context.reshape(count, SMALL.num_pairs, 2)
  asked = (batch["positions"] - batch["distances"]) // 2
  slots = np.empty_like(asked)
  np.put_along_axis(
    slots, asked, batch["positions"] // 2 - SMALL.num_pairs, axis=1
  )
  random = np.random.default_rng(0)
  literal = [
    literal_example(random, SMALL.length, SMALL.num_pairs, 40, 0.01)
    for _ in range(count)
  ]
  ours = (context[:, :, 0], context[:, :, 1], slots)
  return ours, tuple(np.array(part) for part in zip(*literal, strict=True))


@pytest.mark.parametrize("part", [0, 1, 2], ids=["keys", "values", "slots"])
def test_each_pair_has_the_literal_generators_marginals(drawn_twice, part):
  ours, literal = (side[part] for side in drawn_twice)
  for pair in range(SMALL.num_pairs):
    _assert_same_law(ours[:, pair], literal[:, pair])


@pytest.mark.parametrize("part", [0, 1, 2], ids=["keys", "values", "slots"])
def test_successive_draws_are_joint_as_in_the_literal_generator(
  drawn_twice, part
):
  ours, literal = (side[part] for side in drawn_twice)
  for first, second in itertools.pairwise(range(SMALL.num_pairs)):
    _assert_same_law(
      100 * ours[:, first] + ours[:, second],
      100 * literal[:, first] + literal[:, second],
    )


def test_keys_values_and_slots_are_independent_draws(drawn_twice):
  (keys, values, slots), _ = drawn_twice
  random = np.random.default_rng(1)
  for x, y in itertools.combinations((keys, values, slots), 2):
    x, y = x[:, 0], y[:, 0]
    _assert_same_law(100 * x + y, 100 * x + random.permutation(y))


def test_first_and_second_slot_follow_the_power_law(drawn_twice):
  slots = drawn_twice[0][2]
  p = np.arange(1, SMALL.num_slots + 1) ** (SMALL.power - 1)
  p /= p.sum()
  joint = p[:, None] * p / (1 - p[:, None])
  np.fill_diagonal(joint, 0)
  counts = np.zeros_like(joint)
  np.add.at(counts, (slots[:, 0], slots[:, 1]), 1)
  _assert_law(counts.sum(1), p * len(slots))
  _assert_law(counts.ravel(), joint.ravel() * len(slots))


def _assert_law(counts, expected):
  """Pearson's χ² is within 5 standard deviations of its mean."""
  assert not counts[expected == 0].any()
  usual = expected >= 5
  counts = np.append(counts[usual], counts[~usual].sum())
  expected = np.append(expected[usual], expected[~usual].sum())
  rare = expected > 0
  chi2 = np.sum((counts - expected)[rare] ** 2 / expected[rare])
  degrees = rare.sum() - 1
  assert abs(chi2 - degrees) < 5 * np.sqrt(2 * degrees), (chi2, degrees)


def _assert_same_law(x, y):
  """The same for two samples of one size, binned by value."""
  bins = max(x.max(), y.max()) + 1
  x, y = np.bincount(x, minlength=bins), np.bincount(y, minlength=bins)
  total = x + y
  usual = total >= 10
  x, y = (
    np.append(x[usual], x[~usual].sum()),
    np.append(y[usual], y[~usual].sum()),
  )
  seen = x + y > 0
  chi2 = np.sum((x - y)[seen] ** 2 / (x + y)[seen])
  degrees = seen.sum() - 1
  assert abs(chi2 - degrees) < 5 * np.sqrt(2 * degrees), (chi2, degrees)


def test_one_in_many_asked_pairs_are_drawn_uniformly():
  config = dataclasses.replace(SMALL, query_keys=(1, 4), num_queries=2)
  batch = _host(recall_batch(config, 0, 0, 3000))
  asked = np.sort((batch["positions"] - batch["distances"]) // 2)
  _, counts = np.unique(asked, axis=0, return_counts=True)
  _assert_law(counts, np.full(3, 1000))


def test_restricted_slots_start_the_power_law_anew():
  config = dataclasses.replace(
    SMALL, query_keys=(2, 3), query_slots=(5, 9), power=-1.0
  )
  batch = _host(recall_batch(config, 0, 0, 3000))
  slots = batch["positions"][:, 0] // 2 - SMALL.num_pairs
  p = np.arange(1, 5) ** -2.0
  _assert_law(np.bincount(slots - 5, minlength=4), 3000 * p / p.sum())


def test_one_key_and_one_slot_give_one_distance():
  config = dataclasses.replace(SMALL, query_keys=(1, 2), query_slots=(7, 8))
  distances = recall_batch(config, 0, 0, 4)["distances"]
  assert np.array_equal(distances, np.full((4, 1), 2 * (4 + 7 - 1)))


def test_an_example_alone_is_the_one_in_any_batch():
  start = 2**31 - 3
  batch = _host(recall_batch(SMALL, 7, start, 8))
  other = _host(recall_batch(SMALL, 7, start - 2, 8))
  for i in range(6):
    example = _host(recall_example(SMALL, 7, start + i))
    for name in batch:
      assert np.array_equal(example[name], batch[name][i]), name
      assert np.array_equal(example[name], other[name][i + 2]), name


def test_seed_and_index_are_python_numpy_or_traced_integers(strict):
  expected = _host(recall_example(SMALL, 5, 9))
  assert {v.dtype for v in expected.values()} == {np.dtype("int32")}
  for seed, index in [
    (np.uint32(5), np.int64(9)),
    (jnp.int32(5), jnp.uint32(9)),
  ]:
    _assert_equal(_host(recall_example(SMALL, seed, index)), expected)
  make = jax.jit(functools.partial(recall_example, SMALL))
  _assert_equal(_host(make(jnp.int32(5), jnp.uint32(9))), expected)
  indices = jnp.array([3, 9], jnp.int32)
  examples = _host(recall_examples(SMALL, 5, indices))
  _assert_equal({k: v[1] for k, v in examples.items()}, expected)


def test_neither_float64_nor_the_default_generator_changes_the_data():
  expected = _host(recall_example(SMALL, 5, 9))
  with jax.enable_x64(True), jax.default_prng_impl("rbg"):
    _assert_equal(recall_example(SMALL, 5, 9), expected)


def test_seeds_and_indices_differ_over_all_32_bits():
  numbers = [0, 1, 2**16, 2**31, 2**32 - 1]
  made = {
    _host(recall_example(SMALL, a, b))["tokens"].tobytes()
    for a in numbers
    for b in numbers
  }
  assert len(made) == len(numbers) ** 2


def test_source_is_a_grain_source_with_random_access():
  source = RecallSource(SMALL, num_examples=8, seed=4, start=100)
  assert isinstance(source, grain.sources.RandomAccessDataSource)
  assert len(source) == 8
  batch = _host(recall_batch(SMALL, 4, 100, 8))
  for i in (7, 0, -1):
    assert all(isinstance(v, np.ndarray) for v in source[i].values())
    _assert_equal(source[i], {k: v[i] for k, v in batch.items()})
  with pytest.raises(IndexError, match="index 8, expected less than 8"):
    source[8]
  assert repr(source) == repr(dataclasses.replace(source))
  assert repr(source) != repr(dataclasses.replace(source, seed=5))


def test_source_feeds_a_grain_pipeline():
  source = RecallSource(SMALL, num_examples=8, seed=4)
  dataset = grain.MapDataset.source(source).shuffle(seed=0).batch(3)
  assert len(dataset) == 3
  assert dataset[2]["tokens"].shape == (2, SMALL.length)
  tokens = np.concatenate([batch["tokens"] for batch in dataset])
  expected = recall_batch(SMALL, 4, 0, 8)["tokens"]
  assert sorted(map(tuple, tokens)) == sorted(map(tuple, np.array(expected)))


def test_dataset_in_order_is_the_sequential_streams_first_epoch():
  dataset = recall_dataset(MIX, 4, seed=2)
  stream = RecallStream(MIX, 4, order="sequential")
  assert len(dataset) == stream.steps_per_epoch
  for step in (10, 4, 0):
    expected = stream.batch(stream.kind(step), step, 2)
    _assert_equal(dataset[step], _host(expected))


def test_shuffled_dataset_has_every_example_once_in_batches_of_one_length():
  plain = recall_dataset(MIX, 4, seed=2)
  shuffled = recall_dataset(MIX, 4, seed=2, shuffle_seed=1)
  assert len(shuffled) == len(plain)
  rows = lambda dataset: [
    tuple(row) for batch in dataset for row in batch["tokens"]
  ]
  assert rows(shuffled) != rows(plain)
  assert sorted(rows(shuffled)) == sorted(rows(plain))
  assert len(recall_dataset(MIX, 4, seed=2, drop_remainder=True)) == 8


def test_dataset_iterator_resumes_exactly():
  dataset = recall_dataset(MIX, 4, seed=2, shuffle_seed=1).repeat(2)
  iterator = iter(dataset.to_iter_dataset())
  for _ in range(9):
    next(iterator)
  state = iterator.get_state()
  rest = list(iterator)
  assert len(rest) == 2 * 11 - 9
  resumed = iter(dataset.to_iter_dataset())
  resumed.set_state(state)
  for batch, expected in zip(resumed, rest, strict=True):
    _assert_equal(batch, expected)


def test_everything_but_the_dataset_works_without_grain(monkeypatch):
  monkeypatch.setitem(sys.modules, "grain", None)
  stream = RecallStream(MIX, 4)
  batch = stream.batch(stream.kind(0), 0, 0)
  assert batch["tokens"].ndim == 2
  assert RecallSource(SMALL, 8, 0)[3]["tokens"].shape == (SMALL.length,)
  with pytest.raises(ImportError, match="pip install grain"):
    recall_dataset(MIX, 4, 0)


def test_the_papers_mix_has_its_numbers():
  sizes = [(c.length, c.num_pairs, n) for c, n in PAPER_MIX.segments]
  assert sizes == [
    (length, pairs, 20_000)
    for length, all_pairs in {
      64: (4, 8, 16),
      128: (8, 16, 32),
      256: (16, 32, 64),
      512: (32, 64, 128),
      1024: (64, 128, 256),
    }.items()
    for pairs in all_pairs
  ]
  assert PAPER_MIX.num_examples == 300_000
  _check_defaults(PAPER_MIX)


def test_the_authors_codes_mix_has_its_numbers():
  sizes = [(c.length, c.num_pairs, n) for c, n in AUTHORS_MIX.segments]
  assert sizes == [
    (64, 4, 100_000),
    (128, 8, 20_000),
    (256, 16, 20_000),
    (256, 32, 20_000),
    (256, 64, 20_000),
    (512, 32, 20_000),
    (512, 64, 20_000),
    (512, 128, 20_000),
    (1024, 64, 20_000),
    (1024, 128, 20_000),
    (1024, 256, 20_000),
  ]
  assert AUTHORS_MIX.num_examples == 300_000
  tokens = sum(c.length * n for c, n in AUTHORS_MIX.segments)
  assert tokens == 116_480_000
  stream = RecallStream(AUTHORS_MIX, 128, order="sequential")
  assert stream.steps_per_epoch == 2352
  assert len({stream.kind(step) for step in range(2352)}) == 22
  _check_defaults(AUTHORS_MIX)


def test_the_test_mix_has_the_tables_columns():
  assert [(c.length, c.num_pairs, n) for c, n in TEST_MIX.segments] == [
    (1024, 64, 1000),
    (1024, 128, 1000),
    (1024, 256, 1000),
  ]
  _check_defaults(TEST_MIX)


def _check_defaults(mix):
  for config, _ in mix.segments:
    assert (config.vocab_size, config.power) == (8192, 0.01)
    assert not config.random_fillers
  changed = mix.replace(vocab_size=1024, random_fillers=True)
  assert {c.vocab_size for c, _ in changed.segments} == {1024}
  assert changed.num_examples == mix.num_examples


def test_sequential_stream_goes_through_the_mix_with_ragged_ends():
  stream = RecallStream(MIX, 4, order="sequential")
  assert stream.steps_per_epoch == 5 + 2 + 4
  kinds = [stream.kind(step) for step in range(22)]
  rows = [4, 4, 4, 4, 2, 4, 3, 4, 4, 4, 1]
  assert [kind.rows for kind in kinds] == 2 * rows
  assert [kind.segment for kind in kinds] == 2 * ([0] * 5 + [1] * 2 + [2] * 4)
  for epoch in range(2):
    assert _epoch(stream, epoch) == list(range(MIX.num_examples))


@pytest.mark.parametrize("run_length", [1, 2])
def test_shuffled_stream_takes_full_batches_of_every_segment(run_length):
  stream = RecallStream(MIX, 4, run_length=run_length)
  assert stream.steps_per_epoch == 4 + 1 + 3
  orders = set()
  for epoch in range(20):
    kinds = [stream.kind(8 * epoch + step) for step in range(8)]
    orders.add(tuple(kinds))
    assert sorted(kinds) == [(0, 4)] * 4 + [(1, 4)] + [(2, 4)] * 3
    if run_length == 2:
      assert kinds[0:6:2] == kinds[1:6:2]
      assert kinds[6:] == [(1, 4), (2, 4)]
  assert len(orders) == 3 if run_length == 2 else len(orders) > 10


@pytest.mark.parametrize("run_length", [2, 5])
def test_shuffled_stream_sees_every_example_equally_often(run_length):
  stream = RecallStream(MIX, 4, run_length=run_length)
  epochs = [_epoch(stream, epoch) for epoch in range(63)]
  assert all(len(set(epoch)) == len(epoch) == 8 * 4 for epoch in epochs)
  seen = np.bincount(np.ravel(epochs))
  for (_, size), offset in zip(MIX.segments, MIX.offsets, strict=True):
    part = seen[offset : offset + size]
    assert len(part) == size
    assert np.ptp(part) <= 1


@pytest.mark.parametrize("order", ["sequential", "shuffled"])
def test_fresh_stream_never_repeats_an_example(order):
  stream = RecallStream(MIX, 4, order=order, fresh=True)
  indices = [index for epoch in range(4) for index in _epoch(stream, epoch)]
  assert len(set(indices)) == len(indices)
  assert _epoch(stream, 0) == _epoch(RecallStream(MIX, 4, order=order), 0)


def test_stream_makes_the_examples_that_it_numbers(strict):
  stream = RecallStream(MIX, 4, run_length=2)
  step = next(s for s in range(5, 16) if stream.kind(s) == (1, 4))
  make = jax.jit(functools.partial(stream.batch, stream.kind(step)))
  indices = stream.indices(stream.kind(step), step)
  expected = recall_examples(MIX.segments[1][0], 6, indices)
  _assert_equal(_host(make(np.uint32(step), np.uint32(6))), _host(expected))


@pytest.mark.parametrize("run_length", [1, 3])
def test_batches_of_one_shape_are_those_of_each_kind(run_length):
  mix = RecallMix(
    tuple((RecallConfig(16, k, 16), n) for k, n in ((1, 40), (2, 33), (4, 70)))
  )
  make = functools.partial(
    RecallStream, mix, 8, fresh=True, run_length=run_length
  )
  each, one = make(), make(one_shape=True)
  (kind,) = {one.kind(step) for step in range(40)}
  batch = jax.jit(lambda step: one.batch(kind, step, 5))
  for step in range(2 * each.steps_per_epoch):
    expected = each.batch(each.kind(step), step, 5)
    actual = batch(jnp.int32(step))
    np.testing.assert_array_equal(actual["tokens"], expected["tokens"])
    asked = expected["positions"].shape[1]
    np.testing.assert_array_equal(
      actual["weights"], np.broadcast_to(np.arange(4) < asked, (8, 4))
    )
    for name in ("positions", "targets", "distances"):
      np.testing.assert_array_equal(actual[name][:, :asked], expected[name])


def test_one_shape_is_refused_where_there_is_none():
  with pytest.raises(ValueError, match=r"lengths \[16, 32\]"):
    RecallStream(MIX, 4, one_shape=True)
  same = RecallMix(((SMALL, 18),))
  with pytest.raises(ValueError, match="order='sequential'"):
    RecallStream(same, 4, order="sequential", one_shape=True)


def test_shuffled_order_is_uniform_and_new_in_each_epoch():
  mix = RecallMix(tuple((SMALL, 1) for _ in range(12)))
  stream = RecallStream(mix, 1)
  order = np.array(
    [
      [stream.kind(12 * epoch + i).segment for i in range(12)]
      for epoch in range(1200)
    ]
  )
  assert np.array_equal(np.sort(order), np.tile(np.arange(12), (1200, 1)))
  assert len(np.unique(order, axis=0)) == 1200
  for place in range(12):
    _assert_law(np.bincount(order[:, place], minlength=12), np.full(12, 100.0))
  successors = np.zeros((12, 12))
  np.add.at(successors, (order[:, :-1].ravel(), order[:, 1:].ravel()), 1)
  expected = 100.0 * (1 - np.eye(12))
  _assert_law(successors.ravel(), expected.ravel())


def test_stream_refuses_a_kind_of_another_step():
  stream = RecallStream(MIX, 4, order="sequential")
  with pytest.raises(ValueError, match=r"kind=.*segment=0.* for step 6"):
    stream.batch(stream.kind(0), 6, 0)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"num_pairs": 9}, r"num_pairs=9 needs length >= 4 \* num_pairs = 36"),
    ({"num_pairs": 9}, r"found length=32\. Use num_pairs <= 8"),
    ({"vocab_size": 9}, r"vocab_size=9 has 3 keys.*vocab_size >= 10"),
    ({"vocab_size": 1}, r"vocab_size=1 has 0 keys"),
    ({"length": 33}, r"length=33 is odd.*Use 34"),
    ({"length": 32.0}, r"length is 32\.0, expected an integer of at least 1"),
    ({"num_pairs": 0}, r"num_pairs is 0, expected an integer of at least 1"),
    ({"power": float("nan")}, r"power is nan, expected a finite number"),
    ({"query_keys": (2, 5)}, r"query_keys=\(2, 5\).*lo < hi <= 4"),
    ({"query_keys": (0, 2, 3)}, r"query_keys is \(0, 2, 3\), expected a tuple"),
    ({"query_slots": (3, 13)}, r"query_slots=\(3, 13\).*lo < hi <= 12"),
    ({"query_slots": (3, 3)}, r"query_slots=\(3, 3\)"),
    ({"query_slots": (3, 6)}, r"4 queries, expected at most 3.*query_slots"),
    ({"num_queries": 5}, r"5 queries, expected at most 4.*query_keys=None"),
    ({"num_queries": 0}, r"num_queries is 0, expected an integer"),
  ],
)
def test_config_refuses_sizes_that_do_not_fit(change, message):
  with pytest.raises(ValueError, match=f"^RecallConfig: .*{message}"):
    dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: RecallMix(()), "RecallMix: segments is empty"),
    (lambda: RecallMix(((SMALL, 0),)), r"RecallMix: segments\[0\]\[1\] is 0"),
    (lambda: RecallStream(MIX, 8), "segment 1 has 7 examples.*batch_size=8"),
    (lambda: RecallStream(MIX, 0), "batch_size is 0, expected an integer"),
    (lambda: RecallStream(MIX, 4, order="random"), "order is 'random'"),
    (
      lambda: RecallStream(MIX, 4, order="sequential", run_length=2),
      "run_length=2 with the sequential order",
    ),
    (lambda: RecallStream(MIX, 4).kind(-1), "step=-1, expected 0 or more"),
    (lambda: recall_example(SMALL, -1, 0), "seed=-1, expected 0 to 4294967295"),
    (lambda: recall_example(SMALL, 0, 2**32), "index=4294967296"),
    (lambda: recall_batch(SMALL, 0, 0, 0), "batch_size=0"),
    (lambda: RecallSource(SMALL, 2**32, 0), "num_examples=4294967296"),
  ],
)
def test_bad_arguments_are_refused_with_the_numbers(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_a_key_for_a_seed_is_refused():
  with pytest.raises(TypeError, match="a seed, not a key"):
    recall_example(SMALL, jax.random.key(0), 0)
  with pytest.raises(TypeError, match="expected an integer"):
    recall_example(SMALL, 0, 1.0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _indices(stream, kind, step):
  return stream.indices(kind, step)


def _epoch(stream, epoch):
  """The examples of one epoch, in order."""
  start = epoch * stream.steps_per_epoch
  steps = range(start, start + stream.steps_per_epoch)
  return [
    int(index)
    for step in steps
    for index in np.array(_indices(stream, stream.kind(step), np.uint32(step)))
  ]


def _host(batch):
  return {name: np.array(array) for name, array in batch.items()}


def _assert_equal(actual, expected):
  assert actual.keys() == expected.keys()
  for name in expected:
    assert actual[name].dtype == expected[name].dtype, name
    assert np.array_equal(actual[name], expected[name]), name
