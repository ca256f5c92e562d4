"""The delta rule in chunks: matrix products, and its own backward pass.

With uₜ = βₜ(vₜ - aₜ Sₜ₋₁ᵀ kₜ) the rule is a linear recurrence,
Sₜ = aₜ Sₜ₋₁ + kₜ uₜᵀ, and within a chunk that starts in S₀ the u of all tokens
solve one unit lower triangular system (the WY form of the product of
Householder-like factors: Yang et al. 2024, §3.2),

  (I + L) U = βV - K↓ S₀,   Lₜᵢ = βₜ γₜᵢ kₜ·kᵢ for i < t,   K↓ₜ = βₜ γₜ kₜ
  Y = Q↓ S₀ + P U,          Pₜᵢ = γₜᵢ qₜ·kᵢ for i <= t,     Q↓ₜ = γₜ qₜ
  S = γ S₀ + K↑ᵀ U,         K↑ᵢ = γ_{last,i} kᵢ

where γₜᵢ, γₜ and γ are the decays from token i, from the chunk's start to
token t and over the chunk. Chunks of a piece are computed side by side, except
for S, which goes from one to the next. Kept for backward: S at their starts.
(Forward on a CPU it is `ops.delta_in_turn`'s blocks of 16 tokens.)

A matrix product multiplies what its other factor masks, and 0 · inf is NaN. So
that a document which is not finite, or whose state is not, reaches no other,
its tokens are taken out and its results are set to NaN, see `quarantine`. (Not
so what overflows within a chunk of finite tokens, see `delta_rule`.)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ssmjax.ops.chunk_decay import by_halves, by_products
from ssmjax.ops.delta_in_turn import forward_in_turn
from ssmjax.ops.delta_parts import (
  inverses,
  inverses_at_once,
  parts,
  product,
  spoil,
  valid_only,
)
from ssmjax.ops.quarantine import after, before, finite_states, take_out
from ssmjax.ops.varying import match_varying

__all__ = ["delta_rule_chunked"]

CHUNK = 64  # Tokens that one triangular system takes, a power of two.
_PIECE = 4  # Chunks computed side by side.
_BLOCK = 16  # Rows of the systems that larger ones are made of.


@jax.custom_vjp
def delta_rule_chunked(q, k, v, beta, log_a, state, valid, restart):
  """Run `ops.delta`'s recurrence: y `[B, T, H, P]` and the final state."""
  y, final, _ = _forward(q, k, v, beta, log_a, state, valid, restart)
  return y, final


def _once(function):
  """`function`, with an error that says the way out where it is derived."""
  function = jax.custom_jvp(function)

  @function.defjvp
  def _refuse(primals, tangents):
    raise NotImplementedError(
      "delta_rule: the chunked form has first-order derivatives only. Pass"
      " implementation='reference' to differentiate again."
    )

  return function


@_once
def _keep(*args):
  y, final, states = _forward(*args)
  return (y, final), (args, states)


@_once
def _pull(residuals, cotangents):
  """Go back through the pieces, each from its chunks' own states."""
  return lax.platform_dependent(
    residuals, cotangents,
    cpu=functools.partial(_backward, (by_halves, inverses)),
    default=functools.partial(_backward, (by_products, inverses_at_once)),
  )  # fmt: skip


