"""Gated linear attention: definition, laws and contract of both forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ssmjax.ops import (
  gated_linear_attention,
  gated_linear_attention_reference,
  gated_linear_attention_step,
)
from ssmjax.ops.gla_chunked import _marks
from ssmjax.ops.gla_passes import (
  backward_at_once,
  backward_in_turn,
  forward_at_once,
  forward_in_turn,
)

DECAYS = {"key and token": "BTHK", "token": "BTH", "key": "HK", "head": "H"}


def make(
  batch, length, heads=2, keys=5, values=3, *, decay="key and token",
  bonus=False, ids=False, seed=0,
):  # fmt: skip
  """Arguments in float64, with decays of all strengths."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape)
  sizes = dict(B=batch, T=length, H=heads, K=keys)
  args = dict(
    q=draw(batch, length, heads, keys),
    k=draw(batch, length, heads, keys),
    v=draw(batch, length, heads, values),
    initial_state=draw(batch, heads, keys, values),
  )
  if decay is not None:
    log_a = -np.exp(2 * draw(*(sizes[x] for x in DECAYS[decay])) - 2)
    if "token" in decay:
      log_a[:, 5::11], log_a[:, 7::13], log_a[:, 4::9] = -1e4, -np.inf, 0
    args["log_a"] = log_a
  if bonus:
    args["bonus"] = draw(heads, keys)
  if ids:
    numbers = np.cumsum(rng.random((batch, length)) < 0.1, 1) + 1
    numbers[rng.random((batch, length)) < 0.3] = 0
    numbers[-1] = 0
    args["segment_ids"] = numbers
  return args


def cast(args, dtype="float32"):
  """bfloat16 is for activations; decays, bonus and states are float32."""
  wide = "float32" if dtype == jnp.bfloat16 else dtype
  kinds = dict.fromkeys("qkv", dtype) | dict(segment_ids=jnp.int32)
  return {n: jnp.asarray(x, kinds.get(n, wide)) for n, x in args.items()}


def pull(function, args):
  """Values, and gradients for cotangents of y and of the final state."""
  floats = {n: x for n, x in args.items() if n != "segment_ids"}
  out, vjp = jax.vjp(lambda floats: function(**(args | floats)), floats)
  wave = lambda x: jnp.cos(
    jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape)
  ).astype(x.dtype)
  return out, vjp(jax.tree.map(wave, out))[0]


@functools.cache
def pulled(form, **static):
  if form == "reference":
    function = gated_linear_attention_reference
  else:
    function = functools.partial(gated_linear_attention, implementation=form)
  return quick(functools.partial(pull, functools.partial(function, scale=0.5)))


def truth(args):
  with (
    jax.enable_x64(True),
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    wide = {n: np.asarray(x) for n, x in args.items()}
    return jax.device_get(pulled("reference")(cast(wide, "float64")))


def check(args, dtype="float32", form=None):
  args = cast(args, dtype)
  out, gradients = pulled(form)(args)
  assert out[0].dtype == args["v"].dtype
  for name, gradient in gradients.items():
    assert gradient.dtype == args[name].dtype, name
    assert np.isfinite(gradient.astype(jnp.float32)).all(), name
  assert_close((out, gradients), truth(args), dtype)
  return out


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  ("sizes", "options"),
  [
    ((2, 1, 1, 1, 1), dict()),
    pytest.param(
      (2, 1), dict(decay="token", bonus=True), marks=pytest.mark.nightly
    ),
    pytest.param((1, 2), dict(decay="token"), marks=pytest.mark.nightly),
    pytest.param((2, 37, 3, 5, 4), dict(bonus=True), marks=pytest.mark.nightly),
    pytest.param(
      (2, 37, 1, 7, 2), dict(decay="token", ids=True), marks=pytest.mark.nightly
    ),
    pytest.param((2, 150), dict(ids=True), marks=pytest.mark.nightly),
    ((2, 150), dict(decay="token", bonus=True, ids=True)),
    pytest.param(
      (1, 64),
      dict(decay="key", bonus=True, ids=True),
      marks=pytest.mark.nightly,
    ),
    pytest.param(
      (1, 65, 3, 2, 9), dict(decay="head"), marks=pytest.mark.nightly
    ),
    pytest.param(
      (1, 129), dict(decay=None, ids=True), marks=pytest.mark.nightly
    ),
  ],
)
def test_value_and_gradients_equal_the_definition(sizes, options):
  check(make(*sizes, **options))


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  "options",
  [
    dict(ids=True),
    pytest.param(dict(decay="token", bonus=True), marks=pytest.mark.nightly),
  ],
)
def test_bfloat16_has_a_float32_state(options):
  _, state = check(make(2, 70, **options), jnp.bfloat16)
  assert state.dtype == jnp.float32


