"""The backward blocks of the chunked selective scan."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ssmjax.ops import selective_chunked_forward as fw
from ssmjax.ops.selective_chunked_forward import (
  contract,
  get,
  loop,
  put,
  take,
)
from ssmjax.ops.varying import match_varying

_BACKWARD_STATE = 4096  # Elements; a chunk of states stays in the L2 cache.


def backward_blocks(rows, shared, *, delta_softplus, ones):
  """The backward pass of `selective_fused.fused`."""
  dtype = fw.compute_dtype(rows, shared)
  shared = fw.prepare_shared(shared, ones, dtype)
  grads = fw.one_kernel(_backward, delta_softplus, rows, shared)
  return grads | dict(A=grads["A"][:, ones:])


@functools.partial(jax.jit, static_argnums=0)
def _backward(softplus_on, rows, shared):
  with fw.inside_kernel():
    return _backward_loops(softplus_on, rows, shared)


def _backward_loops(softplus_on, rows, shared):
  dtype = shared["A"].dtype
  batch, length, channels = rows["u"].shape
  _, states, _ = shared["A"].shape
  width = fw.block_width(channels, states, _BACKWARD_STATE)
  chunk = min(fw.CHUNK, length)
  tiles, chunks = -(-channels // width), -(-length // chunk)
  lanes = next(n for n in (8, 4, 2, 1) if width % n == 0)
  zeros = lambda *shape, dtype=dtype: match_varying(
    jnp.zeros(shape, dtype), rows["u"]
  )[0]

  def block(i, grads):
    b, tile = lax.div(i, np.int32(tiles)), lax.rem(i, np.int32(tiles))
    d = jnp.minimum(tile * width, channels - width)
    own = fw.block_of_shared(shared, b, d, batch, width)
    own["new"] = None  # Channels that no tile before has seen.
    if channels % width:
      new = d + lax.iota(jnp.int32, width) >= tile * width
      own["new"] = match_varying(new.astype(dtype), rows["u"])[0]

    def body(i, carry):
      g, sums, scratch, grads = carry
      j = np.int32(chunks - 1) - i
      first = j * chunk
      start = jnp.minimum(first, length - chunk)
      token = fw.load_chunk(rows, own, b, start, d, chunk, width, dtype)
      if length % chunk:
        token = _only_after(token, first - start, chunk)
      token = _backward_rows(token, own, softplus_on)
      h = get(rows["states"], (b, j, 0, d), (1, 1, states, width))[0, 0]
      scratch = _recompute(h, token, own, scratch)
      g, sums, scratch = _reverse(g, token, own, sums, scratch, lanes)
      rest = _chunk_grads(token, own, sums, scratch, grads, b, start, d)
      return g, *rest

    g = get(rows["d_final"], (b, 0, d), (1, states, width))[0].astype(dtype)
    sums = dict(A=zeros(states, width), D=zeros(width), bias=zeros(width))
    scratch = dict(
      h=zeros(chunk + 1, states, width),
      decay=zeros(chunk, states, width),
      y=zeros(chunk, width),
      dx=zeros(chunk, width),
      rate=zeros(chunk, width),
      B=zeros(chunk, states, lanes),
      C=zeros(chunk, states, lanes),
    )
    g, sums, _, grads = loop(0, chunks, body, (g, sums, scratch, grads))
    return grads | dict(
      A=put(grads["A"], sums["A"][None], (b, 0, d)),
      D=put(grads["D"], sums["D"][None], (b, d)),
      delta_bias=put(grads["delta_bias"], sums["bias"][None], (b, d)),
      initial_state=put(grads["initial_state"], g[None], (b, 0, d)),
    )

  grads = {
    name: zeros(*rows[name].shape, dtype=rows[name].dtype)
    for name in ("u", "delta", "z")
    if rows[name] is not None
  }
  grads |= {
    name: zeros(*rows[name].shape)
    for name in ("B", "C", "direct")
    if rows[name] is not None
  }
  grads |= dict(
    A=zeros(batch, states, channels),
    D=zeros(batch, channels),
    delta_bias=zeros(batch, channels),
    initial_state=zeros(batch, states, channels),
  )
  return loop(0, batch * tiles, block, grads)


def _only_after(token, first, chunk):
  """Make steps before `first` invalid: the chunk before has them."""
  mask = lax.iota(jnp.int32, chunk) >= first
  token = dict(token)
  (mask,) = match_varying(mask, token["u"])[:1]
  token["valid"] = mask & token.get("valid", mask)
  if "restart" in token:
    token["restart"] = token["restart"] & mask
  for name in ("u", "d_y"):
    token[name] = jnp.where(mask[:, None], token[name], 0)
  return token


def _backward_rows(token, own, softplus_on):
  """Everything about a chunk that has no state axis and needs no state."""
  dt, slope = fw.step_size(token, own, softplus_on)
  u, d_y = token["u"], token["d_y"]
  rows = dict(B=token["B"], C=token["C"], dt=dt, slope=slope, u=u, dx=dt * u)
  rows |= {k: token[k] for k in ("restart", "direct", "valid") if k in token}
  rows["d_out"] = d_y
  if "z" in token:
    z = token["z"]
    sigmoid = fw.sigmoid(z)
    rows["d_out"] = d_y * z * sigmoid
    rows["d_gate"] = d_y * sigmoid * (1 + z * (1 - sigmoid))
  rows["new_dx"], rows["new_d_out"] = rows["dx"], rows["d_out"]
  if own["new"] is not None:
    rows["new_dx"] = rows["dx"] * own["new"][None]
    rows["new_d_out"] = rows["d_out"] * own["new"][None]
  return lax.optimization_barrier(rows)


def _recompute(h, token, own, scratch):
  """The states of a chunk from the one before it, and what multiplies them."""
  exp, _ = fw.exponential(h.dtype)
  decay = exp(token["dt"][:, None] * own["A"][None])
  if "restart" in token:
    keep = ~token["restart"][:, None, None]
    decay = jnp.where(keep, decay, jnp.zeros_like(decay))
  decay = lax.optimization_barrier(decay)
  all_h = put(scratch["h"], h[None], (0, 0, 0))

  def step(k, carry):
    h, all_h, y = carry
    if "restart" in token:
      h = jnp.where(take(token["restart"], k), jnp.zeros_like(h), h)
    new = take(token["B"], k)[:, None] * take(token["dx"], k)[None]
    h = lax.optimization_barrier(take(decay, k) * h + new)
    if "d_gate" in token:
      y = put(y, contract(take(token["C"], k), h)[None], (k, 0))
    return h, put(all_h, h[None], (k + 1, 0, 0)), y

  carry = (h, all_h, scratch["y"])
  _, all_h, y = loop(0, decay.shape[0], step, carry)
  return scratch | dict(h=all_h, decay=decay, y=y)


def _reverse(g, token, own, sums, scratch, lanes):
  """Go back through a chunk. g is the cotangent of the state it ends in."""
  steps, states, width = scratch["decay"].shape
  all_h, decay = scratch["h"], scratch["decay"]

  def step(i, carry):
    g, sum_A, d_dx, d_rate, d_B, d_C = carry
    k = np.int32(steps - 1) - i
    row = lambda name: take(token[name], k)
    g = g + row("C")[:, None] * row("d_out")[None]
    g = lax.optimization_barrier(g)
    d_dx = put(d_dx, contract(row("B"), g)[None], (k, 0))
    d_B = put(d_B, _fold(g, row("new_dx"), lanes)[None], (k, 0, 0))
    after = _fold(all_h, row("new_d_out"), lanes, k + 1)
    d_C = put(d_C, after[None], (k, 0, 0))
    g = g * take(decay, k)
    if "restart" in token:
      # The decay is 0 here, but 0 times a cotangent of NaN is not.
      g = jnp.where(row("restart"), jnp.zeros_like(g), g)
    g = lax.optimization_barrier(g)

    def before(n):
      h = get(all_h, (k, n, 0), (1, 1, width))[0, 0]
      if "restart" in token:
        h = jnp.where(row("restart"), jnp.zeros_like(h), h)
      return h

    through = [g[n] * before(n) * own["A"][n] for n in range(states)]
    d_rate = put(d_rate, fw.tree_sum(through)[None], (k, 0))
    h = take(all_h, k)
    if "restart" in token:
      h = jnp.where(row("restart"), jnp.zeros_like(h), h)
    sum_A = sum_A + g * h * row("dt")[None]
    return g, sum_A, d_dx, d_rate, d_B, d_C

  carry = (
    g, sums["A"], scratch["dx"], scratch["rate"], scratch["B"], scratch["C"]
  )  # fmt: skip
  g, sum_A, *rest = loop(0, steps, step, carry)
  scratch = scratch | dict(zip(("dx", "rate", "B", "C"), rest, strict=True))
  return g, sums | dict(A=sum_A), scratch


def _chunk_grads(token, own, sums, scratch, grads, b, start, d):
  """Write the chunk's rows of the cotangents and add to the sums."""
  u, dt, d_out, d_dx = token["u"], token["dt"], token["d_out"], scratch["dx"]
  _, base = fw.exponential(u.dtype)
  d_dt = d_dx * u + scratch["rate"] * (1 / base)
  d_u = d_dx * dt
  skip = fw.skip_factor(token, own, dt)
  if skip is not None:
    d_u = d_u + d_out * skip
  if "direct" in token:
    d_dt = d_dt + token["direct"][:, None] * d_out * u
  clean = lambda x: x
  if "valid" in token:
    # Steps of padding, and those that the chunk before has too, give nothing:
    # their factors are 0, but 0 times a state of NaN is not.
    def clean(x):
      mask = lax.broadcast_in_dim(token["valid"], x.shape, (0,))
      return jnp.where(mask, x, jnp.zeros_like(x))

  d_delta = clean(d_dt * token["slope"])
  columns = dict(u=clean(d_u), delta=d_delta)
  if "d_gate" in token:
    y = scratch["y"] if skip is None else scratch["y"] + skip * u
    columns["z"] = clean(token["d_gate"] * y)
  grads = dict(grads)
  for name, x in columns.items():
    x = x.astype(grads[name].dtype)[None]
    grads[name] = put(grads[name], x, (b, start, d))
  added = dict(B=_sum_lanes(scratch["B"]), C=_sum_lanes(scratch["C"]))
  if "direct" in token:
    product = token["new_d_out"] * token["dx"]
    ones = jnp.ones_like(product[0])
    added["direct"] = _sum_lanes(_fold(product, ones, scratch["B"].shape[-1]))
  for name, x in added.items():
    at = (b, start, 0)[: x.ndim + 1]
    old = get(grads[name], at, (1, *x.shape))
    grads[name] = put(grads[name], old + clean(x)[None], at)
  over_time = lambda x: fw.tree_sum([x[k] for k in range(x.shape[0])])
  sums = sums | dict(
    D=sums["D"] + over_time(d_out * u), bias=sums["bias"] + over_time(d_delta)
  )
  return sums, scratch, grads


def _sum_lanes(x):
  """The sum over the last axis without a reduction.

  XLA:CPU hands large reductions to a library, which one kernel cannot call.
  """
  return fw.tree_sum([x[..., i] for i in range(x.shape[-1])])


def _fold(x, weights, lanes, k=None):
  """The sum over w of x `[N, W]`, or x[k], times `[W]`, as `[N, lanes]`.

  Slices come before the product, or the product would be kept in memory.
  """
  (width,) = weights.shape
  if k is None:
    part = lambda i: x[:, i : i + lanes]
  else:
    part = lambda i: get(x, (k, 0, i), (1, x.shape[1], lanes))[0]
  return fw.tree_sum(
    [part(i) * weights[None, i : i + lanes] for i in range(0, width, lanes)]
  )
