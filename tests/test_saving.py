"""Any model goes to a folder and comes back to the bit."""

import collections
import dataclasses
import errno
import functools
import json
import os
import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import user_mixer
from flax import nnx
from jax.sharding import AxisType, NamedSharding

from experiments.recall_zoo import BOTH, SIZES
from ssmjax import models
from ssmjax.models import saving
from ssmjax.models.kinds import MIXERS
from ssmjax.models.tensor_files import read_safetensors, write_safetensors
from ssmjax.types import register_model

MIXED = models.ModelConfig(
  16,
  8,
  4,
  mixers=(
    models.MambaConfig(d_state=4, polarization=BOTH, dtype=jnp.bfloat16),
    models.AttentionConfig(2, dtype=jnp.bfloat16),
  ),
  mlp_ratio=2,
  mlp="swiglu",
  max_positions=12,
  final_norm="layer",
  dtype=jnp.bfloat16,
  tie_embeddings=False,
)
SMALL = models.ModelConfig(16, 8, 2)


def abstract(config):
  kind = models.LanguageModel
  if isinstance(config, models.ClassifierConfig):
    kind = models.Classifier
  return jax.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0)))


def arbitrary(config):
  """A model of arbitrary bits: NaNs of every payload, infinities, -0."""
  rng = np.random.default_rng(0)

  def draw(leaf):
    bits = rng.integers(0, 2**32, leaf.shape, np.uint32)
    return jnp.asarray(bits.view(np.float32))

  return jax.tree.map(draw, abstract(config))


def bits(array):
  return np.asarray(array).reshape(-1).view(np.uint8)


def assert_same(found, expected):
  """Equal to the bit, and of one structure: what is compiled serves both."""
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
  for a, b in pairs:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    np.testing.assert_array_equal(bits(a), bits(b))


@pytest.fixture
def saved(tmp_path):
  """A folder with a small model."""
  models.save(tmp_path / "model", arbitrary(SMALL))
  return tmp_path / "model"


@pytest.mark.parametrize("kind", MIXERS)
def test_model_of_every_kind_comes_back_to_the_bit(kind, tmp_path):
  config: Any = MIXERS[kind]
  held = {"polarization": BOTH} if config.polarizes else {}
  mixer = config(**SIZES.get(kind, {}), **held, dtype=jnp.bfloat16)
  model = arbitrary(models.ModelConfig(16, 64, 2, mixers=(mixer,)))
  models.save(tmp_path / "model", model)
  assert_same(models.load(tmp_path / "model"), model)


@pytest.mark.parametrize(
  "config",
  [
    MIXED,
    dataclasses.replace(MIXED, tie_embeddings=True, mixers=MIXED.mixers * 2),
    models.ClassifierConfig(3, 8, 2, n_features=5, pooling="token"),
    models.ClassifierConfig(3, 8, 2, vocab_size=7, mixers=MIXED.mixers),
  ],
  ids=["untied", "tied", "features", "tokens"],
)
def test_whole_model_comes_back_to_the_bit(config, tmp_path):
  model = arbitrary(config)
  models.save(tmp_path / "new" / "model", model)  # With the folders above.
  assert_same(models.load(tmp_path / "new" / "model"), model)
  assert [p.name for p in (tmp_path / "new").iterdir()] == ["model"]


def test_weights_of_mixed_dtypes_keep_each_its_own(tmp_path):
  model = arbitrary(MIXED)
  narrow = [jnp.bfloat16, jnp.float16, jnp.float32]
  leaves, tree = jax.tree.flatten(model)
  leaves = [
    jnp.asarray(bits(x)[: 2 * x.size].view(narrow[i % 3])).reshape(x.shape)
    if i % 3 < 2
    else x
    for i, x in enumerate(leaves)
  ]
  model = jax.tree.unflatten(tree, leaves)
  models.save(tmp_path / "model", model)
  assert_same(models.load(tmp_path / "model"), model)


