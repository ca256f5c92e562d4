"""A run that was stopped or killed ends as one that never was."""

import json
import os
import pathlib
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_run
from checks import same_compiler
from flax import nnx
from jax.sharding import AxisType

from ssmjax.training import (
  CheckpointWarning,
  FitConfig,
  NonFiniteError,
  SaveError,
  data_mesh,
  fit,
  load,
  read_metrics,
)
from ssmjax.training.fingerprint import fingerprint
from ssmjax.training.folder import RunFolder, StopRequest
from ssmjax.training.metrics import MetricsLog

SCRIPT = pathlib.Path(toy_run.__file__)


class Crash(Exception):
  """Ends a run from within, without a last save."""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
  """The run that never stops, with batches of one size."""
  folder = tmp_path_factory.mktemp("unbroken")
  return folder, toy_run.run(folder, data=one_size())


@pytest.mark.parametrize(
  "kills", [1, pytest.param(3, marks=pytest.mark.nightly)]
)
def test_killed_run_ends_as_the_unbroken_one(tmp_path, unbroken, kills):
  kill_and_resume(tmp_path, unbroken, kills=kills)


@pytest.mark.nightly
def test_run_killed_ten_times_ends_as_the_unbroken_one(tmp_path):
  fields = {"steps": 2000, "evaluate_every": 100, "keep": 3, "seeds": [0, 7]}
  folder = tmp_path / "unbroken"
  whole = toy_run.run(
    folder, **fields | {"seeds": (0, 7)}, data=toy_run.Examples()
  )
  kill_and_resume(
    tmp_path / "killed",
    (folder, whole),
    kills=10,
    two_sizes=True,
    **fields,
  )


@pytest.mark.parametrize(
  "strategy", ["shard_map", pytest.param("pmap", marks=pytest.mark.nightly)]
)
def test_sigterm_saves_at_a_boundary_and_the_run_goes_on(
  tmp_path, unbroken, strategy
):
  options = {"data": one_size(), "strategy": strategy}
  first = toy_run.run(tmp_path, hooks=[terminate_at(45)], **options)
  assert (first.step, first.finished, first.reason) == (45, False, "sigterm")
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  assert [line["step"] for line in read_metrics(tmp_path)][-1] == 40
  second = toy_run.run(tmp_path, **options)
  assert second.finished
  assert_same_end((tmp_path, second), unbroken)


@pytest.fixture
def ctrl_c():
  """SIGINT as in a terminal; a shell's background job ignores it."""
  old = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, old)


def test_first_ctrl_c_saves_and_the_second_stops_at_once(
  tmp_path, capfd, ctrl_c
):
  def once(step, models):
    if step == 45:
      signal.raise_signal(signal.SIGINT)

  def twice(step, models):
    signal.raise_signal(signal.SIGINT)

  first = toy_run.run(tmp_path, data=one_size(), hooks=[once])
  assert (first.step, first.finished, first.reason) == (45, False, "sigint")
  assert "second Ctrl-C stops it at once" in capfd.readouterr().err
  with pytest.raises(KeyboardInterrupt):
    toy_run.run(tmp_path, data=one_size(), hooks=[twice, twice])
  assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_ctrl_c_stays_ignored_where_it_was():
  old = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    with StopRequest(None):
      assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
  finally:
    signal.signal(signal.SIGINT, old)


def test_minutes_stop_a_run_in_pieces(tmp_path, unbroken, capsys):
  piece = toy_run.run(tmp_path, data=one_size(), minutes=1e-3, progress=True)
  assert (piece.step, piece.finished, piece.reason) == (5, False, "minutes")
  assert "run the same command again" in capsys.readouterr().out
  whole = toy_run.run(tmp_path, data=one_size(), minutes=60)
  assert whole.finished
  assert_same_end((tmp_path, whole), unbroken)


