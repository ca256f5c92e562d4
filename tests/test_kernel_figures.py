"""What the compilers write is read rightly, or not at all."""

import dataclasses
import json
import sys

import jax
import pytest

from experiments import (
  bench,
  static,
  static_cases,
  static_gpu,
  static_tpu,
)
from experiments import bench_kernels as kernels_command
from experiments.bench_kernels import Kernels, bench_kernels
from experiments.floor import floor
from experiments.static_cases import Case

CASE = Case("h200", "linear_scan", "forward", "float32", (1, 8, 8))
HEAD = dataclasses.asdict(CASE) | {"shape": [1, 8, 8]}
GPU = {
  "kernel": "linear_scan_gpu_forward",
  "registers": 40,
  "spill_bytes": 0,
  "shared_bytes": 1000,
  "instructions": 300,
  "loops": [{"instructions": 100, "issue_cycles": 150, "mix": {"FFMA": 90}}],
}
TPU = {
  "kernel": "linear_scan_tpu_forward",
  "cycles": 1000,
  "cycles_of_others": 10,
  "vmem_bytes": 4096,
  "spills": 0,
  "loops": [{"bundles": 50, "slots": {"VALU": 0.9}}],
}

# Depths are those of the loops that a bundle is in: two in turn, one of which
# has a bundle of the code around it.
BUNDLES = """
LB: loop body

     0   :  { %s0 = smov 0 }
   0x1 LB: > { %s1 = sadd 1 }
   0x2 LB: >> { %v1 = vadd }
   0x3   : > { %s2 = sadd 2 ;; %v2 = vmul }
   0x4   : >> { %v3 = vadd }
   0x5   : > { %s3 = sadd 1 }
   0x6 LB: >> { %v4 = vadd }
   0x7   : >> { %v5 = vadd }
   0x8   :  { %s4 = smov 0 }
"""
USED = """== CAPACTIY:
XLU, VALU, VSTORE:SPILL
    2     4     1
== UTILIZATION:
0 0 0
0 0 0
2 4 1
2 4 1
2 4 0
0 0 0
0 4 0
0 2 0
0 0 0
"""

SASS = """
kernel:
   -:-:-:Y:01        /*0000*/                   S2R R0, SR_TID.X 
.L_x_1:
   -:-:-:Y:02        /*0010*/                   FFMA R1, R1, R2, R3 
.L_x_2:
   -:-:-:Y:01        /*0020*/                   FMUL R1, R1, R2 
   -:-:0:Y:03        /*0030*/                   MUFU.EX2 R1, R1 
   -:-:-:Y:01        /*0040*/                   FADD R1, R1, R2 
   -:-:-:Y:01        /*0050*/              @!P1 BRA `(.L_x_4) 
.L_x_3:
   -:-:-:Y:01        /*0060*/                   FFMA.FTZ R1, R1, R2, R3 
   -:-:-:Y:05        /*0070*/               @P0 BRA `(.L_x_2) 
   -:-:-:Y:01        /*0080*/                   STG.E desc[UR4][R2.64], R1 
   -:-:-:Y:05        /*0090*/               @P2 BRA `(.L_x_1) 
   -:-:-:Y:05        /*00a0*/                   EXIT 
.L_x_4:
   -:-:-:Y:05        /*00b0*/                   SYNCS R1 
   -:-:-:Y:05        /*00c0*/                   BRA `(.L_x_3) 
.L_x_5:
   -:-:-:-:00        /*00d0*/                   BRA `(.L_x_5)
"""
REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'scan_mosaic_gpu_kernel' for 'sm_90a'
    0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 80 registers, used 2 barriers, 1 bytes smem
