"""Holds every model to one table: a model joins by one line of MODELS.

Most checks read one batch, whose rows are the same tokens in different
company, so that a model is compiled a handful of times.
"""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import user_mixer
from checks import TOLERANCE, assert_close, rms_error
from flax import nnx

from ssmjax.models import (
  AttentionConfig,
  CEMAConfig,
  DeltaNetConfig,
  DSSConfig,
  GatedDeltaNetConfig,
  GLAConfig,
  H3Config,
  HGRN2Config,
  HyenaConfig,
  LanguageModel,
  LinearAttentionConfig,
  LMUConfig,
  LonghornConfig,
  Mamba2Config,
  MambaConfig,
  MinGRUConfig,
  MinLSTMConfig,
  MLSTMConfig,
  ModelConfig,
  RetNetConfig,
  RGLRUConfig,
  RWKV4Config,
  RWKV5Config,
  RWKV6Config,
  RWKVChannelMixConfig,
  S4Config,
  S4DConfig,
  TTTLinearConfig,
)
from ssmjax.models.kinds import MIXERS
from ssmjax.types import Polarization

BOTH = Polarization(ones=1, zeros=1)
REPLACED = Polarization(ones=1, zeros=1, placement="replace")
MAMBA = functools.partial(MambaConfig, d_state=4)
MAMBA2 = functools.partial(Mamba2Config, d_state=4, head_dim=2)
CEMA = functools.partial(CEMAConfig, d_state=4)
HYENA = functools.partial(HyenaConfig, filter_width=4, max_length=12)
ATTENTION = functools.partial(AttentionConfig, num_heads=2, max_length=12)
GROUPED = functools.partial(
  ATTENTION, num_kv_heads=1, rotary_fraction=0.5, bias=True, out_bias=True
)
DELTA = functools.partial(DeltaNetConfig, num_heads=2, d_conv=2)
GATED_DELTA = functools.partial(GatedDeltaNetConfig, num_heads=2)
TTT = functools.partial(TTTLinearConfig, num_heads=2, mini_batch=3)
RGLRU = functools.partial(RGLRUConfig, num_blocks=2)
RWKV6 = functools.partial(RWKV6Config, 2, mix_rank=2, decay_rank=3)
LM = functools.partial(ModelConfig, 16, 8, 2)
# The documented example of a user's own mixer.
with user_mixer.registrations():
  EMAConfig = user_mixer.module(user_mixer.parts()[0]).EMAConfig

