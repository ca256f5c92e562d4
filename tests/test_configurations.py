"""Every field of every configuration is what its annotation says."""

import dataclasses
import importlib
import pkgutil
import types
import typing

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ssmjax.data
import ssmjax.models
import ssmjax.training
from experiments import lm_runs, lm_settings, recall_settings
from ssmjax import data, models, training
from ssmjax.models.kinds import MIXERS
from ssmjax.types import (
  FloatingDType,
  Polarization,
  Positive,
  Range,
  check_fields,
  check_value,
  field_annotations,
)

RECALL = data.RecallConfig(length=32, num_pairs=4)
MIX = data.RecallMix(((RECALL, 8),))
EXAMPLES = {
  **{kind: kind() for kind in MIXERS.values()},
  models.ModelConfig: models.ModelConfig(16, 8, 2),
  models.ClassifierConfig: models.ClassifierConfig(3, 8, 2, n_features=5),
  Polarization: Polarization(),
  training.FitConfig: training.FitConfig(10, best="accuracy"),
  data.RecallConfig: RECALL,
  data.RecallMix: MIX,
  data.RecallSource: data.RecallSource(RECALL, 8, 0),
  data.RecallStream: data.RecallStream(MIX, 4),
  data.TextSource: data.TextSource(data.encode_documents([b"abcdef"]), 4, 1),
  lm_runs.TextSettings: lm_runs.TextSettings(),
  lm_settings.Row: lm_settings.Row("default", 2),
  lm_settings.Setting: lm_settings.setting("smoke"),
  recall_settings.Row: recall_settings.Row("default-2", 2),
  recall_settings.Setting: recall_settings.setting("smoke"),
}
KINDS = pytest.mark.parametrize("kind", EXAMPLES, ids=lambda v: v.__name__)
# One value of every type that an annotation may name or leave out.
VALUES = {
  types.NoneType: None,
  bool: True,
  int: 7,
  float: 1.5,
  str: "no such choice",
  tuple: ("no", "such", "entries"),
  object: jnp.ones(2),
}


@KINDS
def test_wrong_value_of_every_field_is_refused_by_its_name(kind):
  for field, annotation in field_annotations(kind).items():
    message = f"^{kind.__name__}: {field}.*expected"
    for value in wrong(annotation):
      with pytest.raises(ValueError, match=message):
        dataclasses.replace(EXAMPLES[kind], **{field: value})


@KINDS
def test_value_that_means_the_same_gives_an_equal_configuration(kind):
  example = EXAMPLES[kind]
  for field, annotation in field_annotations(kind).items():
    value = getattr(example, field)
    for other in same(value, annotation):
      found = dataclasses.replace(example, **{field: other})
      assert type(getattr(found, field)) is type(value), field
      assert getattr(found, field) == value
      if kind.__eq__ is not object.__eq__:
        assert (found, hash(found)) == (example, hash(example)), field


def test_every_configuration_of_the_library_is_in_the_table():
  found = set()
  for room in (ssmjax.models, ssmjax.training, ssmjax.data):
    for module in pkgutil.iter_modules(room.__path__, f"{room.__name__}."):
      found |= {
        value
        for name, value in vars(importlib.import_module(module.name)).items()
        if name.endswith("Config") and dataclasses.is_dataclass(value)
        if not name.startswith("_")
      }
  assert found - set(EXAMPLES) == {
    ssmjax.models.matrix_memory.MatrixMixerConfig
  }


def test_one_mixer_and_a_list_of_them_are_a_pattern():
  mamba = models.MambaConfig()
  alone = models.ModelConfig(16, 8, 2, mixers=mamba)
  assert alone == models.ModelConfig(16, 8, 2, mixers=[mamba])
  assert alone.mixers == (mamba,)
  hash(alone)


@dataclasses.dataclass(frozen=True)
class Own:
  """A user's mixer's configuration."""

  rates: tuple[Positive, ...] = (1.0,)
  dtype: FloatingDType = "bfloat16"

  __post_init__ = check_fields

  def build(self, d_model: int, n_layers: int, rngs: nnx.Rngs):
    """Make the mixer."""


