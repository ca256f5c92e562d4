"""What ran to make a golden file, for the file's entry `versions`.

Every script gives what it took from others first, PyTorch last: packages by
the version that is installed, clones by the commit that is checked out, single
files by the commit that their checksum is of. One that is not what the script
was written for ends it.
"""

import hashlib
import importlib.metadata
import pathlib
import subprocess

import numpy as np

__all__ = ["checkout", "packages", "single_file", "versions"]


def versions(*sources):
  """Make the entry: the sources, and PyTorch."""
  return np.array(", ".join((*sources, packages("torch"))))


def packages(*names):
  """Name packages with their installed versions."""
  return ", ".join(
    f"{name} {importlib.metadata.version(name)}" for name in names
  )


def checkout(name, path, commit):
  """Name a clone, of which `path` is the file or folder that is used."""
  path = pathlib.Path(path)
  folder = path if path.is_dir() else path.parent
  found = _git(folder, "rev-parse", "HEAD")
  if not found.startswith(commit):
    raise SystemExit(f"{folder}: at commit {found}, expected {commit}")
  changes = _git(folder, "diff", "--name-only", "HEAD", "--", path.resolve())
  if changes:
    raise SystemExit(f"{path}: changed since commit {commit}:\n{changes}")
  return f"{name} {found[:12]}"


def single_file(name, path, commit, sha256):
  """Name the repository that a file is of, after checking the file."""
  found = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
  if found != sha256:
    raise SystemExit(f"{path}: sha256 {found}, expected {sha256}")
  return f"{name} {commit}"


def _git(folder, *command):
  run = subprocess.run(
    ["git", "-C", str(folder), *command], capture_output=True, text=True
  )
  if run.returncode:
    raise SystemExit(f"{folder}: no clone: {run.stderr.strip()}")
  return run.stdout.strip()
