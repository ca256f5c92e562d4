"""Mamba-2 and FalconMamba are the published ones: numbers, slopes, sizes."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from flax import nnx

from ssmjax.models import (
  LanguageModel,
  Mamba2,
  Mamba2Config,
  MambaConfig,
  ModelConfig,
  config_from_json,
  config_to_json,
)
from ssmjax.types import Polarization

GOLDEN = pathlib.Path(__file__).with_name("golden")
BOTH = Polarization(ones=1, zeros=1)
REPLACED = Polarization(ones=1, zeros=1, placement="replace")
DEPTHWISE = lambda x: x[:, 0].T
MAMBA2 = {
  "in_proj": ("in_proj.weight", np.transpose),
  "conv.weight": ("conv1d.weight", DEPTHWISE),
  "conv.bias": ("conv1d.bias", np.asarray),
  "dt_bias": ("dt_bias", np.asarray),
  "A_log": ("A_log", np.asarray),
  "D": ("D", np.asarray),
  "norm_scale": ("norm.weight", np.asarray),
  "out_proj": ("out_proj.weight", np.transpose),
}
FALCON = {
  "in_proj": ("in_proj.weight", np.transpose),
  "conv_weight": ("conv1d.weight", DEPTHWISE),
  "conv_bias": ("conv1d.bias", np.asarray),
  "x_proj": ("x_proj.weight", np.transpose),
  "dt_proj": ("dt_proj.weight", np.transpose),
  "dt_bias": ("dt_proj.bias", np.asarray),
  "A_log": ("A_log", np.asarray),
  "D": ("D", np.asarray),
  "out_proj": ("out_proj.weight", np.transpose),
}
PUBLISHED = {
  "mamba2": (
    Mamba2Config(
      d_state=3, d_conv=3, head_dim=4, n_groups=2, norm_epsilon=1e-4,
      dt_least=0.02, dt_greatest=0.5,
    ),
    1e-4, MAMBA2, "lm_head.weight",
  ),
  # The published norms of B, C and Δ as its inference has them: the fused
  # training kernel gives other numbers.
  "falcon_mamba": (
    MambaConfig(d_state=3, dt_rank=3, norm_epsilon=1e-2),
    1e-5, FALCON, "backbone.embeddings.weight",
  ),
}  # fmt: skip


# The logits alone: see the checkpoints' tests, by day.
@pytest.mark.nightly
@pytest.mark.parametrize("name", PUBLISHED)
def test_layers_give_the_logits_and_gradients_of_published_code(name):
  golden, model, head = from_golden(name)
  tokens = golden["tokens"]

  def loss(model, head):
    logits = model.features(tokens)[0] @ head.T
    chances = jax.nn.log_softmax(logits)[:, :-1]
    picked = jnp.take_along_axis(chances, tokens[:, 1:, None], -1)
    return -picked.mean(), logits

  slope = jax.value_and_grad(loss, (0, 1), has_aux=True)
  (value, logits), (grads, d_head) = quick(slope)(model, head)
  assert_close(logits, golden["logits"], jnp.float32)
  assert_close(value, golden["loss"], jnp.float32)
  block = jax.tree.map(lambda leaf: leaf[0], grads.blocks[0])
  expected = layer_of(name, golden, "gradient", 0)
  found = {key: at(block.mixer, key)[...] for key in expected}
  assert_close(found, expected, jnp.float32)
  norm = golden["gradient:backbone.layers.0.norm.weight"]
  assert_close(block.norm.scale[...], norm, jnp.float32)
  if name == "mamba2":
    assert_close(d_head, golden["gradient:lm_head.weight"], jnp.float32)


@pytest.mark.parametrize(
  "config",
  [
    Mamba2Config(
      d_state=3, head_dim=2, d_ssm=12, n_groups=2, norm="before_gate",
      skip_per_channel=True, polarization=BOTH,
    ),
    pytest.param(
      Mamba2Config(
        d_state=5, head_dim=4, norm="none", dt_greatest=0.7,
        polarization=REPLACED,
      ),
      marks=pytest.mark.nightly,
    ),
    pytest.param(
      Mamba2Config(d_state=1, head_dim=1, expand=1, n_groups=4, d_conv=1),
      marks=pytest.mark.nightly,
    ),
  ],
)  # fmt: skip
def test_mamba2_equals_its_equations_in_float64(config):
  @quick
  def run(key, x):
    model = shaken(Mamba2(8, config, rngs=nnx.Rngs(key)), key)
    return model, model(x)

  x = jax.random.normal(jax.random.key(1), (2, 13, 8))
  model, (y, state) = run(jax.random.key(0), x)
  expected, hidden = equations(model, np.asarray(x, np.float64))
  assert_close(y, expected, jnp.float32)
  assert_close(state.ssm, hidden, jnp.float32)


def test_mamba2_starts_from_the_published_decays_steps_and_skips():
  config = Mamba2Config(d_state=1, head_dim=1, A_min=2.0, A_max=5.0)
  build = lambda key: Mamba2(512, config, rngs=nnx.Rngs(key))
  model = quick(build)(jax.random.key(0))
  dt = np.log10(np.asarray(jax.nn.softplus(model.dt_bias[...]), np.float64))
  for low, high, draws in (
    (2, 5, np.exp(model.A_log[...])),
    (-3, -1, dt),
  ):
    rank = np.sort((draws - low) / (high - low))
    assert rank[0] >= -1e-4
    assert rank[-1] <= 1 + 1e-4
    # Kolmogorov-Smirnov distance from uniform at p ≈ 1e-6.
    middle = (np.arange(1024) + 0.5) / 1024
    assert np.abs(rank - middle).max() < 2.7 / 32
  np.testing.assert_array_equal(model.D[...], np.ones(1024))
  np.testing.assert_array_equal(model.norm_scale[...], np.ones(1024))


def test_added_heads_have_channels_of_their_own():
  config = Mamba2Config(d_state=4, head_dim=8, polarization=BOTH)
  model = jax.eval_shape(lambda: Mamba2(16, config, rngs=nnx.Rngs(0)))
  # Four learned heads and two more, each with z, x and Δ.
  assert model.in_proj.shape == (16, 2 * 48 + 2 * 4 + 6)
  assert model.out_proj.shape == (48, 16)
  assert model.A_log.shape == (4,)
  assert model.dt_bias.shape == model.D.shape == (6,)


def test_mamba2_goes_through_json_with_every_field():
  mixer = Mamba2Config(
    d_ssm=64, n_groups=2, dt_least=0.01, dt_greatest=2.0, norm="before_gate",
    skip_per_channel=True, polarization=REPLACED, dtype=jnp.bfloat16,
  )  # fmt: skip
  config = ModelConfig(257, 64, 4, mixers=(mixer, MambaConfig(norm_epsilon=1)))
  assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == (
    config
  )


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"head_dim": 0}, "Mamba2Config: head_dim is 0, expected an integer"),
    ({"d_ssm": 0}, "Mamba2Config: d_ssm is 0, expected an integer"),
    ({"dt_min": 0.2}, "Mamba2Config: dt_min is 0.2 and dt_max 0.1, expected 0"),
    ({"A_min": 0.0}, "A_min is 0.0, expected a finite number above 0"),
    ({"dt_least": 1, "dt_greatest": 0.5}, "dt_least is 1.0 and dt_great"),
    ({"norm_epsilon": 0.0}, "norm_epsilon is 0.0, expected a finite"),
    ({"norm": "rms"}, "norm is 'rms', expected one of 'after_gate', 'before_"),
    ({"init": "xavier"}, "init is 'xavier', expected one of 'mamba', 'auth"),
    (
      {"polarization": Polarization(zeros=1, zero_decay="paper")},
      "zero_decay is 'paper', expected 'exact'",
    ),
  ],
)
def test_mamba2_config_refuses_a_value_that_cannot_be(fields, message):
  with pytest.raises(ValueError, match=message):
    Mamba2Config(**fields)


def test_mamba2_refuses_what_does_not_fit_it():
  build = lambda **fields: Mamba2(
    8, Mamba2Config(head_dim=4, **fields), rngs=nnx.Rngs(0)
  )
  with pytest.raises(ValueError, match="the heads have 6 channels together"):
    build(d_ssm=6)
  with pytest.raises(ValueError, match="no more than the inner width of 16"):
    build(d_ssm=20)
  with pytest.raises(ValueError, match="there are 6 heads, polarized ones"):
    build(n_groups=4, polarization=BOTH)
  with pytest.raises(ValueError, match="replace more channels than the 1"):
    build(d_ssm=4, polarization=REPLACED)
  message = r"Mamba2: x has shape \(1, 3, 7\), expected \(B, T, M=8\)."
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: build()(jnp.zeros((1, 3, 7))))


def test_mamba_config_refuses_a_negative_epsilon():
  with pytest.raises(ValueError, match=r"norm_epsilon is -1.0, expected a fi"):
    MambaConfig(norm_epsilon=-1.0)


def shaken(model, key):
  """The model with every parameter away from its initial value."""
  leaves, tree = jax.tree.flatten(model)
  keys = jax.random.split(key, len(leaves))
  shake = lambda x, k: x + 0.3 * jax.random.normal(k, x.shape)
  return jax.tree.unflatten(tree, map(shake, leaves, keys))


def equations(model, x):
  """The block, token by token and head by head, in plain NumPy."""
  config = model.config
  p = {
    name: np.asarray(at(model, name)[...], np.float64)
    for name in MAMBA2
    if name != "norm_scale" or config.norm != "none"
  }
  silu = lambda v: v / (1 + np.exp(-v))
  batch, P, N, G = len(x), config.head_dim, config.d_state, config.n_groups
  polarization = config.polarization or Polarization()
  H = p["dt_bias"].size
  width = H * P
  mlp = p["out_proj"].shape[0] - width
  decays = np.exp(p["A_log"])
  if polarization.placement == "add" and config.polarization:
    decays = np.concatenate([[0], decays, [0]])
  least, greatest = config.dt_least, config.dt_greatest or math.inf
  skips = np.repeat(p["D"], width // p["D"].size).reshape(H, P)
  window = np.zeros((batch, config.d_conv, width + 2 * G * N))
  h, ys = np.zeros((batch, H, P, N)), []
  for t in range(x.shape[1]):
    ends = np.cumsum([mlp, mlp, width, width + 2 * G * N])
    m, n, z, u, delta = np.split(x[:, t] @ p["in_proj"], ends, -1)
    window = np.concatenate([window[:, 1:], u[:, None]], axis=1)
    u = silu((window * p["conv.weight"]).sum(1) + p["conv.bias"])
    u, B, C = np.split(u, [width, width + G * N], -1)
    u = u.reshape(batch, H, P)
    dt = np.clip(np.log1p(np.exp(delta + p["dt_bias"])), least, greatest)
    y = np.zeros((batch, H, P))
    for head in range(H):
      a = np.exp(-dt[:, head] * decays[head])
      if config.polarization and head in (0, H - 1):
        a = np.full(batch, 1.0 if head == 0 else 0.0)
      group = slice(head // (H // G) * N, (head // (H // G) + 1) * N)
      write = dt[:, head, None] * u[:, head]
      h[:, head] = (
        a[:, None, None] * h[:, head]
        + write[:, :, None] * B[:, None, group]
      )  # fmt: skip
      y[:, head] = (h[:, head] * C[:, None, group]).sum(-1)
      y[:, head] += skips[head] * u[:, head]
    y = y.reshape(batch, width)
    if config.norm == "before_gate":
      groups = y.reshape(batch, G, -1)
      scale = np.sqrt((groups**2).mean(-1, keepdims=True) + 1e-5)
      y = (groups / scale).reshape(batch, width) * p["norm_scale"] * silu(z)
    elif config.norm == "after_gate":
      groups = (y * silu(z)).reshape(batch, G, -1)
      scale = np.sqrt((groups**2).mean(-1, keepdims=True) + 1e-5)
      y = (groups / scale).reshape(batch, width) * p["norm_scale"]
    else:
      y = y * silu(z)
    ys.append(np.concatenate([silu(m) * n, y], -1) @ p["out_proj"])
  return np.stack(ys, 1), h


def at(module, name):
  """A parameter by its dotted name."""
  return functools.reduce(getattr, name.split("."), module)


def layer_of(name, golden, sort, index):
  """One layer's arrays of a golden file, under our names."""
  get = lambda theirs: golden[f"{sort}:backbone.layers.{index}.mixer.{theirs}"]
  table = PUBLISHED[name][2]
  return {ours: change(get(theirs)) for ours, (theirs, change) in table.items()}


def from_golden(name):
  """A golden file, its model and its output matrix."""
  with np.load(GOLDEN / f"{name}.npz") as file:
    golden = dict(file)
  mixer, epsilon, _, head = PUBLISHED[name]
  config = ModelConfig(
    24, 8, 2, mixers=(mixer,), norm_epsilon=epsilon, remat=False
  )
  model = jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
  get = lambda key: golden[f"weight:{key}"]
  put = lambda module, key, value: setattr(module, key, nnx.Param(value))
  block = model.blocks[0]
  layers = [layer_of(name, golden, "weight", i) for i in range(2)]
  for key in layers[0]:
    *path, last = key.split(".")
    module = at(block.mixer, ".".join(path)) if path else block.mixer
    value = np.stack([layer[key] for layer in layers])
    assert getattr(module, last).shape == value.shape, key
    put(module, last, jnp.asarray(value))
  norms = [get(f"backbone.layers.{i}.norm.weight") for i in range(2)]
  put(block.norm, "scale", jnp.asarray(np.stack(norms)))
  put(model.norm, "scale", jnp.asarray(get("backbone.norm_f.weight")))
  put(model, "embedding", jnp.asarray(get("backbone.embeddings.weight")))
  return golden, model, jnp.asarray(get(head))
