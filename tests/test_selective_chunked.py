"""The chunked selective scan equals its definition, in every option."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from jax import lax
from jax.sharding import PartitionSpec as P

from ssmjax.ops.selective_chunked_backward import backward_blocks
from ssmjax.ops.selective_chunked_forward import _exp2, forward_blocks
from ssmjax.ops.selective_fused import fused

# The CPU's blocks, called past the choice by platform.
selective_scan_chunked = fused(forward_blocks, backward_blocks)
NAMES = (
  "u", "delta", "A", "B", "C", "D", "z", "delta_bias", "direct",
  "initial_state", "valid", "restart",
)  # fmt: skip
FLOATS = NAMES[:10]


def reference(
  u, delta, A, B, C, D, z, delta_bias, direct, initial_state, valid, restart,
  *, delta_softplus, ones,
):  # fmt: skip
  """The private contract, one token after the other."""
  dtype = jnp.promote_types(u.dtype, jnp.float32)
  batch, length, channels = u.shape
  rates = jnp.concatenate([jnp.zeros((channels, ones), A.dtype), A], 1)
  if valid is None:
    valid = jnp.ones((batch, length), bool)
  if restart is None:
    restart = jnp.zeros((batch, length), bool)
  clean = lambda x: (
    None if x is None else jnp.where(valid[..., None], x, 0).astype(dtype)
  )
  u, delta, B, C, z = map(clean, (u, delta, B, C, z))
  if direct is not None:
    direct = clean(direct[..., None])
  dt = delta if delta_bias is None else delta + delta_bias
  if delta_softplus:
    dt = jax.nn.softplus(dt)
  dt = jnp.where(valid[..., None], dt, 0)

  def step(h, t):
    h = jnp.where(restart[:, t, None, None], 0, h)
    h = jnp.exp(dt[:, t, :, None] * rates) * h
    h += (dt * u)[:, t, :, None] * B[:, t, None]
    return h, (C[:, t, None] * h).sum(-1)

  h = jnp.zeros((batch, channels, B.shape[-1]), dtype)
  if initial_state is not None:
    h = initial_state.astype(dtype)
  h, y = lax.scan(step, h, jnp.arange(length))
  y = jnp.moveaxis(y, 0, 1)
  if D is not None:
    y += D * u
  if direct is not None:
    y += direct * dt * u
  if z is not None:
    y *= jax.nn.silu(z)
  return jnp.where(valid[..., None], y, 0), h


def make(
  batch, length, channels, states, *, dtype=np.float32, ones=0, seed=0,
  without=(), nan=False, **masks,
):  # fmt: skip
  """Arguments by name; `without` are None, `masks` say which masks to draw."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape)
  args = dict(
    u=draw(batch, length, channels),
    delta=draw(batch, length, channels) - 1,
    A=-np.exp(draw(channels, states - ones)),
    B=draw(batch, length, states),
    C=draw(batch, length, states),
    D=draw(channels),
    z=draw(batch, length, channels),
    delta_bias=draw(channels) / 2,
    direct=draw(batch, length),
    initial_state=draw(batch, channels, states),
  )
  wide = dtype if dtype == np.float64 else np.float32
  cast = lambda k: dtype if k in ("u", "delta", "z", "B", "C") else wide
  args = {k: jnp.asarray(v, cast(k)) for k, v in args.items()}
  args |= dict(valid=None, restart=None)
  if masks.get("valid"):
    args["valid"] = jnp.asarray(rng.random((batch, length)) < 0.7)
  if masks.get("restart"):
    drawn = jnp.asarray(rng.random((batch, length)) < 0.2)
    args["restart"] = drawn & (True if args["valid"] is None else args["valid"])
  for name in without:
    args[name] = None
  if nan:
    for name in ("u", "delta", "z", "B", "C", "direct"):
      x = args[name]
      if x is not None:
        mask = args["valid"].reshape(args["valid"].shape + (1,) * (x.ndim - 2))
        args[name] = jnp.where(mask, x, jnp.nan if name != "u" else jnp.inf)
  return args


