"""Every kind of mixer, by the name that files and tables have for it.

The configuration of a kind says what a table of kinds shows: `op`, the
function of `ssmjax.ops` that runs it over time, and `polarizes`, whose decays
its polarization holds; None where there is none.
"""

from ssmjax.models.attention import AttentionConfig
from ssmjax.models.mamba import MambaConfig
from ssmjax.models.min_rnn import MinGRUConfig, MinLSTMConfig
from ssmjax.models.rglru import RGLRUConfig

__all__ = ["MIXERS"]

MIXERS = {
  "mamba": MambaConfig,
  "rglru": RGLRUConfig,
  "mingru": MinGRUConfig,
  "minlstm": MinLSTMConfig,
  "attention": AttentionConfig,
}
