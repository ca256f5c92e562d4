"""A run's folder tells what its models are, so that they load by it alone."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import user_mixer
from flax import nnx

from ssmjax import models, training
from ssmjax.types import register_model

CONFIG = models.ModelConfig(16, 8, 1, mixers=(models.MinGRUConfig(),))
FILE = "model_config.json"


class Tokens:
  """A stream of the same tokens."""

  def kind(self, step):
    return 8

  def batch(self, kind, step, seed):
    return {"x": jnp.arange(kind * 4).reshape(kind, 4) % 16}


class Numbers(Tokens):
  """A stream of the same numbers."""

  def batch(self, kind, step, seed):
    return {"x": jnp.linspace(-1.0, 1.0, kind * 3).reshape(kind, 3)}


@register_model("test_described_runs_scale")
class Scale(nnx.Module):
  """A registered model of a user's own."""

  def __init__(self, width, power=1):
    self.width, self.power = width, power
    self.scale = nnx.Param(jnp.ones(width))

  def __call__(self, x):
    return (x * self.scale[...]) ** self.power, None

  def description(self):
    return {"width": self.width, "power": self.power}

  @classmethod
  def from_description(cls, description, *, rngs):
    return cls(**description)


class Plain(nnx.Module):
  """A module that says nothing of itself."""

  def __init__(self, width):
    self.scale = nnx.Param(jnp.ones(width))

  def __call__(self, x):
    return x * self.scale[...], None


def loss(model, batch, key):
  y, _ = model(batch["x"])
  return jnp.square(y - 0.1).sum(), y.size, {}


def classify(model, batch, key):
  y = model(batch["x"])
  return jnp.square(y - 0.1).sum(), y.size, {}


def run(folder, init, *, data=None, loss=loss, steps=1, seeds=(0,)):
  return training.fit(
    init,
    loss,
    training.adamw(1e-2),
    data or Tokens(),
    training.FitConfig(
      steps=steps, seeds=seeds, progress=False, save_every=1, log_every=1
    ),
    folder,
    mesh=training.data_mesh(jax.devices()[:1]),
  )


def language_model(config=CONFIG):
  return lambda seed: models.LanguageModel(config, rngs=nnx.Rngs(seed))


