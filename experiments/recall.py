"""Does polarization help recall? Table 2/5 of Wang et al. 2025.

Claim: on multi-query associative recall a Mamba whose first channel has decay
1 and whose last has decay 0 recalls more pairs than the default one, the more
so the more pairs there are and the deeper the model.

Commands::

  python -m experiments.recall                      # preset cpu: minutes
  python -m experiments.recall --preset smoke       # under a minute
  python -m experiments.recall --preset paper --rows both-4 --minutes 60

Cost: preset cpu, at most 8 minutes on 2 cores; preset paper, 150,528 steps of
128 sequences of up to 1024 tokens a row, in pieces of any length: every row is
a run of its own that goes on where it stopped, and a finished row is not run
again. Expected at full scale (their Table 2/5, per cent at 64, 128 and 256
pairs): default-2 98/82/36, both-2 99/96/55, both-4 100/99/82.
"""

import dataclasses
import functools
import json
import os
import pathlib
import time
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from experiments import recall_report
from experiments.recall_settings import Row, Setting, model_config, setting
from experiments.results import provenance, write_json
from ssmjax import data, models, training

# Test sets are drawn from a seed that no training run has.
_TEST_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Arguments:
  """Train the rows of the recall table and report them.

  Attributes:
    preset: smoke (under a minute), cpu (minutes, toy scale), paper (Table 2/5
      exactly), paper-short (its models, a few epochs).
    out: folder for runs, results, table and plot; by default
      runs/recall-<preset>, with mix and initialisation for the paper presets.
    rows: train and report these rows only.
    seeds: one run each; all seeds of a row are trained at once.
    seeds_at_once: at most so many (0: all), where memory is short.
    init: another initialisation than the preset's (paper presets: authors).
    mix: training data of the paper presets, as in the text or in the code.
    epochs: of the paper presets.
    minutes: stop in time for a last save; the same command goes on.
    devices: CPU devices to divide batches over (0: the cores, at most 8).
    report_only: draw table and plot from the results that are there.
  """

  preset: Literal["smoke", "cpu", "paper", "paper-short"] = "cpu"
  out: pathlib.Path | None = None
  rows: tuple[str, ...] | None = None
  seeds: tuple[int, ...] = (0,)
  seeds_at_once: int = 0
  init: Literal["mamba", "authors"] | None = None
  mix: Literal["paper", "authors"] = "authors"
  epochs: int | None = None
  minutes: float | None = None
  devices: int = 0
  report_only: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def main(arguments: Arguments) -> int:
  """Run what is missing, then report. Returns the exit status."""
  started = time.monotonic()
  made = setting(
    arguments.preset,
    init=arguments.init,
    mix=arguments.mix,
    epochs=arguments.epochs,
  )
  out = arguments.out or _default_out(arguments, made)
  rows = _chosen(made, arguments.rows)
  if not arguments.report_only:
    at_once = arguments.seeds_at_once or len(arguments.seeds)
    groups = [
      arguments.seeds[first : first + at_once]
      for first in range(0, len(arguments.seeds), at_once)
    ]
    for row in rows:
      for seeds in groups:
        left = None
        if arguments.minutes is not None:
          left = arguments.minutes - (time.monotonic() - started) / 60
        if not run_row(made, row, seeds, out, minutes=left):
          print("Not finished: the same command goes on from here.")
          recall_report.report(out, made, arguments.preset)
          return 0
  recall_report.report(out, made, arguments.preset)
  return 0


def run_row(
  made: Setting,
  row: Row,
  seeds: tuple[int, ...],
  out: pathlib.Path,
  *,
  minutes: float | None = None,
) -> bool:
  """Train one row for some seeds, or go on with it; True once finished.

  Writes `<out>/<row>/seeds-…/`: the run's checkpoints and metrics, and at the
  end `result.json` with accuracies by pairs and by distance.
  """
  folder = out / row.name / f"seeds-{'-'.join(map(str, seeds))}"
  result_file = folder / "result.json"
  identity = _identity(made, row)
  if result_file.exists():
    found = json.loads(result_file.read_text())
    if found["setting"] == identity:
      return True
  if minutes is not None and minutes <= 0:
    return False
  started = time.monotonic()
  config = model_config(made, row)
  stream = data.RecallStream(
    made.train,
    made.batch_size,
    order=made.order,
    fresh=made.fresh,
    run_length=made.steps_per_dispatch if made.order == "shuffled" else 1,
  )
  fit_config = training.FitConfig(
    steps=made.steps,
    seeds=seeds,
    steps_per_dispatch=made.steps_per_dispatch,
    log_every=made.steps_per_dispatch * 5,
    evaluate_every=made.evaluate_every,
    save_every=made.save_every,
    best="accuracy",
    stop_above=made.stop_above,
    minutes=minutes,
  )
  print(f"\n{row.name}, seeds {', '.join(map(str, seeds))} ({made.label})")
  result = training.fit(
    lambda seed: models.LanguageModel(config, rngs=nnx.Rngs(seed)),
    models.labelled_loss,
    _optimizer(made, stream),
    stream,
    fit_config,
    folder,
    settings=identity,
    evaluate=lambda model, step: _accuracies(made, model),
  )
  if not result.finished:
    return False
  scores = [_by_distance(made, model) for model in result.models]
  write_json(
    result_file,
    {
      "setting": identity,
      "label": made.label,
      "row": row.name,
      "layers": row.layers,
      "seeds": list(seeds),
      "steps": result.step,
      "reason": result.reason,
      "parameters": sum(x.size for x in jax.tree.leaves(result.model)),
      "seconds_of_last_piece": time.monotonic() - started,
      "accuracy": [
        {str(pairs): value for pairs, value in score["pairs"].items()}
        for score in scores
      ],
      "distance": [score["distance"] for score in scores],
      **provenance(),
    },
  )
  return True


