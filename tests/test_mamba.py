"""Mamba is the published Mamba: its initial values, sizes and numbers."""

import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import TOLERANCE, assert_close, rms_error
from flax import nnx

from ssmjax.models import LanguageModel, Mamba, MambaConfig, ModelConfig
from ssmjax.types import Polarization

GOLDEN = pathlib.Path(__file__).with_name("golden") / "mamba.npz"
ONE, ZERO = Polarization(ones=1), Polarization(zeros=1)
BOTH = Polarization(ones=1, zeros=1)
REPLACED = Polarization(ones=1, zeros=1, placement="replace")
# LLVM's optimisations take most of the time here, and change no claim.
quick_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@functools.cache
def mixer(init="mamba"):
  build = lambda key: Mamba(
    128, MambaConfig(init=init), n_layers=4, rngs=nnx.Rngs(key)
  )
  return quick_jit(build)(jax.random.key(0))


@functools.cache
def draws():
  """dt_bias of many seeds, flat."""
  build = lambda key: Mamba(64, MambaConfig(), rngs=nnx.Rngs(key)).dt_bias[...]
  keys = jax.random.split(jax.random.key(1), 64)
  return quick_jit(jax.vmap(build))(keys).ravel()


def test_mambas_own_step_size_is_log_uniform_between_its_bounds():
  dt = np.asarray(jax.nn.softplus(draws()), np.float64)
  assert dt.min() >= 1e-3 * (1 - 1e-4)
  assert dt.max() <= 1e-1 * (1 + 1e-4)
  # log₁₀ Δ is uniform on [-3, -1]: Kolmogorov-Smirnov distance at p ≈ 1e-6.
  rank = np.sort((np.log10(dt) + 3) / 2)
  n = rank.size
  assert np.abs(rank - (np.arange(n) + 0.5) / n).max() < 2.7 / math.sqrt(n)


def test_mambas_step_size_follows_the_bounds_of_its_config():
  config = MambaConfig(dt_min=0.2, dt_max=0.3)
  build = lambda key: Mamba(8, config, rngs=nnx.Rngs(key)).dt_bias[...]
  dt = jax.nn.softplus(quick_jit(build)(jax.random.key(0)))
  assert dt.min() >= 0.2 * (1 - 1e-5)
  assert dt.max() <= 0.3 * (1 + 1e-5)


@pytest.mark.parametrize("init", ["mamba", "authors"])
def test_mamba_starts_from_decays_one_to_n_and_skips_of_one(init):
  levels = np.log(np.arange(1, 17))
  np.testing.assert_allclose(
    mixer(init).A_log[...], np.tile(levels, (256, 1)), rtol=1e-6
  )
  np.testing.assert_array_equal(mixer(init).D[...], np.ones(256))


@pytest.mark.parametrize(
  ("name", "fan_in", "scale"),
  [
    ("in_proj", 128, 1),
    ("conv_weight", 4, 1),
    ("conv_bias", 4, 1),
    ("x_proj", 256, 1),
    ("dt_proj", 8, 1),
    # One residual branch a layer, four layers.
    ("out_proj", 256, 1 / math.sqrt(4)),
  ],
)
def test_mambas_own_weights_are_uniform_as_in_pytorch(name, fan_in, scale):
  weight = np.asarray(getattr(mixer(), name)[...])
  bound = scale / math.sqrt(fan_in)
  assert np.abs(weight).max() <= bound
  assert_deviation(weight, bound / math.sqrt(3))


@pytest.mark.parametrize(
  ("name", "deviation"),
  [
    ("in_proj", 0.02),
    ("x_proj", 0.02),
    ("dt_proj", 0.02),
    ("out_proj", 0.02 / math.sqrt(2 * 4)),
    # Their code does not touch convolutions: PyTorch's default stays.
    ("conv_weight", 0.5 / math.sqrt(3)),
    ("conv_bias", 0.5 / math.sqrt(3)),
  ],
)
def test_authors_weights_are_normal_as_in_their_code(name, deviation):
  assert_deviation(np.asarray(getattr(mixer("authors"), name)[...]), deviation)


def test_a_recurrence_is_differentiated_forward_too():
  # The fused scans are not: showing Eq. 1 runs none.
  decays = lambda x: mixer("authors").recurrence(x).a
  x = jnp.ones((1, 3, 128))
  _, slope = jax.jvp(decays, (x,), (x,))
  near = (decays(1.001 * x) - decays(0.999 * x)) / 0.002
  np.testing.assert_allclose(slope, near, atol=1e-4)


