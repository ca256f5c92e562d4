"""Golden files lie beside the scripts that made them, which say what ran."""

import pathlib
import re

import numpy as np
import pytest

GOLDEN = pathlib.Path(__file__).with_name("golden")
SCRIPTS = sorted(GOLDEN.glob("make_*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_golden_script_records_what_it_took_from_others(script):
  text = script.read_text()
  if "from writing import" in text:
    text = (GOLDEN / "writing.py").read_text()
  assert "from provenance import" in text
  # PyTorch is added to what is given, and alone is nobody's model.
  assert re.search(r"\bversions\(\s*[^)\s]", text)


def test_golden_files_are_small_and_have_their_scripts():
  text = "".join(script.read_text() for script in SCRIPTS)
  for path in GOLDEN.glob("*.npz"):
    assert path.stat().st_size <= 100_000, path
    assert path.stem in text, path
    with np.load(path) as golden:
      assert "torch" in str(golden["versions"]), path
