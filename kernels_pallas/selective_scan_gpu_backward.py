"""The selective scan on GPU (Mosaic): backward pass.

`selective_scan_gpu_adjoint` says what a block does. Here is what is around it:
the arrays that go in and come out, and the passes that a large N takes. One
pass has so many of a channel's state elements as registers and shared memory
hold; all cotangents are sums over N or parts of it, so that passes add up.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import selective_scan_gpu_adjoint as adjoint
from kernels_pallas import selective_scan_gpu_block as on
from kernels_pallas import selective_scan_gpu_plan as planning
from kernels_pallas.costs import selective_scan_cost
from kernels_pallas.jax_versions import gpu_kernel
from kernels_pallas.selective_scan_gpu_plan import Plan, Tiling
from kernels_pallas.selective_scan_gpu_tiling import (
  check_size,
  default_tiling,
  widest,
)
from ssmjax.types import Array

__all__ = ["backward"]


def backward(
  rows: dict[str, Array | None],
  shared: dict[str, Array | None],
  *,
  delta_softplus: bool,
  ones: int,
  tiling: Tiling | None = None,
  interpret=False,
) -> dict[str, Array]:
  """Pull cotangents back through `forward`.

  gₜ = Cₜ d_outₜ + exp(Δₜ₊₁ A) ∘ gₜ₊₁,  d_outₜ = d_yₜ silu(zₜ)
  dBₜ = Σ_d gₜ Δₜ uₜ,  dCₜ = Σ_d hₜ d_outₜ,  dA = Σₜ gₜ exp(Δₜ A) hₜ₋₁ Δₜ

  Args:
    rows: those of `forward`, and `states` as it returned them with `keep`,
      d_y `[R, T, D]` of u's dtype and d_final `[R, N, D]` float32.
    shared: those of `forward`.
    delta_softplus: that of `forward`.
    ones: that of `forward`.
    tiling: the division of work, with `forward`'s lanes, chunk and states.
    interpret: False, or `plgpu.InterpretGPUParams()`.

  Returns:
    Cotangents by name: u, delta, z of their dtypes, B, C, direct float32, and
    per row, float32: initial_state `[R, N, D]`, A `[R, N - ones, D]`, D and
    delta_bias `[R, D]`. Absent where the argument is None.
  """
  u, B, states = rows["u"], rows["B"], rows["states"]
  assert u is not None
  assert B is not None
  assert states is not None
  itemsize = widest(rows)
  if tiling is None:
    tiling = default_tiling(
      B.shape[2], ones=ones, itemsize=itemsize, backward=True
    )
  plan = planning.plan(rows, shared, ones, tiling)
  if interpret is False:
    checked = check_size(plan, u, itemsize, backward=True)
    rows = rows | dict(u=checked)
  run = functools.partial(
    _run_pass, softplus_on=delta_softplus, interpret=interpret
  )
  if len(plan.passes) == 1:
    return run(plan, rows, shared)
  found, kept = [], list(states)
  for part, own in plan.passes:
    mine, kept = kept[: len(own.parts)], kept[len(own.parts) :]
    found.append(run(*_part(part, own, rows, shared, ones, mine), wide=True))
  return _sum_of_passes(rows, found)


def _part(part, plan, rows, shared, ones, states):
  """Plan, rows and shared of a pass over some of N."""
  at_rates = slice(max(part.start - ones, 0), max(part.stop - ones, 0))
  rows = rows | dict(states=states, d_final=rows["d_final"][:, part])
  rows |= {name: rows[name][..., part] for name in ("B", "C")}
  shared = shared | dict(A=shared["A"][:, at_rates])
  if part.start:
    # What has no n is of the first pass.
    flags = tuple(flag for flag in plan.flags if flag != "direct")
    plan = dataclasses.replace(plan, flags=flags)
    rows, shared = rows | dict(direct=None), shared | dict(D=None)
  return plan, rows, shared


def _sum_of_passes(rows, found):
  """The cotangents of all passes, from first to last."""
  grads = dict(found[0])
  for name in ("u", "delta", "z", "delta_bias"):
    if name in grads:
      total = functools.reduce(jnp.add, [own[name] for own in found])
      like = rows.get(name)
      grads[name] = total if like is None else total.astype(like.dtype)
  for name, axis in (("B", 2), ("C", 2), ("initial_state", 1), ("A", 1)):
    grads[name] = jnp.concatenate([own[name] for own in found], axis)
  return grads


def _run_pass(plan, rows, shared, *, softplus_on, interpret, wide=False):
  """The cotangents of one pass; all in float32 if `wide`."""
  u = rows["u"]
  inputs = on.kernel_inputs(plan, rows, shared)
  for name, x in zip(plan.parts, rows["states"], strict=True):
    inputs[f"states {name}"] = x
  for name, x in plan.split_state(rows["d_final"]).items():
    inputs[f"d_final {name}"] = x
  f32 = jnp.dtype("float32")
  whole = (plan.rows, plan.time, plan.depth)
  shapes: dict[str, tuple[tuple[int, ...], jnp.dtype]] = {}
  for name in ("u", "delta", "z"):
    argument = rows[name]
    if argument is not None:
      shapes[name] = (whole, f32 if wide else argument.dtype)
  for name, size in plan.parts.items():
    shapes[f"initial {name}"] = ((plan.rows, plan.depth, size), f32)
    if planning.decays(name):
      shapes[f"rates {name}"] = ((plan.rows, plan.depth, size), f32)
  shapes["tokens"] = ((plan.tiles, plan.rows, plan.time * plan.pairs), f32)
  if "direct" in plan.flags:
    shapes["direct"] = ((plan.tiles, plan.rows, plan.time), f32)
  sums = (plan.rows, on.blocks_of_rows(plan)[1], plan.depth)
  for name in ("D", "delta_bias"):
    if shared[name] is not None:
      shapes[f"sum {name}"] = (sums, f32)
  out = gpu_kernel(
    functools.partial(
      adjoint.go_back, plan, softplus_on, tuple(inputs), tuple(shapes)
    ),
    out_type=[jax.ShapeDtypeStruct(*shape) for shape in shapes.values()],
    scratch_types=adjoint.scratch_arrays(
      plan, softplus_on, rows["z"] is not None
    ),
    grid=(plan.rows * plan.tiles,),
    grid_names=("block",),
    kernel_name="selective_scan_gpu_backward",
    cost_estimate=selective_scan_cost(
      {k: x for k, x in rows.items() if k != "states"},
      shared,
      ones=plan.ones,
      backward=True,
    ),
    compiler_params=plgpu.CompilerParams(
      approx_math=True, unsafe_no_auto_barriers=True
    ),
    interpret=interpret,
  )(*inputs.values())
  named = dict(zip(shapes, planning.vary_like(u, out), strict=True))
  return _gradients(plan, rows, named)


def _gradients(plan: Plan, rows, named):
  """The cotangents of the contract from what the kernel wrote."""
  cut = lambda x: x[:, : plan.length, : plan.channels]
  grads = {k: cut(named[k]) for k in ("u", "delta", "z") if k in named}
  shape = (plan.tiles, plan.rows, plan.time, plan.pairs)
  tokens = named["tokens"].reshape(shape)
  tokens = tokens.sum(0)[:, : plan.length]
  if rows["valid"] is not None:
    mask = rows["valid"][..., None]
    tokens = jnp.where(mask, tokens, jnp.zeros_like(tokens))
  offsets = adjoint.offsets(plan)
  for array in ("B", "C"):
    pieces = []
    for name, (_, start, stop) in plan.in_order:
      first = offsets[f"{array} {name}"]
      pieces.append(tokens[..., first : first + stop - start])
    grads[array] = jnp.concatenate(pieces, -1)
  if "direct" in plan.flags:
    direct = named["direct"].sum(0)[:, : plan.length]
    if rows["valid"] is not None:
      direct = jnp.where(rows["valid"], direct, jnp.zeros_like(direct))
    grads["direct"] = direct
  grads["initial_state"] = plan.join_state(
    {name: named[f"initial {name}"] for name in plan.parts}
  )
  rates = {
    name: named[f"rates {name}"] for name in plan.parts if planning.decays(name)
  }
  grads["A"] = (
    plan.join_state(rates)
    if rates
    else jnp.zeros((plan.rows, 0, plan.channels), jnp.float32)
  )
  for name in ("D", "delta_bias"):
    if f"sum {name}" in named:
      grads[name] = named[f"sum {name}"].sum(1)[:, : plan.channels]
  return grads
