"""Figures of kernels and programs that the compilers give without a chip.

`measure` compiles programs for chips that nobody has here and reads what the
compilers write down; `regressions` holds that against the committed table.
"""

import collections
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from experiments import static_tpu
from experiments.results import provenance, write_text
from experiments.static_cases import XLA_ALONE, Case
from experiments.static_worker import COMPILERS

__all__ = [
  "TABLE",
  "case_of",
  "compilers",
  "measure",
  "print_table",
  "read_table",
  "regressions",
  "write_table",
]

TABLE = pathlib.Path(__file__).parent / "results" / "kernels-static.json"
# How much more is let pass, by figure. Less always is.
SLACK = {
  "cycles": 0.03,
  "product_cycles": 0.03,
  "vmem_bytes": 0.05,
  "registers": 0.05,
  "spill_bytes": 0.0,
  "shared_bytes": 0.05,
  "loop_instructions": 0.03,
  "loop_bundles": 0.03,
}
# A program takes seconds, a TPU's estimate up to a minute; a compiler that
# hangs is not waited for.
_SECONDS = 600
_ROOT = pathlib.Path(__file__).parents[1]


def compilers(platform: str) -> dict[str, str]:
  """Names and versions of what decides on the figures of a platform."""
  versions = provenance()["versions"]
  jax = {name: versions[name] for name in ("jax", "jaxlib")}
  return jax | COMPILERS[platform].compiler()


def measure(
  cases: Sequence[Case],
  *,
  parallel: int = 1,
  report: Callable[[str], object] = lambda line: None,
) -> list[dict[str, Any]]:
  """Compile every case and give one row for each of its kernels.

  A row has the case's fields, "kernel" and the figures of
  `static_tpu.figures` or `static_gpu.figures`. Instead of them it has "refused"
  where the op has said that it has no kernel for the case, and "error" where
  anything else went wrong: an abort of the compiler is one.

  Args:
    cases: in any order; a chip's are compiled one after the other, those with
      kernels and those without apart.
    parallel: how many chips at the same time.
    report: gets a line for each case.

  Raises:
    RuntimeError: where a compiler is not installed.
  """
  by_chip = collections.defaultdict(list)
  for case in cases:
    if reason := COMPILERS[case.platform].missing():
      raise RuntimeError(f"static: {reason}.")
    by_chip[case.chip, case.op in XLA_ALONE].append(case)
  with ThreadPoolExecutor(max(parallel, 1)) as pool:
    parts = pool.map(lambda part: _measure(part, report), by_chip.values())
    return [row for part in parts for row in part]


def read_table(path: pathlib.Path = TABLE) -> dict[str, Any]:
  """Read a table that `write_table` has written."""
  return json.loads(path.read_text())


