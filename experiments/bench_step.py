"""One whole training step of the recall model, and the scan's share of it."""

import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import ssmjax.ops
from experiments.timing import in_turns, scan_inputs
from ssmjax import data, models, training

__all__ = ["bench_step"]

_BATCH, _LENGTH, _PAIRS, _LAYERS = 64, 256, 64, 2


def bench_step(repeats: int = 7) -> dict[str, Any]:
  """Time a step of the paper's two-layer model on one and on all devices.

  Batch 64, T = 256, 64 pairs, width 128, vocabulary 8192, AdamW, float32. The
  scan's share is the time of its forward and backward passes alone, at the
  shape that the layers give it, over the time of the step on one device.

  Returns:
    Medians in milliseconds, tokens per second and the share.
  """
  config = models.ModelConfig(
    vocab_size=8192, d_model=128, n_layers=_LAYERS, remat=False
  )
  mix = data.RecallMix(((data.RecallConfig(_LENGTH, _PAIRS), 2**20),))
  stream = data.RecallStream(mix, _BATCH, fresh=True)
  runs = {
    f"step, {count} device{'s' * (count > 1)}": _step(config, stream, count)
    for count in sorted({1, jax.device_count()})
  }
  runs["scan"] = _scan(2 * config.d_model)
  times = {k: statistics.median(v) for k, v in in_turns(runs, repeats).items()}
  tokens = _BATCH * _LENGTH
  result: dict[str, Any] = {"scan_ms": times["scan"] * 1e3}
  for name, seconds in times.items():
    if name == "scan":
      continue
    result[name] = {
      "median_ms": seconds * 1e3,
      "tokens_per_second": tokens / seconds,
    }
  share = _LAYERS * times["scan"] / times["step, 1 device"]
  result["scan_share"] = share
  print(
    f"\ntraining step, batch {_BATCH}, T {_LENGTH}, width 128, vocabulary 8192"
  )
  for name in runs:
    if name != "scan":
      print(
        f"{name:32} {result[name]['median_ms']:10.1f} ms"
        f" {result[name]['tokens_per_second']:10.0f} tokens/s"
      )
  print(f"share of the selective scans, 1 device {100 * share:13.0f} %")
  return result


def _step(config, stream, count):
  """A call of the compiled step, which keeps its state to itself."""
  graphdef, state = training.init_state(
    lambda seed: models.LanguageModel(config, rngs=nnx.Rngs(seed)),
    optimizer := training.adamw(1e-3),
    (0,),
  )
  mesh = training.data_mesh(jax.devices()[:count])
  program = training.make_program(
    models.labelled_loss,
    optimizer,
    graphdef,
    steps=1,
    seeds=(0,),
    axis="data",
    devices=count,
    stream=stream,
    kind=stream.kind(0),
  )
  compiled = training.parallel(program, mesh)
  box = [jax.device_put(state, jax.NamedSharding(mesh, jax.P()))]

  def run():
    box[0], metrics = compiled(box[0], {})
    jax.block_until_ready((box[0], metrics))

  return run


def _scan(channels):
  args = jax.device_put(scan_inputs(_BATCH, _LENGTH, channels, 16))
  scan = functools.partial(ssmjax.ops.selective_scan, delta_softplus=True)

  @jax.jit
  def both(args):
    y, pull = jax.vjp(lambda args: scan(**args)[0], args)
    return y, pull(jnp.ones_like(y))

  return lambda: jax.block_until_ready(both(args))
