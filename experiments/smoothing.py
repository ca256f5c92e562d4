"""Do layers smooth their tokens? Figs. 5 and 6 of Wang et al. 2025.

Claim: the states hₜ of a Mamba lie closer together than its inputs bₜ, layer
after layer, as A_max - A_min is far from 1 in most channels; mixers of
attention and blocks with their residual do not lose as much.

Commands::

  python -m experiments.smoothing                    # minutes
  python -m experiments.smoothing --preset smoke     # under a minute
  python -m experiments.smoothing --checkpoints runs/lm/cpu/*/seed-0
  python -m experiments.smoothing --sizes 24x128 --kinds default both

Models and text are those of `experiments.influence`. Of each layer: the four
sharpness measures of `diagnostics.sharpness` on bₜ, hₜ, the mixer's and the
block's output; E(h)/E(b) against Theorem 4.2's factor and the κ form, with the
share of (t, n) that meets its premise A + Δ ≤ 1; the spread of each channel's
decays.

What is measured of a model is kept (<out>/subjects/) and not measured again;
after a change of the code, remove it.
Cost: preset default, 3 minutes on 2 shared cores with other work on them: 15
fresh models and 15 steps of runs, whose training (three rows of
`experiments.lm`) takes 3 more where they are not there.
Expected: E(h) a tenth of E(b) in Mamba's initialisation, about ln 2 of it in
the authors', by far less than Theorem 4.2 has to offer: its factor
1 - A_min^(T-1) is 1 to float32 for any A_min below 0.93 at 256 tokens, and its
premise fails for a = -1 in every Mamba. Fresh attention, which weighs all
tokens alike, smooths its output more than a fresh Mamba, whose skip and gate
bring the tokens' own part. What the figures do not show: that E of one layer's
h is smaller than of its b says nothing of the next layer's b, nor that what is
lost was of use.
"""

import dataclasses
import pathlib
from typing import Annotated, Any, Literal

import tyro

from experiments import smoothing_report, subjects
from experiments.results import use_cores
from experiments.smoothing_measure import measure_smoothing
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
  """

  sizes: tuple[tuple[int, int], ...]
  kinds: tuple[str, ...] = ("default", "both", "attention")
  inits: tuple[subjects.Init, ...] = ("mamba", "authors")
  trained: tuple[str, ...] = ()
  seeds: tuple[int, ...] = (0,)
  length: int = 256
  rows: int = 2


PRESETS = {
  "smoke": Preset(sizes=((2, 16),), inits=("authors",), length=96),
  "default": Preset(
    sizes=((2, 64), (8, 64), (24, 64)),
    trained=("default-2", "both-2", "attention-2"),
  ),
}


@dataclasses.dataclass(frozen=True)
class Arguments:
  """Measure how sharp tokens are along the layers, and report it.

  Attributes:
    preset: smoke (under a minute) or default (minutes).
    checkpoints: run folders of experiments.lm, looked at in place of fresh
      and of newly trained models.
    data: a file or folder of text; the standard library's sources if None.
      Runs are shown what they held out of their own.
    out: folder of results, table and plots; by default
      runs/smoothing/<preset>.
    trained: folder of the runs that are trained where they are not there.
    sizes: of fresh models, <layers>x<width>, in place of the preset's.
    kinds: of fresh models, in place of the preset's.
    inits: of fresh models, in place of the preset's.
    seeds: of fresh models' parameters, in place of the preset's.
    length: tokens of each row of text.
    rows: of text.
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
  report_only: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def main(arguments: Arguments) -> int:
  """Measure what is missing, then report; the exit status."""
  fields = ("length", "rows")
  return run(
    "smoothing", PRESETS, arguments, fields, _measure, smoothing_report
  )


def _measure(made: Preset, subject, tokens) -> dict[str, Any]:
  del made
  return measure_smoothing(subject.build(), tokens)


if __name__ == "__main__":
  given = tyro.cli(Arguments)
  use_cores()
  training.ensure_deterministic()
  raise SystemExit(main(given))