def _chosen(made: Setting, names: tuple[str, ...] | None) -> tuple[Row, ...]:
  if names is None:
    return made.rows
  known = {row.name: row for row in made.rows}
  missing = [name for name in names if name not in known]
  if missing:
    raise SystemExit(
      f"recall: rows has {', '.join(missing)}, expected some of"
      f" {', '.join(known)}."
    )
  return tuple(known[name] for name in names)


def _default_out(arguments: Arguments, made: Setting) -> pathlib.Path:
  name = f"recall-{arguments.preset}"
  if arguments.preset.startswith("paper"):
    name += f"-{arguments.mix}-mix-{made.init}-init"
  return pathlib.Path("runs") / name


def _identity(made: Setting, row: Row) -> dict:
  """What decides a row's numbers, JSON-able."""
  fields = dataclasses.asdict(made)
  del fields["rows"], fields["label"]
  return json.loads(json.dumps({**fields, "row": dataclasses.asdict(row)}))


def _optimizer(made: Setting, stream: data.RecallStream):
  if made.schedule == "epoch_cosine":
    rate = training.epoch_cosine(
      made.learning_rate,
      epochs=made.epochs,
      steps_per_epoch=stream.steps_per_epoch,
    )
  else:
    rate = training.warmup_cosine(
      made.learning_rate, steps=made.steps, warmup=made.steps // 20
    )
  return training.adamw(
    rate,
    weight_decay=made.weight_decay,
    clip=made.clip,
    decay_all=made.decay_all,
  )


@functools.partial(jax.jit, static_argnames=("config", "count"))
def _test_batch(model, config: data.RecallConfig, first, count: int):
  """Whether each query of some test examples is answered, and its distance."""
  batch = data.recall_batch(config, _TEST_SEED, first, count)
  features, _ = model.features(batch["tokens"])
  features = jnp.take_along_axis(features, batch["positions"][..., None], 1)
  answers = jnp.argmax(model.logits(features), -1)
  return answers == batch["targets"], batch["distances"]


def _answers(made: Setting, model, config, size):
  """All test answers of one segment: right and distance, `[size, Q]`."""
  parts = []
  for first in range(0, size, made.test_batch):
    count = min(made.test_batch, size - first)
    # The index says which examples: sets of different pairs differ anyway.
    parts.append(_test_batch(model, config, jnp.uint32(first), count))
  right, distance = zip(*jax.device_get(parts), strict=True)
  return np.concatenate(right), np.concatenate(distance)


def _accuracies(made: Setting, model) -> dict[str, float]:
  scores = {}
  for config, size in made.test.segments:
    right, _ = _answers(made, model, config, size)
    scores[f"accuracy_{config.num_pairs}"] = float(right.mean())
  return {"accuracy": sum(scores.values()) / len(scores), **scores}


def _by_distance(made: Setting, model) -> dict:
  """Accuracy by number of pairs, and counts by distance in octaves."""
  pairs, distances = {}, {}
  for config, size in made.test.segments:
    right, distance = _answers(made, model, config, size)
    pairs[config.num_pairs] = float(right.mean())
    octave = np.floor(np.log2(distance)).astype(int)
    distances[str(config.num_pairs)] = [
      {
        "from": 2 ** int(o),
        "below": 2 ** int(o + 1),
        "right": int(right[octave == o].sum()),
        "asked": int((octave == o).sum()),
      }
      for o in np.unique(octave)
    ]
  return {"pairs": pairs, "distance": distances}


def _use_cores(devices: int) -> None:
  """Make one CPU device a core, so that batches are divided over them."""
  if not devices:
    cores = min(os.cpu_count() or 1, 8)
    devices = 1 << (cores.bit_length() - 1)  # a power of two divides batches
  jax.config.update("jax_num_cpu_devices", devices)


if __name__ == "__main__":
  given = tyro.cli(Arguments)
  _use_cores(given.devices)
  training.ensure_deterministic()
  raise SystemExit(main(given))
