"""The time-invariant scan: one definition, every form, every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from lti_systems import draw, in_float64, pulled, system

from ssmjax.ops import (
  lti_scan,
  lti_scan_reference,
  lti_step,
  s4d_kernel,
  zero_order_hold,
)

FORMS = ("associative", "chunked")


def make(shape=(2, 67, 3, 4), kinds="cccr", *, ids=False, skip=True, seed=0):
  """x, a, b, c, D, state and ids; `kinds` of a, b, c and the state."""
  rows, length, channels, width = shape
  rng = np.random.default_rng(seed)
  a, b, c = (
    draw((channels, width), kind, seed + i) for i, kind in enumerate(kinds[:3])
  )
  a = a / (0.1 + np.abs(a))
  a = (a / np.abs(a).max()).astype(a.dtype)
  a[0, 0], a[-1, -1] = 0, 1
  args = dict(
    x=draw((rows, length, channels), "r", seed + 5),
    a=a,
    b=b,
    c=c,
    D=draw((channels,), "r", seed + 6) if skip else None,
    initial_state=draw((rows, channels, width), kinds[3], seed + 7),
  )
  segment_ids = None
  if ids:
    segment_ids = np.cumsum(rng.random(shape[:2]) < 0.12, 1) + 1
    segment_ids[rng.random(shape[:2]) < 0.3] = 0
    segment_ids[-1, 3:] = 0
    segment_ids = segment_ids.astype(np.int32)
  return args, segment_ids


def pull(function, args, ids):
  run = lambda args: function(**args, segment_ids=ids)
  return pulled(run)(args)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  "case",
  [
    pytest.param(
      dict(shape=(2, 1, 3, 4), kinds="crrr"), marks=pytest.mark.nightly
    ),
    pytest.param(
      dict(shape=(1, 64, 2, 3), kinds="rrrr", skip=False),
      marks=pytest.mark.nightly,
    ),
    pytest.param(
      dict(shape=(2, 130, 3, 4), kinds="cccc"), marks=pytest.mark.nightly
    ),
    pytest.param(
      dict(shape=(3, 50, 2, 3), kinds="rrcr", ids=True),
      marks=pytest.mark.nightly,
    ),
    dict(shape=(3, 150, 2, 3), kinds="crcc", ids=True),
  ],
)
def test_every_form_and_gradient_equals_the_definition(case):
  args, ids = make(**case)
  run = functools.partial(pull, lti_scan_reference, ids=ids)
  expected = in_float64(run, args)
  for form in FORMS:
    function = functools.partial(lti_scan, implementation=form)
    actual = quick(functools.partial(pull, function, ids=ids))(args)
    assert_close(actual, expected, "float32", form)


@pytest.mark.usefixtures("strict")
def test_scan_is_the_convolution_by_the_kernel():
  A, B, C, dt = system()
  x = draw((2, 145, 3), "r")
  kernel = np.asarray(s4d_kernel(A, B, C, dt, 145), np.float64)
  y, _ = quick(lti_scan)(x, *zero_order_hold(A, B, dt), C)
  expected = [
    [np.convolve(row[:, d], kernel[d])[:145] for d in range(3)] for row in x
  ]
  assert_close(np.moveaxis(np.asarray(expected), 1, 2), y, "float32")


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  "ids", [pytest.param(False, marks=pytest.mark.nightly), True]
)
def test_two_pieces_and_single_steps_are_the_whole(ids):
  args, ids = make((2, 95, 2, 3), kinds="ccrc", ids=ids)
  if ids is not None:
    # A call continues its state, so the second piece stays in a segment.
    ids[:, 18:] = np.where(ids[:, 18:] > 0, 5, 0)
    ids[:, 10:18] = 5
  x, state = args.pop("x"), args.pop("initial_state")
  run = quick(lti_scan)
  piece = lambda at: dict(
    x=x[:, at], segment_ids=None if ids is None else ids[:, at]
  )
  y, final = run(**piece(slice(None)), **args, initial_state=state)
  first, middle = run(**piece(slice(0, 18)), **args, initial_state=state)
  second, last = run(**piece(slice(18, None)), **args, initial_state=middle)
  whole = (jnp.concatenate([first, second], 1), last)
  assert_close(whole, (y, final), "float32")
  step, outputs = quick(lti_step), []
  for t in range(18, 95):
    y_t, middle = step(**piece(t), **args, state=middle)
    outputs.append(y_t)
  assert_close((jnp.stack(outputs, 1), middle), (second, last), "float32")


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  "form",
  [
    pytest.param("associative", marks=pytest.mark.nightly),
    "chunked",
    "reference",
  ],
)
def test_nan_reaches_neither_from_padding_nor_into_the_next_document(form):
  args, _ = make((1, 160, 2, 3))
  ids = np.repeat([0, 1, 0, 2, 3, 0], [5, 13, 4, 71, 64, 3])[None]
  clean = dict(args, x=args["x"].copy())
  args["x"][0, ids[0] == 0] = np.nan
  args["x"][0, 30] = np.inf
  scan = functools.partial(lti_scan, implementation=form)
  y, final = quick(scan)(**args, segment_ids=ids)
  expected, expected_final = quick(scan)(**clean, segment_ids=ids)
  good = (ids[0] != 2) | (np.arange(160) < 30)
  assert np.isfinite(y[0, good]).all()
  assert_close((y[0, good], final), (expected[0, good], expected_final))
  assert not np.any(y[0, ids[0] == 0])

  def loss(x):
    y, final = scan(**dict(args, x=x), segment_ids=ids)
    keep = jnp.asarray(good)[None, :, None]
    return jnp.where(keep, y, 0).sum() + final.real.sum()

  gradient = quick(jax.grad(loss))(args["x"])
  assert np.isfinite(gradient[0, ids[0] != 2]).all()
  assert not np.any(gradient[0, ids[0] == 0])


@pytest.mark.usefixtures("strict")
def test_packed_documents_are_as_alone_and_a_padded_row_keeps_its_state():
  args, _ = make((2, 140, 2, 3))
  ids = np.zeros((2, 140), np.int32)
  ids[0, 4:75], ids[0, 75:138] = 1, 2
  run = quick(lti_scan)
  y, final = run(**args, segment_ids=ids)
  alone = dict(args, x=args["x"][:1, 75:138], initial_state=None)
  expected, expected_final = run(**alone)
  assert_close((y[:1, 75:138], final[:1]), (expected, expected_final))
  np.testing.assert_array_equal(final[1], args["initial_state"][1])
  assert not np.any(y[1])


@pytest.mark.usefixtures("strict")
def test_bfloat16_has_a_float32_state_and_rounds_once():
  args, ids = make((2, 37, 3, 4), kinds="rrrr", ids=True)
  narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), args)
  wide = jax.tree.map(lambda x: np.asarray(x, np.float32), narrow)
  expected = quick(lti_scan_reference)(**wide, segment_ids=ids)
  for form in (*FORMS, "reference"):
    run = quick(functools.partial(lti_scan, implementation=form))
    y, state = run(**narrow, segment_ids=ids)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(y, expected[0], "bfloat16", form)
    assert_close(state, expected[1], "float32", form)


@pytest.mark.parametrize(
  "ids", [pytest.param(False, marks=pytest.mark.nightly), True]
)
def test_chunked_never_keeps_a_state_for_each_token(ids):
  rows, length, channels, width = 2, 4096, 64, 32
  shape = jax.ShapeDtypeStruct
  weight = shape((channels, width), jnp.complex64)
  x = shape((rows, length, channels), jnp.float32)
  ids = shape((rows, length), jnp.int32) if ids else None

  def loss(x, a, b, c, ids):
    return (lti_scan(x, a, b, c, segment_ids=ids)[0] ** 2).sum()

  lowered = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(
    x, weight, weight, weight, ids
  )
  used = lowered.compile().memory_analysis().temp_size_in_bytes
  assert used < rows * length * channels * width * 8 / 2.5, used


@pytest.mark.nightly
@pytest.mark.usefixtures("strict")
def test_rows_on_a_mesh_and_maps_are_the_same_scan():
  args, ids = make((4, 70, 2, 3), ids=True)
  run = lambda args, ids: lti_scan(**args, segment_ids=ids)
  expected = quick(run)(args, ids)
  stack = functools.partial(jax.tree.map, lambda x: jnp.stack([x, x]))
  mapped = quick(jax.vmap(run))(stack(args), stack(ids))
  assert_close(mapped, stack(expected), "float32")
  devices = jax.devices()[:4]
  mesh = jax.make_mesh((4,), ("r",), (AxisType.Auto,), devices=devices)
  specs = {
    name: P("r") if name in ("x", "initial_state") else P() for name in args
  }

  def loss(run):
    def total(args):
      y, final = run(args, ids)
      return (y**2).sum() + (final * final).real.sum()

    return quick(jax.grad(total))

  whole = loss(run)(args)
  split = jax.shard_map(
    run, mesh=mesh, in_specs=(specs, P("r")), out_specs=P("r")
  )
  assert_close(loss(split)(args), whole, "float32")
  mesh = jax.make_mesh((4,), ("r",), (AxisType.Explicit,), devices=devices)
  place = lambda name, x: jax.device_put(
    x, jax.NamedSharding(mesh, specs[name])
  )
  placed = {name: place(name, x) for name, x in args.items()}
  ids = jax.device_put(ids, jax.NamedSharding(mesh, P("r")))
  assert_close(loss(run)(placed), whole, "float32")


@pytest.mark.nightly
@pytest.mark.usefixtures("strict")
def test_a_second_derivative_is_right_or_names_the_way_out():
  args, _ = make((1, 70, 1, 2), skip=False)

  def loss(scale, form):
    a = args["a"] * scale.astype(np.complex64)
    y, _ = lti_scan(**dict(args, a=a), implementation=form)
    return (y**2).sum()

  second = lambda form: quick(
    jax.grad(jax.grad(functools.partial(loss, form=form)))
  )(jnp.float32(0.9))
  assert_close(second("associative"), second("reference"), "float32")
  with pytest.raises(NotImplementedError, match="associative"):
    second("chunked")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(a=np.ones((3, 5))), "b has shape (3, 4), expected (D=3, N=5)"),
    (dict(x=np.ones((2, 3))), "x has shape (2, 3), expected (B, T, D)"),
    (dict(x=np.ones((2, 0, 3))), "x has no time steps"),
    (dict(x=np.ones((2, 7, 3)) * 1j), "x is complex"),
    (dict(c=np.ones((3, 4), int)), "c has dtype int"),
    (dict(segment_ids=np.ones((2, 67))), "segment_ids has dtype float"),
    (dict(initial_state=np.ones((2, 4))), "initial_state has shape (2, 4)"),
    (dict(implementation="pallas"), "implementation is 'pallas'"),
  ],
)
def test_bad_input_is_named(change, message):
  args, _ = make(kinds="rrrr")
  with pytest.raises(ValueError, match=r"^lti_scan: ") as error:
    lti_scan(**args | change)
  assert message in str(error.value)
