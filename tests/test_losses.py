"""The loss at labels is the dense loss at the same places."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from flax import nnx
from jax.sharding import AxisType

from ssmjax.models import (
  AttentionConfig,
  Classifier,
  ClassifierConfig,
  LanguageModel,
  MambaConfig,
  MinGRUConfig,
  ModelConfig,
  classification_loss,
  gather_labels,
  labelled_loss,
)
from ssmjax.models.blocks import embed_tokens
from ssmjax.ops import linear_cross_entropy

LABELS = np.full((3, 7), -100, np.int32)
LABELS[0, [1, 4, 6]] = [5, 0, 15]
LABELS[1, 2] = 3
TOKENS = np.arange(21, dtype=np.int32).reshape(3, 7) % 16
quick_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@functools.cache
def model(dtype=jnp.float32):
  config = ModelConfig(
    16, 8, 2, mixers=(MambaConfig(d_state=2, dtype=dtype),), dtype=dtype
  )
  build = lambda key: LanguageModel(config, rngs=nnx.Rngs(key))
  return quick_jit(build)(jax.random.key(0))


def dense_loss(model, tokens, labels):
  logits, _ = model(tokens)
  logits = jax.nn.log_softmax(logits)
  chosen = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], -1)
  return -jnp.where(labels >= 0, chosen[..., 0], 0).sum()


def test_labelled_loss_and_gradient_equal_dense_cross_entropy():
  batch = {"tokens": TOKENS, **gather_labels(LABELS, 4)}
  loss = lambda model, batch: labelled_loss(model, batch)[0]
  found = quick_jit(jax.value_and_grad(loss))(model(), batch)
  expected = quick_jit(jax.value_and_grad(dense_loss))(model(), TOKENS, LABELS)
  assert_close(found, expected, jnp.float32)


def test_labelled_loss_counts_labels_and_right_answers():
  logits, _ = quick_jit(lambda m, x: m(x))(model(), TOKENS)
  best = np.asarray(jnp.argmax(logits, -1), np.int32)
  labels = LABELS.copy()
  labels[0, 1], labels[1, 2] = best[0, 1], best[1, 2]
  labels[0, 4], labels[0, 6] = (best[0, [4, 6]] + 1) % 16
  batch = {"tokens": TOKENS, **gather_labels(labels, 4)}
  _, weight, metrics = quick_jit(labelled_loss)(model(), batch)
  assert weight == 4
  assert metrics.keys() == {"accuracy"}
  assert metrics["accuracy"] == 2


def test_labelled_loss_without_weights_counts_every_label():
  batch = {
    "tokens": TOKENS,
    "positions": np.array([[1, 4], [2, 0], [6, 6]], np.int32),
    "targets": np.array([[5, 0], [3, 1], [2, 7]], np.int32),
  }
  loss, weight, _ = quick_jit(labelled_loss)(model(), batch)
  weighted = batch | {"weights": np.ones((3, 2), np.float32)}
  expected, _, _ = quick_jit(labelled_loss)(model(), weighted)
  assert weight == 6
  np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_labelled_loss_is_finite_float32_in_bfloat16():
  batch = {"tokens": TOKENS, **gather_labels(LABELS, 4)}
  loss, weight, metrics = quick_jit(labelled_loss)(model(jnp.bfloat16), batch)
  for value in (loss, weight, metrics["accuracy"]):
    assert value.dtype == jnp.float32
    assert jnp.isfinite(value)


def test_labelled_loss_keeps_no_state_in_memory():
  def memory(max_length):
    config = ModelConfig(
      16, 8, 2, mixers=(AttentionConfig(max_length=max_length),)
    )
    lm = jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    batch = {"tokens": TOKENS, **gather_labels(LABELS, 4)}
    grad = jax.grad(lambda lm, batch: labelled_loss(lm, batch)[0])
    compiled = quick_jit(grad).lower(lm, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert memory(1 << 16) == memory(8)


def test_labelled_loss_names_the_argument_of_a_wrong_shape():
  batch = {"tokens": TOKENS, **gather_labels(LABELS, 4)}
  batch["targets"] = batch["targets"][:, :2]
  message = r"labelled_loss: targets has shape \(3, 2\), expected \(B=3, Q=4\)"
  with pytest.raises(ValueError, match=message):
    labelled_loss(model(), batch)


def test_gather_labels_keeps_places_targets_and_order():
  found = gather_labels(LABELS, 4)
  np.testing.assert_array_equal(
    found["weights"], [[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
  )
  np.testing.assert_array_equal(found["positions"][0, :3], [1, 4, 6])
  np.testing.assert_array_equal(found["targets"][0], [5, 0, 15, 0])
  assert found["positions"][1, 0] == 2
  assert found["targets"][1, 0] == 3
  assert {k: v.dtype for k, v in found.items()} == {
    "positions": jnp.int32, "targets": jnp.int32, "weights": jnp.float32,
  }  # fmt: skip


def test_gather_labels_drops_the_last_where_there_is_no_room():
  found = gather_labels(LABELS, 2)
  np.testing.assert_array_equal(found["positions"][0], [1, 4])
  np.testing.assert_array_equal(found["weights"].sum(1), [2, 1, 0])


def test_gather_labels_fills_up_rows_shorter_than_asked_for():
  found = gather_labels(LABELS, 9)
  assert {v.shape for v in found.values()} == {(3, 9)}
  np.testing.assert_array_equal(found["weights"].sum(1), [3, 1, 0])


INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32")


@pytest.mark.parametrize(
  "dtype",
  [
    # A narrow one with a sign, and a wide one without.
    pytest.param(
      name,
      marks=[] if name in ("int8", "uint32") else [pytest.mark.nightly],
    )
    for name in INTEGERS
  ],
)
def test_tokens_of_every_integer_type_are_the_same_tokens(dtype):
  # More classes and places than the narrow types can count.
  table = jnp.arange(70_000, dtype=jnp.float32)[:, None]
  ids = jnp.array([[0, 127, 5]], dtype)
  embed = jax.jit(embed_tokens)
  np.testing.assert_array_equal(embed(table, ids)[..., 0], [[0, 127, 5]])
  if jnp.issubdtype(dtype, jnp.signedinteger):
    assert jnp.isnan(embed(table, jnp.array([[-1]], dtype))).all()
  loss, _ = linear_cross_entropy(
    jnp.ones((3, 1)), table / 70_000, ids[0], jnp.ones(3)
  )
  expected, _ = linear_cross_entropy(
    jnp.ones((3, 1)), table / 70_000, ids[0].astype(jnp.int32), jnp.ones(3)
  )
  assert loss == expected
  wide = np.zeros((1, 300), np.int32)
  wide[0, 120] = 3
  batch = {
    "tokens": wide,
    "positions": np.array([[120]]),
    "targets": ids[:, :1],
  }
  found = quick_jit(labelled_loss)(model(), jax.tree.map(
    lambda x: x.astype(dtype), batch
  ))  # fmt: skip
  assert_close(found, quick_jit(labelled_loss)(model(), batch))


def test_ids_beyond_32_bits_are_no_other_tokens(x64):
  table = jnp.ones((4, 1), jnp.float32)
  far = np.array([2**32, -(2**32)])
  assert jnp.isnan(embed_tokens(table, far[None])).all()
  for targets in (far[:1], jnp.asarray(far[:1])):
    loss, _ = linear_cross_entropy(jnp.ones((1, 1)), table, targets)
    assert jnp.isnan(loss)


@pytest.mark.parametrize("position", [-1, -7, 7, 1 << 30])
def test_labelled_loss_is_nan_at_a_position_outside_the_row(position):
  batch = {"tokens": TOKENS, **gather_labels(LABELS, 4)}
  run = quick_jit(labelled_loss)
  where = lambda place: batch["positions"].at[place].set(position)
  # In a place without weight it says nothing.
  loss, _, _ = run(model(), batch | {"positions": where((1, 3))})
  assert loss == run(model(), batch)[0]
  loss, _, _ = run(model(), batch | {"positions": where((0, 0))})
  assert jnp.isnan(loss)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_labels_of_every_integer_type_are_gathered_alike(dtype):
  dense = np.where(LABELS < 0, 100, LABELS)
  found = gather_labels(dense.astype(dtype), 4, ignore=100)
  expected = gather_labels(LABELS, 4)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  # What a type cannot hold, nothing is.
  if np.iinfo(dtype).min == 0:
    labels = np.full((1, 2), np.iinfo(dtype).max - 99, dtype)
    assert gather_labels(labels, 2)["weights"].all()


@functools.cache
def classifier():
  config = ClassifierConfig(5, 8, 1, vocab_size=16, mixers=(MinGRUConfig(),))
  return Classifier(config, rngs=nnx.Rngs(0))


def test_classification_loss_and_accuracy_are_those_of_the_logits():
  labels = np.array([3, 0, 4], np.uint8)
  weights = np.array([1.0, 0.0, 2.5], np.float32)
  batch = {"inputs": TOKENS, "labels": labels, "weights": weights}
  for smoothing in (0.0, 0.2):
    loss, weight, metrics = quick_jit(
      functools.partial(classification_loss, label_smoothing=smoothing)
    )(classifier(), batch)
    logits = np.asarray(quick_jit(lambda m, x: m(x))(classifier(), TOKENS))
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    target = (1 - smoothing) * np.eye(5)[labels] + smoothing / 5
    expected = -(weights * (target * log_p).sum(1)).sum()
    assert_close(loss, expected)
    assert weight == 3.5
    assert metrics["accuracy"] == weights[logits.argmax(1) == labels].sum()


def test_rows_without_weight_change_no_classification_loss_nor_gradient():
  labels = np.array([3, 9, 4], np.int32)
  padded = TOKENS.copy()
  padded[1] = -1
  batch = {"inputs": padded, "labels": labels, "weights": np.ones(3)}
  batch["weights"][1] = 0
  rows = {"inputs": TOKENS[::2], "labels": labels[::2]}
  ids = np.ones_like(TOKENS)
  ids[1] = 0
  run = quick_jit(
    jax.value_and_grad(lambda m, batch: classification_loss(m, batch)[0])
  )
  found = run(classifier(), batch | {"segment_ids": ids})
  assert_close(found, run(classifier(), rows))
  loss, _ = run(classifier(), batch | {"weights": np.ones(3)})
  assert jnp.isnan(loss)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"labels": np.zeros((3, 5), np.int32)}, r"labels has shape \(3, 5\), exp"),
    ({"labels": np.zeros(3)}, "labels has dtype float64, expected class num"),
    ({"weights": np.zeros(2)}, r"weights has shape \(2,\), expected \(B=3\)"),
  ],
)
def test_classification_loss_names_what_cannot_be(fields, message):
  batch = {"inputs": TOKENS, "labels": np.zeros(3, np.int32)} | fields
  with pytest.raises(ValueError, match="classification_loss: " + message):
    classification_loss(classifier(), batch)
  with pytest.raises(ValueError, match="label_smoothing is 1, expected 0 or"):
    classification_loss(classifier(), batch, label_smoothing=1)


@pytest.mark.parametrize(
  ("axis_type", "set_mesh"),
  [
    (AxisType.Auto, True),
    (AxisType.Explicit, False),
    pytest.param(AxisType.Auto, False, marks=pytest.mark.nightly),
    pytest.param(AxisType.Explicit, True, marks=pytest.mark.nightly),
  ],
)
def test_labelled_loss_of_divided_rows_equals_one_device(axis_type, set_mesh):
  config = ModelConfig(16, 8, 1, mixers=(AttentionConfig(num_heads=2),))
  plain = LanguageModel(config, rngs=nnx.Rngs(0))
  tokens = np.arange(28, dtype=np.int32).reshape(4, 7) % 16
  batch = {
    "tokens": tokens,
    "positions": np.tile(np.int32([1, 3]), (4, 1)),
    "targets": tokens[:, 2:4],
  }
  loss = lambda model, batch: labelled_loss(model, batch)[0]
  both = jax.value_and_grad(loss)
  expected = quick_jit(both)(plain, batch)
  mesh = jax.make_mesh(
    (2,), ("data",), axis_types=(axis_type,), devices=jax.devices()[:2]
  )
  with jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext():
    rows = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))
    everywhere = jax.device_put(plain, jax.NamedSharding(mesh, jax.P()))
    found = quick_jit(both)(everywhere, rows)
  assert_close(found, expected, jnp.float32)
