"""The models that `influence`, `smoothing` and `depth` look at, and on what.

A subject is a model, fresh or as a run of `experiments.lm` saved it, with the
text that it is shown. What is measured of a subject is kept in one JSON file,
and is not measured again unless something that decides it has changed.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import nnx

from experiments import lm_runs, lm_settings
from experiments.results import provenance, write_json
from ssmjax import data, models
from ssmjax.models.config_json import config_to_json
from ssmjax.types import Array, Float, Int, Recurrence

__all__ = [
  "Init",
  "Subject",
  "checkpoints",
  "collect",
  "fresh",
  "learned_states",
  "recurrences",
  "rows_of_text",
  "show",
]

type Init = Literal["mamba", "authors"]
type Stage = Literal["init", "during", "after"]


@dataclasses.dataclass(frozen=True)
class Subject:
  """A model to look at.

  Attributes:
    name: of the model, without its seed and step.
    kind: of `lm_settings.KINDS`, or "other".
    init: of its parameters, "mamba" or "authors", see `MambaConfig`.
    config: from which it is built.
    text: the text that it is shown; its held-out part if it was trained.
    seed: of its parameters.
    folder: of the run that trained it; None for a fresh one.
    step: training steps it has had.
    stage: "init", "during" or "after" training.
  """

  name: str
  kind: str
  init: str
  config: models.ModelConfig
  text: lm_runs.TextSettings
  seed: int = 0
  folder: pathlib.Path | None = None
  step: int = 0
  stage: Stage = "init"

  @property
  def title(self) -> str:
    """What it is called in tables."""
    if self.folder is None:
      return self.name
    return f"{self.name}, step {self.step}"

  @property
  def file(self) -> str:
    """The name of its JSON file: two folders may have the same last name."""
    name = self.name
    if self.folder is not None:
      path = str(self.folder.resolve())
      mark = hashlib.blake2b(path.encode(), digest_size=3).hexdigest()
      name += f"-{mark}-step-{self.step}"
    return f"{name}-seed-{self.seed}.json"

  def build(self) -> models.LanguageModel:
    """Build or load the model, on one device."""
    if self.folder is not None:
      model = lm_runs.load_model(self.folder, self.step, seed=self.seed)
    else:
      model = models.LanguageModel(self.config, rngs=nnx.Rngs(self.seed))
    model = _forget_initialisation(model)
    return jax.device_put(model, jax.local_devices()[0])

  def identity(self) -> dict[str, Any]:
    """Give what decides the model and its text, JSON-able."""
    saved = None
    if self.folder is not None and self.step:
      # Of a run that was made anew in the same folder it is another.
      file = self.folder / "checkpoints" / f"manifest-{self.step}.json"
      saved = hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
    return {
      "model": config_to_json(self.config),
      "text": dataclasses.asdict(self.text),
      "seed": self.seed,
      "step": self.step,
      "saved": saved,
    }

  def label(self) -> dict[str, Any]:
    """Give what tables and plots call it, JSON-able."""
    return {
      "title": self.title,
      "name": self.name,
      "kind": self.kind,
      "init": self.init,
      "layers": self.config.n_layers,
      "width": self.config.d_model,
      "seed": self.seed,
      "step": self.step,
      "stage": self.stage,
      # Of a run: what lies farther back it never saw in training.
      "trained_length": None if self.folder is None else self.text.length,
    }


def fresh(
  kind: str,
  layers: int,
  width: int,
  init: Init = "mamba",
  *,
  seed: int = 0,
  text: str | None = None,
) -> Subject:
  """Describe a fresh model of bytes, with 16 states where it is a Mamba.

  Args:
    kind: of `lm_settings.KINDS`.
    layers: depth.
    width: d_model.
    init: as in `MambaConfig`.
    seed: of the parameters.
    text: file or folder that it is shown; None for the standard library's
      sources.

  Raises:
    ValueError: there is no such kind or size.
  """
  made = lm_settings.setting(
    "cpu",
    rows=(f"{kind}-{layers}",),
    text={} if text is None else {"data": text},
    changes={"width": width, "d_state": 16, "init": init},
  )
  (row,) = made.rows
  vocab_size = data.ByteTokenizer.vocab_size
  return Subject(
    name=_name(kind, init, layers, width),
    kind=kind,
    init=init,
    config=lm_settings.model_config(made, row, vocab_size),
    text=made.text,
    seed=seed,
  )


def checkpoints(folders: Sequence[pathlib.Path]) -> tuple[Subject, ...]:
  """Describe every saved step of some runs of `experiments.lm`.

  Args:
    folders: of single runs.

  Raises:
    ValueError: a folder is no run; what is wrong is named.
  """
  found = []
  for folder in folders:
    config, seeds, text = lm_runs.read_model(folder)
    steps = lm_runs.saved_steps(folder)
    kind, init = _kind(config)
    for step in steps:
      stage: Stage = "during"
      if step in (0, steps[-1]):
        stage = "after" if step else "init"
      found += [
        Subject(
          name=_name(kind, init, config.n_layers, config.d_model),
          kind=kind,
          init=init,
          config=config,
          text=text,
          seed=seed,
          folder=pathlib.Path(folder),
          step=step,
          stage=stage,
        )
        for seed in seeds
      ]
  return tuple(found)


def collect(
  subjects: Iterable[Subject],
  measure: Callable[[Subject, Array], dict[str, Any]],
  setting: dict[str, Any],
  out: pathlib.Path,
) -> list[dict[str, Any]]:
  """Measure every subject that has no result yet; give all results.

  Args:
    subjects: in the order of tables.
    measure: gives JSON-able results of a subject on tokens `[B, T]`.
    setting: what decides results beside the subject: at least `length` and
      `rows` of the text.
    out: its folder `subjects` keeps one file each.

  Raises:
    ValueError: the text is too short.
  """
  results, origin = [], provenance()
  subjects = tuple(subjects)
  with tqdm.tqdm(subjects, unit="model", smoothing=0) as bar:
    for subject in bar:
      bar.set_postfix_str(f"{subject.title}, seed {subject.seed}")
      path = out / "subjects" / subject.file
      identity = json.loads(json.dumps({**subject.identity(), **setting}))
      result = _kept(path, identity)
      if result is None:
        tokens = rows_of_text(
          subject.text, setting["rows"], setting["length"],
          held_out=subject.folder is not None,
        )  # fmt: skip
        result = {
          "setting": identity,
          **subject.label(),
          **measure(subject, tokens),
          **origin,
        }
        write_json(path, result)
      # A run may have gone on since: what was its end is then on its way.
      results.append({**result, **subject.label()})
  return results


def rows_of_text(
  settings: lm_runs.TextSettings, rows: int, length: int, *, held_out: bool
) -> Int[Array, "B T"]:
  """Give rows of a text, drawn at random but always the same.

  Rows within one document come first; only where there are too few, others
  follow, with the boundary token between their documents.

  Args:
    settings: which text.
    rows: B.
    length: T.
    held_out: of documents that a run did not train on; else of all.

  Raises:
    ValueError: there is too little text.
  """
  corpus = _corpus(settings, held_out)
  source = data.TextSource(corpus, length, 1, shuffle_seed=0)
  inside: list[np.ndarray] = []
  across: list[np.ndarray] = []
  for number in range(len(source)):
    if len(inside) == rows:
      break
    batch = source[number]
    if batch["weights"].all():
      one = (batch["segment_ids"] == 1).all()
      (inside if one else across).append(batch["tokens"][0])
  chosen = (inside + across)[:rows]
  if len(chosen) < rows:
    raise ValueError(
      f"rows_of_text: the text has {len(chosen)} rows of length={length},"
      f" expected rows={rows}. Take shorter or fewer rows, or more text."
    )
  return jnp.asarray(np.stack(chosen))


@jax.jit
def show(
  model: models.LanguageModel, tokens: Int[Array, "B T"]
) -> dict[str, Float[Array, "..."]]:
  """Give what passes through a model's layers, see `LanguageModel.features`."""
  out: dict[str, Array] = {}
  model.features(tokens, out=out)
  return out