def _backward(forms, residuals, cotangents):
  """`_pull` with a platform's forms of decays and of small inverses."""
  (q, k, v, beta, log_a, _, valid, restart), states = residuals
  dy, dfinal = cotangents
  tokens = dict(q=q, k=k, v=v, beta=beta, log_a=log_a)
  chunks, size, pad, split, join = _pieces(v.shape[1])
  span = chunks * size
  padded = jax.tree.map(pad, (tokens, (valid, restart), dy))

  def piece(carry, xs):
    (dstate, grads), (i, states) = carry, xs
    cut = lambda x: split(lax.dynamic_slice_in_dim(x, i * span, span, 1))
    xs = lax.optimization_barrier(jax.tree.map(cut, padded))
    dstate, new = _piece_back(forms, dstate, (xs, states))
    put = lambda x, y: lax.dynamic_update_slice_in_dim(x, join(y), i * span, 1)
    return (dstate, jax.tree.map(put, grads, new)), None

  count = states.shape[0]
  xs = (jnp.arange(count, dtype=jnp.int32), states)
  carry = (dfinal, jax.tree.map(jnp.zeros_like, padded[0]))
  (dstate, grads), _ = lax.scan(piece, carry, xs, reverse=True)
  grads = jax.tree.map(lambda x: x[:, : v.shape[1]], grads)
  return (*(grads[name] for name in tokens), dstate, None, None)


delta_rule_chunked.defvjp(_keep, _pull)


def _forward(*args):
  """y, the final state, and `[pieces, n, B, H, K, P]`, those before chunks."""
  return lax.platform_dependent(*args, cpu=_in_turn, default=_in_pieces)


def _in_turn(q, k, v, beta, log_a, state, valid, restart):
  """`_forward` on CPUs."""
  tokens = dict(q=q, k=k, v=v, beta=beta, log_a=log_a)
  chunks, size, pad, *_ = _pieces(v.shape[1])
  tokens, masks = jax.tree.map(pad, (tokens, (valid, restart)))
  y, final, states = forward_in_turn(tokens, masks, state, size)
  states = states.reshape(-1, chunks, *states.shape[1:])
  return y[:, : v.shape[1]], final, states


