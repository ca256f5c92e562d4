"""A file that is not whole, or not safe, is refused with the way out."""

import json
import pickle
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from interop_checkpoints import (
  HF,
  assert_same,
  checkpoint,
  raw,
  weights,
  whole_model,
  write,
)

from ssmjax.interop import (
  abstract_pretrained,
  load_pretrained,
)


def test_folder_that_is_no_checkpoint_is_refused_with_the_way_out(tmp_path):
  with pytest.raises(ValueError, match="snapshot_download"):
    load_pretrained("state-spaces/mamba-130m")
  with pytest.raises(ValueError, match=r"neither config.json nor params.json"):
    load_pretrained(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match=r"config.json is no JSON"):
    load_pretrained(tmp_path)
  (tmp_path / "config.json").write_text("[]")
  with pytest.raises(ValueError, match="holds no object"):
    load_pretrained(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps(HF))
  with pytest.raises(ValueError, match=r"has none of model\.safetensors"):
    load_pretrained(tmp_path)
  with pytest.raises(ValueError, match="dtype is int32, expected float32"):
    load_pretrained(tmp_path, dtype=jnp.int32)


@pytest.mark.parametrize(
  ("table", "message"),
  [
    ({"D": "../x.safetensors"}, "D is in '../x.safetensors', expected a file"),
    ({"D": "gone.safetensors"}, "lacks gone.safetensors, which"),
    (
      {"D": "a.safetensors", "E": "a.safetensors"},
      r"a\.safetensors lacks E, which",
    ),
    (
      {"D": "a.safetensors", "F": "b.safetensors"},
      r"b\.\S+ holds D \(in a\.safetensors too",
    ),
    ({}, "has no weight_map"),
  ],
)
def test_index_that_does_not_fit_its_files_is_refused(tmp_path, table, message):
  folder = checkpoint(tmp_path, HF, {})
  (folder / "model.safetensors").unlink()
  D, F = np.ones(3, np.float32), np.ones(2, np.float32)
  write(folder / "a.safetensors", {"D": D})
  write(folder / "b.safetensors", {"D": D, "F": F})
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": table}))
  with pytest.raises(ValueError, match=message):
    abstract_pretrained(folder)


@pytest.mark.parametrize(
  ("entries", "size", "message"),
  [
    ({"D": ("F32", [2], [0, 8])}, 4, "has 4 bytes of tensors, .* tells of 8"),
    ({"D": ("F32", [2], [0, 8])}, 12, "has 12 bytes of tensors"),
    ({"D": ("F32", [3], [0, 8])}, 8, "D of shape"),
    ({"D": ("F32", [1], [4, 8])}, 8, "lies at 4 to 8, after 0"),
    ({"D": ("F32", [1], [0, 4]), "E": ("F32", [1], [0, 4])}, 4, "after 4"),
    ({"D": ("F32", [-1], [0, 4])}, 4, "has the shape"),
    ({"D": ("F32", [1], [0])}, 4, "does not tell where D lies"),
    ({"D": ("F32", [1], None)}, 4, "does not tell where D lies"),
  ],
)
def test_file_whose_header_is_wrong_is_refused(
  tmp_path, entries, size, message
):
  header = {
    name: {"dtype": code, "shape": shape, "data_offsets": place}
    for name, (code, shape, place) in entries.items()
  }
  folder = checkpoint(tmp_path, HF, {})
  raw(folder / "model.safetensors", json.dumps(header).encode(), bytes(size))
  with pytest.raises(ValueError, match=message):
    abstract_pretrained(folder)


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (b"", "0 bytes"),
    (b"\xff" * 20, "header would take"),
    ((3).to_bytes(8, "little") + b"[1]", "no JSON object"),
    ((4).to_bytes(8, "little") + b'{"a"', "no JSON object"),
    ((13).to_bytes(8, "little") + b'{"a":1,"a":2}', "'a' is there twice"),
  ],
)
def test_file_that_is_no_safetensors_is_refused(tmp_path, data, message):
  folder = checkpoint(tmp_path, HF, {})
  (folder / "model.safetensors").write_bytes(data)
  with pytest.raises(ValueError, match=message):
    abstract_pretrained(folder)