def test_dtype_casts_projections_and_sets_activations(tmp_path):
  config = dataclasses.replace(SMALL, tie_embeddings=False, mlp_ratio=1)
  draw = np.random.default_rng(0).standard_normal
  model = jax.tree.map(
    lambda x: jnp.asarray(draw(x.shape, np.float32)), abstract(config)
  )
  models.save(tmp_path / "model", model)
  narrow = models.load(tmp_path / "model", dtype=jnp.bfloat16)
  assert narrow.config.dtype == narrow.config.mixers[0].dtype == jnp.bfloat16
  dtypes = saving.parameters(jax.tree.map(lambda x: x.dtype.name, narrow))
  cast = {name for name, dtype in dtypes.items() if dtype == "bfloat16"}
  mixer = {f"mixer.{x}_proj" for x in ("in", "x", "dt", "out")}
  mlp = {"mlp.up_proj", "mlp.down_proj"}
  assert cast == {"head"} | {f"blocks.0.{x}" for x in mixer | mlp}
  for a, b in zip(*map(jax.tree.leaves, (narrow, model)), strict=True):
    np.testing.assert_array_equal(bits(a), bits(b.astype(a.dtype)))
  # The way back, of what has been rounded.
  models.save(tmp_path / "narrow", narrow)
  assert_same(models.load(tmp_path / "narrow"), narrow)
  wide = models.load(tmp_path / "narrow", dtype=jnp.float32)
  assert wide.config == config
  assert wide.head.dtype == jnp.float32


def test_dtype_is_cast_as_published_checkpoints_are_loaded():
  from ssmjax.interop.families import FORMATS

  for each in FORMATS:
    mixer = each.mixer(**SIZES.get(_kind(each.mixer), {}))
    config = models.ModelConfig(16, 64, 2, mixers=(mixer,), mlp_ratio=1)
    if not each.holds(config):
      continue
    for entry in (*each.entries(config), *each.entries(config, 0)):
      cast = saving._is_projection(entry.parameter)
      assert cast != entry.wide, (each.title, entry.parameter)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", MIXERS)
def test_model_of_every_kind_runs_with_narrow_projections(kind, tmp_path):
  mixer = MIXERS[kind](**SIZES.get(kind, {}))
  config = models.ModelConfig(16, 64, 2, mixers=(mixer,))
  models.save(tmp_path / "model", arbitrary(config))
  model = models.load(tmp_path / "model", dtype=jnp.bfloat16)
  tokens = jnp.zeros((2, 6), jnp.int32)
  loss = lambda model: jnp.square(model(tokens)[0]).mean()
  gradient = jax.eval_shape(jax.grad(loss), model)
  dtypes = lambda tree: [x.dtype for x in jax.tree.leaves(tree)]
  assert dtypes(gradient) == dtypes(model)
  state = model.init_state(2, 16)
  for apply, x in ((model, tokens), (model.step, tokens[:, 0])):
    logits, new = jax.eval_shape(apply, x, state)
    assert logits.dtype == jnp.float32
    assert dtypes(new) == dtypes(state)


def _kind(config):
  return next(name for name, kind in MIXERS.items() if kind is config)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float64])
def test_dtype_of_another_kind_is_refused(saved, dtype):
  with pytest.raises(ValueError, match=r"load: dtype is \w+, expected float32"):
    models.load(saved, dtype=dtype)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("current", [False, True], ids=["alone", "set_mesh"])
