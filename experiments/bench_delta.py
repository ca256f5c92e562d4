"""Time the delta rule in chunks beside the loop over its tokens.

`python -m experiments.bench delta` (under a minute on two cores). `products`
is what the machine needs for the multiplications of chunks of 64 tokens
forward, as products of 64 by 64 matrices in the cache and nothing else. (On a
CPU they are blocks of 16, which take 4/7 of these.)
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

__all__ = ["Delta", "bench_delta"]


@dataclasses.dataclass(frozen=True)
class Delta:
  """The gated delta rule, float32: gradients to all five arguments."""

  shape: tuple[int, int, int, int, int] = (2, 4096, 8, 64, 64)
  """B, T, H, K and P."""
  repeats: int = 5
  """Timed runs of each, in turns, each after one that is not timed."""
  out: pathlib.Path | None = None
  """Where to write everything as JSON."""


def bench_delta(config: Delta) -> list[dict]:
  """Print and return a row for each form and direction."""
  args, rows = _inputs(config.shape), []
  for direction in ("forward", "forward+backward"):
    runs: dict[str, Callable[[], object]] = {}
    memory: dict[str, int] = {}
    for form in ("reference", "chunked"):
      compiled = _compile(form, direction, args)
      memory[form] = compiled.memory_analysis().temp_size_in_bytes
      runs[form] = functools.partial(_finish, compiled, args)
    if direction == "forward":
      runs["products"] = products(_multiplications(config.shape))
    times = in_turns(runs, config.repeats)
    base = statistics.median(times["reference"])
    for form, seconds in times.items():
      row = dict(
        form=form, direction=direction, seconds=seconds,
        ratio=base / statistics.median(seconds), temporary=memory.get(form),
      )  # fmt: skip
      rows.append(row)
      print(
        f"{direction:17} {form:10}"
        f" {1e3 * statistics.median(seconds):8.0f} ms"
        f" ({1e3 * min(seconds):.0f} to {1e3 * max(seconds):.0f})"
        f" {row['ratio']:6.2f}x"
        + (f" {memory[form] / 1e6:8.0f} MB" if form in memory else "")
      )
  if config.out:
    settings = dataclasses.asdict(config) | dict(out=str(config.out))
    write_json(config.out, provenance() | dict(config=settings, results=rows))
  return rows


def _inputs(shape):
  batch, length, heads, keys, values = shape
  rng = np.random.default_rng(0)
  draw = lambda *last: rng.normal(size=(batch, length, heads, *last))
  k = draw(keys)
  k /= np.linalg.norm(k, axis=-1, keepdims=True)
  beta = rng.random((batch, length, heads))
  arrays = (draw(keys), k, draw(values), beta, -np.exp(draw() - 2))
  return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


def _compile(form, direction, args):
  def run(*args):
    return ssmjax.ops.delta_rule(*args, implementation=form)

  if direction == "forward":
    f = run
  else:
    f = jax.grad(lambda *a: (run(*a)[0] ** 2).sum(), tuple(range(len(args))))
  return jax.jit(f).lower(*args).compile()


def _multiplications(shape):
  """Those of the forward pass in chunks of 64."""
  batch, length, heads, keys, values = shape
  # KKᵀ, QKᵀ, PU, half of a square for the system; then W S, Q S and KᵀU.
  per_token = 64 * (2 * keys + values + (keys + values) / 2)
  return batch * length * heads * (per_token + 3 * keys * values)


def _finish(f, args):
  return jax.block_until_ready(f(*args))
