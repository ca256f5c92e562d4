"""Time the time-invariant systems: a diagonal recurrence, a long convolution.

`python -m experiments.bench lti` (about a minute on two cores) takes an S4D
system from its A, C and Δ to y in each of its forms, discretisation and kernel
included: `reference`, the loop over tokens; `chunked`, `lti_scan`; and
`convolution`, by the kernel of as many taps as tokens.

`python -m experiments.bench long-conv` (about a minute) has two tables, for
the loop keeps a window of L tokens for each token's gradient: a small one with
it, and one as long as the other benchmarks without. `documents` is with the
ids of four documents in a row, `recurrence` what the twin by `lti_scan` takes
where the kernel is a sum of 32 pairs of exponentials. `transforms` is the
bound of the machine: the three Fourier transforms forward, and nothing else.
"""

import dataclasses
import functools
import pathlib
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ssmjax.ops
from experiments.results import provenance, write_json
from experiments.timing import in_turns, shape_of

__all__ = ["LTI", "LongConv", "bench_long_conv", "bench_lti"]

_DIRECTIONS = ("forward", "forward+backward")
# Of the windows that the loop keeps.
_MOST_BYTES = 1 << 30
_STATES = 32
_DOCUMENTS = 4

# A function and its arguments.
_Program = tuple[Callable[..., jax.Array], tuple[jax.Array, ...]]


@dataclasses.dataclass(frozen=True)
class LTI:
  """A diagonal system, float32 and complex64: gradients to x, A, C and Δ."""

  shape: tuple[int, int, int, int] = (2, 4096, 512, 32)
  """B, T, D and N, one of each pair of conjugates."""
  repeats: int = 3
  """Timed runs of each, in turns, each after one that is not timed."""
  out: pathlib.Path | None = None
  """Where to write everything as JSON."""


@dataclasses.dataclass(frozen=True)
class LongConv:
  """The long convolution, float32: gradients to x, kernel and skip."""

  shapes: tuple[str, ...] = ("2,1024,64,1024", "2,4096,512,4096")
  """Each is B,T,D,L; in the order of the tables."""
  repeats: int = 3
  """Timed runs of each, in turns, each after one that is not timed."""
  out: pathlib.Path | None = None
  """Where to write everything as JSON."""


def bench_lti(config: LTI) -> list[dict]:
  """Print and return a row for each direction and form."""
  length = config.shape[1]
  forms = {
    "reference": functools.partial(_scan, form="reference"),
    "chunked": functools.partial(_scan, form="chunked"),
    "convolution": functools.partial(_convolution, length=length),
  }
  args = _system(*config.shape)
  rows = _table({k: (f, args) for k, f in forms.items()}, config.repeats)
  _write(config, rows)
  return rows


def bench_long_conv(config: LongConv) -> list[dict]:
  """Print and return a row for each shape, direction and form."""
  rows = []
  for text in config.shapes:
    batch, length, channels, taps = shape = shape_of(
      text, "B,T,D,L", "2,1024,64,1024"
    )
    print(f"\n(B, T, D, L) = {shape}", flush=True)
    row = np.arange(length, dtype=np.int32) * _DOCUMENTS // length + 1
    ids = jnp.asarray(np.broadcast_to(row, (batch, length)))
    door = ssmjax.ops.long_conv
    forms = {
      "reference": functools.partial(door, implementation="reference"),
      "fft": door,
      "documents": functools.partial(door, segment_ids=ids),
    }
    if 4 * batch * length * channels * taps > _MOST_BYTES:
      del forms["reference"]
    draw = _draw(np.random.default_rng(0))
    decay = np.exp(-np.arange(taps) / taps)[:, None]
    drawn = (
      draw(batch, length, channels), decay * draw(taps, channels),
      draw(channels),
    )  # fmt: skip
    args = tuple(jnp.asarray(x, jnp.float32) for x in drawn)
    programs: dict[str, _Program] = {
      name: (functools.partial(_output, form), args)
      for name, form in forms.items()
    }
    programs["recurrence"] = (
      functools.partial(_scan, form="chunked"),
      _system(batch, length, channels, _STATES),
    )
    bounds = {"transforms": _transforms(args)}
    found = _table(programs, config.repeats, bounds)
    rows += [dict(shape=shape) | row for row in found]
  _write(config, rows)
  return rows


