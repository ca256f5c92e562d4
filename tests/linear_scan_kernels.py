"""What both backends' linear-scan kernels are held to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_linear_scan import cast, make, pull, truth

import kernels_pallas
from ssmjax.ops import linear_scan
from ssmjax.ops.scan_fused import flattened, fused
from ssmjax.ops.segments import segment_masks


def scan(kernels, interpret, tiling=None):
  """`linear_scan` on one backend's interpreted kernels."""
  passes = (
    functools.partial(f, interpret=interpret, tiling=tiling)
    for f in (kernels.forward, kernels.backward)
  )
  form = fused(*flattened(*passes))

  def run(a, b, initial_state, segment_ids=None, *, reverse=False):
    masks = segment_masks(segment_ids, reverse=reverse)
    state = initial_state.astype(jnp.float32)
    return form(a, b, state, *masks, reverse=reverse)

  return run


def check_definition(
  kernels, interpret, shape, share=(), *, ids=False, reverse=False,
  dtype="float32", tiling=None, seed=0,
):  # fmt: skip
  """Values and gradients, with NaN wherever padding is."""
  args = cast(make(shape, share, ids=ids, seed=seed), dtype)
  args["initial_state"] = args["initial_state"].astype(jnp.float32)
  wide = lambda x: np.asarray(
    x, np.int32 if jnp.issubdtype(x.dtype, jnp.integer) else np.float64
  )
  expected = truth(jax.tree.map(wide, args), reverse)
  if ids:
    padding = (args["segment_ids"] == 0)[..., None]
    for name in "ab":
      if args[name].shape[1] > 1 and args[name].shape[0] == shape[0]:
        args[name] = jnp.where(padding, jnp.nan, args[name])
  run = functools.partial(scan(kernels, interpret, tiling), reverse=reverse)
  actual = quick(functools.partial(pull, run))(args)
  # The state is float32, but in bfloat16 its cotangents come rounded.
  assert actual[0][0].dtype == args["b"].dtype
  assert_close(actual[0][1], expected[0][1], "float32", "final state")
  assert_close(actual, expected, dtype)


def check_poison(kernels, interpret, ids):
  """A document in the middle overflows; nobody else notices."""
  args = cast(make((1, ids.shape[1], 3)), "float32") | dict(segment_ids=ids)
  sick = np.flatnonzero(ids[0] == 2)
  bad = dict(args)
  bad["b"] = bad["b"].at[0, sick[1], 0].set(jnp.inf)
  bad["a"] = bad["a"].at[0, sick[0], 1].set(jnp.nan)
  run = quick(functools.partial(pull, scan(kernels, interpret)))
  (y, state), gradients = run(bad)
  (clean, end), expected = run(args)
  others = np.asarray(ids[0] != 2)
  assert not np.isfinite(y[:, sick]).all()
  np.testing.assert_array_equal(y[:, others], clean[:, others])
  np.testing.assert_array_equal(state, end)
  for name in "ab":
    np.testing.assert_array_equal(
      gradients[name][:, others], expected[name][:, others]
    )
  np.testing.assert_array_equal(
    gradients["initial_state"], expected["initial_state"]
  )


def check_vmap(kernels, interpret, groups):
  """A mapped axis becomes rows, of one group of decays or of several."""
  rows = [cast(make((2, 5, 3), seed=s, ids=True), "float32") for s in range(2)]
  many = jax.tree.map(lambda *x: jnp.stack(x), *rows)
  one = cast(make((2, 5, 3), (0, 1)), "float32")["a"]
  run = scan(kernels, interpret)
  reference = functools.partial(linear_scan, implementation="reference")
  a, axis = (one, None) if groups == 1 else (many["a"], 0)
  args = many | dict(a=a)
  axes = dict.fromkeys(args, 0) | dict(a=axis)
  mapped = lambda f: quick(
    jax.vmap(functools.partial(pull, f), in_axes=(axes,))
  )
  assert_close(mapped(run)(args), mapped(reference)(args))


def check_lowering(platform, monkeypatch):
  """The public op finds the kernels, wherever a program is made of it."""
  found = {platform: kernels_pallas.kernels("linear_scan")[platform]}
  monkeypatch.setattr(kernels_pallas, "kernels", lambda op: found)
  jax.clear_caches()
  x = jax.ShapeDtypeStruct((8, 64, 256), jnp.bfloat16)
  ids = jax.ShapeDtypeStruct((8, 64), jnp.int32)

  def loss(a, b, ids):
    out = linear_scan(a, b, segment_ids=ids, implementation="pallas")
    return sum(x.astype(jnp.float32).sum() for x in out)

  step = jax.grad(loss, (0, 1))
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  row = P("data")
  sharded = jax.shard_map(
    step, mesh=mesh, in_specs=(P(), row, row), out_specs=(P(), row)
  )
  lone = jax.ShapeDtypeStruct((1, 1, 256), jnp.bfloat16)
  cases = {
    "alone": (jax.checkpoint(step), (x, x, ids)),
    "sharded": (sharded, (lone, x, ids)),
    "mapped": (jax.vmap(step, (None, 0, 0)),
               (lone, *jax.tree.map(lambda x: jax.ShapeDtypeStruct(
                 (2, *x.shape), x.dtype), (x, ids)))),
  }  # fmt: skip
  for name, (function, args) in cases.items():
    traced = jax.jit(function).trace(*args)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    for kernel in ("linear_scan_forward", "linear_scan_backward"):
      assert kernel in text, (name, kernel)
  exported = jax.export.export(jax.jit(step), platforms=[platform])(x, x, ids)
  assert "linear_scan_backward" in exported.mlir_module()
  with pytest.raises(NotImplementedError, match="'associative'"):
    jax.eval_shape(
      jax.grad(lambda b: step(b, b, None)[0].astype(jnp.float32).sum()), x
    )
  jax.clear_caches()
