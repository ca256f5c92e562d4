"""What libtpu's compiler says of a TPU kernel, without a TPU.

libtpu can write down what it made: an estimate of each HLO op's cycles, which
follows trip counts and copies (`*_static_llo_profile.textproto`), the bundles
of instructions, and for each bundle how many of its slots are in use. Its
model of copies knows no contention for the memory's bandwidth, so an estimate
is to be trusted for kernels that compute, and ranks them; it is no time.
"""

import contextlib
import glob
import importlib.util
import os
import pathlib
import re
import sys
from typing import Any

from experiments.static_costs import costs

__all__ = [
  "NO_ESTIMATE",
  "compiler",
  "devices",
  "dumping",
  "environment",
  "figures",
  "kernel_calls",
  "missing",
]

# Slots that compute. A loop that hardly uses them starts copies and counts.
_COMPUTES = ("MATMUL", "XLU", "VALU", "EUP")
_LEAST_BUNDLES = 8
NO_ESTIMATE = "Static LLO profiling of"
_DUMPS = (
  "original",
  "final_bundles",
  "final_hlo-static-per-bundle-utilization",
)
_MOST_LOOPS = 3


def missing() -> str | None:
  """Why nothing can be compiled for TPUs here, or None if it can."""
  if _library() is None:
    return "no TPU compiler: libtpu is not installed (`make test` does that)"
  return None


def environment(
  folder: pathlib.Path, estimate: bool = True, dump: bool = True
) -> dict[str, str]:
  """What a process must have in its environment to compile and to tell.

  Args:
    folder: for the dumps.
    estimate: ask for cycles. The compiler's simulator gives up on some kernels
      (and their process, saying `NO_ESTIMATE`) that the compiler itself takes,
      and on some of XLA's own ops.
    dump: ask for what it made; without, there is only the program's text.
  """
  llo, profile = folder / "llo", folder / "profile"
  flags = [
    f"--xla_jf_dump_to={llo}",
    "--xla_jf_dump_llo_text=true",
    # All of its seventy passes take minutes and gigabytes.
    f"--xla_jf_dump_llo_pass_label_regex={'|'.join(_DUMPS)}",
  ]
  if not dump:
    flags = []
  elif estimate:
    profile.mkdir()
    flags.append(f"--xla_jf_dump_static_llo_profile_to={profile}")
  llo.mkdir()
  return {
    "TPU_LIBRARY_PATH": str(_library()),
    # Without it two processes that compile at the same time get in each
    # other's way.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "LIBTPU_INIT_ARGS": " ".join(flags),
  }


def compiler() -> dict[str, str]:
  """The compiler's name and version."""
  library = _library()
  if library is None:
    return {}
  found = sorted(library.parents[1].glob("libtpu-*.dist-info"))
  if not found:
    raise RuntimeError(f"static: no version of libtpu beside {library}.")
  return {"libtpu": found[-1].name.split("-")[1].removesuffix(".dist")}


def devices(chip: str, topology: str) -> Any:
  """All devices of a topology; `chip` is for the sake of the other compiler."""
  from jax.experimental import topologies

  del chip
  found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
  return found.devices


def dumping(folder: pathlib.Path) -> contextlib.AbstractContextManager[None]:
  """Nothing to do: the environment has it all."""
  del folder
  return contextlib.nullcontext()


def figures(folder: pathlib.Path, text: str) -> list[dict[str, Any]]:
  """Read what the compiler wrote about each kernel of one program.

  Args:
    folder: as for `environment`, with the dumps of this program alone.
    text: of the compiled program.

  Returns:
    One dict for each kernel, or one named "none" for a program without: its
    name; cycles (estimated, None if that was not asked for); cycles_of_others
    (of all other HLO ops of the program, each counted once); vmem_bytes; spills
    (stores to memory for lack of registers, in the loops below); and loops, the
    innermost ones by size: bundles, and the share of each kind of slot in use.
    Without kernel and estimate, XLA's own costs: see `static_costs`.

  Raises:
    RuntimeError: where a dump is missing or cannot be read.
  """
  cycles = {}
  for path in sorted((folder / "profile").glob("*_static_llo_profile.*")):
    name = re.sub(r"_TPU.*$", "", path.name)
    cycles[name] = _cycles(path)
  calls = kernel_calls(text)
  missing = [name for name in calls if name not in cycles]
  if missing and (folder / "profile").exists():
    raise RuntimeError(
      f"static: no estimate of {', '.join(missing)}; the compiler wrote some of"
      f" {', '.join(sorted(cycles)) or 'nothing'}."
    )
  others = sum(n for name, n in cycles.items() if name not in calls)
  if not calls and not cycles:
    return [{"kernel": "none"} | costs(text)]
  if not calls:
    row = {"kernel": "none", "cycles": others, "cycles_of_others": 0}
    return [row | {"vmem_bytes": 0, "spills": 0, "loops": []}]
  rows = []
  for name in calls:
    dump = lambda ending, name=name: _dump(folder / "llo", name, ending)
    loops = _loops(
      dump("final_bundles").read_text(),
      dump("final_hlo-static-per-bundle-utilization").read_text(),
    )
    rows.append(
      {
        "kernel": re.sub(r"\.\d+$", "", name),
        "cycles": cycles.get(name),
        "cycles_of_others": others if cycles else None,
        "vmem_bytes": _vmem(dump("original").read_text()),
        "spills": sum(loop.pop("spills") for loop in loops),
        "loops": loops,
      }
    )
  return rows


