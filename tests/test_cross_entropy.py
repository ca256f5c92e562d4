"""The loss from features equals the dense one, block by block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ssmjax.ops import cross_entropy, linear_cross_entropy

pytestmark = pytest.mark.usefixtures("strict")


def make(positions=13, width=6, vocabulary=11, dtype=jnp.float32, seed=0):
  rng = np.random.default_rng(seed)
  features = jnp.asarray(rng.normal(size=(positions, width)), dtype)
  weight = jnp.asarray(rng.normal(size=(vocabulary, width)), jnp.float32)
  targets = jnp.asarray(rng.integers(vocabulary, size=positions), jnp.int32)
  weights = jnp.asarray(rng.random(positions), jnp.float32).at[3:5].set(0.0)
  return features, weight, targets, weights


def dense(features, weight, targets, weights):
  logits = np.asarray(features, np.float64) @ np.asarray(weight, np.float64).T
  weights = np.asarray(weights, np.float64)[:, None]
  exponentials = np.exp(logits - logits.max(-1, keepdims=True))
  total = exponentials.sum(-1, keepdims=True)
  log_chances = logits - logits.max(-1, keepdims=True) - np.log(total)
  chances = exponentials / total
  hit = np.asarray(targets)[:, None] == np.arange(weight.shape[0])
  d_logits = (chances - hit) * weights
  return (
    -(log_chances * hit * weights).sum(),
    (weights[:, 0] * (logits.argmax(-1) == np.asarray(targets))).sum(),
    d_logits @ np.asarray(weight, np.float64),
    d_logits.T @ np.asarray(features, np.float64),
  )


def pull(features, weight, targets, weights):
  run = lambda f, w: linear_cross_entropy(f, w, targets, weights)
  (loss, correct), grads = jax.value_and_grad(run, (0, 1), has_aux=True)(
    features, weight
  )
  return loss, correct, *grads


jitted = jax.jit(pull)


def fresh(function):
  """Compiled anew: what is patched is not part of a cache's key."""
  return jax.jit(lambda *args: function(*args))


@pytest.mark.parametrize("block", [1 << 22, 44, 1])
def test_loss_and_gradients_equal_the_dense_softmax_in_blocks(
  block, monkeypatch
):
  monkeypatch.setattr(cross_entropy, "_BLOCK_LOGITS", block)
  args = make()
  assert_close(fresh(pull)(*args), dense(*args))
  # Without differentiation another branch runs.
  ones = jnp.ones_like(args[3])
  assert_close(
    fresh(linear_cross_entropy)(*args[:3]), dense(*args[:3], ones)[:2]
  )


@pytest.mark.parametrize("block", [1 << 22, 44])
def test_bfloat16_features_sum_their_gradient_in_float32(block, monkeypatch):
  monkeypatch.setattr(cross_entropy, "_BLOCK_LOGITS", block)
  args = make(positions=400, dtype=jnp.bfloat16)
  loss, correct, d_features, d_weight = fresh(pull)(*args)
  assert (loss.dtype, correct.dtype) == (jnp.float32, jnp.float32)
  assert (d_features.dtype, d_weight.dtype) == (jnp.bfloat16, jnp.float32)
  expected = dense(*args)
  assert_close((loss, correct), expected[:2], jnp.bfloat16)
  assert_close((d_features, d_weight), expected[2:], jnp.bfloat16)
  narrow = (args[0], args[1].astype(jnp.bfloat16), *args[2:])
  *_, d_weight = fresh(pull)(*narrow)
  assert d_weight.dtype == jnp.bfloat16
  assert_close(d_weight, dense(*narrow)[3], jnp.bfloat16)


def test_positions_of_weight_zero_reach_nothing():
  features, weight, targets, weights = make()
  out = weights == 0
  dirty = (
    jnp.where(out[:, None], jnp.nan, features),
    weight,
    jnp.where(out, -100, targets),
    weights,
  )
  expected = jitted(features, weight, targets, weights)
  actual = jitted(*dirty)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)
  assert not np.asarray(actual[2])[np.asarray(out)].any()


def test_a_target_out_of_range_is_not_a_number():
  features, weight, targets, weights = make()
  for target in (-1, weight.shape[0]):
    bad = targets.at[0].set(target)
    loss, _, d_features, d_weight = jitted(features, weight, bad, weights)
    assert np.isnan(loss)
    assert np.isnan(d_features[0]).all()
    assert np.isfinite(d_features[1:]).all()
    assert np.isnan(d_weight).all()


def test_large_logits_and_long_integers_do_no_harm(x64):
  features, weight, targets, weights = make()
  big = features * 1e4
  loss, *_, d_weight = jitted(big, weight, targets.astype(jnp.int64), weights)
  assert loss.dtype == jnp.float32
  assert_close((loss, d_weight), dense(big, weight, targets, weights)[::3])


def test_vmap_equals_a_loop():
  rows = [make(seed=s) for s in range(3)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *rows)
  actual = jax.jit(jax.vmap(pull))(*stacked)
  for i, row in enumerate(rows):
    assert_close(jax.tree.map(lambda x, i=i: x[i], actual), jitted(*row))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("block", [1 << 22, 22])
def test_sharded_gradients_equal_those_of_one_device(kind, block, monkeypatch):
  monkeypatch.setattr(cross_entropy, "_BLOCK_LOGITS", block)
  mesh = jax.make_mesh((4, 2), ("data", "seed"), axis_types=(kind,) * 2)
  args = make(positions=16)
  specs = (P("data"), P(), P("data"), P("data"))
  expected = jitted(*args)

  def inside(*args):
    loss, correct, *grads = pull(*args)
    return lax.psum((loss, correct), "data"), grads

  def outside(*args):
    total = lambda *a: lax.psum(linear_cross_entropy(*a), "data")
    sharded = jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=P())
    run = lambda f, w: sharded(f, w, *args[2:])
    out, grads = jax.value_and_grad(run, (0, 1), has_aux=True)(*args[:2])
    return out, list(grads)

  sharded = jax.shard_map(
    inside, mesh=mesh, in_specs=specs, out_specs=(P(), [P("data"), P()])
  )
  args = [
    jax.device_put(x, NamedSharding(mesh, spec))
    for x, spec in zip(args, specs, strict=True)
  ]
  with jax.set_mesh(mesh):
    for run in (sharded, outside):
      (loss, correct), grads = fresh(run)(*args)
      assert_close((loss, correct, *grads), expected)


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    (dict(features=jnp.ones((3, 4))), r"weight has shape \(2, 5\), expected"),
    (dict(targets=jnp.ones(3)), "targets has dtype float32, expected class"),
    (dict(weights=jnp.ones(2)), r"weights has shape \(2,\), expected \(P=3\)"),
    (dict(features=jnp.ones((3, 5), jnp.int32)), "features has dtype int32"),
  ],
)
def test_errors_name_the_argument_and_what_is_expected(wrong, message):
  right = dict(
    features=jnp.ones((3, 5)),
    weight=jnp.ones((2, 5)),
    targets=jnp.zeros(3, jnp.int32),
    weights=jnp.ones(3),
  )
  with pytest.raises(ValueError, match=f"linear_cross_entropy: {message}"):
    linear_cross_entropy(**(right | wrong))
