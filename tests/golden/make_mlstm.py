"""Write mlstm.npz: the layer of transformers' xLSTM, by its own PyTorch form.

  python3.11 -m venv goldenv
  goldenv/bin/pip install torch==2.13.0 transformers==5.23.0
  goldenv/bin/python tests/golden/make_mlstm.py

The file holds the layer's weights under their published names, its inputs and
outputs, a scalar loss's weights and its gradient by each weight and by the
inputs. `eps` of the denominator is set to next to nothing, for it is added to
a denominator that is divided by e^m.
"""

import pathlib

import numpy as np
import torch
from provenance import packages, versions
from transformers.models.xlstm import configuration_xlstm, modeling_xlstm


def main():
  """Draw the weights, run forward and backward, write the file."""
  torch.manual_seed(0)
  config = configuration_xlstm.xLSTMConfig(
    hidden_size=12,
    num_heads=2,
    num_hidden_layers=1,
    vocab_size=8,
    qk_dim_factor=0.5,
    v_dim_factor=1.0,
    chunk_size=16,
    mode="train",
    chunkwise_kernel="chunkwise--native_autograd",
    autocast_kernel_dtype="float32",
    return_last_states=True,
    eps=1e-30,
  )
  layer = modeling_xlstm.xLSTMLayer(config).float()
  with torch.no_grad():
    for name, parameter in layer.named_parameters():
      if parameter.ndim > 1:
        scale = parameter.shape[-1] ** -0.5
        # Input gates of e^±8 and more, so that both sides of the maximum and
        # the stabiliser matter.
        scale *= 6 if name.startswith("igate") else 1.5
        parameter.normal_(0, scale)
      elif name.startswith("multihead"):
        parameter.normal_(1, 0.3)
      else:
        parameter.normal_()
  inputs = torch.randn(2, 32, config.hidden_size, requires_grad=True)
  outputs, _ = layer(inputs)
  weights = torch.sin(torch.arange(outputs.numel())).reshape(outputs.shape)
  (outputs * weights).sum().backward()
  arrays = {
    "inputs": inputs.detach().numpy(),
    "outputs": outputs.detach().numpy(),
    "weights": weights.numpy(),
    "gradient": inputs.grad.numpy(),
    "versions": versions(packages("transformers")),
  }
  for name, parameter in layer.named_parameters():
    arrays[f"weight:{name}"] = parameter.detach().numpy()
    arrays[f"gradient:{name}"] = parameter.grad.numpy()
  path = pathlib.Path(__file__).with_name("mlstm.npz")
  np.savez_compressed(path, **arrays)
  print(path.name, path.stat().st_size, arrays["versions"])
  for name, array in arrays.items():
    print(name, array.shape, np.abs(array).max() if array.ndim else "")


if __name__ == "__main__":
  main()