@pytest.mark.nightly
@pytest.mark.usefixtures("strict", "x64")
def test_float64_is_kept():
  _, state = check(make(1, 70, bonus=True, ids=True), "float64")
  assert state.dtype == jnp.float64


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  "by_key", [False, pytest.param(True, marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize(
  "ids", [pytest.param(False, marks=pytest.mark.nightly), True]
)
def test_chunks_at_once_equal_chunks_in_turn(by_key, ids):
  rng = np.random.default_rng(0)
  draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
  n, b, g, r, c, k, v = 3, 2, 2, 1 if by_key else 3, 16, 5, 4
  tokens = dict(q=draw(b, n * c, g, k), k=draw(b, n * c, g, k))
  tokens["v"] = draw(b, n * c, g, r, v)
  last = (k,) if by_key else ()
  tokens["log_a"] = -jnp.exp(draw(b, n * c, g, r, *last))
  bonus = draw(g, k) if by_key else None
  marks = None
  if ids:
    marks = _marks(jnp.asarray(rng.random((b, n * c)) < 0.05), c)
  state, dy = draw(b, g, r, k, v), draw(b, n * c, g, r, v)
  forward = [
    quick(functools.partial(f, lax.Precision.HIGHEST, c))(
      tokens, bonus, marks, state
    )
    for f in (forward_in_turn, forward_at_once)
  ]
  assert_close(*forward)
  backward = [
    quick(functools.partial(f, lax.Precision.HIGHEST, c))(
      tokens, bonus, marks, forward[0][2], dy, state
    )
    for f in (backward_in_turn, backward_at_once)
  ]
  assert_close(backward[0][:3], backward[1][:3])


@pytest.mark.usefixtures("strict")
def test_gradient_of_the_decay_keeps_its_digits_beside_strong_decays():
  # q·dq - k·dk, summed from the back, would lose what is small in the large.
  args = make(1, 130, 1, 4, 3)
  args["log_a"] = np.full((1, 130, 1, 4), -1e-3)
  args["log_a"][:, 10::20] = -30.0
  args = cast(args)
  _, gradients = pulled(None)(args)
  _, expected = truth(args)
  weak = np.asarray(args["log_a"]) > -1
  for pick in (weak, ~weak):
    actual = np.asarray(gradients["log_a"])[pick]
    assert_close(actual, expected["log_a"][pick], "float32")


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  "packed", [pytest.param(False, marks=pytest.mark.nightly), True]
)
def test_tokens_that_never_meet_may_have_a_product_that_overflows(packed):
  args = make(1, 6, 1, 2, 3, decay="token")
  grow = np.array([1e22, 1, 1, 1, 1e-18, 1e-18])[:, None, None]
  args["q"], args["k"] = args["q"] * grow, args["k"] / grow
  if packed:  # A document asks for what the one before it has written.
    args["q"], args["k"] = args["k"], args["q"]
    args["segment_ids"] = np.array([[1, 1, 1, 2, 2, 2]])
  found = pulled(None)(cast(args))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("by_key", [True, False])
def test_what_a_decay_just_below_one_leaves_after_long_keeps_its_digits(by_key):
  # The float32 nearest to this decay is off by 2.6e-8, so that a loop that
  # multiplies it 8191 times is by 2e-4.
  length, log_a = 8192, np.float32(-1.8279e-4)
  x = jnp.zeros((1, length, 1, 1)).at[0, 0].set(1)
  log_a = jnp.full((1, length, 1) + (1,) * by_key, log_a)
  y, state = quick(gated_linear_attention)(jnp.ones_like(x), x, x, log_a)
  lag = np.arange(length)[None, :, None, None]
  expected = np.exp(np.float64(log_a[0, 0].item()) * lag)
  assert_close((y, state), (expected, expected[:, -1:]), "float32")


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  "decay", ["key and token", pytest.param("token", marks=pytest.mark.nightly)]
)
def test_decay_one_is_the_exact_sum_and_decay_zero_the_last_token(decay):
  rng = np.random.default_rng(0)
  whole = lambda *s: jnp.asarray(rng.integers(-3, 4, s), jnp.float32)
  q, k, v = (whole(1, 200, 2, 3) for _ in "qkv")
  shape = (1, 200, 2, 3) if decay == "key and token" else (1, 200, 2)
  _, state = gated_linear_attention(q, k, v, jnp.zeros(shape))
  expected = np.einsum("bthk,bthv->bhkv", k, v)
  np.testing.assert_array_equal(state, expected)
  y, state = gated_linear_attention(q, k, v, jnp.full(shape, -jnp.inf))
  last = np.asarray(k)[..., None] * np.asarray(v)[..., None, :]
  np.testing.assert_array_equal(state, last[:, -1])
  np.testing.assert_array_equal(y, (q * k).sum(-1, keepdims=True) * v)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  "bonus", [pytest.param(False, marks=pytest.mark.nightly), True]
)
def test_two_halves_are_the_whole_and_steps_are_the_scan(bonus):
  args = make(2, 74, bonus=bonus)
  # Ids are compared within one call, so no document ends at a cut.
  args["segment_ids"] = np.ones((2, 74), int)
  args["segment_ids"][0, 3::5] = 0
  args["segment_ids"][1] = 0
  args = cast(args)
  y, state = gated_linear_attention(**args)
  h, halves, steps = args["initial_state"], [], []
  in_time = ("q", "k", "v", "log_a", "segment_ids")
  for s in (slice(37), slice(37, None)):
    part = {n: args[n][:, s] for n in in_time}
    out, h = gated_linear_attention(**args | part | dict(initial_state=h))
    halves.append(out)
  assert_close((jnp.concatenate(halves, 1), h), (y, state))
  np.testing.assert_array_equal(h[1], args["initial_state"][1])
  rest = {} if not bonus else dict(bonus=args["bonus"])
  step, h = quick(gated_linear_attention_step), args["initial_state"]
  for t in range(74):
    token = {n: args[n][:, t] for n in in_time}
    out, h = step(**token, **rest, state=h)
    steps.append(out)
  assert_close((jnp.stack(steps, 1), h), (y, state))


