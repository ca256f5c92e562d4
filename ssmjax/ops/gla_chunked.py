"""Gated linear attention in chunks, as products of matrices.

Within a chunk tokens meet in a matrix of scores `[c, c]`; between chunks only
the states at their boundaries are kept, `[T/c, K, V]`, of which the backward
pass recomputes the inside. `ssd` is this form too, with one decay for a head
and keys shared by a group of heads.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from ssmjax.ops.gla_passes import (
  backward_at_once,
  backward_in_turn,
  forward_at_once,
  forward_in_turn,
)
from ssmjax.ops.quarantine import (
  document_of,
  finite_states,
  reached,
  take_out,
)
from ssmjax.ops.reverse_only import reverse_only
from ssmjax.ops.varying import match_varying
from ssmjax.types import Array, Bool, Float

__all__ = ["gla_chunked"]

# Scores cost c·(K + V) products a token, states 2·K·V: the same at K = V = 64.
_CHUNK = 64


def gla_chunked(
  q: Float[Array, "B T G K"],
  k: Float[Array, "B T G K"],
  v: Float[Array, "B T H V"],
  log_a: Float[Array, "B T H *K"],
  bonus: Float[Array, "H K"] | None,
  state: Float[Array, "B H K V"],
  valid: Bool[Array, "B T"] | None,
  restart: Bool[Array, "B T"] | None,
  *,
  half: bool,
  op: str,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
  """Run the private contract of `gla` and `ssd`: y and the final state.

  Each of the G groups of q and k serves H // G heads one after another (G = H
  for a decay by key or a bonus). Everything is computed and returned in the
  state's dtype; padded tokens may hold anything and their y is 0. With `half`
  products are of the platform's default precision, which is as much as
  arguments in bfloat16 hold. `op` is the public function, for its errors.
  """
  precision = lax.Precision.DEFAULT if half else lax.Precision.HIGHEST
  args = match_varying(q, k, v, log_a, bonus, state, valid, restart)
  mark = functools.partial(reverse_only, op)
  return _scan(precision, *jax.tree.map(mark, args[:6]), *args[6:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(precision, *args):
  return _forward(precision, *args)[0]


def _forward(
  precision, q, k, v, log_a, bonus, state, valid, restart
):  # fmt: skip
  """(y, final), and what the backward pass wants to know."""
  args = (q, k, v, log_a, bonus, state, valid, restart)
  size = _size(v.shape[1])
  tokens, sick = _clean(q, k, v, log_a, valid, restart, state.dtype)
  grouped = (state.shape[0], q.shape[2], -1, *state.shape[2:])
  y, final, before = lax.platform_dependent(
    tokens, bonus, _marks(restart, size), state.reshape(grouped),
    cpu=functools.partial(forward_in_turn, precision, size),
    default=functools.partial(forward_at_once, precision, size),
  )  # fmt: skip
  y, final = y[:, : v.shape[1]].reshape(v.shape), final.reshape(state.shape)
  if restart is not None:
    lost = finite_states(before)[1]
    ill = sick["y"] | _at_tokens(lost, restart, sick["y"], first=True)
    ill = reached(ill, restart)
    y = jnp.where((ill | sick["q"])[..., None], jnp.nan, y)
    final = jnp.where(ill[:, -1, :, None, None], jnp.nan, final)
  if valid is not None:
    y = jnp.where(valid[..., None, None], y, jnp.zeros_like(y))
  return (y, final), (args, before)


def _backward(precision, residuals, cotangents):
  (q, k, v, log_a, bonus, state, valid, restart), before = residuals
  dy, dfinal = cotangents
  if valid is not None:
    dy = jnp.where(valid[..., None, None], dy, jnp.zeros_like(dy))
  if restart is not None:
    dy, sick_dy = take_out(dy)

  size = _size(v.shape[1])

  def clean(q, k, v, log_a):
    return _clean(q, k, v, log_a, valid, restart, state.dtype)

  tokens, pull, sick = jax.vjp(clean, q, k, v, log_a, has_aux=True)
  dtokens, dbonus, dstate, lost_after = lax.platform_dependent(
    tokens, bonus, _marks(restart, size), before,
    _grouped(dy, q.shape[2], size), dfinal.reshape(before.shape[1:]),
    cpu=functools.partial(backward_in_turn, precision, size),
    default=functools.partial(backward_at_once, precision, size),
  )  # fmt: skip
  dq, dk, dv, dlog_a = pull(dtokens)
  dstate = dstate.reshape(state.shape)
  if restart is not None:
    lost = finite_states(before)[1]
    ill = sick["y"] | sick["q"] | sick_dy
    ill |= _at_tokens(lost, restart, ill, first=True)
    ill |= _at_tokens(lost_after, restart, ill, first=False)
    ill = document_of(ill, restart)
    dstate = jnp.where(ill[:, 0, :, None, None], jnp.nan, dstate)
    ill &= valid[..., None]
    of_group = ill.reshape(*ill.shape[:2], q.shape[2], -1).any(-1)
    dq, dk = _spoil(dq, of_group), _spoil(dk, of_group)
    dv, dlog_a = _spoil(dv, ill), _spoil(dlog_a, ill)
    if bonus is not None:
      dbonus = jnp.where(ill.any((0, 1))[:, None], jnp.nan, dbonus)
  return dq, dk, dv, dlog_a, dbonus, dstate, None, None


_scan.defvjp(_forward, _backward)


def _marks(restart, size):
  """Which pairs of a chunk's tokens are of one document, and which ends."""
  if restart is None:
    return None
  restart = _padded(restart.astype(jnp.int32), size)
  restart = restart.reshape(restart.shape[0], -1, size)
  document = jnp.cumsum(jnp.moveaxis(restart, 1, 0), -1)
  row = document[:, :, None, None]  # [N, B, 1, 1, c]
  first, last = row == 0, row == row[..., -1:]
  return {
    "pair": row[..., :, None] == row[..., None, :],
    "from_start": first[..., None],
    "to_end": last[..., None],
    "keep": document[..., -1] == 0,
  }


