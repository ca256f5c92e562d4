"""Write rwkv4_model.npz: a small RwkvForCausalLM of transformers, on a CPU.

  python3.11 -m venv goldenv
  goldenv/bin/pip install torch==2.13.0 transformers==5.23.0
  goldenv/bin/python tests/golden/make_rwkv4_model.py

The file holds the weights under their published names, tokens, logits, and
the gradient of the mean cross-entropy of the next token by each weight outside
of the second block.
"""

import pathlib

import numpy as np
import torch
from provenance import packages, versions
from transformers import RwkvConfig, RwkvForCausalLM


def main():
  """Draw the weights, run forward and backward, write the file."""
  torch.manual_seed(0)
  config = RwkvConfig(
    vocab_size=13,
    hidden_size=6,
    attention_hidden_size=8,
    intermediate_size=10,
    num_hidden_layers=2,
    # Of inference only, and of no number but by rounding.
    rescale_every=0,
  )
  model = RwkvForCausalLM(config).float().train()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "time_mix" in name:
        parameter.uniform_(0, 1)
      elif "time_decay" in name:
        parameter.copy_(torch.linspace(-4, 2, parameter.numel()))
      elif "ln" in name and name.endswith("weight"):
        parameter.normal_(1, 0.3)
      else:
        parameter.normal_(0, max(0.3, parameter.shape[-1] ** -0.5))
  tokens = torch.randint(0, config.vocab_size, (2, 11))
  logits = model(tokens, use_cache=False).logits
  loss = torch.nn.functional.cross_entropy(
    logits[:, :-1].reshape(-1, config.vocab_size), tokens[:, 1:].reshape(-1)
  )
  loss.backward()
  arrays = {
    "tokens": tokens.numpy().astype(np.int32),
    "logits": logits.detach().numpy(),
    "versions": versions(packages("transformers")),
  }
  for name, parameter in model.named_parameters():
    arrays[f"weight:{name}"] = parameter.detach().numpy()
    if "blocks.1" not in name:
      arrays[f"gradient:{name}"] = parameter.grad.numpy()
  path = pathlib.Path(__file__).with_name("rwkv4_model.npz")
  np.savez_compressed(path, **arrays)
  print(path.name, path.stat().st_size, arrays["versions"])
  for name, array in arrays.items():
    print(name, array.shape, np.abs(array).max() if array.ndim else "")


if __name__ == "__main__":
  main()
