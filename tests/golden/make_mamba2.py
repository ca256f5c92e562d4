"""Write mamba2.npz and falcon_mamba.npz: small models of transformers.

  python3.11 -m venv goldenv
  goldenv/bin/pip install torch==2.13.0 transformers==5.23.0
  goldenv/bin/python tests/golden/make_mamba2.py

On a CPU without mamba-ssm, transformers runs its plain PyTorch path, and in
`eval` FalconMamba's norms are those of its inference. A file holds the weights
under their published names, tokens, logits, the mean next-token loss and its
gradient by weights of the first layer. Mamba-2 has groups, limits of Δ that
bind, a length that is no multiple of the chunk, and an output matrix of its
own; FalconMamba's is the embedding.
"""

import pathlib

import numpy as np
import torch
from provenance import packages, versions
from transformers import (
  FalconMambaConfig,
  FalconMambaForCausalLM,
  Mamba2Config,
  Mamba2ForCausalLM,
)

VOCABULARY = 24
MAMBA2 = Mamba2Config(
  vocab_size=VOCABULARY,
  hidden_size=8,
  num_hidden_layers=2,
  num_heads=4,
  head_dim=4,
  n_groups=2,
  state_size=3,
  conv_kernel=3,
  expand=2,
  chunk_size=8,
  time_step_limit=(0.02, 0.5),
  layer_norm_epsilon=1e-4,
  tie_word_embeddings=False,
  use_cache=False,
)
FALCON = FalconMambaConfig(
  vocab_size=VOCABULARY,
  hidden_size=8,
  num_hidden_layers=2,
  state_size=3,
  conv_kernel=4,
  expand=2,
  time_step_rank=3,
  mixer_rms_eps=1e-2,
  tie_word_embeddings=True,
  use_cache=False,
)


def main():
  """Draw the weights, run forward and backward, write the file."""
  torch.manual_seed(0)
  for name, model in (
    ("mamba2", Mamba2ForCausalLM(MAMBA2)),
    ("falcon_mamba", FalconMambaForCausalLM(FALCON)),
  ):
    arrays = run(model.float().eval())
    arrays["versions"] = versions(packages("transformers"))
    path = pathlib.Path(__file__).with_name(f"{name}.npz")
    np.savez_compressed(path, **arrays)
    print(path.name, path.stat().st_size, arrays["versions"])
    for key, array in arrays.items():
      print(key, array.shape)


def run(model):
  """Inputs, outputs, weights and gradients of one model."""
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      # Away from zeros, ones and rows that are all alike; Δ around its limits.
      scale = 2.0 if name.endswith("dt_bias") else 0.2
      parameter.add_(scale * torch.randn_like(parameter))
  tokens = torch.randint(0, VOCABULARY, (2, 19))
  logits = model(tokens).logits
  loss = torch.nn.functional.cross_entropy(
    logits[:, :-1].reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1)
  )
  loss.backward()
  arrays = {
    "tokens": tokens.numpy().astype(np.int32),
    "logits": logits.detach().numpy(),
    "loss": loss.detach().numpy(),
  }
  for name, parameter in model.named_parameters():
    arrays[f"weight:{name}"] = parameter.detach().numpy()
    if "layers.0." in name or name == "lm_head.weight":
      arrays[f"gradient:{name}"] = parameter.grad.numpy()
  return arrays


if __name__ == "__main__":
  main()
