"""The example in `ssmjax.models.mixer`, run as a user's own module."""

import contextlib
import re
import sys
import textwrap
import types
from unittest import mock

from ssmjax.models import kinds, mixer


def parts():
  """The two pieces of code: the mixer, and what is done with it."""
  found = re.findall(r"::\n\n((?:    .*\n|\n)+)", mixer.__doc__)
  return [textwrap.dedent(text) for text in found]


@contextlib.contextmanager
def registrations():
  """What is registered inside is forgotten after it."""
  with mock.patch.dict(kinds._REGISTERED):
    yield


def module(*code, name="user_ema"):
  """Run code as a module of this name."""
  made = sys.modules[name] = types.ModuleType(name)
  exec(compile("\n".join(code), f"<{name}>", "exec"), vars(made))
  return made
