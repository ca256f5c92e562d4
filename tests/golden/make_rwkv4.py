"""Write rwkv4.npz: RWKV-4's two mixes of transformers, on a CPU.

  python3.11 -m venv goldenv
  goldenv/bin/pip install torch==2.13.0 transformers==5.23.0
  goldenv/bin/python tests/golden/make_rwkv4.py

The file holds, for the time mix (`attention`) and the channel mix
(`feed_forward`), the weights under their published names, inputs, outputs, a
scalar loss's weights and its gradient by each weight and by the inputs.
"""

import pathlib

import numpy as np
import torch
from provenance import packages, versions
from transformers import RwkvConfig
from transformers.models.rwkv import modeling_rwkv


def main():
  """Draw the weights, run forward and backward, write the file."""
  torch.manual_seed(0)
  config = RwkvConfig(
    hidden_size=10,
    attention_hidden_size=12,
    intermediate_size=14,
    num_hidden_layers=2,
    vocab_size=16,
  )
  parts = {
    "attention": modeling_rwkv.RwkvSelfAttention(config, 0).float(),
    "feed_forward": modeling_rwkv.RwkvFeedForward(config, 0).float(),
  }
  inputs = torch.randn(2, 23, config.hidden_size)
  arrays = {
    "inputs": inputs.numpy(),
    "versions": versions(packages("transformers")),
  }
  for part, module in parts.items():
    with torch.no_grad():
      for name, parameter in module.named_parameters():
        if "time_mix" in name:
          parameter.uniform_(0, 1)
        elif name == "time_decay":
          # From a memory of 50 tokens to one of none.
          parameter.copy_(torch.linspace(-4, 3, parameter.numel()))
        elif name == "time_first":
          parameter.normal_()
        else:
          # Keys of this size differ by e^±5.
          parameter.normal_(0, 2 * parameter.shape[-1] ** -0.5)
    x = inputs.clone().requires_grad_()
    outputs, _ = module(x)
    weights = torch.sin(torch.arange(outputs.numel())).reshape(outputs.shape)
    (outputs * weights).sum().backward()
    arrays[f"{part}:outputs"] = outputs.detach().numpy()
    arrays[f"{part}:gradient"] = x.grad.numpy()
    arrays["weights"] = weights.numpy()
    for name, parameter in module.named_parameters():
      arrays[f"{part}:weight:{name}"] = parameter.detach().numpy()
      arrays[f"{part}:gradient:{name}"] = parameter.grad.numpy()
  path = pathlib.Path(__file__).with_name("rwkv4.npz")
  np.savez_compressed(path, **arrays)
  print(path.name, path.stat().st_size, arrays["versions"])
  for name, array in arrays.items():
    print(name, array.shape)


if __name__ == "__main__":
  main()
