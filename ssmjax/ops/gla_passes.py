"""The two passes over chunks of a gated linear attention.

In turn: a few chunks after another, with the state as the carry. It is the way
of CPUs, for the chunks then stay in the cache; they are laid out there too, for
to lay out all tokens beforehand takes as long as all products. At once: the
states at the chunks' boundaries first, then all chunks side by side, which
gives a matrix unit the most to do. Both keep the states before the chunks and
compute everything else again on the way back.

Tokens are q, k `[B, T, G, K]`, v `[B, T, G, R, V]`, log_a `[B, T, G, R]` or
(R = 1) `[B, T, G, 1, K]`, T a multiple of the chunk's size. A chunk is q, k
`[N, B, G, c, K]`, v `[N, B, G, R, c, V]`, log_a `[N, B, G, R, c]` or (R = 1)
`[N, B, G, 1, c, K]`; states `[N, B, G, R, K, V]`. Its marks, or None, tell
documents apart. States that are not finite are zero to whom reads them, see
`quarantine`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from ssmjax.ops.chunk_decay import (
  by_halves,
  by_products,
  halvings,
  keywise_scores,
)
from ssmjax.ops.quarantine import finite_states

__all__ = [
  "backward_at_once",
  "backward_in_turn",
  "forward_at_once",
  "forward_in_turn",
]

# Chunks that a CPU takes side by side: enough for elementwise work to be shared
# by its cores, few enough to stay in their caches. By key there is more of it.
_FEW, _FEW_BY_KEY = 4, 2

# G, and where there are values, R.
_HEAD_AXES = {"q": 1, "k": 1, "v": 2, "log_a": 2}


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def forward_in_turn(precision, size, tokens, bonus, marks, state):
  """y `[B, T, G, R, V]`, the final state, and the states before the chunks."""
  count = tokens["v"].shape[1] // size
  by_key = tokens["log_a"].ndim == tokens["v"].ndim
  most = _FEW_BY_KEY if by_key else _FEW
  few = max(n for n in range(1, most + 1) if count % n == 0)

  def step(carry, xs):
    (state, y), (i, marks) = carry, xs
    chunk = _chunks_at(i, tokens, size, few)
    new, state, before = _forward(
      precision, by_halves, chunk, bonus, marks, state
    )
    return (state, _put(y, new, i)), before

  numbers = jnp.arange(count // few, dtype=jnp.int32)
  by_piece = lambda x: x.reshape(-1, few, *x.shape[1:])
  carry = (state, jnp.zeros_like(tokens["v"]))
  xs = (numbers, jax.tree.map(by_piece, marks))
  (final, y), before = lax.scan(step, carry, xs)
  return y, final, before.reshape(count, *before.shape[2:])


@forward_in_turn.defjvp
def _forward_jvp(precision, size, primals, tangents):
  return _at_once_jvp(forward_at_once, precision, size, primals, tangents)


def forward_at_once(precision, size, tokens, bonus, marks, state):
  """As `forward_in_turn`."""
  chunk = _chunks(tokens, size)
  return _forward(precision, by_products, chunk, bonus, marks, state)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def backward_in_turn(
  precision, size, tokens, bonus, marks, before, dy, dfinal
):  # fmt: skip
  """Cotangents of tokens, bonus and first state, and which states were lost.

  Those are the cotangents of the states after chunks, where not finite.
  """

  def step(carry, xs):
    dstate, dbonus, dtokens = carry
    i, marks, before = xs
    marks = _one(marks)
    chunk, dy_here = _chunks_at(i, (tokens, {"v": dy}), size)
    before = _readable(before[None], marks)[0]
    after, lost = _readable(dstate[None], marks)
    pull = jax.vjp(
      lambda chunk, before, bonus: _local(
        precision, by_halves, chunk, marks, before, bonus
      ),
      chunk, before, bonus,
    )[1]  # fmt: skip
    dchunk, dbefore, more = pull((dy_here["v"], after))
    dtokens = {
      name: _put(x, _tokens(name, dchunk[name]), i)
      for name, x in dtokens.items()
    }
    dbonus = jax.tree.map(jnp.add, dbonus, more)
    return (dbefore[0], dbonus, dtokens), jax.tree.map(lambda x: x[0], lost)

  carry = (dfinal, *jax.tree.map(jnp.zeros_like, (bonus, tokens)))
  xs = (_numbers(tokens, size), marks, before)
  carry, lost = lax.scan(step, carry, xs, reverse=True)
  dstate, dbonus, dtokens = carry
  return dtokens, dbonus, dstate, lost


@backward_in_turn.defjvp
def _backward_jvp(precision, size, primals, tangents):
  return _at_once_jvp(backward_at_once, precision, size, primals, tangents)


def backward_at_once(
  precision, size, tokens, bonus, marks, before, dy, dfinal
):  # fmt: skip
  """As `backward_in_turn`."""
  chunk, dy = _chunks(tokens, size), _chunks({"v": dy}, size)["v"]
  before = _readable(before, marks)[0]
  parts = _parts(precision, by_products, chunk, bonus, marks)
  enter = functools.partial(_enter, precision, chunk, parts, marks)
  (new,) = jax.vjp(enter, before)[1](dy)
  # The same recurrence from the back: decays are diagonal.
  dstate, after = _states(dfinal, parts, new, marks, reverse=True)
  after, lost = _readable(after, marks)
  pull = jax.vjp(
    lambda chunk, bonus: _local(
      precision, by_products, chunk, marks, before, bonus
    ),
    chunk, bonus,
  )[1]  # fmt: skip
  dchunk, dbonus = pull((dy, after))
  dtokens = {name: _tokens(name, x) for name, x in dchunk.items()}
  return dtokens, dbonus, dstate, lost


def _forward(precision, headwise, chunk, bonus, marks, state):
  """y, the final state and those before the chunks, which are side by side."""
  parts = _parts(precision, headwise, chunk, bonus, marks)
  new = _leave(precision, chunk, parts)
  final, before = _states(state, parts, new, marks)
  read = _readable(before, marks)[0]
  y = _tokens("v", _read(precision, chunk, parts, marks, read))
  return y, final, before


def _at_once_jvp(function, precision, size, primals, tangents):
  """Go round the slices: each has a cotangent as large as what it is cut of."""
  tokens, bonus, marks, *rest = primals
  return jax.jvp(
    lambda tokens, bonus, *rest: function(
      precision, size, tokens, bonus, marks, *rest
    ),
    (tokens, bonus, *rest), (*tangents[:2], *tangents[3:]),
  )  # fmt: skip


def _numbers(tokens, size):
  return jnp.arange(tokens["v"].shape[1] // size, dtype=jnp.int32)


def _chunks_at(i, tokens, size, few=1):
  """The i-th few chunks only, of one or several dictionaries of tokens."""
  span = few * size
  cut = lambda x: lax.dynamic_slice_in_dim(x, i * span, span, 1)
  is_dict = lambda x: isinstance(x, dict)
  chunk = jax.tree.map(
    lambda x: _chunks(jax.tree.map(cut, x), size), tokens, is_leaf=is_dict
  )
  # Fused with a product, a transposition would be done again for each.
  return lax.optimization_barrier(chunk)


def _put(x, new, i):
  """x with the tokens of the i-th chunk, or of the i-th few."""
  return lax.dynamic_update_slice_in_dim(x, new, i * new.shape[1], 1)


def _chunks(tokens, size):
  """Tokens `[B, T, ...]` in chunks, time where it is contracted over."""

  def cut(x, heads):
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    # [B, N, c, G, R, ...] to [N, B, G, R, c, ...]
    return jnp.moveaxis(jnp.moveaxis(x, 2, 2 + heads), 1, 0)

  return {name: cut(x, _HEAD_AXES[name]) for name, x in tokens.items()}


def _tokens(name, x):
  """Chunks of one of the tokens' arrays as `[B, T, ...]`."""
  x = jnp.moveaxis(jnp.moveaxis(x, 0, 1), 2 + _HEAD_AXES[name], 2)
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def _readable(states, marks):
  return (states, None) if marks is None else finite_states(states)


