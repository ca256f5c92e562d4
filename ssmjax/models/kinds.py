"""Every kind of mixer, by the name that files and tables have for it.

The configuration of a kind says what a table of kinds shows: `op`, the
function of `ssmjax.ops` that runs it over time, and `polarizes`, whose decays
its polarization holds; None where there is none.
"""

from typing import Any

from ssmjax.models.attention import AttentionConfig
from ssmjax.models.cema import CEMAConfig
from ssmjax.models.channel_mix import RWKVChannelMixConfig
from ssmjax.models.delta_net import DeltaNetConfig, GatedDeltaNetConfig
from ssmjax.models.gated_linear_attention import GLAConfig, HGRN2Config
from ssmjax.models.h3 import H3Config
from ssmjax.models.hyena import HyenaConfig
from ssmjax.models.linear_attention import LinearAttentionConfig, RetNetConfig
from ssmjax.models.lmu import LMUConfig
from ssmjax.models.longhorn import LonghornConfig
from ssmjax.models.mamba import MambaConfig
from ssmjax.models.mamba2 import Mamba2Config
from ssmjax.models.min_rnn import MinGRUConfig, MinLSTMConfig
from ssmjax.models.mlstm import MLSTMConfig
from ssmjax.models.rglru import RGLRUConfig
from ssmjax.models.rwkv import RWKV5Config, RWKV6Config
from ssmjax.models.rwkv4 import RWKV4Config
from ssmjax.models.s4 import S4Config
from ssmjax.models.s4d import DSSConfig, S4DConfig
from ssmjax.models.ttt import TTTLinearConfig

__all__ = ["MIXERS"]

MIXERS: dict[str, Any] = {
  "s4": S4Config,
  "s4d": S4DConfig,
  "dss": DSSConfig,
  "h3": H3Config,
  "lmu": LMUConfig,
  "hyena": HyenaConfig,
  "cema": CEMAConfig,
  "mamba": MambaConfig,
  "mamba2": Mamba2Config,
  "longhorn": LonghornConfig,
  "rglru": RGLRUConfig,
  "mingru": MinGRUConfig,
  "minlstm": MinLSTMConfig,
  "hgrn2": HGRN2Config,
  "linear_attention": LinearAttentionConfig,
  "retnet": RetNetConfig,
  "gla": GLAConfig,
  "rwkv4": RWKV4Config,
  "rwkv_channel_mix": RWKVChannelMixConfig,
  "rwkv5": RWKV5Config,
  "rwkv6": RWKV6Config,
  "mlstm": MLSTMConfig,
  "deltanet": DeltaNetConfig,
  "gated_deltanet": GatedDeltaNetConfig,
  "ttt_linear": TTTLinearConfig,
  "attention": AttentionConfig,
}
