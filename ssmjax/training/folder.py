"""A run's folder, which belongs to one configuration, and when to stop."""

import contextlib
import fcntl
import json
import os
import pathlib
import platform
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from ssmjax.training import checkpoints, files
from ssmjax.training.determinism import ensure_deterministic

_VERSIONS = ("jax", "jaxlib", "flax", "optax", "ssmjax")


class RunFolder:
  """Holds the folder for one process at a time and one configuration.

  Attributes:
    identity: the configuration, as JSON gives it back.
    exact: whether a resume here is exact to the bit.
    environment: the devices and versions that it runs with.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    identity: dict,
    mesh: Mesh,
    may_change: tuple[str, ...] = (),
  ):
    self.identity = json.loads(json.dumps(identity))
    self.exact = ensure_deterministic()
    self._directory = directory
    self._may_change = may_change
    device = mesh.devices.flat[0]
    self.environment: dict[str, Any] = {
      "devices": f"{mesh.size} × {device.device_kind}",
      "versions": {name: _version(name) for name in _VERSIONS},
    }
    if device.platform == "cpu":  # its sums depend on both
      self.environment["cpu"] = f"{_cores()} cores of {_cpu_model()}"

  def __enter__(self) -> "RunFolder":
    """Locks the folder, then checks or writes `config.json`."""
    self._lock = contextlib.ExitStack()
    if jax.process_index() == 0:
      self._directory.mkdir(parents=True, exist_ok=True)
      file = self._lock.enter_context(open(self._directory / ".lock", "w"))
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        self._lock.close()
        raise ValueError(
          f"fit: another process trains in {self._directory}; wait for it or "
          "choose another folder."
        ) from None
      except OSError:
        pass  # a file system without locks
      try:
        self._check_config()
      except BaseException:
        self._lock.close()
        raise
    return self

  def __exit__(self, *exception) -> None:
    self._lock.close()

  def _check_config(self) -> None:
    path = self._directory / "config.json"
    if not path.exists():
      checkpoints.refuse_foreign(self._directory)
      files.write_json(
        path, {"config": self.identity, "environment": self.environment}
      )
      return
    found = _read_config(path)
    checkpoints.refuse_other(
      path, found["config"], self.identity, self._may_change
    )
    if found["config"] != self.identity:  # in what may change
      files.write_json(path, found | {"config": self.identity})
    lines = files.differing_fields(found["environment"], self.environment)
    if lines:
      warnings.warn(
        f"{self._directory} was begun elsewhere; the run goes on but is not "
        "bit-identical to one that never stopped:\n  " + "\n  ".join(lines),
        stacklevel=5,
      )


def _version(name: str) -> str:
  try:
    return metadata.version(name)
  except metadata.PackageNotFoundError:  # a clone on the path, say
    return "not installed"


def _cores() -> int:
  """The cores that this process may use, where the system says."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _cpu_model() -> str:
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    lines = []
  for line in lines:
    if line.startswith("model name"):
      return line.partition(":")[2].strip()
  return platform.processor() or platform.machine()


def _read_config(path: pathlib.Path) -> dict:
  try:
    found = files.read_json(path)
    if all(isinstance(found[k], dict) for k in ("config", "environment")):
      return found
    fault = "it has other fields"
  except (ValueError, KeyError, TypeError) as error:
    fault = f"{type(error).__name__}: {error}"
  raise ValueError(
    f"{path} cannot be read as the configuration of a run ({fault}). If a run "
    "of fit made this folder, delete the file and run again: it is written "
    "anew, and the checkpoints hold the configuration too. Otherwise choose "
    "another folder."
  )


class StopRequest:
  """Signals and the clock: whether the run should stop at a boundary.

  SIGTERM and the first Ctrl-C (SIGINT) let the run finish its cell and save;
  the second Ctrl-C stops at once.

  A cell's time is what it took lately, at its longest; since dispatches run
  ahead of the host by one, three of them are kept in reserve for the last save.
  What has not run yet is taken to compile, and then to last like a cell.
  """

  _REASONS = (None, "minutes", "sigint", "sigterm")  # the last one prevails

  def __init__(self, minutes: float | None):
    self._end = None
    if minutes is not None:
      self._end = time.monotonic() + 60 * minutes
    self._signals: set[str] = set()
    self._recent: dict[str, list[float]] = {}

  def __enter__(self) -> "StopRequest":
    # Python takes signals in the main thread only.
    self._old = {}
    if threading.current_thread() is threading.main_thread():
      self._old[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._terminate)
      # Ignored in the background of a shell, and to stay so.
      if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        self._old[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
    return self

  def __exit__(self, *exception) -> None:
    for number, old in self._old.items():
      if old is not None:  # None: not installed from Python
        signal.signal(number, old)

  @contextlib.contextmanager
  def timed(self, name: str) -> Iterator["_Timing"]:
    """Remembers how long something took."""
    timing = _Timing(name)
    start = time.monotonic()
    yield timing
    recent = self._recent.setdefault(timing.name, [])
    recent.append(time.monotonic() - start)
    del recent[:-20]

  def reason(self, due: list[str], save_seconds: float) -> str | None:
    """Says why to stop now, given what is due before the next chance to."""
    reserve = 1.0 + 2 * save_seconds
    # The first cell compiles; until another has run, it stands for all.
    unknown = sum(max(self._recent.get(n, [0.0])) for n in ("compile", "cell"))
    for name in due:
      times = 3 if name == "cell" and "cell" in self._recent else 1
      reserve += times * max(self._recent.get(name, [unknown]))
    late = self._end is not None and time.monotonic() + reserve > self._end
    own = self._signals | ({"minutes"} if late else set())
    ranks = [self._REASONS.index(reason) for reason in own]
    return self._REASONS[_greatest(max(ranks, default=0))]

  def _terminate(self, *_) -> None:
    self._signals.add("sigterm")

  def _interrupt(self, *_) -> None:
    if "sigint" in self._signals:
      raise KeyboardInterrupt
    self._signals.add("sigint")
    with contextlib.suppress(RuntimeError):  # the signal came while printing
      print(
        "\nCtrl-C: the run stops and saves at the next boundary; a second "
        "Ctrl-C stops it at once.",
        file=sys.stderr,
        flush=True,
      )


class _Timing:
  def __init__(self, name: str):
    self.name = name


def _greatest(value: int) -> int:
  """Over all processes, which must stop at the same boundary."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.process_allgather(np.asarray(value)).max())
