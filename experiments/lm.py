"""A small language model trained on text: Mamba, polarized, and attention.

Question: does polarization cost a language model anything that shows in bits
per byte? And the runs are there to be looked into: every row keeps checkpoints
from the initialisation to the end, which the influence and smoothing commands
read from the row's folder alone (`experiments.lm_runs`).

Commands::

  python -m experiments.lm                        # preset cpu: minutes
  python -m experiments.lm --preset smoke         # under a minute
  python -m experiments.lm --rows both-8 attention-8 --spectra
  python -m experiments.lm --data novels/ --tokenizer tokenizer.json
  python -m experiments.lm --preset full --data text/ --rows both-24

By default the text is the sources of Python's standard library, as bytes. A
row is `<kind>-<layers>`, with the kinds default, one, zero, both, both-matched
(as many states as default) and attention (rotary positions, an MLP of ratio 1,
which makes it as wide and about as large as a Mamba).

Cost: preset cpu, by its CPU time some 6 minutes on 2 quiet cores (22 on cores
that had a load of 5 to 10 beside it). Preset full has 91 M parameters and 2.6 G
tokens a row, which is 1.4e18 floating-point operations by 6 per parameter and
token, for an accelerator (activations in bfloat16); batches are divided over
all devices of all processes, and --microbatches saves memory. It has not been
run; give it text of its own, with --validation such that some MB are held out.
Found with preset cpu, one seed, in bits per byte: default-2 2.06, both-2 2.06,
attention-2 2.41, default-4 1.86, both-4 1.86; zlib 1.98, lzma 1.74.
"""

import dataclasses
import json
import pathlib
import time
from typing import Annotated, Any, Literal

import jax
import tyro
from flax import nnx

from experiments import lm_measure, lm_report
from experiments.lm_runs import Text, read_text, write_model
from experiments.lm_settings import (
  Row,
  Setting,
  identity,
  model_config,
  result_file,
  run_folder,
  setting,
  train_source,
)
from experiments.results import provenance, use_cores, write_json
from ssmjax import data, diagnostics, models, training


