"""Does polarization help recall? Table 2/5 of Wang et al. 2025.

Claim: on multi-query associative recall a Mamba whose first channel has decay
1 and whose last has decay 0 recalls more pairs than the default one, the more
so the more pairs there are and the deeper the model.

Commands::

  python -m experiments.recall                      # preset cpu: minutes
  python -m experiments.recall --preset smoke       # under a minute
  python -m experiments.recall --preset zoo         # every kind of mixer
  python -m experiments.recall --preset paper --rows both-4 --minutes 60

Preset cpu trains five seeds of each row and judges the claims that a toy can
test: when a model begins to remember which values were shown, how far back, and
when it tells the pairs apart (`verdicts.json`).

Cost: preset cpu, some 5 minutes on 2 cores; preset paper, some 150,500 steps
of 128 sequences of up to 1024 tokens a row, in pieces of any length: a row is
a run of its own that goes on where it stopped, and a finished row is not run
again. Expected at full scale (their Table 2/5, per cent at 64, 128 and 256
pairs): default-2 98/82/36, both-2 99/96/55, both-4 100/99/82.
"""

import dataclasses
import functools
import json
import pathlib
import time
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from experiments import recall_report, recall_zoo
from experiments.recall_settings import (
  Row,
  Setting,
  identity,
  model_config,
  result_file,
  setting,
)
from experiments.results import provenance, use_cores, write_json
from ssmjax import data, models, training

# Test sets are drawn from a seed that no training run may have.
TEST_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Arguments:
  """Train the rows of the recall table and report them.

  Attributes:
    preset: smoke (under a minute), cpu (minutes, toy scale), zoo (every
      kind of mixer, plain and polarized), paper (Table 2/5),
      paper-short (its models, a few epochs).
    out: folder for runs, results, table and plot; by default
      runs/recall/<preset and what is changed of it>.
    rows: train and report these rows only.
    seeds: one run each, by default 0 to 4 of preset cpu and 0 of the others;
      all seeds of a row are trained at once.
    seeds_at_once: at most so many (0: all), where memory is short. Presets
      that stop early train them one by one.
    init: another initialisation than the preset's (paper presets: authors).
    mix: training data of the paper presets, as in the text or in the code.
    epochs: of the paper presets.
    zero_decay: exact, or the finite stand-in of the authors' code (A = -100)
      or of the paper (A = -1000).
    minutes: stop in time for a last save; the same command goes on.
    devices: CPU devices to divide batches over (0: the cores, at most 8).
    report_only: draw table and plot from the results that are there.
  """

  preset: Literal["smoke", "cpu", "zoo", "paper", "paper-short"] = "cpu"
  out: pathlib.Path | None = None
  rows: tuple[str, ...] | None = None
  seeds: tuple[int, ...] | None = None
  seeds_at_once: int = 0
  init: Literal["mamba", "authors"] | None = None
  mix: Literal["paper", "authors"] = "authors"
  epochs: int | None = None
  zero_decay: Literal["exact", "authors", "paper"] = "exact"
  minutes: float | None = None
  devices: int = 0
  report_only: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False

  def __post_init__(self):
    if self.seeds is not None and not (
      self.seeds and all(0 <= s < TEST_SEED for s in self.seeds)
    ):
      raise SystemExit(
        f"recall: seeds is {self.seeds}, expected one or more numbers from 0"
        f" to {TEST_SEED - 1}."
      )
    if self.seeds_at_once < 0:
      raise SystemExit(
        f"recall: seeds_at_once is {self.seeds_at_once}, expected 0 or more."
      )
    if self.epochs is not None and (
      not self.preset.startswith("paper") or self.epochs < 1
    ):
      raise SystemExit(
        f"recall: epochs is {self.epochs} with preset {self.preset}, expected"
        " 1 or more, and for the paper presets only."
      )