"""


def test_loop_of_a_tpu_ends_where_its_last_bundle_is(monkeypatch):
  monkeypatch.setattr(static_tpu, "_LEAST_BUNDLES", 2)
  long, short = static_tpu._loops(BUNDLES, USED)
  assert long == {
    "bundles": 3,
    "slots": {"XLU": 1.0, "VALU": 1.0, "VSTORE:SPILL": 0.667},
    "spills": 2,
  }
  assert short == {"bundles": 2, "slots": {"VALU": 0.75}, "spills": 0}


def test_unreadable_tpu_dump_is_an_error(tmp_path):
  with pytest.raises(RuntimeError, match="9 bundles and 8 rows"):
    static_tpu._loops(BUNDLES, USED.removesuffix("0 0 0\n"))
  with pytest.raises(RuntimeError, match="another number of columns"):
    static_tpu._loops(BUNDLES, USED.replace("0 4 0", "0 4"))
  with pytest.raises(RuntimeError, match="'== UTILIZATION:', found"):
    static_tpu._loops(BUNDLES, "nothing of the kind")
  (tmp_path / "profile").mkdir()
  (tmp_path / "llo").mkdir()
  text = (
    '  %scan.1 = f32[8] custom-call(), custom_call_target="tpu_custom_call"'
  )
  with pytest.raises(RuntimeError, match=r"no estimate of scan\.1"):
    static_tpu.figures(tmp_path, text)
  profile = tmp_path / "profile" / "scan.1_TPU v5_static_llo_profile.textproto"
  profile.write_text("estimated: 7")
  with pytest.raises(RuntimeError, match="no 'estimated_cycles: '"):
    static_tpu.figures(tmp_path, text)
  profile.write_text("estimated_cycles: 7")
  with pytest.raises(RuntimeError, match=r"0 dumps <id>-scan\.1-<number>"):
    static_tpu.figures(tmp_path, text)


def test_innermost_loop_of_a_gpu_is_counted_with_its_wait():
  found = static_gpu._sass(SASS)
  assert found["instructions"] == 14
  (loop,) = found["loops"]
  # FMUL to BRA, and the two instructions that wait out of line.
  assert loop["instructions"] == 8
  assert loop["issue_cycles"] == 1 + 3 + 1 + 1 + 1 + 5 + 5 + 5
  assert loop["mix"]["BRA"] == 3
  assert loop["mix"]["FFMA"] == loop["mix"]["MUFU"] == 1


def test_gpu_report_is_read_for_each_kernel(tmp_path):
  printed = REPORT + "\t.target\tsm_90a\n" + SASS
  (tmp_path / "printed.txt").write_text(printed)
  (tmp_path / "scan_0.resources.txt").write_text("(smem_scratch_bytes=64, t=0)")
  text = 'custom_call_target="mosaic_gpu_v2"'
  (row,) = static_gpu.figures(tmp_path, text)
  assert row["kernel"] == "scan"
  assert row["registers"] == 80
  assert row["spill_bytes"] == 20
  assert row["shared_bytes"] == 64


@pytest.mark.parametrize(
  ("left", "found"),
  [
    ("", "0 reports of ptxas"),
    (REPORT, "no line"),
    (REPORT.replace("Used", "Took") + SASS, "'Used n registers'"),
    (REPORT.replace("entry", "") + SASS, "'Compiling entry function'"),
  ],
)
def test_unreadable_gpu_report_is_an_error(tmp_path, left, found):
  (tmp_path / "printed.txt").write_text(left)
  (tmp_path / "scan_0.resources.txt").write_text("smem_scratch_bytes=64")
  with pytest.raises(RuntimeError, match=found):
    static_gpu.figures(tmp_path, 'custom_call_target="mosaic_gpu_v2"')


XLA = {"kernel": "none", "cycles": 9000, "product_cycles": 1000, "ops": 70}


@pytest.mark.parametrize("row", [GPU, TPU, XLA], ids=["gpu", "tpu", "xla"])
def test_same_figures_are_no_regression(row):
  row = HEAD | row
  assert static.regressions([row], {"rows": [row]}) == ([], [])


@pytest.mark.parametrize(
  ("row", "change"),
  [
    (GPU, {"registers": 43}),
    (GPU, {"spill_bytes": 4}),
    (GPU, {"shared_bytes": 1051}),
    (GPU, {"loops": [GPU["loops"][0] | {"instructions": 104}]}),
    (TPU, {"cycles": 1031}),
    (TPU, {"vmem_bytes": 5000}),
    (TPU, {"kernel": "another"}),
    (XLA, {"product_cycles": 1100}),
  ],
)
def test_regression_is_named_with_the_command_that_renews(row, change):
  old, new = HEAD | row, HEAD | row | change
  (said,), better = static.regressions([new], {"rows": [old]})
  assert not better
  assert new["kernel"] in said
  assert str(CASE) in said
  assert f"--static --only '{CASE}' --out" in said
  name, value = next(iter(change.items()))
  if name in ("registers", "cycles"):
    assert f"{name} was {row[name]}, is {value}" in said


def test_improvement_is_told_and_passes():
  old, new = HEAD | GPU, HEAD | GPU | {"registers": 30}
  worse, (better,) = static.regressions([new], {"rows": [old]})
  assert not worse
  assert "registers was 40, is 30" in better


def test_table_keeps_other_rows_one_a_line(tmp_path, monkeypatch):
  versions = {"cuda": {"ptxas": "1"}, "tpu": {"libtpu": "1"}}
  monkeypatch.setattr(static, "compilers", lambda platform: versions[platform])
  path = tmp_path / "table.json"
  gpu, tpu = HEAD | GPU, HEAD | TPU | {"chip": "v5e"}
  static.write_table(path, [gpu])
  static.write_table(path, [tpu])
  static.write_table(path, [gpu | {"registers": 41}])
  table = static.read_table(path)
  assert table["rows"] == [gpu | {"registers": 41}, tpu]
  assert table["compilers"] == versions
  assert sum("kernel" in line for line in path.read_text().splitlines()) == 2
  versions["cuda"] = {"ptxas": "2"}
  other = gpu | {"dtype": "bfloat16"}
  with pytest.raises(ValueError, match="rows of ptxas 1, these are of ptxas 2"):
    static.write_table(path, [other])


def test_kernel_without_an_estimate_has_the_other_figures(
  monkeypatch, tmp_path
):
  """The TPU compiler's simulator gives up on kernels that do compile."""
  asked = []

  def work(cases, folder, report, estimate=True):
    asked.append(estimate)
    if estimate:
      return [], f"F1122 x.cc:1] {static_tpu.NO_ESTIMATE} scan.1 failed: no."
    return [{"kernels": [TPU | {"cycles": None}]}], ""

  monkeypatch.setattr(static, "_work", work)
  monkeypatch.setattr(static_tpu, "missing", lambda: None)
  (row,) = static.measure([dataclasses.replace(CASE, chip="v5e")])
  assert asked == [True, False]
  assert row["cycles"] is None
  assert row["vmem_bytes"] == TPU["vmem_bytes"]
  static.print_table([row])
  assert static.regressions([row], {"rows": [row]}) == ([], [])
  longer = row | {"loops": [row["loops"][0] | {"bundles": 60}]}
  (said,), _ = static.regressions([longer], {"rows": [row]})
  assert "loop_bundles was 50, is 60" in said


