"""How far back does a model look? Figs. 1 and 7 of Wang et al. 2025.

Claim: the influence of a token on a later one, ‖∂yₜ/∂xₛ‖, falls off
exponentially with their distance in a Mamba, at initialisation and after
training, whatever its size; a transformer's does not, and a polarized Mamba's
stops falling where the channel of decay 1 takes over.

Commands::

  python -m experiments.influence                    # minutes
  python -m experiments.influence --preset smoke     # under a minute
  python -m experiments.influence --checkpoints runs/lm/cpu/*/seed-0
  python -m experiments.influence --sizes 2x64 24x256 --kinds default both

By default: fresh models of several sizes in both of Mamba's initialisations,
default, polarized ("both": a channel of decay 1 and one of decay 0) and
attention; and rows of `experiments.lm`, preset cpu, at every step that they
saved, which are trained first where they are not there (in runs/lm/cpu). The
text is held out from training. Of each model: influence on tokens evenly
through the text's second half, by random probes, averaged as logarithms.

What is measured of a model is kept (<out>/subjects/) and not measured again;
after a change of the code, remove it.
Cost: preset default, 7 min 39 s on 2 shared cores: 20 fresh models, 15 steps of
runs, and their training (three rows of `experiments.lm`, 3 of the minutes).
Expected: straight lines in the authors' initialisation, whose slope is log ½
as A_max = exp(-ln 2); in Mamba's own curves that bend, for its channels forget
at rates from 0.001 to 1.6 a token. In training the slope hardly changes but
log A_max nears 0, for some token has a tiny Δ: a bound, not a description.
Polarized curves are flat from a few tokens on, as attention's are. What the
figures do not show is whether a model makes use of what it could still see.
"""

import dataclasses
import functools
import pathlib
from typing import Annotated, Any, Literal

import tqdm
import tyro

from experiments import influence_report, subjects
from experiments.influence_measure import measure_influence
from experiments.results import use_cores
from experiments.subjects_choice import run
from ssmjax import training

__all__ = ["Arguments", "Preset", "main"]


@dataclasses.dataclass(frozen=True)
class Preset:
  """What a preset looks at.

  Attributes:
    sizes: of fresh models, (layers, width).
    kinds: of fresh models.
    inits: of fresh models; attention has Mamba's only.
    trained: rows of `experiments.lm`, preset cpu.
    seeds: of fresh models' parameters.
    length: tokens of the text's rows.
    rows: of text.
    times: tokens whose influences are averaged.
    probes: for each of them.
  """

  sizes: tuple[tuple[int, int], ...]
  kinds: tuple[str, ...] = ("default", "both", "attention")
  inits: tuple[subjects.Init, ...] = ("mamba", "authors")
  trained: tuple[str, ...] = ()
  seeds: tuple[int, ...] = (0,)
  length: int = 1024
  rows: int = 2
  times: int = 6
  probes: int = 4


PRESETS = {
  "smoke": Preset(
    sizes=((2, 16),), inits=("authors",), length=96, times=2, probes=2
  ),
  "default": Preset(
    sizes=((2, 64), (8, 64), (24, 64), (2, 128)),
    trained=("default-2", "both-2", "attention-2"),
  ),
}


@dataclasses.dataclass(frozen=True)
class Arguments:
  """Measure how influence falls with distance, and report it.

  Attributes:
    preset: smoke (under a minute) or default (minutes).
    checkpoints: run folders of experiments.lm, looked at in place of fresh
      and of newly trained models.
    data: a file or folder of text; the standard library's sources if None.
      Runs are shown what they held out of their own.
    out: folder of results, table and plots; by default
      runs/influence/<preset>.
    trained: folder of the runs that are trained where they are not there.
    sizes: of fresh models, <layers>x<width>, in place of the preset's.
    kinds: of fresh models, in place of the preset's.
    inits: of fresh models, in place of the preset's.
    seeds: of fresh models' parameters, in place of the preset's.
    length: tokens of each row of text.
    rows: of text.
    times: over how many tokens influence is averaged.
    probes: random probes for each.
    report_only: draw from results.json alone.
  """

  preset: Literal["smoke", "default"] = "default"
  checkpoints: tuple[pathlib.Path, ...] = ()
  data: pathlib.Path | None = None
  out: pathlib.Path | None = None
  trained: pathlib.Path = pathlib.Path("runs/lm/cpu")
  sizes: tuple[str, ...] | None = None
  kinds: tuple[str, ...] | None = None
  inits: tuple[Literal["mamba", "authors"], ...] | None = None
  seeds: tuple[int, ...] | None = None
  length: int | None = None
  rows: int | None = None
  times: int | None = None
  probes: int | None = None
  report_only: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def main(arguments: Arguments) -> int:
  """Measure what is missing, then report; the exit status."""
  fields = ("length", "rows", "times", "probes")
  return run(
    "influence", PRESETS, arguments, fields, _measure, influence_report
  )


def _measure(made: Preset, subject, tokens) -> dict[str, Any]:
  bar = functools.partial(tqdm.tqdm, leave=False, unit="batch")
  return measure_influence(
    subject.build(), tokens,
    times=made.times, probes=made.probes, progress=bar,
  )  # fmt: skip


if __name__ == "__main__":
  given = tyro.cli(Arguments)
  use_cores()
  training.ensure_deterministic()
  raise SystemExit(main(given))
