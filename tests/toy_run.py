"""A small run for the trainer's tests, in-process or killed from outside.

python tests/toy_run.py FOLDER [FIELD=VALUE ...]
"""

import json
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ssmjax.training import (
  CheckpointWarning,
  FitConfig,
  adamw,
  data_mesh,
  fit,
  warmup_cosine,
)

STEPS = 120


class Layer(nnx.Module):
  """A linear map with a bias."""

  def __init__(self, key):
    self.kernel = nnx.Param(jax.random.uniform(key, (8, 8)) - 0.5)
    self.bias = nnx.Param(jnp.zeros(8))

  def __call__(self, x):
    return x @ self.kernel[...] + self.bias[...]


class Toy(nnx.Module):
  """Parameters of every sort: nested, in a list, with names for the mask."""

  def __init__(self, seed):
    keys = jax.random.split(jax.random.key(seed), 1)
    self.A_log = nnx.Param(jnp.linspace(-1.0, 1.0, 16).reshape(8, 2))
    self.layers = nnx.List([Layer(key) for key in keys])
    self.scale = nnx.Param(jnp.ones(8))

  def __call__(self, x):
    for layer in self.layers:
      x = x + jnp.tanh(layer(x)) * jnp.exp(-jnp.exp(self.A_log[...])).sum(1)
    return (x * self.scale[...])[:, :3]


class Examples:
  """A stream whose batches come in two sizes and weigh unequally."""

  def __init__(self, sizes=(16, 8)):
    self.sizes = sizes

  def kind(self, step):
    return self.sizes[step % 20 >= 15]

  def batch(self, kind, step, seed):
    # Cheaper to compile than random numbers, and as good here.
    index = jnp.arange(kind) + 1000 * step + 77 * (seed % 1000)
    x = jnp.sin(index[:, None] * jnp.arange(1.0, 9.0) ** 2)
    label = jnp.argmax(x[:, :3] + x[:, 3:6], axis=1)
    return {"x": x, "y": label, "w": 0.1 + x[:, 7] ** 2}


class Numbered:
  """The same examples from a Python iterator with a cursor, as grain's."""

  def __init__(self, examples):
    self.at, self.examples = 0, examples

  def __next__(self):
    kind = self.examples.kind(self.at)
    batch = self.examples.batch(kind, self.at, 0)
    self.at += 1
    return {name: np.asarray(x) for name, x in batch.items()}

  def get_state(self):
    return {"at": np.int64(self.at), "note": b"\x00\xff"}

  def set_state(self, state):
    assert state["note"] == b"\x00\xff"
    self.at = int(state["at"])


def init(seed):
  return Toy(seed)


def loss(model, batch, key):
  """Weighted cross entropy of noisy inputs."""
  noise = 0.1 * jax.random.uniform(key, batch["x"].shape)
  return plain_loss(model, batch | {"x": batch["x"] + noise}, key)


def plain_loss(model, batch, key):
  """Weighted cross entropy, without randomness."""
  logits = jax.nn.log_softmax(model(batch["x"]))
  nll = -jnp.take_along_axis(logits, batch["y"][:, None], axis=1)[:, 0]
  right = (logits.argmax(axis=1) == batch["y"]).astype(jnp.float32)
  return (
    (nll * batch["w"]).sum(),
    batch["w"].sum(),
    {"accuracy": (right.sum(), right.size), "w_accuracy": right @ batch["w"]},
  )


@jax.jit
def accuracy(model):
  batch = Examples().batch(256, 0, 99)
  return (model(batch["x"]).argmax(axis=1) == batch["y"]).mean()


def evaluate(model, step):
  return {"held_out": accuracy(model)}


def config(**fields):
  return FitConfig(
    **{
      "steps": STEPS,
      "steps_per_dispatch": 5,
      "log_every": 10,
      "evaluate_every": 30,
      "save_every": 20,
      "best": "held_out",
      "progress": False,
    }
    | fields
  )


def optimizer():
  return adamw(warmup_cosine(1e-2, steps=STEPS, warmup=10), clip=1.0)


def two_devices():
  return data_mesh(jax.devices()[:2])


def run(folder, *, data=None, hooks=(), settings=None, mesh=None, **fields):
  """Trains the toy in `folder` on two devices."""
  return fit(
    init,
    loss,
    optimizer(),
    Examples() if data is None else data,
    config(**fields),
    folder,
    settings=settings,
    evaluate=evaluate,
    hooks=hooks,
    mesh=mesh or two_devices(),
  )


def main(folder, *fields):
  """Trains, printing the step at every boundary and how it ended."""
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 2)
  warnings.simplefilter("error")
  warnings.simplefilter("default", CheckpointWarning)
  values = {"two_sizes": False}
  for field in fields:
    name, value = field.split("=")
    values[name] = json.loads(value)
  sizes = (16, 8) if values.pop("two_sizes") else (16, 16)
  result = run(
    folder,
    data=Examples(sizes),
    hooks=[lambda step, models: print(step, flush=True)],
    **values,
  )
  print(result.reason, flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