@pytest.mark.parametrize("end", ["abort", "refuse", "fail", "hang"])
def test_worker_that_ends_costs_its_own_case_only(monkeypatch, tmp_path, end):
  """Compilers abort, and hang; the cases after that are compiled."""
  worker = tmp_path / "experiments" / "static_worker.py"
  worker.parent.mkdir()
  worker.write_text(
    "import json, os, sys, time\n"
    "for line in sys.stdin:\n"
    "  case = json.loads(line)\n"
    "  answer = {'kernels': [{'kernel': 'a'}, {'kernel': 'a'}]}\n"
    "  if case['program'] == 'abort':\n"
    "    sys.stderr.write('F1122 check failed\\n')\n"
    "    sys.stderr.flush()\n"
    "    os.abort()\n"
    "  if case['program'] == 'hang':\n"
    "    time.sleep(60)\n"
    "  if case['program'] == 'refuse':\n"
    "    answer = {'refused': 'no kernel'}\n"
    "  if case['program'] == 'fail':\n"
    "    answer = {'error': 'ValueError: no'}\n"
    "  print(json.dumps({'answer': answer}), flush=True)\n"
  )
  monkeypatch.setattr(static, "_ROOT", tmp_path)
  monkeypatch.setattr(static, "_SECONDS", 5 if end != "hang" else 1)
  monkeypatch.setattr(static_gpu, "missing", lambda: None)
  cases = [dataclasses.replace(CASE, program=p) for p in ("a", end, "b")]
  said = []
  first, again, bad, *rest = static.measure(cases, report=said.append)
  assert [first["kernel"], again["kernel"]] == ["a", "a #2"]
  assert [row["program"] for row in rest] == ["b", "b"]
  assert bad["program"] == end
  assert len(said) == 3
  if end == "refuse":
    assert bad["refused"] == "no kernel"
  else:
    assert bad["error"]
    worse, _ = static.regressions([bad], {"rows": []})
    assert bad["error"] in worse[0]
  if end == "abort":
    assert "check failed" in bad["error"]


