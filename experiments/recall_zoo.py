"""The rows of the zoo: every kind of mixer in one model, on one small task.

Each row is the same model (two blocks of norm and mixer, no MLP) around
another mixer, at sizes that give a layer's state about a thousand numbers
where the kind can have so many.
"""

import dataclasses
import pathlib
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.influence_measure import influence_slope
from experiments.recall_settings import Row, Setting
from experiments.smoothing_measure import output_sharpness
from ssmjax import models, training
from ssmjax.models.kinds import MIXERS, kinds
from ssmjax.types import Polarization

__all__ = ["SIZES", "facts", "state_size", "zoo_rows"]

# Random tokens on which influence and sharpness are measured: longer than the
# task's, so that there are lags to fit.
_LENGTH, _ROWS, _SEED = 128, 4, 0

BOTH = Polarization(ones=1, zeros=1)

# Fields other than their defaults, at width 64. A state of 1024 numbers a
# layer (convolutions and normalisers aside) is 128 channels of 8 (Mamba), 64 of
# 8 complex ones (S4D), or 4 heads of 16 by 16. A recurrence with one number a
# channel has its 64 or 128 and no more; attention's keys and values of 32
# tokens are 4096, Hyena's past of one product 1984.
SIZES: dict[str, dict[str, Any]] = {
  "s4d": {"d_state": 8},
  "dss": {"d_state": 8},
  "s4": {"d_state": 8},
  "h3": {"d_state": 8},
  "lmu": {"d_state": 64, "channels": 16, "window": 32.0},
  "cema": {"d_state": 8},
  "hyena": {"max_length": _LENGTH},
  "mamba": {"d_state": 8},
  "mamba2": {"d_state": 8, "head_dim": 16},
  "longhorn": {"d_state": 8},
  "rglru": {"width": 128},
  "mingru": {"expand": 2},
  "minlstm": {"expand": 2},
  "hgrn2": {},
  "linear_attention": {},
  "retnet": {"expand_v": 1.0},
  "gla": {"expand_k": 1.0},
  "rwkv4": {},
  "rwkv5": {},
  "rwkv6": {"mix_rank": 8, "decay_rank": 8},
  "mlstm": {},
  "deltanet": {},
  "gated_deltanet": {"expand_v": 1.0},
  "ttt_linear": {},
  "attention": {"num_heads": 4, "max_length": 32},
}
# Kinds without a memory: the other half of another kind's block.
_OTHER = {"rwkv_channel_mix"}


def zoo_rows(layers: int = 2) -> tuple[Row, ...]:
  """Give a row for each kind with a memory, and a polarized one if there is.

  A kind that is registered (`models.register`) takes part too, at its defaults
  where `SIZES` has no entry for it.

  Raises:
    ValueError: a kind has no sizes here.
  """
  rows = []
  for kind, config in kinds().items():
    if kind in _OTHER:
      continue
    if kind not in SIZES and (kind in MIXERS or _needs_sizes(config)):
      raise ValueError(
        f"zoo_rows: SIZES has no entry for {kind!r}, expected one for each of"
        f" {', '.join(kinds())}. Add its sizes to experiments/recall_zoo.py."
      )
    sizes = SIZES.get(kind, {})
    rows.append(Row(kind, layers, None, config(**sizes)))
    if getattr(config, "polarizes", None):
      mixer = config(**sizes, polarization=BOTH)
      rows.append(Row(f"{kind}-both", layers, BOTH, mixer))
  return tuple(rows)


def state_size(model: models.LanguageModel, max_length: int) -> int:
  """Count the numbers that a model carries from token to token, of one row.

  A complex number is two; attention's are those of `max_length` tokens.
  """
  state = jax.eval_shape(lambda: model.init_state(1, max_length))
  return sum(
    leaf.size * (2 if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else 1)
    for leaf in jax.tree.leaves(state.layers)
  )


def facts(
  made: Setting,
  row: Row,
  seed: int,
  model: models.LanguageModel,
  folder: pathlib.Path,
) -> dict[str, Any]:
  """Measure what the table has of a trained row beside its accuracy.

  Args:
    made: the preset's setting.
    row: which row.
    seed: which run of it.
    model: as that run trained it.
    folder: of the run, for its speed.

  Returns:
    `kind`; `state`, see `state_size`; `tokens_per_second` of training, all
    seeds together; and, `fresh` and `trained`, on tokens drawn at random:
    `slope` of log influence by lag, see `influence_slope`, and `block`, the
    relative sharpness of each block's output.
  """
  shape = (_ROWS, _LENGTH)
  tokens = jax.random.randint(jax.random.key(_SEED), shape, 0, made.vocab_size)
  # Both on one device, so that what is compiled for one serves the other.
  fresh = models.LanguageModel(model.config, rngs=nnx.Rngs(seed))
  stages = jax.device_put(
    {"fresh": fresh, "trained": model}, jax.local_devices()[0]
  )
  longest = max(segment.length for segment, _ in made.test.segments)
  found: dict[str, Any] = {
    "kind": row.name.removesuffix("-both"),
    "state": state_size(model, longest),
    "tokens_per_second": _speed(folder),
  }
  for stage, one in stages.items():
    sharp = output_sharpness(one, tokens)["block"]
    found[stage] = {
      "slope": influence_slope(one, tokens, times=4, probes=4),
      "block": [layer["relative"] for layer in sharp],
    }
  return found


def _needs_sizes(config: Any) -> bool:
  """True of a configuration that has a field without a default."""
  return any(
    field.default is field.default_factory is dataclasses.MISSING
    for field in dataclasses.fields(config)
  )


def _speed(folder: pathlib.Path) -> float | None:
  """The median of the run's later half: the first lines hold compilations."""
  lines = [
    line["tokens_per_second"]
    for line in training.read_metrics(folder)
    if line["event"] == "train" and line.get("tokens_per_second")
  ]
  late = lines[len(lines) // 2 :]
  return round(statistics.median(late), 1) if late else None