def test_clock_keeps_time_for_the_next_cell_and_the_last_save():
  with StopRequest(minutes=1) as stop:
    stop._recent = {"cell": [9.0, 5.0], "compile": [40.0]}
    assert stop.reason(["cell"], save_seconds=1.0) is None
    assert stop.reason(["cell"], save_seconds=20.0) == "minutes"
    assert stop.reason(["cell", "compile"], save_seconds=1.0) == "minutes"
    stop._recent["cell"] = [19.9]
    assert stop.reason(["cell"], save_seconds=1.0) == "minutes"
    stop._recent = {"cell": [5.0], "compile": [22.0]}
    assert stop.reason(["cell", "compile"], save_seconds=1.0) is None
    assert stop.reason(["cell", "evaluate"], save_seconds=1.0) is None
    for due in (["compile"] * 2, ["compile", "evaluate"]):
      assert stop.reason(["cell", *due], save_seconds=1.0) == "minutes"


def test_iterator_goes_on_from_its_saved_cursor(tmp_path, unbroken):
  with pytest.raises(Crash):
    toy_run.run(tmp_path, data=Numbered(), hooks=[crash_at(55)])
  data = Numbered()
  result = toy_run.run(tmp_path, data=data)
  assert data.at == toy_run.STEPS
  # The same batches, given instead of made: another program, the same run.
  expected = arrays(unbroken[1])
  for a, b in zip(arrays(result), expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
  whole = tmp_path / "whole"
  assert_same_end(
    (tmp_path, result), (whole, toy_run.run(whole, data=Numbered()))
  )


def test_metrics_written_after_the_checkpoint_are_cut_back(tmp_path, unbroken):
  with pytest.raises(Crash):
    toy_run.run(tmp_path, data=one_size(), hooks=[crash_at(75)])
  assert [line["step"] for line in read_metrics(tmp_path)][-1] == 70
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 75, "ev')  # the kill came in the middle of a line
  flip(next((tmp_path / "checkpoints" / "60").rglob("d/*")))
  with pytest.warns(CheckpointWarning, match="checkpoints/60 is passed over"):
    result = toy_run.run(tmp_path, data=one_size())
  assert_same_end((tmp_path, result), unbroken)


def test_events_of_a_killed_run_are_purged(tmp_path, monkeypatch):
  import tensorboardX

  purged = []

  class Writer(tensorboardX.SummaryWriter):
    def __init__(self, *args, purge_step):
      purged.append(purge_step)
      super().__init__(*args, purge_step=purge_step)

  monkeypatch.setattr(tensorboardX, "SummaryWriter", Writer)
  log = MetricsLog(tmp_path, 0, tensorboard=True)
  for step in (10, 20, 30):
    log.write(step, "train", [0], [{"loss": 1.0 / step, "empty": np.nan}])
  log.sync()
  log.close()
  MetricsLog(tmp_path, 20, tensorboard=True).close()
  assert purged == [1, 21]
  assert list(tmp_path.glob("events.*"))
  assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20]
  assert read_metrics(tmp_path)[0]["empty"] is None


def test_finished_run_is_given_back_at_once(tmp_path, unbroken):
  folder, whole = unbroken

  def refuse(*args):
    raise AssertionError("a finished run computes nothing")

  result = fit(
    toy_run.init,
    refuse,
    toy_run.optimizer(),
    one_size(),
    toy_run.config(minutes=1.0),  # how long is not part of what
    folder,
    evaluate=refuse,
    mesh=toy_run.two_devices(),
  )
  assert (result.step, result.finished) == (toy_run.STEPS, True)
  assert result.metrics == whole.metrics
  assert_same_end((folder, result), unbroken)


def test_other_configuration_is_refused_with_its_fields(unbroken):
  with pytest.raises(ValueError, match="another configuration") as error:
    toy_run.run(unbroken[0], seeds=(0, 1), settings={"width": 8})
  assert "fit.seeds: found [0], expected [0, 1]" in str(error.value)
  assert "settings.width: found nothing, expected 8" in str(error.value)


