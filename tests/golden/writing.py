"""What the scripts that write golden transformers share."""

import pathlib
import tempfile

import numpy as np
import safetensors.numpy
import torch
from provenance import packages, versions

__all__ = ["write"]


def write(name, model, layer):
  """Draw the weights, run forward and backward, write the file.

  Args:
    name: of the file, without its end.
    model: of transformers, for causal language modelling.
    layer: gradients are kept of parameters with this in their names.
  """
  torch.manual_seed(0)
  model = model.float().eval()
  with torch.no_grad():
    for key, parameter in model.named_parameters():
      # Away from zeros and ones, and wide enough for each part to count.
      scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
      start = 1.0 if key.endswith(("norm.weight", "layernorm.weight")) else 0.0
      if name == "recurrentgemma":
        start = 0.0
      drawn = start + scale * torch.randn_like(parameter)
      # Few digits: the file is half as large.
      parameter.copy_(torch.round(drawn * 256) / 256)
      if key.endswith("recurrent_param"):
        parameter.sub_(3.0)
  tokens = torch.randint(0, model.config.vocab_size, (2, 17))
  logits = model(tokens, use_cache=False).logits
  loss = torch.nn.functional.cross_entropy(
    logits[:, :-1].reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1)
  )
  loss.backward()
  arrays = {
    "tokens": tokens.numpy().astype(np.int32),
    "logits": logits.detach().numpy(),
    "loss": loss.detach().numpy(),
    "versions": versions(packages("transformers")),
  }
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    text = (pathlib.Path(folder) / "config.json").read_text()
    arrays["config"] = np.array(text)
    file = (pathlib.Path(folder) / "model.safetensors").read_bytes()
    arrays["checkpoint"] = np.frombuffer(file, np.uint8)
  gradients = {
    key: parameter.grad.numpy()
    for key, parameter in model.named_parameters()
    if layer in key
  }
  # As files of many arrays take more room than the numbers in them.
  gradients = safetensors.numpy.save(gradients)
  arrays["gradients"] = np.frombuffer(gradients, np.uint8)
  path = pathlib.Path(__file__).with_name(f"{name}.npz")
  np.savez_compressed(path, **arrays)
  print(path.name, path.stat().st_size, arrays["versions"])
  for key, array in arrays.items():
    print(key, array.shape)
