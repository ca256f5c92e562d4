"""The LMU is the published one, and its memory holds the past."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick, rms_error
from flax import nnx

from ssmjax import ops
from ssmjax.models import LMUConfig, lmu

GOLDEN = pathlib.Path(__file__).with_name("golden") / "lmu.npz"


def test_lmu_gives_outputs_and_gradients_of_published_code():
  with np.load(GOLDEN) as golden:
    golden = dict(golden)

  def loss(weights, x):
    y, _ = from_published(weights)(x)
    waves = jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
    return (y * waves).sum(), y

  arrays = lambda sort: {
    key.removeprefix(sort): value
    for key, value in golden.items()
    if key.startswith(sort)
  }
  grads, y = quick(jax.grad(loss, (0, 1), has_aux=True))(
    arrays("weight:"), golden["inputs"]
  )
  assert_close(y, golden["outputs"], jnp.float32)
  expected = arrays("gradient:")
  assert len(expected) == 4
  # The published sums round, too.
  for key, value in expected.items():
    assert rms_error(grads[0][key], value) <= 1e-4, key
  assert rms_error(grads[1], golden["gradient"]) <= 1e-4
  a, b = lmu._held("legt", 5, 7.0)
  assert_close(a, golden["A"], jnp.float32)
  assert_close(b, golden["B"][:, 0], jnp.float32)


@pytest.mark.parametrize("measure", ["legt", "legs"])
def test_exponential_of_a_large_system_is_exact(x64, measure):
  # The step of the first token, and a step of many times 1/‖A‖.
  for size, window in ((4, 3.0), (32, 500.0), (12, 0.5)):
    a, b = lmu._held(measure, size, window)
    if measure == "legt":
      A, B = ops.hippo_legt(size, window)
    else:
      A, B = (v / window for v in ops.hippo_legs(size))
    expected = ops.zero_order_hold(
      jnp.asarray(A), jnp.asarray(B), 1.0, dense=True
    )
    np.testing.assert_allclose(a, expected[0], atol=1e-10)
    np.testing.assert_allclose(b, expected[1], atol=1e-10)


@pytest.mark.nightly
def test_memory_gives_back_its_window():
  config = LMUConfig(32, 1, 100.0)
  a, b, unit = lmu._system(config)
  x = np.sin(np.arange(300) / 15).astype(np.float32)
  states, _ = quick(ops.lti_matrix_scan)(x[None, :, None], a, b, unit)
  last = np.asarray(states)[0, -1, 0]
  # What is held is x up to the end of its last step.
  ago = np.arange(10, 90)
  basis = np.polynomial.legendre.legvander(2 * ago / 100 - 1, 31)
  found = basis @ last
  wanted = np.interp(300 - ago, np.arange(300) + 0.5, x)
  assert rms_error(found, wanted) < 0.01


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"channels": 0}, "LMUConfig: channels is 0, expected an integer"),
    ({"window": 0.0}, "window is 0.0, expected a finite number above 0."),
    ({"measure": "lagt"}, "measure is 'lagt', expected one of 'legt', 'legs'"),
    ({"implementation": "pallas"}, "implementation is 'pallas', expected one"),
  ],
)
def test_lmu_config_refuses_a_value_that_cannot_be(fields, message):
  with pytest.raises(ValueError, match=message):
    LMUConfig(**fields)


def from_published(weights):
  """The mixer of weights under their published names, W_out the identity."""
  config = LMUConfig(5, 1, 7.0)
  model = jax.eval_shape(lambda: config.build(4, 1, nnx.Rngs(0)))
  ours = {
    "in_proj": weights["W_u.weight"].T,
    "in_bias": weights["W_u.bias"],
    "read_proj": weights["W_h.weight"].T,
    "read_bias": weights["W_h.bias"],
    "out_proj": jnp.eye(4),
  }
  for name, value in ours.items():
    assert getattr(model, name).shape == value.shape, name
    setattr(model, name, nnx.Param(value))
  return model