def pull(function, args, *, jit=jax.jit, **static):
  """Values, and gradients of all floats for cotangents of both outputs."""
  floats = {k: args[k] for k in FLOATS if args[k] is not None}
  rest = {k: args[k] for k in NAMES if k not in floats}

  def run(floats):
    return function(**floats, **rest, **static)

  @jit
  def both(floats):
    out, vjp = jax.vjp(run, floats)
    wave = lambda x: jnp.cos(
      jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape)
    ).astype(x.dtype)
    return out, vjp(jax.tree.map(wave, out))[0]

  return both(floats)


def truth(args, **static):
  """The same of the definition in float64."""
  with (
    jax.enable_x64(True),
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    wide = {
      k: v
      if v is None or v.dtype == bool
      else jnp.asarray(np.asarray(v, np.float64))
      for k, v in args.items()
    }
    return jax.device_get(pull(reference, wide, **static))


def check(args, *, delta_softplus=True, ones=0, dtype=None):
  static = dict(delta_softplus=delta_softplus, ones=ones)
  expected = truth(args, **static)
  actual = pull(selective_scan_chunked, args, **static)
  assert actual[0][0].dtype == args["u"].dtype
  for name, grad in actual[1].items():
    assert grad.dtype == args[name].dtype, name
  assert_close(actual, expected, dtype)
  return actual


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  ("batch", "length", "channels", "states"),
  [
    (1, 1, 1, 1),
    pytest.param(1, 5, 1, 16, marks=pytest.mark.nightly),
    (3, 33, 20, 17),
    (1, 50, 300, 18),
    pytest.param(2, 19, 130, 64, marks=pytest.mark.nightly),
    pytest.param(2, 18, 9, 2, marks=pytest.mark.nightly),
  ],
)
def test_chunked_scan_equals_the_definition_at_odd_shapes(
  batch, length, channels, states
):
  check(make(batch, length, channels, states))


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
  ("without", "softplus", "masks"),
  [
    (("D", "z", "delta_bias", "direct", "initial_state"), False, {}),
    (("z", "direct"), True, dict(valid=True)),
    pytest.param(
      *(("D", "initial_state"), True, dict(restart=True)),
      marks=pytest.mark.nightly,
    ),
    (("delta_bias",), False, dict(valid=True, restart=True)),
  ],
)
def test_chunked_scan_equals_the_definition_in_its_options(
  without, softplus, masks
):
  args = make(2, 37, 24, 4, without=without, **masks)
  if not softplus:
    args["delta"] = jnp.abs(args["delta"])
    if args["delta_bias"] is not None:
      args["delta_bias"] = jnp.abs(args["delta_bias"])
  check(args, delta_softplus=softplus)


def test_one_channels_accumulate_without_decay(strict):
  ones = 2
  args = make(2, 35, 20, 5, ones=ones)
  check(args, ones=ones)
  big = args | dict(delta=jnp.full_like(args["delta"], 50.0))
  unread = big | dict(u=jnp.zeros_like(big["u"]))
  scan = functools.partial(selective_scan_chunked, delta_softplus=True)
  _, state = jax.jit(functools.partial(scan, ones=ones))(**unread)
  kept = args["initial_state"][..., :ones]
  np.testing.assert_array_equal(state[..., :ones], kept)


def test_padding_that_is_nan_changes_nothing(strict):
  clean = make(2, 37, 24, 4, valid=True, restart=True)
  dirty = make(2, 37, 24, 4, valid=True, restart=True, nan=True)
  run = jax.jit(
    functools.partial(pull, selective_scan_chunked, delta_softplus=True, ones=0)
  )
  expected, actual = run(clean), run(dirty)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)
  (y, _), grads = actual
  outside = ~np.asarray(clean["valid"])
  assert not np.asarray(y)[outside].any()
  for name in ("u", "delta", "B", "C", "z", "direct"):
    assert not np.asarray(grads[name])[outside].any(), name


