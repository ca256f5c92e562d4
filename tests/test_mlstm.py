"""The mLSTM is the published one, and exact where its gates overflow."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from flax import nnx

from ssmjax.models import MLSTM, MLSTMConfig
from ssmjax.types import Polarization

GOLDEN = pathlib.Path(__file__).with_name("golden") / "mlstm.npz"
BOTH = Polarization(ones=1, zeros=1)
REPLACED = Polarization(ones=1, zeros=1, placement="replace")


def test_mlstm_gives_outputs_and_gradients_of_published_code():
  golden = published()

  def loss(model, x):
    y, _ = model(x)
    return (y * golden["weights"]).sum(), y

  run = quick(jax.grad(loss, (0, 1), has_aux=True))
  (grads, d_x), y = run(from_golden(), golden["inputs"])
  assert_close(y, golden["outputs"], jnp.float32)
  assert_close(d_x, golden["gradient"], jnp.float32)
  expected = arrays_of("gradient")
  assert_close(named(grads), expected, jnp.float32)


def test_packed_documents_of_gates_above_one_have_finite_gradients():
  config = MLSTMConfig(1, 4, 4, forget_gate="exp", input_bias=0.0)
  model = MLSTM(4, config, rngs=nnx.Rngs(0))
  # exp(15 tanh(2)) a token: what six documents of a chunk multiply overflows.
  bias = model.gate_bias[...]
  model.gate_bias = nnx.Param(jnp.full_like(bias, 30.0))
  x = jax.random.normal(jax.random.key(0), (1, 60, 4))
  ids = jnp.arange(60)[None] // 3 + 1
  loss = lambda m, x, ids: jnp.square(m(x, segment_ids=ids)[0]).sum()
  packed = quick(jax.grad(loss, (0, 1)))(model, x, ids)
  one = jax.vmap(lambda x: loss(model, x[None], None))
  alone = quick(jax.grad(lambda x: one(x.reshape(20, 3, 4)).sum()))(x)
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(packed))
  assert_close(packed[1], alone)


@pytest.mark.parametrize(
  ("bias", "forget_gate", "implementation"),
  [
    (400.0, "sigmoid", "reference"),
    pytest.param(400.0, "sigmoid", "chunked", marks=pytest.mark.nightly),
    pytest.param(-20.0, "sigmoid", "chunked", marks=pytest.mark.nightly),
    pytest.param(0.0, "exp", "chunked", marks=pytest.mark.nightly),
  ],
)
def test_mlstm_with_gates_that_overflow_equals_its_equations_in_float64(
  bias, forget_gate, implementation
):
  config = MLSTMConfig(
    4, 8, 12, forget_gate, None, bias, polarization=REPLACED,
    implementation=implementation,
  )  # fmt: skip
  x = jax.random.normal(jax.random.key(1), (2, 19, 6))
  ids = np.repeat([[1, 2]], 2, 0).repeat([8, 11], 1)

  @quick
  def run(key, x):
    model = MLSTM(6, config, rngs=nnx.Rngs(key))
    model.gate_proj = nnx.Param(30 * model.gate_proj[...])

    def loss(model, x):
      y, _ = model(x, segment_ids=ids)
      return (y * jnp.sin(jnp.arange(y.size)).reshape(y.shape)).sum(), y

    grads, y = jax.grad(loss, (0, 1), has_aux=True)(model, x)
    return model, model._before_scan(x, ids), y, grads

  model, parts, y, grads = run(jax.random.key(0), x)
  assert_close(y, equations(model, *parts, ids), jnp.float32)
  for path, grad in jax.tree.leaves_with_path(grads):
    assert jnp.isfinite(grad).all(), path


@pytest.mark.nightly
def test_mlstm_has_a_finite_gradient_over_four_thousand_tokens():
  x = jax.random.normal(jax.random.key(1), (1, 4096, 4))
  config = MLSTMConfig(2, polarization=REPLACED)

  @quick
  def gradients(key, x):
    model = MLSTM(4, config, rngs=nnx.Rngs(key))
    loss = lambda model, x: jnp.square(model(x)[0]).mean()
    return jax.grad(loss, (0, 1))(model, x)

  for leaf in jax.tree.leaves(gradients(jax.random.key(0), x)):
    assert jnp.isfinite(leaf).all()


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"num_heads": 0}, "MLSTMConfig: num_heads is 0, expected an integer"),
    ({"gate_soft_cap": 0.0}, "gate_soft_cap is 0.0, expected a finite"),
    ({"forget_gate": "tanh"}, "forget_gate is 'tanh', expected one of 'sigmo"),
    (
      {"polarization": Polarization(zeros=1, zero_decay="authors")},
      "zero_decay is 'authors', expected 'exact'",
    ),
  ],
)
def test_mlstm_config_refuses_a_value_that_cannot_be(fields, message):
  with pytest.raises(ValueError, match=message):
    MLSTMConfig(**fields)


def test_mlstm_refuses_widths_that_its_heads_do_not_divide():
  for field in ("key_width", "value_width"):
    config = MLSTMConfig(3, **{"key_width": 6, "value_width": 6, field: 8})
    with pytest.raises(ValueError, match=f"{field} is 8, expected a multiple"):
      MLSTM(6, config, rngs=nnx.Rngs(0))


def equations(model, q, k, v, o, log_i, log_f, ids):
  """The layer token by token in float64, in units of e^peak."""
  q, k, v, o, log_i, log_f = (
    np.asarray(x, np.float64) for x in (q, k, v, o, log_i, log_f)
  )
  batch, length, heads, width = k.shape
  q = q / np.sqrt(width)
  ys = []
  for t in range(length):
    if t == 0 or ids[0, t] != ids[0, t - 1]:
      memory = np.zeros((batch, heads, width, v.shape[-1]))
      norm = np.zeros((batch, heads, width))
      peak = np.zeros((batch, heads))
    new = np.maximum(np.maximum(log_f[:, t] + peak, log_i[:, t]), 0)
    f = np.exp(log_f[:, t] + peak - new)[..., None]
    i = np.exp(log_i[:, t] - new)[..., None]
    peak = new
    outer = k[:, t, :, :, None] * v[:, t, :, None]
    memory = f[..., None] * memory + i[..., None] * outer
    norm = f * norm + i * k[:, t]
    bottom = np.abs((norm * q[:, t]).sum(-1))
    bottom = np.maximum(bottom, np.exp(-peak))
    h = np.einsum("bhkv,bhk->bhv", memory, q[:, t]) / bottom[..., None]
    h = h - h.mean(-1, keepdims=True)
    h = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6)
    y = (o[:, t] * h).reshape(batch, -1)
    ys.append(y @ np.asarray(model.out_proj[...], np.float64))
  return np.stack(ys, 1)


def named(model):
  """The model's arrays as `arrays_of` has them."""
  norm = model.norm.scale[...].reshape(-1)
  return {"norm": norm} | {
    name: getattr(model, name)[...]
    for name in arrays_of("weight")
    if name != "norm"
  }


