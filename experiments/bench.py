"""Time and temporary memory of the library's parts, side by side.

Claim: the chunked selective scan is at least 20 times as fast as
`jax.lax.associative_scan` over materialised `[B, T, D, N]` forward, and 15
times forward and backward, on the two cores of a CPU, in a fraction of the
memory.

Command: `python -m experiments.bench scan --out experiments/results/scan.json`
(about 10 minutes on two cores; `--shapes 8,512,256,16 --repeats 3` for one of
them in seconds). Where torch is importable, the loop of transformers' slow
path is timed on the same inputs, and mamba.py's scan where that is too; they
are never needed. Last comes a whole training step of the recall model. One call
of the chunked form keeps one core busy; `chunked, sharded` divides rows (or
channels) over as many CPU devices as there are cores, as a training run does.

Expected: one table for each shape, milliseconds as median (fastest to
slowest) of runs that take turns, so that a busy machine slows all of them,
and the ratio of each median to that of `associative`.

`python -m experiments.bench kernels` is in `experiments.bench_kernels`, `delta`
in `experiments.bench_delta`, `linear-attention` in
`experiments.bench_linear_attention`, `lti` and `long-conv` in
`experiments.bench_time_invariant`.
"""

import dataclasses
import functools
import importlib.util
import pathlib
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
import tyro
from jax import lax
from jax.sharding import PartitionSpec as P

import ssmjax.ops
from experiments.bench_delta import Delta, bench_delta
from experiments.bench_kernels import Kernels, bench_kernels
from experiments.bench_linear_attention import (
  LinearAttention,
  bench_linear_attention,
)
from experiments.bench_step import bench_step
from experiments.bench_time_invariant import (
  LTI,
  LongConv,
  bench_long_conv,
  bench_lti,
)
from experiments.results import provenance, use_cores, write_json
from experiments.timing import in_turns, scan_inputs, shape_of

