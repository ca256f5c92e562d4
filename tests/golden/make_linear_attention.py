"""Write linear_attention.npz: what published linear attentions give.

  python3.11 -m venv goldenv
  goldenv/bin/pip install torch==2.13.0 einops==0.8.2 triton==3.9.0
  goldenv/bin/pip install --no-deps flash-linear-attention==0.6.0 \
    fla-core==0.6.0 transformers==5.23.0
  git clone https://github.com/idiap/fast-transformers  # 2ad36b9
  git clone https://github.com/microsoft/torchscale  # 4d1e0e8
  PYTHONPATH=fast-transformers:torchscale goldenv/bin/python \
    tests/golden/make_linear_attention.py

For each layer the file holds its weights under their published names, inputs,
outputs, and the gradient by each weight and by the inputs of the outputs' sum
weighted with sin(0), sin(1), ….

`elu` and `random` are the recurrent layers of fast-transformers, stepped
through the tokens; `exp_mlp` is flash-linear-attention's layer with Hedgehog's
map, `retnet` torchscale's in its parallel form. Kernels of Triton have
PyTorch's or the package's own naive forms in their place, and modules that
torchscale imports for other layers are empty here.
"""

import importlib.util
import pathlib
import sys
import types

import numpy as np
import torch
from provenance import checkout, packages, versions

D_MODEL, HEADS = 8, 2
CLONES = {
  "fast-transformers": "2ad36b97e64cb93862937bd21fcc9568d989561f",
  "torchscale": "4d1e0e82e5adf86dd424f1463192635b73fc8efc",
}


def main():
  """Run the layers and write the file."""
  torch.manual_seed(0)
  arrays = {
    "versions": versions(
      packages("flash-linear-attention", "fla-core"),
      *(
        checkout(name, folder(name), commit) for name, commit in CLONES.items()
      ),
    )
  }
  for name, make in (("elu", elu), ("random", random), ("exp_mlp", exp_mlp),
                     ("retnet", retnet)):  # fmt: skip
    layer, run = make()
    arrays |= {f"{name}:{k}": v for k, v in record(layer, run).items()}
  path = pathlib.Path(__file__).with_name("linear_attention.npz")
  np.savez_compressed(path, **arrays)
  print(path.name, path.stat().st_size, arrays["versions"])
  for name, array in arrays.items():
    print(name, array.shape)


def folder(name):
  """Where a clone's package lies that is found by its name."""
  spec = importlib.util.find_spec(name.replace("-", "_"))
  return spec.submodule_search_locations[0]


def record(layer, run):
  """Draw weights, run forward and backward."""
  with torch.no_grad():
    for name, parameter in layer.named_parameters():
      if name.endswith("_projection.bias"):
        parameter.zero_().requires_grad_(False)  # Ours have none.
      elif parameter.ndim > 1:
        scale = 1.5 * parameter.shape[-1] ** -0.5
        parameter.copy_(scale * torch.randn_like(parameter))
      else:
        parameter.copy_(parameter + 0.3 * torch.randn_like(parameter))
  inputs = torch.randn(2, 13, D_MODEL, requires_grad=True)
  outputs = run(inputs)
  weights = torch.sin(torch.arange(outputs.numel())).reshape(outputs.shape)
  (outputs * weights).sum().backward()
  arrays = {
    "inputs": inputs.detach(),
    "outputs": outputs.detach(),
    "gradient": inputs.grad,
  }
  arrays |= {f"buffer:{name}": x for name, x in layer.named_buffers()}
  for name, parameter in layer.named_parameters():
    if parameter.grad is not None and parameter.grad.any():
      arrays[f"weight:{name}"] = parameter.detach()
      arrays[f"gradient:{name}"] = parameter.grad
  return {name: array.numpy() for name, array in arrays.items()}


def elu():
  """Katharopoulos et al.'s layer as a recurrent network."""
  return _recurrent(None, 1e-6)


def random():
  """The same with positive orthogonal random features."""
  from fast_transformers.feature_maps import Favor

  # A small eps: our features of a query are scaled by their largest.
  return _recurrent(Favor.factory(n_dims=16), 1e-10)


def _recurrent(feature_map, eps):
  from fast_transformers.recurrent.attention.self_attention import (
    attention_layer,
    linear_attention,
  )

  inner = linear_attention.RecurrentLinearAttention(
    D_MODEL // HEADS, feature_map, eps
  )
  layer = attention_layer.RecurrentAttentionLayer(inner, D_MODEL, HEADS)

  def run(inputs):
    state, outputs = None, []
    for x in inputs.unbind(1):
      y, state = layer(x, x, x, state)
      outputs.append(y)
    return torch.stack(outputs, 1)

  return layer, run


def exp_mlp():
  """Hedgehog's feature map, the denominator and a norm of each head."""
  from fla.layers import linear_attn
  from fla.ops.linear_attn.naive import naive_recurrent_linear_attn

  linear_attn.chunk_linear_attn = lambda cu_seqlens, **arguments: (
    naive_recurrent_linear_attn(**arguments)
  )
  linear_attn.RMSNorm = lambda hidden_size, eps, **_: torch.nn.RMSNorm(
    hidden_size, eps
  )
  layer = linear_attn.LinearAttention(
    hidden_size=D_MODEL,
    num_heads=HEADS,
    feature_map="hedgehog",
    do_feature_map_norm=True,
  )
  return layer, lambda inputs: layer(inputs)[0]


def retnet():
  """Multi-scale retention over all tokens at once."""
  for name in ("fairscale", "fairscale.nn", "timm", "timm.models",
               "timm.models.layers", "apex", "apex.normalization"):  # fmt: skip
    sys.modules.setdefault(name, _Empty(name))
  from torchscale.architecture.retnet import RetNetRelPos
  from torchscale.component.multiscale_retention import MultiScaleRetention

  args = types.SimpleNamespace(
    decoder_embed_dim=D_MODEL,
    decoder_retention_heads=HEADS,
    recurrent_chunk_size=512,
    layernorm_eps=1e-6,
    multiway=False,
  )
  layer = MultiScaleRetention(args, D_MODEL, 2 * D_MODEL, HEADS)
  positions = RetNetRelPos(args)
  return layer, lambda x: layer(x, positions(x.shape[1]))


class _Empty(types.ModuleType):
  """A module of which anything can be imported."""

  __path__ = ()

  def __getattr__(self, name):
    return object


if __name__ == "__main__":
  main()
