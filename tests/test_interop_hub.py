"""A repository of the Hub is loaded by its name, through huggingface_hub.

There is no network where the tests run: a class of this file stands for the
real library. By hand, version 2.4.0 gave the same out of its cache: with a
revision, with HF_HUB_OFFLINE=1, and where no address could be reached.
"""

import fnmatch
import shutil
import sys
import types

import numpy as np
import pytest
from interop_checkpoints import (
  HF,
  assert_same,
  checkpoint,
  shard,
  weights,
  whole_model,
)

from ssmjax.interop import (
  abstract_pretrained,
  load_pretrained,
  load_tokenizer,
  save_pretrained,
)

NAME = "state-spaces/mamba-130m-hf"


class Hub:
  """What is used of huggingface_hub: repositories are folders."""

  def __init__(self, root):
    self.root = root
    self.calls = []

  def snapshot_download(self, name, *, revision, allow_patterns):
    self.calls.append((name, revision))
    source = self.root / "far" / name
    if not source.is_dir() or revision not in (None, "v1"):
      raise OSError(f"404: {name}, {revision}")
    folder = self.root / "cache" / name / (revision or "main")
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
      if any(fnmatch.fnmatch(file.name, p) for p in allow_patterns):
        shutil.copy(file, folder)
    return str(folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
  """A Hub, of which one repository is in the cache's folder when asked for."""
  hub = Hub(tmp_path)
  module = types.SimpleNamespace(snapshot_download=hub.snapshot_download)
  monkeypatch.setitem(sys.modules, "huggingface_hub", module)
  monkeypatch.chdir(tmp_path)
  far = tmp_path / "far" / NAME
  far.parent.mkdir(parents=True)
  checkpoint(far, HF, weights())
  (far / "tokenizer_config.json").write_text("{}")
  for name in ("consolidated.safetensors", "pytorch_model.bin", "README.md"):
    (far / name).write_bytes(b"not to be fetched")
  return hub


def fetched(hub, name=NAME, revision="main"):
  return sorted(
    p.name for p in (hub.root / "cache" / name / revision).iterdir()
  )


def test_repository_is_loaded_by_its_name(hub, tmp_path):
  assert_same(load_pretrained(NAME), whole_model())
  assert hub.calls == [(NAME, None)]
  files = ["config.json", "model.safetensors", "tokenizer_config.json"]
  assert fetched(hub) == files
  model = abstract_pretrained(NAME, revision="v1")
  assert hub.calls[1:] == [(NAME, "v1")]
  # And it is saved with its tokenizer.
  assert model.config.origin == str(tmp_path / "cache" / NAME / "v1")
  save_pretrained(tmp_path / "a", load_pretrained(NAME))
  assert (tmp_path / "a" / "tokenizer_config.json").exists()


def test_shards_are_fetched_with_their_index(hub, tmp_path):
  far = tmp_path / "far" / NAME
  (far / "model.safetensors").unlink()
  shard(far, {"model-00001-of-00001.safetensors": weights()})
  assert_same(load_pretrained(NAME), whole_model())
  assert "pytorch_model.bin" not in fetched(hub)


def test_pickles_are_fetched_where_there_is_nothing_else(
  hub, tmp_path, monkeypatch
):
  far = tmp_path / "far" / NAME
  (far / "model.safetensors").unlink()
  (far / "consolidated.safetensors").unlink()
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(ImportError, match="pip install torch"):
    load_pretrained(NAME)
  assert "pytorch_model.bin" in fetched(hub)


def test_folder_of_that_name_is_taken_before_the_hub(hub, tmp_path):
  checkpoint_folder = tmp_path / NAME
  checkpoint_folder.parent.mkdir()
  doubled = {name: 2 * x for name, x in weights().items()}
  checkpoint(checkpoint_folder, HF, doubled)
  model = load_pretrained(NAME)
  np.testing.assert_array_equal(
    model.norm.scale, 2 * np.asarray(whole_model().norm.scale)
  )
  assert hub.calls == []
  with pytest.raises(ValueError, match=r"revision is 'v1', and .* is a folder"):
    load_pretrained(NAME, revision="v1")


def test_tokenizer_is_fetched_without_tensors(hub, tmp_path):
  tokenizers = pytest.importorskip("tokenizers")
  words = tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a")
  file = tmp_path / "far" / NAME / "tokenizer.json"
  tokenizers.Tokenizer(words).save(str(file))
  assert load_tokenizer(NAME).encode("b").ids == [1]
  assert "model.safetensors" not in fetched(hub)


@pytest.mark.parametrize(
  ("name", "revision", "message"),
  [
    ("nobody/nothing", None, "nobody/nothing is no folder here .*404"),
    (NAME, "v2", f"{NAME} at v2 is no folder here .*404"),
  ],
)
def test_repository_that_is_not_to_be_had_is_named(
  hub, name, revision, message
):
  for load in (load_pretrained, abstract_pretrained, load_tokenizer):
    match = f"(?s){load.__name__[:4]}.*{message}.*HF_HUB_OFFLINE"
    if load is abstract_pretrained:
      match = f"(?s)load_pretrained: {message}"
    with pytest.raises(ValueError, match=match):
      load(name, revision=revision)


@pytest.mark.parametrize(
  "path", ["a", "/a/b", "../a/b", "a/b/c", "./a", "a/..", "org/na me"]
)
def test_path_is_not_taken_for_a_repository(hub, path):
  with pytest.raises(ValueError, match="is no folder, expected one with"):
    load_pretrained(path)
  assert hub.calls == []


def test_hub_without_its_library_is_an_error_with_the_way_out(
  tmp_path, monkeypatch
):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  monkeypatch.chdir(tmp_path)
  for load in (load_pretrained, abstract_pretrained, load_tokenizer):
    with pytest.raises(ImportError, match=r"pip install\s+'ssmjax\[hub\]'"):
      load(NAME)