def test_run_goes_on_to_more_steps_and_with_other_intervals(tmp_path):
  fields = {"evaluate": lambda model, step: {"slope": float(step)}}
  folder = tmp_path / "run"
  first = short_run(
    folder, steps=4, log_every=2, evaluate_every=2, save_every=2, **fields
  )
  assert first.finished
  result = short_run(
    folder, steps=10, log_every=1, evaluate_every=5, save_every=3, **fields
  )
  assert (result.step, result.finished) == (10, True)
  whole = short_run(tmp_path / "whole", **fields)
  assert_same_leaves(result.state, whole.state)
  lines = [
    *[(n, "train") for n in (2, 4, 5, 6, 7, 8, 9, 10)],
    *[(n, "evaluate") for n in (2, 4, 5, 10)],
  ]
  found = [(m["step"], m["event"]) for m in read_metrics(folder)]
  assert sorted(found) == sorted(lines)
  losses = {m["step"]: m.get("loss") for m in read_metrics(folder)}
  for line in read_metrics(tmp_path / "whole"):
    if line["event"] == "train" and 4 < line["step"] < 10:
      assert losses[line["step"]] in (line["loss"], None)
  config = json.loads((folder / "config.json").read_text())["config"]["fit"]
  assert (config["steps"], config["save_every"]) == (10, 3)
  assert short_run(folder, **fields).metrics == result.metrics  # at once
  with pytest.raises(
    ValueError, match=r"steps is 9, and the run in .* done 10"
  ):
    short_run(folder, steps=9, **fields)


def test_run_that_was_stopped_is_not_finished_by_fewer_steps(tmp_path):
  stopped = short_run(tmp_path, hooks=[terminate_at(6)])
  assert stopped.reason == "sigterm"
  with pytest.raises(ValueError, match=r"has done 6 steps\. Ask for more"):
    short_run(tmp_path, steps=6)
  assert short_run(tmp_path, steps=7).step == 7


def test_other_optimizer_is_named_as_the_cause(tmp_path):
  short_run(tmp_path, hooks=[terminate_at(6)])
  with pytest.raises(ValueError, match="The optimizer is another one") as error:
    short_run(tmp_path, optimizer=optax.adam(0.1))
  line = "opt_state.0.mu.slope: found nothing, expected float32 [1, 4]"
  assert line in str(error.value)
  assert "orbax" not in str(error.value)


def test_other_kind_of_random_numbers_is_named_as_the_cause(tmp_path):
  short_run(tmp_path, hooks=[terminate_at(6)])
  with (
    jax.default_prng_impl("rbg"),
    pytest.raises(ValueError, match="jax_default_prng_impl") as error,
  ):
    short_run(tmp_path)
  assert "key: found uint32 [1, 2], expected uint32 [1, 4]" in str(error.value)


def test_other_model_is_named_as_the_cause_by_load(tmp_path):
  short_run(tmp_path)
  for init, line in (
    (toy_run.init, "params.A_log: found nothing, expected float32 [1, 8, 2]"),
    (Square, "params.slope: found float32 [1, 4], expected float32 [1, 2, 2]"),
  ):
    with pytest.raises(ValueError, match="The model is another one") as error:
      load(tmp_path, init)
    assert line in str(error.value)
  with pytest.raises(ValueError, match="The model is another one"):
    short_run(tmp_path, init=Square, steps=12)  # as many parameters


def test_other_devices_or_versions_are_warned_of(tmp_path):
  with pytest.raises(Crash):
    toy_run.run(tmp_path, data=one_size(), hooks=[crash_at(5)])
  path = tmp_path / "config.json"
  text = path.read_text().replace("2 × cpu", "4 × tpu")
  path.write_text(text.replace(" cores of ", "99 cores of "))
  expected = (
    r"cpu: found .*99 cores of .*\n.*devices: found .4 × tpu., expected"
  )
  with (
    pytest.warns(UserWarning, match=expected),
    pytest.raises(Crash),
  ):
    toy_run.run(tmp_path, data=one_size(), hooks=[crash_at(5)])


def test_library_that_is_not_installed_can_train(monkeypatch):
  def missing(name):
    raise metadata.PackageNotFoundError(name)

  monkeypatch.setattr(metadata, "version", missing)
  folder = RunFolder(pathlib.Path("run"), {}, toy_run.two_devices())
  versions = folder.environment["versions"]
  assert set(versions.values()) == {"not installed"}


