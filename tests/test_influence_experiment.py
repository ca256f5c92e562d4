"""The influence experiment, from its command line to table and plots."""

import copy
import json
import math
import re

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from experiments import (
  influence,
  influence_measure,
  influence_report,
  lm_runs,
  subjects,
  subjects_choice,
)
from ssmjax import diagnostics, theory
from ssmjax.models import LanguageModel
from ssmjax.types import Polarization

TEXT = lm_runs.TextSettings(max_bytes=100_000, validation=0.2)


# A layer less than the preset has; which runs as it stands at night.
SMOKE = {"preset": "smoke", "sizes": ("1x16",)}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
  """The smoke preset, run once."""
  out = tmp_path_factory.mktemp("influence")
  assert influence.main(influence.Arguments(out=out, **SMOKE)) == 0
  return out


@pytest.mark.nightly
def test_smoke_preset_runs_as_it_stands(tmp_path):
  assert influence.main(influence.Arguments(preset="smoke", out=tmp_path)) == 0
  assert [len(model["eq1"]) for model in found(tmp_path)] == [2, 2, 2]


def found(out):
  return json.loads((out / "results.json").read_text())["models"]


def test_smoke_run_leaves_results_table_and_figures(smoke):
  default, both, attention = found(smoke)
  assert default["title"] == "default-authors-1x16"
  # Δ = softplus(0) = ln 2 in the authors' initialisation, so A_max is ½.
  assert default["slope"]["slope"] == pytest.approx(-math.log(2), abs=0.02)
  assert default["log_a_max"] == pytest.approx(-math.log(2), abs=0.01)
  assert abs(both["slope"]["slope"]) < 0.05
  assert both["log_a_max"] == 0
  assert both["two_sided"]["kept"] > both["two_sided"]["lower"] > 0
  assert attention["eq1"] == [None]
  assert attention["log_a_max"] is None
  table = (smoke / "table.md").read_text()
  rows = {line.split(" | ")[0]: line for line in table.splitlines()}
  assert "0, vacuous" in rows["| both-authors-1x16"]
  assert rows["| attention-1x16"].count("none") == 5
  assert "Not shown" in table
  for name in ("fig1.png", "fig7.png"):
    assert (smoke / name).read_bytes().startswith(b"\x89PNG")


def test_measured_model_is_not_measured_again(smoke, monkeypatch):
  def refuse(*args, **kwargs):
    raise AssertionError("measured again")

  monkeypatch.setattr(influence, "measure_influence", refuse)
  assert influence.main(influence.Arguments(out=smoke, **SMOKE)) == 0


def test_model_of_another_setting_is_measured(smoke, monkeypatch):
  asked = []

  def measure(model, tokens, **kwargs):
    asked.append(tokens.shape)
    raise SystemExit

  monkeypatch.setattr(influence, "measure_influence", measure)
  with pytest.raises(SystemExit):
    influence.main(influence.Arguments(out=smoke, length=64, **SMOKE))
  assert asked == [(2, 64)]


def test_report_is_drawn_from_results_alone(smoke, tmp_path):
  (tmp_path / "results.json").write_text((smoke / "results.json").read_text())
  arguments = influence.Arguments(
    preset="smoke", out=tmp_path, report_only=True
  )
  assert influence.main(arguments) == 0
  assert (tmp_path / "table.md").read_text() == (smoke / "table.md").read_text()
  assert (tmp_path / "fig1.png").exists()


def test_report_without_results_is_refused(tmp_path):
  arguments = influence.Arguments(out=tmp_path / "none", report_only=True)
  with pytest.raises(SystemExit, match=r"results\.json, expected results"):
    influence.main(arguments)


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"kinds": ("twice",)}, "kinds has 'twice', expected some of default"),
    ({"sizes": ("8",)}, "sizes has '8', expected <layers>x<width>"),
    ({"sizes": ()}, "sizes is empty"),
    ({"probes": 1}, "probes is 1, expected 2 or more"),
    ({"length": 8}, "length is 8, expected 64 or more"),
    ({"seeds": (-1,)}, "seeds is .-1,., expected numbers from 0"),
  ],
)
def test_argument_that_does_not_fit_is_refused(given, message, tmp_path):
  with pytest.raises(SystemExit, match=message):
    influence.main(influence.Arguments(preset="smoke", out=tmp_path, **given))


