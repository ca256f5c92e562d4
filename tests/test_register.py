"""A user's own mixer joins: registered, written, trained, measured, loaded."""

import dataclasses
import json
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import user_mixer
from flax import nnx

from experiments import recall_zoo
from ssmjax import diagnostics, models, theory
from ssmjax.models import kinds
from ssmjax.models.config_json import config_from_json, config_to_json
from ssmjax.types import Polarization


@pytest.fixture(autouse=True)
def forgotten():
  """What a test registers is not known to the next."""
  with user_mixer.registrations():
    yield


def ema():
  """The documented example, registered."""
  return user_mixer.module(user_mixer.parts()[0])


def build(self, d_model, n_layers, rngs):
  raise NotImplementedError


def config_class(name, fields=(), **options):
  options = {"frozen": True, "namespace": {"build": build}} | options
  return dataclasses.make_dataclass(name, fields, **options)


def model_config(*mixers):
  return models.ModelConfig(16, 8, len(mixers), mixers=mixers)


def zeros(config):
  build = lambda: models.LanguageModel(config, rngs=nnx.Rngs(0))
  return jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(build)
  )


def test_documented_example_trains_and_comes_back(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  made = user_mixer.module(*user_mixer.parts())
  assert jax.tree.structure(made.again) == jax.tree.structure(made.model)
  leaves = zip(*map(jax.tree.leaves, (made.again, made.model)), strict=True)
  for a, b in leaves:
    np.testing.assert_array_equal(a, b)
  assert all(jnp.any(leaf) for leaf in jax.tree.leaves(made.gradient))
  fields = json.loads((tmp_path / "ema" / "model_config.json").read_text())
  assert fields["config"]["mixers"] == [{"mixer": "ema", "channels": 16}]


def test_saved_mixer_is_not_loaded_before_it_is_registered(tmp_path):
  with user_mixer.registrations():
    config = model_config(ema().EMAConfig())
    models.save(tmp_path / "model", zeros(config))
  with pytest.raises(ValueError, match=r"mixer is 'ema', expected .*imported"):
    models.load(tmp_path / "model")
  ema()
  models.load(tmp_path / "model")


def test_registered_mixer_stands_beside_those_of_the_library(tmp_path):
  made = ema()
  mixers = (made.EMAConfig(4), models.MinGRUConfig(), made.EMAConfig(8))
  config = model_config(*mixers)
  assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == (
    config
  )
  models.save(tmp_path / "model", zeros(config))
  assert models.load(tmp_path / "model").config == config


@pytest.mark.nightly
def test_registered_mixer_is_measured_by_its_recurrence():
  mixer = ema().EMAConfig(4).build(8, 1, nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (2, 12, 8))
  recurrence = mixer.recurrence(x)
  assert diagnostics.spectrum(recurrence).a_max.shape == (4,)
  assert theory.states(recurrence).shape == (2, 12, 4)
  shown = diagnostics.layer_influence(mixer.recurrence, x)
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(shown))


def test_registered_mixer_has_a_row_in_the_zoo():
  ema()
  rows = {row.name: row for row in recall_zoo.zoo_rows()}
  assert rows["ema"].mixer.channels == 16
  assert "ema-both" not in rows
  models.register(config_class("WideConfig", [("width", int)]))
  with pytest.raises(ValueError, match="SIZES has no entry for 'wide'"):
    recall_zoo.zoo_rows()


@pytest.mark.parametrize(
  ("name", "kind"),
  [
    ("EMAConfig", "ema"),
    ("SlowEMAConfig", "slow_ema"),
    ("Mamba9BlockConfig", "mamba9_block"),
    ("S9D", "s9d"),
    ("Config", "config"),
  ],
)
def test_kind_is_named_after_its_class(name, kind):
  made = config_class(name)
  assert models.register(made) is made
  assert kinds.kinds()[kind] is made
  assert kinds.kind_of(made()) == kind


def test_register_takes_a_name_and_decorates():
  @models.register(name="slow")
  @dataclasses.dataclass(frozen=True)
  class Any_:
    build = build

  assert kinds.kind_of(Any_()) == "slow"
  assert "slow" not in kinds.MIXERS


def test_class_is_registered_again_without_harm():
  assert models.register(models.MambaConfig) is models.MambaConfig
  assert models.register(models.S4DConfig, name="s4d")
  made = config_class("EMAConfig")
  models.register(made)
  models.register(made)
  assert kinds.kind_of(made()) == "ema"


def test_class_that_is_defined_again_takes_its_place():
  first, second = ema().EMAConfig, ema().EMAConfig
  assert first is not second
  assert kinds.kinds()["ema"] is second


@pytest.mark.parametrize("name", ["Mamba", "a-b", "", 3, "2d", "é"])
def test_name_that_is_none_is_refused(name):
  with pytest.raises(ValueError, match=r"register: name is .*lower-case"):
    models.register(config_class("EMAConfig"), name=name)