def test_folder_of_something_else_is_refused_and_left(tmp_path):
  saved = tmp_path / "checkpoints" / "100"
  saved.mkdir(parents=True)
  with pytest.raises(ValueError, match="something else wrote them"):
    toy_run.run(tmp_path, data=one_size())
  assert saved.exists()
  assert not (tmp_path / "config.json").exists()


_DEEP = (
  '{"environment": {}, "config": {"a": ' + "[" * 10**4 + "]" * 10**4 + "}}"
)


@pytest.mark.parametrize(
  "text",
  [
    *("", "{}", "\0\0", '{"hidden_size": 8}'),
    pytest.param(_DEEP, id="deep"),
    pytest.param(_DEEP.replace("[", "[" * 20), id="deeper"),
  ],
)
def test_unreadable_configuration_is_reported_with_the_way_out(tmp_path, text):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(
    ValueError, match=r"config\.json cannot .*delete the file"
  ):
    toy_run.run(tmp_path, data=one_size())


def test_damaged_line_of_the_metrics_is_left_out(tmp_path):
  lines = [b'{"step": 1}', b'{"st\xffep": 2}', b"\0\0", b"[3]", b"[" * 10**6]
  (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*lines, b'{"st']))
  with pytest.warns(UserWarning, match="line [2345] is damaged") as found:
    MetricsLog(tmp_path, 3).close()
  assert len(found) == 4
  assert read_metrics(tmp_path) == [{"step": 1}]


def test_folder_is_for_one_process_at_a_time(tmp_path):
  def again(step, models):
    with pytest.raises(ValueError, match="another process trains"):
      toy_run.run(tmp_path, data=one_size())
    raise Crash

  with pytest.raises(Crash):
    toy_run.run(tmp_path, data=one_size(), hooks=[again])


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
  class Poisoned(toy_run.Examples):
    def batch(self, kind, step, seed):
      batch = super().batch(kind, step, seed)
      bad = (step == 53) & (seed == 4)
      return batch | {"w": jnp.where(bad, jnp.nan, batch["w"])}

  with pytest.raises(NonFiniteError) as error:
    toy_run.run(
      tmp_path, data=Poisoned((16, 16)), seeds=(3, 4), evaluate_every=60
    )
  for part in (
    "loss is nan at step 53 (seed 4",
    "stream.batch(16, 53, seed=4)",
    f"go back to checkpoint {tmp_path}/checkpoints/40",
  ):
    assert part in str(error.value)
  assert (tmp_path / "checkpoints" / "manifest-40.json").exists()


@pytest.mark.parametrize(
  ("weight", "error", "match"),
  [
    (np.nan, NonFiniteError, "total weight is nan at step 7 .*the start"),
    (np.inf, NonFiniteError, "total weight is inf at step 7"),
    (-2.0, ValueError, r"total weight is -2.0 at step 7 .*16, 7, .* least 0"),
  ],
)
def test_weight_that_cannot_be_stops_the_run(tmp_path, weight, error, match):
  with pytest.raises(error, match=match):
    short_run(tmp_path, weight_at(7, weight))


def test_step_of_weight_zero_is_none(tmp_path):
  result = short_run(tmp_path, weight_at(7, 0.0))
  assert result.finished
  lines = [m["loss"] for m in read_metrics(tmp_path) if m["event"] == "train"]
  assert lines[7] is None
  assert None not in lines[:7] + lines[8:]


@pytest.mark.parametrize("name", ["step", "event", "seed", "seconds"])
def test_evaluated_metric_with_a_taken_name_is_refused(tmp_path, name):
  with pytest.raises(ValueError, match=f"evaluate returns .* named '{name}'"):
    short_run(tmp_path, evaluate=lambda model, step: {name: 7.0})


# Of tensorstore, where one of orbax's threads has failed and ended.
@pytest.mark.filterwarnings(
  "ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize(
  ("fields", "match"),
  [
    ({"log_every": 10, "save_every": 3}, "step 6 in .*checkpoints/3 is whole"),
    (
      {"save_every": 100},
      r"metrics of step [56] could not .*metrics\.jsonl: File",
    ),
  ],
)
def test_full_disk_ends_a_run_that_goes_on_with_space(tmp_path, fields, match):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)

  def fill(step, models):
    if step == 5:
      while fields["save_every"] == 3 and not saved.exists():
        time.sleep(0.01)
      resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))

  folder = tmp_path / "run"
  saved = folder / "checkpoints" / "manifest-3.json"
  try:
    with pytest.raises(SaveError, match=match) as error:
      short_run(folder, hooks=[fill], **fields)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert str(folder) in str(error.value)
  result = short_run(folder, **fields)
  whole = tmp_path / "whole"
  assert_same_end((folder, result), (whole, short_run(whole, **fields)))


