"""Time gated linear attention in chunks beside the loop over its tokens.

`python -m experiments.bench linear-attention` (about a minute on two
cores). A decay by head is what RetNet, Mamba-2 and mLSTM have, one by key what
GLA, HGRN2 and RWKV have. `products` is a bound of the machine: the
multiplications of a chunk forward, as products of 64 by 64 matrices in the
cache and nothing else.
"""

import dataclasses
import functools
import pathlib
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import ssmjax.ops
from experiments.results import provenance, write_json
from experiments.timing import in_turns, products

__all__ = ["LinearAttention", "bench_linear_attention"]

_CHUNK = 64


@dataclasses.dataclass(frozen=True)
class LinearAttention:
  """Gated linear attention, float32: gradients to all arguments."""

  shape: tuple[int, int, int, int, int] = (2, 4096, 8, 64, 64)
  """B, T, H, K and V."""
  repeats: int = 5
  """Timed runs of each, in turns, each after one that is not timed."""
  out: pathlib.Path | None = None
  """Where to write everything as JSON."""


def bench_linear_attention(config: LinearAttention) -> list[dict]:
  """Print and return a row for each decay, direction and form."""
  rows = []
  for decay in ("head", "key"):
    args = _inputs(config.shape, decay)
    for direction in ("forward", "forward+backward"):
      runs: dict[str, Callable[[], object]] = {}
      memory = {}
      for form in ("reference", "chunked"):
        compiled = _compile(form, direction, args)
        memory[form] = compiled.memory_analysis().temp_size_in_bytes
        runs[form] = functools.partial(_wait, compiled, *args)
      if direction == "forward":
        runs["products"] = products(_multiplications(config.shape))
      times = in_turns(runs, config.repeats)
      base = statistics.median(times["reference"])
      for form, seconds in times.items():
        row = dict(
          decay=decay, form=form, direction=direction, seconds=seconds,
          ratio=base / statistics.median(seconds), temporary=memory.get(form),
        )  # fmt: skip
        rows.append(row)
        print(
          f"{decay:4} {direction:17} {form:10}"
          f" {1e3 * statistics.median(seconds):8.0f} ms"
          f" ({1e3 * min(seconds):.0f} to {1e3 * max(seconds):.0f})"
          f" {row['ratio']:6.2f}x"
          + (f" {memory[form] / 1e6:8.0f} MB" if form in memory else ""),
          flush=True,
        )
  if config.out:
    settings = dataclasses.asdict(config) | dict(out=str(config.out))
    write_json(config.out, provenance() | dict(config=settings, results=rows))
  return rows


def _inputs(shape, decay):
  batch, length, heads, keys, values = shape
  rng = np.random.default_rng(0)
  draw = lambda *last: rng.normal(size=(batch, length, heads, *last))
  log_a = -np.exp(draw(*((keys,) if decay == "key" else ())) - 3)
  arrays = (draw(keys) / 8, draw(keys) / 8, draw(values), log_a)
  return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


def _compile(form, direction, args):
  run = functools.partial(
    ssmjax.ops.gated_linear_attention, implementation=form
  )
  if direction != "forward":
    total = lambda *args: sum(jnp.square(x).sum() for x in run(*args))
    return jax.jit(jax.grad(total, range(4))).lower(*args).compile()
  return jax.jit(run).lower(*args).compile()


def _multiplications(shape):
  """Those of the chunks forward."""
  batch, length, heads, keys, values = shape
  per_token = _CHUNK * (keys + values) + 2 * keys * values
  return batch * length * heads * per_token


def _wait(run, *args):
  return jax.block_until_ready(run(*args))
