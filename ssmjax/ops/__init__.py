"""Pure functions on arrays: the recurrences, over time and one step."""

from ssmjax.ops.conv import (
  causal_conv,
  causal_conv_reference,
  causal_conv_step,
)
from ssmjax.ops.cross_entropy import linear_cross_entropy
from ssmjax.ops.scan import linear_scan, linear_scan_reference, linear_step
from ssmjax.ops.selective import (
  selective_scan,
  selective_scan_reference,
  selective_step,
)

__all__ = [
  "causal_conv",
  "causal_conv_reference",
  "causal_conv_step",
  "linear_cross_entropy",
  "linear_scan",
  "linear_scan_reference",
  "linear_step",
  "selective_scan",
  "selective_scan_reference",
  "selective_step",
]
