"""A token is chosen as the published definitions have it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssmjax.models.sampling import choose_tokens, make_sampling, row_keys

V = 12
LOGITS = np.random.default_rng(0).normal(0, 2, (3, V)).astype(np.float32)
SEEN = np.random.default_rng(1).random((3, V)) < 0.4
DRAWS = 2000


def expected_probabilities(
  logits, seen, temperature, top_k, top_p, min_p, penalty
):
  """What the transformers library's processors leave, in float64, one row.

  RepetitionPenaltyLogitsProcessor, then TemperatureLogitsWarper, TopK, TopP
  (which drops the tokens whose sum with all smaller ones is at most 1 - p) and
  MinP.
  """
  scores = logits.astype(np.float64)
  if penalty is not None:
    punished = np.where(scores < 0, scores * penalty, scores / penalty)
    scores = np.where(seen, punished, scores)
  scores = scores / temperature
  if top_k is not None:
    order = sorted(range(V), key=lambda v: (-scores[v], v))
    scores[order[top_k:]] = -np.inf
  softmax = lambda x: np.exp(x - x.max()) / np.exp(x - x.max()).sum()
  if top_p is not None:
    order = sorted(range(V), key=lambda v: (-scores[v], v))[::-1]
    sums = np.cumsum(softmax(scores)[order])
    dropped = [v for v, total in zip(order, sums, strict=True)
               if total <= 1 - top_p and v != order[-1]]  # fmt: skip
    scores[dropped] = -np.inf
  if min_p is not None:
    p = softmax(scores)
    scores[p < min_p * p.max()] = -np.inf
  return softmax(scores)


@functools.partial(jax.jit, static_argnames=("top_k", "size"))
def draws(logits, seen, numbers, *, top_k=None, size=V):
  """Tokens `[DRAWS, B]`."""
  draw = lambda key: choose_tokens(
    logits, jax.random.split(key, logits.shape[0]), numbers, seen,
    top_k=top_k, vocab_size=size,
  )  # fmt: skip
  return jax.lax.map(
    draw, jax.random.split(jax.random.key(0), DRAWS), batch_size=500
  )


def numbers(temperature=1.0, top_p=None, min_p=None, penalty=None):
  return make_sampling("f", temperature, top_p, min_p, penalty)


@pytest.mark.parametrize(
  ("temperature", "top_k", "top_p", "min_p", "penalty"),
  [
    (1.0, None, None, None, None),
    (0.5, 4, None, None, None),
    (2.0, None, 0.6, None, None),
    (1.5, None, None, 0.15, 1.3),
    (3.0, 7, 0.8, 0.3, 0.7),
  ],
)
def test_tokens_are_drawn_as_the_published_definitions_have_it(
  temperature, top_k, top_p, min_p, penalty
):
  tokens = draws(
    LOGITS, SEEN, numbers(temperature, top_p, min_p, penalty), top_k=top_k
  )
  for row in range(3):
    expected = expected_probabilities(
      LOGITS[row], SEEN[row], temperature, top_k, top_p, min_p, penalty
    )
    found = np.bincount(np.asarray(tokens[:, row]), minlength=V) / DRAWS
    assert not found[expected == 0].any()
    # Five standard errors of a frequency of 1/2.
    np.testing.assert_allclose(found, expected, atol=2.5 / DRAWS**0.5)
    assert expected[expected > 0].min() > 0.01 or not (top_k or top_p or min_p)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_of_equal_logits_exactly_the_first_k_are_drawn(top_k):
  ties = jnp.zeros((3, V)).at[:, 0].set(-1.0)
  tokens = np.asarray(draws(ties, SEEN, numbers(), top_k=top_k))
  assert set(tokens.flat) == set(range(1, top_k + 1))


def test_top_p_cuts_equal_logits_by_their_place_and_keeps_one_at_least():
  ties = jnp.zeros((3, V))
  tokens = np.asarray(draws(ties, SEEN, numbers(top_p=3.5 / V)))
  assert set(tokens.flat) == {0, 1, 2, 3}
  assert set(np.asarray(draws(LOGITS, SEEN, numbers(top_p=1e-9)))[0]) == set(
    LOGITS.argmax(1)
  )


def test_top_p_of_one_cuts_no_token(monkeypatch):
  # Beside the first, the last are lost in rounding a sum from the large end.
  steep = -jnp.arange(30, dtype=jnp.float32)[None]
  noise = lambda key, shape: jnp.zeros(shape).at[-1].set(100.0)
  monkeypatch.setattr(jax.random, "gumbel", noise)
  token = choose_tokens(
    steep, jax.random.key(0)[None], numbers(top_p=1.0), None,
    top_k=None, vocab_size=30,
  )  # fmt: skip
  assert token[0] == 29


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-30])
def test_temperature_zero_takes_the_likeliest_token(temperature):
  tokens = draws(LOGITS, SEEN, numbers(temperature))
  np.testing.assert_array_equal(tokens[0], LOGITS.argmax(1))
  assert (tokens == tokens[0]).all()


def test_padding_of_the_vocabulary_is_never_chosen():
  tall = jnp.asarray(LOGITS).at[:, 9:].set(50.0)
  tokens = np.asarray(draws(tall, SEEN, numbers(), size=9))
  assert tokens.max() < 9
  likeliest = choose_tokens(
    tall.at[0, 10].set(jnp.nan), None, numbers(), None, top_k=None, vocab_size=9
  )
  np.testing.assert_array_equal(likeliest, LOGITS[:, :9].argmax(1))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_row_of_non_finite_logits_is_told_and_the_others_go_on(wrong):
  logits = LOGITS.copy()
  logits[1, 3] = wrong
  for keys in (None, jax.random.split(jax.random.key(0), 3)):
    found = choose_tokens(
      jnp.asarray(logits), keys, numbers(0.0), None, top_k=3, vocab_size=V
    )
    np.testing.assert_array_equal(
      found, [LOGITS[0].argmax(), -1, LOGITS[2].argmax()]
    )


def test_rows_keys_are_their_own_or_folded_with_their_number():
  count = jnp.array([0, 4, 4], jnp.int32)
  shared = row_keys(jax.random.key(1), count)
  own = jax.vmap(jax.random.fold_in, (None, 0))(
    jax.random.key(1), jnp.arange(3)
  )
  data = jax.random.key_data
  np.testing.assert_array_equal(data(shared), data(row_keys(own, count)))
  # An old key is the same key.
  old = row_keys(jax.random.PRNGKey(1), count)
  np.testing.assert_array_equal(data(shared), data(old))
  assert len(np.unique(data(shared), axis=0)) == 3


@pytest.mark.parametrize(
  ("name", "value", "expected"),
  [
    ("temperature", -0.5, "a finite number, 0"),
    ("temperature", float("inf"), "a finite number, 0"),
    ("temperature", float("nan"), "a finite number, 0"),
    ("temperature", None, "a finite number, 0"),
    ("temperature", "hot", "a finite number, 0"),
    ("top_p", 0.0, "above 0 and at most 1"),
    ("top_p", 1.1, "above 0 and at most 1"),
    ("top_p", True, "above 0 and at most 1"),
    ("min_p", -0.1, "0 to 1"),
    ("min_p", float("nan"), "0 to 1"),
    ("repetition_penalty", 0, "a finite number above 0"),
    ("repetition_penalty", float("inf"), "a finite number above 0"),
  ],
)
def test_sampling_refuses_a_number_out_of_range(name, value, expected):
  given = dict.fromkeys(("top_p", "min_p", "repetition_penalty"))
  given = {"temperature": 1.0} | given | {name: value}
  with pytest.raises(ValueError, match=f"generate: {name} is .* {expected}"):
    make_sampling("generate", **given)