def _in_pieces(q, k, v, beta, log_a, state, valid, restart):
  """`_forward` on accelerators."""
  tokens = dict(q=q, k=k, v=v, beta=beta, log_a=log_a)
  chunks, size, pad, split, join = _pieces(v.shape[1])
  span = chunks * size
  padded = jax.tree.map(pad, (tokens, (valid, restart)))

  def piece(carry, i):
    state, y = carry
    # Cut here, a piece is laid out in the cache and not in a copy of all.
    cut = lambda x: split(lax.dynamic_slice_in_dim(x, i * span, span, 1))
    xs = lax.optimization_barrier(jax.tree.map(cut, padded))
    state, (new, states) = _piece(state, xs)
    y = lax.dynamic_update_slice_in_dim(y, join(new), i * span, 1)
    return (state, y), states

  y = jnp.zeros_like(padded[0]["v"])
  count = jnp.arange(y.shape[1] // span, dtype=jnp.int32)
  (final, y), states = lax.scan(piece, (state, y), count)
  return y[:, : v.shape[1]], final, states


def _pieces(length):
  """The chunks of a piece, their size, and functions that pad, cut and join.

  Padded are `[B, T, H, …]` to whole pieces; a piece of that, or of masks
  without H, is cut as `[B, H, chunks, size, …]`, and joined again.
  """
  size = min(CHUNK, 1 << (length - 1).bit_length())
  chunks = -(-length // size)
  pieces = -(-chunks // _PIECE)
  chunks = -(-chunks // pieces)
  tail = pieces * chunks * size - length

  def pad(x):
    # A token of zeros is neutral: it writes nothing and forgets nothing.
    widths = ((0, 0), (0, tail)) + ((0, 0),) * (x.ndim - 2)
    return jnp.pad(x, widths) if tail else x

  def split(x):
    x = x.reshape(x.shape[0], chunks, size, *x.shape[2:])
    return x if x.ndim == 3 else jnp.moveaxis(x, 3, 1)

  def join(x):
    x = jnp.moveaxis(x, 1, 3)
    return x.reshape(x.shape[0], -1, *x.shape[3:])

  return chunks, size, pad, split, join


def _piece(state, xs):
  """Run the chunks of a piece; y, and the states before each chunk."""
  tokens, (valid, restart) = xs
  here = parts(restart, _sizes(tokens))
  tokens, sick = _cleaned(tokens, valid)
  f = _factors(by_products, tokens, here, state.dtype)
  w, u = _solved(f, _diagonal(f["system"], inverses_at_once))
  spoiled = after(sick, here["start"], 3)

  def chunk(state, xs):
    total, k_up, w, u, stays, ends_sick = xs
    clean, lost = finite_states(state)
    u = u - product("tk,kp->tp", w, clean)
    new = total[..., None, None] * clean + product("tk,tp->kp", k_up, u)
    lost = (lost & stays) | ends_sick
    return spoil(new, lost), (state, u)

  xs = (f["total"], f["k_up"], w, u, here["stays"], spoiled[..., -1])
  state, (states, u) = lax.scan(chunk, state, _chunks_first(xs), unroll=_PIECE)
  u = jnp.moveaxis(u, 0, 2)
  clean, lost = finite_states(jnp.moveaxis(states, 0, 2))
  y = product("tk,kp->tp", f["q_down"], clean) + product("ti,ip->tp", f["p"], u)
  y = spoil(y, spoiled | (lost[..., None] & here["sees"]))
  return state, (valid_only(y, valid).astype(tokens["v"].dtype), states)


def _piece_back(forms, dstate, xs):
  """Go back through a piece; the cotangents of its tokens."""
  headwise, inverses = forms
  (tokens, (valid, restart), dy), states = xs
  here = parts(restart, _sizes(tokens))
  tokens, sick = _cleaned(tokens, valid)
  f, pull = jax.vjp(
    lambda tokens: _factors(headwise, tokens, here, dstate.dtype), tokens
  )
  diagonal = _diagonal(f["system"], inverses)
  w, u = _solved(f, diagonal)
  states, lost = finite_states(jnp.moveaxis(states, 0, 2))
  u = u - product("tk,kp->tp", w, states)
  spoiled = after(sick, here["start"], 3)
  spoiled |= lost[..., None] & here["sees"]
  dy = valid_only(dy, valid).astype(dstate.dtype)
  spoiled |= ~jnp.isfinite(dy).all(-1)
  dy = jnp.where(spoiled[..., None], 0, dy)
  spoiled = before(spoiled, here["end"], 3)
  du = product("ti,tp->ip", f["p"], dy)
  own = product("tk,tp->kp", f["q_down"], dy)

  def chunk(dstate, xs):
    total, k_up, w, own, du, stays, begins_sick = xs
    clean, lost = finite_states(dstate)
    du = du + product("tk,kp->tp", k_up, clean)
    new = total[..., None, None] * clean + own - product("tk,tp->kp", w, du)
    lost = (lost & stays) | begins_sick
    return spoil(new, lost), (dstate, du)

  begins_sick = spoiled[..., 0] & here["sees"][..., 0]
  xs = (f["total"], f["k_up"], w, own, du, here["stays"], begins_sick)
  dstate, (dstates, du) = lax.scan(
    chunk, dstate, _chunks_first(xs), reverse=True, unroll=_PIECE
  )
  dstates, du = jnp.moveaxis(dstates, 0, 2), jnp.moveaxis(du, 0, 2)
  dstates, lost = finite_states(dstates)
  dright = _solve(f["system"], diagonal, du, transpose=True)
  (grads,) = pull(
    dict(
      system=-product("tp,ip->ti", dright, u),
      p=product("tp,ip->ti", dy, u),
      q_down=product("tp,kp->tk", dy, states),
      k_down=-product("tp,kp->tk", dright, states),
      k_up=product("tp,kp->tk", u, dstates),
      write=dright,
      total=(states * dstates).sum((-2, -1)),
    )
  )
  spoiled |= lost[..., None] & here["leaves"]
  grads = jax.tree.map(lambda x: valid_only(spoil(x, spoiled), valid), grads)
  return dstate, grads


def _factors(headwise, tokens, here, dtype):
  """All that a chunk's equations take of its tokens, see the module."""
  exact = tokens["q"].dtype == tokens["k"].dtype == jnp.bfloat16
  q, k, v, beta = (tokens[x].astype(dtype) for x in ("q", "k", "v", "beta"))
  # A product of two bfloat16 is exact in one pass of any matrix unit.
  precision = lax.Precision.DEFAULT if exact else lax.Precision.HIGHEST
  kk = product("tk,ik->ti", k, k, precision)
  p = product("tk,ik->ti", q, k, precision)
  size = k.shape[-2]
  past = np.tril(np.ones((size, size), bool), -1)[None, None, None]
  system = jnp.where(here["mask"] & past, beta[..., None] * kk, 0)
  p = jnp.where(here["mask"], p, 0)
  sees, leaves = here["sees"][..., None], here["leaves"][..., None]
  q_down = jnp.where(sees, q, 0)
  k_down = jnp.where(sees, beta[..., None] * k, 0)
  k_up = jnp.where(leaves, k, 0)
  total = jnp.broadcast_to(here["stays"], k.shape[:3]).astype(dtype)
  total, _ = match_varying(total, k)  # A constant without ids and decays.
  if tokens["log_a"] is not None:
    log_a = tokens["log_a"].astype(dtype)[..., None]
    decay, into, out, whole = headwise(log_a, before=False)
    system, p = system * decay, p * decay
    q_down, k_down, k_up = q_down * into, k_down * into, k_up * out
    total = total * whole[..., 0]
  return dict(
    system=system, p=p, q_down=q_down, k_down=k_down, k_up=k_up, total=total,
    write=beta[..., None] * v,
  )  # fmt: skip


def _sizes(tokens):
  """B, the number of chunks and their size."""
  batch, _, chunks, size = tokens["beta"].shape
  return batch, chunks, size


def _solved(f, diagonal):
  """(I + L)⁻¹ K↓ and (I + L)⁻¹ βV."""
  keys = f["k_down"].shape[-1]
  right = jnp.concatenate([f["k_down"], f["write"]], -1)
  solved = _solve(f["system"], diagonal, right)
  return solved[..., :keys], solved[..., keys:]


def _diagonal(system, inverses):
  """The inverses of the blocks on the diagonal of I + L."""
  size = system.shape[-1]
  block = min(_BLOCK, size)
  starts = range(0, size, block)
  blocks = [system[..., i : i + block, i : i + block] for i in starts]
  return inverses(jnp.stack(blocks, -3))


def _solve(system, diagonal, right, *, transpose=False):
  """(I + L)⁻¹ R, or (I + L)⁻ᵀ R, a block of rows after the other.

  Inverses are of small blocks only. That of all of I + L, made of halves or of
  powers of L, loses digits that substitution keeps: at equal keys and β = 1.9,
  float32, 100 times as much.
  """
  size, block = system.shape[-1], diagonal.shape[-1]
  axes = "it,ip->tp" if transpose else "ti,ip->tp"
  solved = None
  for i in range(0, size, block)[:: -1 if transpose else 1]:
    rows = slice(i, i + block)
    x = right[..., rows, :]
    if solved is not None:
      if transpose:
        known = system[..., i + block :, rows]
      else:
        known = system[..., rows, :i]
      x = x - product(axes, known, solved)
    x = product(axes, diagonal[..., i // block, :, :], x)
    if solved is None:
      solved = x
    else:
      solved = jnp.concatenate([x, solved] if transpose else [solved, x], -2)
  return solved


def _cleaned(tokens, valid):
  """Tokens without padding and without what is not finite, and where that was.

  A decay of 0, a log of -inf, is sound.
  """
  tokens = {
    name: None if x is None else valid_only(x, valid)
    for name, x in tokens.items()
  }
  sick = jnp.zeros_like(tokens["beta"], bool)
  for name, x in tokens.items():
    if x is not None:
      wide = x if x.ndim > sick.ndim else x[..., None]
      wide, ill = take_out(wide, decay=name == "log_a")
      tokens[name], sick = wide.reshape(x.shape), sick | ill
  return tokens, sick


def _chunks_first(xs):
  return jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), xs)
