"""The long convolution: one definition, every length, every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from checks import assert_close, quick
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from lti_systems import draw, in_float64, pulled

from ssmjax.ops import (
  causal_conv,
  long_conv,
  long_conv_reference,
  long_conv_step,
  lti_scan,
)

pytestmark = pytest.mark.usefixtures("strict")


def make(shape=(3, 37, 2, 37), *, ids=False, skip=True, state=True):
  """x `[B, T, D]`, a kernel `[L, D]`, D and a state, and ids."""
  rows, length, channels, taps = shape
  rng = np.random.default_rng(0)
  args = dict(
    x=draw((rows, length, channels), "r", 1),
    kernel=draw((taps, channels), "r", 2),
    D=draw((channels,), "r", 3) if skip else None,
    initial_state=draw((rows, taps - 1, channels), "r", 4) if state else None,
  )
  if not ids:
    return args, None
  segment_ids = np.cumsum(rng.random((rows, length)) < 0.12, 1) + 1
  segment_ids[rng.random((rows, length)) < 0.3] = 0
  segment_ids[-1, 3:] = 0
  return args, segment_ids.astype(np.int32)


def pull(function, args, ids):
  run = lambda args: function(**args, segment_ids=ids)
  return pulled(run)(args)


night = functools.partial(pytest.param, marks=pytest.mark.nightly)


@pytest.mark.parametrize(
  "case",
  [
    dict(shape=(2, 37, 2, 50)),
    night(dict(shape=(2, 1, 3, 1))),
    night(dict(shape=(2, 1, 2, 5), ids=True)),
    night(dict(shape=(1, 64, 2, 64), skip=False, state=False)),
    night(dict(shape=(2, 70, 2, 9))),
    night(dict(shape=(3, 33, 2, 1), ids=True)),
    night(dict(shape=(3, 64, 2, 2), ids=True, skip=False)),
    night(dict(shape=(3, 50, 2, 70), ids=True, state=False)),
    dict(shape=(3, 70, 2, 23), ids=True),
    night(dict(shape=(3, 300, 2, 300), ids=True)),
    night(dict(shape=(3, 257, 2, 129), ids=True)),
  ],
)
def test_values_and_gradients_equal_the_definition(case):
  args, ids = make(**case)
  run = functools.partial(pull, long_conv_reference, ids=ids)
  expected = in_float64(run, args)
  actual = quick(functools.partial(pull, long_conv, ids=ids))(args)
  assert_close(actual, expected, "float32")
  for leaf in jax.tree.leaves(actual):
    assert leaf.dtype == jnp.float32


def test_definition_is_the_short_convolution_with_the_taps_reversed():
  args, ids = make((3, 20, 2, 5), ids=True, skip=False)
  del args["D"]
  actual = quick(long_conv_reference)(**args, segment_ids=ids)
  args["weight"] = args.pop("kernel")[::-1]
  assert_close(actual, causal_conv(**args, segment_ids=ids))


@pytest.mark.parametrize(
  ("decay", "packed"),
  [
    (1e-3, False),
    night(0.0, False),
    night(1.0, False),
    night(-1e-3, False),
    night(0.0, True),
    night(1e-3, True),
    night(1.0, True),
  ],
)
def test_long_sequences_keep_float32_accuracy(decay, packed):
  # Kernels that weigh all lags alike, of a few tokens, and one that grows a
  # millionfold.
  length = 16_384
  kernel = draw((length, 1), "r", 1) + 1
  kernel *= np.exp(-decay * np.arange(length, dtype=np.float32))[:, None]
  x = draw((1, length, 1), "r", 2)
  ids, parts = None, [slice(0, length)]
  if packed:
    parts = [slice(0, 5000), slice(5000, 5001), slice(5001, length)]
    ids = np.repeat([1, 2, 3], [5000, 1, length - 5001])[None]
    x[0, parts[0]] *= 1e6
  y, _ = jax.jit(long_conv)(x, kernel, segment_ids=ids)
  for part in parts:
    size = part.stop - part.start
    expected = scipy.signal.fftconvolve(
      x[0, part, 0].astype(np.float64), kernel[:size, 0].astype(np.float64)
    )
    assert_close(y[0, part, 0], expected[:size], "float32", str(part))


def test_convolution_is_its_recurrent_twin():
  rng = np.random.default_rng(0)
  a = (rng.uniform(0.5, 1, (2, 3)) * np.exp(3j * rng.random((2, 3)))).astype(
    np.complex64
  )
  b, c = draw((2, 3), "c", 1), draw((2, 3), "c", 2)
  x, D = draw((2, 90, 2), "r", 3), draw((2,), "r", 4)
  lags = np.arange(90)[:, None, None]
  kernel = (c * b * a.astype(np.complex128) ** lags).sum(-1).real
  y, _ = quick(long_conv)(x, kernel.astype(np.float32), D)
  assert_close(y, quick(lti_scan)(x, a, b, c, D)[0])


@pytest.mark.parametrize("ids", [night(False), True])
def test_two_pieces_and_single_steps_are_the_whole(ids):
  args, ids = make((3, 40, 2, 25), ids=ids)
  if ids is not None:
    # A call continues its state, so the second piece stays in a segment.
    ids[:, 20:] = np.where(ids[:, 20:] > 0, 5, 0)
    ids[:, 10:20] = 5
  x, state = args.pop("x"), args.pop("initial_state")
  run = quick(long_conv)
  piece = lambda at: dict(
    x=x[:, at], segment_ids=None if ids is None else ids[:, at]
  )
  y, final = run(**piece(slice(None)), **args, initial_state=state)
  first, middle = run(**piece(slice(0, 20)), **args, initial_state=state)
  second, last = run(**piece(slice(20, None)), **args, initial_state=middle)
  whole = (jnp.concatenate([first, second], 1), last)
  assert_close(whole, (y, final), "float32")
  step, outputs = quick(long_conv_step), []
  for t in range(20, 40):
    y_t, middle = step(**piece(t), **args, state=middle)
    outputs.append(y_t)
  assert_close((jnp.stack(outputs, 1), middle), (second, last), "float32")


@pytest.mark.parametrize(
  ("taps", "packed"),
  [night(100, True), night(100, False), (7, True), night(7, False)],
)
def test_what_is_not_finite_reaches_only_tokens_that_meet_it(taps, packed):
  args, _ = make((1, 100, 2, taps))
  ids = np.repeat([0, 1, 0, 2, 3, 0], [5, 13, 4, 41, 34, 3])[None]
  ids = ids if packed else None
  clean = {k: v.copy() for k, v in args.items()}
  # The oldest but one of the state, and a token in the midst of a document.
  args["initial_state"][0, 1, 0] = np.nan
  args["x"][0, 30, 1] = np.inf
  if packed:
    args["x"][ids == 0] = np.nan
  y, final = quick(long_conv)(**args, segment_ids=ids)
  expected, _ = quick(long_conv)(**clean, segment_ids=ids)
  bad = ~np.isfinite(
    quick(long_conv_reference)(**args, segment_ids=ids)[0][0]
  )  # fmt: skip
  np.testing.assert_array_equal(~np.isfinite(y[0]), bad)
  assert_close(y[0][~bad], expected[0][~bad])
  if packed:
    assert not np.any(y[0, ids[0] == 0])
    assert np.isfinite(final).all()


@pytest.mark.nightly
@pytest.mark.parametrize("packed", [False, True])
def test_gradient_beside_what_is_not_finite_is_as_without_it(packed):
  args, _ = make((1, 100, 2, 100))
  ids = np.repeat([0, 1, 0, 2, 3, 0], [5, 13, 4, 41, 34, 3])[None]
  ids = ids if packed else None
  clean = {k: v.copy() for k, v in args.items()}
  args["initial_state"][0, 1, 0] = np.nan
  args["x"][0, 30, 1] = np.inf
  bad = ~np.isfinite(quick(long_conv)(**args, segment_ids=ids)[0])

  def loss(args):
    y, _ = long_conv(**args, segment_ids=ids)
    return jnp.where(jnp.asarray(bad), 0, y).sum()

  gradient = quick(jax.grad(loss))(args)
  assert_close(gradient["kernel"], quick(jax.grad(loss))(clean)["kernel"])
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.nightly
def test_packed_documents_are_as_alone_and_a_padded_row_keeps_its_state():
  args, _ = make((2, 90, 2, 90))
  ids = np.zeros((2, 90), np.int32)
  ids[0, 4:45], ids[0, 45:88] = 1, 2
  run = quick(long_conv)
  y, final = run(**args, segment_ids=ids)
  alone = dict(args, x=args["x"][:1, 45:88], initial_state=None)
  expected, expected_final = run(**alone)
  assert_close((y[:1, 45:88], final[:1]), (expected, expected_final))
  np.testing.assert_array_equal(final[1], args["initial_state"][1])
  assert not np.any(y[1])


@pytest.mark.nightly
def test_bfloat16_has_a_float32_state_and_rounds_once():
  args, ids = make(ids=True)
  narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), args)
  wide = jax.tree.map(lambda x: np.asarray(x, np.float32), narrow)
  expected = quick(long_conv_reference)(**wide, segment_ids=ids)
  for form in ("fft", "reference"):
    run = quick(functools.partial(long_conv, implementation=form))
    y, state = run(**narrow, segment_ids=ids)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(y, expected[0], "bfloat16", form)
    assert_close(state, expected[1], "float32", form)


@pytest.mark.parametrize("packed", [False, night(True)])
def test_memory_grows_with_the_sequence_and_not_with_its_square(packed):
  shape = jax.ShapeDtypeStruct
  x = shape((2, 4096, 8), jnp.float32)
  kernel = shape((4096, 8), jnp.float32)
  ids = shape((2, 4096), jnp.int32) if packed else None

  def loss(x, kernel, ids):
    return (long_conv(x, kernel, segment_ids=ids)[0] ** 2).sum()

  lowered = jax.jit(jax.grad(loss, (0, 1))).lower(x, kernel, ids)
  options = {"xla_backend_optimization_level": 0}
  memory = lowered.compile(options).memory_analysis()
  assert memory.temp_size_in_bytes < 40 * 4 * x.size


@pytest.mark.nightly
@pytest.mark.parametrize("ids", [False, True])
def test_rows_and_channels_on_a_mesh_and_maps_are_the_same(ids):
  args, ids = make((4, 40, 2, 20), ids=ids)
  run = lambda args: long_conv(**args, segment_ids=ids)
  expected = quick(run)(args)
  stack = functools.partial(jax.tree.map, lambda x: jnp.stack([x, x]))
  assert_close(quick(jax.vmap(run))(stack(args)), stack(expected), "float32")
  rows = ("x", "initial_state")
  specs = {k: P("r") if k in rows else P() for k in args}

  def gradients(run):
    def total(args):
      y, final = run(args)
      return (y**2).sum() + (final**3).sum()

    return quick(jax.grad(total))

  whole = gradients(run)(args)
  for form in ("fft", "reference"):
    mesh = jax.make_mesh((4,), ("r",), (AxisType.Auto,))
    split = jax.shard_map(
      lambda args, ids, form=form: long_conv(
        **args, segment_ids=ids, implementation=form
      ),
      mesh=mesh,
      in_specs=(specs, P("r")),
      out_specs=P("r"),
    )
    assert_close(
      gradients(lambda args, split=split: split(args, ids))(args), whole
    )
  mesh = jax.make_mesh((4, 2), ("r", "d"), (AxisType.Auto,) * 2)
  with jax.set_mesh(mesh):
    assert_close(gradients(run)(args), whole)
    compiled = jax.jit(run).lower(args).compile().as_text()
  assert "f32[2,1,64]" in compiled or "f32[1,1,64]" in compiled
  kind = (AxisType.Explicit,) * 2
  mesh = jax.make_mesh((4, 2), ("r", "d"), kind)
  place = lambda k, v: jax.device_put(v, jax.NamedSharding(mesh, specs[k]))
  placed = {k: place(k, v) for k, v in args.items()}
  assert_close(gradients(run)(placed), whole)


@pytest.mark.nightly
def test_second_derivative_is_the_definitions():
  args, ids = make((2, 20, 1, 15), ids=True)

  def loss(scale, form):
    x = args["x"] * scale
    y, _ = long_conv(**dict(args, x=x), segment_ids=ids, implementation=form)
    return (y**3).sum()

  second = lambda form: quick(
    jax.grad(jax.grad(functools.partial(loss, form=form)))
  )(jnp.float32(0.9))
  assert_close(second("fft"), second("reference"), "float32")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(kernel=np.ones((37, 5))), "kernel has shape (37, 5), expected (L, D"),
    (dict(kernel=np.ones((0, 2))), "kernel has no taps, expected L >= 1"),
    (dict(x=np.ones((2, 3))), "x has shape (2, 3), expected (B, T, D)"),
    (dict(x=np.ones((2, 0, 2))), "x has no time steps"),
    (dict(x=np.ones((2, 7, 2)) * 1j), "x is complex"),
    (dict(kernel=np.ones((3, 2), int)), "kernel has dtype int"),
    (dict(segment_ids=np.ones((3, 37))), "segment_ids has dtype float"),
    (dict(initial_state=np.ones((3, 37, 2))), "It holds the L-1 = 36 previous"),
    (dict(implementation="chunked"), "implementation is 'chunked'"),
  ],
)
def test_bad_input_is_named(change, message):
  args, _ = make()
  with pytest.raises(ValueError, match=r"^long_conv: ") as error:
    long_conv(**args | change)
  assert message in str(error.value)
