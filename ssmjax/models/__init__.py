"""Flax nnx modules that hold parameters and call one op each."""

from ssmjax.models.attention import Attention, AttentionConfig, AttentionState
from ssmjax.models.blocks import Block
from ssmjax.models.cema import CEMA, CEMAConfig, CEMAState
from ssmjax.models.channel_mix import (
  RWKVChannelMix,
  RWKVChannelMixConfig,
  RWKVChannelMixState,
)
from ssmjax.models.classifier import Classifier
from ssmjax.models.config import ClassifierConfig, ModelConfig
from ssmjax.models.config_json import config_from_json, config_to_json
from ssmjax.models.delta_net import (
  DeltaNet,
  DeltaNetConfig,
  DeltaNetState,
  GatedDeltaNet,
  GatedDeltaNetConfig,
)
from ssmjax.models.gated_linear_attention import (
  GLA,
  HGRN2,
  GLAConfig,
  HGRN2Config,
)
from ssmjax.models.generate import (
  GenerationState,
  generate,
  prefill,
  stream,
)
from ssmjax.models.h3 import H3, H3Config, H3State
from ssmjax.models.hyena import Hyena, HyenaConfig, HyenaState
from ssmjax.models.kinds import register
from ssmjax.models.layers import LayerNorm, RMSNorm
from ssmjax.models.linear_attention import (
  LinearAttention,
  LinearAttentionConfig,
  LinearAttentionState,
  RetNet,
  RetNetConfig,
)
from ssmjax.models.lm import LanguageModel, ModelState
from ssmjax.models.lmu import LMU, LMUConfig, LMUState
from ssmjax.models.longhorn import Longhorn, LonghornConfig, LonghornState
from ssmjax.models.losses import (
  classification_loss,
  gather_labels,
  labelled_loss,
)
from ssmjax.models.mamba import Mamba, MambaConfig, MambaState
from ssmjax.models.mamba2 import Mamba2, Mamba2Config, Mamba2State
from ssmjax.models.min_rnn import (
  MinGRU,
  MinGRUConfig,
  MinLSTM,
  MinLSTMConfig,
  MinRNNState,
)
from ssmjax.models.mixer import Mixer, MixerConfig
from ssmjax.models.mlstm import MLSTM, MLSTMConfig, MLSTMState
from ssmjax.models.rglru import RGLRU, RGLRUConfig, RGLRUState
from ssmjax.models.rwkv import (
  RWKV5,
  RWKV6,
  RWKV5Config,
  RWKV6Config,
  RWKVState,
)
from ssmjax.models.rwkv4 import RWKV4, RWKV4Config, RWKV4State
from ssmjax.models.s4 import S4, S4Config
from ssmjax.models.s4_block import S4State
from ssmjax.models.s4d import DSS, S4D, DSSConfig, S4DConfig
from ssmjax.models.saving import load, save
from ssmjax.models.state_rows import take_rows
from ssmjax.models.ttt import TTTLinear, TTTLinearConfig, TTTLinearState

__all__ = [
  "CEMA",
  "DSS",
  "GLA",
  "H3",
  "HGRN2",
  "LMU",
  "MLSTM",
  "RGLRU",
  "RWKV4",
  "RWKV5",
  "RWKV6",
  "S4",
  "S4D",
  "Attention",
  "AttentionConfig",
  "AttentionState",
  "Block",
  "CEMAConfig",
  "CEMAState",
  "Classifier",
  "ClassifierConfig",
  "DSSConfig",
  "DeltaNet",
  "DeltaNetConfig",
  "DeltaNetState",
  "GLAConfig",
  "GatedDeltaNet",
  "GatedDeltaNetConfig",
  "GenerationState",
  "H3Config",
  "H3State",
  "HGRN2Config",
  "Hyena",
  "HyenaConfig",
  "HyenaState",
  "LMUConfig",
  "LMUState",
  "LanguageModel",
  "LayerNorm",
  "LinearAttention",
  "LinearAttentionConfig",
  "LinearAttentionState",
  "Longhorn",
  "LonghornConfig",
  "LonghornState",
  "MLSTMConfig",
  "MLSTMState",
  "Mamba",
  "Mamba2",
  "Mamba2Config",
  "Mamba2State",
  "MambaConfig",
  "MambaState",
  "MinGRU",
  "MinGRUConfig",
  "MinLSTM",
  "MinLSTMConfig",
  "MinRNNState",
  "Mixer",
  "MixerConfig",
  "ModelConfig",
  "ModelState",
  "RGLRUConfig",
  "RGLRUState",
  "RMSNorm",
  "RWKV4Config",
  "RWKV4State",
  "RWKV5Config",
  "RWKV6Config",
  "RWKVChannelMix",
  "RWKVChannelMixConfig",
  "RWKVChannelMixState",
  "RWKVState",
  "RetNet",
  "RetNetConfig",
  "S4Config",
  "S4DConfig",
  "S4State",
  "TTTLinear",
  "TTTLinearConfig",
  "TTTLinearState",
  "classification_loss",
  "config_from_json",
  "config_to_json",
  "gather_labels",
  "generate",
  "labelled_loss",
  "load",
  "prefill",
  "register",
  "save",
  "stream",
  "take_rows",
]
