"""The fused kernels: times where there is a chip, else the compilers' figures.

Two commands, of which only the first needs an accelerator.

`python -m experiments.bench kernels --out experiments/results/kernels-gpu.json`
first holds the kernels to the associative form in values and gradients, then
times them at B = 8, D = 2048, N = 16 beside the other forms and, in bfloat16,
beside cuDNN's flash attention at the width of the model (1024, half of D).
What does not fit in the memory is skipped and says so. About 10 minutes.

`python -m experiments.bench kernels --static --out
experiments/results/kernels-static.json` compiles the kernels for chips that
are not here and writes down registers, spills, instructions and estimated
cycles; and, for the ops of matrix states, which have no kernel, what XLA's own
programs cost and how much of it multiplies matrices. They are the compilers'
word, not measurements. About 15 minutes on two cores; `--chips h200 --only
"forward float32"` for some of the cases.
"""

import dataclasses
import functools
import math
import pathlib
import statistics
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp

import ssmjax.ops
from experiments import static
from experiments.floor import floor
from experiments.results import provenance, write_json
from experiments.static_cases import CHIPS, table_cases
from experiments.timing import in_turns

__all__ = ["Kernels", "bench_kernels", "check"]

_CHIPS = (*CHIPS["tpu"], *CHIPS["cuda"])
_FORMS = ("pallas", "chunked", "associative", "attention")
_DIRECTIONS = ("forward", "forward+backward")
# RMS(error) / RMS(reference), as in the tests.
_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
_HEAD = 64  # Width of attention's heads.


@dataclasses.dataclass(frozen=True)
class Kernels:
  """The fused scans: times, or the compilers' figures without a chip."""

  static: bool = False
  """Compile for chips that are not here; time nothing."""
  chips: tuple[str, ...] = _CHIPS
  """With --static: compile for these."""
  only: str = ""
  """With --static: only cases whose name has this in it, say 'h200 linear'."""
  parallel: int = 2
  """With --static: compilers at work at the same time."""
  preset: Literal["full", "smoke"] = "full"
  """smoke: tiny sizes, in seconds on a CPU; proves the code, times nothing."""
  lengths: tuple[int, ...] = (2048, 8192, 32768, 65536)
  """T of each table."""
  dtypes: tuple[str, ...] = ("bfloat16", "float32")
  """Of u, delta, z, B and C."""
  forms: tuple[str, ...] = _FORMS
  """What to time; pallas is what the others are compared with."""
  batch: int = 8
  channels: int = 2048
  states: int = 16
  repeats: int = 5
  """Timed runs of each, in turns, each after one that is not timed."""
  seed: int = 0
  out: pathlib.Path | None = None
  """Where to write everything as JSON."""


def bench_kernels(config: Kernels) -> None:
  """Do what the configuration asks for.

  Raises:
    SystemExit: where there is no accelerator (and none is pretended), where a
      case does not compile, or where a kernel's results are wrong.
  """
  if config.static:
    _static(config)
  else:
    _measured(config)


def _static(config):
  unknown = set(config.chips) - set(_CHIPS)
  if unknown:
    raise SystemExit(
      f"bench: chips has {', '.join(sorted(unknown))}, expected some of"
      f" {', '.join(_CHIPS)}."
    )
  cases = [c for c in table_cases(config.chips) if config.only in str(c)]
  if not cases:
    raise SystemExit(f"bench: no case has {config.only!r} in its name.")
  rows = static.measure(
    cases,
    parallel=config.parallel,
    report=functools.partial(print, flush=True),
  )
  static.print_table(rows)
  good = [row for row in rows if "error" not in row]
  if config.out and good:
    static.write_table(config.out, good)
    print(f"written: {config.out}")
  if len(good) < len(rows):
    raise SystemExit(f"bench: {len(rows) - len(good)} cases do not compile.")


def _measured(config):
  unknown = [form for form in config.forms if form not in _FORMS]
  if unknown:
    raise SystemExit(
      f"bench: forms has {', '.join(unknown)}, expected some of"
      f" {', '.join(_FORMS)}."
    )
  device = jax.devices()[0]
  if config.preset == "smoke":
    config = dataclasses.replace(
      config, lengths=(64,), batch=2, channels=128, states=4, repeats=1
    )
  elif device.platform not in ("gpu", "tpu"):
    raise SystemExit(
      f"bench: no GPU or TPU here, only {device.device_kind}. Pass --static"
      " for the compilers' figures, --preset smoke to rehearse."
    )
  origin = provenance()
  settings = dataclasses.asdict(config) | dict(out=str(config.out))
  whole: dict[str, Any] = origin | dict(config=settings, tables=[])
  if "pallas" in config.forms:
    whole["errors"] = check(config)
  for dtype in config.dtypes:
    for length in config.lengths:
      whole["tables"].append(_table(config, device, length, dtype))
      if config.out:
        write_json(config.out, whole)
  if config.out:
    print(f"written: {config.out}")


