"""The linear recurrence: one definition, every form, every gradient."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ssmjax.ops import linear_scan, linear_scan_reference, linear_step

# None is chunked on CPUs; tests/test_dispatch.py holds it to that.
FORMS = ("associative", "chunked")


def make(shape=(2, 37, 3, 5), share=(), *, kinds="rrr", seed=0, ids=False):
  """a, b, state and ids in float64; `share` are axes of size 1 in a."""
  rng = np.random.default_rng(seed)

  def draw(kind, *shape):
    x = rng.normal(size=shape)
    return x + 1j * rng.normal(size=shape) if kind == "c" else x

  a = draw(kinds[0], *(1 if i in share else n for i, n in enumerate(shape)))
  a = a / (1 + np.abs(a))
  state = draw(kinds[2], shape[0], *shape[2:])
  segment_ids = None
  if ids:
    steps = rng.random(shape[:2]) < 0.15
    segment_ids = np.cumsum(steps, 1) + 1
    segment_ids[rng.random(shape[:2]) < 0.3] = 0
    segment_ids[-1] = 0
  return dict(
    a=a, b=draw(kinds[1], *shape), initial_state=state, segment_ids=segment_ids
  )


def cast(args, dtype):
  """The arguments at a precision; ids stay integers."""

  def one(x):
    if np.issubdtype(x.dtype, np.integer):
      return jnp.asarray(x, jnp.int32)
    if np.iscomplexobj(x):
      return jnp.asarray(x, np.result_type(dtype, np.complex64))
    return jnp.asarray(x, dtype)

  return {k: None if x is None else one(x) for k, x in args.items()}


def pull(function, args):
  """Values, and gradients for cotangents of y and of the final state."""
  floats = {k: v for k, v in args.items() if k != "segment_ids"}

  def run(floats):
    return function(**floats, segment_ids=args["segment_ids"])

  out, vjp = jax.vjp(run, floats)

  def wave(x):
    real = jnp.cos(jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape))
    if jnp.iscomplexobj(x):
      real = lax.complex(real, jnp.flip(real))
    return real.astype(x.dtype)

  return out, vjp(jax.tree.map(wave, out))[0]


@functools.cache
def pulled(form, reverse=False):
  if form == "reference":
    function = functools.partial(linear_scan_reference, reverse=reverse)
  else:
    function = functools.partial(
      linear_scan, implementation=form, reverse=reverse
    )
  return quick(functools.partial(pull, function))


def truth(args, reverse=False):
  with (
    jax.enable_x64(True),
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    return jax.device_get(pulled("reference", reverse)(cast(args, "float64")))


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  ("case", "reverse"),
  [
    (dict(shape=(2, 1)), False),
    (dict(shape=(1, 7, 1, 17), share=(3,), kinds="rcr"), True),
    (dict(shape=(2, 7, 3, 5), share=(0, 1)), False),
    (dict(shape=(2, 13, 3, 2), share=(1, 2, 3), kinds="crr", ids=True), True),
    (dict(shape=(2, 67, 3), share=(2,), ids=True), False),
    (dict(shape=(2, 7, 2), kinds="ccc"), False),
    (dict(shape=(3, 12, 18), kinds="rrc", ids=True), True),
  ],
)
def test_every_form_and_gradient_equals_the_definition(case, reverse):
  args = make(**case)
  expected = truth(args, reverse)
  narrow = cast(args, "float32")
  for form in FORMS:
    actual = pulled(form, reverse)(narrow)
    for name, gradient in actual[1].items():
      assert gradient.dtype == narrow[name].dtype, (form, name)
    assert_close(actual, expected, "float32", form)


@pytest.mark.usefixtures("strict", "x64")
def test_float64_is_kept():
  args = make((2, 13, 3), (1,), kinds="crr", ids=True)
  expected = truth(args)
  for form in FORMS:
    (y, state), gradients = pulled(form)(cast(args, "float64"))
    assert jnp.finfo(y.dtype).bits == jnp.finfo(state.dtype).bits == 64
    assert_close(((y, state), gradients), expected, "float64", form)


@pytest.mark.usefixtures("strict")
def test_bfloat16_has_a_float32_state_and_rounds_once():
  args = cast(make((2, 13, 3), (2,), ids=True), jnp.bfloat16)
  wide = jax.tree.map(
    lambda x: np.asarray(x, np.int32 if x.dtype == "int32" else np.float64),
    args,
  )
  expected = truth(wide)
  for form in (*FORMS, "reference"):
    (y, state), gradients = pulled(form)(args)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(y, expected[0][0], "bfloat16", form)
    # Wave cotangents are rounded too, so the state alone is at full width.
    assert_close(state, expected[0][1], "float32", form)
    assert_close(gradients, expected[1], "bfloat16", form)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("form", FORMS)
def test_two_halves_are_the_whole_and_steps_are_the_scan(form):
  args = cast(make((2, 14, 3), ids=True), "float32")
  # A restart is seen within one call, so no document ends at the cut.
  ids = args["segment_ids"].at[0, 5:9].set(1).at[:, :5].min(1)
  args["segment_ids"] = ids
  scan = functools.partial(linear_scan, implementation=form)
  y, state = scan(**args)
  part = lambda x, s: x[:, s]
  halves, h = [], args["initial_state"]
  for s in (slice(7), slice(7, None)):
    out, h = scan(
      part(args["a"], s),
      part(args["b"], s),
      initial_state=h,
      segment_ids=part(ids, s),
    )
    halves.append(out)
  assert_close((jnp.concatenate(halves, 1), h), (y, state))

  del args["segment_ids"]
  y, state = scan(**args)
  h, outputs = args["initial_state"], []
  for t in range(14):
    out, h = linear_step(args["a"][:, t], args["b"][:, t], state=h)
    outputs.append(out)
  assert_close((jnp.stack(outputs, 1), h), (y, state))


@pytest.mark.usefixtures("strict")
def test_a_step_over_padding_keeps_the_state_to_the_bit():
  args = cast(make((3, 1, 4)), "float32")
  ids = jnp.array([1, 0, 5], jnp.int32)
  a, b = args["a"][:, 0], args["b"][:, 0]
  bad = b.at[1].set(jnp.nan)
  y, state = linear_step(a, bad, state=args["initial_state"], segment_ids=ids)
  clean, _ = linear_step(a, b, state=args["initial_state"])
  np.testing.assert_array_equal(state[1], args["initial_state"][1])
  np.testing.assert_array_equal(y[1], jnp.zeros(4))
  np.testing.assert_array_equal(y[::2], clean[::2])


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("form", FORMS)
def test_past_and_shift_are_respected(form):
  args = cast(make((1, 22, 4)), "float32")
  scan = functools.partial(linear_scan, implementation=form)
  y, state = scan(**args)
  later, _ = scan(**args | dict(b=args["b"].at[:, 20].set(jnp.inf)))
  np.testing.assert_array_equal(later[:, :20], y[:, :20])
  assert not np.isfinite(later[:, 20]).any()
  # Three tokens of a = 1, b = 0 in front only delay what follows.
  front = lambda x, value: jnp.pad(
    x, ((0, 0), (3, 0), (0, 0)), constant_values=value
  )
  delayed, end = scan(
    front(args["a"], 1.0),
    front(args["b"], 0.0),
    initial_state=args["initial_state"],
  )
  assert_close((delayed[:, 3:], end), (y, state))
  backward, start = scan(
    jnp.flip(args["a"], 1),
    jnp.flip(args["b"], 1),
    initial_state=args["initial_state"],
    reverse=True,
  )
  assert_close((jnp.flip(backward, 1), start), (y, state))


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("form", FORMS)
def test_decay_zero_is_the_input_and_decay_one_the_exact_sum(form):
  b = jnp.asarray(np.random.default_rng(0).integers(-9, 9, (1, 300, 4)))
  b = b.astype(jnp.float32)
  scan = functools.partial(linear_scan, implementation=form)
  y, state = scan(jnp.zeros((1, 1, 1)), b)
  np.testing.assert_array_equal(y, b)
  np.testing.assert_array_equal(state, b[:, -1])
  y, state = scan(jnp.ones((1, 1, 1)), b)
  np.testing.assert_array_equal(y, np.cumsum(b, 1))
  np.testing.assert_array_equal(state, np.sum(b, 1))


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("reverse", [False, True])
def test_documents_in_a_row_are_each_alone_whatever_padding_holds(reverse):
  # Padding on the left, in a document, between two, on the right; a row of it.
  ids = jnp.array([[0, 2, 2, 0, 2, 0, 1, 7, 7, 0], [0] * 10], jnp.int32)
  args = cast(make((2, 10, 3)), "float32")
  pad = (ids == 0)[..., None]
  bad = {
    k: jnp.where(pad, v, args[k]) for k, v in (("a", jnp.nan), ("b", jnp.inf))
  }
  dirty = args | bad | dict(segment_ids=ids)
  documents = [[1, 2, 4], [6], [7, 8]]
  for form in (*FORMS, "reference"):
    (y, state), gradients = pulled(form, reverse)(dirty)
    clean = pulled(form, reverse)(args | dict(segment_ids=ids))
    jax.tree.map(np.testing.assert_array_equal, ((y, state), gradients), clean)
    outside = np.asarray(ids == 0)
    assert not np.asarray(y)[outside].any()
    assert not np.asarray(gradients["a"])[outside].any()
    np.testing.assert_array_equal(state[1], args["initial_state"][1])
    order = documents[::-1] if reverse else documents
    for i, tokens in enumerate(order):
      index = np.array(tokens)
      alone, final = linear_scan(
        args["a"][:1, index],
        args["b"][:1, index],
        initial_state=args["initial_state"][:1] if i == 0 else None,
        reverse=reverse,
        implementation="reference",
      )
      assert_close(y[:1, index], alone, what=f"{form} {tokens}")
    assert_close(state[:1], final)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  ("sick", "reverse"),
  [
    pytest.param(
      *case,
      marks=[] if case in ((1, False), (3, True)) else [pytest.mark.nightly],
    )
    for case in itertools.product((1, 2, 3), (False, True))
  ],
)
def test_a_document_that_overflows_stays_alone(sick, reverse):
  ids = jnp.array([[1, 1, 1, 0, 2, 2, 0, 2, 2, 2, 3, 3, 3, 0, 0]], jnp.int32)
  args = cast(make((1, 15, 3), seed=sick), "float32") | dict(segment_ids=ids)
  tokens = np.flatnonzero(ids[0] == sick)
  bad = dict(args)
  # Forward, inf reaches the next document; backward, NaN the one before.
  bad["b"] = bad["b"].at[0, tokens[1], 0].set(jnp.inf)
  bad["a"] = bad["a"].at[0, tokens[0], 1].set(jnp.nan)
  bad["a"] = bad["a"].at[0, tokens, 2].set(jnp.inf)
  first = 3 if reverse else 1
  if sick == first:
    bad["initial_state"] = jnp.full((1, 3), jnp.inf)
  others = np.asarray(ids[0] != sick)
  for form in (*FORMS, "reference"):
    (y, state), gradients = pulled(form, reverse)(bad)
    (clean, end), expected = pulled(form, reverse)(args)
    np.testing.assert_array_equal(y[:, others], clean[:, others])
    assert not np.isfinite(y[:, tokens]).all()
    for name in "ab":
      np.testing.assert_array_equal(
        gradients[name][:, others], expected[name][:, others], form
      )
    if sick != 4 - first:
      np.testing.assert_array_equal(state, end)
    if sick != first:
      name = "initial_state"
      np.testing.assert_array_equal(gradients[name], expected[name])


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  "form", [pytest.param("associative", marks=pytest.mark.nightly), "chunked"]
)
def test_jit_vmap_remat_and_scan_over_layers_agree(form):
  rows = [cast(make((2, 5, 3), (1,), seed=s), "float32") for s in range(3)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *rows)
  run = pulled(form)
  actual = quick(jax.vmap(run.__wrapped__))(stacked)
  for i, row in enumerate(rows):
    assert_close(jax.tree.map(lambda x, i=i: x[i], actual), run(row))

  def deep(a, b, form):
    @jax.checkpoint
    def layer(b, a):
      y, _ = linear_scan(a, b, implementation=form)
      return y, None

    return (lax.scan(layer, b, a)[0] ** 2).sum()

  args = (stacked["a"], rows[0]["b"])
  gradient = lambda form: quick(
    jax.grad(functools.partial(deep, form=form), (0, 1))
  )(*args)
  assert_close(gradient(form), gradient("reference"))


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  "kind",
  [pytest.param(AxisType.Auto, marks=pytest.mark.nightly), AxisType.Explicit],
)
def test_sharded_gradients_equal_those_of_one_device(kind):
  mesh = jax.make_mesh((4, 2), ("data", "seed"), axis_types=(kind,) * 2)
  args = cast(make((4, 3, 2), (0, 1), ids=True), "float32")
  ids = args.pop("segment_ids")
  spec = dict(a=P(), b=P("data"), initial_state=P("data"))

  def loss(args, ids, form):
    y, state = linear_scan(**args, segment_ids=ids, implementation=form)
    return (y**2).sum() + (state**2).sum()

  for form in ("associative", "chunked"):
    one = functools.partial(loss, form=form)
    expected = quick(jax.grad(one))(args, ids)
    shard = functools.partial(
      jax.shard_map, mesh=mesh, in_specs=(spec, P("data"))
    )
    total = lambda *x, one=one: lax.psum(one(*x), "data")
    forms = (
      shard(jax.grad(one), out_specs=spec),
      jax.grad(shard(total, out_specs=P())),
    )
    place = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))
    placed = {k: place(v, spec[k]) for k, v in args.items()}
    with jax.set_mesh(mesh):
      for f in forms:
        assert_close(quick(f)(placed, place(ids, P("data"))), expected)


@pytest.mark.usefixtures("strict")
def test_associative_is_differentiated_twice_and_chunked_refuses():
  args = cast(make((1, 5, 2)), "float32")

  def slope(b, form):
    loss = lambda b: (
      linear_scan(**(args | dict(b=b)), implementation=form)[0] ** 3
    ).sum()
    return (jax.grad(loss)(b) ** 2).sum()

  second = lambda form: quick(jax.grad(functools.partial(slope, form=form)))(
    args["b"]
  )
  assert_close(second("associative"), second("reference"))
  with pytest.raises(NotImplementedError, match="'associative'"):
    second("chunked")
  with pytest.raises(NotImplementedError, match="'associative'"):
    jax.jvp(functools.partial(slope, form="chunked"), *[(args["b"],)] * 2)


def test_a_second_call_compiles_nothing():
  args = cast(make((1, 6, 2), ids=True), "float32")
  from ssmjax.ops.scan import _linear_scan

  _, state = linear_scan(**args)
  size = _linear_scan._cache_size()
  weak = jnp.asarray(0.5) * args["b"]
  linear_scan(**args | dict(b=weak, initial_state=state))
  assert _linear_scan._cache_size() == size


def test_backward_keeps_no_copy_of_what_it_reads():
  args = cast(make((1, 512, 256)), "float32")

  def run(args, cotangents):
    scan = lambda a, b, h: linear_scan(
      a, b, initial_state=h, implementation="chunked"
    )
    return jax.vjp(scan, args["a"], args["b"], args["initial_state"])[1](
      cotangents
    )

  out = (args["b"], args["initial_state"])
  compiled = jax.jit(run).lower(args, out).compile()
  temporary = compiled.memory_analysis().temp_size_in_bytes
  # y, which forward keeps, and no more than one array of its size.
  assert temporary <= 2.1 * args["b"].nbytes


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    (dict(b=jnp.ones(2)), r"b has shape \(2,\), expected \(B, T, ...\)"),
    (dict(a=jnp.ones((2, 3))), r"a has shape \(2, 3\), expected \(2, 3, 4\)"),
    (dict(a=jnp.ones((2, 2, 4))), r"Add axes with a\[..., None\]"),
    (dict(b=jnp.ones((2, 0, 4)), a=jnp.ones((1, 1, 1))), "no time steps"),
    (dict(b=jnp.ones((2, 3, 4), jnp.int32)), "b has dtype int32, expected a"),
    (dict(initial_state=jnp.ones((2, 5))), r"expected \(B=2, 4\)"),
    (dict(segment_ids=jnp.ones((2, 4), jnp.int32)), r"expected \(B=2, T=3\)"),
    (dict(segment_ids=jnp.ones((2, 3), bool)), r"mask.astype\(jnp.int32\)"),
    (dict(implementation="fast"), "implementation is 'fast', expected one of"),
  ],
)
def test_errors_name_the_argument_and_what_is_expected(wrong, message):
  right = dict(a=jnp.ones((2, 3, 4)), b=jnp.ones((2, 3, 4)))
  with pytest.raises(ValueError, match=f"^linear_scan: .*{message}"):
    linear_scan(**(right | wrong))


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    (dict(b=jnp.ones(())), r"b has shape \(\), expected \(B, ...\)"),
    (
      dict(state=jnp.ones((2, 5))),
      r"state has shape \(2, 5\), expected \(B=2,",
    ),
    (dict(segment_ids=jnp.ones(3, jnp.int32)), r"segment_ids .* \(B=2\)"),
  ],
)
def test_errors_of_a_step_speak_of_no_time_axis(wrong, message):
  right = dict(a=jnp.ones((2, 4)), b=jnp.ones((2, 4)), state=jnp.ones((2, 4)))
  with pytest.raises(ValueError, match=f"^linear_step: {message}"):
    linear_step(**(right | wrong))
