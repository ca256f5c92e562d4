"""The base of every layer and model here."""

import inspect

from flax import nnx

__all__ = ["Module"]


class _Signature:
  """The arguments of a class' `__init__`, for `help` and `inspect`."""

  def __get__(self, instance, owner):
    if instance is not None:
      # An instance is called otherwise; `inspect` then looks at `__call__`.
      raise AttributeError("__signature__")
    signature = inspect.signature(owner.__init__)
    _, *arguments = signature.parameters.values()
    nothing = inspect.Signature.empty
    return signature.replace(parameters=arguments, return_annotation=nothing)


class Module(nnx.Module):
  """An `nnx.Module` that shows how it is made.

  The metaclass of Flax has a `__call__(*args, **kwargs)`, which is all that
  `help` and `inspect.signature` would show of a class.
  """

  __signature__ = _Signature()
