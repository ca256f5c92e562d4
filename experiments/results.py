"""Results as JSON: where they come from, and files that are never half."""

import json
import os
import pathlib
import platform
import subprocess
from importlib import metadata
from typing import Any

import jax

__all__ = ["provenance", "use_cores", "write_json", "write_text"]


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
      name: _version(name)
      for name in ("ssmjax", "jax", "jaxlib", "flax", "optax")
    },
  }


def write_json(path: pathlib.Path, value: Any) -> None:
  """Write all of it or nothing."""
  write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
  """Write all of it or nothing."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
  try:
    with open(temporary, "w") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def _version(name: str) -> str:
  try:
    return metadata.version(name)
  except metadata.PackageNotFoundError:
    return "not installed"


def use_cores(devices: int = 0) -> None:
  """Make CPU devices, so that batches are divided over cores.

  Args:
    devices: how many; 0 for a power of two, which divides batches, of at most
      8 and at most the usable cores.
  """
  if not devices:
    usable = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
      usable = len(os.sched_getaffinity(0))
    devices = 1 << (min(usable, 8).bit_length() - 1)
  jax.config.update("jax_num_cpu_devices", devices)


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