def recurrences(
  model: models.LanguageModel, apply: Callable[..., Any], *shown: Array
) -> Iterator[Any]:
  """Yield apply(block, *[v[i] for v in shown]) of each layer with an Eq. 1.

  None for a layer without one, as attention.
  """
  for index in range(model.config.n_layers):
    block = model.block(index)
    try:
      yield apply(block, *(v[index] for v in shown))
    except NotImplementedError:
      yield None


def learned_states(mixer: Any, recurrence: Recurrence) -> Recurrence:
  """Leave out the states whose decay polarization holds fixed.

  Args:
    mixer: with a `config.polarization`, whose states are on the last axis of
      the recurrence.
    recurrence: of this mixer; its readout no longer fits.
  """
  polarization = getattr(mixer.config, "polarization", None)
  if polarization is None:
    return recurrence
  last = recurrence.a.shape[-1] - polarization.zeros
  cut = lambda v: v[..., polarization.ones : last] if v.shape[-1] > 1 else v
  return dataclasses.replace(
    recurrence,
    a=cut(recurrence.a),
    dt=cut(recurrence.dt),
    b=cut(recurrence.b),
    initial_state=cut(recurrence.initial_state),
  )


def _forget_initialisation(model: models.LanguageModel) -> models.LanguageModel:
  """The model as if Mamba's own initialisation had drawn its parameters.

  How they were drawn is part of a model's structure: what is compiled for one
  initialisation would be compiled again for the other.
  """
  made = model.config
  drawn = lambda m: hasattr(m, "init")
  mixers: tuple[Any, ...] = made.mixers
  mixers = tuple(
    dataclasses.replace(m, init="mamba") if drawn(m) else m for m in mixers
  )
  other = dataclasses.replace(made, mixers=mixers, init="mamba")
  build = lambda: models.LanguageModel(other, rngs=nnx.Rngs(0))
  return nnx.merge(nnx.split(nnx.eval_shape(build))[0], nnx.split(model)[1])