def arrays_of(sort):
  """The golden file's arrays under our names."""
  get = lambda name: published()[f"{sort}:{name}"]
  both = lambda name: np.concatenate(
    [get(f"{gate}gate_preact.{name}") for gate in "if"]
  )
  return {
    "q_proj": get("q.weight").T,
    "k_proj": get("k.weight").T,
    "v_proj": get("v.weight").T,
    "o_proj": get("ogate_preact.weight").T,
    "gate_proj": both("weight").T,
    "gate_bias": both("bias"),
    "norm": get("multihead_norm.weight"),
    "out_proj": get("out_proj.weight").T,
  }


@functools.cache
def published():
  with np.load(GOLDEN) as golden:
    return dict(golden)


@functools.cache
def from_golden():
  build = lambda: MLSTM(12, MLSTMConfig(2), rngs=nnx.Rngs(0))
  model = jax.eval_shape(build)
  weights = arrays_of("weight")
  model.norm.scale = nnx.Param(jnp.asarray(weights.pop("norm")).reshape(2, 6))
  model.norm.bias = nnx.Param(jnp.zeros((2, 6)))
  for name, value in weights.items():
    assert getattr(model, name).shape == value.shape, name
    setattr(model, name, nnx.Param(jnp.asarray(value)))
  return model
