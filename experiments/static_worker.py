"""Compile programs one after the other and print what the compiler says.

`experiments.static` runs this in a process of its own: the compilers' flags
hold for a whole process, and a failed check inside of one ends it. Cases come
as JSON lines on the standard input; each is answered by one JSON line.
"""

import contextlib
import ctypes
import json
import os
import pathlib
import sys
import traceback

import jax

from experiments import static_gpu, static_tpu
from experiments.static_cases import CHIPS, Case, build

__all__ = ["COMPILERS"]

COMPILERS = {"tpu": static_tpu, "cuda": static_gpu}


def main() -> None:
  """Answer every line of the standard input; the argument is the dumps."""
  folder = pathlib.Path(sys.argv[1])
  # Compilers print: what comes on the standard output of this process while
  # they work is kept in a file among the dumps, and answers go out apart.
  answers = os.fdopen(os.dup(1), "w")
  for line in sys.stdin:
    words = json.loads(line)
    case = Case(**words | {"shape": tuple(words["shape"])})
    try:
      answer = {"kernels": _figures(case, folder)}
    except NotImplementedError as error:
      answer = {"refused": str(error)}
    except Exception as error:
      traceback.print_exc()
      answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps({"answer": answer}), file=answers, flush=True)


def _figures(case, folder):
  _empty(folder)
  compiler = COMPILERS[case.platform]
  topology = case.topology or CHIPS[case.platform][case.chip]
  devices = compiler.devices(case.chip, topology)
  if not case.topology:
    devices = devices[:1]
  function, args = build(case, devices)
  with contextlib.ExitStack() as stack:
    stack.enter_context(_printing_to(folder / "printed.txt"))
    stack.enter_context(compiler.dumping(folder))
    if case.platform == "cuda":
      # Mosaic GPU takes the architecture from the default device.
      stack.enter_context(jax.default_device(devices[0]))
    compiled = jax.jit(function).lower(*args).compile()
  return compiler.figures(folder, compiled.as_text())


@contextlib.contextmanager
def _printing_to(path):
  """Everything printed goes to a file, also what other languages print."""
  before = os.dup(1)
  with open(path, "wb") as file:
    os.dup2(file.fileno(), 1)
  try:
    yield
  finally:
    sys.stdout.flush()
    ctypes.CDLL(None).fflush(None)
    os.dup2(before, 1)
    os.close(before)


def _empty(folder):
  """Remove what the program before has left, but no folder."""
  for path in folder.rglob("*"):
    if path.is_file():
      path.unlink()


if __name__ == "__main__":
  main()
