"""The forward blocks of the chunked selective scan, and what both ways share.

How it is written decides how XLA:CPU compiles it. Three things matter. The
whole nest of loops is one kernel (`one_kernel`), not a dispatch per operation.
States are `[N, W]`: N outer, W channels inner, so each operation is a full
vector. And a chunk's rows are first copied together: rows lie far apart in
memory, and only plain loads in a row hide the wait for each other.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from ssmjax.ops.varying import match_varying

CHUNK = 16  # Steps between kept states.
_FORWARD_STATE = 4096  # Elements of a block's state: half the L1 cache.


def forward_blocks(rows, shared, *, delta_softplus, ones, keep):
  """The forward pass of `selective_fused.fused`.

  With `keep`, states are `[R, chunks, N, D]`, at the chunks' starts.
  """
  dtype = compute_dtype(rows, shared)
  shared = prepare_shared(shared, ones, dtype)
  return one_kernel(_forward, (delta_softplus, keep), rows, shared)


def saved_blocks(rows, shared, *, delta_softplus, ones):
  """The shape of what `forward_blocks` keeps."""
  batch, length, channels = rows["u"].shape
  chunks = -(-length // min(CHUNK, length))
  shape = (batch, chunks, rows["B"].shape[-1], channels)
  return jax.ShapeDtypeStruct(shape, compute_dtype(rows, shared))


@functools.partial(jax.jit, static_argnums=0)
def _forward(static, rows, shared):
  with inside_kernel():
    return _forward_loops(static, rows, shared)


def _forward_loops(static, rows, shared):
  softplus_on, keep = static
  dtype = shared["A"].dtype
  batch, length, channels = rows["u"].shape
  _, states, _ = shared["A"].shape
  width = block_width(channels, states, _FORWARD_STATE)
  chunk = min(CHUNK, length)
  tiles, chunks = -(-channels // width), -(-length // chunk)
  zeros = lambda shape, dtype: match_varying(
    jnp.zeros(shape, dtype), rows["u"]
  )[0]

  def block(i, out):
    b, tile = lax.div(i, np.int32(tiles)), lax.rem(i, np.int32(tiles))
    # The last tile is moved back to fit; what it shares is computed twice.
    d = jnp.minimum(tile * width, channels - width)
    own = block_of_shared(shared, b, d, batch, width)
    exp, _ = exponential(dtype)

    def body(j, carry):
      h, y, *kept = carry
      first = j * chunk
      start = jnp.minimum(first, length - chunk)
      token = load_chunk(rows, own, b, start, d, chunk, width, dtype)
      token = forward_rows(token, own, softplus_on)
      if keep:
        kept = [put(kept[0], h[None, None], (b, j, 0, d))]

      def step(k, carry):
        h, y = carry
        row = lambda name: take(token[name], k)
        if "restart" in token:
          h = jnp.where(row("restart"), jnp.zeros_like(h), h)
        h = exp(row("dt")[None] * own["A"]) * h
        h = lax.optimization_barrier(h + _outer(row("B"), row("dx")))
        out = contract(row("C"), h)
        if "skip" in token:
          out = out + row("skip")
        if "gate" in token:
          out = out * row("gate")
        if "valid" in token:
          # By choice: a padded C is 0, but 0 times a state of NaN is not.
          out = jnp.where(row("valid"), out, jnp.zeros_like(out))
        out = out.astype(y.dtype)[None, None]
        return h, put(y, out, (b, start + k, d))

      h, y = loop(first - start, chunk, step, (h, y))
      return h, y, *kept

    if rows["initial_state"] is None:
      h = zeros((states, width), dtype)
    else:
      h = get(rows["initial_state"], (b, 0, d), (1, states, width))[0]
      h = h.astype(dtype)
    y, final, *kept = out
    h, y, *kept = loop(0, chunks, body, (h, y, *kept))
    return y, put(final, h[None], (b, 0, d)), *kept

  out = (
    zeros((batch, length, channels), rows["u"].dtype),
    zeros((batch, states, channels), dtype),
  )
  if keep:
    out += (zeros((batch, chunks, states, channels), dtype),)
  out = loop(0, batch * tiles, block, out)
  return out if keep else (*out, None)


def one_kernel(function, static, *args):
  """Call a jitted function of arrays, compiled into one kernel on a CPU.

  XLA:CPU runs a loop as a dispatch per operation and step, which here would
  cost as much as the arithmetic. It compiles loops over a few bytes into one
  function instead; these attributes, which it sets itself on those, ask for
  the same. A compiler that does not know them ignores them.
  """
  # XLA folds constants across a call, but its emitter of such a kernel aborts
  # the process where an argument has no reader left. A barrier hides which
  # arguments are constants; it is removed after all folding and costs nothing.
  args = lax.optimization_barrier(args)
  with set_xla_metadata(xla_cpu_small_call="true", inlineable="false"):
    return function(static, *args)


def inside_kernel():
  """Undo `one_kernel` for the operations inside."""
  return set_xla_metadata(xla_cpu_small_call="false", inlineable="true")


def compute_dtype(*trees):
  """Float64 if any array is, else float32."""
  wide = any(x.dtype == np.float64 for x in jax.tree.leaves(trees))
  return np.dtype(np.float64 if wide else np.float32)


def prepare_shared(shared, ones, dtype):
  """Rates in the base of the exponential, zero for the channels that stay."""
  _, base = exponential(dtype)
  A = shared["A"].astype(dtype) * base
  A = jnp.pad(A, ((0, 0), (ones, 0), (0, 0)))
  cast = lambda x: None if x is None else x.astype(dtype)
  return dict(A=A, D=cast(shared["D"]), delta_bias=cast(shared["delta_bias"]))


def block_width(channels, states, limit):
  """How many channels one block has, so that its state has `limit` elements."""
  widest = min(max(limit // states // 16 * 16, 16), 512)
  tiles = -(-channels // widest)
  return min(channels, -(-channels // (tiles * 16)) * 16)


def block_of_shared(shared, b, d, batch, width):
  """A `[N, W]`, D and delta_bias `[W]` of the block at row b, channel d."""
  groups, states, _ = shared["A"].shape
  g = lax.div(b, np.int32(batch // groups))
  flat = lambda x: None if x is None else get(x, (g, d), (1, width))[0]
  return dict(
    A=get(shared["A"], (g, 0, d), (1, states, width))[0],
    D=flat(shared["D"]),
    delta_bias=flat(shared["delta_bias"]),
  )


def load_chunk(rows, own, b, start, d, chunk, width, dtype):
  """The chunk's rows `[K, W]`, `[K, N]` or `[K]`, clean where not valid."""
  del own
  token = {}
  for name in ("u", "delta", "z", "d_y"):
    if rows.get(name) is not None:
      token[name] = get(rows[name], (b, start, d), (1, chunk, width))[0]
  for name in ("B", "C"):
    x = rows[name]
    token[name] = get(x, (b, start, 0), (1, chunk, x.shape[-1]))[0]
  for name in ("direct", "valid", "restart"):
    if rows[name] is not None:
      token[name] = get(rows[name], (b, start), (1, chunk))[0]
  token = lax.optimization_barrier(token)
  clean = lambda x: x
  if "valid" in token:

    def clean(x):
      mask = lax.broadcast_in_dim(token["valid"], x.shape, (0,))
      return jnp.where(mask, x, jnp.zeros_like(x))

  return {
    name: x if x.dtype == bool else clean(x.astype(dtype))
    for name, x in token.items()
  }


