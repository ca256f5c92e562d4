"""Run folders of `experiments.lm`: what models they hold, and of what text.

A folder is all that is needed: `model.json` says how the model is built and
on what text it was trained, `checkpoints/` has its parameters after some
steps. The commands that look into trained models read them by this module.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any, Literal

from flax import nnx

from experiments.results import write_json
from ssmjax import data, models, training
from ssmjax.models.config_json import config_from_json, config_to_json
from ssmjax.types import check_fields

__all__ = [
  "Text",
  "TextSettings",
  "load_model",
  "read_model",
  "read_text",
  "saved_steps",
  "write_model",
]

_FILE = "model.json"

type Folder = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class TextSettings:
  """Which text, in which tokens, cut how.

  Attributes:
    data: a file or folder; None for the sources of Python's standard library.
    tokenizer: a `tokenizer.json`; None for bytes.
    boundary: the token at both ends of a document, where there is a tokenizer.
    separator: the line between two documents of a file; None for one a file.
    validation: share of the bytes that is held out, by whole documents.
    split_seed: which documents these are.
    max_bytes: take documents, drawn by `split_seed`, of at most so many bytes
      in all; None for all.
    length: T, tokens of a row.
  """

  data: str | None = None
  tokenizer: str | None = None
  boundary: str = "<|endoftext|>"
  separator: str | None = "<|endoftext|>"
  validation: float = 0.05
  split_seed: int = 0
  max_bytes: int | None = None
  length: int = 256

  def __post_init__(self):
    check_fields(self)


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
  """The text that settings stand for.

  Attributes:
    tokenizer: to encode prompts and decode samples.
    train: tokens of the training documents.
    held_out: tokens of the held-out documents.
    train_documents: the training documents' bytes.
    held_out_documents: the held-out documents' bytes.
  """

  tokenizer: data.Tokenizer
  train: data.TextCorpus
  held_out: data.TextCorpus
  train_documents: tuple[bytes, ...]
  held_out_documents: tuple[bytes, ...]


def write_model(
  folder: Folder,
  config: models.ModelConfig,
  seeds: tuple[int, ...],
  text_settings: TextSettings,
) -> None:
  """Write `model.json` into a run's folder.

  Args:
    folder: the run's, as given to `fit`.
    config: from which its models are built.
    seeds: as given to `fit`.
    text_settings: what it is trained on.
  """
  value = {
    "model": config_to_json(config),
    "seeds": list(seeds),
    "text": dataclasses.asdict(text_settings),
  }
  write_json(pathlib.Path(folder) / _FILE, value)


def read_model(
  folder: Folder,
) -> tuple[models.ModelConfig, tuple[int, ...], TextSettings]:
  """Read the model, the seeds and the text of a run.

  Args:
    folder: the run's.

  Raises:
    ValueError: there is no such folder, it is no run, or its `model.json` is
      damaged or of another version; what is wrong is named.
  """
  path = pathlib.Path(folder) / _FILE
  try:
    content = path.read_bytes()
  except (FileNotFoundError, NotADirectoryError):
    raise ValueError(
      f"read_model: {str(folder)!r} is {_what(folder)}, expected the folder of"
      " one run of experiments.lm, as runs/lm/cpu/default-2/seed-0."
    ) from None
  try:
    found = json.loads(content)
    if not isinstance(found, dict) or set(found) != {"model", "seeds", "text"}:
      raise ValueError("expected the fields model, seeds and text")
    return (
      config_from_json(found["model"]),
      _seeds(found["seeds"]),
      _text_settings(found["text"]),
    )
  except ValueError as error:  # a JSONDecodeError is one
    raise ValueError(f"read_model: {path} cannot be read: {error}") from error


def saved_steps(folder: Folder) -> tuple[int, ...]:
  """Say after which steps a run's models can be had, in order.

  The first is 0, the initialisation, which is made anew from the seed; the
  others are checkpoints.

  Raises:
    ValueError: the folder is no run.
  """
  read_model(folder)
  root = pathlib.Path(folder) / "checkpoints"
  steps = {0}
  for manifest in root.glob("manifest-*.json"):
    step = manifest.stem.removeprefix("manifest-")
    # Only with its manifest does a checkpoint count as whole.
    if step.isdigit() and (root / step).is_dir():
      steps.add(int(step))
  return tuple(sorted(steps))


def load_model(
  folder: Folder,
  step: int | Literal["latest"] = "latest",
  *,
  seed: int | None = None,
) -> models.LanguageModel:
  """Build the model of a run as it was after some step.

  Args:
    folder: the run's.
    step: one of `saved_steps`, 0 for the initialisation; or the latest.
    seed: one of the run's; None for its first.

  Raises:
    ValueError: the folder is no run, it has no such step or seed, or the
      checkpoint is damaged; those there are, are named.
  """
  config, seeds, _ = read_model(folder)
  steps = saved_steps(folder)
  at = steps[-1] if step == "latest" else step
  seed = seeds[0] if seed is None else seed
  if at not in steps:
    raise ValueError(
      f"load_model: {str(folder)!r} has nothing of step {at}, expected one of"
      f" {', '.join(map(str, steps))}."
    )
  if seed not in seeds:
    raise ValueError(
      f"load_model: {str(folder)!r} has no seed {seed}, expected one of"
      f" {', '.join(map(str, seeds))}."
    )
  init = lambda s: models.LanguageModel(config, rngs=nnx.Rngs(s))
  if at == 0:
    return init(seed)  # not jitted, as `fit` does it: the same to the bit
  loaded = training.load(pathlib.Path(folder), init, seeds=seeds, at=at)
  return loaded[seeds.index(seed)]


def read_text(settings: TextSettings) -> Text:
  """Read, split and encode the text of a run.

  Args:
    settings: which.

  Raises:
    FileNotFoundError: there is no such text or tokenizer.
    ImportError: a tokenizer is asked for and `tokenizers` not installed.
    ValueError: it cannot be read, or is too little to be split.
  """
  paths = () if settings.data is None else (settings.data,)
  documents = data.read_documents(*paths, separator=settings.separator)
  if settings.max_bytes is not None:
    documents = _some(documents, settings.max_bytes, settings.split_seed)
  train, held_out = data.split_documents(
    documents, settings.validation, settings.split_seed
  )
  tokenizer: data.Tokenizer = data.ByteTokenizer()
  if settings.tokenizer is not None:
    tokenizer = data.FileTokenizer(settings.tokenizer, settings.boundary)
  return Text(
    tokenizer,
    data.encode_documents(train, tokenizer),
    data.encode_documents(held_out, tokenizer),
    train,
    held_out,
  )


def _some(documents, max_bytes, seed):
  """Documents of at most so many bytes; all if there are fewer."""
  total = sum(map(len, documents))
  if max_bytes >= total:
    return documents
  return data.split_documents(documents, max_bytes / total, seed)[1]


def _what(folder) -> str:
  path = pathlib.Path(folder)
  if not path.exists():
    return "not there"
  if not path.is_dir():
    return "a file"
  below = sorted(p.parent for p in path.glob(f"*/*/{_FILE}"))
  below += sorted(p.parent for p in path.glob(f"*/{_FILE}"))
  if below:
    return f"no run itself, but {', '.join(map(str, below))} below it are"
  return f"no run: it has no {_FILE}"


def _seeds(value) -> tuple[int, ...]:
  if not isinstance(value, list) or not value:
    raise ValueError(f"seeds is {value!r}, expected a list of integers.")
  if not all(type(seed) is int for seed in value):
    raise ValueError(f"seeds is {value!r}, expected a list of integers.")
  return tuple(value)


def _text_settings(value: Any) -> TextSettings:
  known = [field.name for field in dataclasses.fields(TextSettings)]
  if not isinstance(value, dict):
    raise ValueError(f"text is {value!r}, expected an object.")
  unknown = [name for name in value if name not in known]
  if unknown:
    raise ValueError(
      f"text.{unknown[0]} is not known, expected some of {', '.join(known)}."
    )
  return TextSettings(**value)
