"""Write lmu.npz: the parallel Legendre memory unit in PyTorch.

  python3.11 -m venv goldenv
  goldenv/bin/pip install torch==2.13.0 scipy==1.17.1
  goldenv/bin/python tests/golden/make_lmu.py LMU.PY

LMU.PY is src/lmu.py of github.com/hrshtv/pytorch-lmu at 95a0b937c16b, which
is no package; its LMUFFT follows Chilkuri & Eliasmith 2021. (The unit's
authors publish theirs for TensorFlow.) The file holds the weights and the
discrete system under their published names, inputs and outputs, and the
gradient of a scalar loss by each weight and by the inputs.
"""

import importlib.util
import pathlib
import sys

import numpy as np
import torch
from provenance import packages, single_file, versions

COMMIT = "95a0b937c16b"
SHA256 = "ac2d25c60a9c216b6c77f65f5a13df54c0910d82c4bd8f39d71af930136fd96b"


def main():
  """Draw the weights, run forward and backward, write the file."""
  source = pathlib.Path(sys.argv[1])
  origin = single_file("pytorch-lmu", source, COMMIT, SHA256)
  spec = importlib.util.spec_from_file_location("published_lmu", source)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  torch.manual_seed(0)
  layer = module.LMUFFT(4, 4, memory_size=5, seq_len=19, theta=7.0)
  inputs = torch.randn(2, 19, 4, requires_grad=True)
  outputs, _ = layer(inputs)
  loss = outputs * torch.sin(torch.arange(outputs.numel())).view_as(outputs)
  loss.sum().backward()
  arrays = {
    "versions": versions(origin, packages("scipy")),
    "inputs": inputs.detach().numpy(),
    "outputs": outputs.detach().numpy(),
    "gradient": inputs.grad.numpy(),
    "A": layer.A.numpy(),
    "B": layer.B.numpy(),
  }
  for parameter, value in layer.named_parameters():
    arrays[f"weight:{parameter}"] = value.detach().numpy()
    arrays[f"gradient:{parameter}"] = value.grad.numpy()
  path = pathlib.Path(__file__).with_name("lmu.npz")
  np.savez_compressed(path, **arrays)
  print(path.name, path.stat().st_size, arrays["versions"])
  for name, array in arrays.items():
    print(name, array.shape)


if __name__ == "__main__":
  main()
