"""Write gated_linear_attention.npz: flash-linear-attention's GLA and HGRN2.

  python3.11 -m venv goldenv
  goldenv/bin/pip install torch==2.13.0 einops==0.8.2 triton==3.9.0
  goldenv/bin/pip install --no-deps flash-linear-attention==0.6.0 \
    fla-core==0.6.0 transformers==5.23.0
  goldenv/bin/python tests/golden/make_gated_linear_attention.py

For each layer the file holds its weights under their published names, inputs,
outputs and gradients, see make_linear_attention.py. The layers are whole; their
kernels of Triton have the package's own naive form and PyTorch's norms in
their place.
"""

import pathlib

import numpy as np
import torch
from fla.layers import gla, hgrn2
from fla.ops.gla.naive import naive_recurrent_gla
from make_linear_attention import D_MODEL, HEADS, record
from provenance import packages, versions


def main():
  """Run both layers and write the file."""
  torch.manual_seed(0)
  arrays = {
    "versions": versions(packages("flash-linear-attention", "fla-core"))
  }
  gla.fused_recurrent_gla = hgrn2.fused_recurrent_gla = _recurrent
  gla.RMSNorm = hgrn2.RMSNorm = _norm
  hgrn2.rms_norm_linear = _norm_linear
  hgrn2.swish = torch.nn.functional.silu
  layer = gla.GatedLinearAttention(
    mode="fused_recurrent", hidden_size=D_MODEL, num_heads=HEADS,
    gate_low_rank_dim=5, fuse_norm=False,
  )  # fmt: skip
  layer.gate_fn = torch.nn.functional.silu
  found = record(layer, lambda inputs: layer(inputs)[0])
  arrays |= {f"gla:{name}": x for name, x in found.items()}
  for name, index in (("hgrn2", 1), ("hgrn2_first", 0)):
    layer = hgrn2.HGRN2Attention(
      mode="fused_recurrent", hidden_size=D_MODEL, num_heads=HEADS,
      expand_ratio=None, layer_idx=index,
    )  # fmt: skip
    layer.bound = torch.nn.Parameter(torch.zeros(D_MODEL))
    found = record(
      layer,
      lambda inputs, layer=layer: layer(
        inputs, lower_bound=layer.bound.sigmoid()
      )[0],
    )
    arrays |= {f"{name}:{key}": x for key, x in found.items()}
  path = pathlib.Path(__file__).with_name("gated_linear_attention.npz")
  np.savez_compressed(path, **arrays)
  print(path.name, path.stat().st_size, arrays["versions"])
  for name, array in arrays.items():
    print(name, array.shape)


def _recurrent(q, k, v, gk, initial_state, output_final_state, **_):
  return naive_recurrent_gla(q, k, v, gk, initial_state, output_final_state)


def _norm(hidden_size, eps, **_):
  norm = torch.nn.RMSNorm(hidden_size, eps)
  norm.bias = None
  return norm


def _norm_linear(x, norm_weight, norm_bias, weight, bias):
  # 1e-5 is the layer's eps, and the default of the kernel in its place.
  x = torch.nn.functional.rms_norm(x, x.shape[-1:], norm_weight, 1e-5)
  return torch.nn.functional.linear(x, weight, bias)


if __name__ == "__main__":
  main()
