"""No kernel becomes slower, larger or hungrier without being noticed.

The compilers' figures of each kernel are compared with the committed table,
`experiments/results/kernels-static.json`. What is better only says so.
"""

import pytest

from experiments import static
from experiments.static_cases import CHIPS, quick_cases, table_cases
from experiments.static_worker import COMPILERS


@pytest.mark.parametrize("platform", CHIPS)
def test_quick_figures_are_those_of_the_table(platform):
  hold([case for case in quick_cases() if case.platform == platform])


@pytest.mark.nightly
@pytest.mark.parametrize("chip", [*CHIPS["tpu"], *CHIPS["cuda"]])
def test_all_figures_are_those_of_the_table(chip):
  hold(table_cases([chip]))


def test_table_has_every_case_and_no_other():
  have = {str(static.case_of(row)) for row in static.read_table()["rows"]}
  wanted = table_cases([*CHIPS["tpu"], *CHIPS["cuda"]])
  assert have == set(map(str, wanted))


def test_quick_cases_are_of_the_table():
  wanted = table_cases([*CHIPS["tpu"], *CHIPS["cuda"]])
  assert set(quick_cases()) <= set(wanted)


def hold(cases):
  """Compile, and compare with the table where the compilers are its own."""
  platform = cases[0].platform
  if reason := COMPILERS[platform].missing():
    pytest.skip(reason)
  table = static.read_table()
  rows = static.measure(cases)
  assert not [row for row in rows if "error" in row]
  recorded, here = table["compilers"][platform], static.compilers(platform)
  if recorded != here:
    static.print_table(rows)
    pytest.skip(f"the table is of {recorded}, here are {here}")
  worse, better = static.regressions(rows, table)
  if better:
    print("\nbetter than the table:", *better, sep="\n")
  assert not worse, "\n".join(worse)
