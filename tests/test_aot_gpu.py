"""The real GPU compiler takes the kernels, without a GPU.

`make gpu-aot` installs it, beside the packages; where it has not been run these
tests are skipped. The compiler has a process of its own: among the packages it
would look for a GPU in every other test.
"""

import jax.numpy as jnp
import pytest

from experiments import static, static_gpu
from experiments.static_cases import CHIPS, Case
from kernels_pallas import selective_scan_gpu_chip as gpu_chip
from kernels_pallas.selective_scan_gpu_plan import Plan
from kernels_pallas.selective_scan_gpu_tiling import (
  default_tiling,
  shared_bytes,
)

SHAPE = (1, 512, 1024)
SCAN, LINEAR = "selective_scan", "linear_scan"


def cases(chip):
  """What a chip has to compile, without a spill."""
  found = [
    Case(chip, SCAN, "gradient", dtype, (*SHAPE, 16), "mamba")
    for dtype in ("float32", "bfloat16")
  ]
  found += [
    Case(chip, SCAN, "forward", "bfloat16", (*SHAPE, 32), "mamba"),
    Case(chip, SCAN, "gradient", "float32", (*SHAPE, 256), "mamba"),
    Case(chip, LINEAR, "gradient", "float32", SHAPE),
  ]
  if chip == "h200":
    sharded = (8, 512, 1000, 17)
    found += [
      Case(chip, SCAN, "gradient", "float32", sharded, "mamba", "1x1x8"),
      Case(chip, LINEAR, "gradient", "bfloat16", SHAPE),
    ]
  return found


@pytest.fixture(scope="module")
def compiled():
  """The compiler's figures of the kernels of all cases of a chip."""
  if reason := static_gpu.missing():
    pytest.skip(reason)
  found = {}

  def compile_for(chip):
    if chip not in found:
      found[chip] = static.measure(cases(chip))
    return found[chip]

  return compile_for


@pytest.mark.parametrize("chip", CHIPS["cuda"])
def test_kernels_compile_for_every_gpu(compiled, chip):
  rows = compiled(chip)
  failed = [row for row in rows if "kernel" not in row]
  assert not failed, failed
  for case in cases(chip):
    mine = [row for row in rows if static.case_of(row) == case]
    # What comes in several passes is numbered: "backward #2".
    ends = {row["kernel"].split("_")[-1].split(" ")[0] for row in mine}
    wanted = (
      {"forward", "backward"} if case.program == "gradient" else {"forward"}
    )
    assert ends == wanted
    assert all(row["kernel"].startswith(case.op) for row in mine)


@pytest.mark.parametrize("chip", CHIPS["cuda"])
def test_kernels_spill_no_register(compiled, chip):
  """A spill is traffic in every step; N to 256, in both passes."""
  for row in compiled(chip):
    assert row["spill_bytes"] == 0, row
    assert row["registers"] <= 255


@pytest.mark.parametrize("chip", CHIPS["cuda"])
def test_kernels_fit_the_shared_memory_of_a_block(compiled, chip):
  limit = {"a100": 163, "h200": 227, "b200": 227}[chip] * 1024
  for row in compiled(chip):
    assert 0 < row["shared_bytes"] <= limit, row


@pytest.mark.parametrize("chip", CHIPS["cuda"])
def test_tiles_are_chosen_by_what_the_compiler_takes(
  compiled, chip, monkeypatch
):
  # By this account a GPU that is not compiled for here is planned for too.
  capability = {"a100": (8, 0), "h200": (9, 0), "b200": (10, 0)}[chip]
  monkeypatch.setattr(gpu_chip, "capability", lambda: capability)
  for row in compiled(chip):
    case = static.case_of(row)
    if case.op != SCAN:
      continue
    channels, states = case.shape[2:]
    backward = "backward" in row["kernel"]
    itemsize = jnp.dtype(case.dtype).itemsize
    tiling = default_tiling(states, itemsize=itemsize, backward=backward)
    plan = Plan(
      tiling, rows=1, groups=1, length=512, channels=channels, ones=0,
      learned=states, flags=(), align=4, align_time=1,
    )  # fmt: skip
    need = shared_bytes(plan, itemsize, backward)
    assert row["shared_bytes"] == need, row