MODELS = {
  "mamba": MAMBA(),
  "mamba_both": MAMBA(polarization=BOTH),
  "mamba_replaced": MAMBA(polarization=REPLACED),
  "mamba_authors": MAMBA(init="authors"),
  "mamba_bf16": MAMBA(polarization=BOTH, dtype=jnp.bfloat16),
  "mamba2_both": MAMBA2(n_groups=2, polarization=BOTH),
  "mamba2_bf16": MAMBA2(d_ssm=12, polarization=REPLACED, dtype=jnp.bfloat16),
  "longhorn_both": LonghornConfig(d_state=4, polarization=BOTH),
  "longhorn_bf16": LonghornConfig(d_state=4, dtype=jnp.bfloat16),
  "attention": ATTENTION(),
  "attention_bf16": ATTENTION(dtype=jnp.bfloat16),
  "attention_window": ATTENTION(window=3, max_length=2),
  "attention_grouped": GROUPED(window=3, head_dim=8, dtype=jnp.bfloat16),
  "rglru": RGLRU(width=12, init="authors"),
  "rglru_both": RGLRU(polarization=BOTH),
  "rglru_bf16": RGLRU(polarization=REPLACED, dtype=jnp.bfloat16),
  "mingru": MinGRUConfig(expand=2, init="authors"),
  "mingru_bf16": MinGRUConfig(candidate="linear", dtype=jnp.bfloat16),
  "minlstm_both": MinLSTMConfig(d_conv=4, polarization=BOTH),
  "minlstm_bf16": MinLSTMConfig(polarization=REPLACED, dtype=jnp.bfloat16),
  "rwkv4_both": RWKV4Config(polarization=BOTH),
  "rwkv4_bf16": RWKV4Config(dtype=jnp.bfloat16),
  "rwkv5_both": RWKV5Config(2, polarization=BOTH, init="authors"),
  "rwkv5_bf16": RWKV5Config(2, dtype=jnp.bfloat16),
  "rwkv6_both": RWKV6(polarization=BOTH),
  "rwkv6_bf16": RWKV6(dtype=jnp.bfloat16),
  "rwkv_channel_mix": RWKVChannelMixConfig(width=12, init="authors"),
  "rwkv_channel_mix_bf16": RWKVChannelMixConfig(dtype=jnp.bfloat16),
  "mlstm_both": MLSTMConfig(2, value_width=4, polarization=BOTH),
  "mlstm_bf16": MLSTMConfig(2, polarization=REPLACED, dtype=jnp.bfloat16),
  "linear_attention": LinearAttentionConfig(
    2, feature_map="exp_mlp", head_norm=True
  ),
  "linear_attention_bf16": LinearAttentionConfig(2, dtype=jnp.bfloat16),
  "retnet_both": RetNetConfig(2, polarization=BOTH),
  "retnet_bf16": RetNetConfig(
    4, norm="rms", polarization=REPLACED, dtype=jnp.bfloat16
  ),
  "gla_both": GLAConfig(2, polarization=BOTH),
  "gla_bf16": GLAConfig(
    2, expand_k=1.0, polarization=REPLACED, dtype=jnp.bfloat16
  ),
  "hgrn2_both": HGRN2Config(2, lower_bound=0.25, polarization=BOTH),
  "hgrn2_bf16": HGRN2Config(2, polarization=REPLACED, dtype=jnp.bfloat16),
  "s4": S4Config(3),
  "s4_bf16": S4Config(2, "zoh", dtype=jnp.bfloat16),
  "s4_convolution": S4Config(3, implementation="convolution", init="authors"),
  "s4d_both": S4DConfig(3, "inv", polarization=BOTH),
  "s4d_real": S4DConfig(3, "real", "bilinear", gate=False, init="authors"),
  "s4d_bf16": S4DConfig(4, polarization=REPLACED, dtype=jnp.bfloat16),
  "dss_both": DSSConfig(3, "softmax", 10, polarization=BOTH),
  "dss_bf16": DSSConfig(3, gate=True, dtype=jnp.bfloat16),
  "h3_both": H3Config(3, 2, polarization=BOTH),
  "h3_bf16": H3Config(
    2, d_conv=1, spectrum="real", init="authors", dtype=jnp.bfloat16
  ),
  "lmu": LMUConfig(4, 2, 5.0),
  "lmu_bf16": LMUConfig(
    3, 1, 6.0, "legs", "gelu", init="authors", dtype=jnp.bfloat16
  ),
  "deltanet": DELTA(feature_map="elu", normalize="sum", output_gate=True),
  "deltanet_bf16": DELTA(allow_negative=True, d_conv=0, dtype=jnp.bfloat16),
  "gated_deltanet": GATED_DELTA(num_key_heads=1, init="authors"),
  "gated_deltanet_bf16": GATED_DELTA(key_dim=3, dtype=jnp.bfloat16),
  "ttt_linear": TTT(num_heads=1, d_conv=3, output_gate=True),
  "ttt_linear_bf16": TTT(init="authors", dtype=jnp.bfloat16),
  "hyena": HYENA(),
  "hyena_bf16": HYENA(order=3, init="authors", dtype=jnp.bfloat16),
  "cema_both": CEMA(polarization=BOTH),
  "cema_bf16": CEMA(polarization=REPLACED, dtype=jnp.bfloat16),
  "user_ema": EMAConfig(),
  "lm_mamba": LM(mixers=(MAMBA(),), final_norm="layer", init="authors"),
  "lm_attention": LM(mixers=(ATTENTION(),), mlp_ratio=2),
  "lm_options": LM(
    mixers=(GROUPED(),),
    tie_embeddings=False,
    block_norm="layer",
    embedding_norm=True,
    embedding_scale=1.5,
    logit_softcap=2.0,
    mlp="geglu",
    mlp_width=5,
    mlp_bias=True,
    parallel_residual=True,
  ),
  "lm_hybrid": LM(
    mixers=(MAMBA(polarization=BOTH), ATTENTION(positions="none")),
    mlp_ratio=2,
    max_positions=12,
  ),
  "lm_griffin": LM(
    mixers=(RGLRU(polarization=REPLACED), ATTENTION(window=3)), mlp_ratio=3
  ),
  "lm_min_rnn": LM(mixers=(MinGRUConfig(d_conv=4), MinLSTMConfig())),
  "lm_bf16": LM(
    mixers=(MAMBA(dtype=jnp.bfloat16), ATTENTION(dtype=jnp.bfloat16)),
    dtype=jnp.bfloat16,
  ),
}
# Kinds that share an op and most of their code. By day the table has one of
# each, at night all; what a kind computes, its own tests say every day.
FAMILIES = (
  {S4Config, LMUConfig},
  {S4DConfig, DSSConfig, CEMAConfig},
  {H3Config},
  {HyenaConfig},
  {MambaConfig},
  {Mamba2Config},
  {RGLRUConfig, LonghornConfig, MinGRUConfig, MinLSTMConfig},
  {RWKV4Config},
  {RWKV5Config, RWKV6Config},
  {GLAConfig, HGRN2Config, LinearAttentionConfig, RetNetConfig},
  {MLSTMConfig},
  {DeltaNetConfig, GatedDeltaNetConfig},
  {TTTLinearConfig},
  {AttentionConfig},
  {RWKVChannelMixConfig},
)
# The rows that put most together: Mamba in float32 is in "lm_hybrid".
BY_DAY = {
  *("lmu", "s4d_both", "h3_both", "hyena", "mamba_bf16", "mamba2_both"),
  *("rglru_both", "rwkv4_both", "rwkv6_both", "gla_both", "mlstm_both"),
  *("gated_deltanet", "ttt_linear", "attention", "rwkv_channel_mix"),
  *("user_ema", "lm_options", "lm_hybrid"),
}
# Mixers without a diagonal Eq. 1.
NOT_EQ1 = (
  AttentionConfig,
  H3Config,
  LMUConfig,
  S4Config,
  DeltaNetConfig,
  HyenaConfig,
  RWKVChannelMixConfig,
  TTTLinearConfig,
)
# Through these, transformations see every mixer and the model around it.
TRANSFORMED = {"lm_hybrid"}
# By day one mixer runs over a long sequence, at night all of them.
LONG = {"rglru_both"}
# These begin by day without a state too: a state of channels, one of heads,
# one with a window of tokens, one of a matrix, and all in a model.
STATELESS = {"s4d_both", "mamba_bf16", "h3_both", "mlstm_both", "lm_hybrid"}

