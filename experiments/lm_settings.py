"""What each preset of the language model experiment trains, and on what."""

import dataclasses
import json
import pathlib
import re
from typing import Any, Literal

import jax.numpy as jnp

from experiments.lm_runs import Text, TextSettings
from ssmjax import data, models
from ssmjax.models.config_json import config_to_json
from ssmjax.types import Polarization, check_fields

__all__ = [
  "KINDS",
  "Row",
  "Setting",
  "identity",
  "model_config",
  "result_file",
  "row",
  "run_folder",
  "setting",
  "train_source",
]

# The paper's channels beside the learned ones, and "both" with as many states
# as the default has.
KINDS: dict[str, Polarization | None] = {
  "default": None,
  "one": Polarization(ones=1),
  "zero": Polarization(zeros=1),
  "both": Polarization(ones=1, zeros=1),
  "both-matched": Polarization(ones=1, zeros=1, placement="replace"),
  "attention": None,
}


@dataclasses.dataclass(frozen=True)
class Row:
  """One row of the table, `<kind>-<layers>`."""

  kind: str
  layers: int

  def __post_init__(self):
    check_fields(self)

  @property
  def name(self) -> str:
    """As the command line has it."""
    return f"{self.kind}-{self.layers}"


@dataclasses.dataclass(frozen=True)
class Setting:
  """Everything that a preset decides.

  Attributes:
    label: says in every table and plot what this is.
    rows: what is trained.
    text: on which text, in rows of how many tokens.
    width: of the model.
    d_state: learned states per channel of a Mamba.
    head_width: channels of an attention head.
    batch_size: rows of the global batch.
    steps: of training.
    learning_rate: peak.
    warmup: steps of the linear warm-up.
    weight_decay: AdamW's.
    clip: global norm.
    init: of the model.
    dtype: of activations; parameters are float32.
    remat: recompute each block in the backward pass.
    microbatches: parts of a device's batch, one after another.
    steps_per_dispatch: steps in one call of the device.
    log_every: steps between two points of the training curve.
    evaluate_every: steps between two points of the held-out curve.
    save_every: steps between checkpoints, all of which are kept.
    prompt_tokens: of the first held-out document, to be gone on with.
    sample_tokens: of the sample.
  """

  label: str
  rows: tuple[Row, ...]
  text: TextSettings
  width: int
  d_state: int
  batch_size: int
  steps: int
  learning_rate: float
  warmup: int
  head_width: int = 64
  weight_decay: float = 0.1
  clip: float = 1.0
  init: Literal["mamba", "authors"] = "mamba"
  dtype: Literal["float32", "bfloat16"] = "float32"
  remat: bool = False
  microbatches: int = 1
  steps_per_dispatch: int = 1
  log_every: int = 1
  evaluate_every: int = 1
  save_every: int = 1
  prompt_tokens: int = 64
  sample_tokens: int = 256

  def __post_init__(self):
    check_fields(self)

  @property
  def checkpoints(self) -> int:
    """How many a finished run has."""
    return -(-self.steps // self.save_every)


def setting(
  preset: str,
  *,
  rows: tuple[str, ...] | None = None,
  text: dict[str, Any] | None = None,
  changes: dict[str, Any] | None = None,
) -> Setting:
  """Make the setting of a preset.

  Args:
    preset: "smoke", "cpu" or "full".
    rows: other rows than the preset's, each `<kind>-<layers>`.
    text: fields of `TextSettings` that differ from the preset's.
    changes: fields of `Setting` that differ from the preset's.

  Raises:
    ValueError: there is no such row, or a size is out of range.
  """
  made = _PRESETS[preset]
  changes = changes or {}
  made = dataclasses.replace(made, **changes)
  if rows is not None:
    made = dataclasses.replace(made, rows=tuple(map(row, rows)))
  text = text or {}
  made = dataclasses.replace(made, text=dataclasses.replace(made.text, **text))
  for name in ("width", "d_state", "batch_size", "steps", "microbatches"):
    if getattr(made, name) < 1:
      raise ValueError(f"{name} is {getattr(made, name)}, expected 1 or more.")
  if made.steps < 2:
    raise ValueError("steps is 1, expected 2 or more: one is the warm-up.")
  if made.text.length < 1:
    raise ValueError(f"length is {made.text.length}, expected 1 or more.")
  if not made.learning_rate > 0:
    raise ValueError(
      f"learning_rate is {made.learning_rate}, expected above 0."
    )
  label = (
    f"{made.label}: width {made.width}, T = {made.text.length},"
    f" {made.steps} steps of {made.batch_size} rows"
  )
  said = {"width", "length", "steps", "batch_size", "data"}
  for name, value in (text | changes).items():
    if name not in said:
      label += f", {name} {value}"
  return _with_intervals(dataclasses.replace(made, label=label))


def row(name: str) -> Row:
  """Read a row's name, `<kind>-<layers>`.

  Raises:
    ValueError: there is no such kind, or no number of layers.
  """
  kind, _, layers = name.rpartition("-")
  if kind not in KINDS or not re.fullmatch("[1-9][0-9]{0,3}", layers):
    raise ValueError(
      f"rows has {name!r}, expected <kind>-<layers>, as both-2, with the kinds"
      f" {', '.join(KINDS)}."
    )
  return Row(kind, int(layers))


def model_config(made: Setting, row: Row, vocab_size: int):
  """The model of a row.

  Attention and MLP have 4 M² + 2 M² weights where a Mamba has 6 M² and those
  of its small maps: rows of one depth have one width and nearly one size.
  """
  dtype = getattr(jnp, made.dtype)
  mixer: models.MambaConfig | models.AttentionConfig
  if row.kind == "attention":
    mixer = models.AttentionConfig(
      num_heads=max(1, made.width // made.head_width),
      init=made.init,
      dtype=dtype,
    )
  else:
    mixer = models.MambaConfig(
      d_state=made.d_state,
      polarization=KINDS[row.kind],
      init=made.init,
      dtype=dtype,
    )
  return models.ModelConfig(
    vocab_size=vocab_size,
    d_model=made.width,
    n_layers=row.layers,
    mixers=(mixer,),
    mlp_ratio=1 if row.kind == "attention" else 0,
    init=made.init,
    remat=made.remat,
    dtype=dtype,
  )


def train_source(made: Setting, text: Text, seed: int) -> data.TextSource:
  """The training rows, in an order of the seed's own."""
  return data.TextSource(
    text.train,
    made.text.length,
    made.batch_size,
    shuffle_seed=seed,
    drop_remainder=True,
  )


def identity(made: Setting, row: Row, text: Text, seed: int) -> dict[str, Any]:
  """Say in JSON all that a row's result depends on but for the code.

  The text by its content, wherever it lies.
  """
  fields = dataclasses.asdict(made)
  for name in ("label", "rows", "text"):
    del fields[name]
  found = {
    **fields,
    "model": config_to_json(model_config(made, row, text.train.vocab_size)),
    "train": train_source(made, text, seed).identity(),
    "held_out": text.held_out.fingerprint,
  }
  return json.loads(json.dumps(found))


def run_folder(out: pathlib.Path, row: Row, seed: int) -> pathlib.Path:
  """Where a row's seed has its checkpoints."""
  return out / row.name / f"seed-{seed}"


def result_file(out: pathlib.Path, row: Row, seed: int) -> pathlib.Path:
  """Where a row's seed has its result."""
  return out / row.name / f"seed-{seed}.json"


def _with_intervals(made: Setting) -> Setting:
  """Points of the curves and checkpoints at whole dispatches."""
  dispatch = min(made.steps_per_dispatch, made.steps)
  every = lambda count: max(made.steps // count // dispatch, 1) * dispatch
  save = every(4)
  return dataclasses.replace(
    made,
    warmup=min(made.warmup, made.steps // 2),
    steps_per_dispatch=dispatch,
    log_every=every(40),
    evaluate_every=every(8),
    save_every=save,
  )


def _rows(*names: str) -> tuple[Row, ...]:
  return tuple(map(row, names))


_PRESETS = {
  "smoke": Setting(
    label="smoke test, too short to learn",
    rows=_rows("default-2", "both-2"),
    text=TextSettings(max_bytes=300_000, validation=0.2, length=32),
    width=16,
    d_state=2,
    head_width=8,
    batch_size=8,
    steps=24,
    learning_rate=1e-2,
    warmup=4,
    steps_per_dispatch=4,
    prompt_tokens=16,
    sample_tokens=32,
  ),
  "cpu": Setting(
    label="toy scale",
    rows=_rows("default-2", "both-2", "attention-2", "default-4", "both-4"),
    text=TextSettings(validation=0.02, length=256),
    width=64,
    d_state=8,
    head_width=32,
    batch_size=8,
    steps=1600,
    learning_rate=5e-3,
    warmup=80,
    steps_per_dispatch=10,
  ),
  # The smallest size that published language models of this kind have.
  "full": Setting(
    label="full scale",
    rows=_rows("default-24", "both-24", "attention-24"),
    text=TextSettings(length=2048),
    width=768,
    d_state=16,
    batch_size=256,
    steps=5000,
    learning_rate=6e-4,
    warmup=500,
    dtype="bfloat16",
    remat=True,
    steps_per_dispatch=1,
  ),
}