def _clean(q, k, v, log_a, valid, restart, dtype):
  """Tokens of whole chunks, clean, by group, and which were not finite.

  Padding has no key, no value and decay 1.
  """
  tokens, sick = {}, {}
  size = _size(v.shape[1])
  for name, x in {"q": q, "k": k, "v": v, "log_a": log_a}.items():
    x = x.astype(dtype)
    if valid is not None:
      mask = valid.reshape(*valid.shape, *(1,) * (x.ndim - 2))
      x = jnp.where(mask, x, jnp.zeros_like(x))
    if restart is not None:
      wide = x if x.ndim == 4 else x[..., None]
      clean, bad = take_out(wide, decay=name == "log_a")
      x = clean.reshape(x.shape)
      sick[name] = jnp.repeat(bad, v.shape[2] // bad.shape[2], 2)
    if name in "qk":
      tokens[name] = _padded(x, size)
    else:
      tokens[name] = _grouped(x, q.shape[2], size)
  if restart is None:
    return tokens, None
  ill = sick["k"] | sick["v"] | sick["log_a"]
  return tokens, {"y": ill, "q": sick["q"]}


def _grouped(x, groups, size):
  """`[B, T, H, ...]` as `[B, T', G, R, ...]`."""
  return _padded(x.reshape(*x.shape[:2], groups, -1, *x.shape[3:]), size)


def _padded(x, size):
  """Zeros behind `[B, T, ...]`, to a whole number of chunks."""
  tail = -x.shape[1] % size
  return (
    jnp.pad(x, [(0, 0), (0, tail)] + [(0, 0)] * (x.ndim - 2)) if tail else x
  )


def _spoil(gradient, ill):
  """NaN for the tokens of documents that have one that is not finite."""
  ill = ill.reshape(ill.shape + (1,) * (gradient.ndim - 3))
  return jnp.where(ill, jnp.nan, gradient)


def _at_tokens(lost, restart, like, *, first):
  """States `[N, B, G, R]` as sick tokens: the first or last of a chunk.

  A first token that restarts does not read the state before it; nor does a
  last one reach the state after it, whose chunk then begins anew.
  """
  count, batch = lost.shape[:2]
  length = like.shape[1]
  size = _size(length)
  at = jnp.moveaxis(lost, 0, 1).reshape(batch, count, -1)
  time = jnp.arange(length, dtype=jnp.int32)
  if first:
    hit = time % size == 0
  else:
    hit = (time % size == size - 1) | (time == length - 1)
  sick = jnp.repeat(at, size, 1)[:, :length] & hit[None, :, None]
  return sick & ~restart[..., None] if first else sick


def _size(length):
  """Tokens of a chunk, a power of two."""
  return min(_CHUNK, 1 << (length - 1).bit_length())