def forward_rows(token, own, softplus_on):
  """Everything about a chunk that has no state axis, computed at once."""
  dt, _ = step_size(token, own, softplus_on)
  kept = ("B", "C", "restart", "valid")
  rows = {name: token[name] for name in kept if name in token}
  rows |= dict(dt=dt, dx=dt * token["u"])
  skip = skip_factor(token, own, dt)
  if skip is not None:
    rows["skip"] = skip * token["u"]
  if "z" in token:
    rows["gate"] = token["z"] * sigmoid(token["z"])
  return lax.optimization_barrier(rows)


def step_size(token, own, softplus_on):
  """Δ `[K, W]` and its derivative by delta; both 0 where not valid."""
  x = token["delta"]
  if own["delta_bias"] is not None:
    x = x + own["delta_bias"][None]
  if softplus_on:
    dt, slope = softplus(x), sigmoid(x)
  else:
    dt, slope = x, jnp.ones_like(x)
  if "valid" in token:
    mask = lax.broadcast_in_dim(token["valid"], x.shape, (0,))
    dt = jnp.where(mask, dt, jnp.zeros_like(dt))
    slope = jnp.where(mask, slope, jnp.zeros_like(slope))
  return dt, slope


def skip_factor(token, own, dt):
  """What multiplies u in y without the state: D + direct Δ; None if neither."""
  factor = None if own["D"] is None else own["D"][None]
  if "direct" in token:
    direct = token["direct"][:, None] * dt
    factor = direct if factor is None else factor + direct
  return factor


