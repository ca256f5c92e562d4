"""Write delta_net.npz: gated DeltaNet of transformers, DeltaNet of fla.

  python3.11 -m venv goldenv
  goldenv/bin/pip install torch==2.13.0 transformers==5.23.0 einops
  goldenv/bin/pip install triton==3.5.1
  goldenv/bin/pip install --no-deps flash-linear-attention==0.6.0
  goldenv/bin/pip install --no-deps fla-core==0.6.0
  goldenv/bin/python tests/golden/make_delta_net.py

The file holds, for each layer, its weights under their published names, its
outputs, and the gradient of a scalar loss by each weight and by the inputs.
Where fla is installed, both layers call its kernels, which need a GPU. They
are replaced: Qwen3-Next's rule by transformers' own, that of fla's layer by
fla's loop over the tokens, its norms by their formulas, its convolution by
PyTorch's with the layer's weights.
"""

import inspect
import pathlib

import fla.layers.delta_net
import numpy as np
import torch
from fla.ops.delta_rule import naive
from provenance import packages, versions
from torch.nn import functional
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next import modeling_qwen3_next


def main():
  """Draw the weights, run forward and backward, write the file."""
  torch.manual_seed(0)
  inputs = torch.randn(2, 19, 8)
  weights = torch.sin(torch.arange(inputs.numel())).reshape(inputs.shape)
  layers = {
    "gated": gated_delta_net(),
    "silu": delta_net(num_heads=2),
    "elu": delta_net(
      num_heads=2, expand_k=0.5, qk_activation="elu", qk_norm="sum",
      use_gate=True, allow_neg_eigval=True, use_short_conv=False,
    ),
  }  # fmt: skip
  arrays = {
    "inputs": inputs.numpy(),
    "weights": weights.numpy(),
    "versions": versions(
      packages("flash-linear-attention", "fla-core", "transformers")
    ),
  }
  for name, layer in layers.items():
    for key, parameter in layer.named_parameters():
      draw(key, parameter)
    x = inputs.clone().requires_grad_()
    y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    (y * weights).sum().backward()
    arrays[f"{name}:outputs"] = y.detach().numpy()
    arrays[f"{name}:gradient"] = x.grad.numpy()
    for key, parameter in layer.named_parameters():
      arrays[f"{name}:weight:{key}"] = parameter.detach().numpy()
      arrays[f"{name}:gradient:{key}"] = parameter.grad.numpy()
  path = pathlib.Path(__file__).with_name("delta_net.npz")
  np.savez_compressed(path, **arrays)
  print(path.name, path.stat().st_size, arrays["versions"])
  for name, array in arrays.items():
    print(name, array.shape)


def gated_delta_net():
  """Two heads of keys, four of values."""
  config = Qwen3NextConfig(
    hidden_size=8, linear_num_value_heads=4, linear_num_key_heads=2,
    linear_key_head_dim=3, linear_value_head_dim=4, linear_conv_kernel_dim=4,
    rms_norm_eps=1e-5, num_hidden_layers=1,
    layer_types=["linear_attention"],
  )  # fmt: skip
  return modeling_qwen3_next.Qwen3NextGatedDeltaNet(config, 0).float()


def delta_net(**options):
  """The layer of fla, without its kernels."""
  layer = fla.layers.delta_net.DeltaNet(hidden_size=8, **options)
  for name in ("q_conv1d", "k_conv1d", "v_conv1d"):
    if hasattr(layer, name):
      conv = getattr(layer, name)
      conv.forward = lambda x, conv=conv, **_: (convolved(conv, x), None)
  norm = layer.o_norm

  def normalised(x, gate=None):
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
    y = y * norm.weight
    return y if gate is None else y * functional.silu(gate)

  norm.forward = normalised
  return layer.eval()


def convolved(conv, x):
  """PyTorch's depthwise convolution, cut to what is causal."""
  y = functional.conv1d(
    x.mT, conv.weight, conv.bias, padding=conv.weight.shape[-1] - 1,
    groups=x.shape[-1],
  )  # fmt: skip
  y = y[..., : x.shape[1]].mT
  return functional.silu(y) if conv.activation == "silu" else y


def rule(q, k, v, beta, use_qk_l2norm_in_kernel, **_):
  """Run fla's loop over the tokens, which has the heads before the time."""
  if use_qk_l2norm_in_kernel:
    norm = lambda x: x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
    q, k = norm(q), norm(k)
  swap = lambda x: x.transpose(1, 2)
  y, state = naive.delta_rule_recurrence(*map(swap, (q, k, v, beta)))
  return swap(y), state


def draw(name, parameter):
  """A weight of order one, rates of decay between 0.1 and 1."""
  with torch.no_grad():
    if parameter.ndim > 1:
      scale = parameter.shape[-1] ** -0.5
      parameter.copy_(scale * torch.randn_like(parameter))
    else:
      parameter.copy_(0.3 * torch.randn_like(parameter))
      parameter.add_(1.0 if name.endswith("norm.weight") else -1.0)


modeling_qwen3_next.torch_chunk_gated_delta_rule = inspect.unwrap(
  modeling_qwen3_next.torch_chunk_gated_delta_rule
)
fla.layers.delta_net.fused_recurrent_delta_rule = rule
fla.layers.delta_net.chunk_delta_rule = rule

if __name__ == "__main__":
  main()
