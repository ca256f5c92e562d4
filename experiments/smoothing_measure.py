"""What `experiments.smoothing` measures of a model, as JSON-able numbers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.influence_measure import numbers
from experiments.subjects import learned_states, recurrences, show
from ssmjax import diagnostics, models, theory
from ssmjax.types import Array, Float, Int

__all__ = ["GRID", "measure_smoothing", "output_sharpness"]

# Of A_max - A_min, for the cumulative histogram.
GRID = np.linspace(0, 1, 51, dtype=np.float32)


def measure_smoothing(
  model: models.LanguageModel,
  tokens: Int[Array, "B T"],
  *,
  pairs: bool = True,
) -> dict[str, Any]:
  """Measure the sharpness along a model's layers, and its decays' spread.

  Args:
    model: the model.
    tokens: `[B, T]`.
    pairs: compare b and h of all pairs of tokens too; else only by extremes,
      which is all that the theorem needs and takes O(T).

  Returns:
    `input`, and for each layer `mixer` and `block`: the four measures of
    `diagnostics.Sharpness`, mean over rows, of what enters the first block, of
    the mixer's and of the block's output. `eq1` of each layer, None without
    one: the same of `b`, `h` and `ratio` (with `pairs`); `theorem_factor` and
    `kappa_factor`, which bound the ratio of maxima if their premises hold, and
    the shares at which they do. Names that start with "learned" leave out the
    states that polarization holds fixed. `spread` and `token_spread`: the share
    of all channels at or below `GRID`, of learned states.
  """
  shown = show(model, tokens)
  layers: list[dict[str, Any] | None] = []
  spreads: dict[str, list[np.ndarray]] = {"spread": [], "token_spread": []}
  layer = functools.partial(_layer, pairs)
  for facts in recurrences(model, layer, shown["mixer_input"]):
    if facts is None:
      layers.append(None)
      continue
    facts = jax.device_get(facts)
    for name, values in spreads.items():
      values.append(facts.pop(name))
    layers.append(_plain(facts))
  share = lambda values: numbers(
    diagnostics.cumulative_share(
      jnp.asarray(np.concatenate(values)), jnp.asarray(GRID)
    )
  )
  return {
    "tokens": tokens.shape[1],
    "input": _plain(jax.device_get(_sharpness(shown["embeddings"]))),
    **_output_sharpness(shown),
    "eq1": layers,
    **{name: share(v) if v else None for name, v in spreads.items()},
  }


def output_sharpness(
  model: models.LanguageModel, tokens: Int[Array, "B T"]
) -> dict[str, Any]:
  """As `measure_smoothing`, its `mixer` and `block` alone: of any model."""
  return _output_sharpness(show(model, tokens))


def _output_sharpness(shown):
  outputs = [
    jax.device_get(_outputs(mixer, block))
    for mixer, block in zip(
      shown["mixer_output"], shown["block_output"], strict=True
    )
  ]
  return {
    "mixer": [_plain(mixer) for mixer, _ in outputs],
    "block": [_plain(block) for _, block in outputs],
  }


@jax.jit
def _outputs(mixer, block):
  return _sharpness(mixer), _sharpness(block)


@jax.jit
def _sharpness(x: Float[Array, "B T M"]) -> dict[str, Array]:
  found = diagnostics.sharpness(x)
  return {name: v.mean() for name, v in found._asdict().items()}


@functools.partial(jax.jit, static_argnums=0)
def _layer(
  pairs: bool, block: models.Block, x: Float[Array, "B T M"]
) -> dict[str, Any]:
  recurrence = block.mixer.recurrence(x)
  measures = lambda v: {k: e.mean() for k, e in v._asdict().items()}
  found: dict[str, Any] = {}
  if pairs:
    whole = diagnostics.layer_smoothness(recurrence)
    found = {
      "b": measures(whole.b),
      "h": measures(whole.h),
      "ratio": measures(whole.ratio),
      "hull_factor": whole.hull_factor.mean(),
    }
  every = lambda v: v.reshape(v.shape[0], -1)
  theorem = theory.oversmoothing(recurrence)
  joint = lambda v, w: (v / every(w.input_spread).max(-1)).mean()
  found |= {
    "theorem_factor": joint(theorem.bound, theorem),
    "kappa": theory.kappa(recurrence).max(),
    "premise": theorem.premises.contraction.fraction,
  }
  learned = learned_states(block.mixer, recurrence)
  theorem, ours = theory.oversmoothing(learned), theory.kappa_smoothing(learned)
  spectrum = diagnostics.spectrum(learned)
  # Of what no token writes to there is no ratio.
  moved = theorem.input_spread > 0
  divide = lambda v: jnp.where(
    moved, v / jnp.where(moved, theorem.input_spread, 1.0), jnp.nan
  )
  over = lambda bound: theorem.state_spread > bound * (1 + 1e-5)
  share = lambda v: v.mean(dtype=jnp.float32)
  return found | {
    "learned_ratio": joint(theorem.measured, theorem),
    "learned_factor": joint(theorem.bound, theorem),
    "learned_kappa_factor": joint(ours.joint_bound, theorem),
    "learned_premise": theorem.premises.contraction.fraction,
    "centred": theorem.premises.centred.fraction,
    "applies": share(theorem.premises.applies),
    # The paper's inequality without its premise, and ours with it.
    "theorem_fails": share(over(theorem.factor * theorem.input_spread)),
    "kappa_fails": share(over(ours.bound) & ours.applies),
    "kappa_applies": share(ours.applies),
    "channel_ratio": jnp.nanmedian(divide(theorem.state_spread)),
    "channel_kappa_factor": jnp.median(ours.factor),
    "kappa_median": jnp.median(ours.kappa),
    "kappa_max": ours.kappa.max(),
    "spread": spectrum.spread,
    "token_spread": spectrum.token_spread,
  }


def _plain(facts):
  return jax.tree.map(lambda v: numbers(v), facts)
