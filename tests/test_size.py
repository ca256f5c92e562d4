"""Arrays of more than 2**31 elements: no index of theirs is that large."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct as Shape

from ssmjax.ops import causal_conv, linear_scan, selective_scan
from ssmjax.types import Polarization

LENGTH, WIDTH = 1 << 21, 1 << 11


def lowered(function, *args, platform):
  slope = jax.grad(lambda *args: function(*args)[0].sum())
  traced = jax.jit(slope).trace(*args)
  return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
  ("op", "platform"),
  [
    ("chunked", "cpu"),
    ("chunked", "tpu"),
    ("linear chunked", "cpu"),
    ("linear associative", "cpu"),
    ("conv", "cpu"),
  ],
)
def test_no_axis_reaches_the_range_of_an_index(op, platform):
  """Index arithmetic is safe where arrays have 2**32 elements.

  Without the memory for such an array: StableHLO addresses every axis by its
  own index (int32 here) and leaves the arithmetic of addresses to the
  compiler, which does it in 64 bits. An index can overflow only along an axis
  that is itself 2**31 long, as one that came from merging axes would be. So
  it is proof that in value and gradient no tensor, with more than 2**31
  elements among them, has such an axis.
  """
  x = Shape((1, LENGTH, WIDTH), jnp.bfloat16)
  ids = Shape((1, LENGTH), jnp.int32)
  name, _, form = op.rpartition(" ")
  if op == "conv":
    weight = Shape((4, WIDTH), jnp.float32)
    run = lambda x, w, ids: causal_conv(x, w, segment_ids=ids)
    text = lowered(run, x, weight, ids, platform=platform)
  elif name == "linear":
    scan = functools.partial(linear_scan, implementation=form)
    run = lambda a, b, ids: scan(a, b, segment_ids=ids)
    text = lowered(run, x, x, ids, platform=platform)
  else:
    polarization = Polarization(ones=1, zeros=1)
    A = Shape((WIDTH, 2), jnp.float32)
    B = Shape((1, LENGTH, 4), jnp.bfloat16)
    run = lambda u, A, B, ids: selective_scan(
      u, u, A, B, B, segment_ids=ids, polarization=polarization,
      implementation=form,
    )  # fmt: skip
    text = lowered(run, x, A, B, ids, platform=platform)
  axes = set(re.findall(r"tensor<((?:\d+x)+)", text))
  axes = [tuple(map(int, dims[:-1].split("x"))) for dims in axes]
  elements = []
  for dims in axes:
    count = 1
    for n in dims:
      assert n < 1 << 31, dims
      count *= n
    elements.append(count)
  assert max(elements) > 1 << 31
