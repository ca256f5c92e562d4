"""Instruments: where a layer or a model forgets, smooths, and by what decays.

Functions of arrays, of callables and of the `Recurrence` that a layer shows;
they know no model.

  influence (Figs. 1, 7)   `influence`, `influence_memory` of a whole model;
                           `layer_influence`, `log_decay` of one layer;
                           `lag_curve`, `fit_log_slope`, `log_a_max`
  smoothness (Fig. 5)      `sharpness`, `layer_smoothness`
  spectra (Fig. 6)         `spectrum`, `memory_length`, `cumulative_share`;
                           `SpectrumRecorder` while a model is trained

Figures of Wang et al. 2025, arXiv 2501.00658.
"""

from ssmjax.diagnostics.influence import (
  Influence,
  influence,
  influence_memory,
)
from ssmjax.diagnostics.layer_influence import (
  LayerInfluence,
  autodiff_jacobian,
  layer_influence,
  log_a_max,
  log_decay,
)
from ssmjax.diagnostics.recorder import SpectrumRecorder, summarise
from ssmjax.diagnostics.slope import (
  LagCurve,
  LogSlope,
  fit_log_slope,
  lag_curve,
)
from ssmjax.diagnostics.smoothness import (
  LayerSmoothness,
  Sharpness,
  channel_spread,
  layer_smoothness,
  sharpness,
)
from ssmjax.diagnostics.spectra import (
  Spectrum,
  cumulative_share,
  memory_length,
  spectrum,
)

__all__ = [
  "Influence",
  "LagCurve",
  "LayerInfluence",
  "LayerSmoothness",
  "LogSlope",
  "Sharpness",
  "Spectrum",
  "SpectrumRecorder",
  "autodiff_jacobian",
  "channel_spread",
  "cumulative_share",
  "fit_log_slope",
  "influence",
  "influence_memory",
  "lag_curve",
  "layer_influence",
  "layer_smoothness",
  "log_a_max",
  "log_decay",
  "memory_length",
  "sharpness",
  "spectrum",
  "summarise",
]
