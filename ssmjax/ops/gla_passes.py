"""The two passes over chunks of a gated linear attention.

In turn: one chunk after another, with the state as the carry. At once: the
states at the chunks' boundaries first, then all chunks side by side, which
gives a matrix unit the most to do. Both keep the states before the chunks and
compute everything else again on the way back.

A chunk is q, k `[N, B, G, c, K]`, v `[N, B, G, R, c, V]`, log_a
`[N, B, G, R, c]` or (R = 1) `[N, B, G, 1, c, K]`; states `[N, B, G, R, K, V]`.
Its marks, or None, tell documents apart. States that are not finite are zero
to whom reads them, see `quarantine`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from ssmjax.ops.gla_decay import halvings, headwise_decay, keywise_scores

__all__ = [
  "backward_at_once",
  "backward_in_turn",
  "finite_states",
  "forward_at_once",
  "forward_in_turn",
]


def forward_in_turn(precision, chunk, bonus, marks, state):
  """y of all chunks, the final state, and the states before the chunks."""

  def step(state, xs):
    before = _readable(state[None], marks)[0]
    y, after = _local(precision, *_one(xs), before, bonus)
    return after[0], (y[0], state)

  final, (y, before) = lax.scan(step, state, (chunk, marks))
  return y, final, before


def forward_at_once(precision, chunk, bonus, marks, state):
  """As `forward_in_turn`."""
  parts = _parts(precision, chunk, bonus, marks)
  new = _leave(precision, chunk, parts)
  final, before = _states(state, parts, new, marks)
  read = _readable(before, marks)[0]
  return _read(precision, chunk, parts, marks, read), final, before


def backward_in_turn(precision, chunk, bonus, marks, before, dy, dfinal):
  """Cotangents of chunk, bonus and first state, and which states were lost.

  Those are the cotangents of the states after chunks, where not finite.
  """

  def step(carry, xs):
    dstate, dbonus = carry
    chunk, marks, before, dy = _one(xs)
    before = _readable(before, marks)[0]
    after, lost = _readable(dstate[None], marks)
    pull = jax.vjp(
      lambda chunk, before, bonus: _local(
        precision, chunk, marks, before, bonus
      ),
      chunk, before, bonus,
    )[1]  # fmt: skip
    dchunk, dbefore, more = pull((dy, after))
    dbonus = jax.tree.map(jnp.add, dbonus, more)
    return (dbefore[0], dbonus), jax.tree.map(lambda x: x[0], (dchunk, lost))

  (dstate, dbonus), (dchunk, lost) = lax.scan(
    step, (dfinal, jax.tree.map(jnp.zeros_like, bonus)),
    (chunk, marks, before, dy), reverse=True,
  )  # fmt: skip
  return dchunk, dbonus, dstate, lost


def backward_at_once(precision, chunk, bonus, marks, before, dy, dfinal):
  """As `backward_in_turn`."""
  before = _readable(before, marks)[0]
  parts = _parts(precision, chunk, bonus, marks)
  enter = functools.partial(_enter, precision, chunk, parts, marks)
  (new,) = jax.vjp(enter, before)[1](dy)
  # The same recurrence from the back: decays are diagonal.
  dstate, after = _states(dfinal, parts, new, marks, reverse=True)
  after, lost = _readable(after, marks)
  pull = jax.vjp(
    lambda chunk, bonus: _local(precision, chunk, marks, before, bonus),
    chunk, bonus,
  )[1]  # fmt: skip
  dchunk, dbonus = pull((dy, after))
  return dchunk, dbonus, dstate, lost


def finite_states(states):
  """States, zero where one is not finite, and where that is."""
  fine = jnp.isfinite(states).all((-1, -2))
  return jnp.where(fine[..., None, None], states, 0), ~fine


def _readable(states, marks):
  return (states, None) if marks is None else finite_states(states)


def _one(xs):
  return jax.tree.map(lambda x: x[None], xs)


def _local(precision, chunk, marks, before, bonus):
  """y of chunks and the states after them, of the states before them."""
  parts = _parts(precision, chunk, bonus, marks)
  y = _read(precision, chunk, parts, marks, before)
  new = _leave(precision, chunk, parts)
  return y, _after(before, parts["all"], new, _keep(marks))


def _states(state, parts, new, marks, *, reverse=False):
  """The last state, and for each chunk the one that it starts from."""
  step = lambda state, xs: (_after(state, *xs), state)
  xs = (parts["all"], new, _keep(marks))
  return lax.scan(step, state, xs, reverse=reverse)


def _keep(marks):
  return None if marks is None else marks["keep"]


def _parts(precision, chunk, bonus, marks):
  """Scores, and decays into a token, out of it and of all the chunk.

  q, k `[N, B, G, c, K]`, v `[N, B, G, R, c, V]`, log_a `[N, B, G, R, c]` or
  `[N, B, G, 1, c, K]`; scores `[N, B, G, R, c, c]`.
  """
  q, k, log_a = chunk["q"], chunk["k"], chunk["log_a"]
  before = bonus is not None
  by_key = log_a.ndim > chunk["v"].ndim - 1
  levels, *sums = halvings(log_a if by_key else log_a[..., None], before=before)
  # Fused with what reads them, the sums would be formed again by each.
  levels, sums = lax.optimization_barrier((levels, sums))
  into, out, total = map(jnp.exp, sums)
  if before:
    q_now = q * bonus.astype(q.dtype)[None, None, :, None]
  else:
    q_now = q
  now = (q_now * k).sum(-1)[..., None, :, None]
  diagonal = jnp.eye(q.shape[-2], dtype=bool)[None, None, None, None]
  if by_key:
    product = functools.partial(_product, precision, "...ik,...jk->...ij")
    levels = [[x[:, :, :, 0] for x in level] for level in levels]
    scores = keywise_scores(q, k, levels, product)
    scores = jnp.where(diagonal, now, scores[:, :, :, None])
  else:
    scores = _product(precision, "...ik,...jk->...ij", q, k)[:, :, :, None]
    scores = scores * headwise_decay(log_a, levels)
    if before:
      scores = jnp.where(diagonal, now, scores)
  if marks is not None:
    scores = jnp.where(marks["pair"], scores, jnp.zeros_like(scores))
    out = jnp.where(marks["to_end"], out, jnp.zeros_like(out))
  return {"scores": scores, "into": into, "out": out, "all": total}


def _read(precision, chunk, parts, marks, before):
  """y of a chunk and of the states before it."""
  inside = _product(
    precision, "nbgrij,nbgrjv->nbgriv", parts["scores"], chunk["v"]
  )
  return inside + _enter(precision, chunk, parts, marks, before)


def _enter(precision, chunk, parts, marks, before):
  """What the state before a chunk gives to its tokens."""
  q, into = chunk["q"], parts["into"]
  if into.shape[-1] == 1:
    y = _product(precision, "nbgik,nbgrkv->nbgriv", q, before) * into
  else:
    y = _product(
      precision, "nbgrik,nbgrkv->nbgriv", q[:, :, :, None] * into, before
    )
  if marks is not None:
    y = jnp.where(marks["from_start"], y, jnp.zeros_like(y))
  return y


def _leave(precision, chunk, parts):
  """What the tokens of a chunk give to the state after it."""
  k, v, out = chunk["k"], chunk["v"], parts["out"]
  if out.shape[-1] == 1:
    return _product(precision, "nbgik,nbgriv->nbgrkv", k, v * out)
  return _product(precision, "nbgrik,nbgriv->nbgrkv", k[:, :, :, None] * out, v)


def _after(before, decay, new, keep):
  """The states after chunks, from those before them."""
  kept = decay[..., None] * before
  if keep is not None:
    keep = keep[..., None, None, None, None]
    kept = jnp.where(keep, kept, jnp.zeros_like(kept))
  return kept + new


def _product(precision, equation, x, y):
  return jnp.einsum(
    equation, x, y, precision=precision, preferred_element_type=x.dtype
  )
