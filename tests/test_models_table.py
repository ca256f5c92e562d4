"""README's table of models is what the code makes."""

import pytest

from experiments import models_table
from ssmjax.models.kinds import MIXERS


def test_readme_has_the_table_that_the_code_makes():
  text = models_table.README.read_text()
  message = "stale: python -m experiments.models_table --write"
  assert models_table.placed(text) == text, message


def test_every_kind_of_mixer_has_its_row():
  rows = models_table.table().splitlines()[2:]
  assert len(rows) == len(MIXERS)
  for row, kind in zip(rows, MIXERS, strict=True):
    assert f"(`{kind}`)" in row
    assert row.count("|") == len(models_table.COLUMNS) + 1
  mamba, attention = (
    rows[list(MIXERS).index(kind)] for kind in ("mamba", "attention")
  )
  assert "`selective_scan` | `selective_step` | TPU, GPU | channels" in mamba
  assert "MambaForCausalLM of transformers" in mamba
  assert "its own | its own | – | – | " in attention


@pytest.mark.parametrize(
  "text",
  [
    "none",
    models_table.BEGIN,
    models_table.BEGIN * 2 + models_table.END,
    models_table.END + models_table.BEGIN,
  ],
)
def test_readme_without_its_markers_is_refused(text):
  with pytest.raises(ValueError, match=r"README\.md: "):
    models_table.placed(text)
