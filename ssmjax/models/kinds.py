"""Every kind of mixer, by the name that files and tables have for it.

`MIXERS` has the library's own. The configuration of such a kind says what a
table of kinds shows: `op`, the function of `ssmjax.ops` that runs it over
time, and `polarizes`, whose decays its polarization holds; None where there is
none. A user's kind joins by `register`.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any, overload

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

__all__ = ["MIXERS", "kind_of", "kinds", "register"]

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

_REGISTERED: dict[str, Any] = {}


@overload
def register[C: type](config: C, *, name: str | None = None) -> C: ...


@overload
def register[C: type](
  config: None = None, *, name: str | None = None
) -> Callable[[C], C]: ...


def register(config: Any = None, *, name: str | None = None) -> Any:
  """Make a mixer of your own one that is saved and loaded like the library's.

  A call, `register(EMAConfig)`, or a decorator, `@register` or
  `@register(name="ema")`, above `@dataclasses.dataclass(frozen=True)`. The
  kind is known in this process from then on: a file names its kind, and
  whoever loads it has to have imported the module that registers it. What the
  configuration and its mixer promise is in `ssmjax.models.mixer`.

  The same class defined again (a cell of a notebook run twice, a module
  reloaded) takes the place of the former.

  Args:
    config: the class of the mixer's configurations.
    name: of the kind, in lower case with underscores; None makes it of the
      class's: `EMAConfig` is `ema`, `SlowMixerConfig` `slow_mixer`.

  Returns:
    The class, as it was given.

  Raises:
    ValueError: the class lacks what a configuration needs; the name is none,
      or another kind has it; the class is there by another name.
  """
  if config is None:
    return lambda config: register(config, name=name)
  _check_config(config)
  name = _snake(config.__name__) if name is None else name
  if not isinstance(name, str) or not re.fullmatch("[a-z][a-z0-9_]*", name):
    raise ValueError(
      f"register: name is {name!r}, expected one of lower-case letters, digits"
      " and underscores, as 'slow_mixer'."
    )
  for other, known in kinds().items():
    same = known is config or _defined_again(known, config)
    if other == name and not same:
      raise ValueError(
        f"register: {name!r} is a kind already, of {_where(known)}, expected"
        f" another name for {_where(config)}. Pass name=."
      )
    if same and other != name:
      raise ValueError(
        f"register: {_where(config)} is the kind {other!r} already, expected"
        " one name for a class."
      )
  if name not in MIXERS:
    _REGISTERED[name] = config
  return config


def kinds() -> dict[str, Any]:
  """Give the configuration of every kind by its name, registered ones last."""
  return MIXERS | _REGISTERED


def kind_of(mixer: Any) -> str | None:
  """Name the kind of a mixer's configuration; None for one of no kind."""
  for name, config in kinds().items():
    if type(mixer) is config:
      return name
  return None


def _check_config(config: Any) -> None:
  """Raise ValueError unless a class can be a mixer's configuration."""
  if not isinstance(config, type):
    raise ValueError(
      f"register: config is {config!r}, expected a class of configurations."
    )
  name = config.__name__
  if "__dataclass_params__" not in vars(config):
    # A parent's do not count: the class's own fields would not be written.
    raise ValueError(
      f"register: {name} is no dataclass, expected one whose fields are written"
      " to files. Put @dataclasses.dataclass(frozen=True) below the"
      " registration."
    )
  params = vars(config)["__dataclass_params__"]
  if not params.frozen or not params.eq or config.__hash__ is None:
    raise ValueError(
      f"register: {name} is not frozen, or without equality or a hash, expected"
      " @dataclasses.dataclass(frozen=True): JAX compiles a model once for all"
      " configurations that are equal."
    )
  for field in dataclasses.fields(config):
    if not field.init:
      raise ValueError(
        f"register: {name}.{field.name} is not an argument (init=False),"
        " expected fields that a configuration is made of."
      )
  build = getattr(config, "build", None)
  try:
    # A class's function has itself as the first argument.
    inspect.signature(build).bind(None, 8, 2, None)  # type: ignore[arg-type]
  except (TypeError, ValueError):
    raise ValueError(
      f"register: {name} has no method build(d_model, n_layers, rngs), expected"
      " the one that makes its mixer, see ssmjax.models.mixer."
    ) from None


def _defined_again(known, config) -> bool:
  """True of two classes that one place in one module has made."""
  place = lambda c: (c.__module__, c.__qualname__)
  return place(known) == place(config) and "<locals>" not in place(config)[1]


def _snake(name: str) -> str:
  """`SlowEMAConfig` as `slow_ema`."""
  name = name.removesuffix("Config") or name
  return re.sub(
    "(?<=[a-z])(?=[A-Z])|(?<=[A-Z0-9])(?=[A-Z][a-z])", "_", name
  ).lower()


def _where(config) -> str:
  return f"{config.__module__}.{config.__qualname__}"