def test_run_stops_early_above_the_threshold_and_keeps_the_best(tmp_path):
  scores = {30: 0.5, 60: 0.8, 90: 0.7, 120: 0.995}

  def scored(model, step):
    return {"held_out": scores[step]}

  def run():
    return fit(
      toy_run.init,
      toy_run.loss,
      toy_run.optimizer(),
      one_size(),
      toy_run.config(stop_above=0.75, save_every=1000, seeds=(1, 2)),
      tmp_path,
      evaluate=scored,
      mesh=toy_run.two_devices(),
    )

  result = run()
  assert (result.step, result.finished, result.reason) == (
    *(60, True, "stopped early"),
  )
  assert run().reason == "stopped early"
  lines = read_metrics(tmp_path, wall_clock=False)
  assert [(line["step"], line["seed"]) for line in lines[-2:]] == [
    *((60, 1), (60, 2))
  ]
  best = load(tmp_path, toy_run.init, seeds=(1, 2), at="best")
  for model, expected in zip(best, result.models, strict=True):
    assert_same_leaves(model, expected)
  with pytest.raises(ValueError, match=r"no checkpoint 50; found .*\[30, 60\]"):
    load(tmp_path, toy_run.init, seeds=(1, 2), at=50)


def test_first_score_that_is_not_a_number_does_not_stay_the_best(tmp_path):
  scores = {5: np.nan, 10: 0.5, 15: 0.4}
  fit(
    toy_run.init,
    toy_run.loss,
    toy_run.optimizer(),
    one_size(),
    toy_run.config(steps=15, evaluate_every=5, save_every=1000),
    tmp_path,
    evaluate=lambda model, step: {"held_out": scores[step]},
    mesh=toy_run.two_devices(),
  )
  manifest = tmp_path / "checkpoints" / "manifest-10.json"
  assert json.loads(manifest.read_text())["best"] == 0.5


def test_speed_counts_all_seeds_and_no_evaluation(tmp_path):
  def slow(model, step):
    time.sleep(0.2)
    return {"held_out": 0.0}

  start = time.monotonic()
  fit(
    toy_run.init,
    toy_run.loss,
    toy_run.optimizer(),
    one_size(),
    toy_run.config(steps=20, evaluate_every=5, seeds=(1, 2)),
    tmp_path,
    evaluate=slow,
    mesh=toy_run.two_devices(),
  )
  elapsed = time.monotonic() - start
  lines = [m for m in read_metrics(tmp_path) if m["event"] == "train"]
  assert [m["seed"] for m in lines] == [1, 2, 1, 2]
  for line in lines:
    tokens = line["tokens_per_second"] * line["seconds"]
    assert round(tokens) == 10 * 2 * 16 * 8
  assert lines[0]["seconds"] + lines[2]["seconds"] < elapsed - 1.6


def test_run_without_tqdm_prints_lines(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "tqdm", None)
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  with pytest.raises(Crash):
    toy_run.run(tmp_path, data=one_size(), hooks=[crash_at(25)], progress=True)
  out = capsys.readouterr().out
  assert "tensorboard" not in out
  assert "step 10/120" in out
  assert "tokens/s" in out
  assert not list(tmp_path.glob("events.*"))
  assert len(read_metrics(tmp_path)) == 2


def test_events_are_written_where_asked_for(tmp_path, monkeypatch):
  short_run(tmp_path / "asked", steps=1, tensorboard=True)
  assert list((tmp_path / "asked").glob("events.*"))
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  short_run(tmp_path / "not", steps=1)
  with pytest.raises(ImportError, match="pip install tensorboardX"):
    short_run(tmp_path / "missing", steps=1, tensorboard=True)