WIDTH, LENGTH = 8, 8
# Row by row: whole; another end; the first five tokens with padding on the
# left, on the right, in between; five tokens and three others; these alone;
# three tokens, padding and the three others.
SEGMENTS = np.array(
  [
    [1, 1, 1, 1, 1, 1, 1, 1],
    [1, 1, 1, 1, 1, 1, 1, 1],
    [0, 0, 0, 1, 1, 1, 1, 1],
    [1, 1, 1, 1, 1, 0, 0, 0],
    [1, 1, 0, 1, 0, 0, 1, 1],
    [1, 1, 1, 1, 1, 2, 2, 2],
    [1, 1, 1, 0, 0, 0, 0, 0],
    [0, 1, 1, 1, 0, 2, 2, 2],
  ],
  np.int32,
)
TRACES = collections.Counter()
# LLVM's optimisations take most of the time here, and change no claim.
quick_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def table(only=BY_DAY, models=MODELS):
  """One parameter a model; outside of `only` it is for the night."""
  late = models.keys() - only
  return pytest.mark.parametrize(
    "name",
    [
      pytest.param(name, marks=[pytest.mark.nightly] if name in late else [])
      for name in models
    ],
  )


def test_table_has_every_kind_and_no_name_that_is_not_there():
  narrow = {name for name in MODELS if dtype_of(name) == jnp.bfloat16}
  for names in (MODELS.keys() - narrow, narrow):
    assert kinds_of(names) >= set(MIXERS.values())
  assert sorted(MIXERS.values(), key=str) == sorted(
    (kind for family in FAMILIES for kind in family), key=str
  )
  for family in FAMILIES:
    assert family & kinds_of(BY_DAY), family
  assert MODELS.keys() >= BY_DAY
  for names in (LONG, STATELESS, TRANSFORMED):
    assert names <= BY_DAY


