"""State space duality: definition, laws and contract of both forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ssmjax.ops import selective_scan, ssd, ssd_reference, ssd_step
from ssmjax.types import Polarization

BOTH = Polarization(ones=1, zeros=1)
REPLACE = Polarization(ones=1, zeros=2, placement="replace")
LEAKING = Polarization(ones=1, zeros=1, zero_decay="authors")
OPTIONS = dict(dt_softplus=True, dt_limits=(0.05, 2.0))


def make(
  batch, length, heads=4, groups=2, width=3, states=5, *, ids=False,
  without=(), wide_skip=False, polarization=None, seed=0,
):  # fmt: skip
  """Arguments in float64; `heads` are those of A."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape)
  total = (polarization or Polarization()).total(heads)
  args = dict(
    x=draw(batch, length, total, width),
    dt=draw(batch, length, total) * 2,
    A=-np.exp(2 * draw(heads)),
    B=draw(batch, length, groups, states),
    C=draw(batch, length, groups, states),
    D=draw(total, width) if wide_skip else draw(total),
    z=draw(batch, length, total, width),
    dt_bias=draw(total),
    initial_state=draw(batch, total, width, states),
  )
  args = {n: x for n, x in args.items() if n not in without}
  if ids:
    numbers = np.cumsum(rng.random((batch, length)) < 0.1, 1) + 1
    numbers[rng.random((batch, length)) < 0.3] = 0
    numbers[-1] = 0
    args["segment_ids"] = numbers
  return args


def cast(args, dtype="float32"):
  """bfloat16 is for activations; parameters and states are float32."""
  wide = "float32" if dtype == jnp.bfloat16 else dtype
  kinds = dict.fromkeys(("x", "dt", "B", "C", "z"), dtype)
  kinds |= dict(segment_ids=jnp.int32)
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
def pulled(form, polarization=None):
  if form == "reference":
    function = ssd_reference
  else:
    function = functools.partial(ssd, implementation=form)
  options = OPTIONS | dict(polarization=polarization)
  return quick(functools.partial(pull, functools.partial(function, **options)))


def truth(args, polarization=None):
  with (
    jax.enable_x64(True),
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    wide = cast({n: np.asarray(x) for n, x in args.items()}, "float64")
    return jax.device_get(pulled("reference", polarization)(wide))


def check(args, dtype="float32", polarization=None):
  args = cast(args, dtype)
  out, gradients = pulled(None, polarization)(args)
  assert out[0].dtype == args["x"].dtype
  for name, gradient in gradients.items():
    assert gradient.dtype == args[name].dtype, name
    assert np.isfinite(gradient.astype(jnp.float32)).all(), name
  assert_close((out, gradients), truth(args, polarization), dtype)
  return out


PLAIN = ("D", "z", "dt_bias", "initial_state")


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  ("sizes", "options"),
  [
    ((2, 1, 1, 1, 1, 1), dict(without=PLAIN)),
    pytest.param(
      (2, 37, 4, 2), dict(wide_skip=True), marks=pytest.mark.nightly
    ),
    pytest.param((2, 150, 3, 1), dict(ids=True), marks=pytest.mark.nightly),
    pytest.param(
      (1, 65, 3, 3), dict(ids=True, without=("z",)), marks=pytest.mark.nightly
    ),
    ((1, 130, 2, 2), dict(polarization=BOTH, ids=True)),
    pytest.param(
      (2, 20, 4, 1), dict(polarization=REPLACE), marks=pytest.mark.nightly
    ),
    pytest.param(
      (1, 20, 1, 1), dict(polarization=LEAKING), marks=pytest.mark.nightly
    ),
  ],
)
def test_value_and_gradients_equal_the_definition(sizes, options):
  check(make(*sizes, **options), polarization=options.get("polarization"))


