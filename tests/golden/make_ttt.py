"""Write ttt.npz: TTT-linear of its authors' PyTorch code.

  git clone https://github.com/test-time-training/ttt-lm-pytorch
  git -C ttt-lm-pytorch checkout cd831db10c8c9a0f6340f02da5613316a8a92b67
  python3.11 -m venv goldenv
  goldenv/bin/pip install torch==2.13.0 transformers==5.23.0
  PYTHONPATH=ttt-lm-pytorch goldenv/bin/python tests/golden/make_ttt.py

The file holds, for the layer as in the Transformer and as in the Mamba
backbone, its weights under their published names, its outputs, and the
gradient of a scalar loss by each weight and by the inputs: two mini-batches and
a part of one.
"""

import pathlib

import numpy as np
import torch
import ttt
from provenance import checkout, packages, versions

COMMIT = "cd831db10c8c9a0f6340f02da5613316a8a92b67"


def main():
  """Draw the weights, run forward and backward, write the file."""
  torch.manual_seed(0)
  inputs = torch.randn(2, 19, 8)
  weights = torch.sin(torch.arange(inputs.numel())).reshape(inputs.shape)
  positions = torch.arange(inputs.shape[1])[None].expand(2, -1)
  arrays = {
    "inputs": inputs.numpy(),
    "weights": weights.numpy(),
    "versions": versions(
      checkout("ttt-lm-pytorch", ttt.__file__, COMMIT), packages("transformers")
    ),
  }
  for name, mamba in (("transformer", False), ("mamba", True)):
    config = ttt.TTTConfig(
      hidden_size=8, num_attention_heads=2, mini_batch_size=8,
      ttt_base_lr=1.0, use_gate=mamba, share_qk=mamba, conv_kernel=4,
    )  # fmt: skip
    layer = ttt.TTTLinear(config, layer_idx=0).float()
    for key, parameter in layer.named_parameters():
      draw(key, parameter)
    x = inputs.clone().requires_grad_()
    y = layer(x, position_ids=positions)
    (y * weights).sum().backward()
    arrays[f"{name}:outputs"] = y.detach().numpy()
    arrays[f"{name}:gradient"] = x.grad.numpy()
    for key, parameter in layer.named_parameters():
      arrays[f"{name}:weight:{key}"] = parameter.detach().numpy()
      arrays[f"{name}:gradient:{key}"] = parameter.grad.numpy()
  path = pathlib.Path(__file__).with_name("ttt.npz")
  np.savez_compressed(path, **arrays)
  print(path.name, path.stat().st_size, arrays["versions"])
  for name, array in arrays.items():
    print(name, array.shape)


def draw(name, parameter):
  """Weights of order one, norms around one, places around their means."""
  with torch.no_grad():
    noise = torch.randn_like(parameter)
    if name.endswith("norm.weight") or name == "ttt_norm_weight":
      parameter.copy_(1 + 0.3 * noise)
    elif name == "learnable_token_idx":
      parameter.copy_(0.2 * noise)
    elif parameter.ndim > 1:
      parameter.copy_(parameter.shape[-1] ** -0.5 * noise)
    else:
      parameter.copy_(0.3 * noise)


if __name__ == "__main__":
  main()
