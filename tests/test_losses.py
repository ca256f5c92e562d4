"""The loss at labels is the dense loss at the same places."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from flax import nnx

from ssmjax.models import (
  AttentionConfig,
  LanguageModel,
  MambaConfig,
  ModelConfig,
  gather_labels,
  labelled_loss,
)

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