def slope_by_key(args, k, implementation):
  run = lambda k: gated_linear_attention(
    **args | dict(k=k), implementation=implementation
  )
  return jnp.square(run(k)[0]).sum()


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  "way",
  [
    "jvp",
    *(
      pytest.param(way, marks=pytest.mark.nightly)
      for way in ("jit", "jacfwd", "linearize")
    ),
  ],
)
def test_forward_mode_through_chunks_is_refused_by_name(way):
  args = cast(make(1, 6, decay="token"))
  k, slope = args["k"], lambda k: slope_by_key(args, k, "chunked")
  call = {
    "jvp": lambda: jax.jvp(slope, (k,), (k,)),
    "jit": jax.jit(lambda: jax.jvp(slope, (k,), (k,))),
    "jacfwd": lambda: jax.jacfwd(slope)(k),
    "linearize": lambda: jax.linearize(slope, k)[1](k),
  }[way]
  message = r"^gated_linear_attention: forward-mode .* Pass implementation='ref"
  with pytest.raises(NotImplementedError, match=message):
    call()


@pytest.mark.nightly
@pytest.mark.usefixtures("strict")
def test_gradient_of_a_vmap_is_that_of_a_loop():
  x = jax.random.normal(jax.random.key(0), (3, 1, 9, 2, 4))
  log_a = -jnp.abs(x[..., 0])

  def total(x, over):
    one = lambda x, a: gated_linear_attention(x, x, x, a)[0]
    y = over(one)(x, log_a)
    return jnp.square(y).sum()

  loop = lambda f: (
    lambda *xs: jnp.stack([f(*row) for row in zip(*xs, strict=True)])
  )
  wanted = quick(jax.grad(total), static_argnums=1)(x, loop)
  actual = quick(jax.grad(total), static_argnums=1)(x, jax.vmap)
  assert_close(actual, wanted)


