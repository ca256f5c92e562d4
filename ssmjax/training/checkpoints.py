"""Checkpoints that are whole, verified, and exactly what the run needs.

Layout of a run's folder:

    checkpoints/<step>/               written by orbax, renamed when complete
    checkpoints/manifest-<step>.json  SHA-256 of every file, written last
    corrupt/<step>/                   checkpoints whose files had changed

A checkpoint counts from the moment its manifest stands. Orbax renames a
complete folder into place but does not notice a byte that flips afterwards; the
manifest does.
"""

import hashlib
import json
import logging
import math
import pathlib
import re
import shutil
import threading
import time
import warnings
from typing import Any, Literal

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from ssmjax.training import files


class CheckpointWarning(UserWarning):
  """A checkpoint was passed over."""


class Checkpoints:
  """The checkpoints of one run: the last `keep` and the best.

  Opening the folder clears what a killed run left behind: unfinished
  checkpoints are removed, corrupt ones moved aside, each with a warning, until
  the newest that is whole.
  """

  def __init__(
    self,
    directory: str | pathlib.Path,
    *,
    config: dict,
    keep: int = 2,
    best_mode: Literal["max", "min"] = "max",
    may_change: tuple[str, ...] = (),
  ):
    """Opens or creates `<directory>/checkpoints`.

    Args:
      directory: the run's folder.
      config: what identifies the run, JSON-able; kept in every manifest.
      keep: how many of the latest to keep, at least 2: while one is being
        written, and if one is corrupt, there must be another.
      best_mode: whether a greater or a smaller value is better.
      may_change: fields of `config` that are not compared, as "fit.steps".

    Raises:
      ValueError: `keep` is below 2, or the folder holds checkpoints that
        something else wrote, or the newest belongs to another configuration;
        the differing fields are named.
    """
    if keep < 2:
      raise ValueError(
        f"Checkpoints: keep is {keep}, expected at least 2: one to go back to "
        "while the other is being written."
      )
    self._directory = pathlib.Path(directory).absolute()
    self._root = self._directory / "checkpoints"
    refuse_foreign(self._directory)
    self._root.mkdir(parents=True, exist_ok=True)
    self._config = json.loads(json.dumps(config))
    self._may_change = may_change
    self._sign = 1.0 if best_mode == "max" else -1.0
    if jax.process_index() == 0:
      self._clear()
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("ssmjax_checkpoints_cleared")
    self.latest: int | None = max(_manifests(self._root), default=None)
    self.save_seconds = 0.0  # the longest save so far, for planning a stop
    self._thread: threading.Thread | None = None
    self._error: BaseException | None = None
    self._failed = False  # orbax tells a failed save once more when it closes
    if self.latest is not None:
      self._check_config(self.latest)
    score = lambda metrics: metrics["score"]
    policies = [
      checkpoint_managers.LatestN(keep),
      checkpoint_managers.BestN(get_metric_fn=score, n=1),
    ]
    self._manager = ocp.CheckpointManager(
      self._root,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
        best_fn=score,  # has orbax store the score, so that it outlives us
        save_root_metadata=False,
        cleanup_tmp_directories=True,
      ),
    )

  def save(
    self, step: int, state: Any, progress: dict, *, best: float | None = None
  ) -> None:
    """Starts to save; returns when `state` may be changed or donated.

    Args:
      step: steps done.
      state: a pytree of arrays.
      progress: JSON-able, everything else that the run needs to go on.
      best: the metric by which the best checkpoint is kept, if known.

    Raises:
      SaveError: the disk is full, or this or the save before failed for another
        reason; also raised by `wait`, `check` and `close`.
    """
    self.wait()
    start = time.monotonic()
    if best is not None and math.isnan(best):
      best = None
    score = float("-inf") if best is None else self._sign * best
    self._size = sum(x.nbytes for x in jax.tree.leaves(state))
    _ORBAX_ERRORS.hide()
    if jax.process_count() == 1:
      # Threads of a save that failed earlier in this process may have written
      # on since, and orbax takes no folder that holds something.
      self._remove_unfinished()
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(state),
          progress=ocp.args.JsonSave(progress),
        ),
        metrics={"score": score},
        force=True,
      )
    except Exception as error:
      raise self._failure(step, error) from None
    self._thread = threading.Thread(
      target=self._finish, args=(step, best, start), name="ssmjax_manifest"
    )
    self._thread.start()

  def restore(self, abstract: Any) -> tuple[Any, dict]:
    """Restores the newest checkpoint: (state, progress).

    Args:
      abstract: the state's `jax.ShapeDtypeStruct`s with their shardings.

    Raises:
      ValueError: the checkpoint has other arrays; they are named, and what may
        have made them.
    """
    assert self.latest is not None
    _check_arrays("fit", self.path(self.latest), abstract)
    restored = self._manager.restore(
      self.latest,
      args=ocp.args.Composite(
        state=_restore_args(abstract), progress=ocp.args.JsonRestore()
      ),
    )
    return restored["state"], restored["progress"]

  def wait(self) -> None:
    """Returns when the save in progress is on disk with its manifest."""
    if self._thread is not None:
      self._thread.join()
      self._thread = None
    if self._error is not None:
      error, self._error = self._error, None
      raise error

  def check(self) -> None:
    """Raises if the save in progress has failed already."""
    if self._error is not None:
      self.wait()

  def close(self) -> None:
    """Waits for the save in progress and releases orbax."""
    try:
      self.wait()
    finally:
      try:
        self._manager.close()
      except Exception:
        if not self._failed:
          raise
      if self._failed:  # its threads may have written on until now
        self._remove_unfinished()

  def path(self, step: int) -> pathlib.Path:
    """Gives the folder of a step's checkpoint."""
    return self._root / str(step)

  def _finish(self, step: int, best: float | None, start: float) -> None:
    """Waits for orbax, then writes the manifest; runs in a thread."""
    try:
      self._manager.wait_until_finished()
      if jax.process_index() == 0:
        manifest = {
          "step": step,
          "best": best,
          "config": self._config,
          "files": _digests(self.path(step)),
        }
        files.write_json(_manifest(self._root, step), manifest)
        self._clear_manifests()
      self.latest = step
      self.save_seconds = max(self.save_seconds, time.monotonic() - start)
    except BaseException as error:  # handed to the caller by wait()
      self._error = error
      if isinstance(error, Exception):
        self._error = self._failure(step, error)

  def _failure(self, step: int, error: Exception) -> files.SaveError:
    """Removes what a failed save has left and makes its one error."""
    self._failed = True
    # The others of this save. Their own `join` raises what they have met.
    for thread in threading.enumerate():
      if type(thread).__module__.startswith("orbax"):
        threading.Thread.join(thread, timeout=10)
    self._remove_unfinished()
    back = "There is no checkpoint before it: the run begins anew."
    if self.latest is not None:
      back = (
        f"Checkpoint {self.path(self.latest)} is whole: the same command goes "
        "on from there."
      )
    return files.save_error(
      f"fit: the checkpoint of step {step} in {self._directory} could not be "
      "written",
      self._root,
      error,
      f"{back} Free some space first; a smaller FitConfig.keep takes less.",
      size=self._size,
    )

  def _remove_unfinished(self) -> None:
    """Removes what a failed save left, for it takes space and is no use."""
    if jax.process_index() != 0:
      return
    for path in self._root.iterdir():
      step, _, suffix = path.name.partition(".")
      if not _is_step(step) or not path.is_dir():
        continue
      begun = not suffix and not _manifest(self._root, int(step)).exists()
      if begun or suffix.startswith("orbax-checkpoint-tmp"):
        shutil.rmtree(path, ignore_errors=True)

  def _clear(self) -> None:
    """Removes or moves aside all checkpoints that are not whole."""
    self._clear_manifests()
    whole = False
    for step in sorted(_steps(self._root), reverse=True):
      path = self.path(step)
      # Older ones only need to be there: orbax may have been killed while it
      # deleted one. Their content is verified when they become the newest.
      fault = _fault(self._root, step, read=not whole)
      if fault is None:
        whole = True
        continue
      warnings.warn(
        f"checkpoint {path} is passed over: {fault}.",
        CheckpointWarning,
        stacklevel=5,
      )
      # Below a whole one, a deletion was cut short.
      if fault == _UNFINISHED or (whole and fault != _DAMAGED):
        shutil.rmtree(path)
      else:
        aside = self._directory / "corrupt" / str(step)
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(exist_ok=True)
        path.rename(aside)
      _manifest(self._root, step).unlink(missing_ok=True)

  def _clear_manifests(self) -> None:
    """Removes manifests whose checkpoint orbax has deleted."""
    for step in _manifests(self._root):
      if not self.path(step).exists():
        _manifest(self._root, step).unlink()

  def _check_config(self, step: int) -> None:
    found = read_manifest(self._root, step)["config"]
    refuse_other(self.path(step), found, self._config, self._may_change)