@pytest.mark.usefixtures("strict")
@pytest.mark.nightly
def test_bfloat16_has_a_float32_state():
  args = make(2, 70, ids=True, polarization=BOTH, groups=3)
  _, state = check(args, jnp.bfloat16, BOTH)
  assert state.dtype == jnp.float32


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("form", ["chunked", "reference"])
def test_one_value_a_head_is_the_selective_scan(form):
  args = cast(make(2, 30, 3, 1, 1, 5))
  y, state = ssd(**args, dt_softplus=True, implementation=form)
  column = lambda x: x[..., 0]
  rows = {n: column(args[n]) for n in ("x", "z")}
  expected, wanted = selective_scan(
    rows["x"], args["dt"],
    jnp.broadcast_to(args["A"][:, None], (3, 5)), args["B"][:, :, 0],
    args["C"][:, :, 0], args["D"], z=rows["z"], delta_bias=args["dt_bias"],
    delta_softplus=True, initial_state=args["initial_state"][:, :, 0],
    implementation="reference",
  )  # fmt: skip
  assert_close((column(y), state[:, :, 0]), (expected, wanted))


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("form", ["chunked", "reference"])
def test_a_one_head_sums_exactly_and_a_zero_head_has_no_memory(form):
  rng = np.random.default_rng(0)
  whole = lambda *s: jnp.asarray(rng.integers(-3, 4, s), jnp.float32)
  args = dict(
    x=whole(1, 100, 3, 2), dt=jnp.abs(whole(1, 100, 3)), A=-jnp.ones(1),
    B=whole(1, 100, 1, 4), C=whole(1, 100, 1, 4),
  )  # fmt: skip
  run = functools.partial(ssd, polarization=BOTH, implementation=form)
  y, state = run(**args)
  dx = np.asarray(args["dt"])[..., None] * np.asarray(args["x"])
  write = dx[..., None] * np.asarray(args["B"])[:, :, :, None]
  np.testing.assert_array_equal(state[:, 0], write[:, :, 0].sum(1))
  np.testing.assert_array_equal(state[:, 2], write[:, -1, 2])
  alone = (write * np.asarray(args["C"])[:, :, :, None]).sum(-1)
  np.testing.assert_array_equal(y[:, :, 2], alone[:, :, 2])
  # Also where the step is 0, and with finite gradients there.
  gradients = quick(jax.grad(lambda args: sum(x.sum() for x in run(**args))))(
    args | dict(dt=args["dt"].at[:, ::3].set(0))
  )
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


@pytest.mark.usefixtures("strict")
def test_two_halves_are_the_whole_and_steps_are_the_scan():
  args = make(2, 74, 2, polarization=BOTH)
  # Ids are compared within one call, so no document ends at a cut.
  args["segment_ids"] = np.ones((2, 74), int)
  args["segment_ids"][0, 3::5] = 0
  args["segment_ids"][1] = 0
  args, options = cast(args), OPTIONS | dict(polarization=BOTH)
  y, state = ssd(**args, **options)
  h, halves, steps = args["initial_state"], [], []
  in_time = ("x", "dt", "B", "C", "z", "segment_ids")
  for s in (slice(37), slice(37, None)):
    part = {n: args[n][:, s] for n in in_time}
    out, h = ssd(**args | part | dict(initial_state=h), **options)
    halves.append(out)
  assert_close((jnp.concatenate(halves, 1), h), (y, state))
  np.testing.assert_array_equal(h[1], args["initial_state"][1])
  rest = {n: args[n] for n in ("A", "D", "dt_bias")}
  step = quick(functools.partial(ssd_step, **options))
  h = args["initial_state"]
  for t in range(74):
    out, h = step(**{n: args[n][:, t] for n in in_time}, **rest, state=h)
    steps.append(out)
  assert_close((jnp.stack(steps, 1), h), (y, state))


@pytest.mark.usefixtures("strict")
def test_documents_in_a_row_are_each_alone_whatever_padding_holds():
  ids = np.array([[0, 2, 2, 0, 2, 7, 7, 0, 7, 0, 0, 0], [0] * 12])
  args = make(2, 12, 2, polarization=BOTH) | dict(segment_ids=ids)
  args = cast(args)
  fill = dict(x=jnp.inf, dt=jnp.nan, B=-jnp.inf, C=jnp.nan, z=jnp.nan)
  dirty = dict(args)
  for name, value in fill.items():
    mask = (ids > 0).reshape(2, 12, *(1,) * (args[name].ndim - 2))
    dirty[name] = jnp.where(jnp.asarray(mask), args[name], value)
  rest = {n: args[n] for n in ("A", "D", "dt_bias")}
  for form in (None, "reference"):
    clean, actual = (pulled(form, BOTH)(x) for x in (args, dirty))
    jax.tree.map(np.testing.assert_array_equal, actual, clean)
    (y, state), gradients = actual
    assert not np.asarray(y)[ids == 0].any()
    for name in fill:
      assert not np.asarray(gradients[name])[ids == 0].any(), name
    np.testing.assert_array_equal(state[1], args["initial_state"][1])
    start = args["initial_state"][:1]
    for index in (np.array([1, 2, 4]), np.array([5, 6, 8])):
      part = {n: args[n][:1, index] for n in fill}
      alone, final = ssd_reference(
        **part, **rest, **OPTIONS, initial_state=start, polarization=BOTH
      )
      assert_close(y[:1, index], alone, what=f"{form} ")
      start = jnp.zeros_like(start)
    assert_close(state[:1], final)