def test_second_kind_of_a_name_is_refused():
  with pytest.raises(ValueError, match="'mamba' is a kind already, of ssmjax"):
    models.register(config_class("MambaConfig"))
  with pytest.raises(ValueError, match="'mamba' is a kind already, of ssmjax"):
    models.register(config_class("EMAConfig"), name="mamba")
  models.register(config_class("EMAConfig", namespace={"build": build}))

  @dataclasses.dataclass(frozen=True)
  class EMAConfig:
    build = build

  with pytest.raises(ValueError, match=r"'ema' is a kind already.*name="):
    models.register(EMAConfig)


def test_second_name_of_a_kind_is_refused():
  with pytest.raises(ValueError, match="is the kind 'mamba' already"):
    models.register(models.MambaConfig, name="other")


class Plain:
  build = build


class Inherits(models.MambaConfig):
  pass


@pytest.mark.parametrize(
  ("config", "error"),
  [
    (Plain, "Plain is no dataclass, expected one"),
    (Inherits, "Inherits is no dataclass, expected one"),
    (config_class("C", frozen=False), "C is not frozen"),
    (config_class("C", eq=False), "C is not frozen, or without equality"),
    (config_class("C", namespace={}), "C has no method build"),
    (config_class("C", namespace={"build": 3}), "C has no method build"),
    (
      config_class("C", namespace={"build": lambda self, d_model: None}),
      r"C has no method build\(d_model, n_layers, rngs\)",
    ),
    (
      config_class("C", [("x", int, dataclasses.field(init=False))]),
      r"C.x is not an argument \(init=False\)",
    ),
    (models.MambaConfig(), "config is MambaConfig.*, expected a class"),
    ("mamba", "config is 'mamba', expected a class"),
  ],
)
def test_what_lacks_something_is_refused_by_it(config, error):
  with pytest.raises(ValueError, match=f"register: {error}"):
    models.register(config)


@dataclasses.dataclass(frozen=True)
class Inner:
  """A part of a configuration."""

  rate: float = 0.5


@dataclasses.dataclass(frozen=True)
class RichConfig:
  """Fields of every sort that files can hold."""

  name: str = "x"
  number: float = 1e300
  size: int | None = None
  switch: bool = True
  order: Literal[1, 2, "all"] = 2
  widths: tuple[int, ...] = (4, 2)
  pair: tuple[int, str] = (1, "a")
  nested: tuple[tuple[float, ...], ...] = ((0.5,), ())
  anything: Any = (1, (2.5, None))
  inner: Inner = Inner()
  polarization: Polarization | None = None
  dtype: Any = jnp.float32
  made: tuple[int, ...] = dataclasses.field(default_factory=tuple)

  build = build


@pytest.mark.parametrize(
  "config",
  [
    RichConfig(),
    RichConfig(
      name="ü",
      number=-0.5,
      size=3,
      order="all",
      inner=Inner(0.1),
      polarization=Polarization(ones=1),
      dtype=jnp.bfloat16,
    ),
    RichConfig(size=np.int64(3), number=np.float32(0.1)),
  ],
)
def test_fields_of_every_sort_come_back(config):
  models.register(RichConfig)
  fields = json.loads(json.dumps(config_to_json(model_config(config))))
  (found,) = config_from_json(fields).mixers
  assert found == config
  assert hash(found) == hash(config)


def test_field_with_a_default_factory_may_be_missing():
  models.register(RichConfig)
  fields = config_to_json(model_config(RichConfig()))
  fields["mixers"] = [{"mixer": "rich"}]
  assert config_from_json(fields).mixers == (RichConfig(),)


@pytest.mark.parametrize(
  ("fields", "error"),
  [
    ({"order": 3}, "mixers.0..order is 3, expected .*1"),
    ({"order": True}, "mixers.0..order is True, expected"),
    ({"widths": [1, "x"]}, r"mixers.0..widths\[1\] is 'x', expected an int"),
    ({"widths": 3}, "mixers.0..widths is 3, expected a"),
    ({"pair": [1]}, r"mixers.0..pair is \[1\], expected a"),
    ({"inner": {"rate": "x"}}, "mixers.0..inner.rate is 'x', expected a"),
  ],
)
def test_wrong_field_of_a_registered_kind_is_refused(fields, error):
  models.register(RichConfig)
  written = config_to_json(model_config(RichConfig()))
  written["mixers"][0] |= fields
  with pytest.raises(ValueError, match=error):
    config_from_json(written)


@pytest.mark.parametrize(
  ("hint", "value", "error"),
  [
    (Any, jnp.tanh, r"mixers\[0\].f is <.*expected a number, a string"),
    (Any, jnp.bfloat16, r"mixers\[0\].f is <class.*a field of that name"),
    (dict, None, r"mixers\[0\], a C9Config, cannot be read again.*Annotate"),
    (Any, Inner(), r"mixers\[0\] is C9Config.* when it is read again"),
  ],
)
def test_field_that_files_cannot_hold_is_refused_when_written(
  hint, value, error
):
  made = config_class("C9Config", [("f", hint)])
  models.register(made)
  with pytest.raises(ValueError, match=error):
    config_to_json(model_config(made(value)))