def assert_same(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  pairs = zip(*map(jax.tree.leaves, (found, expected)), strict=True)
  for a, b in pairs:
    np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """The folder of a language model's run of two seeds, and its models."""
  folder = tmp_path_factory.mktemp("trained")
  return folder, run(folder, language_model(), seeds=(3, 1)).models


def test_language_model_is_loaded_by_the_folder_alone(trained):
  folder, expected = trained
  found = training.load(folder)
  assert len(found) == 2
  for one, other in zip(found, expected, strict=True):
    assert one.config == CONFIG
    assert_same(one, other)
  again = training.load(folder, language_model(), seeds=(3, 1))
  assert_same(again, expected)


def test_language_model_is_loaded_where_nothing_else_was_imported(trained):
  code = (
    "import sys; from ssmjax import training\n"
    f"print(*(m.config.d_model for m in training.load({str(trained[0])!r})))"
  )
  done = subprocess.run(
    [sys.executable, "-W", "error", "-c", code],
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.split() == ["8", "8"]


def test_classifier_is_loaded_by_the_folder_alone(tmp_path):
  config = models.ClassifierConfig(
    3, 8, 1, vocab_size=16, mixers=(models.MinGRUConfig(),)
  )
  init = lambda seed: models.Classifier(config, rngs=nnx.Rngs(seed))
  result = run(tmp_path, init, loss=classify)
  assert_same(training.load(tmp_path), result.models)


def test_model_of_a_registered_mixer_is_loaded_by_the_folder_alone(tmp_path):
  with user_mixer.registrations():
    made = user_mixer.module(user_mixer.parts()[0])
    config = dataclasses.replace(CONFIG, mixers=(made.EMAConfig(4),))
    result = run(tmp_path, language_model(config))
    assert_same(training.load(tmp_path), result.models)
  with pytest.raises(ValueError, match=r"mixer is 'ema', expected .*imported"):
    training.load(tmp_path)
  assert_same(training.load(tmp_path, language_model(config)), result.models)


def test_registered_model_is_loaded_by_the_folder_alone(tmp_path):
  result = run(tmp_path, lambda seed: Scale(3, 2), data=Numbers())
  assert_same(training.load(tmp_path), result.models)
  found = json.loads((tmp_path / FILE).read_text())
  assert found == {
    "version": 1,
    "model": "test_described_runs_scale",
    "config": {"width": 3, "power": 2},
  }


@pytest.mark.parametrize("kind", ["module", "mixer"])
def test_model_without_a_description_needs_init(tmp_path, kind):
  init = lambda seed: Plain(3)
  data = Numbers()
  if kind == "mixer":
    with user_mixer.registrations():
      made = user_mixer.module(user_mixer.parts()[0])
    config = dataclasses.replace(CONFIG, mixers=(made.EMAConfig(4),))
    init, data = language_model(config), Tokens()
  result = run(tmp_path, init, data=data)
  assert not (tmp_path / FILE).exists()
  with pytest.raises(ValueError, match=rf"load: {tmp_path} has no .*Pass init"):
    training.load(tmp_path)
  assert_same(training.load(tmp_path, init), result.models)


def test_folder_from_before_descriptions_is_loaded_by_init(tmp_path):
  init = lambda seed: Scale(3)
  run(tmp_path, init, data=Numbers(), steps=2)
  (tmp_path / FILE).unlink()
  with pytest.raises(ValueError, match="Pass init="):
    training.load(tmp_path)
  training.load(tmp_path, init)
  # The same call of fit goes on with it, and it has its description then.
  run(tmp_path, init, data=Numbers(), steps=2)
  training.load(tmp_path)


def test_description_is_there_before_the_first_step(tmp_path):
  seen = []

  class Watched(Numbers):
    def kind(self, step):
      seen.append((tmp_path / FILE).exists())
      return 8

  run(tmp_path, lambda seed: Scale(3), data=Watched())
  assert seen
  assert all(seen)


def test_resume_with_another_configuration_is_refused_by_its_field(tmp_path):
  run(tmp_path, lambda seed: Scale(3), data=Numbers())
  before = (tmp_path / FILE).read_bytes()
  with pytest.raises(
    ValueError, match=rf"{FILE} belongs .*\n  config.power: found 1, expected 2"
  ):
    run(tmp_path, lambda seed: Scale(3, 2), data=Numbers())
  with pytest.raises(ValueError, match=rf"fit: .*{FILE} describes the models"):
    run(tmp_path, lambda seed: Plain(3), data=Numbers())
  assert (tmp_path / FILE).read_bytes() == before
  run(tmp_path, lambda seed: Scale(3), data=Numbers())


def test_run_of_a_model_that_was_loaded_from_elsewhere_goes_on(tmp_path):
  def init(origin):
    config = dataclasses.replace(CONFIG, origin=origin)
    return lambda seed: models.LanguageModel(config, rngs=nnx.Rngs(seed))

  run(tmp_path, init("there"))
  result = run(tmp_path, init("elsewhere"), steps=2)
  assert result.step == 2


def test_field_that_an_older_version_did_not_have_is_its_default(tmp_path):
  run(tmp_path, lambda seed: Scale(3), data=Numbers())
  found = json.loads((tmp_path / FILE).read_text())
  del found["config"]["power"]
  (tmp_path / FILE).write_text(json.dumps(found))
  run(tmp_path, lambda seed: Scale(3), data=Numbers())
  assert training.load(tmp_path)[0].power == 1


@pytest.mark.parametrize(
  ("text", "error"),
  [
    ("{", "is no JSON"),
    ("[" * 100_000, "is no JSON: maximum recursion"),
    ("3", "holds 3, expected an object"),
    ("{}", "version is None, expected"),
    ('{"version": 9}', "version is 9, expected 1 at most"),
    ('{"version": 1, "model": "os", "config": 1}', "model is 'os', expected"),
    (
      '{"version": 1, "model": "test_described_runs_scale",'
      ' "config": {"a": 1}}',
      "the model cannot be built, TypeError: .*unexpected keyword",
    ),
  ],
)
def test_wrong_description_is_refused_by_its_file(tmp_path, text, error):
  run(tmp_path, lambda seed: Scale(3), data=Numbers())
  (tmp_path / FILE).write_text(text)
  for function in (
    lambda: training.load(tmp_path),
    lambda: run(tmp_path, lambda seed: Scale(3), data=Numbers()),
  ):
    with pytest.raises(ValueError, match=error) as found:
      function()
    assert f"{tmp_path}/{FILE}" in str(found.value)
  training.load(tmp_path, lambda seed: Scale(3))


def test_register_model_refuses_what_it_cannot_describe():
  with pytest.raises(ValueError, match="Plain has no method description"):
    register_model("plain")(Plain)
  with pytest.raises(
    ValueError, match="'language_model' is a kind already, of"
  ):
    register_model("language_model")(Scale)
  assert register_model("test_described_runs_scale")(Scale) is Scale
