"""H3 is the published layer, with heads of one channel and of several."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick, rms_error
from flax import nnx

from ssmjax.models import H3Config

GOLDEN = pathlib.Path(__file__).with_name("golden") / "h3.npz"


@pytest.mark.parametrize(
  "head_dim", [pytest.param(1, marks=pytest.mark.nightly), 2]
)
def test_h3_gives_outputs_and_gradients_of_published_code(head_dim):
  with np.load(GOLDEN) as golden:
    golden = {
      key[2:]: golden[key]
      for key in golden.files
      if key.startswith(f"{head_dim}:")
    }

  def loss(weights, x):
    y, _ = from_published(head_dim, weights)(x)
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
  assert grads[0].keys() == expected.keys()
  # The published sums round, too.
  for key, value in expected.items():
    assert rms_error(grads[0][key], value) <= 1e-4, key
  assert rms_error(grads[1], golden["gradient"]) <= 1e-4


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"head_dim": 0}, "H3Config: head_dim is 0, expected an integer"),
    ({"d_conv": 0}, "H3Config: d_conv is 0, expected an integer"),
    ({"spectrum": "hippo"}, "H3Config: spectrum is 'hippo', expected one of"),
    ({"dt_max": 1e-4}, "dt_min is 0.001 and dt_max 0.0001, expected 0 <"),
  ],
)
def test_h3_config_refuses_a_value_that_cannot_be(fields, message):
  with pytest.raises(ValueError, match=message):
    H3Config(**fields)


def test_h3_refuses_heads_that_do_not_divide_its_width():
  with pytest.raises(ValueError, match="H3: d_model is 8, expected a multiple"):
    H3Config(head_dim=3).build(8, 1, nnx.Rngs(0))


def from_published(head_dim, weights):
  """The mixer of weights under their published names."""
  config = H3Config(3, head_dim, d_conv=6)
  model = jax.eval_shape(lambda: config.build(4, 1, nnx.Rngs(0)))
  get = weights.__getitem__
  over = lambda name: [get(f"{side}_proj.{name}") for side in "qkv"]
  # Two vectors of a shift are one convolution, the skip its present tap.
  B, C = get("ssm_k_kernel.kernel.B"), get("ssm_k_kernel.kernel.C")[0]
  taps = [(B[:, : 6 - lag] * C[:, lag:]).sum(-1) for lag in range(6)]
  taps[0] = taps[0] + get("ssm_k_D")
  # Published outputs of a head lie apart: `(d h)`, where inputs are `(h d)`.
  out_proj = get("output_linear.weight").T.reshape(head_dim, -1, 4)
  ours = {
    "in_proj": jnp.concatenate(over("weight")).T,
    "in_bias": jnp.concatenate(over("bias")),
    "shift.weight": jnp.stack(taps[::-1]),
    "D": get("D"),
    "out_proj": jnp.moveaxis(out_proj, 0, 1).reshape(4, 4),
    "out_bias": get("output_linear.bias"),
    "system.log_dt": get("kernel.kernel.log_dt"),
    "system.A_log": get("kernel.kernel.inv_A_real"),
    "system.A_imag": get("kernel.kernel.A_imag"),
    "system.B": get("kernel.kernel.B"),
    "system.C": get("kernel.kernel.C")[0],
  }
  for name, value in ours.items():
    *path, last = name.split(".")
    owner = functools.reduce(getattr, path, model)
    assert getattr(owner, last).shape == value.shape, name
    setattr(owner, last, nnx.Param(value))
  return model