def test_forward_mode_of_the_loop_and_of_all_gradients_is_right():
  args = cast(make(1, 6, decay="token"))
  k = args["k"]
  forward = lambda f: jax.jvp(lambda k: f(args, k, "reference"), (k,), (k,))[1]
  gradient = jax.grad(slope_by_key, 1)(args, k, "chunked")
  assert_close(forward(slope_by_key), (gradient * k).sum())
  over = lambda k: jax.grad(slope_by_key, 1)(args, k, "chunked")
  tangent = quick(lambda k: jax.jvp(over, (k,), (k,))[1])(k)
  assert_close(tangent, forward(jax.grad(slope_by_key, 1)))


@pytest.mark.nightly
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("decay", ["key and token", "token"])
def test_the_future_is_not_seen(decay):
  args = cast(make(1, 90, decay=decay))
  y, _ = gated_linear_attention(**args)
  later = args | {n: args[n].at[:, 40:].add(3) for n in "qkv"}
  actual, _ = gated_linear_attention(**later)
  np.testing.assert_array_equal(actual[:, :40], y[:, :40])
  # Three tokens of decay 1 and key 0 in front only delay what follows.
  front = lambda x: jnp.pad(x, ((0, 0), (3, 0), *((0, 0),) * (x.ndim - 2)))
  args["log_a"] = jnp.maximum(args["log_a"], -2.0)
  expected = gated_linear_attention(**args)
  shifted = args | {n: front(args[n]) for n in ("q", "k", "v", "log_a")}
  y, state = gated_linear_attention(**shifted)
  assert_close((y[:, 3:], state), expected)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  "decay", ["key and token", pytest.param("token", marks=pytest.mark.nightly)]
)
def test_documents_in_a_row_are_each_alone_whatever_padding_holds(decay):
  ids = np.array([[0, 2, 2, 0, 2, 7, 7, 0, 7, 0, 0, 0], [0] * 12])
  args = make(2, 12, decay=decay, bonus=True) | dict(segment_ids=ids)
  args = cast(args)
  fill = dict(q=jnp.inf, k=-jnp.inf, v=jnp.nan, log_a=jnp.nan)
  dirty = dict(args)
  for name, value in fill.items():
    mask = (ids > 0).reshape(2, 12, *(1,) * (args[name].ndim - 2))
    dirty[name] = jnp.where(jnp.asarray(mask), args[name], value)
  for form in (None, "reference"):
    clean, actual = pulled(form)(args), pulled(form)(dirty)
    jax.tree.map(np.testing.assert_array_equal, actual, clean)
    (y, state), gradients = actual
    assert not np.asarray(y)[ids == 0].any()
    for name in fill:
      assert not np.asarray(gradients[name])[ids == 0].any(), name
    np.testing.assert_array_equal(state[1], args["initial_state"][1])
    start = args["initial_state"][:1]
    for index in (np.array([1, 2, 4]), np.array([5, 6, 8])):
      part = {n: args[n][:1, index] for n in fill}
      alone, final = gated_linear_attention_reference(
        **part, bonus=args["bonus"], initial_state=start, scale=0.5
      )
      assert_close(y[:1, index], alone, what=f"{form} ")
      start = jnp.zeros_like(start)
    assert_close(state[:1], final)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  "decay", ["key and token", pytest.param("token", marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize("name", ["q", "k", "v", "log_a", "initial_state"])
def test_a_document_that_is_not_finite_stays_alone(name, decay):
  ids = np.repeat([[1, 2, 0, 2, 3, 4], [1, 3, 3, 3, 4, 5]], 25, 1)
  args = cast(make(2, 150, decay=decay) | dict(segment_ids=ids))
  sick = 1 if name == "initial_state" else 2
  at = 0 if sick == 1 else (0, 40, 1)
  bad = jnp.nan if name == "log_a" else jnp.inf
  wrong = args | {name: args[name].at[at].set(bad)}
  (y, state), gradients = pulled(None)(wrong)
  (clean, end), expected = pulled(None)(args)
  others = (ids != sick) | (np.arange(2)[:, None] == 1)
  np.testing.assert_array_equal(
    np.asarray(y)[others], np.asarray(clean)[others]
  )
  assert not np.isfinite(np.asarray(y)[~others]).all()
  np.testing.assert_array_equal(state, end)
  for n in ("q", "k", "v", "log_a"):
    actual = np.asarray(gradients[n])
    assert_close(actual[others], np.asarray(expected[n])[others])
    assert not np.isfinite(actual[~others]).all()


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  "large", [pytest.param("forward", marks=pytest.mark.nightly), "backward"]
)
def test_a_document_that_overflows_stays_alone(large):
  ids = np.repeat([1, 2, 2, 2, 2, 3, 3, 3], 25)[None]
  args = cast(make(1, 200, decay="head") | dict(segment_ids=ids))
  own = jnp.asarray(ids == 2)[..., None, None]

  def gradients(args, scale):
    def loss(args):
      y, _ = gated_linear_attention(**args, segment_ids=jnp.asarray(ids))
      return (y * jnp.where(own, scale, jnp.ones_like(scale))).sum()

    floats = {n: x for n, x in args.items() if n != "segment_ids"}
    return jax.grad(loss)(floats)

  run, one = quick(gradients), jnp.float32(1)
  expected = run(args, one)
  if large == "forward":
    factor = jnp.where(own, 1e25, 1.0)
    args = args | {n: args[n] * factor for n in "kv"}
    actual = run(args, one)
  else:
    actual = run(args, jnp.float32(jnp.inf))
  others = ids != 2
  for n in "qkv":
    assert_close(
      np.asarray(actual[n])[others], np.asarray(expected[n])[others], what=n
    )
  assert not np.isfinite(np.asarray(actual["q"])[~others]).all()


@pytest.mark.nightly
@pytest.mark.usefixtures("strict")
def test_vmap_and_remat_in_a_scan_over_layers_equal_a_loop():
  rows = [cast(make(2, 20, ids=True, seed=s)) for s in range(2)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *rows)
  actual = quick(jax.vmap(pulled(None).__wrapped__))(stacked)
  for i, row in enumerate(rows):
    expected = pulled("reference")(row)
    assert_close(jax.tree.map(lambda x, i=i: x[i], actual), expected)

  def deep(v, layers, form):
    @jax.checkpoint
    def layer(v, args):
      y, _ = gated_linear_attention(v=v, **args, implementation=form)
      return y, None

    return (lax.scan(layer, v, layers)[0] ** 2).sum()

  layers = {n: stacked[n] for n in ("q", "k", "log_a", "initial_state")}
  gradient = lambda form: quick(
    jax.grad(functools.partial(deep, form=form), (0, 1))
  )(rows[0]["v"], layers)
  assert_close(gradient(None), gradient("reference"))


@pytest.mark.nightly
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  "decay", ["key", pytest.param("token", marks=pytest.mark.nightly)]
)
def test_sharded_gradients_equal_those_of_one_device(decay):
  mesh = jax.make_mesh((4, 2), ("data", "seed"), (AxisType.Auto,) * 2)
  args = cast(make(4, 70, decay=decay, bonus=True, ids=True))
  ids = args.pop("segment_ids")
  shared = ("bonus", "log_a") if decay == "key" else ("bonus",)
  spec = {n: P() if n in shared else P("data") for n in args}

  def loss(args, ids):
    y, state = gated_linear_attention(**args, segment_ids=ids)
    return (y**2).sum() + (state**2).sum()

  expected = quick(jax.grad(loss))(args, ids)
  place = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))
  placed = {n: place(x, spec[n]) for n, x in args.items()}
  ids = place(ids, P("data"))
  shard = functools.partial(
    jax.shard_map, mesh=mesh, in_specs=(spec, P("data"))
  )
  inside = shard(jax.grad(loss), out_specs=spec)
  total = lambda *x: lax.psum(loss(*x), "data")
  outside = jax.grad(shard(total, out_specs=P()))
  # The last is divided by the op itself, over rows and heads.
  for run in (inside, outside, jax.grad(loss)):
    with jax.set_mesh(mesh):
      assert_close(jax.device_get(quick(run)(placed, ids)), expected)