def main(arguments: Arguments) -> int:
  """Run what is missing, then report.

  Returns:
    The exit status: 0, or 75 where the same command has to go on.
  """
  started = time.monotonic()
  made = setting(
    arguments.preset,
    init=arguments.init,
    mix=arguments.mix,
    epochs=arguments.epochs,
    zero_decay=arguments.zero_decay,
  )
  made = dataclasses.replace(made, rows=_chosen(made, arguments.rows))
  out = arguments.out or _default_out(arguments, made)
  wanted = arguments.seeds or made.seeds
  at_once = arguments.seeds_at_once or len(wanted)
  if made.stop_above is not None:
    at_once = 1  # Together, a seed would go on until the slowest may stop.
  finished = True
  for row in () if arguments.report_only else made.rows:
    missing = [s for s in wanted if not _is_done(out, made, row, s)]
    for first in range(0, len(missing), at_once):
      left = None
      if arguments.minutes is not None:
        left = arguments.minutes - (time.monotonic() - started) / 60
      seeds = tuple(missing[first : first + at_once])
      finished = _run(made, row, seeds, out, left)
      if not finished:
        break
    if not finished:
      break
  recall_report.report(out, made, arguments.preset)
  if not finished:
    print("Not finished: the same command goes on from here.")
  return 0 if finished else 75


