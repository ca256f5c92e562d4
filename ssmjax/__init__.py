"""State space models in JAX: fast, understood and mended.

Submodules load when they are first used, so `import ssmjax` is instant and
needs only what you use: `ssmjax.ops` does not load Flax, nothing but a
checkpoint loads Orbax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from ssmjax import (
    data,
    diagnostics,
    interop,
    models,
    ops,
    polarization,
    theory,
    training,
    types,
  )

__all__ = [
  "data",
  "diagnostics",
  "interop",
  "models",
  "ops",
  "polarization",
  "theory",
  "training",
  "types",
]


def __getattr__(name: str) -> Any:
  if name == "__version__":
    return importlib.import_module("importlib.metadata").version("ssmjax")
  if name in __all__:
    return importlib.import_module(f"ssmjax.{name}")
  raise AttributeError(f"module 'ssmjax' has no attribute {name!r}")


def __dir__() -> list[str]:
  return [*__all__, "__version__"]
