"""TTT-linear: one definition, its windows, the published layer."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from flax import nnx

from ssmjax.models import TTTLinear, TTTLinearConfig
from ssmjax.ops import (
  TTTLearner,
  TTTState,
  ttt_linear,
  ttt_linear_reference,
  ttt_positions,
)

GOLDEN = pathlib.Path(__file__).with_name("golden") / "ttt.npz"
CONFIGS = {
  "transformer": TTTLinearConfig(num_heads=2, mini_batch=8),
  "mamba": TTTLinearConfig(
    num_heads=2, mini_batch=8, d_conv=4, output_gate=True
  ),
}
FORMS = ("reference", "chunked")


def make(shape=(2, 23, 2, 4), size=5, *, seed=0, state=False, ids=False):
  """Tokens, the inner learner and the rest, in float64.

  Heads of width 2 would say nothing: two normalised channels are ±1, and their
  gradient is the epsilon's.
  """
  rng = np.random.default_rng(seed)
  batch, length, heads, width = shape
  matrix, vector = (heads, width, width), (heads, width)
  args = dict(
    **{x: rng.normal(size=shape) for x in "qkv"},
    rate=rng.random(shape[:3]) / width,
    learner=TTTLearner(
      rng.normal(size=matrix),
      rng.normal(size=vector),
      1 + 0.3 * rng.normal(size=vector),
      0.3 * rng.normal(size=vector),
      1 / np.arange(1, size + 1) + 0.1 * rng.random(size),
    ),
    initial_state=None,
    segment_ids=None,
  )
  if state:
    sums = [rng.normal(size=(batch, *x)) for x in (matrix, vector) * 2]
    position = np.arange(batch, dtype=np.int32) * 2 % size
    args["initial_state"] = TTTState(*sums, position)
  if ids:
    # Documents shorter and longer than a mini-batch, holes of padding.
    segments = np.cumsum(rng.random(shape[:2]) < 0.12, 1) + 1
    segments[rng.random(shape[:2]) < 0.2] = 0
    segments[-1, : length // 3] = 0
    args["segment_ids"] = segments
  return args


def cast(args, dtype):
  """The arguments at a precision; integers stay what they are."""
  integer = lambda x: np.issubdtype(np.asarray(x).dtype, np.integer)
  return jax.tree.map(
    lambda x: jnp.asarray(x, jnp.int32 if integer(x) else dtype), args
  )


def pull(function, args):
  """Values, and gradients for cotangents of y and of the final state."""
  leaves, tree = jax.tree.flatten(args)
  real = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]

  def run(floats):
    floats = iter(floats)
    merged = [
      next(floats) if r else x for r, x in zip(real, leaves, strict=True)
    ]
    y, (*sums, position) = function(**jax.tree.unflatten(tree, merged))
    return (y, sums), position

  floats = [x for r, x in zip(real, leaves, strict=True) if r]
  out, vjp, position = jax.vjp(run, floats, has_aux=True)
  wave = lambda x: (
    jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
  ).astype(x.dtype)
  return out, position, vjp(jax.tree.map(wave, out))[0]


@functools.cache
def pulled(form):
  return quick(
    functools.partial(pull, functools.partial(ttt_linear, implementation=form))
  )


@functools.cache
def _truth():
  return quick(functools.partial(pull, ttt_linear_reference))


def truth(args):
  with (
    jax.enable_x64(True),
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    return jax.device_get(_truth()(cast(args, "float64")))


# By day, the contract holds windows to steps, which are the definition.
@pytest.mark.nightly
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  "case",
  [
    dict(shape=(2, 13, 2, 4), state=True, ids=True, size=3),
    dict(ids=True, state=True, shape=(4, 60, 1, 4), size=16),
    dict(ids=True, shape=(3, 60, 1, 4), seed=1, size=4),
    dict(ids=True, shape=(2, 9, 1, 6), size=1),
    dict(state=True, shape=(4, 37, 2, 6), size=8),
    dict(shape=(1, 3, 1, 4), state=True, size=16),
    dict(shape=(2, 35, 3, 4), size=16),
    dict(shape=(1, 1, 1, 4)),
  ],
)
def test_windows_and_their_gradients_equal_the_definition(case):
  args = make(**case)
  actual = pulled("chunked")(cast(args, "float32"))
  expected = truth(args)
  np.testing.assert_array_equal(actual[1], expected[1])
  assert_close(actual[::2], expected[::2], "float32")


@pytest.mark.nightly
@pytest.mark.usefixtures("strict")
def test_definition_is_gradient_descent_on_its_loss():
  # Against autodiff of ½‖k + LN(kW + b) - v‖², all tokens in one mini-batch.
  args = cast(make((1, 4, 1, 4), size=4), "float32")
  learner = args["learner"]

  def model(x, weight, bias):
    z = x @ weight + bias
    z = (z - z.mean()) * jax.lax.rsqrt(z.var() + 1e-6)
    return x + learner.norm_scale[0] * z + learner.norm_bias[0]

  def loss(parameters, k, v):
    return jnp.square(model(k, *parameters) - v).sum() / 2

  start = learner.weight[0], learner.bias[0]
  y, state = ttt_linear_reference(**args)
  total = jax.tree.map(jnp.zeros_like, start)
  for t in range(4):
    k, v, rate = (args[x][0, t, 0] for x in ("k", "v", "rate"))
    slope = jax.grad(loss)(start, k, v)
    total = jax.tree.map(lambda x, g, r=rate: x + r * g, total, slope)
    scale = learner.token_scale[t]
    now = jax.tree.map(lambda x, g, s=scale: x - s * g, start, total)
    assert_close(y[0, t, 0], model(args["q"][0, t, 0], *now))
  assert_close(state.weight[0, 0] + start[0], now[0])
  assert_close(state.bias[0, 0] + start[1], now[1])
  assert not np.asarray(state.weight_sum).any()


@pytest.mark.nightly
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sick", [1, 2])
def test_a_document_that_is_not_finite_stays_alone(form, sick):
  ids = np.repeat([1, 0, 2, 3], [7, 2, 4, 6])
  args = cast(make((1, 19, 2, 4), size=5, state=True), "float32")
  args["segment_ids"] = jnp.asarray(ids, jnp.int32)[None]
  tokens = np.flatnonzero(ids == sick)
  bad = dict(args, v=args["v"].at[0, tokens[1], 0, 0].set(jnp.inf))
  if sick == 1:
    state = args["initial_state"]
    infinite = state.weight.at[0, 1, 0, 0].set(jnp.inf)
    bad["initial_state"] = state._replace(weight=infinite)
  run = quick(functools.partial(ttt_linear, implementation=form))
  (y, state), (clean, end) = run(**bad), run(**args)
  np.testing.assert_array_equal(y[:, ids != sick], clean[:, ids != sick])
  assert not np.isfinite(y[:, tokens[1:], 0]).any()
  np.testing.assert_array_equal(y[:, tokens[:1], 0], clean[:, tokens[:1], 0])
  jax.tree.map(np.testing.assert_array_equal, state, end)
  # Without ids too, an earlier token sees nothing of it.
  for key in ("segment_ids", "initial_state"):
    args[key] = bad[key] = None
  (y, state), (clean, _) = run(**bad), run(**args)
  before = slice(None, tokens[1])
  np.testing.assert_array_equal(y[:, before], clean[:, before])
  np.testing.assert_array_equal(y[:, :, 1], clean[:, :, 1])
  assert not np.isfinite(state.weight_sum[:, 0]).any()


def test_positions_count_the_tokens_of_a_document():
  ids = jnp.array([[0, 1, 1, 0, 1, 4, 4, 4, 4], [1] * 9], jnp.int32)
  position = ttt_positions(3, (2, 9), jnp.array([2, 1], jnp.int32), ids)
  valid = np.asarray(ids) > 0
  np.testing.assert_array_equal(
    np.asarray(position)[0][valid[0]], [2, 0, 1, 0, 1, 2, 0]
  )
  np.testing.assert_array_equal(position[1], [1, 2, 0] * 3)


@pytest.mark.parametrize(
  "name",
  ["mamba", pytest.param("transformer", marks=pytest.mark.nightly)],
)
def test_ttt_linear_gives_outputs_and_gradients_of_published_code(name):
  golden = published()

  @quick
  def run(model, x):
    loss = lambda model, x: (model(x)[0] * golden["weights"]).sum()
    return model(x)[0], jax.grad(loss, (0, 1))(model, x)

  y, (grads, d_x) = run(from_golden(name), golden["inputs"])
  assert_close(y, golden[f"{name}:outputs"], "float32")
  assert_close(d_x, golden[f"{name}:gradient"], "float32")
  for key, expected in arrays_of(name, "gradient").items():
    assert_close(leaf(grads, key)[...], expected, "float32", key)


@pytest.mark.nightly
def test_no_inner_model_of_a_token_is_in_memory():
  args = cast(make((1, 2048, 1, 32), size=16), "float32")
  floats = {x: args[x] for x in ("q", "k", "v", "rate")}
  loss = lambda args, learner: (ttt_linear(**args, learner=learner)[0] ** 2
                                ).sum()  # fmt: skip
  grad = jax.jit(jax.grad(loss)).lower(floats, args["learner"]).compile()
  # 32 times v would be the inner models of all tokens.
  memory = grad.memory_analysis().temp_size_in_bytes
  assert memory <= 16 * args["v"].nbytes


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"num_heads": 0}, "TTTLinearConfig: num_heads is 0, expected an integer"),
    ({"mini_batch": 0}, "mini_batch is 0, expected an integer"),
    ({"base_rate": 0}, "base_rate is 0, expected a finite number"),
    ({"init": "xavier"}, "init is 'xavier', expected one of 'mamba', 'auth"),
  ],
)
def test_ttt_linear_config_refuses_a_value_that_cannot_be(fields, message):
  with pytest.raises(ValueError, match=message):
    TTTLinearConfig(**fields)


def test_ttt_linear_refuses_what_does_not_fit_it():
  with pytest.raises(ValueError, match="TTTLinear: d_model is 6, expected a m"):
    TTTLinear(6, TTTLinearConfig(num_heads=2), rngs=nnx.Rngs(0))
  args = cast(make((1, 3, 2, 4)), "float32")
  wrong = dict(
    rate=(jnp.ones((1, 3)), r"rate has shape \(1, 3\), expected \(B=1, T=3, H"),
    q=(jnp.ones((1, 3, 2, 4), int), "q has dtype int32, expected a floating"),
    segment_ids=(jnp.ones((1, 3), bool), r"Pass|pass mask.astype\(jnp.int32"),
    implementation=("pallas", "implementation is 'pallas', expected one of"),
    learner=(
      args["learner"]._replace(bias=jnp.ones((2, 3))),
      r"learner.bias has shape \(2, 3\), expected \(H=2, P=4\).",
    ),
    initial_state=(
      TTTLinear(8, TTTLinearConfig(2), rngs=nnx.Rngs(0)).init_state(2).inner,
      r"initial_state.weight has shape \(2, 2, 4, 4\), expected \(B=1, H=2",
    ),
  )
  for name, (value, message) in wrong.items():
    with pytest.raises(ValueError, match=f"^ttt_linear: .*{message}"):
      ttt_linear(**args | {name: value})


def arrays_of(name, sort):
  """The golden file's arrays under our names."""
  prefix = f"{name}:{sort}:"
  get = {
    key.removeprefix(prefix): value
    for key, value in published().items()
    if key.startswith(prefix)
  }
  parts = [f"{x}_proj.weight" for x in "qkvg" if f"{x}_proj.weight" in get]
  arrays = {
    "in_proj": np.concatenate([get[x] for x in parts]).T,
    "rate_proj": get["learnable_ttt_lr_weight"][:, 0].T,
    "rate_bias": get["learnable_ttt_lr_bias"][:, 0],
    "token_scale": get["learnable_token_idx"],
    "inner_weight": get["W1"],
    "inner_bias": get["b1"][:, 0],
    "inner_norm.scale": get["ttt_norm_weight"],
    "inner_norm.bias": get["ttt_norm_bias"],
    "norm.scale": get["post_norm.weight"],
    "norm.bias": get["post_norm.bias"],
    "out_proj": get["o_proj.weight"].T,
  }
  if name == "mamba":
    for ours, theirs in (("query_conv", "conv_q"), ("key_conv", "conv_k")):
      arrays[f"{ours}.weight"] = get[f"{theirs}.weight"][:, 0].T
      arrays[f"{ours}.bias"] = get[f"{theirs}.bias"]
  return arrays


def leaf(model, path):
  """A parameter by the names on the way to it."""
  return functools.reduce(getattr, path.split("."), model)


@functools.cache
def published():
  with np.load(GOLDEN) as golden:
    return dict(golden)


def from_golden(name):
  build = lambda: CONFIGS[name].build(8, 1, nnx.Rngs(0))
  model = jax.eval_shape(build)
  for path, value in arrays_of(name, "weight").items():
    assert leaf(model, path).shape == value.shape, path
    *owner, last = path.split(".")
    setattr(leaf(model, ".".join(owner)) if owner else model, last,
            nnx.Param(jnp.asarray(value)))  # fmt: skip
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(model))
  return model