@pytest.mark.nightly
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("name", ["x", "dt", "B", "C"])
def test_a_document_that_is_not_finite_stays_alone(name):
  ids = np.repeat([1, 2, 2, 0, 2, 3, 3, 4], 12)[None]
  args = cast(make(1, 96) | dict(segment_ids=ids))
  bad = jnp.nan if name == "dt" else jnp.inf
  wrong = args | {name: args[name].at[0, 20, 1].set(bad)}
  (y, state), gradients = pulled(None)(wrong)
  (clean, end), expected = pulled(None)(args)
  others = ids != 2
  assert_close(np.asarray(y)[others], np.asarray(clean)[others])
  assert not np.isfinite(np.asarray(y)[~others]).all()
  assert_close(state, end)
  for n in ("x", "dt", "B", "C", "z"):
    actual = np.asarray(gradients[n])
    assert_close(actual[others], np.asarray(expected[n])[others])


@pytest.mark.nightly
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  "groups",
  [
    pytest.param(1, marks=pytest.mark.nightly),
    2,
    pytest.param(4, marks=pytest.mark.nightly),
  ],
)
def test_arrays_on_a_mesh_are_divided_by_rows_and_heads(groups):
  mesh = jax.make_mesh((2, 2), ("data", "model"), (AxisType.Auto,) * 2)
  args = cast(make(2, 20, 4, groups, ids=True))
  ids = args.pop("segment_ids")
  shared = ("A", "D", "dt_bias")

  def loss(args):
    y, state = ssd(**args, **OPTIONS, segment_ids=ids)
    return (y**2).sum() + (state**2).sum()

  expected = quick(jax.grad(loss))(args)
  place = lambda n: P() if n in shared else P("data")
  placed = {
    n: jax.device_put(x, NamedSharding(mesh, place(n))) for n, x in args.items()
  }
  assert_close(jax.device_get(quick(jax.grad(loss))(placed)), expected)
  rows = {n: place(n) for n in args}

  def part(args, ids):
    y, state = ssd(**args, **OPTIONS, segment_ids=ids)
    return jax.lax.psum((y**2).sum() + (state**2).sum(), "data")

  mapped = jax.shard_map(
    part, mesh=mesh, in_specs=(rows, P("data")), out_specs=P()
  )
  actual = quick(jax.grad(mapped))(placed, jax.device_put(ids))
  assert_close(jax.device_get(actual), expected)


@pytest.mark.nightly
def test_groups_are_not_repeated_in_memory():
  # B and C repeated to 16 heads would be 8 MB each, and 8 MB of gradient.
  args = cast(make(1, 1024, 16, 1, 4, 128, without=PLAIN))
  run = functools.partial(pull, ssd)
  memory = jax.jit(run).lower(args).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 8 * args["B"].nbytes


BAD = [
  (dict(x=jnp.ones((2, 3, 4))), r"x has shape \(2, 3, 4\), expected \(B, T, H"),
  (dict(dt=jnp.ones((2, 3, 5))), r"dt .*expected \(B=2, T=3, H=4\)"),
  (dict(A=jnp.ones(3)), r"x .*expected \(B, T, H=3, P\)"),
  (dict(polarization=BOTH), r"H=6, P\)\. H counts ones=1, the 4 heads of A"),
  (dict(C=jnp.ones((2, 3, 1, 5))), r"C .*expected \(B=2, T=3, G=2, N=5\)"),
  (dict(D=jnp.ones((4, 5))), r"D .*expected \(H=4, P=6\)"),
  (dict(dt_limits=(1.0, 0.5)), r"dt_limits is \(1.0, 0.5\), expected"),
  (dict(initial_state=jnp.ones((2, 4, 5, 6))), r"\(B=2, H=4, P=6, N=5\)"),
  (dict(segment_ids=jnp.ones((2, 3))), "segment_ids has dtype float32"),
  (dict(A=jnp.ones(4, jnp.complex64)), "A is complex, expected a real"),
  (dict(implementation="pallas"), "implementation is 'pallas', expected one"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_errors_name_the_argument_and_what_is_expected(wrong, message):
  group = jnp.ones((2, 3, 2, 5))
  right = dict(
    x=jnp.ones((2, 3, 4, 6)), dt=jnp.ones((2, 3, 4)), A=-jnp.ones(4), B=group,
    C=group,
  )  # fmt: skip
  with pytest.raises(ValueError, match=f"^ssd: .*{message}"):
    ssd(**(right | wrong))


def test_groups_must_divide_heads():
  group = jnp.ones((2, 3, 3, 5))
  with pytest.raises(ValueError, match="B has G=3 groups, expected a divisor"):
    ssd(jnp.ones((2, 3, 4, 6)), jnp.ones((2, 3, 4)), -jnp.ones(4), group, group)


def test_forward_mode_through_chunks_is_refused_by_name():
  args = cast(make(1, 4))
  run = lambda x: ssd(**args | dict(x=x))[0]
  with pytest.raises(NotImplementedError, match=r"^ssd: forward-mode"):
    jax.jvp(run, (args["x"],), (args["x"],))
