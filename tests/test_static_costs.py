"""Programs without a kernel are read, with every trip of their loops."""

import dataclasses
import pathlib

import jax
import pytest

from experiments import static_cases, static_costs, static_tpu

# A product in a loop of three trips, beside one that only chooses rows.
PROGRAM = """HloModule jit_f, entry_computation_layout={()->f32[8]{0}}

%inner (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %dot.1 = f32[8]{0} convolution(%p, %p), metadata={op_name="jit(f)/ij,jk->ik/dot_general"}
}

%outer (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %fusion.2 = f32[8]{0} fusion(%p), kind=kOutput, calls=%inner
}

%choose (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %rows = u32[8]{0} convolution(%p, %p), metadata={op_name="jit(f)/slice"}
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(3)
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %fusion.3 = f32[8]{0} fusion(%p), calls=%outer, backend_config={"estimated_cycles":"100"}
  %copy.4 = f32[8]{0} copy(%fusion.3), backend_config={"estimated_cycles":"7"}
  ROOT %out = (s32[], f32[8]{0}) tuple(%p, %copy.4)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %fusion.5 = f32[8]{0} fusion(%p), calls=%choose, backend_config={"estimated_cycles":"1000"}
  %while.6 = (s32[], f32[8]{0}) while(%fusion.5), condition=%condition, body=%body
  ROOT %y = f32[8]{0} get-tuple-element(%while.6), index=1
}
"""  # noqa: E501


def test_costs_of_a_program_follow_its_loops():
  found = static_costs.costs(PROGRAM)
  assert found == {"cycles": 1321, "product_cycles": 300, "ops": 7}
  row = {"kernel": "none"} | found
  assert static_tpu.figures(pathlib.Path("nowhere"), PROGRAM) == [row]


@pytest.mark.parametrize(
  ("old", "new", "said"),
  [
    ("estimated_cycles", "cycles", "no 'estimated_cycles'"),
    ("ENTRY ", "", "no 'ENTRY'"),
    (" constant(3)", " parameter(1)", "condition has 0 constants"),
  ],
)
def test_costs_that_cannot_be_read_are_an_error(old, new, said):
  with pytest.raises(RuntimeError, match=said):
    static_costs.costs(PROGRAM.replace(old, new))


@pytest.mark.parametrize("op", static_cases.XLA_ALONE)
def test_case_without_a_kernel_is_built_in_every_form(op):
  for case in static_cases.table_cases(["v5e"]):
    if case.op == op and case.program == "gradient":
      case = dataclasses.replace(case, shape=(2, 8, 4, 3, 5))
      function, args = static_cases.build(case, jax.devices()[:1])
      y, gradients = jax.eval_shape(function, *args)
      assert (y.shape, y.dtype) == ((2, 8, 4, 5), case.dtype)
      assert gradients.keys() == args[0].keys()