def test_folder_that_is_no_run_is_refused_by_name(tmp_path):
  arguments = influence.Arguments(out=tmp_path, checkpoints=(tmp_path / "x",))
  with pytest.raises(SystemExit, match=r"influence: .*x' is not there"):
    influence.main(arguments)


def run_folder(path, *steps):
  """What `experiments.lm` leaves, but for the checkpoints' content."""
  made = subjects.fresh("both", 2, 16)
  lm_runs.write_model(path, made.config, (3,), TEXT)
  for step in steps:
    (path / "checkpoints" / str(step)).mkdir(parents=True)
    (path / "checkpoints" / f"manifest-{step}.json").write_text("{}")
  return path


def test_every_saved_step_of_a_run_is_a_subject(tmp_path):
  folder = run_folder(tmp_path / "run", 10, 20)
  found = subjects.checkpoints([folder])
  assert [s.stage for s in found] == ["init", "during", "after"]
  assert [s.step for s in found] == [0, 10, 20]
  assert {s.kind for s in found} == {"both"}
  assert {s.seed for s in found} == {3}
  assert len({s.file for s in found}) == 3


def test_run_made_anew_is_another_subject(tmp_path):
  folder = run_folder(tmp_path / "run", 10)
  before = subjects.checkpoints([folder])[1].identity()
  (folder / "checkpoints" / "manifest-10.json").write_text('{"a": 1}')
  assert subjects.checkpoints([folder])[1].identity() != before


def test_runs_of_one_name_have_a_file_each(tmp_path):
  one, other = (run_folder(tmp_path / x / "seed-0") for x in "ab")
  (first,), (second,) = map(subjects.checkpoints, ([one], [other]))
  assert first.name == second.name
  assert first.file != second.file


def test_run_is_shown_what_it_held_out(tmp_path, monkeypatch):
  folder = run_folder(tmp_path / "run")
  shown = []

  def measure(model, tokens, **kwargs):
    shown.append(np.asarray(tokens))
    raise SystemExit

  monkeypatch.setattr(influence, "measure_influence", measure)
  arguments = influence.Arguments(
    preset="smoke", out=tmp_path, checkpoints=(folder,)
  )
  with pytest.raises(SystemExit):
    influence.main(arguments)
  held_out = lm_runs.read_text(TEXT).held_out.tokens.tobytes()
  (tokens,) = shown
  assert tokens.shape == (2, 96)
  for row in tokens:
    inside = row[row < 256].astype(np.uint8).tobytes()
    assert inside in held_out


def test_rows_lie_within_one_document_where_they_can(tmp_path):
  text = b"short\n<|endoftext|>\n" * 20 + b"a long one " * 30
  (tmp_path / "text.txt").write_bytes(text)
  settings = lm_runs.TextSettings(data=str(tmp_path / "text.txt"))
  rows = subjects.rows_of_text(settings, 2, 64, held_out=False)
  assert not (np.asarray(rows)[:, 1:] == 256).any()


def test_too_little_text_is_refused_with_what_there_is(tmp_path):
  (tmp_path / "text.txt").write_bytes(b"a" * 200)
  settings = lm_runs.TextSettings(data=str(tmp_path / "text.txt"))
  with pytest.raises(ValueError, match="has 1 rows of length=128, expected"):
    subjects.rows_of_text(settings, 4, 128, held_out=False)


def test_damaged_result_is_refused_by_name(tmp_path):
  subject = subjects.fresh("default", 2, 16)
  path = tmp_path / "subjects" / subject.file
  path.parent.mkdir()
  path.write_text("{")
  with pytest.raises(ValueError, match="is damaged"):
    subjects.collect([subject], None, {"rows": 1, "length": 64}, tmp_path)


def test_attention_is_built_in_one_initialisation_only():
  made = influence.PRESETS["default"]
  made = influence.dataclasses.replace(made, trained=())
  chosen = subjects_choice.chosen(made, influence.Arguments())
  names = [s.name for s in chosen]
  assert len(set(names)) == len(names)
  assert sum(s.kind == "attention" for s in chosen) == len(made.sizes)
  assert sum(s.init == "authors" for s in chosen) == 2 * len(made.sizes)


def test_slope_of_an_exponential_is_found_between_its_ends():
  lags = np.arange(100)
  curve = 3 - 0.5 * lags
  curve[:7] = 20  # What convolutions carry.
  curve[60:] = 50
  found = influence_measure.fit_slopes(lags, curve, 6, -0.4)
  assert (found["first"], found["last"]) == (7, 50)
  for name in ("slope", "near", "far"):
    assert found[name] == pytest.approx(-0.5)
  assert found["within_bound"]


