"""Spectra of decays recorded while a model is trained."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssmjax.diagnostics.spectra import Spectrum, cumulative_share, spectrum
from ssmjax.types import Recurrence

__all__ = ["SpectrumRecorder", "summarise"]

GRID = np.linspace(0, 1, 21, dtype=np.float32)


class SpectrumRecorder:
  """A hook of the training loop that writes how decays develop.

  Called as `hook(step, models)` at the boundaries of a run; `models()` gives
  the models and is called only when a record is due. Where there is no
  recorder nothing is computed or compiled: it costs nothing when off.

  >>> recorder = SpectrumRecorder(lambda model: {}, every=100)
  >>> recorder(50, lambda: (None,)); recorder.records
  []
  """

  def __init__(
    self,
    recurrences: Callable[[Any], Mapping[str, Recurrence]],
    *,
    every: int,
    path: Any = None,
  ):
    """Say what to record.

    Args:
      recurrences: from a model to its layers' recurrences by name, on some
        fixed input. It is jitted with the model as its argument.
      every: steps between two records; best a multiple of the run's own
        intervals, on whose grid hooks are called.
      path: a file of JSON lines; None keeps them in `records` only. A run
        that goes on cuts the file back to what it had when it was saved, so
        that no step is there twice.

    Raises:
      ValueError: `every` is not positive.
    """
    if every < 1:
      raise ValueError(
        f"SpectrumRecorder: every is {every}, expected 1 or more."
      )
    self.records: list[dict[str, Any]] = []
    self._every = every
    self._path = None if path is None else pathlib.Path(path)
    self._opened = False
    self._spectra = jax.jit(
      lambda model: {
        name: spectrum(r) for name, r in recurrences(model).items()
      }
    )

  def __call__(self, step: int, models: Callable[[], tuple[Any, ...]]) -> None:
    """Record, if the step is a multiple of `every`."""
    if step % self._every:
      return
    new = []
    for index, model in enumerate(models()):
      for name, found in jax.device_get(self._spectra(model)).items():
        record = {"step": step, "model": index, "layer": name}
        new.append(record | summarise(found))
    self.records += new
    if self._path is not None and jax.process_index() == 0:
      self._append(step, new)

  def _append(self, step, records):
    kept = []
    if not self._opened and self._path.exists():
      lines = self._path.read_text().splitlines()
      kept = [line for line in lines if _step_of(line) < step]
    mode = "a" if self._opened else "w"
    self._path.parent.mkdir(parents=True, exist_ok=True)
    with open(self._path, mode) as file:
      for line in [*kept, *map(json.dumps, records)]:
        file.write(line + "\n")
    self._opened = True


def summarise(found: Spectrum) -> dict[str, Any]:
  """Give a spectrum as numbers and lists that JSON can hold.

  Args:
    found: of one layer.

  Returns:
    `a_min`, `a_max`, `spread_mean`, `token_spread_mean`; the histogram; on
    `grid` the cumulative shares of a_min, a_max and spread (Fig. 6); the
    shares above and below `thresholds`; quartiles of the memory in tokens,
    None where infinite, and the share of the states whose memory is.
  """
  memory = np.asarray(found.memory).ravel()
  # By rank: between a finite and an infinite one there is nothing to average.
  quartiles = np.quantile(memory, (0.25, 0.5, 0.75), method="lower")
  grid = jnp.asarray(GRID)
  listed = lambda v: [round(float(n), 6) for n in np.ravel(v)]
  shares = lambda v: listed(cumulative_share(jnp.asarray(v), grid))
  return {
    "a_min": float(np.min(found.a_min)),
    "a_max": float(np.max(found.a_max)),
    "spread_mean": float(np.mean(found.spread)),
    "token_spread_mean": float(np.mean(found.token_spread)),
    "histogram": listed(found.histogram),
    "grid": listed(GRID),
    "a_min_cumulative": shares(found.a_min),
    "a_max_cumulative": shares(found.a_max),
    "spread_cumulative": shares(found.spread),
    "thresholds": listed(found.thresholds),
    "share_above": listed(found.share_above),
    "share_below": listed(found.share_below),
    "memory_quartiles": [
      float(n) if np.isfinite(n) else None for n in quartiles
    ],
    "memory_infinite": float(np.isinf(memory).mean()),
  }


def _step_of(line):
  """The step of a line; one cut short by a crash counts as never written."""
  try:
    return json.loads(line)["step"]
  except (ValueError, KeyError):
    return float("inf")
