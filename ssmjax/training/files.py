"""Small files that are either the old or the new one, never a half."""

import json
import os
import pathlib
from typing import Any


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
  """Writes `data` to `path` such that a kill leaves the old or the new file.

  Temporary file beside the target, fsync, `os.replace`, fsync of the folder:
  after the call returns, the new content also survives a loss of power.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.tmp")
  with open(temporary, "wb") as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)
  folder = os.open(path.parent, os.O_RDONLY)
  try:
    os.fsync(folder)
  finally:
    os.close(folder)


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes `value` as indented JSON by `write_atomically`."""
  text = json.dumps(value, indent=2, ensure_ascii=False)
  write_atomically(path, (text + "\n").encode())


def differing_fields(found: Any, expected: Any, prefix: str = "") -> list[str]:
  """Names the fields in which two JSON values differ, one line each."""
  if isinstance(found, dict) and isinstance(expected, dict):
    lines = []
    for name in sorted(found.keys() | expected.keys()):
      lines += differing_fields(
        found.get(name, _MISSING),
        expected.get(name, _MISSING),
        f"{prefix}.{name}" if prefix else name,
      )
    return lines
  if found is expected or found == expected:
    return []
  return [f"{prefix}: found {_show(found)}, expected {_show(expected)}"]


_MISSING = object()


def _show(value: Any) -> str:
  return (
    "nothing" if value is _MISSING else json.dumps(value, ensure_ascii=False)
  )
