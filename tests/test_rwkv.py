"""RWKV-5 and RWKV-6 are the published ones."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from flax import nnx

from ssmjax.models import RWKV5, RWKV6, RWKV5Config, RWKV6Config
from ssmjax.types import Polarization

GOLDEN = pathlib.Path(__file__).with_name("golden") / "rwkv.npz"
BOTH = Polarization(ones=1, zeros=1)
REPLACED = Polarization(ones=1, zeros=1, placement="replace")
VERSIONS = {
  "x052": lambda: RWKV5(8, RWKV5Config(2), rngs=nnx.Rngs(0)),
  "x060": lambda: RWKV6(
    8, RWKV6Config(2, mix_rank=3, decay_rank=2), rngs=nnx.Rngs(0)
  ),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_rwkv_gives_outputs_and_gradients_of_published_code(version):
  golden = published()

  def loss(model, x):
    y, _ = model(x)
    return (y * golden["weights"]).sum(), y

  run = quick(jax.grad(loss, (0, 1), has_aux=True))
  (grads, d_x), y = run(from_golden(version), golden["inputs"])
  assert_close(y, golden[f"{version}:outputs"], jnp.float32)
  assert_close(d_x, golden[f"{version}:gradient"], jnp.float32)
  found = dict(nnx.to_flat_state(nnx.state(grads)))
  found = {".".join(path): param[...] for path, param in found.items()}
  assert_close(found, arrays_of(version, "gradient"), jnp.float32)


@pytest.mark.parametrize("kind", [RWKV5, RWKV6])
def test_one_channels_sum_and_zero_channels_forget_exactly(kind):
  @quick
  def show(key):
    model = kind(4, kind._config(2, polarization=BOTH), rngs=nnx.Rngs(key))
    return model.recurrence(jax.random.normal(key, (1, 5, 4)))

  eq1 = show(jax.random.key(0))
  assert eq1.a.shape == (1, 5, 2, 4, 2)
  assert (eq1.a[..., 0, :] == 1).all()
  assert (eq1.a[..., -1, :] == 0).all()
  inner = np.asarray(eq1.a[..., 1:-1, :])
  assert ((inner > 0) & (inner < 1)).all()
  # Nothing is before the first token.
  assert not eq1.b[:, 0].any()
  assert eq1.b[:, 1:].all()


@pytest.mark.nightly
@pytest.mark.parametrize("kind", [RWKV5, RWKV6])
def test_rwkv_has_a_finite_gradient_over_four_thousand_tokens(kind):
  x = jax.random.normal(jax.random.key(1), (1, 4096, 4))
  config = kind._config(2, polarization=BOTH)

  @quick
  def gradients(key, x):
    model = kind(4, config, rngs=nnx.Rngs(key))
    loss = lambda model, x: jnp.square(model(x)[0]).mean()
    return jax.grad(loss, (0, 1))(model, x)

  for leaf in jax.tree.leaves(gradients(jax.random.key(0), x)):
    assert jnp.isfinite(leaf).all()


@pytest.mark.parametrize(
  ("config", "fields", "message"),
  [
    (
      RWKV5Config,
      {"num_heads": 0},
      "RWKV5Config: num_heads is 0, expected an integer",
    ),
    (
      RWKV6Config,
      {"mix_rank": 0},
      "RWKV6Config: mix_rank is 0, expected an integer",
    ),
    (RWKV5Config, {"init": "x"}, "init is 'x', expected one of 'mamba', 'auth"),
    (
      RWKV6Config,
      {"polarization": Polarization(zeros=1, zero_decay="paper")},
      "zero_decay is 'paper', expected 'exact'",
    ),
  ],
)
def test_rwkv_configs_refuse_a_value_that_cannot_be(config, fields, message):
  with pytest.raises(ValueError, match=message):
    config(**fields)


def test_rwkv_refuses_a_width_that_its_heads_do_not_divide():
  with pytest.raises(ValueError, match="RWKV6: width is 8, expected a multip"):
    RWKV6(8, RWKV6Config(3), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="replace more channels than the 1"):
    RWKV5(4, RWKV5Config(4, polarization=REPLACED), rngs=nnx.Rngs(0))


def arrays_of(version, sort):
  """The golden file's arrays of a version under our names."""
  get = lambda name: published()[f"{version}:{sort}:{name}"]
  arrays = {
    "time_decay": get("time_decay").reshape(2, 4),
    "bonus": get("time_faaaa"),
    "r_proj": get("receptance.weight").T,
    "k_proj": get("key.weight").T,
    "v_proj": get("value.weight").T,
    "g_proj": get("gate.weight").T,
    "norm.scale": get("ln_x.weight").reshape(2, 4),
    "norm.bias": get("ln_x.bias").reshape(2, 4),
    "out_proj": get("output.weight").T,
  }
  if version == "x052":
    mixes = {f"mix_{name}": get(f"time_mix_{name}")[0, 0] for name in "rkvg"}
    return arrays | mixes
  # The published 1 - μ.
  turn = (lambda x: -x) if sort == "gradient" else (lambda x: 1 - x)
  mixes = {
    f"mix_{name}": turn(get(f"time_maa_{name}")[0, 0]) for name in "rkvgwx"
  }
  return (
    arrays
    | mixes
    | {
      "mix_down": get("time_maa_w1"),
      "mix_up": get("time_maa_w2"),
      "decay_down": get("time_decay_w1"),
      "decay_up": get("time_decay_w2"),
    }
  )


@functools.cache
def published():
  with np.load(GOLDEN) as golden:
    return dict(golden)


@functools.cache
def from_golden(version):
  model = jax.eval_shape(VERSIONS[version])
  for name, value in arrays_of(version, "weight").items():
    *path, last = name.split(".")
    owner = functools.reduce(getattr, path, model)
    assert getattr(owner, last).shape == value.shape, name
    setattr(owner, last, nnx.Param(jnp.asarray(value)))
  return model
