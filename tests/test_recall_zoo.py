"""The recall experiment's zoo: every kind of mixer on one task."""

import dataclasses
import json

import jax
import pytest
from flax import nnx

from experiments import recall, recall_settings, recall_zoo, recall_zoo_report
from ssmjax import models
from ssmjax.models.kinds import MIXERS


@pytest.fixture(
  scope="module",
  params=[
    ("rglru-both",),
    pytest.param(
      ("rglru", "rglru-both", "attention"), marks=pytest.mark.nightly
    ),
  ],
  ids=len,
)
def zoo(tmp_path_factory, request):
  """A few rows of the zoo for 20 steps."""
  out = tmp_path_factory.mktemp("zoo")
  short = dataclasses.replace(
    recall_settings._ZOO, d_model=16, steps=20, steps_per_dispatch=10,
    evaluate_every=20, save_every=20, train=recall_settings._SMOKE.train,
    test=recall_settings._SMOKE.train,
  )  # fmt: skip
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(recall_settings, "_ZOO", short)
    patch.setattr(recall_zoo, "_LENGTH", 48)
    arguments = recall.Arguments(preset="zoo", out=out, rows=request.param)
    assert recall.main(arguments) == 0
    yield out, arguments


def test_zoo_has_a_row_of_each_kind_and_a_polarized_one_where_it_polarizes():
  rows = {row.name: row for row in recall_zoo.zoo_rows()}
  assert recall_zoo.SIZES.keys() == MIXERS.keys() - recall_zoo._OTHER
  for kind in recall_zoo.SIZES:
    config = MIXERS[kind]
    assert type(rows[kind].mixer) is config
    assert (f"{kind}-both" in rows) == bool(config.polarizes)
    if config.polarizes:
      assert rows[f"{kind}-both"].mixer.polarization == recall_zoo.BOTH


@pytest.mark.parametrize("kind", recall_zoo.SIZES)
def test_zoos_rows_have_states_and_identities(kind):
  made = recall_settings.setting("zoo")
  rows = [row for row in made.rows if row.name.split("-")[0] == kind]
  assert rows
  for row in rows:
    config = recall_settings.model_config(made, row)
    model = jax.eval_shape(
      lambda config=config: models.LanguageModel(config, rngs=nnx.Rngs(0))
    )
    assert recall_zoo.state_size(model, 32) > 0
    identity = recall_settings.identity(made, row)
    assert identity["row"]["mixer"]["mixers"][0]["mixer"] == kind


def test_state_size_is_that_of_one_row():
  mixer = models.MambaConfig(d_state=4, d_conv=3)
  config = models.ModelConfig(8, 8, 2, mixers=(mixer,))
  model = jax.eval_shape(lambda: models.LanguageModel(config, rngs=nnx.Rngs(0)))
  assert recall_zoo.state_size(model, 32) == 2 * (16 * 4 + 2 * 16)


def test_zoo_measures_every_row_beside_its_accuracy(zoo):
  out, arguments = zoo
  results = json.loads((out / "results.json").read_text())
  assert [row["row"] for row in results["rows"]] == list(arguments.rows)
  for row in results["rows"]:
    found = row["runs"][0]["zoo"]
    assert found["kind"] == row["row"].removesuffix("-both")
    assert found["state"] > 0
    assert found["tokens_per_second"] > 0
    for stage in ("fresh", "trained"):
      assert len(found[stage]["block"]) == 2
      assert found[stage]["slope"]["last"] == 24
    assert found["fresh"] != found["trained"]
  state = {
    row["row"]: row["runs"][0]["zoo"]["state"] for row in results["rows"]
  }
  if "rglru" in state:
    # Two channels more in each of two layers, three inputs of the convolution.
    assert state["rglru-both"] - state["rglru"] == 2 * 2 * 4


def test_zoos_table_has_a_line_for_each_kind(zoo):
  out, arguments = zoo
  lines = (out / "table.md").read_text().splitlines()
  kinds = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
  rows = dict.fromkeys(row.removesuffix("-both") for row in arguments.rows)
  assert kinds == ["kind", "---", *rows]
  cells = {len(line.split("|")) for line in lines if line.startswith("|")}
  assert len(cells) == 1
  assert (out / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_zoos_finished_row_is_not_run_again(zoo, monkeypatch):
  out, arguments = zoo
  table = (out / "table.md").read_text()

  def refuse(*args, **kwargs):
    raise AssertionError("fit was called")

  monkeypatch.setattr(recall.training, "fit", refuse)
  assert recall.main(arguments) == 0
  assert (out / "table.md").read_text() == table


def test_row_of_other_sizes_is_another_row():
  made = recall_settings.setting("zoo")
  row = next(row for row in made.rows if row.name == "mamba")
  mixer = dataclasses.replace(row.mixer, d_state=9)
  other = dataclasses.replace(row, mixer=mixer)
  identities = [recall_settings.identity(made, r) for r in (row, other)]
  assert identities[0] != identities[1]


def test_kind_without_sizes_is_an_error_that_names_it(monkeypatch):
  monkeypatch.delitem(recall_zoo.SIZES, "mamba")
  with pytest.raises(ValueError, match=r"'mamba'.*recall_zoo"):
    recall_zoo.zoo_rows()


def test_zoo_has_no_compatibility_modes():
  with pytest.raises(ValueError, match="the compatibility modes are S6's"):
    recall_settings.setting("zoo", zero_decay="authors")


def test_table_leaves_a_half_finished_kind_blank():
  stage = {"slope": None, "block": [1.0, 0.5]}
  zoo = {"kind": "mamba", "state": 8, "tokens_per_second": 10.0}
  run = {"accuracy": {"2": 0.5}, "zoo": zoo | dict(fresh=stage, trained=stage)}
  row = {"polarized": True, "parameters": 1000, "runs": [run]}
  text = recall_zoo_report.table([row], [2], "label")
  line = next(v for v in text.splitlines() if v.startswith("| mamba"))
  assert line == (
    "| mamba | 1,000 | 8 | 10 |  |  |  |  | 50.0 | 50.0 |"
    " too few lags → too few lags | 1.00 → 0.50 |"
  )