@table()
def test_model_gives_outputs_of_its_inputs_shape_and_dtype(name):
  model, x = model_of(name), inputs(name)
  y, state = run(model, x, model.init_state(8), SEGMENTS)
  width = MODELS[name].vocab_size if is_lm(name) else WIDTH
  assert y.shape == (8, LENGTH, width)
  assert y.dtype == jnp.float32
  assert jax.tree.map(kind, state) == jax.tree.map(kind, model.init_state(8))
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((y, state)))


@table()
def test_model_keeps_its_parameters_in_float32(name):
  for path, param in nnx.to_flat_state(nnx.state(model_of(name))):
    assert isinstance(param, nnx.Param), path
    assert param[...].dtype == jnp.float32, path


@table(STATELESS)
def test_model_without_state_and_segments_starts_at_the_beginning(name):
  model, x = model_of(name), inputs(name)
  y, _ = run(model, x, None, None)
  close(name, y[:2], whole(name)[0][:2])


@table()
def test_model_is_causal(name):
  y, _ = whole(name)
  close(name, y[1, :5], y[0, :5])
  assert rms_error(y[1, 5:], y[0, 5:]) > 1e-3


@table()
def test_model_sees_no_padding_wherever_it_stands(name):
  y, state = whole(name)
  for row in (2, 3, 4):
    close(name, y[row][SEGMENTS[row] > 0], y[0, :5])
    if not is_lm(name):
      assert not y[row][SEGMENTS[row] == 0].any()
  close_after(name, state, (2, 3, 4))


@table()
def test_model_keeps_packed_documents_apart(name):
  y, state = whole(name)
  close(name, y[5, :5], y[0, :5])
  close(name, y[5, 5:], y[6, :3])
  close(name, y[7, 1:4], y[0, :3])
  close(name, y[7, 5:], y[6, :3])
  close_after(name, state, (5, 6, 7))


@table()
def test_model_run_in_halves_equals_the_whole(name):
  check_pieces(name, (4, 4))


# By day steps, too, take one token at a time.
@table(TRANSFORMED)
def test_model_run_token_by_token_equals_the_whole(name):
  check_pieces(name, (1, 1, 1, 1, 4))


def check_pieces(name, pieces):
  model, x = model_of(name), inputs(name)
  expected, expected_state = whole(name)
  state, ys, start = model.init_state(8), [], 0
  for length in pieces:
    piece = slice(start, start + length)
    y, state = run(model, x[:, piece], state, SEGMENTS[:, piece])
    ys.append(y)
    start += length
  # In the last row a document begins with a piece: that goes on from the
  # state, by definition.
  close(name, jnp.concatenate(ys, 1)[:7], expected[:7])
  y, expected = after(name, state), after(name, expected_state)
  close(name, y[:7], expected[:7])


@table()
def test_model_prefilled_and_stepped_equals_the_whole(name):
  model, x = model_of(name), inputs(name)
  expected, _ = whole(name)
  _, state = run(model, x[:, :4], model.init_state(8), SEGMENTS[:, :4])
  rows = np.array([0, 1, 2, 3, 4, 6])  # A step never begins a document.
  for t in range(4, LENGTH):
    y, state = step(model, x[:, t], state, SEGMENTS[:, t])
    valid = rows[SEGMENTS[rows, t] > 0]
    close(name, y[valid], expected[valid, t])
    if not is_lm(name):
      assert not y[SEGMENTS[:, t] == 0].any()


@table()
def test_model_has_finite_gradients_that_padding_does_not_change(name):
  model = model_of(name)
  grads, d_x = gradients(model, inputs(name), SEGMENTS)
  expected, expected_d_x = gradients(model, inputs(name, padding=0.5), SEGMENTS)
  assert_close(grads, expected, dtype_of(name))
  for path, grad in nnx.to_flat_state(nnx.state(grads)):
    assert jnp.isfinite(grad[...]).all(), path
    assert jnp.any(grad[...]), path
  if not is_lm(name):
    close(name, d_x, expected_d_x)
    assert not d_x[SEGMENTS == 0].any()