def test_run_says_what_it_does_before_it_is_silent(tmp_path, capsys):
  short_run(tmp_path, steps_per_dispatch=5, steps=4, progress=True)
  out = capsys.readouterr().out.splitlines()
  assert out[:4] == [
    "Parameters: 4, 0.0 MB in all.",
    "Devices: 1 × cpu, 1 to divide a batch.",
    "Data: Steps, made on the devices.",
    "Compiling the step, one step a call: step int32 [16].",
  ]
  assert re.fullmatch(r"Compiled in [\d.]+ s\.", out[4])
  short_run(tmp_path / "quiet")
  assert capsys.readouterr().out == ""


def test_every_line_is_given_in_order_and_after_a_resume(tmp_path):
  given = []

  def take(line):
    assert read_metrics(tmp_path)[-1]["step"] >= line["step"]  # written first
    given.append(dict(line))
    line.clear()  # it is the taker's

  fields = {
    "evaluate": lambda model, step: {"bad": np.nan},
    "seeds": (0, 1),
    "evaluate_every": 5,
    "save_every": 3,
  }
  with pytest.raises(Crash):
    short_run(tmp_path, hooks=[crash_at(7)], on_metrics=take, **fields)
  lines = read_metrics(tmp_path)
  assert given == lines
  assert {"step": 5, "event": "evaluate", "seed": 1, "bad": None} in given
  given.clear()
  short_run(tmp_path, on_metrics=take, **fields)
  assert given == [m for m in read_metrics(tmp_path) if m["step"] > 6]
  assert [m["step"] for m in given[:2]] == [7, 7]


def test_what_on_metrics_raises_ends_the_run(tmp_path):
  def fail(line):
    raise Crash

  with pytest.raises(Crash):
    short_run(tmp_path, on_metrics=fail)


@pytest.mark.parametrize(
  "changed",
  [
    pytest.param({"rate": 0.2}, marks=pytest.mark.nightly),
    {"optimizer": optax.sgd(lambda step: 0.1 - 0.01 * (step > 8))},
    {"scale": 3.0},
    {"data": "table"},
  ],
)
def test_changed_step_is_warned_of(tmp_path, changed):
  fields = {"data": table(1.0)} if "data" in changed else {}
  if "optimizer" in changed:
    fields = {"optimizer": optax.sgd(lambda step: 0.1 - 0.0 * (step > 8))}
  short_run(tmp_path, hooks=[terminate_at(4)], **fields)
  short_run(tmp_path, hooks=[terminate_at(6)], **fields)  # and not of the same
  if "data" in changed:
    changed = {"data": table(2.0)}
  if "scale" in changed:
    changed = {"loss": weight_at(-1, changed["scale"])}
  with pytest.warns(UserWarning, match="computes something else .* step 6"):
    short_run(tmp_path, hooks=[terminate_at(8)], **fields | changed)
  assert short_run(tmp_path, **fields | changed).finished  # told once


def test_changed_step_of_another_version_is_not_told(tmp_path, monkeypatch):
  short_run(tmp_path, hooks=[terminate_at(4)])
  monkeypatch.setattr("ssmjax.training.folder._version", lambda name: "9.9")
  with pytest.warns(UserWarning, match="was begun elsewhere") as found:
    short_run(tmp_path, rate=0.2)
  assert not [w for w in found if "something else" in str(w.message)]


def test_step_is_traced_once(tmp_path):
  traced = []

  def loss(model, batch, key):
    traced.append(1)
    return weight_at(-1, 4.0)(model, batch, key)

  short_run(tmp_path, loss)
  assert len(traced) == 1