def _one(xs):
  return jax.tree.map(lambda x: x[None], xs)


def _local(precision, headwise, chunk, marks, before, bonus):
  """y of chunks and the states after them, of the states before them."""
  parts = _parts(precision, headwise, chunk, bonus, marks)
  y = _read(precision, chunk, parts, marks, before)
  new = _leave(precision, chunk, parts)
  return y, _after(before, parts["all"], new, _keep(marks))


def _states(state, parts, new, marks, *, reverse=False):
  """The last state, and for each chunk the one that it starts from."""
  step = lambda state, xs: (_after(state, *xs), state)
  xs = (parts["all"], new, _keep(marks))
  return lax.scan(step, state, xs, reverse=reverse, unroll=_FEW)


def _keep(marks):
  return None if marks is None else marks["keep"]


def _parts(precision, headwise, chunk, bonus, marks):
  """Scores, and decays into a token, out of it and of all the chunk.

  q, k `[N, B, G, c, K]`, v `[N, B, G, R, c, V]`, log_a `[N, B, G, R, c]` or
  `[N, B, G, 1, c, K]`; scores `[N, B, G, R, c, c]`.
  """
  q, k, log_a = chunk["q"], chunk["k"], chunk["log_a"]
  before = bonus is not None
  by_key = log_a.ndim > chunk["v"].ndim - 1
  if by_key:
    levels, into, out, total = halvings(log_a, before=before)
  else:
    decay, into, out, total = headwise(log_a[..., None], before=before)
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
    if marks is not None:
      scores = jnp.where(marks["pair"], scores, jnp.zeros_like(scores))
  else:
    scores = _product(precision, "...ik,...jk->...ij", q, k)[:, :, :, None]
    # First, for a pair that never meets may overflow, and inf · 0 is NaN.
    met = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None, None, None]
    if marks is not None:
      met = met & marks["pair"]
    scores = jnp.where(met, scores, jnp.zeros_like(scores))
    scores = scores * decay
    if before:
      scores = jnp.where(diagonal, now, scores)
  if marks is not None:
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
  if into.shape[3] > 1:
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
  if out.shape[3] > 1:
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
