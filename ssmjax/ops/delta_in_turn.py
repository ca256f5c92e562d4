"""The delta rule's forward pass on CPUs: a few tokens after another.

The equations are those of `ops.delta_chunked`, over blocks of 16 tokens in
place of chunks of 64, which takes 4/7 of the multiplications, and each block
waits for the state of the one before. A CPU, which has no lanes to fill, gains
by both: all that a block touches stays in the cache.

- What does not wait for the state is computed for the four blocks of a chunk at
  once, or the small steps of the inverses would take as long as all products.
- A block makes three products: [Q; K] S₀, then U = T (βV - βγ (K S₀)) with
  T = (I + L)⁻¹, then [P; K↑ᵀ] U, which is of y and of the new state.
- Rows and heads are one axis: XLA:CPU divides a product's first axis only over
  its threads.
- Heads are in two groups: while one takes a small step, for which one core is
  enough, the other core goes on with the other.

What is not finite goes where it likes here, and always shows: what is not
finite in a block's k, v, β, decay or state stays in the state to the end, and
what is in q shows in P. Then all is done again with what is not finite taken
out and its results set to NaN, as `ops.delta_chunked` says. The sums are the
same, so that nothing else changes by a bit.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from ssmjax.ops.chunk_decay import by_products
from ssmjax.ops.delta_parts import (
  inverses,
  parts,
  product,
  spoil,
  valid_only,
)
from ssmjax.ops.quarantine import after, finite_states, take_out

__all__ = ["forward_in_turn"]

_BLOCK = 16


def forward_in_turn(tokens, masks, state, size):
  """Run the rule, a chunk of `size` tokens at a time.

  Tokens `[B, T, H, …]` and masks `[B, T]`, or None, of whole chunks.

  Returns:
    y `[B, T, H, P]`, the final state, and the states before the chunks, `[T /
    size, B, H, K, P]`.
  """
  run = functools.partial(_forward, size=size)
  *quick, fine = run(tokens, masks, state, careful=False)

  def careful(tokens, masks, state):
    valid, restart = masks
    if restart is None:
      restart = jnp.zeros(tokens["beta"].shape[:2], bool)
    return run(tokens, (valid, restart), state, careful=True)[:-1]

  return lax.cond(
    _of_all(fine), lambda *_: tuple(quick), careful, tokens, masks, state
  )


def _forward(tokens, masks, state, *, size, careful):
  """As `forward_in_turn`, and whether all is finite."""
  (batch, heads), length = state.shape[:2], tokens["v"].shape[1]
  valid, restart = masks
  cuts = [0, heads // 2, heads] if heads > 1 else [0, heads]
  groups = [slice(*pair) for pair in itertools.pairwise(cuts)]
  split = lambda x: [x[:, g].reshape(-1, *x.shape[2:]) for g in groups]
  by_row = lambda x: x.reshape(batch, -1, *x.shape[1:])
  join = lambda states: jnp.concatenate([by_row(x) for x in states], 1)

  def chunk(carry, i):
    states, y, fine = carry
    before, start = join(states), i * size
    blocks = []
    for group in groups:
      here = _laid_out(tokens, valid, group, start, size, state.dtype)
      here, seen = _blocks(here, _cut(restart, start, size), careful)
      blocks.append(here)
      fine &= seen
    for pair in zip(*blocks, strict=True):
      new, states = zip(*map(_block, pair, states), strict=True)
      for group, x in zip(groups, new, strict=True):
        x = jnp.moveaxis(by_row(x), 1, 2)
        x = valid_only(x, _cut(valid, start, x.shape[1]), head_axis=2)
        at = (np.int32(0), start, np.int32(group.start), np.int32(0))
        y = lax.dynamic_update_slice(y, x.astype(y.dtype), at)
      start += x.shape[1]
    return (states, y, fine), before

  first = tuple(split(state))
  carry = (first, jnp.zeros_like(tokens["v"]), jnp.isfinite(state).all())
  numbers = jnp.arange(length // size, dtype=jnp.int32)
  (final, y, fine), states = lax.scan(chunk, carry, numbers)
  final = join(final)
  fine &= jnp.isfinite(final).all()
  return y, final, states, fine


def _block(block, state):
  """y `[B · H, 16, P]` and the state after it."""
  careful = "spoiled" in block
  if careful:
    state, lost = finite_states(state)
  size = block["v"].shape[1]
  read = product("ti,ip->tp", block["both"], state)
  from_q, from_k = read[:, :size], read[:, size:]
  into = block["into"]
  u = block["beta"] * (block["v"] - into * from_k)
  u = product("ti,ip->tp", block["inverse"], u)
  new = product("ti,ip->tp", block["write"], u)
  y = into * from_q + new[:, :size]
  keep, change = block["keep"] * state, block["change"] * state
  state = keep + (change + new[:, size:])
  if careful:
    y = spoil(y, block["spoiled"] | (lost[:, None] & block["sees"]))
    state = spoil(state, block["spoiled"][:, -1] | (lost & block["stays"]))
  return y, state


def _laid_out(tokens, valid, group, start, size, dtype):
  """The tokens of a group of heads in a chunk, 0 at padding.

  Lists of the blocks' q, k, v, `[B · H, 16, …]`; beta and log_a (or None) with
  an axis for the blocks, `[4, B · H, 16, 1]`.
  """
  block = min(_BLOCK, size)

  def cut(x, start, size):
    x = valid_only(_cut(x, start, size), _cut(valid, start, size), head_axis=2)
    x = x[:, :, group].astype(dtype)
    x = x.reshape(x.shape[0], size // block, block, *x.shape[2:])
    x = jnp.moveaxis(jnp.moveaxis(x, 3, 1), 2, 0)
    return x.reshape(-1, block, *x.shape[4:])

  laid = {}
  for name in ("q", "k", "v"):
    starts = [start + n for n in range(0, size, block)]
    laid[name] = [cut(tokens[name], at, block) for at in starts]
  for name in ("beta", "log_a"):
    x = tokens[name]
    if x is not None:
      x = cut(x, start, size).reshape(size // block, -1, block, 1)
    laid[name] = x
  return laid


def _without_sick(tokens):
  """Tokens, 0 where not finite, and where that was, `[4, B · H, 16]`."""
  tokens, sick = dict(tokens), []
  for name in ("q", "k", "v"):
    pairs = [take_out(x) for x in tokens[name]]
    tokens[name], where = map(list, zip(*pairs, strict=True))
    sick.append(jnp.stack(where))
  for name in ("beta", "log_a"):
    if tokens[name] is not None:
      tokens[name], where = take_out(tokens[name], decay=name == "log_a")
      sick.append(where)
  return tokens, functools.reduce(jnp.logical_or, sick)


def _blocks(tokens, restart, careful):
  """What blocks take beside the state, and whether it is finite."""
  if careful:
    tokens, sick = _without_sick(tokens)
  q, k, beta = tokens["q"], tokens["k"], tokens["beta"]
  both = [jnp.concatenate(pair, 1) for pair in zip(q, k, strict=True)]
  columns = [jnp.swapaxes(x, 1, 2) for x in k]
  # Fused with a product, a transposition would be done again for each.
  both, columns = lax.optimization_barrier((both, columns))
  pairs = zip(both, columns, strict=True)
  scores = jnp.stack([product("ti,ip->tp", *pair) for pair in pairs])

  count, rows, block, _ = beta.shape
  between, into, out, keep, change = _decays(tokens["log_a"], beta)
  met = np.tril(np.ones((1, 1, block, block), bool))
  extra = {}
  if restart is not None:
    here = restart.reshape(-1, count, block)
    # [B, 1, count, …] to [count, B · H, …].
    every = lambda x: jnp.repeat(jnp.moveaxis(x[:, 0], 1, 0), heads, 1)
    heads = rows // here.shape[0]
    here = jax.tree.map(every, parts(here, here.shape))
    sees, stays, met = here["sees"], here["stays"], here["mask"]
    into = jnp.where(sees[..., None], into, 0)
    out = jnp.where(here["leaves"][..., None], out, 0)
    keep = jnp.where(stays[..., None, None], keep, 0)
    change = jnp.where(stays[..., None, None], change, 0)
    if careful:
      spoiled = after(sick, here["start"], 2)
      extra = dict(spoiled=spoiled, sees=sees, stays=stays)
  past = met & np.tril(np.ones((1, 1, block, block), bool), -1)
  p = jnp.where(met, scores[:, :, :block], 0) * between
  system = jnp.where(past, scores[:, :, block:], 0) * between * beta
  p, system = lax.optimization_barrier((p, system))
  fine = jnp.isfinite(p).all()

  stacked = dict(beta=beta, into=into, keep=keep, change=change)
  stacked |= dict(inverse=inverses(system), **extra)
  blocks = []
  for n in range(count):
    write = jnp.concatenate([p[n], columns[n] * jnp.swapaxes(out[n], 1, 2)], 1)
    block = {name: x[n] for name, x in stacked.items()}
    blocks.append(block | dict(both=both[n], v=tokens["v"][n], write=write))
  return blocks, fine


def _decays(log_a, beta):
  """Decays as of `by_products`, and a block's own as two factors' sum.

  Near 1 these are 1 and the difference, for there are many blocks: the same
  rounding of each, half a unit of 1, would add up.

  One decay that is not finite is in all of the sums, as 0 · NaN, and so in what
  the block writes, also where masks take out the decay itself.
  """
  if log_a is None:
    one = jnp.ones_like(beta)
    return one, one, one, one[..., :1, :], 0 * one[..., :1, :]
  between, into, out, _ = by_products(log_a, before=False)
  total = log_a.sum(-2, keepdims=True)
  near = total > -0.5
  keep = near.astype(beta.dtype)
  change = jnp.where(near, jnp.expm1(total), jnp.exp(total))
  return between, into, out, keep, change


def _cut(x, start, size):
  return None if x is None else lax.dynamic_slice_in_dim(x, start, size, 1)


@custom_vmap
def _of_all(fine):
  """Whether it holds for all of a vmapped axis, so that `cond` stays one."""
  return fine


@_of_all.def_vmap
def _(size, batched, fine):
  del size, batched
  return _of_all(fine.all(0)), False
