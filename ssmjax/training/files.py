"""Small files that are either the old or the new one, never a half."""

import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
from typing import Any


class SaveError(OSError):
  """What a run writes could not be written; says where and the way out."""


def save_error(
  what: str, folder: pathlib.Path, error: Exception, way_out: str, size: int = 0
) -> SaveError:
  """Makes the one error of a write that failed.

  Args:
    what: was to be written, and where.
    folder: that exists, on the disk in question.
    error: what the system or a library said. It is the cause, but where the
      disk was full: there it has hundreds of lines and no more to say.
    way_out: what to do, a sentence or more.
    size: bytes to be written, if known.
  """
  reason = _no_space(error)
  if reason is None:
    first = str(error).partition("\n")[0][:300]
    found = SaveError(f"{what}: {type(error).__name__}: {first}. {way_out}")
    found.__cause__ = error
    return found
  needed = f"It needs about {_megabytes(size)}; " if size else ""
  free = _megabytes(shutil.disk_usage(folder).free)
  found = SaveError(
    f"{what}: {reason}. {needed}{free} are free there. {way_out}"
  )
  found.__suppress_context__ = True
  return found


_NO_SPACE = {
  code: os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
}


def _no_space(error: Exception) -> str | None:
  """Says how a disk was full; None if something else was wrong."""
  if isinstance(error, OSError) and error.errno in _NO_SPACE:
    return _NO_SPACE[error.errno]
  # Tensorstore has it in its text alone.
  found = re.search("|".join(_NO_SPACE.values()), str(error))
  return found and found[0]


def _megabytes(size: int) -> str:
  return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
  """Writes `data` to `path` such that a kill leaves the old or the new file.

  Temporary file beside the target, fsync, `os.replace`, fsync of the folder:
  after the call returns, the new content also survives a loss of power.

  Raises:
    SaveError: the disk is full, or the system refuses for another reason.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.tmp")
  try:
    with open(temporary, "wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError as error:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    raise save_error(
      f"{path} could not be written",
      path.parent,
      error,
      "What was there before is unchanged.",
      size=len(data),
    ) from error.__cause__
  folder = os.open(path.parent, os.O_RDONLY)
  try:
    os.fsync(folder)
  finally:
    os.close(folder)


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes `value` as indented JSON by `write_atomically`."""
  text = json.dumps(value, indent=2, ensure_ascii=False)
  write_atomically(path, (text + "\n").encode())


def read_json(path: str | os.PathLike) -> Any:
  """Reads a file of JSON.

  Raises:
    ValueError: it holds no JSON, or nests more than 64 lists and objects: to
      compare or print such a value would end in a RecursionError.
  """
  try:
    value = json.loads(pathlib.Path(path).read_bytes())
  except RecursionError as error:
    raise ValueError(str(error)) from error
  level = [value]
  for _ in range(64):
    level = [
      inner
      for outer in level
      if isinstance(outer, list | dict)
      for inner in (outer.values() if isinstance(outer, dict) else outer)
    ]
  if any(isinstance(inner, list | dict) for inner in level):
    raise ValueError("it nests more than 64 lists and objects")
  return value


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
