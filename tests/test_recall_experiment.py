"""The recall experiment, from its command line to table and plot."""

import dataclasses
import json

import pytest

from experiments import recall, recall_report, recall_settings
from ssmjax import data


@pytest.fixture(
  scope="module",
  params=[
    ("both-2",),
    pytest.param(("default-2", "both-2"), marks=pytest.mark.nightly),
  ],
  ids=len,
)
def smoke(tmp_path_factory, request):
  """The smoke preset, run once: by day its polarized row."""
  out = tmp_path_factory.mktemp("recall")
  arguments = recall.Arguments(preset="smoke", out=out, rows=request.param)
  assert recall.main(arguments) == 0
  return out


def test_smoke_run_leaves_results_table_and_plot(smoke):
  results = json.loads((smoke / "results.json").read_text())
  rows = [row["row"] for row in results["rows"]]
  assert rows in (["both-2"], ["default-2", "both-2"])
  for row in results["rows"]:
    (run,) = row["runs"]
    assert run["seed"] == 0
    assert set(run["accuracy"]) == {"2", "4"}
    assert all(0 <= value <= 1 for value in run["accuracy"].values())
    asked = {k: sum(b["asked"] for b in v) for k, v in run["distance"].items()}
    assert asked == {"2": 2 * 128, "4": 4 * 128}
  table = (smoke / "table.md").read_text()
  for row in rows:
    assert f"| {row} |" in table
  assert ("both-2 against default-2" in table) == ("default-2" in rows)
  assert (smoke / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_finished_row_is_not_run_again(smoke, monkeypatch):
  def refuse(*args, **kwargs):
    raise AssertionError("fit was called")

  monkeypatch.setattr(recall.training, "fit", refuse)
  done = recall.Arguments(preset="smoke", out=smoke, rows=("both-2",))
  assert recall.main(done) == 0


def test_row_stopped_by_minutes_is_reported_as_unfinished(tmp_path, capsys):
  arguments = recall.Arguments(
    preset="smoke", out=tmp_path, rows=("default-2",), minutes=1e-6
  )
  assert recall.main(arguments) == 75
  assert "same command goes on" in capsys.readouterr().out
  assert not (tmp_path / "default-2/seed-0.json").exists()


def test_unknown_row_is_refused_with_those_there_are(tmp_path):
  arguments = recall.Arguments(preset="smoke", out=tmp_path, rows=("two-2",))
  with pytest.raises(SystemExit, match=r"two-2.*default-2, both-2"):
    recall.main(arguments)


def test_seed_is_counted_once_however_it_was_asked_for(smoke, monkeypatch):
  trained = []

  def fit(init, loss, optimizer, stream, config, folder, **kwargs):
    trained.append(config.seeds)
    raise SystemExit

  monkeypatch.setattr(recall.training, "fit", fit)
  with pytest.raises(SystemExit):
    recall.main(
      recall.Arguments(
        preset="smoke", out=smoke, rows=("both-2",), seeds=(0, 1, 2)
      )
    )
  assert trained == [(1, 2)]


def test_result_of_another_setting_is_left_out(smoke, capsys):
  made = dataclasses.replace(recall_settings.setting("smoke"), steps=41)
  recall_report.report(smoke, made, "smoke")
  assert "of another setting and left out" in capsys.readouterr().out


def test_test_sets_share_no_example(smoke):
  made = recall_settings.setting("paper")
  starts = [made.test.offsets[i] for i in range(len(made.test.segments))]
  assert starts == [0, 1000, 2000]


def row(name, values):
  runs = [{"accuracy": {"4": value}} for value in values]
  polarized = not name.startswith("default")
  return {"row": name, "layers": 2, "polarized": polarized, "runs": runs}


def test_verdict_of_three_seeds_says_where_an_effect_is_seen():
  rows = [
    row("default-2", (0.50, 0.51, 0.52)),
    row("one-2", (0.40, 0.50, 0.65)),
    row("both-2", (0.75, 0.76, 0.74)),
    row("zero-2", (0.25, 0.24, 0.26)),
  ]
  text = "\n".join(recall_report.verdict(rows, [4]))
  assert "no effect shown" in text.splitlines()[0]
  assert "+24.0 ± 2.3 points (better) at 4 pairs" in text.splitlines()[1]
  assert "-26.0 ± 2.3 points (worse) in the mean" in text.splitlines()[2]


def test_verdict_of_single_seeds_claims_nothing():
  rows = [row("default-2", (0.5,)), row("both-2", (0.75,))]
  text = "\n".join(recall_report.verdict(rows, [4]))
  assert "+25.0 points at 4 pairs; +25.0 points in the mean" in text
  assert "not an effect" in text
  assert "better" not in text


def test_paper_preset_is_the_papers():
  for mix, sizes in (
    ("authors", data.AUTHORS_MIX),
    ("paper", data.PAPER_MIX),
  ):
    made = recall_settings.setting("paper", mix=mix)
    assert made.train == sizes
    assert made.init == "authors"
    assert "the paper's setting" in made.label
  made = recall_settings.setting("paper")
  assert made.steps == 64 * 2352
  names = [row.name for row in made.rows]
  assert set(recall_settings.PAPER_TABLE) <= set(names)
  assert {"both-matched-4", "transformer-2"} <= set(names)
  short = recall_settings.setting("paper-short")
  assert "2 epochs in place of 64" in short.label
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
