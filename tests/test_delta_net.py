"""DeltaNet and gated DeltaNet are the published ones."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from flax import nnx

from ssmjax.models import (
  DeltaNet,
  DeltaNetConfig,
  GatedDeltaNet,
  GatedDeltaNetConfig,
)

GOLDEN = pathlib.Path(__file__).with_name("golden") / "delta_net.npz"
CONFIGS = {
  "gated": GatedDeltaNetConfig(
    num_heads=4, num_key_heads=2, key_dim=3, expand_v=4 / 3
  ),
  "silu": DeltaNetConfig(num_heads=2),
  "elu": DeltaNetConfig(
    num_heads=2,
    key_dim=2,
    expand_v=2,
    d_conv=0,
    feature_map="elu",
    normalize="sum",
    allow_negative=True,
    output_gate=True,
  ),
}


@pytest.mark.parametrize(
  "name",
  [
    "gated",
    pytest.param("silu", marks=pytest.mark.nightly),
    pytest.param("elu", marks=pytest.mark.nightly),
  ],
)
def test_delta_net_gives_outputs_and_gradients_of_published_code(name):
  golden = published()

  @quick
  def run(model, x):
    def loss(model, x):
      y, _ = model(x)
      return (y * golden["weights"]).sum(), y

    return jax.grad(loss, (0, 1), has_aux=True)(model, x)

  model = from_golden(name)
  (grads, d_x), y = run(model, golden["inputs"])
  assert_close(y, golden[f"{name}:outputs"], "float32")
  assert_close(d_x, golden[f"{name}:gradient"], "float32")
  for key, expected in arrays_of(name, "gradient").items():
    assert_close(leaf(grads, key)[...], expected, "float32", key)


@pytest.mark.nightly
def test_gated_delta_net_in_a_packed_row_gives_each_document_its_outputs():
  golden = published()
  x = golden["inputs"].reshape(1, -1, 8)
  segment_ids = np.repeat([[3, 4]], golden["inputs"].shape[1], axis=1)
  run = quick(lambda model, x, ids: model(x, segment_ids=ids)[0])
  y = run(from_golden("gated"), x, segment_ids)
  y = y.reshape(golden["inputs"].shape)
  assert_close(y, golden["gated:outputs"], "float32")


@pytest.mark.nightly
def test_beta_above_one_lets_a_memory_change_its_sign():
  # With keys and values held, S goes from s to s (1 - 2) + 2 v at β = 2.
  config = DeltaNetConfig(num_heads=1, d_conv=0, allow_negative=True)
  model = DeltaNet(4, config, rngs=nnx.Rngs(0))
  model.beta_proj[...] = jnp.full((4, 1), 50.0)
  x = jnp.ones((1, 6, 4))
  _, state = model(x[:, :1])
  memory = [state.memory]
  for _ in range(3):
    _, state = model(x[:, :1], state)
    memory.append(state.memory)
  # The norm's epsilon takes 1e-6 / ‖k‖² of a unit key.
  np.testing.assert_allclose(memory[1], 0.0, atol=1e-4)
  np.testing.assert_allclose(memory[2], memory[0], atol=1e-4)
  assert jnp.abs(memory[0]).max() > 0.01


def test_gated_delta_net_starts_with_the_rates_and_steps_of_its_config():
  config = GatedDeltaNetConfig(
    num_heads=512, key_dim=1, expand_v=1, dt_min=0.01, rate_min=2, rate_max=4
  )
  model = quick(lambda key: GatedDeltaNet(2, config, rngs=nnx.Rngs(key)))(
    jax.random.key(0)
  )
  rate = np.exp(np.asarray(model.A_log[...], np.float64))
  dt = np.log1p(np.exp(np.asarray(model.dt_bias[...], np.float64)))
  middle = (np.arange(512) + 0.5) / 512
  for ranks in ((rate - 2) / 2, np.log(dt / 0.01) / np.log(10)):
    # Kolmogorov-Smirnov distance from uniform at p ≈ 1e-6.
    assert np.abs(np.sort(ranks) - middle).max() < 2.7 / np.sqrt(512)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"num_heads": 0}, "DeltaNetConfig: num_heads is 0, expected an integer"),
    ({"d_conv": -1}, "d_conv is -1, expected an integer"),
    ({"num_key_heads": 3}, "num_key_heads is 3, expected a divisor of num_he"),
    ({"feature_map": "relu"}, "feature_map is 'relu', expected one of 'silu'"),
    ({"normalize": "rms"}, "normalize is 'rms', expected one of 'l2', 'sum'."),
    ({"normalize": "sum"}, "normalize is 'sum' with feature_map='silu'"),
    ({"init": "xavier"}, "init is 'xavier', expected one of 'mamba', 'auth"),
  ],
)
def test_delta_net_config_refuses_a_value_that_cannot_be(fields, message):
  with pytest.raises(ValueError, match=message):
    DeltaNetConfig(**fields)


def test_gated_delta_net_refuses_what_cannot_be():
  with pytest.raises(ValueError, match="GatedDeltaNetConfig: dt_min is 0, exp"):
    GatedDeltaNetConfig(dt_min=0)
  with pytest.raises(ValueError, match=r"rate_min is 20.0 and rate_max 16"):
    GatedDeltaNetConfig(rate_min=20)
  build = lambda **fields: GatedDeltaNet(
    8, GatedDeltaNetConfig(**fields), rngs=nnx.Rngs(0)
  )
  with pytest.raises(ValueError, match="GatedDeltaNet: d_model is 8, expected"):
    build(num_heads=3)
  with pytest.raises(
    ValueError, match=r"expand_v is 1.2, expected a whole num"
  ):
    build(num_heads=2, expand_v=1.2)
  message = r"GatedDeltaNet: x has shape \(1, 3, 7\), expected \(B, T, M=8\)."
  with pytest.raises(ValueError, match=message):
    from_golden("gated")(jnp.zeros((1, 3, 7)))


def arrays_of(name, sort):
  """The golden file's arrays under our names."""
  prefix = f"{name}:{sort}:"
  get = {
    key.removeprefix(prefix): value
    for key, value in published().items()
    if key.startswith(prefix)
  }
  if name == "gated":
    # Published by head of keys: its q, k, both v and both z; both β and a.
    q, k, v, z = np.split(
      get["in_proj_qkvz.weight"].reshape(2, -1, 8), [3, 6, 14], 1
    )
    beta, decay = np.split(get["in_proj_ba.weight"].reshape(2, 4, 8), 2, 1)
    flat = lambda x: x.reshape(-1, 8).T
    return {
      "in_proj": np.concatenate(list(map(flat, (q, k, v, z))), 1),
      "beta_proj": flat(beta),
      "decay_proj": flat(decay),
      "A_log": get["A_log"],
      "dt_bias": get["dt_bias"],
      "conv.weight": get["conv1d.weight"][:, 0].T,
      "norm.scale": get["norm.weight"],
      "out_proj": get["out_proj.weight"].T,
    }
  parts = [f"{x}_proj.weight" for x in "qkvg" if f"{x}_proj.weight" in get]
  arrays = {
    "in_proj": np.concatenate([get[x] for x in parts]).T,
    "beta_proj": get["b_proj.weight"].T,
    "norm.scale": get["o_norm.weight"],
    "out_proj": get["o_proj.weight"].T,
  }
  if name == "silu":
    convs = [get[f"{x}_conv1d.weight"][:, 0].T for x in "qkv"]
    arrays["conv.weight"] = np.concatenate(convs, 1)
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