def test_users_own_mixer_is_allowed_and_can_check_its_fields():
  config = models.ModelConfig(16, 8, 1, mixers=Own([1, 2]))
  assert config.mixers[0].rates == (1.0, 2.0)
  assert config.mixers[0].dtype == jnp.bfloat16
  with pytest.raises(ValueError, match=r"Own: rates\[1\] is 0, expected"):
    Own((1, 0))


@pytest.mark.parametrize(
  ("mixers", "message"),
  [
    (("mamba",), r"mixers\[0\] is 'mamba', expected a MixerConfig"),
    (models.MambaConfig, r"mixers\[0\] is <class .*, expected a MixerConfig"),
    (None, r"mixers\[0\] is None, expected a MixerConfig"),
    ((), "expected a multiple of the pattern of 0"),
  ],
)
def test_pattern_of_something_else_is_refused(mixers, message):
  with pytest.raises(ValueError, match=message):
    models.ModelConfig(16, 8, 2, mixers=mixers)


def test_mixer_without_a_hash_is_refused():
  mutable = dataclasses.make_dataclass(
    "Mutable", [], namespace={"build": Own.build}
  )
  with pytest.raises(ValueError, match=r"mixers\[1\] is a Mutable without a h"):
    models.ModelConfig(16, 8, 2, mixers=(Own(), mutable()))


@pytest.mark.parametrize(
  ("annotation", "value", "message"),
  [
    (int, 1.0, "f: x is 1.0, expected an integer."),
    (int | None, True, "f: x is True, expected an integer or None."),
    (float, 10**400, "expected a finite number."),
    (Positive | None, 0, "expected a finite number above 0 or None."),
    (tuple[int, int], (1,), r"expected a tuple \(an integer, an integer\)."),
    (tuple[int, ...], 1, "expected a tuple, each entry an integer."),
    (tuple[int, ...], (1, "2"), r"f: x\[1\] is '2', expected an integer."),
    (typing.Literal[1, 2], True, "expected one of 1, 2."),
    (Polarization, 3, "expected a Polarization."),
    (FloatingDType, jnp.int32, "expected a floating dtype, as jnp.float32."),
    (FloatingDType, None, "expected a floating dtype"),
    (FloatingDType, float, "expected a floating dtype"),
    (FloatingDType, np.floating, "expected a floating dtype"),
    (
      typing.Annotated[int, Range(least=0, most=3)],
      4,
      "expected an integer of at least 0 and of at most 3.",
    ),
  ],
)
def test_message_says_what_an_annotation_wants(annotation, value, message):
  with pytest.raises(ValueError, match=message):
    check_value("f: x", annotation, value)


def same(value, annotation):
  """The same value as callers may write it."""
  if type(value) is int:
    return [np.int64(value), np.uint32(value)]
  if type(value) is float:
    return [np.float64(value)] + [int(value)] * (value == int(value))
  if annotation == FloatingDType:
    return [jnp.float32, np.float32, "float32", jnp.dtype("float32")]
  return [list(value)] if isinstance(value, tuple) else []


def wrong(annotation):
  """Values that an annotation does not allow, made of what it says."""
  options, outside, right = [], [], set()
  flatten(annotation, (), options)
  for base, marks in options:
    if base is typing.Any and not marks:
      return []
    right.add(typing.get_origin(base) or base)
    for limit in (mark for mark in marks if isinstance(mark, Range)):
      step = 1 if base is int else 1e-3
      inner = {limit.least: -step, limit.most: step}
      outside += [b + step for b, step in inner.items() if b is not None]
      outside += [b for b in (limit.above, limit.below) if b is not None]
  if float in right:
    right.add(int)
    outside += [float("nan"), float("inf")]
  others = [value for kind, value in VALUES.items() if kind not in right]
  return others + outside + [jnp.int32, float]


def flatten(annotation, marks, options):
  """Its alternatives, each with its marks."""
  if isinstance(annotation, typing.TypeAliasType):
    annotation = annotation.__value__
  if typing.get_origin(annotation) is typing.Annotated:
    base, *marks = typing.get_args(annotation)
    flatten(base, marks, options)
  elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
    for option in typing.get_args(annotation):
      flatten(option, marks, options)
  else:
    options.append((annotation, marks))
