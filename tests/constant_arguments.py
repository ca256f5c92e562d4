"""Compile selective scans of constants, each case named before it runs.

Of the cases that are named behind the script, or of all where none is.
A process of its own: where XLA's compiler aborts, nothing can be caught.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ssmjax import models, ops

D, N = 8, 4


def arguments(length):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.uniform(0.1, 1, shape).astype(np.float32)
  ids = (1 + (np.arange(length)[None] >= length // 2)).astype(np.int32)
  return dict(
    u=draw(1, length, D), delta=draw(1, length, D), A=-draw(D, N),
    B=draw(1, length, N), C=draw(1, length, N), D=draw(D),
    z=draw(1, length, D), delta_bias=draw(D), initial_state=draw(1, D, N),
    segment_ids=ids,
  )  # fmt: skip


def cases():
  """A name, the length, the arguments that are constants, and those absent."""
  masks = ("segment_ids",)
  yield "masks", 8, masks, ("z", "initial_state")
  yield "masks of several chunks", 33, masks, ()
  weights = ("A", "D", "delta_bias", "initial_state")
  yield "weights and initial state", 8, weights, masks
  yield "all", 8, tuple(arguments(8)), ()


def compare(length, constant, absent):
  """Value and gradient of a scan of constants, with those of variables."""
  args = {k: v for k, v in arguments(length).items() if k not in absent}
  ids = args.pop("segment_ids", None)
  fixed = {k: jnp.asarray(v) for k, v in args.items() if k in constant}
  free = {k: jnp.asarray(v) for k, v in args.items() if k not in constant}

  def run(args, ids):
    y, state = ops.selective_scan(
      **args, segment_ids=ids, implementation="chunked"
    )
    return y.sum() + state.sum(), (y, state)

  def constants(free, traced_ids):
    return run(fixed | free, ids if "segment_ids" in constant else traced_ids)

  both = functools.partial(jax.value_and_grad, has_aux=True)
  (_, expected), slopes = jax.jit(both(run))(fixed | free, ids)
  # Without a gradient it is another program, which keeps no states.
  (_, alone) = jax.jit(constants)(free, ids)
  (_, beside), got = jax.jit(both(constants))(free, ids)
  for x, y, z in zip(alone, beside, expected, strict=True):
    np.testing.assert_allclose(x, z, rtol=1e-5)
    np.testing.assert_allclose(y, z, rtol=1e-5)
  for name, x in got.items():
    np.testing.assert_allclose(
      x, slopes[name], rtol=1e-4, atol=1e-5, err_msg=name
    )


def model():
  mixer = models.MambaConfig(d_state=4)
  config = models.ModelConfig(8, d_model=8, n_layers=1, mixers=(mixer,))
  return models.LanguageModel(config, rngs=nnx.Rngs(0))


def whole_models():
  lm = model()
  tokens = jnp.arange(8, dtype=jnp.int32)[None]
  ids = jnp.asarray(np.repeat([[1, 2]], 4, 1).astype(np.int32))
  loss = lambda lm: lm(tokens, segment_ids=ids)[0].sum()
  yield "gradient", jax.jit(jax.grad(loss)), lm
  generate = lambda x: models.generate(lm, x, 2, segment_ids=ids)
  yield "generate", jax.jit(generate), tokens


if __name__ == "__main__":
  chosen = sys.argv[1:]
  for name, *case in cases():
    if chosen and name not in chosen:
      continue
    print(f"scan: {name}", flush=True)
    compare(*case)
  for name, run, x in whole_models():
    if chosen and name not in chosen:
      continue
    print(f"model: {name}", flush=True)
    jax.block_until_ready(run(x))
  print("done", flush=True)
