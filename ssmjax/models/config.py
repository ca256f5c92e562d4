"""Configurations of whole models: sizes, the pattern of mixers, choices."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from ssmjax.models.mamba import MambaConfig
from ssmjax.models.mixer import MixerConfig
from ssmjax.types import Count, FloatingDType, Positive, Size, check_fields

__all__ = ["ClassifierConfig", "MixerConfig", "ModelConfig"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Sizes and choices of a `LanguageModel`.

  Attributes:
    vocab_size: V.
    d_model: width.
    n_layers: blocks, a multiple of the pattern's length.
    mixers: the pattern of mixers, repeated; one entry for a uniform model, or
      that mixer's configuration by itself.
    mlp_ratio: hidden width of each block's MLP over d_model; 0 for no MLP.
    max_positions: size of a table of learned positions added to the
      embedding; None for none.
    norm_epsilon: of every norm.
    final_norm: `"rms"`, or `"layer"` (what the recall experiments of Wang et
      al. 2025 have).
    init: as in `MambaConfig`, for what is not inside a mixer.
    remat: recompute each block in the backward pass; keeps one activation a
      block in memory.
    dtype: dtype of activations outside the mixers; the residual is float32.
    tie_embeddings: whether the embedding is also the matrix to the logits;
      else there is a `head` of its own.
    block_norm: the norms inside blocks, `"rms"` or `"layer"`.
    embedding_norm: a LayerNorm between the embedding and the first block, as
      RWKV-4 has it.
    embedding_scale: factor of the embedding (Gemma: √d_model).
    logit_softcap: c where logits are c·tanh(logits / c), as in Gemma 2 and
      RecurrentGemma; None for logits as they are.
    mlp: `"gelu"`, W₂ gelu(W₁x), by its tanh form; `"gelu_exact"`, by the error
      function; the gated `"swiglu"`, W₂ (silu(Wₘx) ∘ W₁x), and `"geglu"`, the
      same with gelu's tanh form (Shazeer 2020, arXiv 2002.05202).
    mlp_width: hidden width of the MLP in place of mlp_ratio · d_model.
    mlp_bias: biases in the MLP.
    parallel_residual: x + mixer(norm(x)) + mlp(norm(x)), each with its own
      norm, as in GPT-NeoX, in place of one after the other.
    true_vocab_size: tokens that there are, where the last rows of vocab_size
      only pad the table, as published ones are; `generate` chooses none of
      these. None for all of them.
    origin: folder of the checkpoint that the model was loaded from, out of
      which it is saved again with its tokenizer and special tokens. It says
      nothing about the model's numbers and is not compared: configurations
      that differ in it alone are equal.
  """

  vocab_size: Size
  d_model: Size
  n_layers: Size
  mixers: tuple[MixerConfig, ...] = (MambaConfig(),)
  mlp_ratio: Count = 0
  max_positions: Size | None = None
  norm_epsilon: Positive = 1e-5
  final_norm: Literal["rms", "layer"] = "rms"
  init: Literal["mamba", "authors"] = "mamba"
  remat: bool = True
  dtype: FloatingDType = jnp.float32
  tie_embeddings: bool = True
  block_norm: Literal["rms", "layer"] = "rms"
  embedding_norm: bool = False
  embedding_scale: float = 1.0
  logit_softcap: Positive | None = None
  mlp: Literal["gelu", "gelu_exact", "swiglu", "geglu"] = "gelu"
  mlp_width: Size | None = None
  mlp_bias: bool = False
  parallel_residual: bool = False
  true_vocab_size: Size | None = None
  origin: str | None = dataclasses.field(default=None, compare=False)

  def __post_init__(self):
    _check_fields(self)
    if (self.true_vocab_size or 0) > self.vocab_size:
      raise ValueError(
        f"ModelConfig: true_vocab_size is {self.true_vocab_size}, expected at"
        f" most vocab_size={self.vocab_size}, the rows of the table."
      )


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
  """Sizes and choices of a `Classifier`.

  Attributes:
    n_classes: C.
    d_model: width.
    n_layers: blocks, a multiple of the pattern's length.
    vocab_size: V, where inputs are tokens.
    n_features: F, where inputs are real features; give one of the two.
    mixers: the pattern of mixers, as in `ModelConfig`, like all that follows
      and is not said here.
    pooling: what of a sequence the head sees: the `"mean"` of its tokens, the
      `"last"` of them, or a learned `"token"` appended to it.
    mlp_ratio: of each block's MLP.
    max_positions: size of a table of learned positions; the appended token has
      none.
    norm_epsilon: of every norm.
    final_norm: `"rms"` or `"layer"`.
    init: for what is not inside a mixer.
    remat: recompute each block in the backward pass.
    dtype: dtype of activations outside the mixers.
    block_norm: the norms inside blocks.
    embedding_norm: a LayerNorm before the first block.
    mlp: kind of MLP.
    mlp_width: hidden width of the MLP.
    mlp_bias: biases in the MLP.
    parallel_residual: mixer and MLP side by side.
  """

  n_classes: Size
  d_model: Size
  n_layers: Size
  vocab_size: Size | None = None
  n_features: Size | None = None
  mixers: tuple[MixerConfig, ...] = (MambaConfig(),)
  pooling: Literal["mean", "last", "token"] = "mean"
  mlp_ratio: Count = 0
  max_positions: Size | None = None
  norm_epsilon: Positive = 1e-5
  final_norm: Literal["rms", "layer"] = "rms"
  init: Literal["mamba", "authors"] = "mamba"
  remat: bool = True
  dtype: FloatingDType = jnp.float32
  block_norm: Literal["rms", "layer"] = "rms"
  embedding_norm: bool = False
  mlp: Literal["gelu", "gelu_exact", "swiglu", "geglu"] = "gelu"
  mlp_width: Size | None = None
  mlp_bias: bool = False
  parallel_residual: bool = False

  def __post_init__(self):
    _check_fields(self)
    if (self.vocab_size is None) == (self.n_features is None):
      raise ValueError(
        f"ClassifierConfig: vocab_size is {self.vocab_size} and n_features is"
        f" {self.n_features}, expected one of them: tokens or features."
      )


def _check_fields(config):
  """Raise ValueError for what a model cannot be built of."""
  name = type(config).__name__
  if not isinstance(config.mixers, tuple | list):
    # One alone is a pattern of one.
    object.__setattr__(config, "mixers", (config.mixers,))
  check_fields(config)
  for index, mixer in enumerate(config.mixers):
    try:
      hash(mixer)
    except TypeError as error:
      raise ValueError(
        f"{name}: mixers[{index}] is a {type(mixer).__name__} without a hash,"
        " expected a hashable configuration, as of a frozen dataclass: it is"
        " part of what a compiled program belongs to."
      ) from error
  if not config.mixers or config.n_layers % len(config.mixers):
    raise ValueError(
      f"{name}: n_layers is {config.n_layers}, expected a multiple of"
      f" the pattern of {len(config.mixers)} mixers. Change n_layers, or"
      " write the whole pattern out in mixers."
    )
