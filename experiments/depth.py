"""What depth does: slope, bound, premise, κ and sharpness at 2, 8, 24 layers.

Claim: with depth, influence in a fresh default Mamba dies away less steeply in
Mamba's own initialisation, and as 2^(-lag) in the authors' at every depth;
polarized Mambas and attention keep the far past; blocks of Mambas keep tokens
apart, those of fresh attention do not.

Commands::

  python -m experiments.depth                    # minutes
  python -m experiments.depth --preset smoke     # under a minute
  python -m experiments.depth --checkpoints runs/lm/cpu/*/seed-0

One table of both experiments, `influence` and `smoothing`, on the same text:
for Mamba (both initialisations, polarized or not) and attention the fitted
slope, log A_max, the share of (t, n) with A + Δ ≤ 1, κ, E(h)/E(b), and the
relative sharpness of mixer's and block's outputs, mean over seeds with their
standard deviation. Results per layer are in results.json.

Cost: preset default, 45 models in 3 minutes on 2 shared cores.
"""

import dataclasses
import pathlib
from typing import Annotated, Any, Literal

import tyro

from experiments import depth_report, subjects
from experiments.influence_measure import measure_influence
from experiments.results import use_cores
from experiments.smoothing_measure import measure_smoothing
from experiments.subjects_choice import run

__all__ = ["Arguments", "Preset", "main"]


@dataclasses.dataclass(frozen=True)
class Preset:
  """What a preset looks at.

  Attributes:
    sizes: of fresh models, (layers, width).
    kinds: of fresh models.
    inits: of fresh models; attention has Mamba's only.
    trained: none.
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
  seeds: tuple[int, ...] = (0, 1, 2)
  length: int = 512
  rows: int = 2
  times: int = 4
  probes: int = 2


PRESETS = {
  "smoke": Preset(
    sizes=((2, 16),), kinds=("default",), inits=("authors",), seeds=(0, 1),
    length=64, times=1, probes=2,
  ),
  "default": Preset(sizes=((2, 64), (8, 64), (24, 64))),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arguments:
  """Measure influence and sharpness of models of several depths.

  Attributes:
    preset: smoke (under a minute) or default (minutes).
    checkpoints: run folders of experiments.lm, looked at in place of fresh
      models.
    data: a file or folder of text; the standard library's sources if None.
      Runs are shown what they held out of their own.
    out: folder of results and table; by default runs/depth/<preset>.
    sizes: of fresh models, <layers>x<width>, in place of the preset's.
    kinds: of fresh models, in place of the preset's.
    inits: of fresh models, in place of the preset's.
    seeds: of fresh models' parameters, in place of the preset's.
    length: tokens of each row of text.
    rows: of text.
    times: over how many tokens influence is averaged.
    probes: random probes for each.
    report_only: make the table from results.json alone.
  """

  preset: Literal["smoke", "default"] = "default"
  checkpoints: tuple[pathlib.Path, ...] = ()
  data: pathlib.Path | None = None
  out: pathlib.Path | None = None
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
  return run("depth", PRESETS, arguments, fields, _measure, depth_report)


def _measure(made: Preset, subject, tokens) -> dict[str, Any]:
  model = subject.build()
  influence = measure_influence(
    model, tokens, times=made.times, probes=made.probes, two_sided=False
  )
  return {
    "influence": influence,
    "smoothing": measure_smoothing(model, tokens, pairs=False),
  }


if __name__ == "__main__":
  given = tyro.cli(Arguments)
  use_cores()
  raise SystemExit(main(given))
