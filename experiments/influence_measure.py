"""What `experiments.influence` measures of a model, as JSON-able numbers."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.subjects import learned_states, recurrences, show
from ssmjax import diagnostics, models, theory
from ssmjax.types import Array, Float, Int

__all__ = ["influence_slope", "measure_influence", "numbers"]

# Gradients are taken of outputs times 2⁸⁰, which rounds nothing and keeps small
# ones above float32's least; below e^FLOOR they would not be to be trusted.
_SCALE = 80
FLOOR = math.log(1e-28) - _SCALE * math.log(2)

# The most numbers in one of the factors of a polarized layer's two-sided bound:
# tokens x window x states x width.
_FACTORS = 40_000_000


def measure_influence(
  model: models.LanguageModel,
  tokens: Int[Array, "B T"],
  *,
  times: int,
  probes: int,
  two_sided: bool = True,
  progress: Callable | None = None,
) -> dict[str, Any]:
  """Measure how influence falls with distance, and what the theorem allows.

  score(t, s) = ‖∂yₜ/∂xₛ‖_F of the model, y the features before the logits and
  x what enters the first block; averaged as logarithms over rows and times.

  Args:
    model: the model.
    tokens: `[B, T]`.
    times: over how many t, evenly from T/2 to the last token.
    probes: random probes for each t.
    two_sided: look at polarized layers from both sides.
    progress: a bar, as `diagnostics.influence` takes it.

  Returns:
    `lags`, `log_score` and `log_error` (of the probes) of the mean curve;
    `last`, the influence on the last token: the mean of log ‖∂y_T/∂xₛ‖_F over
    rows, less the logarithm of its exponential's sum over s;
    `closed_form`, the largest log Π A over layers and channels; `slope` by
    `fit_slopes`; `eq1` of each layer, None without; `two_sided` of polarized
    ones.
  """
  length = tokens.shape[1]
  shown = show(model, tokens)
  found, curve, log_score = _curve(
    model, tokens, shown["embeddings"], times, probes, progress
  )
  with np.errstate(divide="ignore"):
    last = 0.5 * np.log(found.squared[-1]).mean(0)[::-1]
  last = last - np.logaddexp.reduce(last)

  layers: list[dict[str, Any] | None] = []
  closed = np.full(length, -np.inf)
  for facts in recurrences(model, _layer, shown["mixer_input"]):
    if facts is None:
      layers.append(None)
      continue
    facts = jax.device_get(facts)
    closed = np.maximum(closed, facts.pop("closed")[::-1])
    layers.append({name: numbers(v) for name, v in facts.items()})
  known = [layer for layer in layers if layer]
  names = ("log_a_max", "slowest") if known else ()
  every = {name: max(layer[name] for layer in known) for name in names}
  lags = _thin(length)
  with np.errstate(divide="ignore", invalid="ignore"):
    error = curve.probe_error / (2 * curve.squared)
  thin = lambda v: numbers(np.asarray(v)[lags])
  return {
    "tokens": length,
    "lags": lags.tolist(),
    "log_score": thin(log_score),
    "log_error": thin(error),
    "last": thin(last),
    "closed_form": thin(closed) if known else None,
    "slope": fit_slopes(
      curve.lags, log_score, _convolutions(model), every.get("log_a_max")
    ),
    **{name: every.get(name) for name in ("log_a_max", "slowest")},
    "eq1": layers,
    "two_sided": _two_sided(model, shown["mixer_input"]) if two_sided else None,
  }


def influence_slope(
  model: models.LanguageModel,
  tokens: Int[Array, "B T"],
  *,
  times: int,
  probes: int,
) -> dict[str, Any] | None:
  """As `measure_influence`, of which it is the `slope` alone: of any model."""
  embeddings = show(model, tokens)["embeddings"]
  _, curve, log_score = _curve(model, tokens, embeddings, times, probes, None)
  return fit_slopes(curve.lags, log_score, _convolutions(model), None)


def fit_slopes(
  lags: np.ndarray,
  log_score: np.ndarray,
  convolutions: int,
  log_a_max: float | None,
) -> dict[str, Any] | None:
  """Fit log score against lag: all of it, its near and its far half.

  Between the lags that convolutions reach and half of the text, from where on
  fewer and fewer t have such a lag; above what float32 can tell.

  Args:
    lags: 0 to T - 1.
    log_score: `[T]`.
    convolutions: the farthest lag at which a token may act through the
      layers' convolutions alone.
    log_a_max: what the slope is held against; None if there is none.

  Returns:
    `slope` with its 95 % interval `low`, `high` and `r_squared` as in
    `diagnostics.LogSlope`, the lags `first` to `last`, and the slopes `near`
    and `far` of both halves; None where there is too little to fit.
  """
  first, last = convolutions + 1, len(lags) // 2
  small = np.flatnonzero(~(log_score > FLOOR) & (lags >= first))
  if len(small):
    last = min(last, int(small[0]) - 1)
  if last - first < 12:
    return None
  middle = (first + last) // 2
  bound = math.nan if log_a_max is None else log_a_max
  fit = lambda low, high: diagnostics.fit_log_slope(
    lags, log_score, first=low, last=high, log_a_max=bound
  )
  line = fit(first, last)
  return {
    **{name: _digits(getattr(line, name)) for name in (
      "slope", "low", "high", "intercept", "r_squared"
    )},
    "first": first,
    "last": last,
    "points": line.points,
    "near": _digits(fit(first, middle).slope),
    "far": _digits(fit(middle, last).slope),
    "within_bound": None if log_a_max is None else bool(line.within_bound),
  }  # fmt: skip


def numbers(value: Any) -> Any:
  """Turn arrays into lists of five digits; what is not finite into None."""
  value = np.asarray(value, np.float64)
  return _digits(value.item()) if not value.ndim else list(map(numbers, value))


def _digits(value: float) -> float | None:
  return float(f"{value:.5g}") if math.isfinite(value) else None


def _curve(model, tokens, embeddings, times, probes, progress):
  """All influences, their mean by lag, and its logarithm, unscaled."""
  length = tokens.shape[1]
  function = jax.tree_util.Partial(_scaled_features, model, tokens)
  at = np.unique(np.linspace(length // 2, length - 1, times).astype(int))
  found = diagnostics.influence(
    function, embeddings, [int(t) for t in at],
    probes=probes, batch_size=8, progress=progress,
  )  # fmt: skip
  curve = diagnostics.lag_curve(found)
  return found, curve, curve.log_score - _SCALE * math.log(2)


def _scaled_features(model, tokens, embeddings):
  features, _ = model.features(tokens, embeddings=embeddings)
  return features * 2.0**_SCALE


def _convolutions(model) -> int:
  widths = [getattr(m, "d_conv", 1) for m in model.config.mixers]
  repeats = model.config.n_layers // len(widths)
  return repeats * sum(width - 1 for width in widths)


@jax.jit
def _layer(block: models.lm.Block, x: Float[Array, "B T M"]) -> dict:
  """What Eq. 1 of a layer says, its fixed states apart where they differ."""
  recurrence = block.mixer.recurrence(x)
  learned = learned_states(block.mixer, recurrence)
  kappa = theory.kappa(learned)
  recency = theory.recency_premises(recurrence)
  smoothing = theory.smoothing_premises(recurrence)
  log_a = jnp.log(learned.a[:, 1:])
  return {
    "log_a_max": diagnostics.log_a_max(recurrence).max(),
    "learned_log_a_max": diagnostics.log_a_max(learned).max(),
    # The channel that forgets least over the text, by its mean logarithm.
    "slowest": log_a.mean((0, 1)).max(),
    "recency_premise": recency.below_one.fraction,
    "smoothing_premise": smoothing.contraction.fraction,
    "kappa_median": jnp.median(kappa),
    "kappa_max": kappa.max(),
    "closed": diagnostics.log_decay(recurrence).max((0, *range(2, log_a.ndim))),
  }


def _two_sided(model, mixer_input):
  """The bounds of `theory.polarized_recency` of the first layer.

  On the beginning of a row: the exact Jacobian of more takes too long.
  """
  mixer = model.config.mixers[0]
  held = getattr(mixer, "polarization", None)
  if not (held and held.ones):
    return None
  states = mixer.expand * model.config.d_model * held.total(mixer.d_state)
  fits = _FACTORS // (mixer.d_conv * states * model.config.d_model)
  length = min(4 * mixer.d_conv, fits, mixer_input.shape[2])
  if length < 2 * mixer.d_conv:
    return None
  facts = _polarized_layer(model.block(0), mixer_input[0][:1, :length])
  facts = {name: numbers(v) for name, v in jax.device_get(facts).items()}
  return {"layer": 0, "tokens": length, **facts}


@jax.jit
def _polarized_layer(block, x):
  window = block.mixer.conv_weight.shape[0]
  made = theory.polarized_recency(block.mixer.recurrence, x, window=window)
  # The farthest pair of the excerpt. Without the whole Jacobian, which takes
  # ten times as long and is hardly more than its kept part there.
  kept = jnp.abs(made.kept[0, -1, 0])
  return {
    "floor": made.floor[0],
    "horizon": made.horizon[0],
    "rho": made.rho[0],
    "kept": kept.max(),
    "remainder": made.remainder[0, -1, 0],
    "lower": jnp.maximum(kept.max() - made.remainder[0, -1, 0], 0.0),
  }


def _thin(length: int) -> np.ndarray:
  """Lags for a plot: each of the first, then about a hundred."""
  step = max(1, length // 96)
  return np.unique(
    np.concatenate([np.arange(min(65, length)), np.arange(0, length, step)])
  )
