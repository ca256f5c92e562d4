"""Pure functions on arrays: the recurrences, over time and one step."""

from ssmjax.ops.conv import (
  causal_conv,
  causal_conv_reference,
  causal_conv_step,
)
from ssmjax.ops.cross_entropy import linear_cross_entropy
from ssmjax.ops.delta import (
  delta_rule,
  delta_rule_reference,
  delta_rule_step,
)
from ssmjax.ops.gla import (
  gated_linear_attention,
  gated_linear_attention_reference,
  gated_linear_attention_step,
)
from ssmjax.ops.long_conv import (
  long_conv,
  long_conv_reference,
  long_conv_step,
)
from ssmjax.ops.lti import bilinear, bilinear_dplr, zero_order_hold
from ssmjax.ops.lti_hippo import hippo_legs, hippo_legs_dplr, hippo_legt
from ssmjax.ops.lti_kernels import dss_kernel, s4_dplr_kernel, s4d_kernel
from ssmjax.ops.lti_matrix import (
  lti_matrix_scan,
  lti_matrix_scan_reference,
  lti_matrix_step,
)
from ssmjax.ops.lti_recurrence import lti_scan, lti_scan_reference, lti_step
from ssmjax.ops.scan import linear_scan, linear_scan_reference, linear_step
from ssmjax.ops.selective import (
  selective_scan,
  selective_scan_reference,
  selective_step,
)
from ssmjax.ops.ssd import ssd, ssd_reference, ssd_step
from ssmjax.ops.ttt import (
  TTTLearner,
  TTTState,
  ttt_linear,
  ttt_linear_reference,
  ttt_linear_step,
  ttt_positions,
)

__all__ = [
  "TTTLearner",
  "TTTState",
  "bilinear",
  "bilinear_dplr",
  "causal_conv",
  "causal_conv_reference",
  "causal_conv_step",
  "delta_rule",
  "delta_rule_reference",
  "delta_rule_step",
  "dss_kernel",
  "gated_linear_attention",
  "gated_linear_attention_reference",
  "gated_linear_attention_step",
  "hippo_legs",
  "hippo_legs_dplr",
  "hippo_legt",
  "linear_cross_entropy",
  "linear_scan",
  "linear_scan_reference",
  "linear_step",
  "long_conv",
  "long_conv_reference",
  "long_conv_step",
  "lti_matrix_scan",
  "lti_matrix_scan_reference",
  "lti_matrix_step",
  "lti_scan",
  "lti_scan_reference",
  "lti_step",
  "s4_dplr_kernel",
  "s4d_kernel",
  "selective_scan",
  "selective_scan_reference",
  "selective_step",
  "ssd",
  "ssd_reference",
  "ssd_step",
  "ttt_linear",
  "ttt_linear_reference",
  "ttt_linear_step",
  "ttt_positions",
  "zero_order_hold",
]