def test_fingerprint_ignores_names_and_sees_every_constant():
  def one(rate, table):
    def inner(x):
      return jnp.sin(x) * rate + table

    return lambda x: jax.lax.scan(lambda c, y: (c + jax.jit(inner)(y), y), x, x)

  def two(rate, table):
    def other_name(other):
      return jnp.sin(other) * rate + table

    return lambda z: jax.lax.scan(
      lambda k, v: (k + jax.jit(other_name)(v), v), z, z
    )

  def digest(make, rate=0.1, table=(0.0, 1.0, 2.0)):
    function = lambda x: make(rate, np.float32(table))(x)[0].sum()
    return fingerprint(jax.make_jaxpr(jax.grad(function))(jnp.ones((3, 3))))

  assert digest(one) == digest(two)
  others = [{"rate": 0.1000001}, {"table": (0.0, 1.0, 3.0)}]
  assert len({digest(one), *(digest(one, **other) for other in others)}) == 3
  large = np.zeros(1 << 23, np.float32)
  x = jnp.asarray(large)
  whole = fingerprint(jax.make_jaxpr(lambda y: y + x)(1.0))
  assert whole != fingerprint(jax.make_jaxpr(lambda y: y + (x + 1))(1.0))


def test_data_that_cannot_be_resumed_or_ends_is_refused(tmp_path):
  with pytest.raises(ValueError, match="list_iterator without get_state"):
    toy_run.run(tmp_path, data=iter([]))

  class Short(Numbered):
    def __next__(self):
      if self.at == 7:
        raise StopIteration
      return super().__next__()

  with pytest.raises(ValueError, match="data ended after 7 steps"):
    toy_run.run(tmp_path, data=Short())


@pytest.mark.nightly
def test_fit_takes_a_mesh_as_make_mesh_gives_it(tmp_path, unbroken):
  mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
  with jax.set_mesh(mesh):
    toy_run.run(tmp_path, data=one_size(), hooks=[terminate_at(45)], mesh=mesh)
    result = toy_run.run(tmp_path, data=one_size(), mesh=mesh)
  assert_same_end((tmp_path, result), unbroken)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_fit_and_load_within_set_mesh_equal_one_device(tmp_path, axis_type):
  mesh = jax.make_mesh(
    (2,), ("data",), axis_types=(axis_type,), devices=jax.devices()[:2]
  )

  def run(folder, mesh=None):
    sizes = lambda model, step: {"slope": float(model.slope[...].sum())}
    return fit(
      Line,
      weight_at(-1, 4.0),
      optax.sgd(0.1),
      Steps(),
      FitConfig(steps=4, evaluate_every=2, progress=False),
      folder,
      evaluate=sizes,
      mesh=mesh,
    )

  one = run(tmp_path / "one", data_mesh(jax.devices()[:1]))
  with jax.set_mesh(mesh):
    # Taken from the context, and where it is not the same, refused.
    found = run(tmp_path / "two")
    (loaded,) = load(tmp_path / "two", Line)
    with pytest.raises(ValueError, match=r"call fit outside of jax\.set_mesh"):
      run(tmp_path / "other", data_mesh(jax.devices()[2:4]))
    for model in (found.model, loaded):
      assert_same_leaves(model, one.model)
      jax.jit(lambda model: model.slope[...] * 2)(model)  # goes on here
  assert found.metrics == one.metrics


def test_fit_runs_outside_of_the_main_thread(tmp_path):
  found = []
  thread = threading.Thread(
    target=lambda: found.append(
      toy_run.run(tmp_path, data=one_size(), steps=5, evaluate_every=5)
    )
  )
  thread.start()
  thread.join()
  assert found[0].finished


@pytest.mark.parametrize(
  ("fields", "match"),
  [
    ({"steps": 0}, "steps is 0"),
    ({"seeds": (1, 1)}, "seeds are"),
    ({"seeds": (-1,)}, r"seeds\[0\] is -1"),
    ({"stop_above": 0.9}, "needs best"),
    ({"keep": 1}, "keep is 1"),
    ({"minutes": 0}, "minutes is 0"),
    ({"minutes": float("nan")}, "minutes is nan"),
    ({"best_mode": "maximum"}, "best_mode is 'maximum'"),
    ({"strategy": "xmap"}, "strategy is 'xmap'"),
  ],
)
def test_impossible_configuration_is_refused(fields, match):
  with pytest.raises(ValueError, match=match):
    FitConfig(**{"steps": 1} | fields)


