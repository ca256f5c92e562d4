"""The subjects that a command line asks for, trained, measured, reported."""

import dataclasses
import functools
import json
import pathlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments import lm, lm_runs, lm_settings
from experiments.subjects import Init, Subject, checkpoints, collect, fresh

__all__ = ["changed", "chosen", "run", "train"]

# Attention has no Δ, which is what the other initialisation changes most.
_MAMBA: tuple[Init, ...] = ("mamba",)

# Less does not make a figure.
_LEAST = {"length": 64, "probes": 2}


def changed(command: str, made: Any, arguments: Any) -> Any:
  """Give a preset with what the command line changes of it.

  Args:
    command: for messages.
    made: the preset, a dataclass.
    arguments: of the command line; None is no change.

  Raises:
    SystemExit: an argument does not fit.
  """
  given = {}
  for field in dataclasses.fields(made):
    value = getattr(arguments, field.name, None)
    if value is None or field.name == "trained":
      continue
    if isinstance(value, tuple) and not value:
      raise SystemExit(f"{command}: {field.name} is empty, expected some.")
    if isinstance(value, int) and value < _LEAST.get(field.name, 1):
      raise SystemExit(
        f"{command}: {field.name} is {value}, expected"
        f" {_LEAST.get(field.name, 1)} or more."
      )
    if field.name == "sizes":
      value = tuple(_size(command, text) for text in value)
    if field.name == "kinds":
      unknown = [kind for kind in value if kind not in lm_settings.KINDS]
      if unknown:
        raise SystemExit(
          f"{command}: kinds has {unknown[0]!r}, expected some of"
          f" {', '.join(lm_settings.KINDS)}."
        )
    if field.name == "seeds" and not all(0 <= seed < 2**32 for seed in value):
      raise SystemExit(
        f"{command}: seeds is {value}, expected numbers from 0 to {2**32 - 1}."
      )
    given[field.name] = value
  return dataclasses.replace(made, **given)


def chosen(made: Any, arguments: Any) -> tuple[Subject, ...]:
  """Give the models to look at; train those that are missing.

  Args:
    made: with `sizes`, `kinds`, `inits`, `seeds` and `trained`.
    arguments: with `checkpoints`, `data`, and `trained` if there are some.

  Raises:
    ValueError: a folder is no run, or a text cannot be read.
  """
  if arguments.checkpoints:
    return checkpoints(arguments.checkpoints)
  text = None if arguments.data is None else str(arguments.data)
  found = [
    fresh(kind, layers, width, init, seed=seed, text=text)
    for kind in made.kinds
    for init in (_MAMBA if kind == "attention" else made.inits)
    for layers, width in made.sizes
    for seed in made.seeds
  ]
  if made.trained:
    found += train("cpu", made.trained, arguments.trained, text)
  return tuple(found)


def train(
  preset: str,
  rows: tuple[str, ...],
  out: pathlib.Path,
  text: str | None = None,
) -> tuple[Subject, ...]:
  """Train what is not trained yet, as `experiments.lm` does; give all steps.

  A run that is there is taken, one that was stopped goes on.

  Args:
    preset: of `experiments.lm`.
    rows: of its rows.
    out: its folder, which both commands may share.
    text: file or folder; None for the standard library's sources.

  Raises:
    ValueError: a folder holds another run, or there is too little text.
  """
  made = lm_settings.setting(
    preset, rows=rows, text={} if text is None else {"data": text}
  )
  words = lm_runs.read_text(made.text)
  for row in made.rows:
    path = lm_settings.result_file(out, row, 0)
    identity = lm_settings.identity(made, row, words, 0)
    # The result is written last.
    if path.exists() and json.loads(path.read_text())["setting"] == identity:
      continue
    lm.run_row(made, row, words, 0, out)
  return checkpoints([lm_settings.run_folder(out, row, 0) for row in made.rows])


def _size(command: str, text: str) -> tuple[int, int]:
  layers, _, width = text.partition("x")
  if not (layers.isdigit() and width.isdigit() and int(layers) and int(width)):
    raise SystemExit(
      f"{command}: sizes has {text!r}, expected <layers>x<width>, as 8x64."
    )
  return int(layers), int(width)


def run(
  command: str,
  presets: Mapping[str, Any],
  arguments: Any,
  fields: Sequence[str],
  measure: Callable[..., Any],
  report: types.ModuleType,
) -> int:
  """Run one of the figures' commands: measure what is missing, then report.

  Args:
    command: its name, for messages and its folder under runs.
    presets: by name.
    arguments: of the command line.
    fields: of a preset, which its results depend on.
    measure: `(preset, subject, tokens)` to what is known of a model.
    report: the module that writes results and draws from them.

  Returns:
    The exit status.
  """
  made = changed(command, presets[arguments.preset], arguments)
  out = arguments.out or pathlib.Path("runs", command, arguments.preset)
  if not arguments.report_only:
    setting = {name: getattr(made, name) for name in fields}
    try:
      results = collect(
        chosen(made, arguments), functools.partial(measure, made), setting, out
      )
    except (ValueError, OSError, ImportError) as error:
      raise SystemExit(f"{command}: {error}") from error
    report.write_results(out, setting, results)
  report.report(out)
  return 0
