"""Write h3.npz: the H3 layer of its authors.

  python3.11 -m venv goldenv
  goldenv/bin/pip install torch==2.13.0 einops==0.8.2 scipy==1.17.1 \
    opt_einsum==3.4.0
  goldenv/bin/python tests/golden/make_h3.py CHECKOUT

CHECKOUT is a clone of github.com/HazyResearch/H3 at 5c4d06b57954, which is no
package. For heads of one and of two channels the file holds the weights under
their published names, inputs and outputs, and the gradient of a scalar loss by
each weight and by the inputs.
"""

import pathlib
import sys
import types

import numpy as np
import torch
from provenance import checkout, packages, versions

COMMIT = "5c4d06b57954"


def main():
  """Draw the weights, run forward and backward, write the file."""
  arrays = {
    "versions": versions(
      checkout("H3", pathlib.Path(sys.argv[1], "src/models"), COMMIT),
      packages("einops", "scipy"),
    )
  }
  # A trainer, of which a decorator of the log is taken.
  stub = types.ModuleType("pytorch_lightning.utilities")
  stub.rank_zero_only = lambda function: function
  sys.modules["pytorch_lightning"] = types.ModuleType("pytorch_lightning")
  sys.modules["pytorch_lightning.utilities"] = stub
  sys.path.insert(0, sys.argv[1])
  from src.models.ssm.h3 import H3

  for head_dim in (1, 2):
    torch.manual_seed(head_dim)
    layer = H3(4, d_state=6, head_dim=head_dim, dt_min=0.03, dt_max=0.3)
    arrays |= {f"{head_dim}:{key}": v for key, v in run(layer).items()}
  path = pathlib.Path(__file__).with_name("h3.npz")
  np.savez_compressed(path, **arrays)
  print(path.name, path.stat().st_size, arrays["versions"])
  for name, array in arrays.items():
    print(name, array.shape)


def run(layer):
  """Weights, outputs and gradients of one layer."""
  arrays = {}
  for parameter, value in layer.named_parameters():
    with torch.no_grad():
      value.add_(0.1 * torch.randn_like(value))
    arrays[f"weight:{parameter}"] = value.detach().numpy().copy()
  inputs = torch.randn(2, 19, 4, requires_grad=True)
  outputs = layer(inputs)
  loss = outputs * torch.sin(torch.arange(outputs.numel())).view_as(outputs)
  loss.sum().backward()
  arrays |= {
    "inputs": inputs.detach().numpy(),
    "outputs": outputs.detach().numpy(),
    "gradient": inputs.grad.numpy(),
  }
  for parameter, value in layer.named_parameters():
    arrays[f"gradient:{parameter}"] = value.grad.numpy()
  return arrays


if __name__ == "__main__":
  main()
