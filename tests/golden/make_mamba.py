"""Write mamba.npz: a small Mamba of Hugging Face transformers, run slowly.

  python3.11 -m venv goldenv
  goldenv/bin/pip install torch==2.13.0 transformers==5.23.0
  goldenv/bin/python tests/golden/make_mamba.py

On a CPU without mamba-ssm, transformers runs its plain PyTorch path. The file
holds the weights under their published names, tokens, logits, the mean
next-token loss and its gradient by each weight of the first layer.
"""

import pathlib

import numpy as np
import torch
from provenance import packages, versions
from transformers import MambaConfig, MambaForCausalLM


def main():
  """Draw the weights, run forward and backward, write the file."""
  torch.manual_seed(0)
  config = MambaConfig(
    vocab_size=32,
    hidden_size=16,
    state_size=4,
    num_hidden_layers=2,
    conv_kernel=4,
    expand=2,
    time_step_rank=3,
    layer_norm_epsilon=1e-5,
    residual_in_fp32=True,
    use_cache=False,
  )
  model = MambaForCausalLM(config).float().eval()
  with torch.no_grad():
    for parameter in model.parameters():
      # Away from zeros, ones and rows that are all alike.
      parameter.add_(0.1 * torch.randn_like(parameter))
  tokens = torch.randint(0, config.vocab_size, (2, 19))
  logits = model(tokens).logits
  loss = torch.nn.functional.cross_entropy(
    logits[:, :-1].reshape(-1, config.vocab_size), tokens[:, 1:].reshape(-1)
  )
  loss.backward()
  arrays = {
    "tokens": tokens.numpy().astype(np.int32),
    "logits": logits.detach().numpy(),
    "loss": loss.detach().numpy(),
    "versions": versions(packages("transformers")),
  }
  for name, parameter in model.named_parameters():
    arrays[f"weight:{name}"] = parameter.detach().numpy()
    if "layers.0." in name:
      arrays[f"gradient:{name}"] = parameter.grad.numpy()
  path = pathlib.Path(__file__).with_name("mamba.npz")
  np.savez_compressed(path, **arrays)
  print(path.name, path.stat().st_size, arrays["versions"])
  for name, array in arrays.items():
    print(name, array.shape)


if __name__ == "__main__":
  main()
