"""What the library makes of arrays on a mesh equals what one device makes.

Rows of a batch are divided over two devices, parameters are whole on each.
The mesh's axes are automatic or explicit, and `jax.set_mesh` names it or not.
`mesh_cases` has a call of every public function; `ELSEWHERE` says which tests
hold those that need files or a run.
"""

import contextlib
import functools
import importlib
import inspect

import jax
import jax.numpy as jnp
import mesh_cases
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
BY_DAY = ("mamba",)
# By day the mesh that nobody names and the one that everything is typed by.
MESHES = [
  case
  if case in ("auto, not set", "explicit, set")
  else pytest.param(case, marks=pytest.mark.nightly)
  for case in CASES
]


@contextlib.contextmanager
def on_mesh(case):
  """A function that puts a tree on the mesh, its rows by an axis or whole."""
  kind, is_set = CASES[case]
  mesh = jax.make_mesh((2,), ("data",), (kind,), devices=jax.devices()[:2])

  def put(tree, axis=None):
    one = lambda x: jax.device_put(
      x, NamedSharding(mesh, jax.P(*(axis,)[: x.ndim]))
    )
    return jax.tree.map(one, tree)

  with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
    yield put


def check(function, params, rows, case):
  expected = jax.device_get(quick(function)(params, rows))
  with on_mesh(case) as put:
    actual = quick(function)(put(params), put(rows, "data"))
  assert_close(jax.device_get(actual), expected)


# Functions of no arrays, and those that other tests hold to the same meshes.
ELSEWHERE = {
  "ops": {"hippo_legs", "hippo_legs_dplr", "hippo_legt"},
  "theory": set(),
  # Of NumPy arrays, on the host.
  "diagnostics": {"fit_log_slope"},
  "polarization": set(),
  # Documents, files and iterators, on the host.
  "data": {
    *("encode_documents", "read_documents", "split_documents"),
    *("recall_dataset", "recall_test_configs", "text_dataset"),
  },
  # `test_saving` holds files, and its doors are of no arrays.
  "models": {
    *("load", "save", "register", "config_from_json", "config_to_json"),
  },
  # `test_training_step` and `test_resume` hold `fit` and what it is made of.
  "training": {
    *("adamw", "data_mesh", "decay_mask", "ensure_deterministic"),
    *("epoch_cosine", "fit", "gradient", "init_state", "load", "make_program"),
    *("parallel", "read_metrics", "warmup_cosine"),
  },
  # `test_pretrained_model_is_loaded…` below, `test_interop_saving`.
  "interop": {
    *("abstract_pretrained", "load_pretrained", "load_tokenizer"),
    "save_pretrained",
  },
}
# By day a call of each room, and those that failed before they were held here.
CALLS_BY_DAY = {
  *("linear_scan", "ttt_linear_step", "selective_step", "linear_cross_entropy"),
  *("lti_matrix_scan_reference", "kappa_smoothing", "transfer"),
  *("dependence_window", "spectrum", "influence", "polarize"),
  *("recall_examples", "classification_loss", "take_rows", "generate"),
}


def call(case):
  """A case's results and, where it is differentiated, its gradient."""
  run = case.run
  if case.gradient:
    run = functools.partial(_value_and_gradient, case.run)
  return quick(run) if case.jit else run


def _value_and_gradient(run, whole, rows):
  leaves, tree = jax.tree.flatten((whole, rows))
  real = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)

  def objective(floats):
    floats = iter(floats)
    arrays = [next(floats) if real(x) else x for x in leaves]
    out = run(*jax.tree.unflatten(tree, arrays))
    parts = [x for x in jax.tree.leaves(out) if real(x)]
    return sum(jnp.sin(x.astype(jnp.float32)).sum() for x in parts), out

  floats = [x for x in leaves if real(x)]
  (_, out), grads = jax.value_and_grad(objective, has_aux=True)(floats)
  return out, grads


def assert_equal(actual, expected):
  """Equal, and close where they are finite floats."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  leaves = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
  for a, e in leaves:
    a, e = np.asarray(a), np.asarray(e)
    finite = np.isfinite(e) & (e.dtype.kind in "fc")
    np.testing.assert_array_equal(a[~finite], e[~finite])
    if finite.any():
      # Float64 on the host is made of float32 on the mesh.
      assert_close(a[finite], e[finite], jnp.float32)


def test_every_public_function_has_a_case_or_a_test_elsewhere():
  for room, elsewhere in ELSEWHERE.items():
    module = importlib.import_module(f"ssmjax.{room}")
    public = {
      x for x in module.__all__ if inspect.isroutine(getattr(module, x))
    }
    cases = mesh_cases.CASES.get(room, dict)().keys()
    assert public == elsewhere | cases, room
    assert not elsewhere & cases


@pytest.mark.parametrize(
  ("room", "name"),
  [
    pytest.param(
      room, name, marks=[] if name in CALLS_BY_DAY else pytest.mark.nightly
    )
    for room, make in mesh_cases.CASES.items()
    for name in make()
  ],
)
def test_call_on_a_mesh_gives_what_one_device_gives(room, name):
  case = mesh_cases.CASES[room]()[name]
  expected = jax.device_get(call(case)(case.whole, case.rows))
  for mesh in CASES:
    with on_mesh(mesh) as put:
      actual = call(case)(put(case.whole), put(case.rows, "data"))
    assert_equal(jax.device_get(actual), expected)


@functools.cache
def language_model(kind):
  mixer = MIXERS[kind](**SIZES.get(kind, {}))
  config = models.ModelConfig(16, 16, 1, mixers=(mixer,))
  return nnx.split(models.LanguageModel(config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("case", MESHES)
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


@pytest.mark.parametrize("case", MESHES)
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