def run_row(
  made: Setting,
  row: Row,
  seeds: tuple[int, ...],
  out: pathlib.Path,
  *,
  minutes: float | None = None,
) -> bool:
  """Train one row for some seeds at once; True once finished.

  Writes `<out>/<row>/seeds-…/`, the run's checkpoints and metrics, and at the
  end `<out>/<row>/seed-….json` with accuracies by pairs and by distance.

  Args:
    made: the preset's setting.
    row: which row.
    seeds: of parameters and data.
    out: folder of all rows.
    minutes: stops in time, to go on in another call.

  Raises:
    ValueError: the folder holds a run of another setting.
  """
  # Before the run, so that its commit is the one that trained it.
  origin = provenance()
  config = model_config(made, row)
  # Batches of several shapes come in runs that fill a dispatch.
  stream = data.RecallStream(
    made.train,
    made.batch_size,
    order=made.order,
    fresh=made.fresh,
    run_length=(
      made.steps_per_dispatch
      if made.order == "shuffled" and not made.one_shape
      else 1
    ),
    one_shape=made.one_shape,
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
  folder = out / row.name / f"seeds-{'-'.join(map(str, seeds))}"
  result = training.fit(
    lambda seed: models.LanguageModel(config, rngs=nnx.Rngs(seed)),
    models.labelled_loss,
    _optimizer(made, stream),
    stream,
    fit_config,
    folder,
    settings=identity(made, row),
    evaluate=lambda model, step: _accuracies(made, model),
  )
  if not result.finished:
    return False
  # Each seed's result is written whole, with what is needed to draw it again.
  for seed, model in zip(seeds, result.models, strict=True):
    score = _scores(made, model)
    write_json(
      result_file(out, row, seed),
      {
        "setting": identity(made, row),
        "label": made.label,
        "row": row.name,
        "layers": row.layers,
        "seed": seed,
        "steps": result.step,
        "reason": result.reason,
        "parameters": sum(x.size for x in jax.tree.leaves(model)),
        "accuracy": {k: v["accuracy"] for k, v in score.items()},
        "distance": {k: v["distance"] for k, v in score.items()},
        "curve": _curve(made, folder, seed),
        **_of_the_kind(made, row, seed, model, folder),
        **origin,
      },
    )
  return True


def _curve(made: Setting, folder, seed: int) -> dict[str, list]:
  """Accuracy by number of pairs at each evaluation of a run."""
  lines = [
    line
    for line in training.read_metrics(folder)
    if line["event"] == "evaluate" and line["seed"] == seed
  ]
  names = [str(config.num_pairs) for config, _ in made.test.segments]
  accuracy = {k: [line[f"accuracy_{k}"] for line in lines] for k in names}
  return {"steps": [line["step"] for line in lines], **accuracy}


def _run(made, row, seeds, out, minutes) -> bool:
  """As `run_row`, for the command line."""
  if minutes is not None and minutes <= 0:
    return False
  try:
    return run_row(made, row, seeds, out, minutes=minutes)
  except ValueError as error:
    raise SystemExit(f"recall: {error} Or choose another --out.") from error


def _of_the_kind(made, row, seed, model, folder) -> dict[str, Any]:
  """What the zoo's table has of a row beside its accuracy."""
  if isinstance(row.mixer, str):
    return {}
  return {"zoo": recall_zoo.facts(made, row, seed, model, folder)}


def _is_done(out, made, row, seed) -> bool:
  path = result_file(out, row, seed)
  if not path.exists():
    return False
  return json.loads(path.read_text())["setting"] == identity(made, row)


def _chosen(made: Setting, names: tuple[str, ...] | None) -> tuple[Row, ...]:
  if names is None:
    return made.rows
  known = {row.name: row for row in made.rows}
  missing = [name for name in names if name not in known]
  if missing or not names:
    raise SystemExit(
      f"recall: rows has {', '.join(missing) or 'no name'}, expected some of"
      f" {', '.join(known)}."
    )
  return tuple(known[name] for name in names)


def _default_out(arguments: Arguments, made: Setting) -> pathlib.Path:
  """One folder for each preset and what of it was changed."""
  name: str = arguments.preset
  if arguments.preset.startswith("paper"):
    name += f"-{arguments.mix}-mix"
    if arguments.epochs is not None:
      name += f"-{arguments.epochs}-epochs"
  if arguments.init is not None:
    name += f"-{arguments.init}-init"
  if arguments.zero_decay != "exact":
    name += f"-{arguments.zero_decay}-zeros"
  return pathlib.Path("runs/recall") / name


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
  batch = data.recall_batch(config, TEST_SEED, first, count)
  features, _ = model.features(batch["tokens"])
  features = jnp.take_along_axis(features, batch["positions"][..., None], 1)
  answers = jnp.argmax(model.logits(features), -1)
  return answers == batch["targets"], batch["distances"]


def _answers(made: Setting, model, segment: int, most: int | None = None):
  """Test answers of one segment: right and distance, `[size, Q]`."""
  config, size = made.test.segments[segment]
  size = min(size, most or size)
  # One device's copy of the parameters: the others need not do the same.
  model = jax.device_put(model, jax.local_devices()[0])
  parts = []
  for first in range(0, size, made.test_batch):
    count = min(made.test_batch, size - first)
    # Numbered through the segments: equal indices share keys and values.
    index = jnp.uint32(made.test.offsets[segment] + first)
    parts.append(_test_batch(model, config, index, count))
  right, distance = zip(*jax.device_get(parts), strict=True)
  return np.concatenate(right), np.concatenate(distance)


def _accuracies(made: Setting, model) -> dict[str, float]:
  scores = {}
  for segment, (config, _) in enumerate(made.test.segments):
    right, _ = _answers(made, model, segment, made.curve_size)
    scores[f"accuracy_{config.num_pairs}"] = float(right.mean())
  return {"accuracy": sum(scores.values()) / len(scores), **scores}


def _scores(made: Setting, model) -> dict[str, dict]:
  """By number of pairs: accuracy, and counts by distance in octaves."""
  scores = {}
  for segment, (config, _) in enumerate(made.test.segments):
    right, distance = _answers(made, model, segment)
    octave = np.floor(np.log2(distance)).astype(int)
    scores[str(config.num_pairs)] = {
      "accuracy": float(right.mean()),
      "distance": [
        {
          "from": 2 ** int(o),
          "below": 2 ** int(o + 1),
          "right": int(right[octave == o].sum()),
          "asked": int((octave == o).sum()),
        }
        for o in np.unique(octave)
      ],
    }
  return scores


if __name__ == "__main__":
  given = tyro.cli(Arguments)
  use_cores(given.devices)
  training.ensure_deterministic()
  raise SystemExit(main(given))