class _OrbaxErrors(logging.Filter):
  """Hides what orbax's threads log of an error that reaches the caller."""

  def hide(self) -> None:
    """From now on, in orbax's logger, which is absl's."""
    logging.getLogger("absl").addFilter(self)  # a second time does nothing

  def filter(self, record: logging.LogRecord) -> bool:
    """Lets all pass but errors that orbax has logged while it saved."""
    return not (record.levelno >= logging.ERROR and "orbax" in record.pathname)


_ORBAX_ERRORS = _OrbaxErrors()


def refuse_foreign(directory: pathlib.Path) -> None:
  """Raises if `<directory>/checkpoints` was written by something else.

  What has no manifest is taken for unfinished and removed, so a folder is only
  opened if it is a run's own: by its `config.json`, or by any manifest.
  """
  root = directory / "checkpoints"
  steps = sorted(_steps(root))
  known = (directory / "config.json").exists() or _manifests(root)
  if steps and not known:
    raise ValueError(
      f"{root} holds the folders {steps} without a manifest, and {directory} "
      "has no config.json: something else wrote them, and a run would remove "
      "them. Choose another folder, or move them elsewhere."
    )


def refuse_other(
  path: Any, found: dict, expected: dict, may_change: tuple[str, ...] = ()
) -> None:
  """Raises if two configurations differ, with the differing fields."""
  lines = [
    line
    for line in files.differing_fields(found, expected)
    if line.partition(":")[0] not in may_change
  ]
  if lines:
    raise ValueError(
      f"{path} belongs to another configuration:\n  "
      + "\n  ".join(lines)
      + "\nRun with the configuration found, or choose another folder."
    )