def _name(kind: str, init: str, layers: int, width: int) -> str:
  # What "authors" changes most is Δ, which attention has not.
  whose = "" if (kind, init) == ("attention", "mamba") else f"-{init}"
  return f"{kind}{whose}-{layers}x{width}"


def _kind(config: models.ModelConfig) -> tuple[str, str]:
  """The kind and the initialisation of any model."""
  mixer, *others = config.mixers
  init = getattr(mixer, "init", config.init)
  if any(other != mixer for other in others):
    return "other", init
  if isinstance(mixer, models.AttentionConfig):
    return "attention", init
  held = getattr(mixer, "polarization", None)
  for kind, polarization in lm_settings.KINDS.items():
    if polarization == held:
      return kind, init
  return "other", init


def _kept(path: pathlib.Path, identity: dict[str, Any]):
  """The result of that very identity, if there is one."""
  try:
    result = json.loads(path.read_text())
  except FileNotFoundError:
    return None
  except ValueError as error:
    raise ValueError(
      f"collect: {path} is damaged ({error}), expected JSON. Remove it to"
      " measure again."
    ) from error
  return result if result.get("setting") == identity else None


@functools.lru_cache(maxsize=4)
def _corpus(settings: lm_runs.TextSettings, held_out: bool) -> data.TextCorpus:
  if held_out:
    return lm_runs.read_text(settings).held_out
  paths = () if settings.data is None else (settings.data,)
  documents = data.read_documents(*paths, separator=settings.separator)
  return data.encode_documents(documents, data.ByteTokenizer())