def test_model_is_saved_from_and_loaded_into_sharded_arrays(
  tmp_path, kind, current
):
  mesh = jax.make_mesh((4, 2), ("data", "model"), (kind, kind))
  model = arbitrary(MIXED)

  def choose(x):
    spec = [None] * x.ndim
    for name, size in mesh.shape.items():
      for axis in reversed(range(x.ndim)):
        if spec[axis] is None and x.shape[axis] % size == 0:
          spec[axis] = name
          break
    return NamedSharding(mesh, jax.P(*spec))

  tree = jax.tree.map(choose, abstract(MIXED))
  with jax.set_mesh(mesh) if current else jax.set_mesh(None):
    models.save(tmp_path / "model", jax.device_put(model, tree))
    for sharding in (tree, lambda found: jax.tree.map(choose, found)):
      found = models.load(tmp_path / "model", sharding=sharding)
      assert_same(found, model)
      assert found.blocks[0].mixer.in_proj.sharding == choose(
        found.blocks[0].mixer.in_proj
      )
    whole = NamedSharding(mesh, jax.P())
    found = models.load(tmp_path / "model", sharding=whole)
    assert found.embedding.sharding == whole
    assert_same(found, model)
    assert_same(models.load(tmp_path / "model"), model)


def test_sharding_of_another_kind_is_refused(saved):
  with pytest.raises(ValueError, match=r"load: the sharding of .* expected a"):
    models.load(saved, sharding="all")


def test_host_holds_one_tensor_at_a_time(tmp_path):
  config = models.ModelConfig(
    512, 256, 12, mixers=(models.MambaConfig(d_state=2),) * 12
  )
  mesh = jax.make_mesh((8,), ("data",))

  def divided(x):
    last = None if x.shape[-1] % 8 else "data"
    spec = jax.P(*[None] * (x.ndim - 1), last)
    return jnp.zeros(x.shape, x.dtype, device=NamedSharding(mesh, spec))

  model = jax.tree.map(divided, abstract(config))
  sizes = [leaf.nbytes for leaf in jax.tree.leaves(model)]
  models.save(tmp_path / "warm", model)
  tracemalloc.start()
  models.save(tmp_path / "model", model)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < max(sizes) + 4e6 < sum(sizes) / 2


def test_devices_piece_alone_is_read(saved, monkeypatch):
  read = []

  class Watched:
    def __init__(self, tensor):
      self.tensor, self.shape, self.dtype = tensor, tensor.shape, tensor.dtype

    def __getitem__(self, index):
      read.append(self.tensor[index])
      return read[-1]

  watch = lambda *args: {
    name: Watched(tensor) for name, tensor in read_safetensors(*args).items()
  }
  monkeypatch.setattr(saving, "read_safetensors", watch)
  mesh = jax.make_mesh((8,), ("data",))

  def choose(x):
    last = None if x.shape[-1] % 8 else "data"
    return NamedSharding(mesh, jax.P(*[None] * (x.ndim - 1), last))

  model = models.load(saved, sharding=lambda m: jax.tree.map(choose, m))
  sizes = collections.Counter(x.shape for x in read)
  for leaf in jax.tree.leaves(model):
    assert sizes[leaf.sharding.shard_shape(leaf.shape)]
  assert sizes[16, 1] == 8  # Of the embedding, eight columns.