@pytest.mark.parametrize("row", [GPU, TPU, XLA], ids=["gpu", "tpu", "xla"])
def test_table_is_printed_for_a_reader(row, capsys):
  chip = "h200" if row is GPU else "v5e"
  refused = HEAD | {"chip": chip, "refused": "no kernel\nat all"}
  static.print_table([HEAD | row | {"chip": chip}, refused])
  printed = capsys.readouterr().out
  assert row["kernel"] in printed
  telling = {
    GPU["kernel"]: "FP32 90",
    TPU["kernel"]: "1,000 cycles",
    XLA["kernel"]: "of which 1,000 multiply matrices",
  }
  assert telling[row["kernel"]] in printed
  assert "no kernel\n" in printed


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    (["--static", "--chips", "v4"], "chips has v4"),
    (["--static", "--only", "nothing"], "no case has 'nothing'"),
    ([], "no GPU or TPU here"),
    (["--preset", "smoke", "--forms", "magic"], "forms has magic"),
  ],
)
def test_command_says_what_it_cannot_do(monkeypatch, flags, said):
  monkeypatch.setattr(bench, "use_cores", lambda: None)
  monkeypatch.setattr(sys, "argv", ["bench", "kernels", *flags])
  with pytest.raises(SystemExit, match=said):
    bench.main()


@pytest.mark.nightly
def test_measuring_is_rehearsed_on_a_cpu(tmp_path, capsys, monkeypatch):
  stand_in(monkeypatch, scale=1.0)
  path = tmp_path / "kernels.json"
  forms = ("pallas", "attention")
  bench_kernels(
    Kernels(preset="smoke", forms=forms, dtypes=("bfloat16",), out=path)
  )
  result = json.loads(path.read_text())
  assert result["errors"]["bfloat16"]["d_A"] < 1e-2
  (table,) = result["tables"]
  assert table["shape"] == [2, 64, 128, 4]
  assert len(table["rows"]) == 2 * len(forms)
  for row in table["rows"].values():
    assert row["min_ms"] <= row["median_ms"] <= row["max_ms"]
  assert "x pallas" in capsys.readouterr().out


def test_wrong_kernel_is_not_timed(monkeypatch):
  stand_in(monkeypatch, scale=1.1)
  config = Kernels(preset="smoke", dtypes=("float32",))
  with pytest.raises(SystemExit, match=r"the kernel.s \w+ is wrong by 0\.1"):
    bench_kernels(config)


@pytest.mark.nightly
def test_form_without_a_kernel_is_skipped(tmp_path):
  path = tmp_path / "kernels.json"
  bench_kernels(
    Kernels(preset="smoke", forms=("pallas",), dtypes=("float32",), out=path)
  )
  result = json.loads(path.read_text())
  assert result["errors"] == {}
  for row in result["tables"][0]["rows"].values():
    assert "no kernel for cpu" in row["skipped"]


def stand_in(monkeypatch, scale):
  """Let the associative form, times scale, pass for the kernel."""
  real = kernels_command._scan

  def scan(form):
    if form != "pallas":
      return real(form)
    return lambda args: (scale * real("associative")(args)).astype(
      args["u"].dtype
    )

  monkeypatch.setattr(kernels_command, "_scan", scan)


def test_floor_is_that_of_the_fullest_unit():
  """Per element at N = 16, 20 exponentials forward, 264 operations back."""
  shape = (8, 2048, 2048, 16)
  forward = floor("NVIDIA H200", shape, "bfloat16", "forward")
  both = floor("NVIDIA H200", shape, "bfloat16", "forward+backward")
  assert forward["bound"] == forward["exponentials"]
  assert forward["bound"] == pytest.approx(0.16, rel=0.02)
  assert both["bound"] - forward["bound"] == pytest.approx(0.265, rel=0.02)
  assert forward["bytes"] == 8 * 2048 * 2048 * 4 * 2
  tpu = floor("TPU v5 lite", shape, "float32", "forward")
  assert tpu["bound"] == tpu["memory"]
  assert floor("cpu", shape, "float32", "forward") is None


def test_case_is_built_for_one_device_and_for_many():
  case = Case("h200", "linear_scan", "gradient", "float32", (8, 4, 8))
  for devices in (jax.devices()[:1], jax.devices()):
    function, args = static_cases.build(case, devices, "chunked")
    y, gradients = jax.eval_shape(function, *args)
    assert y.shape == gradients["a"].shape == (8, 4, 8)
    assert len(args[1].sharding.device_set) == len(devices)