def exponential(dtype):
  """A function and the factor by which its argument is e's: exp(x) = f(cx)."""
  if dtype == np.float64:
    return jnp.exp, 1.0
  return _exp2, float(np.log2(np.e))


def _exp2(x):
  """2^x to 1e-7, for x below 128; 2^0 is 1 and 2^-127 is 0."""
  # Written as a comparison so that NaN stays and one instruction does it.
  x = jnp.where(x < -127, jnp.full_like(x, -127), x)
  # Adding 1.5 * 2^23 rounds to an integer, held in the low bits; adding 127
  # makes these bits the exponent of a float, once shifted in place.
  magic = np.float32(1.5 * 2**23 + 127)
  rounded = x + magic
  bits = lax.bitcast_convert_type(rounded, jnp.int32)
  scale = lax.bitcast_convert_type(
    lax.shift_left(bits, jnp.full_like(bits, 23)), jnp.float32
  )
  # The integer is read from the bits, because a compiler may take
  # (x + magic) - magic for x: that of jax 0.11.2 does.
  whole = bits - np.float32(magic).view(np.int32)
  x = x - whole.astype(x.dtype)
  # The minimax polynomial of 2^x / 1 on [-1/2, 1/2] whose value at 0 is 1.
  value = jnp.full_like(x, _POLYNOMIAL[0])
  for coefficient in _POLYNOMIAL[1:]:
    value = value * x + np.float32(coefficient)
  return scale * value


_POLYNOMIAL = (
  0.0013264720214902373, 0.009671513139093355, 0.05550733766437114,
  0.2402224207448599, 0.6931469775830689, 1.0,
)  # fmt: skip


def _exp_negative(x):
  """exp(-|x|)."""
  f, base = exponential(x.dtype)
  return f(-base * jnp.abs(x))


def sigmoid(x):
  """1 / (1 + exp(-x))."""
  e = _exp_negative(x)
  return jnp.where(x < 0, e, jnp.ones_like(e)) / (1 + e)


def softplus(x):
  """log(1 + exp(x)), relatively exact for very negative x too."""
  e = _exp_negative(x)
  if x.dtype == np.float64:
    return jnp.maximum(x, 0) + jnp.log1p(e)
  # log(1 + e) = 2 artanh(e / (2 + e)), and e / (2 + e) <= 1/3.
  s = e / (2 + e)
  square = s * s
  series = jnp.full_like(s, 2 / 13)
  for k in (11, 9, 7, 5, 3, 1):
    series = series * square + np.float32(2 / k)
  return jnp.where(x > 0, x, jnp.zeros_like(x)) + series * s


def contract(weights, state):
  """The sum over n of weights `[N]` times state `[N, W]`, as a tree."""
  return tree_sum([weights[n] * state[n] for n in range(state.shape[0])])


def tree_sum(terms):
  """Add a list of arrays in pairs; a reduction here would not be vectors."""
  while len(terms) > 1:
    odd = terms[-1:] if len(terms) % 2 else []
    terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)] + odd
  return terms[0]


def loop(start, stop, body, carry):
  """`lax.fori_loop` whose index is int32 under x64 too."""
  return lax.fori_loop(
    start, stop, lambda i, carry: body(i.astype(jnp.int32), carry), carry
  )


def get(x, start, size):
  """A slice of static size at traced, non-negative indices."""
  return lax.dynamic_slice(x, _int32(start), size, allow_negative_indices=False)


def put(x, update, start):
  """`x` with `update` written at traced, non-negative indices."""
  return lax.dynamic_update_slice(
    x, update, _int32(start), allow_negative_indices=False
  )


def _int32(start):
  return [np.int32(i) if isinstance(i, int) else i for i in start]


def take(x, k):
  """x[k]."""
  return lax.dynamic_index_in_dim(
    x, k, 0, keepdims=False, allow_negative_indices=False
  )


def _outer(a, b):
  return a[:, None] * b[None]
