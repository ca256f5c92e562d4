"""The selective scan's door: definition, laws and contract of every form."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from jax import export, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ssmjax.ops import (
  selective,
  selective_scan,
  selective_scan_reference,
  selective_step,
)
from ssmjax.ops.platform_passes import OTHERS, Passes
from ssmjax.ops.selective_chunks import (
  backward_chunks,
  forward_chunks,
  saved_chunks,
)
from ssmjax.types import Polarization

# None is chunked on CPUs; "chunks" is the form of accelerators without a
# kernel, in chunks of at most 8 tokens.
FORMS = ("associative", "chunked", "chunks")
NAMES = (
  "u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state",
  "segment_ids",
)  # fmt: skip
BOTH = Polarization(ones=1, zeros=1)
REPLACE = Polarization(ones=1, zeros=2, placement="replace")


def make(
  batch, length, channels, states, *, polarization=None, kinds="rrrr",
  ids=False, without=(), seed=0,
):  # fmt: skip
  """Arguments in float64; `kinds` tells what of A, B, C, state is complex."""
  rng = np.random.default_rng(seed)

  def draw(*shape, kind="r"):
    x = rng.normal(size=shape)
    return x + 1j * rng.normal(size=shape) if kind == "c" else x

  A = draw(channels, states, kind=kinds[0])
  total = (polarization or Polarization()).total(states)
  args = dict(
    u=draw(batch, length, channels),
    delta=draw(batch, length, channels) - 1,
    A=A - np.abs(A.real) * 2 - 0.1,
    B=draw(batch, length, total, kind=kinds[1]),
    C=draw(batch, length, total, kind=kinds[2]),
    D=draw(channels),
    z=draw(batch, length, channels),
    delta_bias=draw(channels) / 2,
    initial_state=draw(batch, channels, total, kind=kinds[3]),
  )
  for name in without:
    args[name] = None
  args["segment_ids"] = None
  if ids:
    steps = rng.random((batch, length)) < 0.15
    args["segment_ids"] = np.cumsum(steps, 1) + 1
    args["segment_ids"][rng.random((batch, length)) < 0.3] = 0
    args["segment_ids"][-1] = 0
  return args


def cast(args, dtype):
  """bfloat16 is for activations; parameters and states are float32."""
  wide = "float32" if dtype == jnp.bfloat16 else dtype

  def one(name, x):
    if np.issubdtype(x.dtype, np.integer):
      return jnp.asarray(x, jnp.int32)
    if np.iscomplexobj(x):
      return jnp.asarray(x, np.result_type(wide, np.complex64))
    narrow = name in ("u", "delta", "B", "C", "z")
    return jnp.asarray(x, dtype if narrow else wide)

  return {k: None if x is None else one(k, x) for k, x in args.items()}


# What platforms without a kernel take, here on a CPU and in short chunks.
SHORT_CHUNKS = Passes(
  *(
    functools.partial(function, longest=8)
    for function in (forward_chunks, backward_chunks, saved_chunks)
  )
)


def scan(form, args, **static):
  """Run one form through the door."""
  if form != "chunks":
    return selective_scan(**args, implementation=form, **static)
  # Past the door's jit, whose cache would not know of the patch.
  with mock.patch.object(selective, "CHUNKED", {OTHERS: SHORT_CHUNKS}):
    static = dict(delta_softplus=False, polarization=None) | static
    return selective._selective_scan.__wrapped__(
      *map(args.get, NAMES), implementation="chunked", **static
    )


def pull(function, args):
  """Values, and gradients for cotangents of y and of the final state."""
  floats = {
    k: v for k, v in args.items() if v is not None and k != "segment_ids"
  }
  out, vjp = jax.vjp(lambda floats: function(args | floats), floats)

  def wave(x):
    real = jnp.cos(jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape))
    if jnp.iscomplexobj(x):
      real = lax.complex(real, jnp.flip(real))
    return real.astype(x.dtype)

  return out, vjp(jax.tree.map(wave, out))[0]


@functools.cache
def pulled(form, delta_softplus=True, polarization=None):
  static = dict(delta_softplus=delta_softplus, polarization=polarization)
  if form == "reference":
    function = lambda args: selective_scan_reference(**args, **static)
  else:
    function = functools.partial(scan, form, **static)
  return quick(functools.partial(pull, function))


def truth(args, **static):
  with (
    jax.enable_x64(True),
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    return jax.device_get(pulled("reference", **static)(cast(args, "float64")))


def check(args, dtype="float32", forms=FORMS, **static):
  narrow = cast(args, dtype)
  # What the cast rounded away is no error of the scan.
  exact = {
    k: v if v is None or k == "segment_ids" else np.asarray(v).astype(w.dtype)
    for (k, v), w in zip(narrow.items(), args.values(), strict=True)
    if v is None or w is not None
  }
  expected = truth(exact, **static)
  for form in forms:
    out, gradients = pulled(form, **static)(narrow)
    assert out[0].dtype == narrow["u"].dtype
    for name, gradient in gradients.items():
      assert gradient.dtype == narrow[name].dtype, (form, name)
    assert_close((out, gradients), expected, dtype, form)
  return out


PLAIN = ("D", "z", "delta_bias", "initial_state")


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  ("sizes", "options", "forms"),
  [
    ((2, 1, 1, 1), dict(without=PLAIN), FORMS[:2]),
    pytest.param(
      *((1, 7, 1, 17), dict(), FORMS[:2]), marks=pytest.mark.nightly
    ),
    ((2, 37, 3, 16), dict(polarization=BOTH, ids=True), FORMS[1:]),
    pytest.param(
      *((2, 11, 3, 4), dict(polarization=REPLACE, ids=True), FORMS[:2]),
      marks=pytest.mark.nightly,
    ),
    ((1, 300, 2, 3), dict(without=("z", "delta_bias")), FORMS[1:2]),
    ((2, 11, 3, 2), dict(kinds="cccc", ids=True), FORMS[2:]),
    ((1, 5, 2, 2), dict(kinds="rrcr", polarization=BOTH), FORMS[:1]),
    pytest.param(
      *((1, 5, 2, 2), dict(kinds="rcrr", without=("D", "z")), FORMS[1:2]),
      marks=pytest.mark.nightly,
    ),
    ((1, 5, 2, 2), dict(kinds="crrr", without=("z",)), FORMS[1:2]),
  ],
)
def test_every_form_and_gradient_equals_the_definition(sizes, options, forms):
  polarization = options.get("polarization")
  check(make(*sizes, **options), forms=forms, polarization=polarization)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  "polarization",
  [
    Polarization(zeros=2, placement="replace"),
    pytest.param(
      Polarization(ones=2, placement="replace"), marks=pytest.mark.nightly
    ),
    Polarization(ones=1, zeros=1, zero_decay="authors"),
  ],
)
def test_no_learned_channel_and_leaking_ones_equal_the_definition(polarization):
  args = make(1, 5, 2, 2, polarization=polarization, ids=True, seed=1)
  args["segment_ids"] = np.array([[1, 0, 1, 2, 0]])
  check(args, forms=FORMS[1:2], polarization=polarization)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  "form", [pytest.param("associative", marks=pytest.mark.nightly), "chunked"]
)
def test_bfloat16_has_a_float32_state(form):
  args = make(2, 13, 3, 4, polarization=BOTH, ids=True)
  _, state = check(args, jnp.bfloat16, [form], polarization=BOTH)
  assert state.dtype == jnp.float32


@pytest.mark.usefixtures("strict", "x64")
@pytest.mark.parametrize(
  "form", ["chunked", pytest.param("chunks", marks=pytest.mark.nightly)]
)
def test_float64_is_kept(form):
  args = make(2, 9, 3, 4, polarization=BOTH, ids=True)
  _, state = check(args, "float64", [form], polarization=BOTH)
  assert state.dtype == jnp.float64


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  "form", [pytest.param("associative", marks=pytest.mark.nightly), "chunked"]
)
def test_two_halves_are_the_whole_and_steps_are_the_scan(form):
  static = dict(polarization=BOTH, delta_softplus=True)
  # Ids are compared within one call, so no document ends at a cut.
  ids = np.array([[1, 1, 1, 0, 2, 2, 0, 2, 0, 3, 3, 3], [0] * 12])
  args = make(2, 12, 3, 4, polarization=BOTH)
  args = cast(args | dict(segment_ids=ids), "float32")
  in_time = ("u", "delta", "B", "C", "z", "segment_ids")
  run = quick(lambda args: scan(form, args, **static))
  y, state = run(args)
  h, halves = args["initial_state"], []
  for s in (slice(6), slice(6, None)):
    part = {k: args[k][:, s] for k in in_time}
    out, h = run(args | part | dict(initial_state=h))
    halves.append(out)
  assert_close((jnp.concatenate(halves, 1), h), (y, state))

  whole = args | dict(segment_ids=jnp.minimum(args["segment_ids"], 1))
  y, state = run(whole)
  step = quick(lambda args: selective_step(**args, **static))
  rest = {k: v for k, v in args.items() if k != "initial_state"}
  h, outputs = args["initial_state"], []
  for t in range(12):
    token = {k: whole[k][:, t] for k in in_time}
    out, h = step(rest | token | dict(state=h))
    outputs.append(out)
  assert_close((jnp.stack(outputs, 1), h), (y, state))
  np.testing.assert_array_equal(h[1], args["initial_state"][1])


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("form", FORMS)
def test_past_and_shift_are_respected(form):
  args = cast(make(1, 20, 2, 3, polarization=BOTH), "float32")
  run = quick(
    lambda args: scan(form, args, polarization=BOTH, delta_softplus=True)
  )
  y, _ = run(args)
  later, _ = run(args | dict(u=args["u"].at[:, 9:].set(jnp.nan)))
  np.testing.assert_array_equal(later[:, :9], y[:, :9])
  assert np.isnan(later[:, 9:]).all()
  # With Δ = softplus(-∞) = 0 and u = 0 in front, what follows is delayed.
  roll = lambda x: jnp.pad(x, ((0, 0), (3, 0), (0, 0)))[:, :20]
  front = {k: roll(args[k]) for k in ("u", "delta", "B", "C", "z")}
  front["delta"] = front["delta"].at[:, :3].set(-jnp.inf)
  delayed, _ = run(args | front)
  assert_close(delayed[:, 3:], y[:, :17])


@pytest.mark.usefixtures("strict")
def test_rate_zero_is_a_sum_and_a_huge_rate_the_last_token():
  args = cast(make(2, 20, 2, 3, without=PLAIN), "float32")
  args["delta"] = jnp.abs(args["delta"]) + 0.5
  writes = (args["delta"] * args["u"])[..., None] * args["B"][:, :, None]
  for form in FORMS:
    run = quick(functools.partial(scan, form))
    y, state = run(args | dict(A=jnp.zeros_like(args["A"])))
    assert_close(state, np.sum(writes, 1))
    h = np.cumsum(writes, 1)
    assert_close(y, (h * np.asarray(args["C"])[:, :, None]).sum(-1))
    _, state = run(args | dict(A=jnp.full_like(args["A"], -1e30)))
    assert_close(state, writes[:, -1])


@pytest.mark.usefixtures("strict")
def test_documents_in_a_row_are_each_alone_whatever_padding_holds():
  # Padding on the left, in a document, between two, on the right; a row of it.
  ids = np.array([[0, 2, 2, 0, 2, 7, 7, 0, 7, 0, 0, 0], [0] * 12])
  args = make(2, 12, 3, 4, polarization=BOTH)
  args = cast(args | dict(segment_ids=ids), "float32")
  inside = jnp.asarray(ids > 0)
  fill = dict(u=jnp.inf, delta=jnp.nan, B=-jnp.inf, C=jnp.nan, z=jnp.nan)
  fill = {k: jnp.where(inside[..., None], args[k], v) for k, v in fill.items()}
  alone = pulled("reference", polarization=BOTH)
  documents = [np.array([1, 2, 4]), np.array([5, 6, 8])]
  start = [args["initial_state"][:1], jnp.zeros_like(args["initial_state"][:1])]
  expected = []
  for index, h in zip(documents, start, strict=True):
    part = {k: args[k][:1, index] for k in ("u", "delta", "B", "C", "z")}
    part |= dict(initial_state=h, segment_ids=None)
    expected.append(alone(args | part)[0])
  for form in (*FORMS, "reference"):
    run = pulled(form, polarization=BOTH)
    clean, dirty = run(args), run(args | fill)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    (y, state), gradients = dirty
    for name in ("u", "delta", "B", "C", "z"):
      assert not np.asarray(gradients[name])[ids == 0].any(), (form, name)
    assert not np.asarray(y)[ids == 0].any()
    np.testing.assert_array_equal(state[1], args["initial_state"][1])
    for index, (out, _) in zip(documents, expected, strict=True):
      assert_close(y[:1, index], out, what=form)
    assert_close(state[:1], expected[-1][1], what=form)


@pytest.mark.usefixtures("strict")
def test_vmap_and_remat_in_a_scan_over_layers_equal_a_loop():
  rows = [
    cast(make(2, 5, 3, 2, polarization=BOTH, ids=True, seed=s), "float32")
    for s in range(3)
  ]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *rows)
  mapped = pulled(None, polarization=BOTH).__wrapped__
  actual = quick(jax.vmap(mapped))(stacked)
  for i, row in enumerate(rows):
    expected = pulled("reference", polarization=BOTH)(row)
    assert_close(jax.tree.map(lambda x, i=i: x[i], actual), expected)

  def deep(layers, u, form):
    @jax.checkpoint
    def layer(u, args):
      y, _ = scan(
        form, args | dict(u=u), delta_softplus=True, polarization=BOTH
      )
      return y, None

    return (lax.scan(layer, u, layers)[0] ** 2).sum()

  gradient = lambda form: quick(
    jax.grad(functools.partial(deep, form=form), (0, 1), allow_int=True)
  )
  layers = {k: v for k, v in stacked.items() if k not in ("u", "segment_ids")}
  layers["segment_ids"] = None
  assert_close(
    gradient(None)(layers, rows[0]["u"]),
    gradient("reference")(layers, rows[0]["u"]),
  )


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  ("kind", "forms"),
  [
    pytest.param(AxisType.Auto, (None, "chunks"), marks=pytest.mark.nightly),
    (AxisType.Explicit, (None,)),
    pytest.param(
      AxisType.Explicit,
      (None, *FORMS, "reference"),
      marks=pytest.mark.nightly,
    ),
  ],
)
def test_sharded_gradients_equal_those_of_one_device(kind, forms):
  mesh = jax.make_mesh((4, 2), ("data", "seed"), axis_types=(kind,) * 2)
  args = cast(make(4, 5, 2, 2, polarization=BOTH, ids=True), "float32")
  ids = args.pop("segment_ids")
  shared = ("A", "D", "delta_bias")
  spec = {k: P() if k in shared else P("data") for k in args}

  def loss(args, ids, form):
    y, state = scan(
      form, args | dict(segment_ids=ids), delta_softplus=True, polarization=BOTH
    )
    return (y**2).sum() + (state**2).sum()

  place = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))
  placed = (
    {k: place(v, spec[k]) for k, v in args.items()},
    place(ids, P("data")),
  )
  shard = functools.partial(
    jax.shard_map, mesh=mesh, in_specs=(spec, P("data"))
  )
  for form in forms:
    one = functools.partial(loss, form=form)
    if form is None:
      expected = quick(jax.grad(one))(args, ids)
    with jax.set_mesh(mesh):
      inside = shard(jax.grad(one), out_specs=spec)
      assert_close(quick(inside)(*placed), expected, what=f"{form} ")
      if form is None or len(forms) > 2:
        total = lambda *x, one=one: lax.psum(one(*x), "data")
        outside = jax.grad(shard(total, out_specs=P()))
        assert_close(quick(outside)(*placed), expected, what=f"{form} ")


@pytest.mark.usefixtures("strict")
def test_parameters_may_vary_where_the_data_do_not():
  mesh = jax.make_mesh((2,), ("seed",), axis_types=(AxisType.Auto,))
  args = cast(make(2, 4, 2, 2, polarization=BOTH, ids=True), "float32")
  A = jnp.stack([args["A"], 2 * args["A"]])
  rest = {k: v for k, v in args.items() if k != "A"}

  def one(A, rest):
    y, state = selective_scan(A=A[0], **rest, polarization=BOTH)
    return y[None], state[None]

  sharded = jax.shard_map(
    one, mesh=mesh, in_specs=(P("seed"), P()), out_specs=P("seed")
  )
  y, state = quick(sharded)(A, rest)
  for i in range(2):
    expected = selective_scan(
      **(args | dict(A=A[i])), polarization=BOTH, implementation="reference"
    )
    assert_close((y[i], state[i]), expected)


@pytest.mark.usefixtures("strict")
def test_associative_is_differentiated_twice_and_chunked_refuses():
  args = cast(make(1, 4, 2, 2, polarization=BOTH), "float32")
  floats = {k: args[k] for k in ("u", "delta", "A", "B")}

  def slope(floats, form):
    def loss(floats):
      y, _ = scan(form, args | floats, delta_softplus=True, polarization=BOTH)
      return (y**2).sum()

    return sum((g**2).sum() for g in jax.tree.leaves(jax.grad(loss)(floats)))

  second = lambda form: quick(jax.grad(functools.partial(slope, form=form)))(
    floats
  )
  assert_close(second("associative"), second("reference"))
  with pytest.raises(NotImplementedError, match="associative"):
    second("chunked")


@pytest.mark.usefixtures("strict")
def test_a_second_call_compiles_nothing():
  args = cast(make(1, 6, 2, 3, ids=True), "float32")
  _, state = selective_scan(**args)
  size = selective._selective_scan._cache_size()
  weak = jnp.asarray(0.5) * args["u"]
  selective_scan(**(args | dict(u=weak, initial_state=state)))
  assert selective._selective_scan._cache_size() == size


def test_exported_gradients_run_elsewhere(strict):
  args = cast(make(1, 6, 2, 3, polarization=BOTH, ids=True), "float32")
  run = pulled(None, polarization=BOTH).__wrapped__
  exported = export.export(jax.jit(run), platforms=("cpu",))(args)
  assert exported.platforms == ("cpu",)
  exported = export.export(jax.jit(run), platforms=("cpu", "tpu"))(args)
  assert_close(
    exported.call(args), pulled("reference", polarization=BOTH)(args)
  )


def arguments(time=True):
  axes = (2, 3) if time else (2,)
  return dict(
    u=jnp.ones((*axes, 4)),
    delta=jnp.ones((*axes, 4)),
    A=-jnp.ones((4, 5)),
    B=jnp.ones((*axes, 5)),
    C=jnp.ones((*axes, 5)),
  )


BAD = [
  (dict(u=jnp.ones((2, 4))), r"u has shape \(2, 4\), expected \(B, T, D\)"),
  (dict(delta=jnp.ones((2, 3, 5))), r"delta .*expected \(B=2, T=3, D=4\)"),
  (dict(A=jnp.ones(4)), r"A has shape \(4,\), expected \(D, N\)"),
  (dict(A=jnp.ones((3, 5))), r"A has shape \(3, 5\), expected \(D=4, 5\)"),
  (
    dict(B=jnp.ones((2, 3, 6))),
    r"B has shape \(2, 3, 6\), .*\(B=2, T=3, N=5\)",
  ),
  (dict(C=jnp.ones((2, 1, 5))), r"C has shape \(2, 1, 5\), expected"),
  (dict(D=jnp.ones(5)), r"D has shape \(5,\), expected \(D=4\)"),
  (dict(z=jnp.ones((2, 3, 5))), r"z has shape \(2, 3, 5\), expected"),
  (dict(delta_bias=jnp.ones(())), r"delta_bias has shape \(\), expected"),
  (dict(initial_state=jnp.ones((2, 4, 6))), r"expected \(B=2, D=4, N=5\)"),
  (dict(polarization=BOTH), r"N=7\)\. N counts ones=1, the 5 columns of A and"),
  (dict(segment_ids=jnp.ones((2, 3))), r"segment_ids has dtype float32"),
  (dict(segment_ids=jnp.ones((2,), jnp.int32)), r"expected \(B=2, T=3\)"),
  (dict(u=jnp.ones((2, 3, 4), jnp.int32)), r"Pass u.astype\(jnp.float32\)"),
  (dict(z=jnp.ones((2, 3, 4), jnp.complex64)), "z is complex, expected a real"),
  (dict(implementation="best"), "implementation is 'best', expected one of"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_errors_name_the_argument_and_what_is_expected(wrong, message):
  with pytest.raises(ValueError, match=f"^selective_scan: .*{message}"):
    selective_scan(**(arguments() | wrong))


def test_errors_of_a_step_speak_of_no_time_axis():
  right = arguments(time=False) | dict(state=jnp.zeros((2, 4, 5)))
  selective_step(**right)
  for name, shape, expected in (
    ("u", (4,), "(B, D)"),
    ("B", (2, 6), "(B=2, N=5)"),
    ("state", (2, 4, 6), "(B=2, D=4, N=5)"),
  ):
    with pytest.raises(ValueError, match="selective_step") as error:
      selective_step(**(right | {name: jnp.ones(shape)}))
    found = f"{name} has shape {shape}, expected {expected}."
    assert found in str(error.value)


def test_a_sequence_of_no_tokens_is_refused():
  empty = {k: v[:, :0] for k, v in arguments().items() if k != "A"}
  with pytest.raises(ValueError, match="u has no time steps"):
    selective_scan(A=jnp.ones((4, 5)), **empty)