@dataclasses.dataclass(frozen=True)
class Arguments:
  """Train rows of language models on text and report them.

  Attributes:
    preset: smoke (under a minute), cpu (minutes, toy scale), full (an
      accelerator).
    data: a file or folder of text; the standard library's sources if None.
    tokenizer: a tokenizer.json; bytes if None.
    boundary: the tokenizer's token between documents.
    separator: a line that ends a document inside a file.
    validation: share of the bytes held out, by whole documents.
    max_bytes: take only so much of the text.
    out: folder for runs, results, table and plot; by default
      runs/lm/<preset and what is changed of it>.
    rows: train and report these in place of the preset's: <kind>-<layers>.
    seeds: of parameters and of the order of the text; one run each.
    steps: of training, with the preset's warm-up and the cosine over all.
    batch_size: rows of the global batch.
    length: tokens of a row.
    width: of the model.
    d_state: learned states per channel of a Mamba.
    learning_rate: its peak.
    init: of the models, Mamba's or as in the released code of the paper.
    microbatches: parts of a device's batch, where memory is short.
    spectra: record the decays' spectra at every evaluation, in
      <row>/seed-<n>/spectra.jsonl.
    prompt: text to go on with, in place of a held-out document's beginning.
    sample_tokens: how long the sample is.
    minutes: stop in time for a last save; the same command goes on.
    devices: CPU devices to divide batches over (0: the cores, at most 8).
    report_only: draw table and plot from the results that are there.
  """

  preset: Literal["smoke", "cpu", "full"] = "cpu"
  data: pathlib.Path | None = None
  tokenizer: pathlib.Path | None = None
  boundary: str | None = None
  separator: str | None = None
  validation: float | None = None
  max_bytes: int | None = None
  out: pathlib.Path | None = None
  rows: tuple[str, ...] | None = None
  seeds: tuple[int, ...] = (0,)
  steps: int | None = None
  batch_size: int | None = None
  length: int | None = None
  width: int | None = None
  d_state: int | None = None
  learning_rate: float | None = None
  init: Literal["mamba", "authors"] | None = None
  microbatches: int | None = None
  spectra: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
  prompt: str | None = None
  sample_tokens: int | None = None
  minutes: float | None = None
  devices: int = 0
  report_only: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False

  def __post_init__(self):
    if not self.seeds or not all(0 <= seed < 2**32 for seed in self.seeds):
      raise SystemExit(
        f"lm: seeds is {self.seeds}, expected one or more numbers from 0 to"
        f" {2**32 - 1}."
      )
    if self.rows is not None and not self.rows:
      raise SystemExit(
        "lm: rows has no name, expected some, as default-2 both-2."
      )
    for name in ("max_bytes", "sample_tokens"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise SystemExit(f"lm: {name} is {value}, expected 1 or more.")


def main(arguments: Arguments) -> int:
  """Run what is missing, then report.

  Returns:
    The exit status: 0, or 75 where the same command has to go on.
  """
  started = time.monotonic()
  made, text = _prepared(arguments)
  out = arguments.out or _default_out(arguments)
  print(f"{made.label}\nTraining text: {text.train}\nHeld out: {text.held_out}")
  if jax.process_index() == 0:
    lm_report.write_baselines(out, text)
  finished = True
  for row, seed in (
    () if arguments.report_only else _missing(arguments, made, text, out)
  ):
    left = None
    if arguments.minutes is not None:
      left = arguments.minutes - (time.monotonic() - started) / 60
    finished = (left is None or left > 0) and _run(
      made, row, text, seed, out,
      minutes=left, spectra=arguments.spectra, prompt=arguments.prompt,
    )  # fmt: skip
    if not finished:
      break
  if jax.process_index() == 0:
    lm_report.report(out, made, text, arguments.preset)
  if not finished:
    print("Not finished: the same command goes on from here.")
  return 0 if finished else 75


def run_row(
  made: Setting,
  row: Row,
  text: Text,
  seed: int,
  out: pathlib.Path,
  *,
  minutes: float | None = None,
  spectra: bool = False,
  prompt: str | None = None,
) -> bool:
  """Train one row with one seed; True once finished.

  Writes `<out>/<row>/seed-<seed>/`, the run's checkpoints, metrics and
  `model.json`, and at the end `<out>/<row>/seed-<seed>.json` with the curves,
  the held-out bits per byte and a sample.

  Args:
    made: the preset's setting.
    row: which row.
    text: what `made.text` stands for.
    seed: of parameters and of the order of the text.
    out: folder of all rows.
    minutes: stops in time, to go on in another call.
    spectra: record the decays' spectra.
    prompt: see `lm_measure.sample`.

  Raises:
    ValueError: the folder holds a run of another setting, the text does not
      fill one batch, or a batch does not divide among the devices.
  """
  origin = provenance()
  config = model_config(made, row, text.train.vocab_size)
  folder = run_folder(out, row, seed)
  mesh = training.data_mesh()
  source = train_source(made, text, seed)
  held_out = data.TextSource(text.held_out, made.text.length, made.batch_size)
  init = lambda s: models.LanguageModel(config, rngs=nnx.Rngs(s))
  hooks = [_written_once(folder, config, seed, made)]
  if spectra and row.kind != "attention":
    hooks.append(_recorder(made, text, folder, init(seed)))
  print(f"\n{row.name}, seed {seed} ({made.label})")
  result = training.fit(
    init,
    lm_measure.text_loss,
    training.adamw(
      training.warmup_cosine(
        made.learning_rate, steps=made.steps, warmup=made.warmup
      ),
      weight_decay=made.weight_decay,
      clip=made.clip,
      b2=0.95,
    ),
    iter(data.text_dataset(source)),
    training.FitConfig(
      steps=made.steps,
      seeds=(seed,),
      steps_per_dispatch=made.steps_per_dispatch,
      microbatches=made.microbatches,
      log_every=made.log_every,
      evaluate_every=made.evaluate_every,
      save_every=made.save_every,
      keep=max(2, made.checkpoints),
      minutes=minutes,
    ),
    folder,
    settings=identity(made, row, text, seed),
    evaluate=lambda model, step: lm_measure.held_out_metrics(
      model, held_out, mesh
    ),
    hooks=hooks,
    mesh=mesh,
  )
  if not result.finished:
    return False
  found = lm_measure.sample(
    result.model, text, seed,
    prompt=prompt, prompt_tokens=made.prompt_tokens, tokens=made.sample_tokens,
  )  # fmt: skip
  print(f"{row.name} goes on with a text:\n{_shown(found)}")
  if jax.process_index() == 0:
    (metrics,) = result.metrics
    write_json(
      result_file(out, row, seed),
      {
        "setting": identity(made, row, text, seed),
        "label": made.label,
        "row": row.name,
        "seed": seed,
        "steps": result.step,
        "parameters": sum(x.size for x in jax.tree.leaves(result.model)),
        "held_out": metrics,
        "curve": _curve(made, folder),
        "tokens_per_second": _speed(folder),
        "sample": found,
        **origin,
      },
    )
  return True


def _prepared(arguments: Arguments) -> tuple[Setting, Text]:
  """The setting and its text, or what is wrong with them."""
  given = lambda *names: {
    name: value if isinstance(value, str | int | float) else str(value)
    for name in names
    if (value := getattr(arguments, name)) is not None
  }
  try:
    made = setting(
      arguments.preset,
      rows=arguments.rows,
      text=given(*_TEXT),
      changes=given(*_CHANGES),
    )
    text = read_text(made.text)
    train_source(made, text, 0)  # is there a batch of it?
  except (ValueError, OSError, ImportError) as error:
    raise SystemExit(f"lm: {error}") from error
  return made, text


_TEXT = (
  *("data", "tokenizer", "boundary", "separator", "validation", "max_bytes"),
  "length",
)
_CHANGES = (
  *("steps", "batch_size", "width", "d_state", "learning_rate", "init"),
  *("microbatches", "sample_tokens"),
)


def _default_out(arguments: Arguments) -> pathlib.Path:
  """One folder for each preset and what of it was changed."""
  name: str = arguments.preset
  for field in (*_TEXT, *_CHANGES):
    value = getattr(arguments, field)
    if isinstance(value, pathlib.Path):
      value = value.resolve().name
    if value is not None:
      plain = "".join(
        c if c.isalnum() or c in ".-" else "_" for c in str(value)
      )
      name += f"-{field}-{plain}"
  return pathlib.Path("runs/lm") / name


def _missing(arguments, made, text, out) -> list[tuple[Row, int]]:
  """The rows and seeds without a result of this setting."""
  return [
    (row, seed)
    for row in made.rows
    for seed in arguments.seeds
    if not _is_done(out, made, row, text, seed)
  ]


def _is_done(out, made, row, text, seed) -> bool:
  path = result_file(out, row, seed)
  if not path.exists():
    return False
  found = json.loads(path.read_text())["setting"]
  return found == identity(made, row, text, seed)


def _run(made, row, text, seed, out, **options) -> bool:
  """As `run_row`, for the command line."""
  try:
    return run_row(made, row, text, seed, out, **options)
  except ValueError as error:
    raise SystemExit(f"lm: {error}") from error


def _written_once(folder, config, seed, made):
  """A hook that writes model.json: not before `fit` knows the folder's own."""
  written = []

  def hook(step, models):
    if not written and jax.process_index() == 0:
      write_model(folder, config, (seed,), made.text)
    written.append(step)

  return hook


def _recorder(made, text, folder, model):
  """Record spectra on the beginning of the longest held-out document."""
  lengths = text.held_out.lengths
  longest = int(lengths.argmax())
  start = int(lengths[:longest].sum())
  size = min(made.text.length, int(lengths[longest]))
  tokens = text.held_out.tokens[start : start + size].astype("int32")[None]

  def recurrences(model):
    out: dict[str, Any] = {}
    model.features(tokens, out=out)
    return {
      f"layer {index}": model.block(index).mixer.recurrence(
        out["mixer_input"][index]
      )
      for index in range(model.config.n_layers)
    }

  recorder = diagnostics.SpectrumRecorder(
    recurrences, every=made.evaluate_every, path=folder / "spectra.jsonl"
  )
  if not (folder / "checkpoints").exists():
    recorder(0, lambda: (model,))
  return recorder


def _curve(made: Setting, folder) -> dict[str, list]:
  """Tokens and bits per byte, of training and of the held-out text."""
  tokens = made.batch_size * made.text.length
  curve: dict[str, list] = {"train": [], "held_out": []}
  for line in training.read_metrics(folder):
    point = [line["step"] * tokens, line["bits_per_byte"]]
    curve["train" if line["event"] == "train" else "held_out"].append(point)
  return curve


def _speed(folder) -> float:
  """Median over the lines; that of the first dispatches has a compilation."""
  lines = training.read_metrics(folder)
  speeds = [
    line["tokens_per_second"] for line in lines if line["event"] == "train"
  ]
  speeds = sorted(speeds[1:] or speeds)
  return speeds[len(speeds) // 2]


def _shown(found: dict[str, Any]) -> str:
  return f"{found['prompt']}⟦{found['text']}⟧"


if __name__ == "__main__":
  given = tyro.cli(Arguments)
  use_cores(given.devices)
  training.ensure_deterministic()
  raise SystemExit(main(given))
