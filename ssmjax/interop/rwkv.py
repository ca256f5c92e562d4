"""RWKV-4 as transformers publishes it."""

from typing import Any

from ssmjax.interop.formats import (
  LINEAR,
  SAME,
  Format,
  Layout,
  Tensor,
  beyond,
  flag,
  lacking,
  layer_count,
  whole_number,
)
from ssmjax.models import ModelConfig, RWKV4Config, RWKVChannelMixConfig

__all__ = ["FORMATS"]


def _config(fields, dtype) -> ModelConfig:
  d_model = whole_number(fields, "hidden_size")
  epsilon = fields.get("layer_norm_epsilon", 1e-5)
  if epsilon != _EPSILON:
    raise lacking(
      f"layer_norm_epsilon is {epsilon!r}",
      f"last norm, whose epsilon is {_EPSILON} there whatever that says,"
      " with another epsilon than the blocks'",
    )
  width = _width(fields, "attention_hidden_size", d_model)
  hidden = _width(fields, "intermediate_size", 4 * d_model)
  return ModelConfig(
    vocab_size=whole_number(fields, "vocab_size"),
    d_model=d_model,
    # Each half of a block is a layer here.
    n_layers=2 * layer_count(fields, "num_hidden_layers"),
    mixers=(
      RWKV4Config(width, dtype=dtype),
      RWKVChannelMixConfig(hidden, dtype=dtype),
    ),
    norm_epsilon=_EPSILON,
    final_norm="layer",
    block_norm="layer",
    embedding_norm=True,
    tie_embeddings=flag(fields, "tie_word_embeddings", False),
    dtype=dtype,
  )


def _fields(config: ModelConfig, dtype: str) -> dict[str, Any]:
  reasons = _reasons(config)
  if reasons:
    raise NotImplementedError(
      "save_pretrained: the published format of RWKV-4 cannot hold "
      + "; ".join(reasons)
      + ". Keep such a model as a checkpoint of ssmjax.training."
    )
  time, channel = config.mixers[:2]
  width, hidden = _widths(config, time, channel)
  return {
    "architectures": ["RwkvForCausalLM"],
    "model_type": "rwkv",
    "vocab_size": config.vocab_size,
    "hidden_size": config.d_model,
    "attention_hidden_size": width,
    "intermediate_size": hidden,
    "num_hidden_layers": config.n_layers // 2,
    "layer_norm_epsilon": config.norm_epsilon,
    "tie_word_embeddings": config.tie_embeddings,
    # What versions before 5 call it, too.
    "torch_dtype": dtype,
  }


def _reasons(config: ModelConfig) -> list[str]:
  """What the format has no words for."""
  reasons = []
  pairs: list[list[Any]] = []
  for number in range(0, config.n_layers, 2):
    pair = [config.mixers[n % len(config.mixers)] for n in (number, number + 1)]
    if tuple(map(type, pair)) != (RWKV4Config, RWKVChannelMixConfig):
      kinds = ", ".join(type(mixer).__name__ for mixer in pair)
      return [f"a block of {kinds}"]
    pairs.append(pair)
  if len({_widths(config, *pair) for pair in pairs}) > 1:
    reasons.append("layers of different sizes")
  for time in dict.fromkeys(time for time, _ in pairs):
    held = time.polarization
    if held and (held.ones or held.zeros):
      reasons.append(f"channels whose decay is not learned: {held}")
  if config.norm_epsilon != _EPSILON:
    reasons.append(
      f"norm_epsilon={config.norm_epsilon} (its readers take {_EPSILON} in the"
      " last norm)"
    )
  for name, value in (
    ("final_norm", "layer"), ("block_norm", "layer"), ("embedding_norm", True)
  ):  # fmt: skip
    if getattr(config, name) != value:
      reasons.append(f"{name}={getattr(config, name)!r}")
  own = ("final_norm", "block_norm", "embedding_norm", "tie_embeddings")
  return reasons + beyond(config, *own)


def _widths(config, time, channel) -> tuple[int, int]:
  return (
    time.width or config.d_model,
    channel.width or 4 * config.d_model,
  )


def _width(fields, name, default) -> int:
  """A width, which may be null."""
  if fields.get(name) is None:
    return default
  return whole_number(fields, name)


def _table(config: ModelConfig, number: int | None) -> tuple[Tensor, ...]:
  if number is None:
    return (
      Tensor("embedding", ("rwkv.embeddings.weight",), SAME, wide=True),
      *_norm("embedding_norm", "rwkv.blocks.0.pre_ln"),
      *_norm("norm", "rwkv.ln_out"),
    )
  index, half = divmod(number, 2)
  block = f"rwkv.blocks.{index}"
  if half:
    return (*_norm("norm", f"{block}.ln2"), *_mixer(_CHANNEL, block))
  return (*_norm("norm", f"{block}.ln1"), *_mixer(_TIME, block))


def _norm(parameter: str, name: str) -> tuple[Tensor, ...]:
  return (
    Tensor(f"{parameter}.scale", (f"{name}.weight",), SAME, wide=True),
    Tensor(f"{parameter}.bias", (f"{name}.bias",), SAME, wide=True),
  )


def _mixer(table, block: str) -> tuple[Tensor, ...]:
  part, lines = table
  return tuple(
    Tensor(f"mixer.{ours}", (f"{block}.{part}.{theirs}",), layout, wide)
    for ours, theirs, layout, wide in lines
  )


_EPSILON = 1e-5
# [1, 1, M] there.
_MIX = Layout(lambda x: x[0, 0], lambda x: x[None, None])
_TIME = (
  "attention",
  (
    ("time_decay", "time_decay", SAME, True),
    ("bonus", "time_first", SAME, True),
    ("mix_key", "time_mix_key", _MIX, True),
    ("mix_value", "time_mix_value", _MIX, True),
    ("mix_receptance", "time_mix_receptance", _MIX, True),
    ("k_proj", "key.weight", LINEAR, False),
    ("v_proj", "value.weight", LINEAR, False),
    ("r_proj", "receptance.weight", LINEAR, False),
    ("out_proj", "output.weight", LINEAR, False),
  ),
)
_CHANNEL = (
  "feed_forward",
  (
    ("mix_key", "time_mix_key", _MIX, True),
    ("mix_receptance", "time_mix_receptance", _MIX, True),
    ("k_proj", "key.weight", LINEAR, False),
    ("r_proj", "receptance.weight", LINEAR, False),
    ("v_proj", "value.weight", LINEAR, False),
  ),
)
FORMATS = (
  Format(
    name="hf",
    title="a RwkvForCausalLM of transformers",
    matches=lambda fields: fields.get("model_type") == "rwkv",
    read_config=_config,
    mixer=RWKV4Config,
    write_config=_fields,
    table=_table,
    head="head.weight",
  ),
)
