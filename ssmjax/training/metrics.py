"""Metrics: sums into means, JSON lines, TensorBoard events, a progress bar."""

import contextlib
import json
import os
import pathlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from ssmjax.training import files

# The fields of a line that differ from run to run: the seconds of training
# since the line before, without evaluation and saving (the first line's, and
# any other's with a new program, hold its compilation), and all seeds' tokens
# in them.
WALL_CLOCK = ("seconds", "tokens_per_second")
# What a line has of its own beside metrics.
_FIELDS = ("step", "event", "seed", *WALL_CLOCK)


def check_names(
  source: str, names: Iterable[str], taken: Iterable[str] = ()
) -> None:
  """Raises if a metric would overwrite a field that a line has of its own.

  Args:
    source: what gives the metrics: "the loss".
    names: the metrics' names.
    taken: further names that are in use.
  """
  fields = (*taken, *_FIELDS)
  for name in sorted(set(fields).intersection(names)):
    raise ValueError(
      f"fit: {source} returns a metric named {name!r}, which is taken; a line "
      f"of metrics has the fields {', '.join(fields)} of its own. Give the "
      "metric another name."
    )


class Sums:
  """Adds up (sum, weight) of each metric and seed since the last line.

  Held in float64 and as JSON in checkpoints, so that a line whose steps lie
  on both sides of a resume is the same to the bit.
  """

  def __init__(self, values: dict[str, list] | None = None):
    self._values = {
      name: np.asarray(pairs) for name, pairs in (values or {}).items()
    }

  def __bool__(self) -> bool:
    return bool(self._values)

  def add(self, metrics: dict[str, np.ndarray]) -> None:
    """Adds arrays `[steps, S, 2]`."""
    for name, pairs in metrics.items():
      total = pairs.astype(np.float64).sum(axis=0)
      self._values[name] = self._values.get(name, 0.0) + total

  def means(self) -> list[dict[str, float]]:
    """Gives each seed's means, in the order of names."""
    seeds = len(next(iter(self._values.values()), ()))
    with np.errstate(invalid="ignore", divide="ignore"):
      means = {n: p[:, 0] / p[:, 1] for n, p in sorted(self._values.items())}
    return [{n: float(m[i]) for n, m in means.items()} for i in range(seeds)]

  def to_json(self) -> dict[str, list]:
    """Gives what `Sums(...)` takes."""
    return {name: pairs.tolist() for name, pairs in self._values.items()}


