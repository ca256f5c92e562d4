"""Every published format that is known; a family adds its own here."""

from ssmjax.interop import mamba, mamba2
from ssmjax.interop.formats import Format

__all__ = ["FORMATS"]

FORMATS: tuple[Format, ...] = (*mamba2.FORMATS, *mamba.FORMATS)
