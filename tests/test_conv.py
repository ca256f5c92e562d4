"""The short convolution equals its loop, with padding and documents."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from ssmjax.ops import causal_conv, causal_conv_reference, causal_conv_step

pytestmark = pytest.mark.usefixtures("strict")


def make(batch, length, channels, width, *, ids=None, dtype="float64"):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape)
  args = dict(
    x=draw(batch, length, channels),
    weight=draw(width, channels),
    bias=draw(channels),
    initial_state=draw(batch, width - 1, channels),
  )
  args = {k: np.asarray(v, dtype) for k, v in args.items()}
  if isinstance(ids, str):
    steps = rng.random((batch, length)) < 0.2
    ids = np.cumsum(steps, 1) + 1
    ids[rng.random((batch, length)) < 0.3] = 0
    ids[-1] = 0
  return args | dict(segment_ids=None if ids is None else np.asarray(ids))


def cast(args, dtype):
  one = lambda x: jnp.asarray(
    x, jnp.int32 if np.issubdtype(x.dtype, np.integer) else dtype
  )
  return {k: None if v is None else one(v) for k, v in args.items()}


def pull(function, args):
  floats = {
    k: v for k, v in args.items() if v is not None and k != "segment_ids"
  }
  out, vjp = jax.vjp(lambda floats: function(**args | floats), floats)
  wave = lambda x: (
    jnp.cos(jnp.arange(x.size, dtype=jnp.float32))
    .reshape(x.shape)
    .astype(x.dtype)
  )
  return out, vjp(jax.tree.map(wave, out))[0]


conv = quick(functools.partial(pull, causal_conv))
reference = quick(functools.partial(pull, causal_conv_reference))


def truth(args):
  with (
    jax.enable_x64(True),
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    return jax.device_get(reference(cast(args, "float64")))


@pytest.mark.parametrize(
  ("sizes", "ids"),
  [
    ((2, 1, 1, 4), None),
    ((2, 7, 3, 4), None),
    ((1, 3, 2, 1), None),
    ((4, 17, 3, 4), "drawn"),
    ((2, 3, 2, 6), [[1, 0, 2], [0, 3, 3]]),
    ((2, 2, 2, 1), [[1, 0], [0, 0]]),
  ],
)
def test_values_and_gradients_equal_the_definition(sizes, ids):
  args = make(*sizes, ids=ids)
  actual = conv(cast(args, "float32"))
  assert_close(actual, truth(args))
  for name, gradient in actual[1].items():
    assert gradient.dtype == jnp.float32, name


def test_bfloat16_keeps_a_float32_state_and_float64_its_width(x64):
  args = make(2, 9, 3, 4, ids="drawn")
  narrow = cast(args, jnp.bfloat16)
  narrow["initial_state"] = jnp.asarray(args["initial_state"], jnp.float32)
  (y, state), gradients = conv(narrow)
  assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
  wide = {
    k: np.asarray(v, int if k == "segment_ids" else "float64")
    for k, v in narrow.items()
  }
  expected = truth(wide)
  assert_close(((y, state), gradients), expected, "bfloat16")
  assert_close(conv(cast(args, "float64")), truth(args), "float64")


def test_two_halves_are_the_whole_and_steps_are_the_convolution():
  # Ids are compared within one call, so no document ends at the cut.
  ids = [[1, 1, 0, 2, 2, 2, 0, 2, 3, 0], [0] * 10]
  args = cast(make(2, 10, 3, 4, ids=ids), "float32")
  run = quick(causal_conv)
  rest = dict(weight=args["weight"], bias=args["bias"])
  y, state = run(**args)
  h, halves = args["initial_state"], []
  for s in (slice(5), slice(5, None)):
    part = dict(x=args["x"][:, s], segment_ids=args["segment_ids"][:, s])
    out, h = run(**part, **rest, initial_state=h)
    halves.append(out)
  assert_close((jnp.concatenate(halves, 1), h), (y, state))

  args["segment_ids"] = jnp.minimum(args["segment_ids"], 1)
  y, state = run(**args)
  h, outputs = args["initial_state"], []
  step = quick(causal_conv_step)
  for t in range(10):
    token = dict(x=args["x"][:, t], segment_ids=args["segment_ids"][:, t])
    out, h = step(**token, **rest, state=h)
    outputs.append(out)
  assert_close((jnp.stack(outputs, 1), h), (y, state))
  np.testing.assert_array_equal(h[1], args["initial_state"][1])


def test_past_shift_and_newest_tap_are_respected():
  args = cast(make(1, 12, 2, 4), "float32")
  args["initial_state"] = jnp.zeros_like(args["initial_state"])
  y, _ = causal_conv(**args)
  later, _ = causal_conv(**args | dict(x=args["x"].at[:, 6:].set(jnp.nan)))
  np.testing.assert_array_equal(later[:, :6], y[:, :6])
  delayed, _ = causal_conv(
    **args | dict(x=jnp.pad(args["x"], ((0, 0), (3, 0), (0, 0))))
  )
  assert_close(delayed[:, 3:], y)
  # As in the published checkpoints, the last row meets the present token.
  newest = jnp.zeros_like(args["weight"]).at[-1].set(1)
  y, state = causal_conv(args["x"], newest)
  np.testing.assert_array_equal(y, args["x"])
  np.testing.assert_array_equal(state, args["x"][:, -3:])


def test_documents_in_a_row_are_each_alone_whatever_padding_holds():
  ids = np.array([[0, 2, 2, 0, 2, 7, 7, 0, 7, 0], [0] * 10])
  args = cast(make(2, 10, 3, 3, ids=ids), "float32")
  pad = jnp.asarray(ids == 0)[..., None]
  clean = conv(args)
  for value in (jnp.nan, jnp.inf):
    dirty = conv(args | dict(x=jnp.where(pad, value, args["x"])))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
  (y, state), gradients = clean
  assert not np.asarray(y)[ids == 0].any()
  assert not np.asarray(gradients["x"])[ids == 0].any()
  np.testing.assert_array_equal(state[1], args["initial_state"][1])
  rest = dict(weight=args["weight"], bias=args["bias"])
  for index, h in (
    ([1, 2, 4], args["initial_state"][:1]),
    ([5, 6, 8], None),
  ):
    alone, final = causal_conv(
      args["x"][:1, np.array(index)], **rest, initial_state=h
    )
    assert_close(y[:1, np.array(index)], alone)
  assert_close(state[:1], final)


def test_a_short_document_leaves_zeros_in_the_state():
  args = cast(make(1, 4, 2, 4, ids=[[1, 1, 1, 2]]), "float32")
  _, state = causal_conv(**args)
  np.testing.assert_array_equal(state[0, :2], np.zeros((2, 2)))
  np.testing.assert_array_equal(state[0, 2], args["x"][0, 3])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_vmap_and_shards_equal_one_device(kind):
  mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
  args = cast(make(4, 6, 2, 3, ids="drawn"), "float32")
  expected = conv(args)
  rows = jax.tree.map(lambda x: x[:, None], args)
  axes = dict(x=0, weight=None, bias=None, initial_state=0, segment_ids=0)
  rows |= dict(weight=args["weight"], bias=args["bias"])
  (y, state), _ = expected
  out = quick(jax.vmap(lambda a: causal_conv(**a), in_axes=(axes,)))(rows)
  assert_close(jax.tree.map(lambda x: x[:, 0], out), (y, state))

  shared = ("weight", "bias")
  spec = {k: P() if k in shared else P("data") for k in args}
  floats = {k: v for k, v in args.items() if k != "segment_ids"}

  def loss(floats, ids):
    y, state = causal_conv(**floats, segment_ids=ids)
    return (y**2).sum() + (state**2).sum()

  gradient = quick(jax.grad(loss))(floats, args["segment_ids"])
  ids_spec = spec.pop("segment_ids")
  shard = functools.partial(jax.shard_map, mesh=mesh, in_specs=(spec, ids_spec))
  place = lambda x, s: jax.device_put(x, jax.sharding.NamedSharding(mesh, s))
  placed = {k: place(v, spec[k]) for k, v in floats.items()}
  ids = place(args["segment_ids"], ids_spec)
  total = lambda *x: lax.psum(loss(*x), "data")
  with jax.set_mesh(mesh):
    for f in (
      shard(jax.grad(loss), out_specs=spec),
      jax.grad(shard(total, out_specs=P())),
    ):
      assert_close(quick(f)(placed, ids), gradient)


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    (dict(x=jnp.ones((2, 4))), r"x has shape \(2, 4\), expected \(B, T, D\)"),
    (dict(weight=jnp.ones((3, 5))), r"weight .* expected \(W, D=4\)"),
    (dict(weight=jnp.ones((0, 4))), "weight has no taps, expected W >= 1"),
    (dict(x=jnp.ones((2, 0, 4))), "x has no time steps, expected T >= 1"),
    (dict(bias=jnp.ones(3)), r"bias has shape \(3,\), expected \(D=4\)"),
    (dict(initial_state=jnp.ones((2, 3, 4))), r"holds the W-1 = 2 previous"),
    (dict(segment_ids=jnp.ones((2, 5))), r"expected \(B=2, T=5\)|float32"),
    (dict(x=jnp.ones((2, 5, 4), jnp.complex64)), "x is complex, expected a"),
    (dict(x=jnp.ones((2, 5, 4), jnp.int32)), "x has dtype int32, expected a"),
  ],
)
def test_errors_name_the_argument_and_what_is_expected(wrong, message):
  right = dict(x=jnp.ones((2, 5, 4)), weight=jnp.ones((3, 4)))
  with pytest.raises(ValueError, match=f"^causal_conv: .*{message}"):
    causal_conv(**(right | wrong))


def test_errors_of_a_step_speak_of_no_time_axis():
  with pytest.raises(ValueError, match=r"step: state has .*\(B=2, 2, D=4\)"):
    causal_conv_step(
      jnp.ones((2, 4)), jnp.ones((3, 4)), state=jnp.ones((2, 3, 4))
    )
