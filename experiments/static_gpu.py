"""What ptxas makes of a GPU kernel, without a GPU.

A compile-only client of XLA takes a description of a GPU and runs the real
ptxas. Mosaic GPU writes down ptxas's report (registers, spills) and the
disassembled code, in which the loops are found here: what a warp issues for
each trip through the innermost ones.
"""

import collections
import contextlib
import importlib.metadata
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

__all__ = [
  "compiler",
  "devices",
  "dumping",
  "environment",
  "figures",
  "missing",
]

# A loop with less arithmetic than this counts, waits or copies.
_LEAST_ARITHMETIC = 4
_MOST_LOOPS = 4
_ARITHMETIC = re.compile(
  r"(FFMA|FMUL|FADD|MUFU|HFMA2|HADD2|HMUL2|HMMA|[QH]GMMA)"
)
_NEEDED = ("jax-cuda13-plugin", "jax-cuda13-pjrt")
_TOOLS = ("ptxas", "nvlink", "nvdisasm")


def missing() -> str | None:
  """Why nothing can be compiled for GPUs here, or None if it can."""
  root = _folder() / "nvidia" / "cu13" / "bin"
  lacking = [tool for tool in _TOOLS if not (root / tool).exists()]
  if lacking:
    return (
      f"no GPU compiler: {', '.join(lacking)} not in {_folder()}"
      " (`make gpu-aot` installs it)"
    )
  return None


def environment(
  folder: pathlib.Path, estimate: bool = True, dump: bool = True
) -> dict[str, str]:
  """What a process must have in its environment to compile and to tell."""
  del folder, estimate, dump
  return {
    "PYTHONPATH": str(_folder()),
    "CUDA_ROOT": str(_folder() / "nvidia" / "cu13"),
    # There is no cuDNN to be found, and none is needed to compile.
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    # These are printed. A folder to dump to would mean every pass's output as
    # well, which takes ten times as long as compiling.
    "MOSAIC_GPU_DUMP_PTXAS": "1",
    "MOSAIC_GPU_DUMP_RESOURCES": "1",
    "MOSAIC_GPU_DUMP_SASS_CTRL": "1",
  }


def compiler() -> dict[str, str]:
  """The names and versions of the packages that decide on the code."""
  versions = {}
  for name in (*_NEEDED, "nvidia-cuda-nvdisasm"):
    found = importlib.metadata.distributions(name=name, path=[str(_folder())])
    versions[name] = next((d.version for d in found), "unknown")
  ptxas = _folder() / "nvidia" / "cu13" / "bin" / "ptxas"
  said = subprocess.run(
    [ptxas, "--version"], capture_output=True, text=True, check=True
  ).stdout
  version = re.search(r", V([\d.]+)", said)
  if not version:
    raise RuntimeError(f"static: no version in what ptxas says: {said!r}.")
  return versions | {"ptxas": version[1]}


def devices(chip: str, topology: str) -> Any:
  """All GPUs of a topology: slices x hosts x GPUs, or a chip for one."""
  from jax.experimental import topologies

  target = pathlib.Path(__file__).parent / "targets" / f"{chip}.txtpb"
  found = topologies.get_topology_desc(
    platform="cuda",
    target_config=target.read_text(),
    topology="1x1x1" if topology == chip else topology,
  )
  return found.devices


@contextlib.contextmanager
def dumping(folder: pathlib.Path) -> Iterator[None]:
  """Keep what Mosaic GPU tells while lowering, under its own name.

  Printed, a kernel's resources would not say whose they are.
  """
  from jax.experimental.mosaic.gpu import utils

  original = utils.dump_to_file_or_stdout

  def dump(text, name, path):
    del path
    (folder / name).write_text(text)

  utils.dump_to_file_or_stdout = dump
  try:
    yield
  finally:
    utils.dump_to_file_or_stdout = original


def figures(folder: pathlib.Path, text: str) -> list[dict[str, Any]]:
  """Read what the compiler wrote about each kernel of one program.

  Args:
    folder: as for `environment`, with the dumps of this program alone.
    text: of the compiled program.

  Returns:
    One dict for each kernel: its name; registers of a thread; spill_bytes
    (stored and loaded); shared_bytes of a block; instructions of the whole
    kernel; and loops, the innermost that compute, by size: instructions of a
    trip, issue_cycles (with the stalls that the code itself asks for), and mix,
    the number of each kind.

  Raises:
    RuntimeError: where a dump is missing or cannot be read.
  """
  calls = text.count('custom_call_target="mosaic_gpu')
  printed = _text(folder / "printed.txt")
  # Of each kernel there is ptxas's report, then the code.
  parts = re.split(r"^ptxas info +: +\d+ bytes gmem.*$", printed, flags=re.M)
  if not calls or len(parts) < 2:
    raise RuntimeError(
      f"static: {calls} Mosaic GPU kernels in the program and"
      f" {len(parts) - 1} reports of ptxas, expected some of both."
    )
  rows = []
  for part in parts[1:]:
    report, _, sass = part.partition("\n\t.target")
    name = _entry(report)
    rows.append(
      {
        "kernel": name,
        **_ptxas(report),
        "shared_bytes": _shared(folder, name),
        **_sass(sass),
      }
    )
  return rows


