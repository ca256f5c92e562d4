"""The delta rule: one definition, its chunks, every gradient."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ssmjax.ops import (
  delta,
  delta_rule,
  delta_rule_reference,
  delta_rule_step,
)

TOKENS = ("q", "k", "v", "beta", "log_a")
# Decays of which exp(Σ) alone, or a difference of sums, would lose some.
EXTREMES = (0.0, -1e-6, -0.1, -3.0, -1e4, -np.inf)


def make(
  shape=(2, 37, 2, 8, 5), *, seed=0, decay="random", state=True, ids=False
):
  """Unit keys, rates of 0 to 2 and the rest, in float64."""
  rng = np.random.default_rng(seed)
  batch, length, heads, keys, values = shape
  head = (batch, length, heads)
  k = rng.normal(size=(*head, keys))
  args = dict(
    q=rng.normal(size=(*head, keys)),
    k=k / np.linalg.norm(k, axis=-1, keepdims=True),
    v=rng.normal(size=(*head, values)),
    beta=2 * rng.random(head),
    log_a=None,
    initial_state=None,
    segment_ids=None,
  )
  if decay == "random":
    args["log_a"] = -np.exp(2 * rng.normal(size=head) - 2)
  elif decay == "extreme":
    args["log_a"] = rng.choice(
      EXTREMES, head, p=(0.5, 0.1, 0.2, 0.1, 0.05, 0.05)
    )
  if state:
    args["initial_state"] = rng.normal(size=(batch, heads, keys, values))
  if ids:
    segments = np.cumsum(rng.random(head[:2]) < 0.1, 1) + 1
    segments[rng.random(head[:2]) < 0.2] = 0
    segments[-1, : length // 2] = 0
    args["segment_ids"] = segments
  return args


def cast(args, dtype):
  """The arguments at a precision; ids stay integers."""
  return {
    k: None
    if x is None
    else jnp.asarray(x, jnp.int32 if k == "segment_ids" else dtype)
    for k, x in args.items()
  }


def pull(function, args):
  """Values, and gradients for cotangents of y and of the final state."""
  floats = {k: v for k, v in args.items() if k != "segment_ids"}

  def run(floats):
    return function(**floats, segment_ids=args["segment_ids"])

  out, vjp = jax.vjp(run, floats)
  wave = lambda x: (
    jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
  ).astype(x.dtype)
  return out, vjp(jax.tree.map(wave, out))[0]


FORMS = ("reference", "chunked")
# What "chunked" is on TPUs and GPUs.
AT_ONCE = "at once"


@functools.cache
def pulled(form):
  if form != AT_ONCE:
    run = functools.partial(delta_rule, implementation=form)
    return quick(functools.partial(pull, run))

  def pull_at_once(args):
    other = lambda *args, cpu, default: default(*args)
    # Not jitted, or it might be found traced for a CPU.
    inside = delta._delta_rule.__wrapped__
    with (
      mock.patch.object(lax, "platform_dependent", other),
      mock.patch.object(delta, "_delta_rule", inside),
    ):
      return pull(delta_rule, args)

  return quick(pull_at_once)


@functools.cache
def _truth():
  return quick(functools.partial(pull, delta_rule_reference))


@functools.cache
def forward():
  return quick(delta_rule)


def truth(args):
  with (
    jax.enable_x64(True),
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    return jax.device_get(_truth()(cast(args, "float64")))


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  "case",
  [
    dict(shape=(2, 1, 1, 3, 2)),
    pytest.param(
      dict(shape=(1, 7, 3, 1, 4), decay=None, state=False, ids=True),
      marks=pytest.mark.nightly,
    ),
    pytest.param(dict(ids=True, decay="extreme"), marks=pytest.mark.nightly),
    dict(shape=(1, 230, 2, 4, 3), ids=True),
    pytest.param(dict(shape=(1, 530, 1, 8, 6)), marks=pytest.mark.nightly),
    pytest.param(
      dict(shape=(2, 1100, 2, 16, 8), ids=True, decay="extreme"),
      marks=pytest.mark.nightly,
    ),
    pytest.param(
      dict(shape=(1, 128, 2, 64, 32), decay=None), marks=pytest.mark.nightly
    ),
  ],
)
@pytest.mark.parametrize("form", ["chunked", AT_ONCE])
def test_chunks_and_gradients_equal_the_definition(case, form):
  args = make(**case)
  narrow = cast(args, "float32")
  actual = pulled(form)(narrow)
  for x in jax.tree.leaves(actual):
    assert x.dtype == jnp.float32
  assert_close(actual, truth(args), "float32")


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  "form", ["chunked", pytest.param(AT_ONCE, marks=pytest.mark.nightly)]
)
def test_equal_keys_at_the_edge_of_stability_are_solved(form):
  # Powers of L reach 10^17 here, and an inverse made of halves loses digits.
  args = make((1, 150, 1, 8, 4), decay=None)
  args["k"][:] = args["k"][:, :1]
  args["beta"][:] = 1.9
  actual = pulled(form)(cast(args, "float32"))
  assert_close(actual, truth(args), "float32")


@pytest.mark.nightly
@pytest.mark.usefixtures("strict", "x64")
def test_float64_is_kept():
  args = make((1, 13, 2, 3, 2), ids=True)
  (y, state), gradients = pulled("chunked")(cast(args, "float64"))
  assert y.dtype == state.dtype == gradients["beta"].dtype == jnp.float64
  assert_close(((y, state), gradients), truth(args), "float64")


@pytest.mark.usefixtures("strict")
@pytest.mark.nightly
def test_bfloat16_has_a_float32_state_and_rounds_once():
  args = cast(make(ids=True), jnp.bfloat16)
  wide = {
    k: x if k == "segment_ids" else np.asarray(x, np.float64)
    for k, x in args.items()
  }
  expected = truth(wide)
  (y, state), gradients = pulled("chunked")(args)
  assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
  assert gradients["log_a"].dtype == jnp.bfloat16
  assert_close(y, expected[0][0], "bfloat16")
  # Wave cotangents are rounded too, so the state alone is at full width.
  assert_close(state, expected[0][1], "float32")
  assert_close(gradients, expected[1], "bfloat16")


@pytest.mark.usefixtures("strict")
def test_two_halves_are_the_whole_and_steps_are_the_rule():
  args = cast(make((2, 14, 2, 3, 5), ids=True), "float32")
  # A restart is seen within one call, so no document ends at the cut.
  ids = args["segment_ids"].at[0, 5:9].set(1).at[:, :5].min(1)
  args["segment_ids"] = ids
  run = quick(delta_rule)
  y, state = run(**args)
  outputs, h = [], args["initial_state"]
  for s in (slice(7), slice(7, None)):
    tokens = {k: args[k][:, s] for k in TOKENS}
    out, h = run(**tokens, initial_state=h, segment_ids=ids[:, s])
    outputs.append(out)
  assert_close((jnp.concatenate(outputs, 1), h), (y, state))

  y, state = run(**args | dict(segment_ids=jnp.ones_like(ids)))
  outputs, h = [], args["initial_state"]
  step = quick(delta_rule_step)
  for t in range(14):
    out, h = step(**{k: args[k][:, t] for k in TOKENS}, state=h)
    outputs.append(out)
  assert_close((jnp.stack(outputs, 1), h), (y, state))


@pytest.mark.usefixtures("strict")
def test_a_step_over_padding_keeps_the_state_to_the_bit():
  args = cast(make((3, 1, 2, 4, 3)), "float32")
  state = args["initial_state"]
  tokens = {k: args[k][:, 0] for k in TOKENS}
  bad = {k: x.at[1].set(jnp.nan) for k, x in tokens.items()}
  ids = jnp.array([1, 0, 5], jnp.int32)
  y, new = delta_rule_step(**bad, state=state, segment_ids=ids)
  clean, _ = delta_rule_step(**tokens, state=state)
  np.testing.assert_array_equal(new[1], state[1])
  assert not np.asarray(y[1]).any()
  np.testing.assert_array_equal(y[::2], clean[::2])


@pytest.mark.usefixtures("strict")
def test_a_unit_key_at_rate_one_reads_back_the_last_value_it_wrote():
  args = cast(make((2, 70, 2, 8, 3), decay=None), "float32")
  args |= dict(q=args["k"], beta=jnp.ones_like(args["beta"]))
  y, _ = quick(delta_rule)(**args)
  assert_close(y, args["v"])


@pytest.mark.usefixtures("strict")
def test_decay_one_is_no_decay_and_decay_zero_no_memory():
  args = cast(make(decay=None), "float32")
  zeros = jnp.zeros_like(args["beta"])
  # One document, so that this is a program that other tests have.
  ids = jnp.ones(zeros.shape[:2], jnp.int32)
  run = lambda log_a: pulled("chunked")(
    args | dict(log_a=zeros + log_a, segment_ids=ids)
  )
  assert_close(run(0.0)[0], quick(delta_rule)(**args))
  for log_a in (-jnp.inf, -1e4):
    (y, _), gradients = run(log_a)
    strength = args["beta"] * (args["q"] * args["k"]).sum(-1)
    assert_close(y, strength[..., None] * args["v"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


@pytest.mark.usefixtures("strict")
def test_what_a_decay_just_below_one_leaves_after_long_keeps_its_digits():
  # As in linear attention, where the test says what would be off.
  length, log_a = 8192, np.float32(-1.8279e-4)
  x = jnp.zeros((1, length, 1, 1)).at[0, 0].set(1)
  rate = jnp.ones((1, length, 1))
  y, state = quick(delta_rule)(jnp.ones_like(x), x, x, rate, log_a * rate)
  lag = np.arange(length)[None, :, None, None]
  expected = np.exp(np.float64(log_a) * lag)
  assert_close((y, state), (expected, expected[:, -1:]), "float32")


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_finite_reaches_no_earlier_token(form):
  args = cast(make(), "float32")
  args["segment_ids"] = jnp.ones((2, 37), jnp.int32)
  run = lambda **args: pulled(form)(args)[0]
  y, _ = run(**args)
  for name in TOKENS:
    bad = args[name].at[0, 20, 0].set(jnp.inf)
    later, state = run(**args | {name: bad})
    np.testing.assert_array_equal(later[1], y[1], name)
    later, state = later[:1], state[:1]
    np.testing.assert_array_equal(later[:, :20], y[:1, :20], name)
    np.testing.assert_array_equal(later[:, :, 1], y[:1, :, 1], name)
    assert not np.isfinite(later[:, 20, 0]).all(), name
    if name != "q":
      assert not np.isfinite(later[:, 21:, 0]).all(-1).any(), name
      assert not np.isfinite(state[:, 0]).all(), name


@pytest.mark.usefixtures("strict")
def test_documents_in_a_row_are_each_alone_whatever_padding_holds():
  # Padding on the left, in a document, between two, on the right; a row of it.
  first = [0, 2, 2, 0, 2, 0, 1, 7, 7]
  ids = jnp.array([first + [0] * 28, [0] * 37], jnp.int32)
  args = cast(make(), "float32")
  padding = np.asarray(ids == 0)
  at = lambda x: jnp.asarray(padding).reshape(2, 37, *(1,) * (x.ndim - 2))
  bad = {k: jnp.where(at(args[k]), jnp.nan, args[k]) for k in TOKENS}
  bad["v"] = jnp.where(at(bad["v"]), jnp.inf, args["v"])
  for form in (*FORMS, AT_ONCE):
    dirty = pulled(form)(args | bad | dict(segment_ids=ids))
    clean = pulled(form)(args | dict(segment_ids=ids))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    (y, state), gradients = dirty
    assert not np.asarray(y)[padding].any()
    for name in TOKENS:
      assert not np.asarray(gradients[name])[padding].any()
    np.testing.assert_array_equal(state[1], args["initial_state"][1])
    for i, tokens in enumerate(([1, 2, 4], [6], [7, 8])):
      index = np.array(tokens)
      alone, final = quick(delta_rule_reference)(
        **{k: args[k][:1, index] for k in TOKENS},
        initial_state=args["initial_state"][:1] if i == 0 else None,
      )
      assert_close(y[:1, index], alone, what=f"{form} {tokens}")
    assert_close(state[:1], final)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  ("form", "sick"),
  [
    *(("chunked", sick) for sick in (1, 2, 3)),
    *(
      pytest.param(form, sick, marks=pytest.mark.nightly)
      for form, sick in (
        *(("reference", x) for x in (1, 2, 3)),
        *((AT_ONCE, x) for x in (1, 3)),
      )
    ),
    (AT_ONCE, 2),
  ],
)
def test_a_document_that_is_not_finite_stays_alone(form, sick):
  # Four chunks; the second document begins in one and ends in the next.
  ends = np.array([60, 75, 90, 130, 200, 230])
  ids = np.repeat([1, 0, 2, 2, 3, 0], np.diff(ends, prepend=0))
  args = cast(make((1, 230, 2, 4, 3)), "float32")
  args["segment_ids"] = jnp.asarray(ids, jnp.int32)[None]
  tokens = np.flatnonzero(ids == sick)
  bad = dict(args)
  bad["v"] = bad["v"].at[0, tokens[1], 0, 0].set(jnp.inf)
  bad["k"] = bad["k"].at[0, tokens[3], 1].set(jnp.nan)
  if sick == 1:
    bad["initial_state"] = args["initial_state"].at[0, 0].set(jnp.inf)
  others = ids != sick
  (y, state), gradients = pulled(form)(bad)
  (clean, end), expected = pulled(form)(args)
  np.testing.assert_array_equal(y[:, others], clean[:, others])
  assert not np.isfinite(y[:, tokens[5:]]).all(-1).any()
  for name in TOKENS:
    np.testing.assert_array_equal(
      gradients[name][:, others], expected[name][:, others], name
    )
    assert not np.isfinite(gradients[name][:, tokens]).all()
  if sick != 3:
    np.testing.assert_array_equal(state, end)
  if sick != 1:
    name = "initial_state"
    np.testing.assert_array_equal(gradients[name], expected[name])


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("name", TOKENS)
def test_what_is_not_finite_in_a_documents_first_token_is_seen(name):
  # Where there is no state yet, a decay of NaN would be masked with it.
  args = cast(make((1, 37, 2, 8, 5), state=False), "float32")
  run = forward()
  # First, within and last in a block of 16.
  for start in (16, 20, 31):
    ids = np.repeat([1, 2, 3], [start, 3, 34 - start])
    args["segment_ids"] = jnp.asarray(ids, jnp.int32)[None]
    y, state = run(**args)
    for value in (jnp.nan, jnp.inf):
      sick = args[name].at[0, start, 0].set(value)
      bad, end = run(**args | {name: sick})
      assert np.isnan(bad[:, ids == 2, 0]).all()
      np.testing.assert_array_equal(bad[:, ids != 2], y[:, ids != 2])
      np.testing.assert_array_equal(bad[:, :, 1], y[:, :, 1])
      np.testing.assert_array_equal(end, state)


@pytest.mark.usefixtures("strict")
def test_a_batch_under_vmap_is_not_run_twice():
  # Its careful run is a branch of `cond`; were its predicate batched, both
  # branches would be taken.
  args = cast(make((1, 5, 1, 2, 2)), "float32")
  two = jax.tree.map(lambda x: jnp.stack([x, x]), args)
  text = lambda f, args: str(jax.make_jaxpr(f)(args))
  run = lambda args: delta_rule(**args)
  alone, batched = text(run, args), text(jax.vmap(run), two)
  assert batched.count("= cond[") == alone.count("= cond[") >= 1
  two["v"] = two["v"].at[0, 0, 1, 0, 0].set(jnp.nan)
  (y, _), (expected, _) = quick(jax.vmap(run))(two), quick(run)(args)
  assert np.isnan(y[0, 0, 1:]).all()
  np.testing.assert_array_equal(y[1], expected)


@pytest.mark.nightly
@pytest.mark.usefixtures("strict")
def test_a_state_that_overflows_reaches_no_later_document():
  args = cast(make((1, 300, 1, 4, 3), decay=None), "float32")
  ids = jnp.asarray(np.repeat([1, 2], [200, 100]), jnp.int32)[None]
  first = np.asarray(ids[0]) == 1
  args |= dict(segment_ids=ids, initial_state=None)
  # Beyond β‖k‖² = 2 the rule diverges, and within 200 tokens past float32.
  wild = args | dict(beta=args["beta"].at[:, :200].set(9.0))
  (y, state), gradients = pulled("chunked")(wild)
  (clean, end), expected = pulled("chunked")(args)
  assert not np.isfinite(y[:, 190:200]).any()
  np.testing.assert_array_equal(y[:, ~first], clean[:, ~first])
  np.testing.assert_array_equal(state, end)
  np.testing.assert_array_equal(
    gradients["k"][:, ~first], expected["k"][:, ~first]
  )


@pytest.mark.nightly
@pytest.mark.usefixtures("strict")
def test_jit_vmap_remat_and_scan_over_layers_agree():
  rows = [cast(make((2, 5, 2, 3, 3), seed=s), "float32") for s in range(2)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *rows)
  run = pulled("chunked")
  actual = quick(jax.vmap(run.__wrapped__))(stacked)
  for i, row in enumerate(rows):
    assert_close(jax.tree.map(lambda x, i=i: x[i], actual), run(row))

  def deep(v, layers, form):
    @jax.checkpoint
    def layer(v, layer):
      y, _ = delta_rule(**layer | dict(v=v), implementation=form)
      return y, None

    return (lax.scan(layer, v, layers)[0] ** 2).sum()

  gradient = lambda form: quick(
    jax.grad(functools.partial(deep, form=form), (0, 1))
  )(rows[0]["v"], stacked)
  assert_close(gradient("chunked"), gradient("reference"))


@pytest.mark.nightly
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  "kind",
  [pytest.param(AxisType.Auto, marks=pytest.mark.nightly), AxisType.Explicit],
)
def test_sharded_gradients_equal_those_of_one_device(kind):
  mesh = jax.make_mesh((4, 2), ("data", "head"), axis_types=(kind,) * 2)
  args = cast(make((4, 9, 2, 3, 2), ids=True), "float32")
  ids = args.pop("segment_ids")
  # One set of decays for all rows, as a layer's constant would be.
  args["log_a"] = args["log_a"][:1]
  spec = {k: P("data") for k in args} | dict(log_a=P())

  def loss(args, ids):
    log_a = jnp.broadcast_to(args["log_a"], args["beta"].shape)
    y, state = delta_rule(**args | dict(log_a=log_a), segment_ids=ids)
    return (y**2).sum() + (state**2).sum()

  expected = quick(jax.grad(loss))(args, ids)
  total = jax.shard_map(
    lambda *x: lax.psum(loss(*x), "data"), mesh=mesh,
    in_specs=(spec, P("data")), out_specs=P(),
  )  # fmt: skip
  place = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))
  placed = {k: place(v, spec[k]) for k, v in args.items()}
  with jax.set_mesh(mesh):
    for f in (jax.grad(total), jax.grad(loss)):
      assert_close(quick(f)(placed, place(ids, P("data"))), expected)


@pytest.mark.usefixtures("strict")
def test_the_reference_is_differentiated_twice_and_chunked_refuses():
  args = cast(make((1, 5, 1, 2, 2)), "float32")

  def slope(k, form):
    loss = lambda k: (
      delta_rule(**(args | dict(k=k)), implementation=form)[0] ** 3
    ).sum()
    return (jax.grad(loss)(k) ** 2).sum()

  second = lambda form: jax.grad(functools.partial(slope, form=form))(args["k"])
  assert np.isfinite(second("reference")).all()
  with pytest.raises(NotImplementedError, match="'reference'"):
    second("chunked")
  of_k = lambda k: delta_rule(**(args | dict(k=k)))[0]
  with pytest.raises(NotImplementedError, match=r"^delta_rule: forward-mode"):
    jax.jvp(of_k, (args["k"],), (args["k"],))
  with pytest.raises(NotImplementedError, match="'reference'"):
    jax.jvp(functools.partial(slope, form="chunked"), *[(args["k"],)] * 2)


def test_a_second_call_compiles_nothing():
  from ssmjax.ops.delta import _delta_rule

  args = cast(make((1, 6, 1, 2, 2), ids=True), "float32")
  _, state = delta_rule(**args)
  size = _delta_rule._cache_size()
  weak = jnp.asarray(0.5) * args["beta"]
  delta_rule(**args | dict(beta=weak, initial_state=state))
  assert _delta_rule._cache_size() == size


@pytest.mark.nightly
def test_no_state_of_a_token_is_in_memory():
  args = cast(make((1, 2048, 1, 32, 32)), "float32")

  def run(args):
    return jax.grad(lambda args: (delta_rule(**args)[0] ** 2).sum())(args)

  floats = {k: v for k, v in args.items() if k != "segment_ids"}
  memory = jax.jit(run).lower(floats).compile().memory_analysis()
  # 32 times v would be the states.
  assert memory.temp_size_in_bytes <= 8 * args["v"].nbytes


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    (dict(q=jnp.ones((2, 3, 4))), r"q has shape \(2, 3, 4\), expected \(B, T,"),
    (dict(k=jnp.ones((2, 3, 1, 5))), r"\(B=2, T=3, H=2, K=5\). Repeat keys"),
    (dict(v=jnp.ones((2, 4, 2, 4))), r"v has .*expected \(B=2, T=3, H=2, P\)"),
    (dict(beta=jnp.ones((2, 3))), r"beta has shape \(2, 3\), expected \(B=2,"),
    (dict(log_a=jnp.ones((2, 3, 2, 5))), "There is one decay for each head"),
    (dict(initial_state=jnp.ones((2, 2, 4, 5))), "It maps keys to values"),
    (dict(q=jnp.ones((2, 3, 2, 5), int)), "q has dtype int32, expected a"),
    (dict(v=jnp.ones((2, 3, 2, 4)) * 1j), r"v is complex.* Pass v.real"),
    (dict(segment_ids=jnp.ones((2, 4), int)), r"expected \(B=2, T=3\)"),
    (dict(segment_ids=jnp.ones((2, 3), bool)), r"mask.astype\(jnp.int32\)"),
    (dict(implementation="pallas"), "implementation is 'pallas', expected one"),
  ],
)
def test_errors_name_the_argument_and_what_is_expected(wrong, message):
  keys, head = jnp.ones((2, 3, 2, 5)), jnp.ones((2, 3, 2))
  right = dict(q=keys, k=keys, v=jnp.ones((2, 3, 2, 4)), beta=head)
  with pytest.raises(ValueError, match=f"^delta_rule: .*{message}"):
    delta_rule(**(right | wrong))


def test_no_time_steps_are_an_error():
  keys, head = jnp.ones((2, 0, 2, 5)), jnp.ones((2, 0, 2))
  with pytest.raises(ValueError, match=r"^delta_rule: q has no time steps"):
    delta_rule(keys, keys, keys, head)


def test_errors_of_a_step_speak_of_no_time_axis():
  keys, head = jnp.ones((2, 2, 5)), jnp.ones((2, 2))
  state = jnp.ones((2, 2, 4, 5))
  with pytest.raises(ValueError, match=r"^delta_rule_step: state .*\(B=2, H=2"):
    delta_rule_step(keys, keys, keys, head, state=state)
