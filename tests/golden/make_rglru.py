"""Write rglru.npz: RecurrentGemma's recurrent block of transformers.

  python3.11 -m venv goldenv
  goldenv/bin/pip install torch==2.13.0 transformers==5.23.0
  goldenv/bin/python tests/golden/make_rglru.py

The file holds the block's weights under their published names, its inputs and
outputs, a scalar loss and its gradient by each weight and by the inputs. The
published convolution runs on from document to document, so that each row here
is one document.
"""

import pathlib

import numpy as np
import torch
from provenance import packages, versions
from transformers import RecurrentGemmaConfig
from transformers.models.recurrent_gemma import modeling_recurrent_gemma


def main():
  """Draw the weights, run forward and backward, write the file."""
  torch.manual_seed(0)
  config = RecurrentGemmaConfig(
    hidden_size=12, lru_width=12, num_attention_heads=3, conv1d_width=4
  )
  make = modeling_recurrent_gemma.RecurrentGemmaRecurrentBlock
  block = make(config, layer_idx=0).float()
  with torch.no_grad():
    for name, parameter in block.named_parameters():
      # What is made empty, and away from zeros.
      if parameter.ndim > 1:
        scale = parameter.shape[-1] ** -0.5
        parameter.copy_(scale * torch.randn_like(parameter))
      else:
        parameter.copy_(0.3 * torch.randn_like(parameter))
      if name.endswith("recurrent_param"):
        parameter.sub_(3.0)
  inputs = torch.randn(2, 23, config.hidden_size, requires_grad=True)
  positions = torch.arange(inputs.shape[1])[None].expand(2, -1)
  outputs, _ = block(inputs, positions, None, use_cache=False)
  weights = torch.sin(torch.arange(outputs.numel())).reshape(outputs.shape)
  loss = (outputs * weights).sum()
  loss.backward()
  arrays = {
    "inputs": inputs.detach().numpy(),
    "outputs": outputs.detach().numpy(),
    "weights": weights.numpy(),
    "gradient": inputs.grad.numpy(),
    "versions": versions(packages("transformers")),
  }
  for name, parameter in block.named_parameters():
    arrays[f"weight:{name}"] = parameter.detach().numpy()
    arrays[f"gradient:{name}"] = parameter.grad.numpy()
  path = pathlib.Path(__file__).with_name("rglru.npz")
  np.savez_compressed(path, **arrays)
  print(path.name, path.stat().st_size, arrays["versions"])
  for name, array in arrays.items():
    print(name, array.shape)


if __name__ == "__main__":
  main()
