"""Results as JSON: where they come from, and files that are never half."""

import json
import os
import pathlib
import platform
import subprocess
import tempfile
from importlib import metadata
from typing import Any

import jax

__all__ = ["provenance", "write_json"]


def provenance() -> dict[str, Any]:
  """Give commit, device and versions, for a result file."""
  devices = jax.devices()
  return {
    "commit": _commit(),
    "device": devices[0].device_kind,
    "platform": devices[0].platform,
    "num_devices": len(devices),
    "host": f"{platform.machine()}, {os.cpu_count()} cores",
    "python": platform.python_version(),
    "versions": {
      name: metadata.version(name)
      for name in ("ssmjax", "jax", "jaxlib", "flax", "optax")
    },
  }


def write_json(path: pathlib.Path, value: Any) -> None:
  """Write all of it or nothing."""
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
  try:
    with os.fdopen(handle, "w") as file:
      json.dump(value, file, indent=1, allow_nan=False)
      file.write("\n")
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise


def _commit() -> str:
  """The clone's commit, with a + if the tree has other changes."""
  here = pathlib.Path(__file__).parent
  git = lambda *arguments: subprocess.run(
    ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
  ).stdout.strip()
  try:
    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
  except (OSError, subprocess.CalledProcessError):
    return "unknown"