@table()
def test_model_compiles_once_for_all_its_instances(name):
  x, (expected, _) = inputs(name), whole(name)
  # What other tests compiled may have been dropped since.
  model = model_of(name)
  run(model, x, model.init_state(8), SEGMENTS)
  before = TRACES["run"]
  for seed in range(2):
    model = model_of(name, seed)
    y, _ = run(model, x + 0, model.init_state(8), SEGMENTS)
  assert TRACES["run"] == before
  assert rms_error(y[:2], expected[:2]) > 1e-3


@table()
def test_model_saved_by_orbax_gives_the_same_outputs(name, tmp_path):
  model = model_of(name)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "model", nnx.state(model))
    checkpointer.wait_until_finished()
    graphdef, other = nnx.split(model_of(name, seed=1))
    restored = checkpointer.restore(tmp_path / "model", other)
  state = model.init_state(8)
  again, _ = run(nnx.merge(graphdef, restored), inputs(name), state, SEGMENTS)
  np.testing.assert_array_equal(again, whole(name)[0])


@table(models={k: v for k, v in MODELS.items() if not k.startswith("lm_")})
def test_mixer_shows_its_recurrence_or_says_why_it_has_none(name):
  model, x = model_of(name), inputs(name)
  if isinstance(MODELS[name], NOT_EQ1):
    with pytest.raises(NotImplementedError, match="no diagonal Eq"):
      model.recurrence(x)
    return

  @quick_jit
  def literal(eq1):
    def body(h, t):
      h = eq1.a[:, t] * h + eq1.dt[:, t] * eq1.b[:, t]
      return h, eq1.readout(h, t)

    return jax.lax.scan(body, eq1.initial_state, jnp.arange(LENGTH))[1]

  # It leaves one jit and enters another: a recurrence is a pytree.
  eq1 = quick_jit(lambda model, x: model.recurrence(x))(model, x)
  assert eq1.a.shape == eq1.b.shape
  y = jnp.moveaxis(literal(eq1), 0, 1)
  close(name, y[:2], whole(name)[0][:2])


@table(LONG, {k: v for k, v in MODELS.items() if not k.startswith("lm_")})
def test_mixer_has_a_finite_gradient_over_four_thousand_tokens(name):
  config = MODELS[name]
  if isinstance(config, HyenaConfig):  # Whose filters have a length.
    config = dataclasses.replace(config, max_length=4096)
  x = jax.random.normal(jax.random.key(1), (1, 4096, WIDTH))

  @quick_jit
  def gradients_of(key, x):
    model = config.build(WIDTH, 2, nnx.Rngs(key))
    loss = lambda model, x: jnp.square(model(x)[0]).mean()
    return jax.grad(loss, (0, 1))(model, x)

  grads, d_x = gradients_of(jax.random.key(0), x)
  assert jnp.isfinite(d_x).all()
  for path, grad in nnx.to_flat_state(nnx.state(grads)):
    assert jnp.isfinite(grad[...]).all(), path
    assert jnp.any(grad[...]), path


@table(TRANSFORMED)
def test_model_is_differentiated_over_stacked_seeds(name):
  x = inputs(name)
  seeds = [model_of(name, seed) for seed in range(2)]
  models = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
  over_seeds = jax.vmap(both_gradients, (0, None, None))
  stacked, _ = quick_jit(over_seeds)(models, x, SEGMENTS)
  for i, model in enumerate(seeds):
    one = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
    assert_close(one, gradients(model, x, SEGMENTS)[0], dtype_of(name))


@table(TRANSFORMED)
@pytest.mark.nightly
def test_model_is_built_for_stacked_seeds(name):
  keys = jax.random.split(jax.random.key(7), 2)
  stacked = quick_jit(jax.vmap(functools.partial(build, name)))(keys)
  one = jax.tree.map(lambda leaf: leaf[1], stacked)
  assert_close(one, quick_jit(build, static_argnums=0)(name, keys[1]))


