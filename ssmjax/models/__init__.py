"""Flax nnx modules that hold parameters and call one op each."""

from ssmjax.models.attention import Attention, AttentionConfig, AttentionState
from ssmjax.models.config_json import config_from_json, config_to_json
from ssmjax.models.generate import generate, prefill
from ssmjax.models.layers import LayerNorm, RMSNorm
from ssmjax.models.lm import Block, LanguageModel, ModelConfig, ModelState
from ssmjax.models.losses import gather_labels, labelled_loss
from ssmjax.models.mamba import Mamba, MambaConfig, MambaState

__all__ = [
  "Attention",
  "AttentionConfig",
  "AttentionState",
  "Block",
  "LanguageModel",
  "LayerNorm",
  "Mamba",
  "MambaConfig",
  "MambaState",
  "ModelConfig",
  "ModelState",
  "RMSNorm",
  "config_from_json",
  "config_to_json",
  "gather_labels",
  "generate",
  "labelled_loss",
  "prefill",
]