def test_folder_appears_whole(tmp_path, monkeypatch):
  replace, seen = os.replace, []

  def look(source, target):
    seen.append((sorted(os.listdir(source)), os.path.exists(target)))
    read_safetensors(source / "model.safetensors", "test")
    replace(source, target)

  monkeypatch.setattr(os, "replace", look)
  models.save(tmp_path / "model", arbitrary(SMALL))
  files = ["model.safetensors", "model_config.json"]
  assert seen == [(files, False)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_save_that_fails_leaves_nothing_and_says_where(
  tmp_path, monkeypatch, error
):
  def full(path, specs):
    write_safetensors(path, dict(list(specs.items())[:2]))
    raise error(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(saving, "write_safetensors", full)
  with pytest.raises(error) as found:
    models.save(tmp_path / "model", arbitrary(SMALL))
  assert not list(tmp_path.iterdir())
  if error is OSError:
    assert found.value.errno == errno.ENOSPC
    assert f"save: {tmp_path}/model could not be written" in str(found.value)


def test_folder_that_is_there_is_never_written_over(saved):
  before = {p.name: p.read_bytes() for p in saved.iterdir()}
  with pytest.raises(ValueError, match="model is there already, expected no"):
    models.save(saved, arbitrary(MIXED))
  assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
  file = saved.parent / "file"
  file.touch()
  with pytest.raises(ValueError, match="file is there already, expected no"):
    models.save(file, arbitrary(SMALL))
  (saved.parent / "empty").mkdir()
  models.save(saved.parent / "empty", arbitrary(SMALL))
  assert_same(models.load(saved.parent / "empty"), models.load(saved))


class Other(models.LanguageModel):
  """May be anything."""


class Keeps(nnx.Module):
  """A model that keeps what is no parameter."""

  def __init__(self):
    self.scale = nnx.Param(jnp.ones(3))
    self.key = nnx.Variable(jax.random.key(0))

  def description(self):
    return {}

  @classmethod
  def from_description(cls, description, *, rngs):
    return cls()


register_model("test_saving_keeps")(Keeps)


def test_model_that_cannot_be_loaded_again_is_not_saved(tmp_path):
  refused = functools.partial(pytest.raises, ValueError)
  folder = tmp_path / "model"
  model = arbitrary(SMALL)
  with refused(match="model is a Other, expected a LanguageModel"):
    models.save(folder, Other(SMALL, rngs=nnx.Rngs(0)))
  with refused(match="model is a Linear, expected a LanguageModel"):
    models.save(folder, nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
  stack = jax.tree.map(lambda x: jnp.stack([x, x]), model)
  with refused(match=r"is \(2, .*expected .*not a stack of several"):
    models.save(folder, stack)
  model.extra = nnx.Param(jnp.ones(2))
  with refused(match="extra is .*expected none of that name"):
    models.save(folder, model)
  with refused(match=r"key is of dtype key<fry>, expected one of float64"):
    models.save(folder, Keeps())
  assert not list(tmp_path.iterdir())


def test_mixer_that_is_not_registered_is_not_saved(tmp_path):
  with user_mixer.registrations():
    config = user_mixer.module(user_mixer.parts()[0]).EMAConfig()
  model = arbitrary(models.ModelConfig(16, 8, 2, mixers=(config,)))
  with pytest.raises(ValueError, match=r"EMAConfig, expected .*register"):
    models.save(tmp_path / "model", model)


def test_folder_of_another_kind_is_refused(tmp_path):
  with pytest.raises(ValueError, match="nowhere is no folder, expected one"):
    models.load(tmp_path / "nowhere")
  with pytest.raises(ValueError, match=r"has no model_config.json, expected"):
    models.load(tmp_path)


def test_folder_without_tensors_is_refused(saved):
  (saved / "model.safetensors").unlink()
  with pytest.raises(ValueError, match=r"no model.safetensors.*training.load"):
    models.load(saved)


NESTED = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
  ("text", "error"),
  [
    ("", "is no JSON"),
    ("{", "is no JSON"),
    (NESTED, "is no JSON: maximum recursion"),
    ('{"version": ' + NESTED + "}", "is no JSON: maximum recursion"),
    ("[]", "holds no object"),
    ("{}", "version is None, expected the number"),
    ('{"version": true}', "version is True, expected the number"),
    ('{"version": 2}', "version is 2, expected 1 at most. A later version"),
    ('{"version": 1, "model": "gpt"}', "has the fields version, model, exp"),
    (
      '{"version": 1, "model": "os.system", "config": {}}',
      "model is 'os.system', expected one of .*language_model.*register_model",
    ),
    ('{"version": 1, "model": [], "config": {}}', r"model is \[\], expected"),
    (
      '{"version": 1, "model": "language_model", "config": 3}',
      "the configuration is 3, expected an object",
    ),
    (
      '{"version": 1, "model": "classifier", "config":'
      ' {"vocab_size": 7, "d_model": 8, "n_layers": 2}}',
      "the fields are those of a ModelConfig, expected a ClassifierConfig",
    ),
  ],
)
def test_wrong_description_is_refused_by_its_file(saved, text, error):
  (saved / "model_config.json").write_text(text)
  with pytest.raises(ValueError, match=error) as found:
    models.load(saved)
  assert str(found.value).startswith(f"load: {saved}/model_config.json")


@pytest.mark.parametrize(
  ("name", "value", "error"),
  [
    ("n_layers", 10**9, r"misshapen: blocks.0.\S+ has shape \(2, "),
    ("n_layers", -2, "n_layers is -2, expected"),
    ("d_model", 10**12, "misshapen: "),
    ("d_model", 10**40, "misshapen: "),
    ("d_model", [], r"d_model is \[\], expected an integer"),
    ("dtype", [], r"dtype is \[\], expected a floating"),
    ("vocab", 1, "vocab is no field of a ModelConfig"),
    ("mixers", [{"mixer": "ema"}], r"mixer is 'ema', expected .*imported"),
    ("mixers", [{"mixer": "mamba"}] * 10**5, "mixers has 100000 entries"),
    ("tie_embeddings", False, "missing: head"),
    ("max_positions", 3, "missing: positions"),
    ("vocab_size", 17, r"embedding has shape \(16, 8\), expected \(17, 8\)"),
  ],
)
def test_wrong_configuration_is_refused_by_its_field(saved, name, value, error):
  file = saved / "model_config.json"
  found = json.loads(file.read_text())
  found["config"][name] = value
  file.write_text(json.dumps(found))
  with pytest.raises(ValueError, match=error) as refused:
    models.load(saved)
  assert str(refused.value).startswith("load: ")
  assert str(saved) in str(refused.value)
  assert len(str(refused.value)) < 10_000


def rewritten(folder, change):
  """The tensors of a folder, changed."""
  path = folder / "model.safetensors"
  tensors = {k: np.array(v) for k, v in read_safetensors(path, "test").items()}
  change(tensors)
  write_safetensors(
    path,
    {
      name: saving.TensorSpec(x.shape, x.dtype, lambda x=x: x)
      for name, x in tensors.items()
    },
  )


def test_tensors_that_are_not_the_models_are_all_named(saved):
  def change(tensors):
    del tensors["embedding"]
    tensors["embeddings"] = np.ones(3, np.float32)
    tensors["norm.scale"] = np.ones(3, np.float32)
    tensors["blocks.0.norm.scale"] = np.ones((2, 8), np.int32)

  rewritten(saved, change)
  with pytest.raises(ValueError, match=f"tensors in {saved}") as found:
    models.load(saved)
  for line in (
    "missing: embedding",
    "unused: embeddings",
    "misshapen: norm.scale has shape (3,), expected (8,)",
    "of another type: blocks.0.norm.scale is int32, expected floating",
  ):
    assert f"\n  {line}" in str(found.value)


def test_error_names_some_of_many_tensors(saved):
  extra = {f"x{i}": np.ones(1, np.int8) for i in range(1000)}
  rewritten(saved, lambda tensors: tensors.update(extra))
  with pytest.raises(ValueError, match=r"and 980 more$"):
    models.load(saved)


def test_float64_needs_to_be_available(saved):
  wide = lambda x: x.update({"norm.scale": np.ones(8)})
  rewritten(saved, wide)
  with pytest.raises(ValueError, match=r"norm.scale is float64, .*enable_x64"):
    models.load(saved)
  with jax.enable_x64(True):
    assert models.load(saved).norm.scale.dtype == jnp.float64


@pytest.mark.parametrize("at", [0, 4, 300, -1])
def test_file_that_was_cut_is_refused(saved, at):
  path = saved / "model.safetensors"
  path.write_bytes(path.read_bytes()[:at])
  with pytest.raises(ValueError, match=f"load: {path} is no whole safetensors"):
    models.load(saved)


def test_pointer_of_git_is_refused(saved):
  path = saved / "model.safetensors"
  path.write_text("version https://git-lfs.github.com/spec/v1\n")
  with pytest.raises(ValueError, match="Git's pointer"):
    models.load(saved)