def test_authors_decay_is_a_power_of_one_half_at_zero_input():
  show = lambda model, x: (model.recurrence(x).a, model.recurrence(x).dt)
  a, dt = quick_jit(show)(mixer("authors"), jnp.zeros((1, 1, 128)))
  # The convolution's bias reaches Δ through weights of 0.02 · 0.02.
  np.testing.assert_allclose(dt, math.log(2), atol=0.02)
  halvings = -np.log2(a[0, 0]) / np.arange(1, 17)
  np.testing.assert_allclose(halvings, 1, atol=0.03)


@pytest.mark.parametrize(
  ("polarization", "layers", "parameters"),
  [
    (None, 2, 1_282_048),
    (None, 4, 1_515_264),
    (ONE, 2, 1_283_072),
    (ONE, 4, 1_517_312),
    (ZERO, 2, 1_283_072),
    (ZERO, 4, 1_517_312),
    (BOTH, 2, 1_284_096),
    (BOTH, 4, 1_519_360),
    # The control has the size of the default.
    (REPLACED, 4, 1_515_264),
  ],
)
def test_recall_models_have_the_papers_parameter_counts(
  polarization, layers, parameters
):
  config = ModelConfig(
    vocab_size=8192,
    d_model=128,
    n_layers=layers,
    mixers=(MambaConfig(polarization=polarization),),
    final_norm="layer",
  )
  build = lambda: LanguageModel(config, rngs=nnx.Rngs(0))
  leaves = jax.tree.leaves(jax.eval_shape(build))
  assert sum(leaf.size for leaf in leaves) == parameters


@pytest.mark.parametrize("polarization", [None, BOTH, REPLACED])
def test_mamba_equals_its_equations_in_float64(polarization):
  config = MambaConfig(d_state=4, polarization=polarization)
  model = quick_jit(
    lambda key: shaken(Mamba(8, config, rngs=nnx.Rngs(key)), key)
  )(jax.random.key(0))
  x = jax.random.normal(jax.random.key(1), (2, 21, 8))
  y, state = quick_jit(lambda model, x: model(x))(model, x)
  params = {k: np.asarray(v[...], np.float64) for k, v in named(model).items()}
  expected, conv, ssm = equations(params, np.asarray(x, np.float64), config)
  assert_close(y, expected, jnp.float32)
  assert_close(state.conv, conv, jnp.float32)
  assert_close(state.ssm, ssm, jnp.float32)


def test_one_channel_sums_and_zero_channel_forgets_exactly():
  config = MambaConfig(d_state=2, polarization=BOTH)

  def decays(key):
    x = jax.random.normal(key, (1, 5, 8))
    return Mamba(8, config, rngs=nnx.Rngs(key)).recurrence(x).a

  a = quick_jit(decays)(jax.random.key(0))
  assert (a[..., 0] == 1).all()
  assert (a[..., -1] == 0).all()
  assert ((a[..., 1:-1] > 0) & (a[..., 1:-1] < 1)).all()


def test_mamba_gives_the_logits_of_published_code():
  golden = published()
  logits, _ = quick_jit(lambda m, x: m(x))(from_golden(), golden["tokens"])
  assert rms_error(logits, golden["logits"]) <= TOLERANCE[logits.dtype]


def test_mamba_gives_the_gradient_of_published_code():
  golden = published()

  def loss(model, tokens):
    logits = jax.nn.log_softmax(model(tokens)[0])[:, :-1]
    targets = tokens[:, 1:, None]
    return -jnp.take_along_axis(logits, targets, -1).mean()

  value, grads = quick_jit(jax.value_and_grad(loss))(
    from_golden(), golden["tokens"]
  )
  assert abs(value - golden["loss"]) <= TOLERANCE[value.dtype] * abs(value)
  block = jax.tree.map(lambda leaf: leaf[0], grads.blocks[0])
  expected = layer_of(golden, "gradient", 0)
  found = {"norm": block.norm.scale[...]} | {
    name: param[...] for name, param in named(block.mixer).items()
  }
  assert_close(found, expected, jnp.float32)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"d_state": 0}, "MambaConfig: d_state is 0, expected an integer"),
    ({"dt_rank": 0}, "MambaConfig: dt_rank is 0, expected an integer"),
    ({"dt_min": 0.2}, "dt_min is 0.2 and dt_max 0.1, expected 0 < dt_min <="),
    ({"init": "xavier"}, "init is 'xavier', expected one of 'mamba', 'auth"),
  ],
)
def test_mamba_config_refuses_a_value_that_cannot_be(fields, message):
  with pytest.raises(ValueError, match=message):
    MambaConfig(**fields)


