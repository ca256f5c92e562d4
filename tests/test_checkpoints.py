"""Checkpoints: whole, verified, of one configuration, the last and the best."""

import contextlib
import json
import resource
import shutil
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssmjax.training import (
  Checkpoints,
  CheckpointWarning,
  SaveError,
  data_mesh,
)
from ssmjax.training.checkpoints import load_params
from ssmjax.training.files import differing_fields, write_atomically

CONFIG = {"settings": {"width": 8, "rates": [0.1, 0.2]}, "steps": 10}
_NO_FILES = '{"best": 1, "config": {}, "files": 1}'


def test_restored_state_is_the_saved_one_to_the_bit(tmp_path):
  state = state_of(7)
  with opened(tmp_path) as checkpoints:
    checkpoints.save(7, state, {"step": 7, "sums": {"loss": [[0.1, 1e-300]]}})
  with opened(tmp_path) as checkpoints:
    assert checkpoints.latest == 7
    found, progress = checkpoints.restore(abstract(state))
  assert progress == {"step": 7, "sums": {"loss": [[0.1, 1e-300]]}}
  assert_same(found, state)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
    assert a.dtype == b.dtype
    assert a.sharding == b.sharding


def test_last_and_best_are_kept(tmp_path):
  with opened(tmp_path) as checkpoints:
    for step, score in enumerate([0.1, 0.9, 0.3, None, 0.2, 0.4], 1):
      checkpoints.save(step, state_of(step), {}, best=score)
  assert steps_in(tmp_path) == [2, 5, 6]
  with opened(tmp_path) as checkpoints:  # the best is known after a restart
    checkpoints.save(7, state_of(7), {}, best=0.8)
    checkpoints.save(8, state_of(8), {})
    checkpoints.wait()
    assert steps_in(tmp_path) == [2, 7, 8]
    checkpoints.save(9, state_of(9), {}, best=0.95)
  assert steps_in(tmp_path) == [8, 9]
  assert manifests_in(tmp_path) == [8, 9]


def test_least_is_best_where_best_mode_says_so(tmp_path):
  with opened(tmp_path, best_mode="min") as checkpoints:
    for step, score in enumerate([0.3, 0.1, 0.9, 0.5], 1):
      checkpoints.save(step, state_of(step), {}, best=score)
  assert steps_in(tmp_path) == [2, 3, 4]


def test_saving_is_not_disturbed_by_donating_the_state(tmp_path):
  spoil = jax.jit(
    lambda state: jax.tree.map(lambda x: x * 0 + 77, state), donate_argnums=0
  )
  expected = jax.tree.map(np.array, state_of(3))
  with opened(tmp_path) as checkpoints:
    for step in range(1, 6):
      state = state_of(3)
      checkpoints.save(step, state, {})
      for _ in range(5):
        state = spoil(state)
      jax.block_until_ready(state)
      checkpoints.wait()
      found, _ = checkpoints.restore(abstract(state))
      assert_same(found, expected)


def test_every_flipped_byte_is_noticed(tmp_path):
  two_saved(tmp_path / "run")
  newest = tmp_path / "run" / "checkpoints" / "2"
  names = [
    path.relative_to(newest) for path in newest.rglob("*") if path.is_file()
  ]
  assert len(names) > 5
  for name in names:
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "run", copy)
    flip(copy / "checkpoints" / "2" / name)
    with (
      pytest.warns(CheckpointWarning, match=r"checkpoints/2 is passed over"),
      opened(copy) as checkpoints,
    ):
      assert checkpoints.latest == 1
    assert (copy / "corrupt" / "2" / name).exists()
    shutil.rmtree(copy)


def test_run_goes_on_from_the_checkpoint_before_a_corrupt_one(tmp_path):
  two_saved(tmp_path)
  flip(next((tmp_path / "checkpoints" / "2" / "state" / "d").iterdir()))
  with pytest.warns(CheckpointWarning, match="has changed since"):
    checkpoints = Checkpoints(tmp_path, config=CONFIG)
  found, progress = checkpoints.restore(abstract(state_of(1)))
  assert_same(found, state_of(1))
  assert progress == {"step": 1}
  checkpoints.save(2, state_of(22), {})  # its step can be saved again
  checkpoints.wait()
  assert_same(checkpoints.restore(abstract(found))[0], state_of(22))
  checkpoints.close()


def test_checkpoint_without_manifest_is_passed_over_and_removed(tmp_path):
  two_saved(tmp_path)
  (tmp_path / "checkpoints" / "manifest-2.json").unlink()
  with pytest.warns(CheckpointWarning, match=r"checkpoints/2 .*no manifest"):
    checkpoints = Checkpoints(tmp_path, config=CONFIG)
  assert checkpoints.latest == 1
  checkpoints.save(2, state_of(2), {})
  checkpoints.close()
  assert manifests_in(tmp_path) == [1, 2]