class MetricsLog:
  """Writes `metrics.jsonl` and TensorBoard events; only process 0 writes.

  A line is `{"step", "event", "seed", <metric>: value, ...}`, one per seed.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    step: int,
    *,
    tensorboard: bool = False,
    on_metrics: Callable[[dict[str, Any]], None] | None = None,
  ):
    """Opens the folder's files and cuts them back to `step`.

    Args:
      directory: the run's folder.
      step: steps done.
      tensorboard: write events.
      on_metrics: is given every line once it is written.
    """
    self._on_metrics = on_metrics
    self._writes = jax.process_index() == 0
    self._broken = False
    if not self._writes:
      return
    self._events = _event_writer(directory, step) if tensorboard else None
    self._path = path = directory / "metrics.jsonl"
    kept = [line for line in _lines(path) if line["step"] <= step]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    files.write_atomically(path, text.encode())
    self._file = open(path, "a")  # noqa: SIM115 (closed by close())

  def write(
    self, step: int, event: str, seeds: Iterable[int], metrics: list[dict]
  ) -> None:
    """Writes one line per seed."""
    if not self._writes:
      return
    several = len(metrics) > 1
    lines = []
    with self._writing(f"the metrics of step {step}"):
      for seed, values in zip(seeds, metrics, strict=True):
        line = {"step": step, "event": event, "seed": seed}
        line |= {name: _finite(value) for name, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        lines.append(line)
        if self._events is not None:
          prefix = f"{event}/seed_{seed}/" if several else f"{event}/"
          for name, value in values.items():
            self._events.add_scalar(prefix + name, value, step)
      self._file.flush()
    if self._on_metrics is not None:
      for line in lines:
        self._on_metrics(line)

  def sync(self) -> None:
    """Returns when all lines are on disk: before a checkpoint counts."""
    if self._writes:
      with self._writing("metrics"):
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._events is not None:
          self._events.flush()

  def close(self) -> None:
    """Closes the files."""
    if self._writes:
      with self._writing("metrics"):
        self._file.close()
        if self._events is not None:
          self._events.close()

  @contextlib.contextmanager
  def _writing(self, what: str) -> Iterator[None]:
    """Makes one error of the first write that fails, and none of the others."""
    try:
      yield
    except OSError as error:
      if self._broken:
        return
      self._broken = True
      raise files.save_error(
        f"fit: {what} could not be written to {self._path}",
        self._path.parent,
        error,
        "Free some space and run the same command again: it goes on from the "
        "latest checkpoint, if there is one.",
      ) from error.__cause__


def read_metrics(
  directory: str | os.PathLike, *, wall_clock: bool = True
) -> list[dict[str, Any]]:
  """Reads the lines of a run's `metrics.jsonl`.

  Args:
    directory: the run's folder.
    wall_clock: keep the fields that differ from run to run.
  """
  lines = _lines(pathlib.Path(directory) / "metrics.jsonl")
  drop = () if wall_clock else WALL_CLOCK
  return [{k: v for k, v in line.items() if k not in drop} for line in lines]


class Progress:
  """A bar by tqdm (terminal or notebook), or plain lines without it."""

  def __init__(self, step: int, steps: int, *, show: bool):
    self._bar = None
    self._show = show and jax.process_index() == 0
    self._steps = steps
    self._start = (time.monotonic(), step)
    if not self._show:
      return
    try:
      from tqdm import auto
    except ImportError:
      return
    self._bar = auto.tqdm(total=steps, initial=step, unit="step")

  def update(self, step: int, metrics: list[dict]) -> None:
    """Shows the step and the seeds' mean loss, accuracies and tokens/s."""
    if not self._show:
      return
    shown = {
      name: f"{np.mean([values[name] for values in metrics]):.4g}"
      for name in metrics[0]
      if name in ("loss", "tokens_per_second") or "accuracy" in name
    }
    if "tokens_per_second" in shown:
      shown["tokens/s"] = shown.pop("tokens_per_second")
    if self._bar is not None:
      self._bar.set_postfix(shown, refresh=False)
      self._bar.update(step - self._bar.n)
      return
    start, first = self._start
    left = (time.monotonic() - start) / max(step - first, 1)
    left *= self._steps - step
    text = " ".join(f"{name} {value}" for name, value in shown.items())
    print(f"step {step}/{self._steps} {text} left {left:.0f} s", flush=True)

  def announce(self, text: str) -> None:
    """Prints a line if progress is shown."""
    if self._show:
      self.say(text)

  def say(self, text: str) -> None:
    """Prints a line without breaking the bar."""
    if jax.process_index() != 0:
      return
    if self._bar is not None:
      self._bar.write(text)
    else:
      print(text, flush=True)

  def close(self) -> None:
    """Leaves the bar as it stands."""
    if self._bar is not None:
      self._bar.close()


def _lines(path: pathlib.Path) -> list[dict]:
  """The file's whole lines; a kill may have left half of the last one."""
  if not path.exists():
    return []
  whole, _, _ = path.read_bytes().rpartition(b"\n")
  lines = []
  for number, text in enumerate(whole.split(b"\n") if whole else (), 1):
    try:
      line = json.loads(text.decode())
      if not isinstance(line["step"], int):
        raise TypeError("step is not a number")
    except (ValueError, KeyError, TypeError, RecursionError):
      warnings.warn(
        f"{path}: line {number} is damaged and is left out.", stacklevel=3
      )
    else:
      lines.append(line)
  return lines


def _event_writer(directory: pathlib.Path, step: int):
  try:
    import tensorboardX
  except ImportError:
    raise ImportError(
      "fit: FitConfig.tensorboard needs tensorboardX, which is not installed: "
      "pip install tensorboardX, or leave it False (metrics.jsonl has all)."
    ) from None
  # Events after `step` come from a run that was killed: hide them.
  return tensorboardX.SummaryWriter(str(directory), purge_step=step + 1)


def _finite(value: float) -> float | None:
  """JSON has no NaN: a mean over nothing is null."""
  return float(value) if np.isfinite(value) else None
