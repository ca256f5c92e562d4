"""The recall experiment, from its command line to table and plot."""

import dataclasses
import json

import pytest

from experiments import recall, recall_report, recall_settings
from ssmjax import data


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
  """The smoke preset, run once."""
  out = tmp_path_factory.mktemp("recall")
  assert recall.main(recall.Arguments(preset="smoke", out=out)) == 0
  return out


def test_smoke_run_leaves_results_table_and_plot(smoke):
  results = json.loads((smoke / "results.json").read_text())
  assert [row["row"] for row in results["rows"]] == ["default-2", "both-2"]
  for row in results["rows"]:
    assert row["seeds"] == [0]
    for accuracy in row["accuracy"]:
      assert set(accuracy) == {"2", "4"}
      assert all(0 <= value <= 1 for value in accuracy.values())
    for distances in row["distance"]:
      asked = {k: sum(b["asked"] for b in v) for k, v in distances.items()}
      assert asked == {"2": 2 * 128, "4": 4 * 128}
  table = (smoke / "table.md").read_text()
  assert "| default-2 |" in table
  assert "both-2 against default-2" in table
  assert (smoke / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_finished_row_is_not_run_again(smoke, monkeypatch):
  def refuse(*args, **kwargs):
    raise AssertionError("fit was called")

  monkeypatch.setattr(recall.training, "fit", refuse)
  assert recall.main(recall.Arguments(preset="smoke", out=smoke)) == 0


def test_row_stopped_by_minutes_is_reported_as_unfinished(tmp_path, capsys):
  arguments = recall.Arguments(
    preset="smoke", out=tmp_path, rows=("default-2",), minutes=1e-6
  )
  assert recall.main(arguments) == 0
  assert "same command goes on" in capsys.readouterr().out
  assert not (tmp_path / "default-2/seeds-0/result.json").exists()


def test_unknown_row_is_refused_with_those_there_are(tmp_path):
  arguments = recall.Arguments(preset="smoke", out=tmp_path, rows=("two-2",))
  with pytest.raises(SystemExit, match=r"two-2.*default-2, both-2"):
    recall.main(arguments)


def test_verdict_says_where_no_effect_is_seen():
  rows = [
    {"row": name, "layers": 2, "seeds": [0], "accuracy": [{"4": value}]}
    for name, value in (
      ("default-2", 0.5),
      ("one-2", 0.505),
      ("both-2", 0.75),
      ("zero-2", 0.25),
    )
  ]
  text = "\n".join(recall_report.verdict(rows, [4]))
  assert "one-2 against default-2 at 4 pairs: +0.5 points, no effect" in text
  assert "both-2 against default-2 at 4 pairs: +25.0 points, better" in text
  assert "zero-2 against default-2 at 4 pairs: -25.0 points, worse" in text
  assert "n = 1 seed:" in text


def test_paper_preset_is_the_papers():
  for mix, sizes in (
    ("authors", data.AUTHORS_MIX),
    ("paper", data.PAPER_MIX),
  ):
    made = recall_settings.setting("paper", mix=mix)
    assert made.train == sizes
    assert made.init == "authors"
    assert "64 epochs" in made.label or "the paper's setting" in made.label
  made = recall_settings.setting("paper")
  assert made.steps == 64 * 2352
  names = [row.name for row in made.rows]
  assert set(recall_settings.PAPER_TABLE) <= set(names)
  assert {"both-matched-4", "transformer-2"} <= set(names)
  short = recall_settings.setting("paper-short")
  assert "of 64 epochs" in short.label
  assert dataclasses.replace(
    short, label="", steps=0, epochs=0, stop_above=None
  ) == dataclasses.replace(
    made, label="", steps=0, epochs=0, stop_above=None
  )  # fmt: skip


@pytest.mark.parametrize("layers", [2, 4])
@pytest.mark.parametrize(
  ("row", "parameters"),
  [
    ("default", (1_282_048, 1_515_264)),
    ("one", (1_283_072, 1_517_312)),
    ("zero", (1_283_072, 1_517_312)),
    ("both", (1_284_096, 1_519_360)),
  ],
)
def test_paper_models_have_the_papers_sizes(row, parameters, layers):
  import jax
  from flax import nnx

  from ssmjax import models

  made = recall_settings.setting("paper")
  rows = {r.name: r for r in made.rows}
  config = recall_settings.model_config(made, rows[f"{row}-{layers}"])
  shapes = jax.eval_shape(
    lambda: models.LanguageModel(config, rngs=nnx.Rngs(0))
  )
  total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert total == parameters[layers // 2 - 1]
