"""README's table of models, made from the code.

  python -m experiments.models_table            # prints it
  python -m experiments.models_table --write    # puts it into README.md

A row for each kind of mixer: the op that it trains by, the one that it decodes
by, where a fused kernel runs it, whose decays polarization holds, and the
published formats that `load_pretrained` takes it from.
"""

import pathlib
import sys
import typing
from typing import Any

from experiments.results import write_text
from kernels_pallas import kernels
from ssmjax import ops
from ssmjax.interop.families import FORMATS
from ssmjax.models.kinds import MIXERS

__all__ = ["main", "placed", "table"]

README = pathlib.Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- models: begin -->\n", "<!-- models: end -->\n"
COLUMNS = ("layer", "train", "step", "kernel", "polarize", "weights in")
_CHIPS = {"tpu": "TPU", "cuda": "GPU"}


def table() -> str:
  """Give the table in Markdown."""
  lines = [COLUMNS, ("---",) * len(COLUMNS)]
  lines += [_row(kind, config) for kind, config in MIXERS.items()]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def placed(text: str) -> str:
  """Give `text` with the table of today between its two markers.

  Raises:
    ValueError: a marker is not there, or not once, or they are in disorder.
  """
  if text.count(BEGIN) != 1 or text.count(END) != 1:
    raise ValueError(f"README.md: expected one {BEGIN!r} and one {END!r}")
  before, rest = text.split(BEGIN)
  if END not in rest:
    raise ValueError(f"README.md: {END!r} stands before {BEGIN!r}")
  return before + BEGIN + table() + END + rest.split(END)[1]


def main(arguments: list[str]) -> int:
  """Print the table, or with --write put it into README.md."""
  if arguments == ["--write"]:
    write_text(README, placed(README.read_text()))
  elif arguments:
    print(f"models_table: {arguments}, expected nothing or --write")
    return 2
  else:
    print(table(), end="")
  return 0


def _row(kind: str, config: Any) -> tuple[str, ...]:
  layer = typing.get_type_hints(config.build)["return"]
  alone = f"{(config.op or '').removesuffix('_scan')}_step"
  step = f"`{alone}`" if hasattr(ops, alone) else "its own"
  chips = [_CHIPS[name] for name in kernels(config.op)] if config.op else []
  titles = [
    each.title.removeprefix("a ").removeprefix("an ")
    for each in FORMATS
    if each.mixer is config
  ]
  return (
    f"{layer.__name__} (`{kind}`)",
    f"`{config.op}`" if config.op else "its own",
    step if hasattr(layer, "step") else "–",
    ", ".join(chips) or "–",
    config.polarizes or "–",
    "; ".join(titles) or "–",
  )


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