def _folder() -> pathlib.Path:
  """Where `make gpu-aot` installs: beside the packages, not among them."""
  return pathlib.Path(sys.prefix, "gpu-aot")


def _entry(report):
  """The kernel's name: that of its function, without Mosaic's ending."""
  found = re.findall(r"Compiling entry function '(\w+)' for", report)
  if len(found) != 1:
    raise RuntimeError(
      "static: expected 'Compiling entry function' once in ptxas's report,"
      f" found {report[:500]!r}."
    )
  return found[0].removesuffix("_mosaic_gpu_kernel")


def _ptxas(report):
  registers = re.findall(r"Used (\d+) registers", report)
  spills = re.findall(
    r"(\d+) bytes spill stores, (\d+) bytes spill loads", report
  )
  if len(registers) != 1 or len(spills) != 1:
    raise RuntimeError(
      "static: expected 'Used n registers' and 'n bytes spill stores, n bytes"
      f" spill loads' once each in ptxas's report, found {report[:500]!r}."
    )
  return {
    "registers": int(registers[0]),
    "spill_bytes": sum(map(int, spills[0])),
  }


def _shared(folder, name):
  """Bytes of shared memory, the most if several kernels have the name."""
  found = [
    re.search(r"smem_scratch_bytes=(\d+)", _text(path))
    for path in folder.glob(f"{name}_*.resources.txt")
    if re.fullmatch(rf"{name}_\d+\.resources\.txt", path.name)
  ]
  if not found or None in found:
    raise RuntimeError(
      f"static: no 'smem_scratch_bytes=' in {name}_<number>.resources.txt."
    )
  return max(int(match[1]) for match in found if match)


def _sass(text):
  """Size of the code and its loops."""
  labels, code = _parse(text)
  if not code:
    raise RuntimeError(
      "static: no line '-:-:-:Y:01 /*0000*/ OPCODE' in the disassembled code,"
      f" found {text[:200]!r}."
    )
  loops = []
  for body in _innermost(_natural_loops(labels, code), code):
    mix = collections.Counter(code[i][1].split(".")[0] for i in body)
    loops.append(
      {
        "instructions": len(body),
        "issue_cycles": sum(code[i][0] for i in body),
        "mix": dict(sorted(mix.items(), key=lambda item: (-item[1], item[0]))),
      }
    )
  loops.sort(key=lambda loop: -loop["instructions"])
  return {"instructions": len(code), "loops": loops[:_MOST_LOOPS]}


def _text(path):
  if not path.exists():
    raise RuntimeError(f"static: the compiler has not written {path.name}.")
  return path.read_text()


def _parse(text):
  """Index of each label, and (stall cycles, opcode, predicated?, operands)."""
  labels, code = {}, []
  for line in text.splitlines():
    if label := re.match(r"\s*(\.L_x_\d+):", line):
      labels[label[1]] = len(code)
    elif found := re.match(
      r"\s*\S:\S:\S:\S:(\d+)\s+/\*[0-9a-f]+\*/\s+(@\S+\s+)?(\S+)\s*(.*)", line
    ):
      stall, predicate, opcode, operands = found.groups()
      code.append((int(stall), opcode.rstrip(";"), bool(predicate), operands))
  return labels, code


def _successors(i, labels, code):
  """Indices of the instructions that can come after instruction i."""
  _, opcode, predicated, operands = code[i]
  name = opcode.split(".")[0]
  if name in ("EXIT", "RET", "KILL"):
    return [i + 1] if predicated else []
  if name != "BRA":
    return [i + 1]
  target = re.search(r"`\((\.L_x_\d+)\)", operands)
  if target is None or target[1] not in labels:
    raise RuntimeError(f"static: no label in '{opcode} {operands}'.")
  # A condition can also stand before the label: BRA.DIV, BRA.U UP0, ...
  conditional = predicated or not operands.startswith("`(")
  return [labels[target[1]]] + ([i + 1] if conditional else [])


def _natural_loops(labels, code):
  """Sets of instructions, one for each header that a branch goes back to.

  Of a loop are those instructions from which its end is reached without
  passing its header; code that waits out of line is thus in its loop, and
  what comes after a loop is not.
  """
  before: dict[int, list[int]] = {i: [] for i in range(len(code))}
  ends: dict[int, list[int]] = {}
  for i in range(len(code)):
    for j in _successors(i, labels, code):
      if j < len(code):
        before[j].append(i)
        if j <= i:
          ends.setdefault(j, []).append(i)
  for header, tails in ends.items():
    body = {header}
    todo = list(tails)
    while todo:
      i = todo.pop()
      if i not in body:
        body.add(i)
        todo += before[i]
    # A jump back into the middle of other code is no loop's end: its body
    # would run into what comes before.
    if min(body) == header:
      yield body


def _innermost(loops, code):
  """Those loops that compute and have no other such in them."""
  computing = [
    body
    for body in loops
    if sum(bool(_ARITHMETIC.match(code[i][1])) for i in body)
    >= _LEAST_ARITHMETIC
  ]
  for body in computing:
    if not any(other < body for other in computing):
      yield body
