"""Runs in turns, shapes as options and inputs, for the benchmarks."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["in_turns", "products", "scan_inputs", "shape_of"]


def in_turns(
  runs: dict[str, Callable[[], object]], repeats: int
) -> dict[str, list[float]]:
  """Seconds of each run; one after the other, over and over."""
  times: dict[str, list[float]] = {name: [] for name in runs}
  for _ in range(repeats):
    for name, run in runs.items():
      # Untimed first: the system takes back the gigabytes of the run before
      # during the next one, which would pay for it.
      run()
      start = time.perf_counter()
      run()
      times[name].append(time.perf_counter() - start)
  return times


def products(multiplications: float) -> Callable[[], object]:
  """A run of so many, as float32 products of 64 by 64 matrices, no other work.

  Of 64 matrices at once, 1 MiB: they are read from a cache, not from memory.
  """
  count, size = 64, 64
  x = jnp.ones((count, size, size), jnp.float32) / size
  rounds = round(multiplications / (count * size**3))
  multiply = lambda _, y: jnp.matmul(y, x, precision="highest")
  run = jax.jit(lambda y: jax.lax.fori_loop(0, rounds, multiply, y))
  return lambda: jax.block_until_ready(run(x))


def scan_inputs(
  batch: int, length: int, channels: int, states: int, seed: int = 0
) -> dict[str, np.ndarray]:
  """Mamba's ranges: Δ of 0.001 to 0.1, A of -1 to -N."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: np.asarray(rng.normal(size=shape), np.float32)
  step = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), channels))
  A = -np.arange(1, states + 1, dtype=np.float32)
  return dict(
    u=draw(batch, length, channels),
    delta=draw(batch, length, channels) / 2,
    A=np.broadcast_to(A, (channels, states)).copy(),
    B=draw(batch, length, states),
    C=draw(batch, length, states),
    D=np.ones(channels, np.float32),
    z=draw(batch, length, channels),
    delta_bias=np.log(np.expm1(step)).astype(np.float32),
  )


def shape_of(text: str, axes: str, example: str) -> tuple[int, int, int, int]:
  """Read a shape of four `axes` given as an option, such as "B,T,D,N".

  Raises:
    SystemExit: the text is none.
  """
  try:
    first, second, third, fourth = map(int, text.split(","))
  except ValueError:
    raise SystemExit(
      f"bench: shapes has {text!r}, expected {axes} such as {example}."
    ) from None
  return first, second, third, fourth