def write_table(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
  """Write rows, one a line; those of other cases in the file are kept.

  Raises:
    ValueError: where the kept rows are of other compilers.
  """
  versions = {p: compilers(p) for p in sorted({_platform(row) for row in rows})}
  kept = []
  if path.exists():
    old = read_table(path)
    done = {_case(row) for row in rows}
    kept = [row for row in old["rows"] if _case(row) not in done]
    for platform in {_platform(row) for row in kept}:
      before = old["compilers"][platform]
      if versions.setdefault(platform, before) != before:
        raise ValueError(
          f"static: {path} has rows of {_words(before)}, these are of"
          f" {_words(versions[platform])}. Compile all of them anew (without"
          " --only and --chips), or write to another file."
        )
  head = provenance() | {"compilers": dict(sorted(versions.items()))}
  # The host's devices have no part in it.
  for name in ("device", "platform", "num_devices"):
    head.pop(name)
  ordered = sorted(rows + kept, key=_order)
  lines = ",\n".join("  " + json.dumps(row) for row in ordered)
  text = json.dumps(head, indent=1)
  write_text(path, f'{text[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')


def regressions(
  rows: list[dict[str, Any]], table: dict[str, Any]
) -> tuple[list[str], list[str]]:
  """Compare rows with those of a table.

  Returns:
    What has become worse by more than `SLACK` (or has gone, or is not in the
    table), and what has become better by as much, in words.
  """
  known = {_key(row): row for row in table["rows"]}
  worse, better = [], []
  for row in rows:
    renew = (
      "; if that is meant: python -m experiments.bench kernels --static"
      f" --only '{_case(row)}' --out experiments/results/{TABLE.name}"
    )
    what = f"{row.get('kernel', '-')} of {_case(row)}: "
    if "error" in row:
      worse.append(what + row["error"])
      continue
    if _key(row) not in known:
      worse.append(f"{what}is not in the table{renew}")
      continue
    old = known[_key(row)]
    if "refused" in row:
      continue
    for name, slack in SLACK.items():
      before, now = _figure(old, name), _figure(row, name)
      if before is None and now is None:
        continue
      change = f"{what}{name} was {before}, is {now}"
      if before is None or now is None or now > before * (1 + slack):
        worse.append(f"{change}, allowed is {slack:.0%} more{renew}")
      elif now < before * (1 - slack):
        better.append(change + renew)
  return worse, better


def case_of(row: dict[str, Any]) -> Case:
  """The case that a row is of."""
  fields = {field.name: row[field.name] for field in dataclasses.fields(Case)}
  return Case(**fields | {"shape": tuple(row["shape"])})


def print_table(rows: list[dict[str, Any]]) -> None:
  """Print the figures to be read by a person, a line for each kernel."""
  for platform, title, describe in (
    ("tpu", _TPU_TITLE, _tpu_line),
    ("cuda", _GPU_TITLE, _gpu_line),
  ):
    mine = [row for row in rows if _platform(row) == platform]
    if mine:
      print(f"\n{'chip':5} {'kernel':36} {'dtype':8} {'shape':17} {'form':5}")
      print("  " + title)
    for row in mine:
      print(
        f"{row['chip']:5} {row.get('kernel', row['op']):36} {row['dtype']:8}"
        f" {'x'.join(map(str, row['shape'])):17} {row['form']:5}"
        + (" (for a gradient)" if row["program"] == "gradient" else "")
      )
      failed = row.get("error") or row.get("refused")
      print("  " + (failed.splitlines()[0] if failed else describe(row)))


_TPU_TITLE = (
  "estimated cycles (other ops), VMEM; innermost loops: bundles, spills and"
  " slots in use"
)
_GPU_TITLE = (
  "registers, bytes spilled, shared memory; innermost loops: instructions of"
  " a trip"
)


def _tpu_line(row):
  if "product_cycles" in row:
    return (
      f"{row['cycles']:,} cycles by XLA's cost model, of which"
      f" {row['product_cycles']:,} multiply matrices; {row['ops']:,} ops"
    )
  loops = "; ".join(
    f"{loop['bundles']}: "
    + " ".join(
      f"{slot} {share:.0%}"
      for slot, share in sorted(loop["slots"].items(), key=lambda s: -s[1])[:5]
    )
    for loop in row["loops"]
  )
  cycles = "no estimate of cycles"
  if row["cycles"] is not None:
    cycles = f"{row['cycles']:,} cycles (+ {row['cycles_of_others']:,})"
  memory = f"{row['vmem_bytes'] / 2**20:.1f} MiB"
  return f"{cycles}, {memory}, {row['spills']} spills; {loops or 'no loops'}"


_KINDS = {
  "MUFU": ("MUFU",),
  "FP32": ("FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2"),
  "shared": ("LDS", "STS", "LDSM", "STSM", "LD", "ST"),
  "SHFL": ("SHFL",),
  "BAR": ("BAR",),
  "global": ("LDG", "STG"),
}


def _gpu_line(row):
  loops = []
  for loop in row["loops"]:
    counts = {
      kind: sum(loop["mix"].get(name, 0) for name in names)
      for kind, names in _KINDS.items()
    }
    words = " ".join(f"{kind} {n}" for kind, n in counts.items() if n)
    loops.append(f"{loop['instructions']}: {words}")
  return (
    f"{row['registers']} registers, {row['spill_bytes']} spilled,"
    f" {row['shared_bytes'] / 1024:.0f} KiB; {'; '.join(loops)}"
  )


def _measure(cases, report):
  """Rows of one chip's cases, by as many workers as the compiler aborts."""
  rows = []
  todo = list(cases)
  while todo:
    with tempfile.TemporaryDirectory() as folder:
      answers, said = _work(todo, pathlib.Path(folder), report)
    if len(answers) < len(todo):
      case = todo[len(answers)]
      error = f"the compiler's process ended: {_last(said)}"
      report(f"{case}: {error}")
      answer: dict[str, Any] = {"error": error}
      if static_tpu.NO_ESTIMATE in error:
        # The kernel compiles, only the estimate of it does not end well.
        with tempfile.TemporaryDirectory() as folder:
          again, _ = _work([case], pathlib.Path(folder), report, estimate=False)
        answer = again[0] if again else answer
      answers.append(answer)
    for case, answer in zip(todo, answers, strict=False):
      head = dataclasses.asdict(case) | {"shape": list(case.shape)}
      found = answer.pop("kernels", None)
      rows += [head | row for row in _numbered(found or [answer])]
    todo = todo[len(answers) :]
  return rows


def _work(cases, folder, report, estimate=True):
  """Answers of one worker, fewer than cases if it dies, and its errors."""
  compiler = COMPILERS[cases[0].platform]
  drop = {"XLA_FLAGS", "LIBTPU_INIT_ARGS", "PYTHONPATH", "PYTHONSAFEPATH"}
  env = {k: v for k, v in os.environ.items() if k not in drop}
  env |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
  dump = cases[0].op not in XLA_ALONE
  env |= compiler.environment(folder, estimate, dump)
  answers: list[dict[str, Any]] = []
  with tempfile.TemporaryFile("w+") as said:
    worker = subprocess.Popen(
      [sys.executable, "-m", "experiments.static_worker", str(folder)],
      cwd=_ROOT,
      env=env,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=said,
      text=True,
    )
    assert worker.stdin
    try:
      for case in cases:
        start = time.perf_counter()
        try:
          worker.stdin.write(json.dumps(dataclasses.asdict(case)) + "\n")
          worker.stdin.flush()
        except BrokenPipeError:
          break
        answer = _answer(worker)
        if answer is None:
          break
        answers.append(answer)
        took = f"{time.perf_counter() - start:.1f} s"
        what = answer.get("error") or answer.get("refused") or "compiled"
        report(f"{case}: {what} ({took})")
    finally:
      worker.kill()
      worker.communicate()
    said.seek(0)
    return answers, said.read()


def _answer(worker):
  """The worker's next line that is an answer, None if it ends or hangs."""
  clock = threading.Timer(_SECONDS, worker.kill)
  clock.start()
  try:
    for line in worker.stdout:
      if line.startswith('{"answer"'):
        return json.loads(line)["answer"]
  finally:
    clock.cancel()
  return None


def _last(said):
  """The line of a dying compiler that says why."""
  lines = said.strip().splitlines() or ["it has said nothing"]
  telling = re.compile(r"Check failed|^F\d{4} |ERROR|Error:|INTERNAL")
  noise = "stack trace ***"
  found = [line for line in lines if telling.search(line)]
  return next((line for line in found if noise not in line), lines[-1])


def _numbered(rows):
  """Kernels of one name in one program get numbers from the second on."""
  seen = collections.Counter()
  for row in rows:
    if name := row.get("kernel"):
      seen[name] += 1
      if seen[name] > 1:
        row = row | {"kernel": f"{name} #{seen[name]}"}
    yield row


def _figure(row, name):
  largest = (row.get("loops") or [{}])[0]
  if name == "loop_instructions":
    return largest.get("instructions")
  if name == "loop_bundles":
    # A TPU's cycles count the trips as well.
    return largest.get("bundles") if row.get("cycles") is None else None
  return row.get(name)


def _case(row):
  return str(case_of(row))


def _key(row):
  return _case(row), row.get("kernel")


def _order(row):
  case = (row["op"], row["form"], row["dtype"], row["shape"], row["program"])
  return _platform(row), row["chip"], *case, row.get("kernel", "")


def _platform(row):
  return Case(row["chip"], "", "", "", ()).platform


def _words(versions):
  return ", ".join(f"{name} {version}" for name, version in versions.items())
