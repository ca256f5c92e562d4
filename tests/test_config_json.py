"""A model's configuration goes to JSON and comes back."""

import json

import jax.numpy as jnp
import pytest

from ssmjax import models
from ssmjax.models.config_json import config_from_json, config_to_json
from ssmjax.types import Polarization

MIXED = models.ModelConfig(
  vocab_size=257,
  d_model=64,
  n_layers=4,
  mixers=(
    models.MambaConfig(
      d_state=4,
      dt_rank=3,
      polarization=Polarization(ones=1, zeros=2, placement="replace"),
      init="authors",
      dtype=jnp.bfloat16,
      implementation="chunked",
    ),
    models.AttentionConfig(num_heads=2, positions="none", rope_theta=500.0),
  ),
  mlp_ratio=2,
  max_positions=99,
  final_norm="layer",
  remat=False,
  dtype=jnp.bfloat16,
)


@pytest.mark.parametrize(
  "config", [MIXED, models.ModelConfig(7, 8, 1)], ids=["mixed", "default"]
)
def test_configuration_comes_back_equal_with_mixers_and_polarization(config):
  written = json.dumps(config_to_json(config), allow_nan=False)
  found = config_from_json(json.loads(written))
  assert found == config
  # A module's configuration is static: what is equal compiles once.
  assert hash(found) == hash(config)


def test_missing_field_has_its_default_where_it_has_one():
  fields = {"vocab_size": 7, "d_model": 8, "n_layers": 2}
  fields["mixers"] = [{"mixer": "mamba"}, {"mixer": "attention"}]
  assert config_from_json(fields) == models.ModelConfig(
    7, 8, 2, mixers=(models.MambaConfig(), models.AttentionConfig())
  )


def test_number_without_a_fraction_is_a_number():
  fields = config_to_json(MIXED)
  fields["mixers"][1]["rope_theta"] = 500
  found = config_from_json(fields).mixers[1].rope_theta
  assert found == 500.0
  assert isinstance(found, float)


@pytest.mark.parametrize(
  ("path", "value", "error"),
  [
    (("heads",), 2, "heads is no field of a ModelConfig"),
    (("d_model",), "64", "d_model is '64', expected an integer"),
    (("d_model",), None, "d_model is None, expected an integer"),
    (("mlp_ratio",), True, "mlp_ratio is True, expected an integer"),
    (("norm_epsilon",), "x", "norm_epsilon is 'x', expected a fini"),
    (("remat",), 1, "remat is 1, expected True or False"),
    (("max_positions",), 1.5, "1.5, expected an integer .* or None"),
    (("init",), "torch", "init is 'torch', expected one of 'mamba', 'au"),
    (("dtype",), "int32", "dtype is 'int32', expected a floating dtype"),
    (("dtype",), "number", "dtype is 'number', expected a floating dtype"),
    (("dtype",), None, "dtype is None, expected a floating dtype"),
    (("mixers",), "mamba", "mixers is 'mamba', expected a list of objects"),
    (("mixers", 0), "mamba", r"mixers\[0\] is 'mamba', expected an object"),
    (("mixers", 1, "mixer"), "rwkv", r"mixers\[1\].mixer is 'rwkv', expected"),
    (("mixers", 0, "rank"), 1, r"mixers\[0\].rank is no field of a MambaC"),
    (("mixers", 0, "implementation"), "cuda", "'cuda', expected one of"),
    (
      ("mixers", 0, "polarization", "twos"),
      1,
      r"mixers\[0\].polarization.twos is no field of a Polarization",
    ),
    (("mixers", 0, "polarization"), 3, "polarization is 3, expected a Polar"),
    (("mixers", 0, "polarization", "ones"), -1, "ones is -1, expected"),
    (("n_layers",), 3, "n_layers is 3, expected a multiple"),
  ],
)
def test_wrong_field_is_refused_by_its_name(path, value, error):
  fields = config_to_json(MIXED)
  place = fields
  for name in path[:-1]:
    place = place[name]
  place[path[-1]] = value
  with pytest.raises(ValueError, match=error):
    config_from_json(fields)


def test_field_without_a_default_must_be_there():
  fields = config_to_json(MIXED)
  del fields["d_model"]
  with pytest.raises(ValueError, match="d_model is missing, a ModelConfig"):
    config_from_json(fields)


@pytest.mark.parametrize("value", [None, [], "mamba"])
def test_what_is_no_object_is_refused(value):
  with pytest.raises(ValueError, match="expected an object, the fields of a M"):
    config_from_json(value)


def test_mixer_of_another_library_is_refused():
  class Other(models.MambaConfig):
    pass

  config = models.ModelConfig(7, 8, 1, mixers=(Other(),))
  with pytest.raises(ValueError, match="a mixer is a Other, expected one of"):
    config_to_json(config)


def test_only_a_model_configuration_is_written():
  with pytest.raises(ValueError, match="a MambaConfig, expected a ModelConfig"):
    config_to_json(models.MambaConfig())
