"""Write rwkv.npz: the time mixes of RWKV-5 and RWKV-6 by their author.

  python3.11 -m venv goldenv
  goldenv/bin/pip install torch==2.13.0
  git clone https://github.com/BlinkDL/RWKV-LM
  git clone https://github.com/fla-org/flash-linear-attention
  goldenv/bin/python tests/golden/make_rwkv.py RWKV-LM flash-linear-attention

RWKV-LM at commit 524481d5099b38d9bc8ef1e89209161b86c8011b has the layers
(`RWKV_Tmix_x052` and `RWKV_Tmix_x060` of RWKV-v5/src/model.py), whose
recurrence is a CUDA kernel; in its place stands `naive_recurrent_rwkv6` of
flash-linear-attention at commit bc3b101dcb713ddc5bd8924b66754eb68b5ccf89. The
low ranks, 32 and 64 in the layers, are made small. The file holds, of both,
the weights under their published names, outputs, and a scalar loss's gradient
by each weight and by the inputs, which they share.
"""

import argparse
import ast
import pathlib
import types

import numpy as np
import torch
from provenance import checkout, versions

HEADS, SIZE = 2, 4
LAYERS = "RWKV-v5/src/model.py"
NAIVE = "fla/ops/rwkv6/recurrent_naive.py"
RWKV = "524481d5099b38d9bc8ef1e89209161b86c8011b"
FLA = "bc3b101dcb713ddc5bd8924b66754eb68b5ccf89"


def main():
  """Draw the weights, run forward and backward, write the file."""
  parser = argparse.ArgumentParser()
  parser.add_argument("rwkv", type=pathlib.Path)
  parser.add_argument("fla", type=pathlib.Path)
  paths = parser.parse_args()
  torch.manual_seed(0)
  naive = execute(
    paths.fla / NAIVE,
    {"naive_recurrent_rwkv6"}, {"torch": torch},
  )["naive_recurrent_rwkv6"]  # fmt: skip

  def recurrence(r, k, v, w, u):
    heads = lambda x: x.view(*x.shape[:2], HEADS, SIZE).transpose(1, 2)
    r, k, v, w = map(heads, (r, k, v, w))
    y, _ = naive(r, k, v, -torch.exp(w), u, scale=1.0)
    return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)

  def constant(B, T, C, H, r, k, v, w, u):
    return recurrence(r, k, v, w.reshape(1, 1, C).expand(B, T, C), u)

  layers = execute(
    paths.rwkv / LAYERS,
    {"RWKV_Tmix_x052", "RWKV_Tmix_x060"},
    {
      "torch": torch, "nn": torch.nn, "F": torch.nn.functional,
      "MyModule": torch.nn.Module, "MyFunction": lambda f: f,
      "HEAD_SIZE": SIZE, "RUN_CUDA_RWKV5": constant,
      "RUN_CUDA_RWKV6": recurrence,
    },
  )  # fmt: skip
  sizes = types.SimpleNamespace(
    n_embd=HEADS * SIZE, dim_att=HEADS * SIZE, head_size_a=SIZE, n_layer=3,
    head_size_divisor=8,
  )  # fmt: skip
  inputs = torch.randn(2, 15, sizes.n_embd)
  weights = torch.sin(torch.arange(inputs.numel())).reshape(inputs.shape)
  arrays = {
    "inputs": inputs.numpy(),
    "weights": weights.numpy(),
    "versions": versions(
      checkout("RWKV-LM", paths.rwkv / LAYERS, RWKV),
      checkout("flash-linear-attention", paths.fla / NAIVE, FLA),
    ),
  }
  for version in ("x052", "x060"):
    layer = layers[f"RWKV_Tmix_{version}"](sizes, 1)
    if version == "x060":
      for name, shape in {
        "time_maa_w1": (sizes.n_embd, 5 * 3),
        "time_maa_w2": (5, 3, sizes.n_embd),
        "time_decay_w1": (sizes.n_embd, 2),
        "time_decay_w2": (2, sizes.dim_att),
      }.items():
        setattr(layer, name, torch.nn.Parameter(torch.zeros(shape)))
    with torch.no_grad():
      for name, parameter in layer.named_parameters():
        if "time_m" in name and "_w" not in name[-3:]:
          parameter.uniform_(0, 1)
        elif name == "time_decay":
          ends = torch.linspace(-4, 1, parameter.numel())
          parameter.copy_(ends.reshape(parameter.shape))
        elif name == "ln_x.weight":
          parameter.normal_(1, 0.3)
        else:
          parameter.normal_(0, max(0.5, parameter.shape[-1] ** -0.5))
    x = inputs.clone().requires_grad_()
    outputs = layer(x)
    (outputs * weights).sum().backward()
    arrays[f"{version}:outputs"] = outputs.detach().numpy()
    arrays[f"{version}:gradient"] = x.grad.numpy()
    for name, parameter in layer.named_parameters():
      arrays[f"{version}:weight:{name}"] = parameter.detach().numpy()
      arrays[f"{version}:gradient:{name}"] = parameter.grad.numpy()
  path = pathlib.Path(__file__).with_name("rwkv.npz")
  np.savez_compressed(path, **arrays)
  print(path.name, path.stat().st_size, arrays["versions"])
  for name, array in arrays.items():
    print(name, array.shape, np.abs(array).max() if array.ndim else "")


def execute(path, names, scope):
  """The definitions of these names in a file, without the rest of it."""
  tree = ast.parse(path.read_text())
  tree.body = [
    node for node in tree.body if getattr(node, "name", None) in names
  ]
  exec(compile(tree, str(path), "exec"), scope)
  return scope


if __name__ == "__main__":
  main()
