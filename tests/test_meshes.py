"""What the library makes of arrays on a mesh equals what one device makes.

Rows of a batch are divided over two devices, parameters are whole on each.
The mesh's axes are automatic or explicit, and `jax.set_mesh` names it or not.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from flax import nnx
from jax.sharding import AxisType, NamedSharding

from ssmjax import interop, models
from ssmjax.models.kinds import MIXERS

CASES = {
  f"{name}, {'set' if is_set else 'not set'}": (kind, is_set)
  for name, kind in (("auto", AxisType.Auto), ("explicit", AxisType.Explicit))
  for is_set in (False, True)
}
TOKENS = jnp.arange(16).reshape(2, 8) % 16
# A head of 16 channels, where a kind's own is wider than this model.
SIZES = {"mamba2": dict(head_dim=16)}
BY_DAY = ("mamba", "attention")


@contextlib.contextmanager
def on_mesh(case):
  """A function that puts a tree on the mesh, its rows by an axis or whole."""
  kind, is_set = CASES[case]
  mesh = jax.make_mesh((2,), ("data",), (kind,), devices=jax.devices()[:2])

  def put(tree, axis=None):
    one = lambda x: jax.device_put(x, NamedSharding(mesh, jax.P(axis)))
    return jax.tree.map(one, tree)

  with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
    yield put


def check(function, params, rows, case):
  expected = jax.device_get(quick(function)(params, rows))
  with on_mesh(case) as put:
    actual = quick(function)(put(params), put(rows, "data"))
  assert_close(jax.device_get(actual), expected)


@functools.cache
def language_model(kind):
  mixer = MIXERS[kind](**SIZES.get(kind, {}))
  config = models.ModelConfig(16, 16, 1, mixers=(mixer,))
  return nnx.split(models.LanguageModel(config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
  "kind",
  [
    kind if kind in BY_DAY else pytest.param(kind, marks=pytest.mark.nightly)
    for kind in MIXERS
  ],
)
def test_model_of_every_kind_has_the_gradient_of_one_device(kind, case):
  graph, params = language_model(kind)

  def loss(params, tokens):
    logits, _ = nnx.merge(graph, params)(tokens)
    return jnp.square(logits).mean()

  check(jax.value_and_grad(loss), params, TOKENS, case)


@pytest.mark.parametrize("case", CASES)
def test_generate_gives_the_tokens_of_one_device(case):
  graph, params = language_model("mamba")
  run = lambda params, tokens: models.generate(
    nnx.merge(graph, params), tokens, 3
  )
  expected = quick(run)(params, TOKENS)
  with on_mesh(case) as put:
    actual = quick(run)(put(params), put(TOKENS, "data"))
  np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("case", CASES)
def test_pretrained_model_is_loaded_and_runs_on_the_mesh(case, tmp_path):
  model = nnx.merge(*language_model("mamba"))
  interop.save_pretrained(tmp_path / "model", model)
  expected = model(TOKENS)[0]
  with on_mesh(case) as put:
    loaded = interop.load_pretrained(tmp_path / "model")
    is_set = CASES[case][1]
    devices = jax.tree.leaves(loaded)[0].sharding.device_set
    assert len(devices) == (2 if is_set else 1)
    tokens = put(TOKENS, "data") if is_set else TOKENS
    actual = quick(lambda model, tokens: model(tokens)[0])(loaded, tokens)
  assert_close(np.asarray(actual), np.asarray(expected))
