"""What the benchmark of time-invariant systems times is one computation."""

import json

import jax
import pytest
from checks import assert_close

from experiments import bench_time_invariant
from experiments.bench_time_invariant import (
  LTI,
  LongConv,
  bench_long_conv,
  bench_lti,
)

pytestmark = pytest.mark.nightly


def test_forms_of_a_system_that_are_timed_agree(tmp_path, monkeypatch):
  y = {}

  def compiled(form, direction, args):
    # The gradients, of an untimed run.
    found = real(form, direction, args)
    y.setdefault(direction, []).append(found(*args))
    return found

  real = bench_time_invariant._compile
  monkeypatch.setattr(bench_time_invariant, "_compile", compiled)
  path = tmp_path / "lti.json"
  rows = bench_lti(LTI((2, 96, 3, 4), 1, path))
  assert json.loads(path.read_text())["results"] == rows
  forms = [(row["form"], row["direction"]) for row in rows]
  names = ("reference", "chunked", "convolution")
  directions = ("forward", "forward+backward")
  assert forms == [(name, where) for where in directions for name in names]
  for found in y.values():
    for other in found[1:]:
      # A complex gradient's parts; kernels are formed by other sums.
      for a, b in zip(*map(jax.tree.leaves, (other, found[0])), strict=True):
        assert_close(a, b)


def test_loop_over_windows_is_timed_where_they_fit(tmp_path, monkeypatch):
  monkeypatch.setattr(bench_time_invariant, "_MOST_BYTES", 2 * 64 * 3 * 8 * 4)
  path = tmp_path / "long-conv.json"
  rows = bench_long_conv(LongConv(("2,64,3,8", "2,64,3,64"), 1, path))
  timed = [row["shape"][-1] for row in rows if row["form"] == "reference"]
  assert timed == [8, 8]
  assert {row["form"] for row in rows} == {
    "reference", "fft", "documents", "recurrence", "transforms",
  }  # fmt: skip
  assert all(row["temporary"] is not None for row in rows
             if row["form"] != "transforms")  # fmt: skip


def test_shapes_that_cannot_be_are_named():
  with pytest.raises(SystemExit, match="shapes has '2,3', expected B,T,D,L"):
    bench_long_conv(LongConv(("2,3",), 1))
