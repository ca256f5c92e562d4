"""A file that is not whole, or not safe, is refused with the way out.

What needs PyTorch is skipped where it is not installed. With version 2.13.0 on
Python 3.12, in an environment that sees this one's packages, all has passed.
"""

import json
import pathlib
import pickle
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interop_checkpoints import (
  EMBEDDING,
  HEAD,
  HF,
  LAYER,
  assert_same,
  checkpoint,
  raw,
  shard,
  weights,
  whole_model,
  write,
)

from ssmjax.interop import (
  abstract_pretrained,
  load_pretrained,
)
from ssmjax.models.tensor_files import (
  TensorSpec,
  read_safetensors,
  write_safetensors,
)


def test_folder_that_is_no_checkpoint_is_refused_with_the_way_out(tmp_path):
  with pytest.raises(ValueError, match=r"is no folder.*'org/name'"):
    load_pretrained(tmp_path / "gone")
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


def test_what_is_wrong_with_layers_alike_takes_one_line(tmp_path):
  folder = checkpoint(tmp_path, HF | {"num_hidden_layers": 5}, weights())
  with pytest.raises(ValueError, match="adapter alone") as error:
    abstract_pretrained(folder)
  lines = str(error.value).splitlines()[1:]
  assert "  missing: backbone.layers.{2-4}.norm.weight" in lines
  assert len(lines) == 10


def test_form_that_is_not_whole_gives_way_to_the_one_that_is(tmp_path):
  folder = checkpoint(tmp_path, HF | {"model_type": "mistral"}, weights())
  (folder / "params.json").write_text(json.dumps(HF))
  file = folder / "model.safetensors"
  file.rename(folder / "consolidated.safetensors")
  abstract_pretrained(folder)


@pytest.mark.parametrize(
  ("entries", "size", "message"),
  [
    ({"D": ("F32", [2], [0, 8])}, 4, "file not fully covered"),
    ({"D": ("F32", [2], [0, 8])}, 12, "file not fully covered"),
    ({"D": ("F32", [3], [0, 8])}, 8, "invalid shape"),
    ({"D": ("F32", [1], [4, 8])}, 8, "invalid offset for tensor `D`"),
    ({"D": ("F32", [1], [4, 0])}, 4, "invalid offset for tensor `D`"),
    ({"D": ("F32", [1], [0, 4]), "E": ("F32", [1], [0, 4])}, 4, "offset for"),
    ({"D": ("F32", [-1], [0, 4])}, 4, "`-1`, expected usize"),
    ({"D": ("F32", [True], [0, 4])}, 4, "`true`, expected usize"),
    ({"D": ("F32", [2**62, 4], [0, 0])}, 0, "overflow"),
    ({"D": ("F32", [1], [0])}, 4, "expected a tuple of size 2"),
    ({"D": ("F32", [1], None)}, 4, "expected a tuple of size 2"),
    ({"D": (["F32"], [1], [0, 4])}, 4, "sequence, expected string"),
    ({"D": ("X" * 10**6, [1], [0, 4])}, 4, "unknown variant `XXX"),
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
  with pytest.raises(ValueError, match=message) as error:
    abstract_pretrained(folder)
  text = str(error.value)
  assert f"{folder / 'model.safetensors'} is no whole safetensors file" in text
  assert len(text) < 500


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (b"", "header too small"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    (b"\xff" * 20, "header too large"),
    ((3).to_bytes(8, "little") + b"[1]", "invalid JSON in header"),
    ((4).to_bytes(8, "little") + b'{"a"', "invalid JSON in header"),
    ((7).to_bytes(8, "little") + b'{"a":1}', "expected struct TensorInfo"),
    ((600000).to_bytes(8, "little") + b'{"a":' * 120000, "recursion limit"),
  ],
  ids=["empty", "pointer", "length", "array", "half", "number", "deep"],
)
def test_file_that_is_no_safetensors_is_refused(tmp_path, data, message):
  folder = checkpoint(tmp_path, HF, {})
  (folder / "model.safetensors").write_bytes(data)
  with pytest.raises(ValueError, match=message):
    abstract_pretrained(folder)


def test_tensor_of_a_file_reads_the_piece_that_is_asked_for(tmp_path):
  arrays = {
    "matrix": np.arange(24, dtype=jnp.bfloat16).reshape(2, 3, 4),
    "number": np.array(7, np.int8),
    "nothing": np.zeros((0, 3), np.float32),
  }
  file = tmp_path / "a.safetensors"
  specs = {
    name: TensorSpec(x.shape, x.dtype, lambda x=x: x)
    for name, x in arrays.items()
  }
  write_safetensors(file, specs)
  tensors = read_safetensors(file, "load")
  for name, array in arrays.items():
    tensor = tensors[name]
    assert (tensor.shape, tensor.dtype) == (array.shape, array.dtype)
    np.testing.assert_array_equal(np.asarray(tensor), array)
    np.testing.assert_array_equal(tensor[()], array)
  for index in [
    np.s_[:1],
    np.s_[-1:, 1:-1, :9],
    np.s_[:, 2:1],
    np.s_[:, :, 1:3],
  ]:
    piece = tensors["matrix"][index]
    np.testing.assert_array_equal(piece, arrays["matrix"][index])
    assert piece.dtype == jnp.bfloat16
  assert tensors["nothing"][:0, 1:].shape == (0, 2)


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


def test_shards_of_pickles_give_what_one_file_gives(tmp_path, monkeypatch):
  opened = []

  def load(path, **options):
    opened.append(path.name)
    with np.load(path) as arrays:
      return {name: FakeTensor(array) for name, array in arrays.items()}

  def save(part, path):
    with open(path, "wb") as file:
      np.savez(file, **part)

  monkeypatch.setitem(sys.modules, "torch", fake_torch(load))
  folder = sharded_pickles(tmp_path, weights(), save)
  assert_same(load_pretrained(folder), whole_model())
  # Their names and shapes first, the embedding and its copy, the tensors.
  assert opened == [*SHARDS, *reversed(SHARDS), *SHARDS]
  # Safetensors beside them are taken before, and no pickle is opened.
  opened.clear()
  shard(folder, {"a.safetensors": weights()})
  load_pretrained(folder)
  assert opened == []


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    ({"lacking": True}, "lacks pytorch_model-00002-of-00002.bin, which"),
    (
      {"again": True},
      r"00002.bin holds \S+D \(in pytorch_model-00001-of-00002",
    ),
  ],
)
def test_shards_of_pickles_that_do_not_fit_are_refused(
  tmp_path, monkeypatch, wrong, message
):
  def load(path, **options):
    names = json.loads(path.read_text())
    tensors = {name: FakeTensor(weights()[name]) for name in names}
    first = f"{LAYER.format(0)}D"
    if "again" in wrong and SHARDS[1] in path.name:
      tensors[first] = FakeTensor(weights()[first])
    return tensors

  def save(part, path):
    path.write_text(json.dumps(list(part)))

  monkeypatch.setitem(sys.modules, "torch", fake_torch(load))
  tensors = weights()
  # D of the first layer in the first file.
  tensors = {name: tensors[name] for name in sorted(tensors)[::-1]}
  first = f"{LAYER.format(0)}D"
  tensors = {first: tensors.pop(first)} | tensors
  folder = sharded_pickles(tmp_path, tensors, save, head=False)
  if "lacking" in wrong:
    (folder / SHARDS[1]).unlink()
  with pytest.raises(ValueError, match=message):
    abstract_pretrained(folder)


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