def kernel_calls(text: str) -> list[str]:
  """The names of the HLO ops that are kernels of ours, in order.

  A kernel that XLA has fused with what makes its inputs goes by the name of
  the fusion.
  """
  # A kernel's line holds its whole body: only starts of lines are looked at.
  target = 'custom_call_target="tpu_custom_call"'
  named = re.compile(r" *(?:ROOT )?%?([\w.-]+) = ")
  opened = re.compile(r"(?:ENTRY )?%?([\w.-]+) [^\n]*{$")
  within = ""
  calls: list[tuple[str, str]] = []
  fusions: dict[str, str] = {}
  for line in text.splitlines():
    if line.endswith("{") and (found := opened.match(line)):
      within = found[1]
    elif target in line and (found := named.match(line)):
      calls.append((found[1], within))
    elif " fusion(" in line and (found := named.match(line)):
      called = re.search(r"calls=%?([\w.-]+)", line)
      if called:
        fusions[called[1]] = found[1]
  return [fusions.get(within, name) for name, within in calls]


def _library() -> pathlib.Path | None:
  """libtpu.so: the one asked for, else that beside the packages or in them."""
  if asked := os.environ.get("TPU_LIBRARY_PATH"):
    return pathlib.Path(asked)
  path = pathlib.Path(sys.prefix, "tpu-aot", "libtpu", "libtpu.so")
  if path.exists():
    return path
  found = importlib.util.find_spec("libtpu")
  if found is None or found.origin is None:
    return None
  return pathlib.Path(found.origin).with_name("libtpu.so")


def _cycles(path):
  found = re.search(r"estimated_cycles: (\d+)", path.read_text())
  if not found:
    raise RuntimeError(f"static: no 'estimated_cycles: ' in {path.name}.")
  return int(found[1])


def _dump(folder, name, ending):
  """The one dump `<id>-<name>-<number>-<ending>.txt`."""
  found = [
    path
    for path in folder.glob(f"*-{glob.escape(name)}-*-{ending}.txt")
    if re.fullmatch(rf"\d+-{re.escape(name)}-\d+-{ending}\.txt", path.name)
  ]
  if len(found) != 1:
    raise RuntimeError(
      f"static: {len(found)} dumps <id>-{name}-<number>-{ending}.txt,"
      " expected one."
    )
  return found[0]


def _vmem(original):
  """Bytes of the windows, scratch and spills that the kernel asks for."""
  pattern = r"#allocation\d+ \[shape = [^\n]*?space=vmem, size = 0x([0-9a-f]+)"
  found = re.findall(pattern, original)
  if not found:
    raise RuntimeError("static: no '#allocation' in vmem among the LLO.")
  return sum(int(size, 16) for size in found)


def _loops(bundles, utilization):
  """The largest innermost loops, and how full their bundles are."""
  slots, capacity, used = _utilization(utilization)
  pattern = re.compile(
    r"^\s*(0x[0-9a-f]+|0)\s+(?:(LB|LH|LE|PB|PF|CT)\s*)?:\s*(>*)", re.M
  )
  rows = [
    (int(address, 16), len(depth), mark)
    for address, mark, depth in pattern.findall(bundles)
  ]
  if [address for address, _, _ in rows] != list(range(len(used))):
    raise RuntimeError(
      f"static: {len(rows)} bundles and {len(used)} rows of slots in use,"
      " expected one for each."
    )
  found = []
  for first, last in _innermost([(d, m) for _, d, m in rows]):
    n = last - first + 1
    if n < _LEAST_BUNDLES:
      continue
    total = [
      sum(column) for column in zip(*used[first : last + 1], strict=True)
    ]
    by_slot = dict(zip(slots, total, strict=True))
    if sum(by_slot.get(slot, 0) for slot in _COMPUTES) < n / 4:
      continue
    share = {
      slot: round(by_slot[slot] / (room * n), 3)
      for slot, room in zip(slots, capacity, strict=True)
      if by_slot[slot]
    }
    spills = by_slot.get("VSTORE:SPILL", 0)
    found.append({"bundles": n, "slots": share, "spills": spills})
  found.sort(key=lambda loop: -loop["bundles"])
  return found[:_MOST_LOOPS]


def _innermost(rows):
  """(first, last) of each loop that has no other in it, from depths, marks.

  A bundle's depth is that of one of its instructions, and those of the code
  around a loop are moved into it: depth may fall for a few bundles within.
  """
  starts = [i for i, (_, mark) in enumerate(rows) if mark == "LB"]
  # A kernel of a single step and no loop has no start.
  for i, after in zip(starts, [*starts, None][1:], strict=True):
    depth = rows[i][0]
    if after is None or rows[after][0] <= depth:
      inside = [j for j, (d, _) in enumerate(rows[:after]) if d >= depth]
      yield i, max(inside)


def _utilization(text):
  """Kinds of slots, how many a bundle has, and each bundle's used ones."""
  head, found, tail = text.partition("== UTILIZATION:")
  lines = head.strip().splitlines()
  if not found or len(lines) != 3:
    raise RuntimeError(
      "static: expected a line, names of slots, their numbers and"
      f" '== UTILIZATION:', found {text[:200]!r}."
    )
  slots = lines[1].split(", ")
  capacity = [int(n) for n in lines[2].split()]
  used = [[int(n) for n in row.split()] for row in tail.strip().splitlines()]
  if {len(slots), *map(len, [capacity, *used])} != {len(slots)}:
    raise RuntimeError(
      f"static: {len(slots)} kinds of slots ({lines[1]}), but another number"
      " of columns."
    )
  return slots, capacity, used