def test_quantised_tensor_is_refused_by_name(tmp_path):
  header = {"D": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}
  folder = checkpoint(tmp_path, HF, {})
  raw(folder / "model.safetensors", json.dumps(header).encode(), bytes(4))
  with pytest.raises(NotImplementedError, match="holds D as F8_E4M3"):
    abstract_pretrained(folder)


def test_pickle_is_not_opened_without_pytorch(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  folder = checkpoint(tmp_path, HF, {})
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  with pytest.raises(ImportError, match="pip install torch"):
    load_pretrained(folder)


@pytest.mark.parametrize("mapped", [True, False])
def test_pickle_is_only_opened_by_the_weights_only_reader(
  tmp_path, monkeypatch, mapped
):
  calls = []

  def load(path, **options):
    calls.append(options)
    if options.get("mmap") and not mapped:
      raise RuntimeError("mmap can only be used with zip archives")
    with np.load(path) as arrays:
      return {name: FakeTensor(array) for name, array in arrays.items()}

  monkeypatch.setitem(sys.modules, "torch", fake_torch(load))
  folder = checkpoint(tmp_path, HF, {})
  (folder / "model.safetensors").unlink()
  with open(folder / "pytorch_model.bin", "wb") as file:
    np.savez(file, **weights())
  assert_same(load_pretrained(folder), whole_model())
  assert calls
  assert all(options["weights_only"] is True for options in calls)


@pytest.mark.parametrize(
  ("held", "message"),
  [
    (pickle.UnpicklingError("Weights only load failed"), "run as code"),
    (RuntimeError("failed finding central directory"), "not whole"),
    (OSError("Invalid argument"), "not whole"),
    ({"step": 7}, "holds step, which are no tensors"),
    ([1.0], "holds a list, expected tensors by name"),
  ],
)
def test_pickle_of_more_than_tensors_is_refused(
  tmp_path, monkeypatch, held, message
):
  def load(path, **options):
    if isinstance(held, Exception):
      raise held
    return held

  monkeypatch.setitem(sys.modules, "torch", fake_torch(load))
  folder = checkpoint(tmp_path, HF, {})
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  with pytest.raises(ValueError, match=message):
    load_pretrained(folder)


@pytest.mark.parametrize("version", ["2.9.1+cpu", "1.13.0", "2.5.1"])
def test_pickle_is_not_given_to_a_reader_that_can_be_made_to_run_code(
  tmp_path, monkeypatch, version
):
  def load(path, **options):
    raise AssertionError("it was")

  torch = fake_torch(load, version)
  monkeypatch.setitem(sys.modules, "torch", torch)
  folder = checkpoint(tmp_path, HF, {})
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  with pytest.raises(ValueError, match=r"CVE-.*expected 2.10 or later"):
    load_pretrained(folder)


def fake_torch(load, version="2.10.0+cpu"):
  return types.SimpleNamespace(
    load=load, bfloat16="bf16", int16="int16", __version__=version
  )


def test_real_pytorch_file_gives_what_safetensors_gives(tmp_path):
  torch = pytest.importorskip("torch", reason="PyTorch is not installed")
  folder = checkpoint(tmp_path, HF, {})
  (folder / "model.safetensors").unlink()
  state = {name: torch.tensor(array) for name, array in weights().items()}
  torch.save(state, folder / "pytorch_model.bin")
  assert_same(load_pretrained(folder), whole_model())


class FakeTensor:
  """What the reader asks of a tensor of PyTorch's."""

  def __init__(self, array):
    self.array = array
    self.dtype = array.dtype

  def detach(self):
    return self

  def numpy(self):
    return self.array
