"""The least time that a chip needs for a scan, from what it does a second."""

import pathlib
import re

import jax.numpy as jnp

from experiments.static_cases import CHIPS

__all__ = ["floor"]

_TARGETS = pathlib.Path(__file__).parent / "targets"
# Bytes per second of memory that the vendor names; the rest of a TPU's floor is
# not known well enough to be claimed.
_TPU_BANDWIDTH = {
  "TPU v5 lite": 819e9,
  "TPU v5p": 2765e9,
  "TPU v5": 2765e9,
  "TPU v6 lite": 1640e9,
  "TPU7x": 7380e9,
}


def floor(
  kind: str, shape, dtype: str, direction: str
) -> dict[str, float] | None:
  """What one scan costs at least on a chip, in milliseconds by resource.

  Each of B·T·D elements moves u, Δ, z and y (backward: u, Δ, z, dy, du, dΔ, dz
  and N/8 bytes of states, kept at every 32nd token), needs N + 4 exponentials
  and the like (backward: N + 6) and 5N + 4 float32 operations (backward, with
  one recomputation of the forward pass: 16N + 8). A GPU's multiprocessor does
  16 exponentials a clock. Of a TPU the memory alone is known.

  Args:
    kind: of device, as JAX names it.
    shape: B, T, D, N.
    dtype: of u, Δ, z, y.
    direction: "forward" or "forward+backward", for which both are added up.

  Returns:
    Milliseconds of memory, exponentials and arithmetic; bound, the largest (of
    forward and backward each by itself); and bytes. None for a chip that is not
    known.
  """
  rates = _rates(kind)
  if rates is None:
    return None
  batch, length, channels, states = shape
  elements = batch * length * channels
  size = jnp.dtype(dtype).itemsize
  passes: dict[str, tuple[float, float, float]] = {
    "forward": (4 * size, states + 4, 5 * states + 4),
    "backward": (7 * size + states / 8, states + 6, 16 * states + 8),
  }
  total: dict[str, float] = dict.fromkeys((*rates, "bound", "bytes"), 0.0)
  for name in passes if direction == "forward+backward" else ["forward"]:
    costs = {
      resource: elements * work / rate * 1e3
      for (resource, rate), work in zip(
        rates.items(), passes[name], strict=False
      )
    }
    for resource, milliseconds in costs.items():
      total[resource] += milliseconds
    total["bound"] += max(costs.values())
    total["bytes"] += elements * passes[name][0]
  return total


def _rates(kind):
  """Bytes, exponentials and float32 operations a second, what is known."""
  for name, bandwidth in _TPU_BANDWIDTH.items():
    if kind == name:
      return {"memory": bandwidth}
  for chip in CHIPS["cuda"]:
    if chip.upper() in kind.upper():
      text = (_TARGETS / f"{chip}.txtpb").read_text()
      fact = lambda name, text=text: float(
        re.search(rf"^  {name}: ([\d.]+)", text, re.M)[1]
      )
      clocks = fact("core_count") * fact("clock_rate_ghz") * 1e9
      return {
        "memory": fact("memory_bandwidth"),
        "exponentials": 16 * clocks,
        "arithmetic": fact("fpus_per_core") * clocks,
      }
  return None
