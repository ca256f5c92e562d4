"""Write min_rnn.npz: minGRU and minLSTM of minGRU-pytorch.

  python3.11 -m venv goldenv
  goldenv/bin/pip install torch==2.13.0 numpy
  goldenv/bin/pip install --no-deps minGRU-pytorch==0.2.1
  goldenv/bin/python tests/golden/make_min_rnn.py

The paper's authors have released no code; this is the implementation that
others use, in the log-space form of the paper's App. B.3. The file holds each
cell's weights, the inputs, the outputs, and the gradient of a scalar loss by
the weights and by the inputs.
"""

import pathlib

import numpy as np
import torch
from minGRU_pytorch.minGRU import minGRU
from minGRU_pytorch.minLSTM import minLSTM
from provenance import packages, versions


def main():
  """Draw the weights, run forward and backward, write the file."""
  torch.manual_seed(0)
  inputs = torch.randn(2, 19, 6)
  arrays = {
    "inputs": inputs.numpy(),
    "versions": versions(packages("minGRU-pytorch")),
  }
  for name, make in (("gru", minGRU), ("lstm", minLSTM)):
    cell, x = make(6, expansion_factor=2.0), inputs.clone().requires_grad_()
    outputs = cell(x)
    weights = torch.sin(torch.arange(outputs.numel())).reshape(outputs.shape)
    (outputs * weights).sum().backward()
    inner, outer = (layer.weight for layer in cell.children())
    arrays |= {
      f"{name}:in": inner.detach().numpy(),
      f"{name}:out": outer.detach().numpy(),
      f"{name}:outputs": outputs.detach().numpy(),
      f"{name}:gradient": x.grad.numpy(),
      f"{name}:gradient_in": inner.grad.numpy(),
      f"{name}:gradient_out": outer.grad.numpy(),
    }
  path = pathlib.Path(__file__).with_name("min_rnn.npz")
  np.savez_compressed(path, **arrays)
  print(path.name, path.stat().st_size, arrays["versions"])
  for name, array in arrays.items():
    print(name, array.shape)


if __name__ == "__main__":
  main()