def check(config: Kernels) -> dict[str, dict[str, float]]:
  """Hold the kernel's values and gradients to the associative form.

  Returns:
    RMS(error) / RMS(reference) by dtype and name; {} where there is no kernel.

  Raises:
    SystemExit: where one is beyond the tests' tolerance.
  """
  found: dict[str, dict[str, float]] = {}
  channels = min(config.channels, 1000)
  shape = (2, min(config.lengths[0], 1000), channels, config.states)
  for dtype in config.dtypes:
    args, d_y = _scan_inputs(shape, dtype, config.seed)
    try:
      actual = jax.jit(_both(_scan("pallas")))(args, d_y)
    except NotImplementedError as error:
      print(f"pallas: not checked, {_first(error)}")
      return {}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (args, d_y))
    with jax.default_matmul_precision("highest"):
      expected = jax.jit(_both(_scan("associative")))(*wide)
    errors = jax.tree.map(_rms_error, actual, expected)
    found[dtype] = {"y": float(errors[0])} | {
      f"d_{name}": float(error) for name, error in errors[1].items()
    }
    worst = max(found[dtype], key=lambda name: found[dtype][name])
    print(f"{dtype}: largest error {found[dtype][worst]:.2g}, of {worst}")
    if not found[dtype][worst] <= _TOLERANCE[dtype]:
      raise SystemExit(
        f"bench: the kernel's {worst} is wrong by {found[dtype][worst]:.2g},"
        f" allowed is {_TOLERANCE[dtype]:g}; {shape}, {found[dtype]}"
      )
  return found


def _table(config, device, length, dtype):
  """Time every form at one length and print the table."""
  shape = (config.batch, length, config.channels, config.states)
  print(f"\n(B, T, D, N) = {shape}, {dtype}, {device.device_kind}")
  rows: dict[str, dict[str, Any]] = {}
  make = functools.cache(lambda make: make(shape, dtype, config.seed))
  for direction in _DIRECTIONS:
    runs, memory = {}, {}
    for form in config.forms:
      name = f"{form}, {direction}"
      try:
        runs[name], memory[name] = _run(
          form, direction, shape, dtype, device, make
        )
      except _Skip as reason:
        rows[name] = dict(skipped=str(reason))
    calls = {name: _calls(run) for name, run in runs.items()}
    times = in_turns(
      {name: functools.partial(run, calls[name]) for name, run in runs.items()},
      config.repeats,
    )
    for name, seconds in times.items():
      each = [1e3 * s / calls[name] for s in seconds]
      row = dict(
        median_ms=statistics.median(each),
        min_ms=min(each),
        max_ms=max(each),
        calls=calls[name],
        temporary_bytes=memory[name],
      )
      if not name.startswith("attention"):
        row |= _shares(device.device_kind, shape, dtype, direction, row)
      rows[name] = row
  _print(rows)
  return dict(shape=shape, dtype=dtype, rows=rows)


class _Skip(Exception):
  """Why a form is not timed."""


def _run(form, direction, shape, dtype, device, make):
  """`run(calls)` of a form, and its temporary bytes.

  All scans have the same values, those of `make(_scan_inputs)`.
  """
  inputs = _attention_inputs if form == "attention" else _scan_inputs
  if form == "attention":
    function = _attention(dtype, device)
  else:
    function = _scan(form)
  if direction == "forward":
    function = functools.partial(lambda f, args, d_y: f(args), function)
  else:
    function = _both(function)
  args = jax.eval_shape(functools.partial(inputs, shape, dtype, 0))
  try:
    compiled = jax.jit(function).lower(*args).compile()
  except NotImplementedError as error:
    raise _Skip(_first(error)) from None
  except jax.errors.JaxRuntimeError as error:
    if form == "pallas":
      raise
    raise _Skip(_first(error)) from None
  analysis = compiled.memory_analysis()
  memory = None
  if analysis is not None:
    memory = analysis.temp_size_in_bytes
    total = memory + analysis.argument_size_in_bytes
    total += analysis.output_size_in_bytes
    room = (device.memory_stats() or {}).get("bytes_limit", math.inf)
    # The other forms' inputs and holes between arrays take some as well.
    if total > 0.9 * room:
      raise _Skip(f"needs {total / 1e9:.0f} GB of {room / 1e9:.0f} GB")
  values = make(inputs)

  def run(calls):
    for _ in range(calls):
      out = compiled(*values)
    return jax.block_until_ready(out)

  return run, memory