def test_mamba_refuses_another_width_and_says_which_it_has():
  model = mixer()
  message = r"Mamba: x has shape \(1, 3, 7\), expected \(B, T, M=128\)."
  with pytest.raises(ValueError, match=message):
    model(jnp.zeros((1, 3, 7)))


def assert_deviation(weight, expected):
  """Mean 0 and this deviation, to five standard errors."""
  spread = 5 * expected / math.sqrt(weight.size)
  assert abs(weight.mean()) < spread
  assert abs(weight.std() - expected) < spread


def named(mixer):
  return {
    name: getattr(mixer, name)
    for name in (
      *("in_proj", "conv_weight", "conv_bias", "x_proj", "dt_proj", "dt_bias"),
      *("A_log", "D", "out_proj"),
    )
  }


def shaken(model, key):
  """The model with every parameter away from its initial value."""
  leaves, tree = jax.tree.flatten(model)
  keys = jax.random.split(key, len(leaves))
  return jax.tree.unflatten(
    tree,
    [
      x + 0.1 * jax.random.normal(k, x.shape)
      for x, k in zip(leaves, keys, strict=True)
    ],
  )


def equations(p, x, config):
  """The published block, token by token, in plain NumPy."""
  silu = lambda v: v / (1 + np.exp(-v))
  batch, length, _ = x.shape
  inner, learned = p["A_log"].shape
  rank = p["dt_proj"].shape[0]
  polarization = config.polarization or Polarization()
  ones, zeros = polarization.ones, polarization.zeros
  A = -np.exp(p["A_log"])
  if polarization.placement == "replace":
    A = A[:, ones : learned - zeros]
  states = ones + A.shape[1] + zeros
  window = np.zeros((batch, config.d_conv, inner))
  h = np.zeros((batch, inner, states))
  ys = []
  for t in range(length):
    u, z = np.split(x[:, t] @ p["in_proj"], 2, axis=-1)
    window = np.concatenate([window[:, 1:], u[:, None]], axis=1)
    u = silu((window * p["conv_weight"]).sum(1) + p["conv_bias"])
    low, B, C = np.split(u @ p["x_proj"], [rank, rank + states], axis=-1)
    delta = np.log1p(np.exp(low @ p["dt_proj"] + p["dt_bias"]))
    decay = np.concatenate(
      [
        np.ones((batch, inner, ones)),
        np.exp(delta[:, :, None] * A),
        np.zeros((batch, inner, zeros)),
      ],
      axis=-1,
    )
    h = decay * h + (delta * u)[:, :, None] * B[:, None]
    y = (h * C[:, None]).sum(-1) + p["D"] * u
    ys.append((y * silu(z)) @ p["out_proj"])
  return np.stack(ys, 1), window[:, 1:], h


def layer_of(golden, sort, index):
  """One layer's arrays of the golden file, under our names."""
  get = lambda name: golden[f"{sort}:backbone.layers.{index}.{name}"]
  mixer = lambda name: get(f"mixer.{name}")
  return {
    "norm": get("norm.weight"),
    "in_proj": mixer("in_proj.weight").T,
    "conv_weight": mixer("conv1d.weight")[:, 0].T,
    "conv_bias": mixer("conv1d.bias"),
    "x_proj": mixer("x_proj.weight").T,
    "dt_proj": mixer("dt_proj.weight").T,
    "dt_bias": mixer("dt_proj.bias"),
    "A_log": mixer("A_log"),
    "D": mixer("D"),
    "out_proj": mixer("out_proj.weight").T,
  }


@functools.cache
def published():
  with np.load(GOLDEN) as golden:
    return dict(golden)


@functools.cache
def from_golden():
  golden = published()
  config = ModelConfig(
    vocab_size=32,
    d_model=16,
    n_layers=2,
    mixers=(MambaConfig(d_state=4, dt_rank=3),),
  )
  model = jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
  layers = [layer_of(golden, "weight", i) for i in range(2)]
  stacked = {k: jnp.stack([layer[k] for layer in layers]) for k in layers[0]}
  block = model.blocks[0]
  block.norm.scale = nnx.Param(stacked.pop("norm"))
  for name, value in stacked.items():
    setattr(block.mixer, name, nnx.Param(value))
  model.embedding = nnx.Param(
    jnp.asarray(golden["weight:backbone.embeddings.weight"])
  )
  model.norm.scale = nnx.Param(
    jnp.asarray(golden["weight:backbone.norm_f.weight"])
  )
  return model
