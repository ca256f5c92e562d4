"""Write hyena.npz: the Hyena operator of its authors' standalone file.

  python3.11 -m venv goldenv
  goldenv/bin/pip install torch==2.13.0 einops==0.8.1
  git clone https://github.com/HazyResearch/safari
  git -C safari checkout 02220c69d247e5473616cd053a443ad99fd2559b
  PYTHONPATH=safari goldenv/bin/python tests/golden/make_hyena.py

The file holds the operator's weights under their published names, its inputs
and outputs, a scalar loss's weights and its gradient by each weight and by
the inputs.
"""

import pathlib

import numpy as np
import standalone_hyena
import torch
from provenance import checkout, packages, versions
from standalone_hyena import HyenaOperator

COMMIT = "02220c69d247e5473616cd053a443ad99fd2559b"


def main():
  """Draw the weights, run forward and backward, write the file."""
  torch.manual_seed(0)
  operator = HyenaOperator(
    d_model=6, l_max=24, order=3, filter_order=8, emb_dim=5, w=2, shift=0.05
  )
  with torch.no_grad():
    for name, parameter in operator.named_parameters():
      # Not the features of positions, which the paper does not learn.
      if not name.endswith("pos_emb.z"):
        parameter.add_(0.2 * torch.randn_like(parameter))
  inputs = torch.randn(2, 19, 6, requires_grad=True)
  outputs = operator(inputs)
  weights = torch.sin(torch.arange(outputs.numel())).reshape(outputs.shape)
  loss = (outputs * weights).sum()
  loss.backward()
  arrays = {
    "inputs": inputs.detach().numpy(),
    "outputs": outputs.detach().numpy(),
    "weights": weights.numpy(),
    "gradient": inputs.grad.numpy(),
    "versions": versions(
      checkout("safari", standalone_hyena.__file__, COMMIT), packages("einops")
    ),
  }
  for name, parameter in operator.named_parameters():
    arrays[f"weight:{name}"] = parameter.detach().numpy()
    arrays[f"gradient:{name}"] = parameter.grad.numpy()
  path = pathlib.Path(__file__).with_name("hyena.npz")
  np.savez_compressed(path, **arrays)
  print(path.name, path.stat().st_size, arrays["versions"])
  for name, array in arrays.items():
    print(name, array.shape)


if __name__ == "__main__":
  main()
