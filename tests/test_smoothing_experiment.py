"""The smoothing experiment, from its command line to table and plots."""

import json

import pytest

from experiments import (
  depth_report,
  smoothing,
  smoothing_measure,
  smoothing_report,
  subjects,
)

# A layer less than the preset has; which runs as it stands at night.
SMOKE = {"preset": "smoke", "sizes": ("1x16",)}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
  """The smoke preset, run once."""
  out = tmp_path_factory.mktemp("smoothing")
  assert smoothing.main(smoothing.Arguments(out=out, **SMOKE)) == 0
  return out


@pytest.mark.nightly
def test_smoke_preset_runs_as_it_stands(tmp_path):
  assert smoothing.main(smoothing.Arguments(preset="smoke", out=tmp_path)) == 0
  assert [len(model["block"]) for model in found(tmp_path)] == [2, 2, 2]


def found(out):
  return json.loads((out / "results.json").read_text())["models"]


def test_smoke_run_leaves_results_table_and_figures(smoke):
  default, both, attention = found(smoke)
  for layer in default["eq1"] + both["eq1"]:
    assert layer["learned_ratio"] < 1
    assert layer["kappa_fails"] == 0
    # a = -1, the first of 16 states, never meets A + Δ ≤ 1.
    assert layer["learned_premise"] == pytest.approx(15 / 16, abs=0.01)
  for layer in both["eq1"]:
    assert layer["kappa"] is None
    assert layer["theorem_factor"] == 1
    assert layer["ratio"]["maximum"] > 1
  assert attention["eq1"] == [None]
  assert attention["spread"] is None
  assert len(attention["block"]) == 1
  table = (smoke / "table.md").read_text()
  rows = {line.split(" | ")[0]: line for line in table.splitlines()}
  assert rows["| attention-1x16"].count("none") == 7
  assert "(one-channel ∞)" in rows["| both-authors-1x16"]
  for name in ("fig5.png", "fig6.png"):
    assert (smoke / name).read_bytes().startswith(b"\x89PNG")


def test_cumulative_spread_rises_to_all_channels(smoke):
  for model in found(smoke)[:2]:
    for name in ("spread", "token_spread"):
      assert model[name] == sorted(model[name])
      assert model[name][-1] == 1
    whole = smoothing_report.spread_share(model)
    assert whole <= smoothing_report.spread_share(model, "token_spread")


def test_measured_model_is_not_measured_again(smoke, monkeypatch):
  def refuse(*args, **kwargs):
    raise AssertionError("measured again")

  monkeypatch.setattr(smoothing, "measure_smoothing", refuse)
  assert smoothing.main(smoothing.Arguments(out=smoke, **SMOKE)) == 0


def test_without_pairs_the_rest_is_the_same(smoke):
  (_, both, _) = found(smoke)
  subject = subjects.fresh("both", 1, 16, "authors")
  tokens = subjects.rows_of_text(subject.text, 2, 96, held_out=False)
  short = smoothing_measure.measure_smoothing(
    subject.build(), tokens, pairs=False
  )
  for layer, whole in zip(short["eq1"], both["eq1"], strict=True):
    assert "b" not in layer
    for name, value in layer.items():
      close = value if value is None else pytest.approx(value, rel=1e-3)
      assert whole[name] == close, name
  assert short["block"] == both["block"]


def test_verdict_tells_bounds_from_what_was_measured(smoke):
  default, both, attention = smoothing_report.verdict(found(smoke))
  assert "1, no contraction promised" in default
  assert "κ's holds in every channel that is centred" in default
  assert "A_max - A_min is below ½" in default
  assert "κ is ∞ and nothing bounds it" in both
  assert "no A, so no bound" in attention


def test_report_without_results_is_refused(tmp_path):
  arguments = smoothing.Arguments(out=tmp_path / "none", report_only=True)
  with pytest.raises(SystemExit, match=r"results\.json, expected results"):
    smoothing.main(arguments)


def test_text_that_is_not_there_is_refused(tmp_path):
  arguments = smoothing.Arguments(
    preset="smoke", out=tmp_path, data=tmp_path / "none.txt"
  )
  with pytest.raises(SystemExit, match=r"smoothing: .*none.txt"):
    smoothing.main(arguments)


def depth_model(title, seed, slope, **changes):
  layer = {
    "learned_log_a_max": -0.7, "premise": 0.9, "kappa_median": 0.5,
    "kappa_max": 1.1, "learned_ratio": 0.6,
  }  # fmt: skip
  none = changes.get("none", False)
  layers = [None] if none else [layer]
  out = [{"relative": 1.0}, {"relative": 0.5}]
  r_squared, high = changes.get("r_squared", 1.0), changes.get("high", slope)
  slope = {"slope": slope, "low": slope, "high": high, "r_squared": r_squared}
  bound = None if none else changes.get("bound", -0.7)
  return {
    "title": title, "step": 0, "seed": seed, "layers": 2,
    "influence": {"slope": slope, "log_a_max": bound, "eq1": layers},
    "smoothing": {"mixer": out, "block": out, "eq1": layers},
  }  # fmt: skip


def test_depth_table_gives_mean_and_deviation_over_seeds():
  models = [depth_model("a", seed, -0.7 - 0.1 * seed) for seed in (0, 1)]
  models += [depth_model("b", 0, -0.1, bound=0.0, r_squared=0.5)]
  models += [depth_model("c", 0, 0.1, none=True)]
  models += [depth_model("d", 0, -0.1, high=0.1, r_squared=0.5)]
  lines = depth_report.table(models, {"rows": 2, "length": 512})
  cells = [line.split(" | ") for line in lines if line.startswith("| ")][2:]
  assert [row[0] for row in cells] == ["| a", "| b", "| c", "| d"]
  assert cells[0][2] == "-0.75000 ± 0.07071"
  assert cells[0][-1] == "2 |"
  assert cells[1][2] == "-0.10000, no line"
  assert cells[1][4].startswith("0, vacuous")
  assert cells[2][4:9] == ["none"] * 5
  assert cells[3][2] == "-0.10000, flat"
  assert cells[0][9] == "1.00 ± 0.00 → 0.50 ± 0.00"