def test_restart_forgets_even_an_infinite_state(strict):
  args = make(2, 20, 8, 3, restart=True)
  args["restart"] = args["restart"].at[:, 7].set(True)
  state = args["initial_state"].at[0].set(jnp.inf)
  run = jax.jit(
    functools.partial(selective_scan_chunked, delta_softplus=True, ones=0)
  )
  out, bad = run(**args), run(**args | dict(initial_state=state))
  np.testing.assert_array_equal(out[0][:, 7:], bad[0][:, 7:])
  np.testing.assert_array_equal(out[1], bad[1])


def test_decay_without_bound_is_zero(strict):
  args = make(1, 20, 8, 3, without=("initial_state",))
  rates = jnp.array([-1e3, -1e30, -jnp.inf])
  args["A"] = jnp.broadcast_to(rates[None], (8, 3))
  args["delta"] = args["delta"] + 5
  scan = functools.partial(selective_scan_chunked, delta_softplus=True, ones=0)
  y, state = jax.jit(scan)(**args)
  dt = jax.nn.softplus(args["delta"] + args["delta_bias"][None, None])
  last = (dt * args["u"])[:, -1, :, None] * args["B"][:, -1, None]
  np.testing.assert_allclose(state, last, rtol=1e-5)
  assert np.isfinite(y).all()


def test_chunked_scan_of_bfloat16_is_close_to_the_definition(strict):
  args = make(2, 37, 40, 16, dtype=jnp.bfloat16, valid=True)
  (_, state), _ = check(args, dtype=jnp.bfloat16)
  assert state.dtype == jnp.float32


def test_chunked_scan_of_float64_is_exact(strict, x64):
  args = make(2, 37, 20, 4, dtype=np.float64, valid=True, restart=True)
  (_, state), _ = check(args, dtype=jnp.float64)
  assert state.dtype == jnp.float64


@pytest.mark.parametrize(
  "mapped", [("A",), pytest.param(NAMES, marks=pytest.mark.nightly)]
)
def test_vmap_equals_a_loop(strict, mapped):
  one = [make(2, 21, 20, 3, seed=s, valid=True, restart=True) for s in range(3)]
  stacked = {
    k: jnp.stack([a[k] for a in one]) if k in mapped else one[0][k]
    for k in NAMES
  }
  axes = {k: 0 if k in mapped else None for k in NAMES}
  run = jax.jit(
    functools.partial(pull, selective_scan_chunked, delta_softplus=True, ones=0)
  )
  actual = jax.jit(jax.vmap(run, in_axes=(axes,)))(stacked)
  for s in range(3):
    args = {k: one[s][k] if k in mapped else one[0][k] for k in NAMES}
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
      jax.tree.map(lambda x, s=s: x[s], actual),
      run(args),
    )


def test_vmap_of_vmap_keeps_groups_and_rows_apart(strict):
  shape = (2, 3)
  flat = [make(2, 5, 8, 3, seed=s) for s in range(6)]
  args = {
    k: None
    if flat[0][k] is None
    else jnp.stack([a[k] for a in flat]).reshape(*shape, *flat[0][k].shape)
    for k in NAMES
  }
  args["A"] = args["A"][:, 0]  # Mapped by the outer axis only.
  inner = {k: None if k == "A" else 0 for k in NAMES}
  run = lambda args: selective_scan_chunked(**args, delta_softplus=True, ones=0)
  run = jax.jit(run)
  y, _ = jax.vmap(jax.vmap(run, in_axes=(inner,)))(args)
  for i in range(2):
    for j in range(3):
      one = {
        k: None if v is None else v[i] if k == "A" else v[i, j]
        for k, v in args.items()
      }
      np.testing.assert_allclose(y[i, j], run(one)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "inside", [pytest.param(True, marks=pytest.mark.nightly), False]
)
def test_sharded_gradients_equal_those_of_one_device(strict, inside):
  auto = (jax.sharding.AxisType.Auto,) * 2
  mesh = jax.make_mesh((4, 2), ("data", "seed"), axis_types=auto)
  args = make(8, 18, 10, 3, valid=True)
  floats = {k: args[k] for k in FLOATS}
  rest = dict(valid=args["valid"], restart=None)
  shared = ("A", "D", "delta_bias")
  spec = {k: P() if k in shared else P("data") for k in FLOATS}

  def loss(floats, valid):
    y, state = selective_scan_chunked(
      **floats, valid=valid, restart=None, delta_softplus=True, ones=0
    )
    return (y**2).sum() + (state**2).sum()

  expected = jax.jit(jax.grad(loss))(floats, rest["valid"])
  specs = (spec, P("data"))
  if inside:
    f = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=specs, out_specs=spec)
  else:
    total = lambda *a: lax.psum(loss(*a), "data")
    f = jax.grad(jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=P()))
  actual = jax.jit(f)(floats, rest["valid"])
  assert_close(actual, expected)