@pytest.mark.parametrize("cut", ["missing", "short"])
def test_missing_or_short_file_is_noticed(tmp_path, cut):
  two_saved(tmp_path)
  for step in (2, 1):  # in the newest, and in one that nobody would read
    path = tmp_path / "checkpoints" / str(step) / "state" / "_METADATA"
    if cut == "missing":
      path.unlink()
    else:
      path.write_bytes(path.read_bytes()[:-1])
  with (
    pytest.warns(CheckpointWarning, match=f"_METADATA (is {cut}|has)"),
    opened(tmp_path) as checkpoints,
  ):
    assert checkpoints.latest is None


def test_deletion_that_was_cut_short_is_finished(tmp_path):
  two_saved(tmp_path)
  (tmp_path / "checkpoints" / "1" / "state" / "_METADATA").unlink()
  with pytest.warns(CheckpointWarning, match="_METADATA is missing"):
    Checkpoints(tmp_path, config=CONFIG).close()
  assert steps_in(tmp_path) == manifests_in(tmp_path) == [2]


def test_leavings_of_a_killed_save_are_cleared(tmp_path):
  two_saved(tmp_path)
  root = tmp_path / "checkpoints"
  (root / "3.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
  shutil.copy(root / "manifest-1.json", root / "manifest-0.json")
  with opened(tmp_path) as checkpoints:
    assert checkpoints.latest == 2
    checkpoints.save(3, state_of(3), {})
  assert sorted(path.name for path in root.iterdir()) == [
    *("2", "3", "manifest-2.json", "manifest-3.json")
  ]


def test_other_configuration_is_refused_with_the_differing_fields(tmp_path):
  two_saved(tmp_path)
  other = {"settings": {"width": 9, "rates": [0.1, 0.2]}, "seed": 1}
  with pytest.raises(ValueError, match="another configuration") as error:
    Checkpoints(tmp_path, config=other)
  lines = str(error.value).splitlines()[1:-1]
  assert [line.strip() for line in lines] == [
    "seed: found nothing, expected 1",
    "settings.width: found 8, expected 9",
    "steps: found 10, expected nothing",
  ]


def test_keeping_one_checkpoint_is_refused(tmp_path):
  with pytest.raises(ValueError, match="keep is 1, expected at least 2"):
    Checkpoints(tmp_path, config=CONFIG, keep=1)


def test_checkpoints_of_something_else_are_refused_and_left(tmp_path):
  saved = tmp_path / "checkpoints" / "100"
  saved.mkdir(parents=True)
  with pytest.raises(ValueError, match=r"\[100\] without a manifest"):
    Checkpoints(tmp_path, config=CONFIG)
  assert saved.exists()


_DEEP = '{"files": {}, "best": 1, "config": {"a": ' + "[" * 10**4


@pytest.mark.parametrize(
  "text",
  [
    *("", "{}", "[1]", _NO_FILES, '{"step": ', "\0\0"),
    '{"files": {}, "best": "much", "config": {}}',
    pytest.param(_DEEP.replace("[", "[" * 20), id="deeper"),
    pytest.param(_DEEP + "]" * 10**4 + "}}", id="deep"),
  ],
)
def test_unreadable_manifest_is_a_fault_of_its_checkpoint(tmp_path, text):
  two_saved(tmp_path)
  (tmp_path / "checkpoints" / "manifest-2.json").write_text(text)
  with (
    pytest.warns(CheckpointWarning, match=r"checkpoints/2 .*manifest cannot"),
    opened(tmp_path) as checkpoints,
  ):
    assert checkpoints.latest == 1
  assert (tmp_path / "corrupt" / "2").exists()


@pytest.mark.parametrize(
  "name", ["²", "٣", "007", "2.old", "40", "manifest-abc.json"]
)
def test_what_is_no_checkpoint_is_left_alone(tmp_path, name):
  two_saved(tmp_path)
  strange = tmp_path / "checkpoints" / name
  if name in ("40", "manifest-abc.json"):
    strange.write_text("{}")
  else:
    strange.mkdir()
  with opened(tmp_path) as checkpoints:
    assert checkpoints.latest == 2
    checkpoints.save(3, state_of(3), {})
  found = load_params(tmp_path, abstract(state_of(3)["params"]))
  assert_same(found, state_of(3)["params"])
  assert strange.exists()


def test_best_is_never_not_a_number_and_on_a_tie_the_latest(tmp_path):
  with opened(tmp_path, keep=4) as checkpoints:
    for step, score in enumerate([0.5, np.nan, 0.5, np.nan], 1):
      checkpoints.save(step, state_of(step), {}, best=score)
  for mode in ("max", "min"):
    params = abstract(state_of(3)["params"])
    found = load_params(tmp_path, params, step="best", best_mode=mode)
    assert_same(found, state_of(3)["params"])


def test_folder_without_checkpoints_is_reported_by_load(tmp_path):
  with pytest.raises(ValueError, match="no checkpoint 'latest'"):
    load_params(tmp_path / "typo", {})


def test_failed_save_is_reported(tmp_path, monkeypatch):
  def fail(*args):
    raise OSError("disk full")

  checkpoints = Checkpoints(tmp_path, config=CONFIG)
  monkeypatch.setattr("ssmjax.training.files.write_json", fail)
  checkpoints.save(1, state_of(1), {})
  with pytest.raises(OSError, match="disk full"):
    checkpoints.wait()
  checkpoints.close()
  assert checkpoints.latest is None


# Of tensorstore, where one of orbax's threads has failed and ended.
@pytest.mark.filterwarnings(
  "ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning"
)
def test_full_disk_is_one_error_that_leaves_the_last_checkpoint(
  tmp_path, caplog
):
  checkpoints = Checkpoints(tmp_path, config=CONFIG)
  checkpoints.save(1, state_of(1), {"step": 1})
  checkpoints.wait()
  state = state_of(2)
  with full_disk():
    checkpoints.save(2, state, {"step": 2})
    with pytest.raises(SaveError) as error:
      checkpoints.wait()
  checkpoints.check()  # told once
  checkpoints.close()
  for part in (
    f"checkpoint of step 2 in {tmp_path} could not be written: File too large",
    *("needs about 0.1 kB; ", "B are free there"),
    f"Checkpoint {tmp_path}/checkpoints/1 is whole: the same command goes on",
  ):
    assert part in str(error.value)
  assert len(traceback.format_exception(error.value)) < 10
  assert not caplog.records
  # Nothing is left of the half, and no warning tells of it.
  assert [p.name for p in (tmp_path / "checkpoints").glob("2*")] == []
  with opened(tmp_path) as checkpoints:
    found, progress = checkpoints.restore(abstract(state))
  assert_same(found, state_of(1))
  assert progress == {"step": 1}


def test_small_file_on_a_full_disk_stays_the_old_one(tmp_path):
  path = tmp_path / "config.json"
  write_atomically(path, b"old")
  with full_disk(), pytest.raises(SaveError, match=r"config.json could not be"):
    write_atomically(path, b"new" * 100)
  assert path.read_bytes() == b"old"
  assert list(tmp_path.iterdir()) == [path]


def test_small_files_are_the_old_or_the_new_one(tmp_path, monkeypatch):
  path = tmp_path / "config.json"
  write_atomically(path, b"old")
  monkeypatch.setattr("os.replace", lambda *_: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    write_atomically(path, b"new")
  assert path.read_bytes() == b"old"


def test_equal_configurations_do_not_differ():
  assert differing_fields(CONFIG, json.loads(json.dumps(CONFIG))) == []
  assert differing_fields({"a": [1, 2]}, {"a": [1, 3]}) == [
    "a: found [1, 2], expected [1, 3]"
  ]


@contextlib.contextmanager
def full_disk(size=100):
  """No file can be longer than `size` bytes: a full disk to those who write."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def opened(folder, **options):
  """Checkpoints as a context manager, for the tests."""
  return contextlib.closing(Checkpoints(folder, config=CONFIG, **options))


def state_of(number):
  """A state with lists, tuples, empty nodes and keys, on eight devices."""
  mesh = data_mesh()
  tree = {
    "params": {"layers": {0: jnp.full((3, 4), 1.0), 1: jnp.arange(4.0)}},
    "opt": (
      optax.MaskedNode(),
      (),
      (jnp.full(5, 0.1), None),
      jnp.asarray(number, jnp.int32),
    ),
    "key": jax.random.key_data(jax.random.key(number)),
    "half": jnp.linspace(0, 1, 7, dtype=jnp.bfloat16),
  }
  put = jax.jit(
    lambda tree: jax.tree.map(lambda x: x + 0, tree),
    out_shardings=jax.NamedSharding(mesh, jax.P()),
  )
  return put(tree)


def abstract(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


def two_saved(folder):
  with opened(folder) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, state_of(step), {"step": step})


def steps_in(folder):
  root = folder / "checkpoints"
  return sorted(int(path.name) for path in root.iterdir() if path.is_dir())


def manifests_in(folder):
  root = folder / "checkpoints"
  return sorted(
    json.loads(path.read_text())["step"] for path in root.glob("manifest-*")
  )


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def assert_same(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