@pytest.mark.nightly
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  "decay", ["key and token", pytest.param("token", marks=pytest.mark.nightly)]
)
def test_second_derivatives_are_right(decay):
  args = cast(make(1, 20, decay=decay, bonus=True))
  floats = {n: args[n] for n in ("q", "k", "v")}
  floats["log_a"] = jnp.maximum(args["log_a"], -3.0)

  def slope(floats, form):
    def loss(floats):
      y, state = gated_linear_attention(**(args | floats), implementation=form)
      return (y**2).sum() + (state**3).sum()

    gradients = jax.grad(loss)(floats)
    return sum((g**2).sum() for g in jax.tree.leaves(gradients))

  second = lambda form: quick(jax.grad(functools.partial(slope, form=form)))(
    floats
  )
  assert_close(second(None), second("reference"))


@pytest.mark.nightly
@pytest.mark.parametrize(
  "decay", ["key and token", pytest.param("token", marks=pytest.mark.nightly)]
)
def test_no_state_for_each_token_is_in_memory(decay):
  args = cast(make(1, 2048, 2, 64, 64, decay=decay))
  compiled = jax.jit(functools.partial(pull, gated_linear_attention))
  memory = compiled.lower(args).compile().memory_analysis()
  states = 4 * 2048 * 2 * 64 * 64
  assert memory.temp_size_in_bytes < states / 5