def read_manifest(root: pathlib.Path, step: int) -> dict:
  """Reads the manifest of a step's checkpoint; ValueError if it is damaged."""
  path = _manifest(root, step)
  found = files.read_json(path)
  if (
    not isinstance(found, dict)
    or not {"best", "config", "files"} <= found.keys()
    or not isinstance(found["files"], dict)
    or not isinstance(found["config"], dict)
    # True is no score, though Python counts it.
    or type(found["best"]) not in (int, float, type(None))
    or not all(
      isinstance(entry, list) and len(entry) == 2
      for entry in found["files"].values()
    )
  ):
    raise ValueError(f"{path} is not a manifest.")
  return found


def load_params(
  directory: str | pathlib.Path,
  abstract: Any,
  *,
  step: int | Literal["latest", "best"] = "latest",
  best_mode: Literal["max", "min"] = "max",
) -> Any:
  """Reads the parameters alone out of a run's checkpoint, after verifying it.

  Args:
    directory: the run's folder.
    abstract: `jax.ShapeDtypeStruct`s of the parameters, seed axis included.
    step: which checkpoint; of equally good ones "best" is the latest.
    best_mode: what "best" means.

  Raises:
    ValueError: there is no such checkpoint, it is not whole, or it has other
      parameters.
  """
  root = pathlib.Path(directory).absolute() / "checkpoints"
  scores: dict[int, float | None] = {}
  for found in sorted(_steps(root)):
    if _manifest(root, found).exists():
      try:
        scores[found] = read_manifest(root, found)["best"]
      except ValueError:
        scores[found] = None  # reported below if this is the one
  known = {
    s: value
    for s, value in scores.items()
    if value is not None and not math.isnan(value)
  }
  chosen: int | None
  if step == "latest":
    chosen = max(scores, default=None)
  elif step == "best":
    sign = 1.0 if best_mode == "max" else -1.0
    chosen = max(known, key=lambda s: (sign * known[s], s), default=None)
  else:
    chosen = step
  if chosen not in scores:
    raise ValueError(
      f"load: {directory} has no checkpoint {step!r}; found the steps "
      f"{sorted(scores)}, with the best metric known at {sorted(known)}."
    )
  fault = _fault(root, chosen, read=True)
  if fault is not None:
    raise ValueError(f"load: checkpoint {root / str(chosen)}: {fault}.")
  item = {"params": abstract}
  _check_arrays("load", root / str(chosen), item)
  with ocp.PyTreeCheckpointer() as checkpointer:
    return checkpointer.restore(
      root / str(chosen) / "state", args=_restore_args(item, partial=True)
    )["params"]


