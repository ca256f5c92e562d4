"""S4, S4D and DSS are the published ones, and keep what theory says."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick, rms_error
from flax import nnx

from ssmjax import ops
from ssmjax.models import DSSConfig, S4Config, S4DConfig
from ssmjax.models.gelu import gelu
from ssmjax.types import Polarization

GOLDEN = pathlib.Path(__file__).with_name("golden") / "s4.npz"
BOTH = Polarization(ones=1, zeros=1)
REPLACED = Polarization(ones=1, zeros=1, placement="replace")
PUBLISHED = {
  "s4": S4Config(3),
  "s4d_legs": S4DConfig(3),
  "s4d_inv": S4DConfig(3, "inv", "bilinear", gate=False),
  "dss_exp": DSSConfig(3),
  "dss_softmax": DSSConfig(3, "softmax", 19),
}
night = functools.partial(pytest.param, marks=pytest.mark.nightly)


@pytest.mark.parametrize(
  "name",
  ["s4", night("s4d_legs"), "s4d_inv", night("dss_exp"), "dss_softmax"],
)
def test_layer_gives_outputs_and_gradients_of_published_code(name):
  golden = published(name)

  def loss(weights, x):
    y, _ = from_published(name, weights)(x)
    waves = jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
    return (y * waves).sum(), y

  weights = arrays_of(golden, "weight")
  grads, y = quick(jax.grad(loss, (0, 1), has_aux=True))(
    weights, golden["inputs"]
  )
  assert_close(y, golden["outputs"], jnp.float32)
  expected = arrays_of(golden, "gradient")
  assert len(expected) >= 3
  found = {key: grads[0][key] for key in expected}
  # The published sums round, too.
  for key, value in expected.items():
    assert rms_error(found[key], value) <= 1e-4, key
  assert rms_error(grads[1], golden["gradient"]) <= 1e-4


def test_initial_spectra_are_the_published_ones():
  ours = built(S4Config(3)).system
  first = arrays_of(published("s4"), "initial")
  np.testing.assert_allclose(
    np.sort(ours.A_imag[0]),
    np.sort(first["layer.kernel.A_imag"][0]),
    rtol=1e-5,
  )
  low = np.linalg.norm(first["layer.kernel.P"][0, 0], axis=-1)
  np.testing.assert_allclose(
    np.sort(np.linalg.norm(ours.P[0], axis=-1)), np.sort(low), rtol=1e-5
  )
  ours = built(S4DConfig(3, "inv")).system
  first = arrays_of(published("s4d_inv"), "initial")
  np.testing.assert_allclose(
    ours.A_imag[0], first["layer.kernel.A_imag"][0], rtol=1e-5
  )


@pytest.mark.nightly
@pytest.mark.parametrize("discretization", ["bilinear", "zoh"])
def test_s4_stepped_is_s4_by_matrices(discretization):
  # The step is O(N) by the low rank, the scan has the whole matrix.
  model = built(S4Config(4, discretization))
  x = jax.random.normal(jax.random.key(1), (2, 70, 4))
  y, final = quick(lambda model, x: model(x))(model, x)
  state, ys = model.init_state(2), []
  step = quick(lambda model, x, state: model.step(x, state))
  for t in range(x.shape[1]):
    out, state = step(model, x[:, t], state)
    ys.append(out)
  assert_close((jnp.stack(ys, 1), state), (y, final), jnp.float32)


@pytest.mark.nightly
def test_s4_convolved_is_s4_in_chunks():
  x = jax.random.normal(jax.random.key(1), (1, 150, 4))

  @quick
  def run(key, x):
    outputs = []
    for form in ("chunked", "convolution"):
      model = S4Config(8, implementation=form).build(4, 1, nnx.Rngs(key))
      loss = lambda model, x: jnp.square(model(x)[0]).sum()
      grads = nnx.to_flat_state(nnx.state(jax.grad(loss)(model, x)))
      grads = {".".join(map(str, path)): v[...] for path, v in grads}
      outputs.append((model(x), grads))
    return outputs

  chunked, convolution = run(jax.random.key(0), x)
  assert_close(convolution[0], chunked[0], jnp.float32)
  for name, grad in chunked[1].items():
    assert rms_error(convolution[1][name], grad) <= 1e-4, name


def test_dss_softmax_has_the_kernel_of_the_paper():
  model = built(DSSConfig(4, "softmax", 50))
  system = model.system
  A = jax.lax.complex(-jnp.exp(system.A_log[...]), system.A_imag[...])
  W = jax.lax.complex(system.C[..., 0], system.C[..., 1])
  expected = ops.dss_kernel(A, W, jnp.exp(system.log_dt[...]), 50)
  impulse = jnp.zeros((1, 50, 4)).at[0, 0].set(1.0)
  run = lambda system: system.scan(impulse, jnp.zeros(4), None, None, None)[0]
  kernel = quick(run)(system)
  assert_close(kernel[0].T, expected, jnp.float32)


@pytest.mark.parametrize(
  "config",
  [
    night(S4DConfig(4, polarization=BOTH)),
    S4DConfig(4, "lin", "bilinear", polarization=REPLACED),
    night(DSSConfig(4, "softmax", 10, polarization=BOTH)),
  ],
)
def test_polarized_channels_see_their_input_whole(config):
  x = jax.random.normal(jax.random.key(1), (1, 3, 4))
  show = lambda key: config.build(4, 1, nnx.Rngs(key)).recurrence(x)
  eq1 = jax.tree.map(np.asarray, quick(show)(jax.random.key(0)))
  states = 4 if config.polarization.placement == "replace" else 6
  assert eq1.a.shape == (1, 3, 4, states)
  assert (eq1.a[..., 0] == 1).all()
  assert (eq1.a[..., -1] == 0).all()
  size = np.abs(eq1.a[..., 1:-1])
  assert ((size > 0) & (size < 1)).all()
  # Δ B x, where B is 1 at first.
  assert_close(np.abs(eq1.b[..., 0]), np.abs(x), jnp.float32)
  assert_close(np.abs(eq1.b[..., -1]), np.abs(x), jnp.float32)


def test_gelu_is_that_of_the_error_function():
  x = jnp.linspace(-6, 6, 401)
  exact = functools.partial(jax.nn.gelu, approximate=False)
  both = lambda f: quick(jax.vmap(jax.value_and_grad(f)))(x)
  (value, slope), (right, right_slope) = both(gelu), both(exact)
  np.testing.assert_allclose(value, right, atol=2e-6)
  np.testing.assert_allclose(slope, right_slope, atol=5e-6)


@pytest.mark.parametrize(
  ("config", "fields", "message"),
  [
    (S4Config, {"d_state": 0}, "S4Config: d_state is 0, expected an integer"),
    (S4Config, {"dt_min": 0.2}, "dt_min is 0.2 and dt_max 0.1, expected 0 <"),
    (S4Config, {"discretization": "euler"}, "discretization is 'euler', exp"),
    (
      S4Config,
      {"discretization": "zoh", "implementation": "convolution"},
      "discretization 'zoh', expected 'bilinear'",
    ),
    (S4DConfig, {"spectrum": "hippo"}, "S4DConfig: spectrum is 'hippo', exp"),
    (S4DConfig, {"implementation": "pallas"}, "implementation is 'pallas', e"),
    (
      S4DConfig,
      {"polarization": Polarization(zeros=1, zero_decay="authors")},
      "zero_decay is 'authors', expected 'exact'",
    ),
    (DSSConfig, {"version": "clip"}, "version is 'clip', expected one of"),
    (
      DSSConfig,
      {"softmax_length": 0},
      "softmax_length is 0, expected an integer",
    ),
  ],
)
def test_config_refuses_a_value_that_cannot_be(config, fields, message):
  with pytest.raises(ValueError, match=message):
    config(**fields)


def test_s4d_refuses_to_replace_more_channels_than_there_are():
  with pytest.raises(ValueError, match="replace more channels than the 1"):
    S4DConfig(1, polarization=REPLACED).build(4, 1, nnx.Rngs(0))


def built(config):
  build = lambda key: config.build(4, 1, nnx.Rngs(key))
  return quick(build)(jax.random.key(0))


@functools.cache
def published(name):
  with np.load(GOLDEN) as golden:
    prefix = f"{name}:"
    return {
      key.removeprefix(prefix): golden[key]
      for key in golden.files
      if key.startswith(prefix)
    }


def arrays_of(golden, sort):
  prefix = f"{sort}:"
  return {
    key.removeprefix(prefix): value
    for key, value in golden.items()
    if key.startswith(prefix)
  }


def from_published(name, weights):
  """The mixer of weights under their published names."""
  config = PUBLISHED[name]
  model = jax.eval_shape(lambda: config.build(4, 1, nnx.Rngs(0)))
  get = weights.__getitem__
  dss = name.startswith("dss")
  kernel = "kernel." if dss else "layer.kernel."
  linear = "output_linear." + ("" if dss else "0.")
  ours = {"log_dt": get(kernel + ("log_dt" if dss else "inv_dt")).reshape(4)}
  if name == "dss_exp":
    ours["A_log"] = get(kernel + "Lambda_log_neg_re")[None]
    ours["A_imag"] = get(kernel + "Lambda_im")[None]
  elif name == "dss_softmax":
    ours["A_log"] = jnp.log(-get(kernel + "Lambda")[None, :, 0])
    ours["A_imag"] = get(kernel + "Lambda")[None, :, 1]
  else:
    # The published half of the pairs is that of negative frequencies.
    ours["A_log"] = get(kernel + "A_real")
    ours["A_imag"] = -get(kernel + "A_imag")
    ours["B"] = get(kernel + "B")[0]
  ours["C"] = get(kernel + ("W" if dss else "C"))[0]
  if name == "s4":
    ours["P"] = get(kernel + "P")[0]
  for key, value in ours.items():
    assert getattr(model.system, key).shape == value.shape, key
    setattr(model.system, key, nnx.Param(value))
  model.D = nnx.Param(get("D" if dss else "layer.D")[0])
  model.out_proj = nnx.Param(get(linear + "weight").T)
  model.out_bias = nnx.Param(get(linear + "bias"))
  return model