def kill_and_resume(folder, unbroken, *, kills, **fields):
  """Kills the script `kills` times at random moments; then lets it end."""
  command = [sys.executable, str(SCRIPT), str(folder)]
  command += [f"{name}={json.dumps(value)}" for name, value in fields.items()]
  steps = fields.get("steps", toy_run.STEPS)
  draw = random.Random(kills + 4)
  # Moments spread over the run; a fifth of them in the start-up instead.
  targets = sorted(draw.randrange(steps - 60) for _ in range(kills))
  reached = []
  for target in targets:
    if draw.random() < 0.2:
      reached.append(kill_when(command, None, draw.uniform(0.5, 3.0)))
    else:
      reached.append(kill_when(command, target, draw.uniform(0.0, 0.05)))
  end = subprocess.run(
    command, capture_output=True, text=True, check=False, env=same_compiler()
  )
  assert end.returncode == 0, end.stderr
  assert end.stdout.split()[-1] == "finished"
  print("killed after steps", reached)
  result = toy_run.run(
    folder,
    data=toy_run.Examples(
      (16, 8) if fields.pop("two_sizes", False) else (16,) * 2
    ),
    **{k: tuple(v) if k == "seeds" else v for k, v in fields.items()},
  )
  assert_same_end((folder, result), unbroken)


def kill_when(command, target, delay):
  """Kills the process `delay` s after step `target` (None: its start)."""
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    env=same_compiler(),
  ) as process:  # fmt: skip
    step = None
    while target is not None:
      line = process.stdout.readline()
      assert line, process.stderr.read()
      if line.strip().isdigit():
        step = int(line)
        if step >= target:
          break
    try:
      process.wait(delay)
    except subprocess.TimeoutExpired:
      process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL
  return step


class Line(nnx.Module):
  """A model that compiles at once."""

  def __init__(self, seed):
    self.slope = nnx.Param(jnp.full(4, 1.0 + seed))


class Square(Line):
  """As many parameters in another shape."""

  def __init__(self, seed):
    self.slope = nnx.Param(jnp.ones((2, 2)))


def weight_at(at, weight):
  """A loss of `Line` whose total weight at one step is another."""

  def loss(model, batch, key):
    step = batch["step"][0]
    total = (model.slope[...] ** 2).sum()
    return total, jnp.where(step == at, weight, 4.0), {}

  return loss


class Steps:
  """Batches that say which step it is."""

  def kind(self, step):
    return 16

  def batch(self, kind, step, seed):
    return {"step": jnp.full(kind, step)}


def table(value):
  """`Steps` with a constant array, of which the batch takes nothing new."""
  values = np.full(3, value, np.float32)

  class Table(Steps):
    def batch(self, kind, step, seed):
      return super().batch(kind, step, seed) | {
        "x": jnp.full((kind, 3), jnp.asarray(values))
      }

  return Table()


def short_run(folder, loss=None, rate=0.1, **options):
  """Ten steps of `Line` on one device."""
  evaluate = options.pop("evaluate", None)
  extra = {k: options.pop(k) for k in ("hooks", "on_metrics") if k in options}
  return fit(
    options.pop("init", Line),
    loss or weight_at(-1, 4.0),
    options.pop("optimizer", None) or optax.sgd(rate),
    options.pop("data", Steps()),
    FitConfig(**{"steps": 10, "log_every": 1} | {"progress": False} | options),
    folder,
    evaluate=evaluate,
    mesh=data_mesh(jax.devices()[:1]),
    **extra,
  )


def one_size():
  return toy_run.Examples((16, 16))


class Numbered(toy_run.Numbered):
  """The one-size examples from an iterator."""

  def __init__(self):
    super().__init__(one_size())


def crash_at(at):
  def hook(step, models):
    if step == at:
      raise Crash

  return hook


def terminate_at(at):
  def hook(step, models):
    if step == at:
      os.kill(os.getpid(), signal.SIGTERM)

  return hook


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def arrays(result):
  return [np.asarray(x) for x in jax.tree.leaves(result.state)]


def assert_same_leaves(found, expected):
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_same_end(found, expected):
  """Equal state to the bit, and equal lines but for the clock."""
  (folder, result), (expected_folder, expected_result) = found, expected
  assert_same_leaves(result.state, expected_result.state)
  assert read_metrics(folder, wall_clock=False) == read_metrics(
    expected_folder, wall_clock=False
  )
