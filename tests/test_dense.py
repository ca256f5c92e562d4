"""A product of narrow activations has a wide gradient of its weight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from jax.sharding import AxisType, NamedSharding

from ssmjax.models.layers import affine, dense


def make(rows=3, length=40, width=8, outputs=12):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = (rows, length, width), (width, outputs), (rows, length, outputs)
  x, weight, dy = map(jax.random.normal, keys, shapes)
  return x.astype(jnp.bfloat16), weight, dy.astype(jnp.bfloat16)


def pull(x, weight, dy):
  """The cotangents of x and the weight."""
  return jax.vjp(dense, x, weight)[1](dy)


def expected_gradient(x, dy):
  x, dy = (np.asarray(v, np.float64).reshape(-1, v.shape[-1]) for v in (x, dy))
  return x.T @ dy


def test_narrow_product_sums_its_weights_gradient_in_float32():
  x, weight, dy = make()
  dx, dweight = quick(pull)(x, weight, dy)
  assert (dx.dtype, dweight.dtype) == (x.dtype, weight.dtype)
  assert_close(dweight, expected_gradient(x, dy), jnp.float32)
  narrow = jnp.asarray(weight.astype(x.dtype), jnp.float32)
  assert_close(dx, dy.astype(jnp.float32) @ narrow.T, jnp.bfloat16)


@pytest.mark.parametrize("axes", [(None, 0, 0), (0, 0, None)])
def test_narrow_product_is_the_same_under_vmap(axes):
  args = make()
  run = lambda *args: pull(*args)[1]
  stacked = [
    v if a is None else jnp.stack([v, v]) for v, a in zip(args, axes, strict=1)
  ]
  both = quick(jax.vmap(run, axes))(*stacked)
  assert_close(both[1], expected_gradient(args[0], args[2]), jnp.float32)


@pytest.mark.nightly
def test_narrow_product_is_differentiated_again_in_both_modes():
  x, weight, dy = make()
  slope = lambda x: jnp.square(pull(x, weight, dy)[1]).sum()
  backward, (_, forward) = quick(
    lambda x: (jax.grad(slope)(x), jax.jvp(slope, (x,), (x,)))
  )(x)
  wide = lambda v: v.astype(jnp.float32)
  assert_close((wide(backward) * wide(x)).sum(), wide(forward), jnp.bfloat16)


@pytest.mark.nightly
def test_narrow_product_is_recomputed_in_remat():
  x, weight, dy = make()
  run = jax.checkpoint(dense)
  gradient = quick(lambda w: jax.vjp(run, x, w)[1](dy)[1])(weight)
  assert_close(gradient, expected_gradient(x, dy), jnp.float32)


@pytest.mark.parametrize("where", ["shard_map", "types"])
def test_narrow_product_of_divided_rows_has_the_whole_gradient(where):
  x, weight, dy = make(4)
  if where == "shard_map":
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,))
    data = jax.P("data")
    run = jax.shard_map(
      pull,
      mesh=mesh,
      in_specs=(data, jax.P(), data),
      out_specs=(data, jax.P()),
    )
  else:
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, jax.P(*spec)))
    x, weight, dy = (
      put(x, "data"), put(weight, None, "model"), put(dy, "data", None, "model")
    )  # fmt: skip
    run = pull
  dx, dweight = quick(run)(x, weight, dy)
  assert_close(dweight, expected_gradient(x, dy), jnp.float32)
  if where == "types":
    of = lambda x: jax.typeof(x).sharding.spec
    assert (of(dx), of(dweight)) == (of(x), of(weight))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_multiply_narrow_factors_alone(platform):
  x, weight, dy = make()
  exported = jax.export.export(jax.jit(pull), platforms=[platform])
  text = exported(x, weight, dy).mlir_module()
  products = [line for line in text.splitlines() if "dot_general %" in line]
  assert len(products) == 2
  for line in products:
    factors, result = line.split(" : ")[1].split("->")
    assert "f32" not in factors.replace("bf16", "")
  assert "xf32>" in result


def test_affine_adds_the_bias_in_float32():
  x, weight, _ = make()
  bias = jnp.full((12,), 1e-3)
  y = functools.partial(affine, x, weight, bias)
  assert y().dtype == x.dtype
  wide = y(dtype=jnp.float32) - dense(x, weight).astype(jnp.float32)
  assert_close(wide, jnp.broadcast_to(bias, wide.shape), jnp.bfloat16)
  assert affine(x, weight, None).dtype == x.dtype