_UNFINISHED = "it has no manifest, so its writing was cut short"
_DAMAGED = "its manifest cannot be read"


def _fault(root: pathlib.Path, step: int, *, read: bool) -> str | None:
  """Says what is wrong with a checkpoint; without `read` by sizes alone."""
  if not _manifest(root, step).exists():
    return _UNFINISHED
  try:
    manifest = read_manifest(root, step)
  except ValueError:
    return _DAMAGED
  for name, (size, digest) in manifest["files"].items():
    path = root / str(step) / name
    if not path.is_file():
      return f"its file {name} is missing"
    if path.stat().st_size != size:
      return f"its file {name} has {path.stat().st_size} bytes, not {size}"
    if read and _digest(path) != digest:
      return f"its file {name} has changed since it was written"
  return None


def _check_arrays(function: str, path: pathlib.Path, abstract: Any) -> None:
  """Raises if a checkpoint's arrays are not those that are asked for."""
  stored = ocp.PyTreeCheckpointHandler().metadata(path / "state").tree
  found = _arrays(stored)
  expected = _arrays(abstract)
  kinds = {name.partition(".")[0] for name in expected}
  names = [
    name
    for name in sorted(found.keys() | expected.keys())
    if name.partition(".")[0] in kinds and found.get(name) != expected.get(name)
  ]
  if not names:
    return
  lines = [
    f"{name}: found {found.get(name, 'nothing')}, expected "
    f"{expected.get(name, 'nothing')}"
    for name in names
  ]
  if len(lines) > 8:
    lines[8:] = [f"and {len(lines) - 8} more"]
  causes = [
    text
    for kind, text in _CAUSES.items()
    if any(name.partition(".")[0] == kind for name in names)
  ]
  raise ValueError(
    f"{function}: {path} has other arrays than are asked for:\n  "
    + "\n  ".join([*lines, ""]).rstrip(" ")
    # Another model makes another optimizer's state as well.
    + causes[0]
  )


_CAUSES = {
  "params": (
    "The model is another one: give the init (and seeds) that the run began "
    "with, or choose another folder."
  ),
  "opt_state": (
    "The optimizer is another one: give the one that the run began with, or "
    "choose another folder; training.load gives the models trained so far."
  ),
  "key": (
    "The random numbers are of another kind: set jax_default_prng_impl as it "
    "was when the run began (JAX's default, 'threefry2x32', has keys of 2 "
    "numbers, 'rbg' of 4), or choose another folder."
  ),
}


def _arrays(tree: Any) -> dict[str, str]:
  """Each array's dtype and shape by its path; nodes without arrays go."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): (
      f"{jnp.dtype(leaf.dtype).name} {list(leaf.shape)}"
    )
    for path, leaf in jax.tree.leaves_with_path(tree)
    if getattr(leaf, "shape", None) is not None
  }


def _steps(root: pathlib.Path) -> list[int]:
  if not root.is_dir():
    return []
  return [
    int(path.name)
    for path in root.iterdir()
    if _is_step(path.name) and path.is_dir()
  ]


def _manifests(root: pathlib.Path) -> list[int]:
  paths = root.glob("manifest-*.json")
  names = [path.stem.removeprefix("manifest-") for path in paths]
  return [int(name) for name in names if _is_step(name)]


def _is_step(name: str) -> bool:
  """True of a number as a checkpoint's name has it: not 007, not ²."""
  return re.fullmatch(r"0|[1-9][0-9]{0,17}", name) is not None


def _manifest(root: pathlib.Path, step: int) -> pathlib.Path:
  return root / f"manifest-{step}.json"


def _digests(folder: pathlib.Path) -> dict[str, list]:
  return {
    path.relative_to(folder).as_posix(): [path.stat().st_size, _digest(path)]
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


def _digest(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _restore_args(abstract: Any, *, partial: bool = False):
  return ocp.args.PyTreeRestore(
    item=abstract,
    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
    partial_restore=partial,
  )