def _calls(run):
  """How many calls keep a device busy for some 20 ms: starting costs time."""
  run(1)
  start = time.perf_counter()
  run(2)
  return max(1, min(100, round(0.04 / (time.perf_counter() - start))))


def _shares(kind, shape, dtype, direction, row):
  """What of the chip's limits a time is."""
  limit = floor(kind, shape, dtype, direction)
  if limit is None:
    return {}
  return dict(
    floor_ms=limit["bound"],
    share_of_floor=limit["bound"] / row["median_ms"],
    gigabytes_per_second=limit["bytes"] / row["median_ms"] / 1e6,
  )


def _print(rows):
  for direction in _DIRECTIONS:
    mine = {k: v for k, v in rows.items() if k.endswith(f", {direction}")}
    base = mine.get(f"pallas, {direction}", {}).get("median_ms")
    for name, row in mine.items():
      if "skipped" in row:
        print(f"{name:30} skipped: {row['skipped']}")
        continue
      line = (
        f"{name:30} {row['median_ms']:10.3f} ms ({row['min_ms']:.3f} to"
        f" {row['max_ms']:.3f})"
      )
      if base:
        line += f" {row['median_ms'] / base:7.1f} x pallas"
      if "floor_ms" in row:
        line += (
          f" {row['gigabytes_per_second']:6.0f} GB/s,"
          f" {row['share_of_floor']:4.0%} of the floor"
        )
      print(line, flush=True)


def _scan(form):
  """The whole S6 scan, as Mamba calls it."""

  def scan(args):
    return ssmjax.ops.selective_scan(
      **args, delta_softplus=True, implementation=form
    )[0]

  return scan


def _both(function):
  """The function's value and its gradients."""

  def both(args, d_y):
    y, pull = jax.vjp(function, args)
    return y, pull(d_y)[0]

  return both


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _scan_inputs(shape, dtype, seed):
  """Mamba's ranges, drawn where they are used: Δ of 0.001 to 0.1."""
  batch, length, channels, states = shape
  keys = iter(jax.random.split(jax.random.key(seed, impl="rbg"), 7))
  draw = lambda *size: jax.random.normal(next(keys), size, jnp.dtype(dtype))
  low, high = math.log(1e-3), math.log(1e-1)
  step = jnp.exp(
    jax.random.uniform(next(keys), (channels,), minval=low, maxval=high)
  )
  wide, narrow = (batch, length, channels), (batch, length, states)
  A = -jnp.arange(1, states + 1, dtype=jnp.float32)
  args = dict(
    u=draw(*wide),
    delta=draw(*wide) / 2,
    A=jnp.broadcast_to(A, (channels, states)),
    B=draw(*narrow),
    C=draw(*narrow),
    D=jnp.ones(channels),
    z=draw(*wide),
    delta_bias=jnp.log(jnp.expm1(step)),
  )
  return args, draw(*wide)


def _attention(dtype, device):
  """Causal attention of the width of the model, half of D."""
  if dtype != "bfloat16":
    raise _Skip("flash attention has no float32")
  if device.platform == "tpu":
    raise _Skip("cuDNN is for GPUs")
  implementation = "cudnn" if device.platform == "gpu" else "xla"

  def attention(args):
    return jax.nn.dot_product_attention(
      **args, is_causal=True, implementation=implementation
    )

  return attention


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _attention_inputs(shape, dtype, seed):
  batch, length, channels, _ = shape
  size = (batch, length, channels // 2 // _HEAD, _HEAD)
  keys = jax.random.split(jax.random.key(seed, impl="rbg"), 4)
  query, key, value, d_y = (
    jax.random.normal(k, size, jnp.dtype(dtype)) for k in keys
  )
  return dict(query=query, key=key, value=value), d_y


def _rms_error(actual, expected):
  wide = lambda x: x.astype(jnp.float32)
  error = jnp.mean((wide(actual) - wide(expected)) ** 2)
  return jnp.sqrt(error / jnp.mean(wide(expected) ** 2))


def _first(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0]
