"""Every published format that is known; a family adds its own here."""

from ssmjax.interop import (
  gpt_neox,
  mamba,
  mamba2,
  mistral,
  recurrentgemma,
  rwkv,
)
from ssmjax.interop.formats import Format

__all__ = ["FORMATS"]

FORMATS: tuple[Format, ...] = (
  *mamba2.FORMATS,
  *mamba.FORMATS,
  *gpt_neox.FORMATS,
  *mistral.FORMATS,
  *recurrentgemma.FORMATS,
  *rwkv.FORMATS,
)
