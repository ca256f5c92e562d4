"""A checkpoint's tokenizer is read by the tokenizers library, or refused."""

import sys

import pytest

from ssmjax.interop import load_tokenizer


def test_tokenizer_of_a_folder_goes_there_and_back(tmp_path):
  tokenizers = pytest.importorskip("tokenizers")
  vocabulary = {"[UNK]": 0, "state": 1, "space": 2}
  made = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
  )
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.save(str(tmp_path / "tokenizer.json"))
  found = load_tokenizer(tmp_path)
  assert found.encode("state space model").ids == [1, 2, 0]
  assert found.decode([1, 2]) == "state space"


def test_folder_without_a_tokenizer_says_where_to_get_one(tmp_path):
  with pytest.raises(ValueError, match=r"has no tokenizer\.json.*AutoTokeni"):
    load_tokenizer(tmp_path)
  with pytest.raises(ValueError, match="is no folder"):
    load_tokenizer(tmp_path / "absent")


def test_broken_tokenizer_is_named(tmp_path):
  pytest.importorskip("tokenizers")
  (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
  with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
    load_tokenizer(tmp_path)


def test_library_that_is_not_installed_is_named(tmp_path, monkeypatch):
  (tmp_path / "tokenizer.json").write_text("{}")
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(ImportError, match="pip install tokenizers"):
    load_tokenizer(tmp_path)
