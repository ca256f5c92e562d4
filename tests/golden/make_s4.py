"""Write s4.npz: S4, S4D and DSS of their authors' standalone files.

  python3.11 -m venv goldenv
  goldenv/bin/pip install torch==2.13.0 einops==0.8.2 scipy==1.17.1 \
    opt_einsum==3.4.0 omegaconf==2.4.0
  goldenv/bin/python tests/golden/make_s4.py S4.PY DSS.PY

S4.PY is models/s4/s4.py of github.com/state-spaces/s4 at e757cef57d89 and
DSS.PY is src/models/sequence/ss/standalone/dss.py of github.com/ag1988/dss at
777084e777c2, which are no packages. On a CPU without extensions they take
their naive sums.

For each layer the file holds the first A and P, the weights under their
published names, inputs and outputs, and the gradient of a scalar loss by the
inputs and by each weight (of the kernel alone, for others than S4). S4 alters
its C at the first call, once and for all, by a matrix of A, P and Δ: what is
kept is the C before it; gradients by C, A, P and Δ are those of the altered
form and are left out.
"""

import importlib.util
import pathlib
import sys
import types

import numpy as np
import torch
from provenance import packages, single_file, versions

LENGTH = 19
COMMIT = {"s4": "e757cef57d89", "dss": "777084e777c2"}
SHA256 = {
  "s4": "9f3418b396ec9ccbea30d1f1de92b55e631a3380ebbb19257a73f0219e2a23a6",
  "dss": "691994a503462980d51870604dbad049bcdfa91ccd46d513cf242eba8c2a9e61",
}


def main():
  """Draw the weights, run forward and backward, write the file."""
  # A trainer, of which a decorator of the log is taken.
  stub = types.ModuleType("pytorch_lightning.utilities")
  stub.rank_zero_only = lambda function: function
  sys.modules["pytorch_lightning"] = types.ModuleType("pytorch_lightning")
  sys.modules["pytorch_lightning.utilities"] = stub
  sources = dict(zip(SHA256, sys.argv[1:], strict=True))
  origins = [
    single_file(name, path, COMMIT[name], SHA256[name])
    for name, path in sources.items()
  ]
  s4, dss = (load(name, path) for name, path in sources.items())
  s4_block = lambda mode, **options: s4.S4Block(
    4, transposed=False, mode=mode, d_state=6, verbose=False,
    dt_min=0.03, dt_max=0.3, backend="naive", **options,
  )  # fmt: skip
  dss_layer = lambda version: dss.DSS(
    4, d_state=3, transposed=False, version=version, sep_dt_re_im=False,
    dt_min=0.03, dt_max=0.3,
  )  # fmt: skip
  layers = {
    "s4": lambda: s4_block("dplr", l_max=LENGTH),
    "s4d_legs": lambda: s4_block("diag", init="diag-legs"),
    "s4d_inv": lambda: s4_block(
      "diag", init="diag-inv", disc="bilinear", final_act="id"
    ),
    "dss_exp": lambda: dss_layer("exp"),
    "dss_softmax": lambda: dss_layer("softmax"),
  }
  arrays = {"versions": versions(*origins, packages("einops", "scipy"))}
  for name, make in layers.items():
    torch.manual_seed(0)
    arrays |= {f"{name}:{key}": v for key, v in run(make(), name).items()}
  path = pathlib.Path(__file__).with_name("s4.npz")
  np.savez_compressed(path, **arrays)
  print(path.name, path.stat().st_size, arrays["versions"])
  for name, array in arrays.items():
    print(name, array.shape)


def run(layer, name):
  """Weights, outputs and gradients of one layer."""
  arrays = {}
  for parameter, value in layer.named_parameters():
    first = name == "s4" or name.startswith("s4d")
    if first and parameter.endswith(("A_imag", "kernel.P")):
      arrays[f"initial:{parameter}"] = value.detach().numpy().copy()
    with torch.no_grad():
      value.add_(0.1 * torch.randn_like(value))
    arrays[f"weight:{parameter}"] = value.detach().numpy().copy()
  inputs = torch.randn(2, LENGTH, 4, requires_grad=True)
  outputs, _ = layer(inputs)
  loss = outputs * torch.sin(torch.arange(outputs.numel())).view_as(outputs)
  loss.sum().backward()
  arrays |= {
    "inputs": inputs.detach().numpy(),
    "outputs": outputs.detach().numpy(),
    "gradient": inputs.grad.numpy(),
  }
  for parameter, value in layer.named_parameters():
    altered = ("kernel.C", "kernel.inv_dt", "kernel.A_real", "kernel.A_imag")
    if name == "s4" and parameter.endswith((*altered, "kernel.P")):
      continue
    if name != "s4" and "kernel" not in parameter:
      continue
    arrays[f"gradient:{parameter}"] = value.grad.numpy()
  return arrays


def load(name, path):
  """The module of a file."""
  spec = importlib.util.spec_from_file_location(f"published_{name}", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


if __name__ == "__main__":
  main()
