"""setup.cfg names versions that can be had, and that were tried."""

import configparser
import fnmatch
import importlib.metadata
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def test_make_lowest_reads_a_floor_of_every_requirement():
  """What it cannot read, pip would install in its newest version."""
  makefile = (ROOT / "Makefile").read_text()
  (script,) = re.findall(r"sed -n '(s/.*>=.*/p)' setup\.cfg", makefile)
  read = subprocess.run(
    ["sed", "-n", script.replace("$$", "$"), "setup.cfg"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  ).stdout.split()
  floors = {line.split("==")[0]: line for line in read}
  assert len(floors) == len(set(read)), "a package has two floors"
  for name in _requirements():
    package, operator, version = re.fullmatch(
      r"([\w-]+)(==|>=|)([\d.]*).*", name
    ).groups()
    if operator == ">=":
      assert floors[package] == f"{package}=={version}"
    else:
      assert operator == "==", f"{name} has no floor"


def test_tpu_compiler_is_the_one_that_jax_installs():
  pins = dict(re.findall(r"^ +([\w-]+)==(\S+)$", _text(), re.MULTILINE))
  if importlib.metadata.version("jax") != pins["jax-cuda13-plugin"]:
    pytest.skip("the compilers are pinned for another jax")
  wanted = [
    line.split(";")[0].split("==")[1].strip()
    for line in importlib.metadata.requires("jax")
    if line.startswith("libtpu==")
  ]
  assert wanted
  for pattern in wanted:
    assert fnmatch.fnmatch(pins["libtpu"], pattern)


def _text():
  return (ROOT / "setup.cfg").read_text()


def _requirements():
  config = configparser.ConfigParser()
  config.read_string(_text())
  lists = [config["options"]["install_requires"]]
  lists += config["options.extras_require"].values()
  return [
    line
    for text in lists
    for line in text.splitlines()
    if line and not line.startswith("#")
  ]