def test_slope_is_fitted_only_where_float32_can_tell():
  lags = np.arange(400)
  found = influence_measure.fit_slopes(lags, -2.0 * lags, 0, None)
  assert -2 * found["last"] > influence_measure.FLOOR > -2 * found["last"] - 3
  assert found["within_bound"] is None
  assert influence_measure.fit_slopes(lags, -90.0 * lags, 0, None) is None


def test_scale_of_the_gradients_does_not_show(smoke):
  (default, _, _) = found(smoke)
  subject = subjects.fresh("default", 1, 16, "authors")
  model = subject.build()
  tokens = subjects.rows_of_text(subject.text, 2, 96, held_out=False)
  shown = subjects.show(model, tokens)
  plain = jax.tree_util.Partial(
    lambda m, t, e: m.features(t, embeddings=e)[0], model, tokens
  )
  curve = diagnostics.lag_curve(
    diagnostics.influence(plain, shown["embeddings"], [48, 95], probes=2)
  )
  np.testing.assert_allclose(
    default["log_score"][:20], curve.log_score[:20], rtol=1e-4, atol=1e-4
  )


def test_states_that_polarization_holds_are_left_out():
  mixer = subjects.fresh("both", 2, 16).build().block(0).mixer
  x = jax.random.normal(jax.random.key(0), (1, 5, 16))
  whole = mixer.recurrence(x)
  learned = subjects.learned_states(mixer, whole)
  assert mixer.config.polarization == Polarization(ones=1, zeros=1)
  assert whole.a.shape[-1] == learned.a.shape[-1] + 2
  assert 0 < learned.a.min() < learned.a.max() < 1
  assert theory.states(learned).shape == learned.b.shape


def model(**changes):
  slope = {
    "slope": -0.1, "low": -0.11, "high": -0.09, "r_squared": 0.999,
    "first": 7, "last": 48, "near": -0.1, "far": -0.1, "within_bound": True,
    "intercept": 0.0, "points": 42,
  }  # fmt: skip
  made = {
    "title": "x", "kind": "default", "stage": "init", "step": 0, "seed": 0,
    "layers": 2, "width": 16, "trained_length": None, "slope": slope,
    "log_a_max": -0.05,
    "eq1": [{"learned_log_a_max": -0.05}], "two_sided": None,
  }  # fmt: skip
  made = copy.deepcopy(made)
  made["slope"] |= changes.pop("slope_fields", {})
  return made | changes


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({}, "a line .R² 0.999.; log A_max -0.05, a bound that falls 2 times"),
    (
      {"slope_fields": {"r_squared": 0.5, "near": -0.2, "far": -0.01}},
      "not a line .R² 0.50.: -0.2 in the near half, -0.01 in the far one",
    ),
    (
      {"slope_fields": {"high": 0.1}},
      "flat: no fall that can be told from none",
    ),
    ({"log_a_max": 0.0}, "Theorem 3.1 is vacuous .its learned channels: -0.05"),
    ({"log_a_max": None, "eq1": [None]}, "it has no A, so no bound"),
    ({"slope": None}, "too few lags"),
    (
      {"slope_fields": {"within_bound": False}},
      "-0.00304 at these lags with lag",
    ),
  ],
)
def test_verdict_says_what_was_and_was_not_seen(changes, words):
  (line,) = influence_report.verdict([model(**changes)])
  assert line.startswith("- x: ")
  assert re.search(words, line), line


def test_ratio_to_attention_is_fitted_as_an_exponential():
  lags = list(range(64))
  mamba = model(last=[-0.3 * x for x in lags], lags=lags)
  other = model(kind="attention", last=[-2.0] * 64, lags=lags)
  (fit,) = influence_report.ratio_fits([mamba, other])
  assert fit["slope"] == pytest.approx(-0.3)
  assert fit["first"] == 7


def test_what_is_compiled_for_one_initialisation_serves_the_other():
  inits = ("mamba", "authors")
  built = [subjects.fresh("both", 2, 16, init).build() for init in inits]
  graphs = {nnx.split(model)[0] for model in built}
  assert len(graphs) == 1
  config = subjects.fresh("both", 2, 16, "authors").config
  drawn = LanguageModel(config, rngs=nnx.Rngs(0))
  chex.assert_trees_all_equal(nnx.split(built[1])[1], nnx.split(drawn)[1])
