"""Write cema.npz: Megalodon's complex moving average, its authors' CPU path.

  python3.11 -m venv goldenv
  goldenv/bin/pip install torch==2.13.0 ninja
  git clone https://github.com/XuezheMax/megalodon
  git -C megalodon checkout cff8ba5f607a2176bbd0166afc09842984433f93
  goldenv/bin/python tests/golden/make_cema.py megalodon

Of the package's C++ the two moving-average operators are compiled, whose CPU
functions need no CUDA, and of its Python the one module; what that imports
besides is replaced by empty modules. The file holds the module's weights under
their published names, two pieces of inputs, the outputs and the state after
each, a scalar loss's weights and its gradient by each weight and input. The
last state has no weight in the loss: the published gradient of `ema_hidden`
is not called.
"""

import importlib.util
import pathlib
import sys
import types

import numpy as np
import torch
from provenance import checkout, versions
from torch.utils import cpp_extension

COMMIT = "cff8ba5f607a2176bbd0166afc09842984433f93"

# Never called on a CPU, but the linker asks for them.
REST = r"""
#include "ops/ema_hidden.h"
#include "ops/ema_parameters.h"
namespace megalodon { namespace ops {
using T = torch::Tensor;
using Maybe = c10::optional<torch::Tensor>;
std::tuple<T, Maybe, Maybe> EMAParametersCUDAFwd(
    const T&, const T&, const T&, const Maybe&, int64_t) { abort(); }
std::tuple<T, T, T, Maybe> EMAParametersCUDABwd(
    const T&, const Maybe&, const T&, const T&, const T&, const Maybe&,
    const Maybe&) { abort(); }
std::tuple<T, Maybe> EMAHiddenCUDAFwd(
    const T&, const T&, const T&, const Maybe&) { abort(); }
std::tuple<T, T, T, Maybe> EMAHiddenCUDABwd(
    const T&, const T&, const T&, const T&, const Maybe&, const Maybe&) {
  abort(); }
}}
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  megalodon::ops::DefineEMAHiddenOp(m);
  megalodon::ops::DefineEMAParametersOp(m);
}
"""


def main(root):
  """Draw the weights, run forward and backward, write the file."""
  torch.manual_seed(0)
  ema = published(root).MultiHeadComplexEMA(5, ndim=4).train()
  with torch.no_grad():
    for parameter in ema.parameters():
      parameter.add_(0.5 * torch.randn_like(parameter))
  first = torch.randn(2, 11, 5, requires_grad=True)
  second = torch.randn(2, 8, 5, requires_grad=True)
  outputs, state = ema(first.mT, None, True)
  middle, last = ema(second.mT, state, True)
  outputs = torch.cat([outputs, middle], -1).mT
  weights = torch.sin(torch.arange(outputs.numel())).reshape(outputs.shape)
  loss = (outputs * weights).sum()
  loss.backward()
  arrays = {
    "inputs": torch.cat([first, second], 1).detach().numpy(),
    "outputs": outputs.detach().numpy(),
    "state": state.detach().numpy(),
    "last": last.detach().numpy(),
    "weights": weights.numpy(),
    "gradient": torch.cat([first.grad, second.grad], 1).numpy(),
    "versions": versions(
      checkout("megalodon", pathlib.Path(root, "megalodon"), COMMIT)
    ),
  }
  for name, parameter in ema.named_parameters():
    arrays[f"weight:{name}"] = parameter.detach().numpy()
    arrays[f"gradient:{name}"] = parameter.grad.numpy()
  path = pathlib.Path(__file__).with_name("cema.npz")
  np.savez_compressed(path, **arrays)
  print(path.name, path.stat().st_size, arrays["versions"])
  for name, array in arrays.items():
    print(name, array.shape)


def published(root):
  """The authors' module over their operators, in a world of one process."""
  folder = pathlib.Path(root).resolve() / "megalodon"
  rest = pathlib.Path(torch.utils.cpp_extension.get_default_build_root())
  rest.mkdir(parents=True, exist_ok=True)
  rest = rest / "megalodon_rest.cc"
  rest.write_text(REST)
  sources = [
    folder / "csrc/ops" / f"ema_{x}.cc" for x in ("hidden", "parameters")
  ]
  ops = cpp_extension.load(
    "megalodon_ema",
    [str(path) for path in (*sources, rest)],
    extra_include_paths=[str(folder / "csrc")],
  )

  def module(name, **names):
    made = types.ModuleType(name)
    made.__dict__.update(names)
    sys.modules[name] = made
    return made

  def load(name, path):
    spec = importlib.util.spec_from_file_location(name, folder / path)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]

  # The permutation is broadcast between devices even in a world of one.
  torch.Tensor.cuda = lambda x: x
  torch.distributed.broadcast = lambda x, src: x
  nothing = lambda *args: None
  transforms = dict.fromkeys(("rfft", "fftconv_fwd", "fftconv_bwd"), nothing)
  operators = {x: getattr(ops, x) for x in dir(ops) if x.startswith("ema_")}
  for name in ("megalodon", "megalodon.modules", "megalodon_extension"):
    module(name, __path__=[])
  module("megalodon_extension.ops", **transforms, **operators)
  sys.modules["megalodon_extension"].ops = sys.modules[
    "megalodon_extension.ops"
  ]
  module(
    "megalodon.distributed",
    __path__=[],
    get_model_parallel_rank=lambda: 0,
    get_model_parallel_world_size=lambda: 1,
  )
  module(
    "megalodon.distributed.utils",
    divide_and_check_no_remainder=lambda a, b: a // b,
  )
  fused = module("megalodon.modules.fused_ops", __path__=[])
  for name in ("ema_parameters", "ema_hidden", "fftconv"):
    path = f"modules/fused_ops/{name}.py"
    loaded = load(f"megalodon.modules.fused_ops.{name}", path)
    setattr(fused, name, getattr(loaded, name))
  name = "complex_exponential_moving_average"
  return load(f"megalodon.modules.{name}", f"modules/{name}.py")


if __name__ == "__main__":
  main(sys.argv[1])
