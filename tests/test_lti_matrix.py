"""The time-invariant scan of a matrix: one definition, every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from jax.sharding import PartitionSpec as P
from lti_systems import draw, in_float64, pulled

from ssmjax.ops import (
  bilinear,
  hippo_legs,
  hippo_legs_dplr,
  lti_matrix_scan,
  lti_matrix_scan_reference,
  lti_matrix_step,
  s4_dplr_kernel,
)


def make(shape, *, ids=False, seed=0):
  """x, a, b, c, h₀ and ids; a is a rotation, shrunk by up to a fifth."""
  rows, length, channels, width, outputs = shape
  rng = np.random.default_rng(seed)
  a = np.linalg.qr(rng.normal(size=(channels, width, width)))[0]
  a = a * rng.uniform(0.8, 1, (channels, 1, 1))
  args = dict(
    x=draw((rows, length, channels), "r", seed + 1),
    a=a.astype(np.float32),
    b=draw((channels, width), "r", seed + 2),
    c=draw((channels, outputs, width), "r", seed + 3),
    initial_state=draw((rows, channels, width), "r", seed + 4),
  )
  segment_ids = None
  if ids:
    segment_ids = np.cumsum(rng.random(shape[:2]) < 0.12, 1) + 1
    segment_ids[rng.random(shape[:2]) < 0.3] = 0
    segment_ids[-1, 3:] = 0
    segment_ids = segment_ids.astype(np.int32)
  return args, segment_ids


def pull(function, args, ids):
  return pulled(lambda args: function(**args, segment_ids=ids))(args)


night = functools.partial(pytest.param, marks=pytest.mark.nightly)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  ("shape", "ids"),
  [
    night((2, 1, 3, 4, 1), False),
    night((1, 64, 2, 3, 3), False),
    night((2, 130, 2, 4, 1), False),
    night((3, 50, 1, 3, 2), True),
    ((3, 150, 2, 3, 2), True),
  ],
)
def test_chunks_and_every_gradient_equal_the_definition(shape, ids):
  args, segment_ids = make(shape, ids=ids)
  run = functools.partial(pull, lti_matrix_scan_reference, ids=segment_ids)
  expected = in_float64(run, args)
  actual = quick(functools.partial(pull, lti_matrix_scan, ids=segment_ids))(
    args
  )
  assert_close(actual, expected, jnp.float32)


@pytest.mark.usefixtures("strict")
def test_two_pieces_and_single_steps_are_the_whole():
  args, _ = make((2, 83, 2, 3, 2))
  system = {name: args[name] for name in "abc"}
  x = args["x"]
  y, final = quick(lti_matrix_scan)(**args)
  first, state = quick(lti_matrix_scan)(
    x[:, :80], **system, initial_state=args["initial_state"]
  )
  rest = []
  for t in range(80, 83):
    out, state = quick(lti_matrix_step)(x[:, t], **system, state=state)
    rest.append(out)
  whole = jnp.concatenate([first, jnp.stack(rest, 1)], 1)
  assert_close((whole, state), (y, final), jnp.float32)


@pytest.mark.nightly
@pytest.mark.usefixtures("strict")
def test_matrix_scan_of_legs_is_the_convolution_by_the_cauchy_kernel():
  # The matrix in its own basis, the kernel in that of its eigenvectors.
  size, length, dt = 8, 150, 0.05
  matrix, weights = hippo_legs(size)
  A, low, B, basis = (jnp.asarray(v) for v in hippo_legs_dplr(size))
  a, b = bilinear(jnp.asarray(matrix), jnp.asarray(weights), dt, dense=True)
  c = draw((1, size), "r")
  impulse = jnp.zeros((1, length, 1)).at[0, 0].set(1.0)
  y, _ = quick(lti_matrix_scan)(impulse, a[None], b[None], c[None])
  row = lambda v: v[None].astype(jnp.complex64)
  kernel = s4_dplr_kernel(
    row(A), row(low), row(B),
    (c.astype(jnp.complex64) @ basis).astype(jnp.complex64),
    jnp.full(1, dt), length,
  )  # fmt: skip
  assert_close(y[0, :, 0, 0], kernel[0], jnp.float32)


@pytest.mark.nightly
@pytest.mark.usefixtures("strict")
def test_nan_in_padding_reaches_neither_outputs_nor_gradients():
  args, ids = make((3, 70, 2, 3, 1), ids=True)
  run = quick(functools.partial(pull, lti_matrix_scan, ids=ids))
  expected = run(args)
  wild = args | {"x": np.where(ids[..., None] > 0, args["x"], np.nan)}
  actual = run(wild)
  assert_close(actual, expected, jnp.float32)
  assert not actual[0][0][ids == 0].any()
  assert not actual[1][0]["x"][ids == 0].any()


@pytest.mark.nightly
@pytest.mark.usefixtures("strict")
def test_what_is_not_finite_stays_in_its_document():
  args, _ = make((1, 150, 2, 3, 2))
  ids = np.repeat([1, 2, 3], [20, 80, 50])[None].astype(np.int32)
  run = quick(lambda x: lti_matrix_scan(**args | {"x": x}, segment_ids=ids))
  sick = args["x"].copy()
  sick[0, 40] = np.inf
  y, final = run(sick)
  expected, expected_final = run(args["x"])
  good = (np.arange(150) < 40) | (ids[0] != 2)
  assert not np.isfinite(y[0, ~good]).any()
  assert_close((y[0, good], final), (expected[0, good], expected_final))


@pytest.mark.nightly
@pytest.mark.usefixtures("strict")
def test_rows_on_a_mesh_have_the_gradient_of_the_whole():
  args, ids = make((2, 70, 2, 3, 2), ids=True)
  mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))
  rows = lambda name: P("data") if name in ("x", "initial_state") else P()

  def loss(args, ids):
    y, state = lti_matrix_scan(**args, segment_ids=ids)
    return jnp.square(y).sum() + jnp.square(state).sum()

  total = jax.shard_map(
    lambda args, ids: jax.lax.psum(loss(args, ids), "data"),
    mesh=mesh,
    in_specs=({name: rows(name) for name in args}, P("data")),
    out_specs=P(),
  )
  args = jax.tree.map(jnp.asarray, args)
  actual = quick(jax.grad(total))(args, jnp.asarray(ids))
  assert_close(actual, quick(jax.grad(loss))(args, ids), jnp.float32)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      {"a": np.ones((2, 3, 4))},
      r"a has shape \(2, 3, 4\), expected \(D=2, N=3",
    ),
    ({"c": np.ones((2, 3))}, r"c has shape \(2, 3\), expected \(D=2, R, N=3\)"),
    ({"b": np.ones((2, 3), np.complex64)}, "b is complex, expected a real"),
    ({"x": np.ones((3, 0, 2))}, "x has no time steps, expected T >= 1"),
    ({"implementation": "pallas"}, "implementation is 'pallas', expected one"),
  ],
)
def test_bad_input_is_named(change, message):
  args, _ = make((3, 5, 2, 3, 1))
  with pytest.raises(ValueError, match=f"lti_matrix_scan: {message}"):
    lti_matrix_scan(**args | change)