@pytest.mark.parametrize("zipped", [True, False])
def test_real_pytorch_file_gives_what_safetensors_gives(tmp_path, zipped):
  torch = real_torch()
  folder = checkpoint(tmp_path, HF, {})
  (folder / "model.safetensors").unlink()
  state = {name: torch.tensor(array) for name, array in weights().items()}
  torch.save(
    state,
    folder / "pytorch_model.bin",
    _use_new_zipfile_serialization=zipped,
  )
  assert_same(load_pretrained(folder), whole_model())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_real_pytorch_shards_give_what_safetensors_gives(tmp_path, dtype):
  torch = real_torch()

  def save(part, path):
    tensors = {name: torch.tensor(array) for name, array in part.items()}
    # As models trained and transposed leave them: not contiguous, and with
    # gradients; a tied matrix shares its memory.
    for name, tensor in tensors.items():
      tensor = tensor.to(getattr(torch, dtype))
      if tensor.ndim == 2:
        tensor = tensor.T.contiguous().T
      tensors[name] = torch.nn.Parameter(tensor)
    torch.save(tensors, path)

  folder = sharded_pickles(tmp_path, weights(), save)
  expected = jax.tree.map(
    lambda x: x.astype(dtype).astype(jnp.float32), whole_model()
  )
  assert_same(load_pretrained(folder), expected)


def test_real_pytorch_refuses_code_in_a_shard(tmp_path):
  torch = real_torch()
  ran = tmp_path / "ran"

  class Code:
    def __reduce__(self):
      return pathlib.Path.touch, (ran,)

  def save(part, path):
    torch.save(part | {"D": Code()}, path)

  folder = sharded_pickles(tmp_path, weights(), save)
  with pytest.raises(ValueError, match="run as code"):
    abstract_pretrained(folder)
  assert not ran.exists()


def real_torch():
  return pytest.importorskip("torch", reason="PyTorch is not installed")


SHARDS = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]


def sharded_pickles(folder, tensors, save, head=True):
  """Two shards and their index; the embedding again, in the other one."""
  (folder / "config.json").write_text(json.dumps(HF))
  names = list(tensors)
  parts = [{n: tensors[n] for n in names[i::2]} for i in range(2)]
  if head:
    there = EMBEDDING in parts[0]
    parts[there][HEAD] = tensors[EMBEDDING]
  table = {}
  for file, part in zip(SHARDS, parts, strict=True):
    save(part, folder / file)
    table |= dict.fromkeys(part, file)
  index = folder / "pytorch_model.bin.index.json"
  index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
  return folder


class FakeTensor:
  """What the reader asks of a tensor of PyTorch's."""

  def __init__(self, array):
    self.array = array
    self.dtype = array.dtype

  def detach(self):
    return self

  def numpy(self):
    return self.array