def _table(
  programs: Mapping[str, _Program],
  repeats: int,
  bounds: Mapping[str, Callable[[], object]] | None = None,
) -> list[dict[str, Any]]:
  """Time each program in both directions; ratios are to the first one."""
  rows = []
  for direction in _DIRECTIONS:
    runs: dict[str, Callable[[], object]] = {}
    memory: dict[str, int] = {}
    for name, (form, args) in programs.items():
      compiled = _compile(form, direction, args)
      memory[name] = compiled.memory_analysis().temp_size_in_bytes
      runs[name] = functools.partial(_finish, compiled, args)
    if direction == "forward":
      runs |= bounds or {}
    times = in_turns(runs, repeats)
    base = statistics.median(next(iter(times.values())))
    for name, seconds in times.items():
      middle = statistics.median(seconds)
      rows.append(
        dict(
          form=name,
          direction=direction,
          seconds=seconds,
          ratio=base / middle,
          temporary=memory.get(name),
        )
      )
      print(
        f"{direction:17} {name:12} {1e3 * middle:8.0f} ms"
        f" ({1e3 * min(seconds):.0f} to {1e3 * max(seconds):.0f})"
        f" {base / middle:6.2f}x"
        + (f" {memory[name] / 1e6:8.0f} MB" if name in memory else ""),
        flush=True,
      )
  return rows


def _compile(form, direction, args):
  f = form
  if direction != "forward":
    total = lambda *args: jnp.square(form(*args)).sum()
    f = jax.grad(total, tuple(range(len(args))))
  return jax.jit(f).lower(*args).compile()


def _system(batch, length, channels, states):
  """x, and S4D-Lin's A, C and log Δ."""
  rng = np.random.default_rng(0)
  draw = _draw(rng)
  A = -0.5 + 1j * np.pi * np.arange(states)
  A = np.broadcast_to(A, (channels, states))
  C = (draw(channels, states) + 1j * draw(channels, states)) / 2**0.5
  log_dt = rng.uniform(np.log(1e-3), np.log(1e-1), channels)
  return (
    jnp.asarray(draw(batch, length, channels), jnp.float32),
    jnp.asarray(A, jnp.complex64),
    jnp.asarray(C, jnp.complex64),
    jnp.asarray(log_dt, jnp.float32),
  )


def _scan(x, A, C, log_dt, *, form):
  a, b = ssmjax.ops.zero_order_hold(A, jnp.ones_like(A), jnp.exp(log_dt))
  return ssmjax.ops.lti_scan(x, a, b, 2 * C, implementation=form)[0]


def _convolution(x, A, C, log_dt, *, length):
  kernel = ssmjax.ops.s4d_kernel(
    A, jnp.ones_like(A), 2 * C, jnp.exp(log_dt), length
  )
  return ssmjax.ops.long_conv(x, kernel.T)[0]


def _transforms(args):
  """A run of no other work than the forward pass's transforms."""
  x, kernel, _ = args
  x, kernel = jnp.moveaxis(x, 2, 0), kernel.T[:, None]
  size = 1 << (x.shape[-1] + kernel.shape[-1] - 2).bit_length()

  def run(x, kernel):
    spectrum = jnp.fft.rfft(x, size) * jnp.fft.rfft(kernel, size)
    return jnp.fft.irfft(spectrum, size)

  compiled = jax.jit(run).lower(x, kernel).compile()
  return functools.partial(_finish, compiled, (x, kernel))


def _draw(rng):
  return lambda *shape: rng.normal(size=shape)


def _write(config, rows):
  if config.out:
    settings = dataclasses.asdict(config) | dict(out=str(config.out))
    write_json(config.out, provenance() | dict(config=settings, results=rows))
    print(f"written: {config.out}")


def _output(form, *args):
  return form(*args)[0]


def _finish(f, args):
  return jax.block_until_ready(f(*args))
