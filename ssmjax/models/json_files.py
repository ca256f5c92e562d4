"""Files of JSON that come from elsewhere."""

import json
import pathlib
from typing import Any

__all__ = ["read_object"]

# Configurations and indices nest three or four objects.
_DEEPEST = 64


def read_object(path: pathlib.Path, function: str) -> dict[str, Any]:
  """Read a file that holds one JSON object.

  Args:
    path: the file.
    function: the public function that its errors name.

  Raises:
    ValueError: it holds no JSON, or no object, or one that nests more than 64
      lists and objects: to compare or print such a value would end in a
      RecursionError.
  """
  try:
    value = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f"{function}: {path} is no JSON: {error}. Download or write it again."
    ) from error
  if not isinstance(value, dict):
    raise ValueError(f"{function}: {path} holds no object.")
  if _is_deeper(value, _DEEPEST):
    raise ValueError(
      f"{function}: {path} nests more than {_DEEPEST} lists and objects."
      " Download or write it again."
    )
  return value


def _is_deeper(value: Any, depth: int) -> bool:
  """True if lists and objects nest deeper than that."""
  level = [value]
  for _ in range(depth):
    level = [
      inner
      for outer in level
      if isinstance(outer, list | dict)
      for inner in (outer.values() if isinstance(outer, dict) else outer)
    ]
  return any(isinstance(inner, list | dict) for inner in level)