def test_layers_in_a_scan_with_remat_have_the_same_gradients():
  args = make(2, 20, 8, 3)
  A = jnp.stack([args["A"], args["A"] * 2, args["A"] / 2])
  rest = {k: args[k] for k in NAMES if k not in ("u", "A")}

  def run(function, A, u):
    @jax.checkpoint
    def layer(u, A):
      y, _ = function(u=u, A=A, **rest, delta_softplus=True, ones=0)
      return y, None

    return (lax.scan(layer, u, A)[0] ** 2).sum()

  grads = [
    jax.jit(jax.grad(functools.partial(run, f), (0, 1)))(A, args["u"])
    for f in (selective_scan_chunked, reference)
  ]
  assert_close(*grads)


def test_second_derivative_names_the_form_that_has_one(strict):
  args = make(1, 4, 3, 2)

  def loss(u):
    y, _ = selective_scan_chunked(
      **(args | dict(u=u)), delta_softplus=True, ones=0
    )
    return (y**2).sum()

  slope = lambda u: (jax.grad(loss)(u) ** 2).sum()
  with pytest.raises(NotImplementedError, match='implementation="associative"'):
    jax.jit(jax.grad(slope))(args["u"])


def test_temporary_memory_grows_as_time_over_chunk():
  def temporary(length):
    args = make(1, length, 128, 16)

    def run(args, cotangents):
      floats = {k: args[k] for k in FLOATS}
      rest = {k: args[k] for k in NAMES if k not in FLOATS}
      f = lambda floats: selective_scan_chunked(
        **floats, **rest, delta_softplus=True, ones=0
      )
      out, vjp = jax.vjp(f, floats)
      return out, vjp(cotangents)

    out = (args["u"], args["initial_state"])
    compiled = jax.jit(run).lower(args, out).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  growth = temporary(1024) - temporary(512)
  kept_states = 512 // 16 * 16 * 128 * 4
  assert growth <= 2 * kept_states


@pytest.mark.parametrize(
  "cases",
  [
    ("masks of several chunks", "all", "gradient"),
    pytest.param((), marks=pytest.mark.nightly, id="every"),
  ],
)
def test_constant_arguments_compile_and_equal_variables(cases):
  # In a process of its own: at a fault XLA's compiler ends it.
  script = pathlib.Path(__file__).with_name("constant_arguments.py")
  end = subprocess.run(
    [sys.executable, script, *cases],
    capture_output=True, text=True, check=False,
    env=os.environ | {"PYTHONPATH": str(script.parents[1])},
  )  # fmt: skip
  last = end.stdout.strip().splitlines()[-1:]
  assert last == ["done"], f"ended {end.returncode} at {last}: {end.stderr}"


def test_exponential_is_exact_in_a_compiled_program():
  """A compiler that drops the rounding in it made decays wrong by a half."""
  x = np.linspace(-125.0, 3.0, 4001, dtype=np.float32)
  found = jax.jit(_exp2)(x)
  np.testing.assert_allclose(found, np.exp2(np.float64(x)), 4e-7)