BAD = [
  (dict(q=jnp.ones((2, 3, 4))), r"q has shape \(2, 3, 4\), expected \(B, T, H"),
  (dict(k=jnp.ones((2, 3, 4, 6))), r"k .*expected \(B=2, T=3, H=4, K=5\)"),
  (dict(v=jnp.ones((2, 3, 3, 6))), r"v .*expected \(B=2, T=3, H=4, V\)"),
  (
    dict(log_a=jnp.ones((2, 3, 5))),
    r"log_a has shape \(2, 3, 5\), expected by",
  ),
  (dict(bonus=jnp.ones((4, 4))), r"bonus .*expected \(H=4, K=5\)"),
  (dict(initial_state=jnp.ones((2, 4, 6, 5))), r"\(B=2, H=4, K=5, V=6\)"),
  (dict(segment_ids=jnp.ones((2, 3))), "segment_ids has dtype float32"),
  (dict(v=jnp.ones((2, 3, 4, 6), jnp.int32)), r"Pass v.astype\(jnp.float32\)"),
  (dict(k=jnp.ones((2, 3, 4, 5), jnp.complex64)), "k is complex, expected"),
  (dict(implementation="pallas"), "implementation is 'pallas', expected one"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_errors_name_the_argument_and_what_is_expected(wrong, message):
  one = jnp.ones((2, 3, 4, 5))
  right = dict(q=one, k=one, v=jnp.ones((2, 3, 4, 6)))
  with pytest.raises(ValueError, match=f"^gated_linear_attention: .*{message}"):
    gated_linear_attention(**(right | wrong))


def test_errors_of_a_step_speak_of_no_time_axis():
  one = jnp.ones((2, 4, 5))
  right = dict(q=one, k=one, v=one, state=jnp.zeros((2, 4, 5, 5)))
  for log_a in (one, one[:, :, 0], one[:1], one[0, :, 0], None):
    gated_linear_attention_step(**right, log_a=log_a)
  for name, shape, message in (
    ("q", (2, 3, 4, 5), r"expected \(B, H, K\)"),
    ("log_a", (4, 5), r"constant, \(1, 4, 5\) or \(4,\)"),
    ("state", (2, 4, 5), r"expected \(B=2, H=4, K=5, V=5\)"),
  ):
    with pytest.raises(ValueError, match=f"_step: {name} .*{message}"):
      gated_linear_attention_step(**(right | {name: jnp.ones(shape)}))


def test_a_sequence_of_no_tokens_is_refused():
  empty = jnp.ones((2, 0, 4, 5))
  with pytest.raises(ValueError, match="q has no time steps"):
    gated_linear_attention(empty, empty, empty)
