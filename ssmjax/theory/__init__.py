"""The theorems of Wang et al. 2025 (arXiv 2501.00658) as functions.

Each result is a function that returns both of its sides, and each premise a
check that says at which share of the (t, n) it holds and where it is missed by
most. A docstring has the statement, a proof, and where the paper errs.

  Eq. 1                     `from_arrays`, `states`, `outputs`
  Lemma D.1                 `parallel_form`, `parallel_weights`
  Theorem 3.1 / D.2         `recency`; `recency_premises`, `locality_premise`,
                            `dependence_window`
  Definition D.3            `stop_band_peak`
  Proposition 4.1 / D.4     `low_pass`; `cutoff`, `transfer`,
                            `transfer_bound`; `low_pass_premise`
  Theorem 4.2 / D.5         `oversmoothing`; `smoothing_premises`
  Lemma D.6                 `state_envelope`

Beyond the paper:

  where A + Δ ≤ 1 fails     `kappa_smoothing`, `kappa`
  polarized layers          `polarized_recency`, from both sides
  complex decays            `rotating_frame`
  exact discretisation      `zero_order_hold`, which restores the premise
  discrete time             `discrete_transfer`, no low-pass there
"""

from ssmjax.theory.eq1 import (
  from_arrays,
  outputs,
  rotating_frame,
  states,
  zero_order_hold,
)
from ssmjax.theory.influence import dependence_window, locality_premise
from ssmjax.theory.kappa import KappaSmoothing, kappa, kappa_smoothing
from ssmjax.theory.low_pass import (
  LowPass,
  cutoff,
  discrete_transfer,
  low_pass,
  low_pass_premise,
  stop_band_peak,
  transfer,
  transfer_bound,
)
from ssmjax.theory.parallel import (
  ParallelForm,
  parallel_form,
  parallel_weights,
)
from ssmjax.theory.premises import Premise
from ssmjax.theory.recency import (
  PolarizedRecency,
  Recency,
  RecencyPremises,
  polarized_recency,
  recency,
  recency_premises,
)
from ssmjax.theory.smoothing import (
  OverSmoothing,
  SmoothingPremises,
  StateEnvelope,
  oversmoothing,
  smoothing_premises,
  spread,
  state_envelope,
)

__all__ = [
  "KappaSmoothing",
  "LowPass",
  "OverSmoothing",
  "ParallelForm",
  "PolarizedRecency",
  "Premise",
  "Recency",
  "RecencyPremises",
  "SmoothingPremises",
  "StateEnvelope",
  "cutoff",
  "dependence_window",
  "discrete_transfer",
  "from_arrays",
  "kappa",
  "kappa_smoothing",
  "locality_premise",
  "low_pass",
  "low_pass_premise",
  "outputs",
  "oversmoothing",
  "parallel_form",
  "parallel_weights",
  "polarized_recency",
  "recency",
  "recency_premises",
  "rotating_frame",
  "smoothing_premises",
  "spread",
  "state_envelope",
  "states",
  "stop_band_peak",
  "transfer",
  "transfer_bound",
  "zero_order_hold",
]
