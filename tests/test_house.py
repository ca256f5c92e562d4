"""The house is in order: each room imports only what its row allows."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

import ssmjax

ROOT = pathlib.Path(__file__).parents[1]

# Room: the rooms and the packages that it may import. JAX, NumPy and the
# standard library are everyone's; a package has one owner, except that the
# trainer and the models both hold Flax modules.
TABLE = {
  # The models only where a file names a kind of them, see LAZY.
  "ssmjax.types": "jaxtyping ssmjax.models",
  "kernels_pallas": "ssmjax.types jax.experimental.pallas",
  "ssmjax.ops": "ssmjax.types ssmjax.polarization kernels_pallas",
  "ssmjax.polarization": "ssmjax.types",
  "ssmjax.models": (
    "ssmjax.types ssmjax.ops ssmjax.polarization flax safetensors"
  ),
  "ssmjax.theory": "ssmjax.types",
  "ssmjax.diagnostics": "ssmjax.types ssmjax.ops ssmjax.theory",
  "ssmjax.interop": (
    "ssmjax.types ssmjax.models flax torch tokenizers huggingface_hub"
  ),
  "ssmjax.data": "ssmjax.types grain tokenizers",
  "ssmjax.training": "ssmjax.types optax orbax flax tqdm tensorboardX",
}
TABLE = {room: set(row.split()) for room, row in TABLE.items()}
LIBRARY = {"ssmjax"}.union(TABLE, *TABLE.values())
SCRIPTS = {"tyro", "tqdm", "matplotlib", "scipy"}
# Never dependencies: the benchmark times them where they happen to be.
RIVALS = {"torch", "mambapy"}
TOOLS = {"chex", "pytest", "hypothesis"}
ROOMS = TABLE | {
  "ssmjax": {room for room in TABLE if room.startswith("ssmjax.")},
  "experiments": LIBRARY | SCRIPTS | RIVALS,
  "tests": LIBRARY | SCRIPTS | TOOLS | {"experiments"},
}
EVERYONE = sys.stdlib_module_names | {"jax", "numpy"}

# What a room imports only inside functions, where it is needed: it is heavy,
# or not installed everywhere. The package itself loads nothing by itself.
HEAVY = {
  *("grain", "tokenizers", "torch", "tqdm", "tensorboardX"),
  "huggingface_hub",
}
LAZY = dict.fromkeys(TABLE, HEAVY) | {"ssmjax": set(TABLE)}
LAZY["ssmjax.types"] = {"ssmjax.models"}

TOP_LEVEL = {
  *("ssmjax", "kernels_pallas", "experiments", "tests"),
  *("setup.cfg", "pyproject.toml", "Makefile", ".python-version"),
  *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"),
  *(".ci", ".github", ".gitignore"),
}


def test_every_import_is_allowed_by_the_table_of_rooms():
  found = []
  for path in _sources():
    module = ".".join(path.with_suffix("").parts)
    found += violations(module, (ROOT / path).read_text())
  assert not found, "\n".join(found)


@pytest.mark.parametrize(
  ("module", "source"),
  [
    ("ssmjax.types", "import jax, numpy as np, jaxtyping, math"),
    ("ssmjax.ops.scan", "from ssmjax.types import Array"),
    ("ssmjax.ops.scan", "from .. import types"),
    ("ssmjax.ops.__init__", "from .scan import linear_scan"),
    ("ssmjax.ops.dispatch", "import kernels_pallas"),
    ("ssmjax.data.text", "def f():\n  import grain.python as grain"),
    ("ssmjax.data.text", "if TYPE_CHECKING:\n  import grain"),
    ("ssmjax.__init__", "if TYPE_CHECKING:\n  from ssmjax import ops"),
    ("ssmjax.models.lm", "from ssmjax import ops, types\nfrom flax import nnx"),
    ("kernels_pallas.x", "from jax.experimental.pallas import tpu as pltpu"),
    ("kernels_pallas.x", "from kernels_pallas import tiling"),
    ("experiments.recall", "import tqdm, ssmjax.models, experiments.bench"),
    ("tests.test_x", "import chex\nfrom experiments import recall"),
  ],
)
def test_checker_lets_an_allowed_import_pass(module, source):
  assert violations(module, source) == []


@pytest.mark.parametrize(
  ("module", "source"),
  [
    ("ssmjax.__init__", "from ssmjax import ops"),
    ("ssmjax.types", "import ssmjax.ops"),
    ("ssmjax.types", "import ssmjax.models"),
    ("ssmjax.theory", "import ssmjax"),
    ("ssmjax.theory", "from ssmjax import ops"),
    ("ssmjax.ops.scan", "from .. import models"),
    ("ssmjax.ops.scan", "from ..models import lm"),
    ("ssmjax.ops.__init__", "from ..models import lm"),
    ("ssmjax.ops.scan", "def f():\n  from ssmjax.models.lm import LM"),
    ("ssmjax.ops.scan", "import importlib\nimportlib.import_module('flax')"),
    ("ssmjax.ops.scan", "import jaxtyping"),
    ("ssmjax.ops.scan", "from jax.experimental import pallas as pl"),
    ("ssmjax.data.text", "try:\n  import grain\nexcept ImportError: pass"),
    ("ssmjax.training.loop", "from ssmjax.models import lm"),
    ("ssmjax.training.loop", "from experiments import recall"),
    ("ssmjax.models.lm", "import torch"),
    ("ssmjax.new_room", "import jax"),
    ("kernels_pallas.x", "from ssmjax.ops import scan"),
    ("experiments.recall", "import pytest"),
  ],
)
def test_checker_fails_on_a_forbidden_import(module, source):
  assert violations(module, source)


def test_top_level_holds_only_what_the_house_lists():
  try:
    listed = subprocess.run(
      ["git", "ls-files", "-z"],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=True,
    ).stdout
  except (OSError, subprocess.CalledProcessError):
    pytest.skip("not a git checkout")
  top = {path.split("/")[0] for path in listed.split("\0") if path}
  assert top <= TOP_LEVEL


def test_no_file_is_named_for_nothing_in_particular():
  vague = {"utils", "util", "common", "helpers", "misc", "experimental"}
  assert not [p for p in _sources() if vague & {p.stem, *p.parts}]


def test_pyproject_has_at_most_twenty_lines():
  assert len((ROOT / "pyproject.toml").read_text().splitlines()) <= 20


def test_every_init_has_a_sorted_all_of_what_it_reexports():
  for path in _sources():
    if path.name == "__init__.py":
      exported, names = _exports((ROOT / path).read_text())
      assert names == sorted(set(names), key=_kind_then_name), path
      assert exported <= set(names), path


def test_every_submodule_is_reached_through_the_package():
  parts = {p.stem for p in (ROOT / "ssmjax").iterdir() if _is_module(p)}
  assert parts == set(ssmjax.__all__)
  for name in ssmjax.__all__:
    assert getattr(ssmjax, name).__name__ == f"ssmjax.{name}"
  assert set(dir(ssmjax)) == parts | {"__version__"}
  assert ssmjax.__version__.count(".") == 2
  with pytest.raises(AttributeError, match="no attribute 'nothing'"):
    ssmjax.nothing  # noqa: B018


@pytest.mark.parametrize(
  ("statement", "unwanted"),
  [
    ("import ssmjax", "jax flax orbax grain matplotlib"),
    ("import kernels_pallas, ssmjax.ops", "flax orbax grain matplotlib"),
    ("import ssmjax.ops", "flax orbax grain matplotlib"),
    ("import ssmjax.models", "orbax grain matplotlib"),
    ("import ssmjax.data", "grain matplotlib"),
    ("import ssmjax.training", "grain matplotlib tqdm tensorboardX"),
  ],
)
def test_import_is_lazy(statement, unwanted):
  code = f"{statement}; import sys; print(*sys.modules)"
  loaded = subprocess.run(
    [sys.executable, "-c", code],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert loaded.returncode == 0, loaded.stderr
  packages = {name.split(".")[0] for name in loaded.stdout.split()}
  assert packages & set(unwanted.split()) == set()


def violations(module: str, source: str) -> list[str]:
  """Every import in `source` that the table does not allow in `module`."""
  room = _longest(module, ROOMS)
  if room is None or (room == "ssmjax" and module != "ssmjax.__init__"):
    return [f"{module}: is in no room of the table"]
  found = []
  for line, target, lazy in _imports(module, ast.parse(source)):
    # A bare `ssmjax` is all of it; only experiments and tests may see that.
    owner = _longest(target, {*ROOMS, *LIBRARY}) or target.split(".")[0]
    ours = room == "tests" and ROOT.joinpath("tests", f"{owner}.py").exists()
    if owner == room or ours:
      continue
    if owner not in EVERYONE | ROOMS[room]:
      found.append(f"{module}:{line}: {room} may not import {target}")
    elif owner in LAZY.get(room, ()) and not lazy:
      found.append(f"{module}:{line}: import {target} inside a function")
  return found


def _imports(module, node, lazy=False):
  """(line, absolute name, not run on import?) of every import below `node`."""
  if isinstance(node, ast.Import):
    for alias in node.names:
      yield node.lineno, alias.name, lazy
  elif isinstance(node, ast.ImportFrom):
    base = module.split(".")[: -node.level] if node.level else []
    for alias in node.names:
      names = [*base, node.module, alias.name]
      yield node.lineno, ".".join(filter(None, names)), lazy
  elif isinstance(node, ast.Call) and _is_import_by_name(node):
    yield node.lineno, node.args[0].value, lazy
  lazy |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
  lazy |= isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
  for child in ast.iter_child_nodes(node):
    yield from _imports(module, child, lazy)


def _is_import_by_name(call):
  """True of `importlib.import_module("x")` and `__import__("x")`."""
  return (
    ast.unparse(call.func).split(".")[-1] in ("import_module", "__import__")
    and len(call.args) > 0
    and isinstance(call.args[0], ast.Constant)
    and isinstance(call.args[0].value, str)
  )


def _longest(target, names):
  """The longest of `names` that `target` is or lies in."""
  parts = target.split(".")
  for n in range(len(parts), 0, -1):
    if ".".join(parts[:n]) in names:
      return ".".join(parts[:n])
  return None


def _sources():
  """Our Python files; beside golden values lie scripts of other houses."""
  for top in ("ssmjax", "kernels_pallas", "experiments", "tests"):
    for path in sorted(ROOT.joinpath(top).rglob("*.py")):
      if "golden" not in path.parts:
        yield path.relative_to(ROOT)


def _exports(source):
  """The names that an `__init__` takes from our rooms, and its `__all__`."""
  exported, names = set(), []
  for node in ast.parse(source).body:
    if isinstance(node, ast.ImportFrom):
      if node.level or _longest(node.module, ROOMS):
        exported |= {alias.asname or alias.name for alias in node.names}
    elif isinstance(node, ast.Assign):
      if ast.unparse(node.targets[0]) == "__all__":
        names = ast.literal_eval(node.value)
  return exported, names


def _kind_then_name(name):
  """Ruff's order: CONSTANTS, Classes, the rest."""
  constant = name.isupper() and len(name) > 1
  return not constant, not name[0].isupper(), name


def _is_module(path):
  if path.suffix == ".py":
    return path.stem != "__init__"
  return (path / "__init__.py").exists()