_SHAPES = ("2,2048,1536,16", "1,16384,768,16", "8,512,256,16", "64,256,128,16")
_ALL = (
  "associative", "chunked", "chunked, sharded", "lax.scan", "torch loop",
  "mamba.py",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scan:
  """The S6 scan with softplus, bias, skip and gate, float32."""

  shapes: tuple[str, ...] = _SHAPES
  """Each is B,T,D,N."""
  forms: tuple[str, ...] = _ALL
  """What to time; the first is what the others are compared with."""
  repeats: int = 5
  """Timed runs of each, in turns, each after one that is not timed."""
  seed: int = 0
  step: bool = True
  """Time a whole training step of the recall model as well."""
  out: pathlib.Path | None = None
  """Where to write everything as JSON."""


def main() -> None:
  """Run the subcommand of the command line."""
  use_cores()
  tyro.extras.subcommand_cli_from_dict(
    {
      "delta": _delta_command,
      "kernels": _kernels_command,
      "linear-attention": _linear_attention_command,
      "long-conv": _long_conv_command,
      "lti": _lti_command,
      "scan": _scan_command,
    }
  )


def _delta_command(config: tyro.conf.OmitArgPrefixes[Delta]) -> None:
  """Time the delta rule in chunks and over its tokens."""
  bench_delta(config)


def _linear_attention_command(
  config: tyro.conf.OmitArgPrefixes[LinearAttention],
) -> None:
  """Time gated linear attention in chunks and over its tokens."""
  bench_linear_attention(config)


def _long_conv_command(config: tyro.conf.OmitArgPrefixes[LongConv]) -> None:
  """Time the long convolution, its loop and its recurrent twin."""
  bench_long_conv(config)


def _lti_command(config: tyro.conf.OmitArgPrefixes[LTI]) -> None:
  """Time a diagonal time-invariant system in chunks and as a convolution."""
  bench_lti(config)


def _kernels_command(config: tyro.conf.OmitArgPrefixes[Kernels]) -> None:
  """Time the fused kernels, or have compilers tell of them (--static)."""
  bench_kernels(config)


def _scan_command(config: tyro.conf.OmitArgPrefixes[Scan]) -> None:
  """Time the selective scans."""
  origin = provenance()
  settings = dataclasses.asdict(config) | dict(out=str(config.out))
  results: list[dict] = []

  def keep(step=None):
    if config.out:
      whole = dict(config=settings, results=results, step=step)
      write_json(config.out, origin | whole)

  for text in config.shapes:
    results.append(bench_scan(shape_of(text, "B,T,D,N", _SHAPES[0]), config))
    keep()
  if config.step:
    keep(bench_step(config.repeats))
  if config.out:
    print(f"written: {config.out}")


def bench_scan(shape: tuple[int, int, int, int], config: Scan) -> dict:
  """Time every form at one shape and print the table."""
  args = scan_inputs(*shape, seed=config.seed)
  forms = _forms(args, config.forms)
  rows = {}
  for direction in ("forward", "forward+backward"):
    runs, memory = {}, {}
    for name, build in forms.items():
      runs[name], memory[name] = build(direction == "forward+backward")
    times = in_turns(runs, config.repeats)
    base = statistics.median(times[next(iter(times))])
    for name, seconds in times.items():
      rows[f"{name}, {direction}"] = dict(
        median_ms=statistics.median(seconds) * 1e3,
        min_ms=min(seconds) * 1e3,
        max_ms=max(seconds) * 1e3,
        temporary_bytes=memory[name],
        faster=base / statistics.median(seconds),
      )
  first = next(iter(forms))
  print(f"\n(B, T, D, N) = {shape}; x: {first} / this")
  for name, row in rows.items():
    memory = row["temporary_bytes"]
    print(
      f"{name:32} {row['median_ms']:10.1f} ms"
      f" ({row['min_ms']:.1f} to {row['max_ms']:.1f})"
      f" {row['faster']:7.1f} x"
      + ("" if memory is None else f" {memory / 1e6:10.1f} MB"),
      flush=True,
    )
  return dict(shape=shape, rows=rows)


def _forms(args, wanted) -> dict[str, Callable]:
  """`build(backward) -> (run, temporary bytes)` by name, for what is here."""
  door = ssmjax.ops.selective_scan
  found = {
    "associative": functools.partial(door, implementation="associative"),
    "chunked": functools.partial(door, implementation="chunked"),
    "chunked, sharded": _sharded_scan,
    "lax.scan": _plain_scan,
  }
  forms: dict[str, Callable] = {}
  for name in wanted:
    if name in found:
      forms[name] = functools.partial(_build_jax, found[name], args)
    elif name in _TORCH:
      module, build = _TORCH[name]
      missing = [
        m for m in dict.fromkeys(("torch", module)) if not _importable(m)
      ]
      if missing:
        print(f"{name}: skipped, no module {' or '.join(missing)} here.")
      else:
        forms[name] = functools.partial(build, args)
    else:
      raise ValueError(f"bench: no form {name!r}, expected some of {_ALL}.")
  return forms


def _importable(module) -> bool:
  return importlib.util.find_spec(module) is not None


def _build_jax(function, args, backward):
  args = jax.device_put(args)
  scan = lambda args: function(**args, delta_softplus=True)[0]

  def both(args):
    y, pull = jax.vjp(scan, args)
    return y, pull(y)

  compiled = jax.jit(both if backward else scan).lower(args).compile()
  analysis = compiled.memory_analysis()
  memory = None if analysis is None else analysis.temp_size_in_bytes
  return lambda: jax.block_until_ready(compiled(args)), memory


def _sharded_scan(**args):
  """Rows over the devices; channels, where the rows cannot be divided."""
  delta_softplus = args.pop("delta_softplus")
  mesh = jax.make_mesh(
    (jax.device_count(),), ("x",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  if args["u"].shape[0] % jax.device_count() == 0:
    y = P("x")
    specs = {k: P() if k in ("A", "D", "delta_bias") else y for k in args}
  else:
    y = P(None, None, "x")
    specs = {k: y if k in ("u", "delta", "z") else P("x") for k in args}
    specs |= dict(B=P(), C=P())

  def scan(args):
    return ssmjax.ops.selective_scan(
      **args, delta_softplus=delta_softplus, implementation="chunked"
    )[0]

  scan = jax.shard_map(scan, mesh=mesh, in_specs=(specs,), out_specs=y)
  return (scan(args),)


def _plain_scan(u, delta, A, B, C, D, z, delta_bias, *, delta_softplus):
  """What one writes first: `lax.scan` over time with state `[B, D, N]`."""
  del delta_softplus  # Always on here.
  dt = jax.nn.softplus(delta + delta_bias)

  def step(h, token):
    u, dt, B, C = token
    h = jnp.exp(dt[..., None] * A) * h + (dt * u)[..., None] * B[:, None]
    return h, jnp.einsum("bdn,bn->bd", h, C)

  time_first = lambda x: jnp.moveaxis(x, 1, 0)
  h = jnp.zeros((u.shape[0], *A.shape), jnp.float32)
  h, y = lax.scan(step, h, tuple(map(time_first, (u, dt, B, C))))
  y = jnp.moveaxis(y, 0, 1) + D * u
  return y * jax.nn.silu(z), h


def _torch_inputs(args, backward):
  import torch

  return {k: torch.tensor(v, requires_grad=backward) for k, v in args.items()}


def _torch_runner(scan, args, backward):
  import torch

  def run():
    with torch.set_grad_enabled(backward):
      y = scan(**args)
      if backward:
        torch.autograd.grad(y, tuple(args.values()), y)

  return run, None


def _build_torch_loop(args, backward):
  """What transformers' `MambaMixer.slow_forward` does from Δ on."""
  import torch
  import torch.nn.functional as F

  def scan(u, delta, A, B, C, D, z, delta_bias):
    dt = F.softplus(delta + delta_bias).transpose(1, 2)
    x = u.transpose(1, 2)
    decay = torch.exp(A[None, :, None, :] * dt[:, :, :, None])
    write = dt[:, :, :, None] * B[:, None, :, :] * x[:, :, :, None]
    h = torch.zeros(u.shape[0], *A.shape)
    ys = []
    for t in range(u.shape[1]):
      h = decay[:, :, t] * h + write[:, :, t]
      ys.append(torch.matmul(h, C[:, t, :, None])[:, :, 0])
    y = torch.stack(ys, -1) + x * D[None, :, None]
    return (y * F.silu(z.transpose(1, 2))).transpose(1, 2)

  return _torch_runner(scan, _torch_inputs(args, backward), backward)


def _build_mambapy(args, backward):
  """The parallel scan of mamba.py, in its `selective_scan`."""
  import torch
  import torch.nn.functional as F
  from mambapy.pscan import pscan

  def scan(u, delta, A, B, C, D, z, delta_bias):
    dt = F.softplus(delta + delta_bias)
    decay = torch.exp(dt[..., None] * A)
    h = pscan(decay, dt[..., None] * B[:, :, None] * u[..., None])
    return ((h @ C[..., None])[..., 0] + D * u) * F.silu(z)

  return _torch_runner(scan, _torch_inputs(args, backward), backward)


_TORCH = {
  "torch loop": ("torch", _build_torch_loop),
  "mamba.py": ("mambapy", _build_mambapy),
}

if __name__ == "__main__":
  main()
