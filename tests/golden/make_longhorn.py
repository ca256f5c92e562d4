"""Write longhorn.npz: a small Longhorn of its authors' code, run slowly.

  git clone https://github.com/Cranial-XIX/longhorn
  git -C longhorn checkout 4ea174598787ee189f889d17f9a02c2bbdc381a4
  python3.11 -m venv goldenv
  goldenv/bin/pip install torch==2.13.0 einops==0.8.2
  goldenv/bin/python tests/golden/make_longhorn.py longhorn

The fused scan of that code needs a GPU and a package of its own, whose names
are stood in for; its `step`, in plain PyTorch, is run token by token. The file
holds a layer's weights under their published names, inputs, weights of the
loss, outputs and gradients.
"""

import importlib.util
import pathlib
import sys
import types

import numpy as np
import torch
from provenance import checkout, packages, versions

COMMIT = "4ea174598787ee189f889d17f9a02c2bbdc381a4"


def main(folder):
  """Draw the weights, run forward and backward, write the file."""
  longhorn = published(pathlib.Path(folder) / "models" / "longhorn.py")
  torch.manual_seed(0)
  layer = longhorn.Longhorn(8, d_state=4, d_conv=3, expand=2, dt_rank=3).float()
  with torch.no_grad():
    for name, parameter in layer.named_parameters():
      # Away from zeros, ones and rows that are all alike; keys that are not
      # small, so that decays go from 0 to 1.
      scale = 1.0 if name == "x_proj.weight" else 0.3
      parameter.add_(scale * torch.randn_like(parameter))
  inputs = torch.randn(2, 15, 8, requires_grad=True)
  weights = torch.randn(2, 15, 8)
  # `step` writes over its states, which autograd has saved.
  with torch.autograd.graph.allow_mutation_on_saved_tensors():
    conv = torch.zeros(2, 16, 3)
    state = torch.zeros(2, 16, 4)
    outputs = []
    for token in inputs.split(1, 1):
      y, conv, state = layer.step(token, conv, state)
      outputs.append(y)
    outputs = torch.cat(outputs, 1)
    (outputs * weights).sum().backward()
  arrays = {
    "inputs": inputs.detach().numpy(),
    "weights": weights.numpy(),
    "outputs": outputs.detach().numpy(),
    "state": state.detach().numpy(),
    "gradient": inputs.grad.numpy(),
    "versions": versions(
      checkout("longhorn", folder, COMMIT), packages("einops")
    ),
  }
  for name, parameter in layer.named_parameters():
    arrays[f"weight:{name}"] = parameter.detach().numpy()
    arrays[f"gradient:{name}"] = parameter.grad.numpy()
  path = pathlib.Path(__file__).with_name("longhorn.npz")
  np.savez_compressed(path, **arrays)
  print(path.name, path.stat().st_size, arrays["versions"])
  for name, array in arrays.items():
    print(name, array.shape)


def published(path):
  """The module, with empty names for what only its fused path calls."""
  for name, members in (
    ("mamba_ssm", ()),
    ("mamba_ssm.ops", ()),
    ("mamba_ssm.utils", ()),
    (
      "mamba_ssm.ops.selective_scan_interface",
      ("longhorn_inner_fn", "selective_scan_online7_fn"),
    ),
    ("mamba_ssm.utils.generation", ("GenerationMixin",)),
    ("mamba_ssm.utils.hf", ("load_config_hf", "load_state_dict_hf")),
  ):
    module = types.ModuleType(name)
    for member in members:
      setattr(module, member, object)
    sys.modules[name] = module
  spec = importlib.util.spec_from_file_location("longhorn", path)
  module = importlib.util.module_from_spec(spec)
  sys.modules["longhorn"] = module
  spec.loader.exec_module(module)
  return module


if __name__ == "__main__":
  main(sys.argv[1])
