"""What `experiments.smoothing` measures of a model, as JSON-able numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.influence_measure import numbers
from experiments.subjects import learned_states, recurrences, show
from ssmjax import diagnostics, models, theory
from ssmjax.types import Array, Float, Int

__all__ = ["GRID", "measure_smoothing"]

# Of A_max - A_min, for the cumulative histogram.
GRID = np.linspace(0, 1, 51, dtype=np.float32)


def measure_smoothing(
  model: models.LanguageModel, tokens: Int[Array, "B T"]
) -> dict[str, Any]:
  """Measure the sharpness along a model's layers, and its decays' spread.

  Args:
    model: the model.
    tokens: `[B, T]`.

  Returns:
    `input`, and for each layer `mixer` and `block`: the four measures of
    `diagnostics.Sharpness`, mean over rows, of what enters the first block, of
    the mixer's and of the block's output. `eq1` of each layer, None without
    one: the same of `b` and `h`, `ratio` of their maxima, what
    bounds it (`factor`, `kappa_factor`, `hull_factor`), and the shares at
    which the premises hold; the same of the learned states alone, where
    polarization holds others fixed. `spread` and `token_spread`: the share of
    all channels at or below `GRID`, of learned states.
  """
  shown = show(model, tokens)
  outputs = [
    jax.device_get(_outputs(mixer, block))
    for mixer, block in zip(
      shown["mixer_output"], shown["block_output"], strict=True
    )
  ]
  layers: list[dict[str, Any] | None] = []
  spreads: dict[str, list[np.ndarray]] = {"spread": [], "token_spread": []}
  for facts in recurrences(model, _layer, shown["mixer_input"]):
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
    "mixer": [_plain(mixer) for mixer, _ in outputs],
    "block": [_plain(block) for _, block in outputs],
    "eq1": layers,
    **{name: share(v) if v else None for name, v in spreads.items()},
  }


@jax.jit
def _outputs(mixer, block):
  return _sharpness(mixer), _sharpness(block)


@jax.jit
def _sharpness(x: Float[Array, "B T M"]) -> dict[str, Array]:
  found = diagnostics.sharpness(x)
  return {name: v.mean() for name, v in found._asdict().items()}


@jax.jit
def _layer(block: models.Block, x: Float[Array, "B T M"]) -> dict[str, Any]:
  recurrence = block.mixer.recurrence(x)
  whole = diagnostics.layer_smoothness(recurrence)
  learned = learned_states(block.mixer, recurrence)
  theorem, ours = theory.oversmoothing(learned), theory.kappa_smoothing(learned)
  spectrum = diagnostics.spectrum(learned)
  every = lambda v: v.reshape(v.shape[0], -1)
  joint = every(theorem.input_spread).max(-1)
  measures = lambda v: {k: e.mean() for k, e in v._asdict().items()}
  exceeds = lambda bound: (theorem.state_spread > bound * (1 + 1e-5)).mean()
  # A channel that no token writes to has no ratio.
  moved = theorem.input_spread > 0
  divide = lambda v: jnp.where(
    moved, v / jnp.where(moved, theorem.input_spread, 1.0), jnp.nan
  )
  return {
    "b": measures(whole.b),
    "h": measures(whole.h),
    "ratio": measures(whole.ratio),
    "factor": whole.factor.mean(),
    "kappa_factor": whole.kappa_factor.mean(),
    "hull_factor": whole.hull_factor.mean(),
    "premise": whole.premise,
    "learned_ratio": (theorem.measured / joint).mean(),
    "learned_kappa_factor": (ours.joint_bound / joint).mean(),
    "learned_premise": theorem.premises.contraction.fraction,
    "centred": theorem.premises.centred.fraction,
    "applies": theorem.premises.applies.mean(dtype=jnp.float32),
    # The paper's inequality without its premise, and ours with it.
    "theorem_fails": exceeds(theorem.factor * theorem.input_spread),
    "kappa_fails": (
      (theorem.state_spread > ours.bound * (1 + 1e-5)) & ours.applies
    ).mean(dtype=jnp.float32),
    "channel_ratio": jnp.nanmedian(divide(theorem.state_spread)),
    "channel_factor": jnp.median(theorem.factor),
    "channel_kappa_factor": jnp.median(ours.factor),
    "a_min": theorem.a_min.min(),
    "kappa_median": jnp.median(ours.kappa),
    "kappa_max": ours.kappa.max(),
    "spread": spectrum.spread,
    "token_spread": spectrum.token_spread,
  }


def _plain(facts):
  return jax.tree.map(lambda v: numbers(v), facts)