@table(TRANSFORMED)
@pytest.mark.parametrize(
  "where", [pytest.param("inside", marks=pytest.mark.nightly), "outside"]
)
def test_model_sharded_over_devices_has_the_whole_gradient(name, where):
  model, x = model_of(name), inputs(name)
  mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))
  data = jax.P("data")
  if where == "inside":
    sharded = jax.shard_map(
      lambda *args: both_gradients(*args)[0],
      mesh=mesh,
      in_specs=(jax.P(), data, data),
      out_specs=jax.P(),
    )
  else:
    total = jax.shard_map(
      lambda *args: jax.lax.psum(objective(*args), "data"),
      mesh=mesh,
      in_specs=(jax.P(), data, data),
      out_specs=jax.P(),
    )
    sharded = jax.grad(total)
  grads = quick_jit(sharded)(model, x, jnp.asarray(SEGMENTS))
  assert_close(grads, gradients(model, x, SEGMENTS)[0], dtype_of(name))


def is_lm(name):
  return isinstance(MODELS[name], ModelConfig)


def kinds_of(names):
  return {type(MODELS[name]) for name in names}


def dtype_of(name):
  return getattr(MODELS[name], "dtype", jnp.float32)


def build(name, key):
  config, rngs = MODELS[name], nnx.Rngs(key)
  if is_lm(name):
    return LanguageModel(config, rngs=rngs)
  return config.build(WIDTH, 2, rngs)


@functools.cache
def model_of(name, seed=0):
  return quick_jit(build, static_argnums=0)(name, jax.random.key(seed))


@functools.cache
def inputs(name, padding=None):
  """The batch, with NaN or tokens that do not exist in its padding."""
  keys = jax.random.split(jax.random.key(1), 3)
  if is_lm(name):
    draw = lambda key, n: jax.random.randint(key, (n,), 0, 16)
    x, wild = np.zeros((8, LENGTH), np.int32), [-5, 16, 1 << 30]
  else:
    draw = lambda key, n: jax.random.normal(key, (n, WIDTH))
    x, wild = np.zeros((8, LENGTH, WIDTH), np.float32), [np.nan]
  a, other, b = (
    np.asarray(draw(k, n)) for k, n in zip(keys, (8, 3, 3), strict=True)
  )
  for row, segments in enumerate(SEGMENTS):
    x[row, segments == 1] = a[: (segments == 1).sum()]
    x[row, segments == 2] = b[: (segments == 2).sum()]
  x[1, 5:] = other
  x[6, :3] = b
  holes = SEGMENTS == 0
  if padding is None:
    x[holes] = np.resize(wild, x[holes].shape)
  else:
    x[holes] = padding
  return jnp.asarray(x)


@functools.cache
def whole(name):
  model = model_of(name)
  return run(model, inputs(name), model.init_state(8), SEGMENTS)


@quick_jit
def run(model, x, state, segment_ids):
  TRACES["run"] += 1
  return model(x, state, segment_ids)


@quick_jit
def step(model, x, state, segment_ids):
  return model.step(x, state, segment_ids)


def objective(model, x, segment_ids):
  y, _ = model(x, segment_ids=segment_ids)
  weights = jnp.sin(jnp.arange(y[0].size, dtype=y.dtype)).reshape(y[0].shape)
  return jnp.where(segment_ids[..., None] > 0, y * weights, 0.0).sum()


def both_gradients(model, x, segment_ids):
  """By the parameters, and by the inputs where they are not tokens."""
  if jnp.issubdtype(x.dtype, jnp.integer):
    return jax.grad(objective)(model, x, segment_ids), None
  return jax.grad(objective, (0, 1))(model, x, segment_ids)


gradients = quick_jit(both_gradients)


def close(name, actual, expected):
  limit = TOLERANCE[jnp.dtype(dtype_of(name))]
  assert rms_error(actual, expected) <= limit


def close_after(name, state, rows):
  """A next token finds the rows in the same state."""
  y = after(name, state)
  for row in rows[1:]:
    close(name, y[row], y[rows[0]])


def after(name, state):
  """What a next token, the same for every row, gives."""
  x = inputs(name)
  token = jnp.broadcast_to(x[0, 0], x[:, 0].shape)
  return step(model_of(name), token, state, np.ones(8, np.int32))[0]


def kind(leaf):
  return leaf.shape, leaf.dtype
