"""What a run tells: lines of metrics, a bar, and what is not finite."""

import collections
import contextlib
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ssmjax.training import sharding, sources
from ssmjax.training.checkpoints import Checkpoints
from ssmjax.training.config import FitConfig
from ssmjax.training.metrics import MetricsLog, Progress, Sums


class NonFiniteError(FloatingPointError):
  """Loss, weight or gradient not finite; names step, batch, checkpoint."""


class Report:
  """Reads the metrics of dispatches and makes lines of them.

  One dispatch stays in flight while the one before it is read.

  Attributes:
    sums: what has been read since the last line.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    config: FitConfig,
    source: sources.StreamSource | sources.IteratorSource,
    checkpoints: Checkpoints,
    *,
    step: int,
    sums: Sums,
    on_metrics: Callable[[dict[str, Any]], None] | None,
  ):
    """Opens the folder's files and cuts them back to `step`."""
    self.sums = sums
    self._config, self._source = config, source
    self._checkpoints = checkpoints
    self._log = MetricsLog(
      directory, step, tensorboard=config.tensorboard, on_metrics=on_metrics
    )
    self._bar = Progress(step, config.steps, show=config.progress)
    self._pending: collections.deque = collections.deque()
    self._shapes: dict = {}
    self._made = 0  # tokens of all seeds since the last line
    self._clock = time.monotonic()

  def say(self, text: str) -> None:
    """Prints a line without breaking the bar."""
    self._bar.say(text)

  def begin(self, abstract: Any, mesh: Mesh) -> None:
    """Says, if progress is shown, what is trained and on what."""
    params = jax.tree.leaves(abstract.params)
    seeds = len(self._config.seeds)
    size = sum(math.prod(x.shape) for x in params) // seeds
    total = sum(math.prod(x.shape) * x.dtype.itemsize for x in params)
    each = f" for each of {seeds} seeds" if seeds > 1 else ""
    self._bar.announce(
      f"Parameters: {size:,}{each}, {total / 1e6:,.1f} MB in all."
    )
    kind = mesh.devices.flat[0].device_kind
    self._bar.announce(
      f"Devices: {mesh.size} × {kind}, {mesh.shape[sharding.AXIS]} to divide a "
      "batch."
    )
    self._bar.announce(f"Data: {self._source.description}.")

  @contextlib.contextmanager
  def compiling(self, run: sources.Run) -> Iterator[None]:
    """Says, if progress is shown, that a new program is compiled."""
    if self._config.progress:
      leaves = jax.tree.leaves_with_path(self._shapes_of(run))
      shapes = ", ".join(
        f"{jax.tree_util.keystr(path, simple=True, separator='.')} "
        f"{x.dtype.name} {list(x.shape)}"
        for path, x in leaves
      )
      steps = f"{run.steps} steps" if run.steps > 1 else "one step"
      self._bar.announce(f"Compiling the step, {steps} a call: {shapes}.")
    start = time.monotonic()
    yield
    seconds = time.monotonic() - start
    self._bar.announce(f"Compiled in {seconds:.1f} s.")

  def add(self, run: sources.Run, metrics: dict) -> None:
    """Takes a dispatch's metrics, and reads the one's before."""
    self._pending.append((run, metrics))
    self.drain(1)

  def line_due(self, step: int) -> None:
    """Writes a line once all dispatches up to `step` are read."""
    self._pending.append(step)
    self.drain(1)

  def rest(self, step: int) -> None:
    """Writes what no line has yet."""
    if self.sums:
      self._write_line(step)

  def evaluated(self, step: int, metrics: list[dict]) -> None:
    """Writes an evaluation, which has each seed's metrics."""
    self._log.write(step, "evaluate", self._config.seeds, metrics)

  def sync(self) -> None:
    """Returns when all lines are on disk."""
    self._log.sync()

  def close(self) -> None:
    """Closes the bar and the files."""
    self._bar.close()
    self._log.close()

  @contextlib.contextmanager
  def clock_stopped(self) -> Iterator[None]:
    """Leaves out of a line's seconds what is no training."""
    start = time.monotonic()
    yield
    self._clock += time.monotonic() - start

  def drain(self, leave: int = 0) -> None:
    """Reads pending metrics until `leave` dispatches are left in flight."""
    pending = self._pending
    in_flight = sum(isinstance(entry, tuple) for entry in pending)
    while pending:
      entry = pending[0]
      if isinstance(entry, tuple):
        if in_flight <= leave:
          return
        in_flight -= 1
        run, metrics = entry
        metrics = {k: np.asarray(v) for k, v in jax.device_get(metrics).items()}
        self._check_finite(run, metrics)
        self.sums.add(metrics)
        self._count(run)
      else:
        self._write_line(entry)
      pending.popleft()

  def _count(self, run: sources.Run) -> None:
    tokens = sources.count_tokens(self._shapes_of(run))
    self._made += run.steps * len(self._config.seeds) * tokens

  def _shapes_of(self, run: sources.Run) -> Any:
    if run.kind not in self._shapes:
      self._shapes[run.kind] = self._source.shapes(run)
    return self._shapes[run.kind]

  def _write_line(self, at: int) -> None:
    now = time.monotonic()
    seconds, self._clock = now - self._clock, now
    means = self.sums.means()
    for values in means:
      values["seconds"] = seconds
      values["tokens_per_second"] = self._made / seconds if seconds else 0.0
    self._log.write(at, "train", self._config.seeds, means)
    self._bar.update(at, means)
    self.sums, self._made = Sums(), 0

  def _check_finite(self, run: sources.Run, metrics: dict) -> None:
    """Raises for the first step whose gradient means nothing."""
    total, weight = np.moveaxis(metrics["loss"], -1, 0)
    # The gradient comes last: it is NaN too where one of the others is.
    for name, values, negative in (
      ("loss", total, False),
      ("the loss's total weight", weight, weight < 0),
      ("grad_norm", metrics["grad_norm"][..., 0], False),
    ):
      bad = np.argwhere(~np.isfinite(values) | negative)
      if not len(bad):
        continue
      offset, index = map(int, bad[0])
      value = values[offset, index]
      at, seed = run.first + offset, self._config.seeds[index]
      text = (
        f"fit: {name} is {value} at step {at} (seed {seed}, batch "
        f"{self._source.name(at, seed)}); "
      )
      if value < 0:
        raise ValueError(
          text
          + f"expected at least 0 (loss: {total[offset, index]}). Have the "
          "loss return a sum and the sum of its weights, none below 0."
        )
      self._checkpoints.wait()
      latest = self._checkpoints.latest
      back = (
        f"checkpoint {self._checkpoints.path(latest)}"
        if latest is not None
        else "the start: there is no checkpoint yet"
      )
      raise NonFiniteError(text + f"go back to {back}.")
