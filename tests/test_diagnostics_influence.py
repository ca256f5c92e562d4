"""Influence is the Jacobian's norm, however it is measured."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from flax import nnx

from ssmjax import diagnostics, theory
from ssmjax.models import (
  AttentionConfig,
  LanguageModel,
  Mamba,
  MambaConfig,
  ModelConfig,
)
from ssmjax.types import Polarization


@pytest.fixture(autouse=True)
def quick_compiles():
  """LLVM's optimisations would take most of the time, and change no claim."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def features(model, tokens, x):
  """What a language model makes of embeddings."""
  return model.features(tokens, embeddings=x)[0]


def mixing(weights, x):
  """A causal, non-linear map of 3 channels to 4, each row for itself."""
  mixed = jnp.einsum("ts,bsm,md->btd", jnp.tril(weights[0]), x, weights[1])
  return jnp.tanh(mixed)


@functools.cache
def small():
  """The map and an input, (2, 7, 3)."""
  keys = jax.random.split(jax.random.key(0), 3)
  weights = (
    jax.random.normal(keys[0], (7, 7)),
    jax.random.normal(keys[1], (3, 4)),
  )
  x = jax.random.normal(keys[2], (2, 7, 3))
  return jax.tree_util.Partial(mixing, weights), x


def norms(function, x):
  """‖∂yₜ/∂xₛ‖_F at [t, row, s] by the whole Jacobian."""
  return own_norms(quick(jax.jacrev(function))(x))


def own_norms(jacobian):
  """The rows' own parts of a Jacobian `[B, K, D, B, T, M]`."""
  rows = np.arange(jacobian.shape[0])
  own = np.asarray(jacobian, np.float64)[rows, :, :, rows]
  return np.moveaxis(np.sqrt((own**2).sum((2, 4))), 1, 0)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_exact_influence_is_the_norm_of_the_jacobian(batch_size):
  function, x = small()
  found = diagnostics.influence(function, x, [6, 0, 3], batch_size=batch_size)
  assert_close(found.score, norms(function, x)[[6, 0, 3]], jnp.float32)
  assert not found.standard_error.any()
  assert not found.score_error.any()
  assert found.probes is None
  default = diagnostics.influence(function, x)
  np.testing.assert_array_equal(default.times, [6])


def test_probes_err_as_much_as_they_say_and_not_to_one_side():
  function, x = small()
  exact = norms(function, x) ** 2
  found = diagnostics.influence(
    function, x, range(7), probes=150, key=jax.random.key(1), batch_size=50
  )
  inside = np.tril(np.ones((7, 7), bool))[:, None] & np.ones((1, 2, 1), bool)
  z = (found.squared - exact)[inside] / found.standard_error[inside]
  # 56 errors, correlated along s: the bounds are some three deviations.
  assert abs(z.mean()) < 1
  assert 0.6 < np.sqrt((z**2).mean()) < 1.6
  assert (found.squared[~inside] == 0).all()
  relative = found.standard_error[inside] / exact[inside]
  assert relative.max() < 2 * math.sqrt(2 / 150)


def test_a_batch_of_probes_is_the_same_probes_one_by_one():
  function, x = small()
  run = functools.partial(diagnostics.influence, function, x, [5, 2], probes=5)
  one, several = run(batch_size=1), run(batch_size=4)
  assert_close(one.squared, several.squared, jnp.float32)
  assert_close(one.standard_error, several.standard_error, jnp.float32)
  other = run(key=jax.random.key(3))
  assert (other.squared[0] != one.squared[0]).any()


def test_one_output_channel_has_no_probe_error():
  function = lambda x: jnp.cumsum(x, 1)[..., :1]
  x = jnp.ones((1, 4, 3))
  found = diagnostics.influence(function, x, probes=3)
  np.testing.assert_allclose(found.squared, 1.0)
  np.testing.assert_allclose(found.standard_error, 0.0, atol=1e-12)


def test_influence_sees_what_float32_cannot_square():
  function = lambda x: 1e-25 * jnp.cumsum(x, 1)
  found = diagnostics.influence(function, jnp.ones((1, 3, 4)))
  assert_close(found.score, np.full((1, 1, 3), 2e-25), jnp.float32)


def test_progress_wraps_the_batches():
  function, x = small()
  seen = []

  def bar(batches):
    assert len(batches) == 3
    for batch in batches:
      seen.append(batch)
      yield batch

  diagnostics.influence(function, x, probes=5, batch_size=2, progress=bar)
  assert len(seen) == 3


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"times": [7]}, "times is"),
    ({"times": []}, "times is"),
    ({"times": [-1]}, "times is"),
    ({"probes": 1}, "no error bar"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"x": jnp.ones((2, 7))}, "x has shape"),
    ({"x": jnp.ones((2, 7, 3), jnp.int32)}, "embeddings, not tokens"),
    ({"function": lambda x: x[:, 0]}, "the function gives"),
    ({"function": lambda x: (x, x)}, "the function gives"),
    ({"function": lambda x: x > 0}, "real floating type"),
  ],
)
def test_influence_says_what_does_not_fit(change, message):
  function, x = small()
  with pytest.raises(ValueError, match=message):
    diagnostics.influence(**({"function": function, "x": x} | change))


@functools.cache
def model():
  """Two layers, Mamba then attention, and six tokens."""
  mixers = (
    MambaConfig(
      d_state=3,
      polarization=Polarization(ones=1, zeros=1),
      implementation="associative",
    ),
    AttentionConfig(max_length=8),
  )
  config = ModelConfig(
    vocab_size=11, d_model=4, n_layers=2, mixers=mixers, remat=False
  )
  build = lambda key: LanguageModel(config, rngs=nnx.Rngs(key))
  tokens = jnp.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
  return quick(build)(jax.random.key(0)), tokens


def test_influence_of_a_model_is_its_jacobian_and_causal():
  built, tokens = model()
  function = jax.tree_util.Partial(features, built, tokens)
  x = jax.random.normal(jax.random.key(5), (2, 6, 4))
  times = [2, 5]
  found = diagnostics.influence(function, x, times, batch_size=8)
  whole = quick(jax.jacrev(lambda x: function(x)[:, jnp.array(times)]))(x)
  assert_close(found.score, own_norms(whole), jnp.float32)
  assert not found.score[0, :, 3:].any()
  assert (found.score[0, :, :3] > 0).all()
  probed = diagnostics.influence(function, x, times, probes=64, batch_size=8)
  error = np.abs(probed.squared - found.squared)
  assert (error <= 5 * probed.standard_error + 1e-9).all()


@pytest.mark.parametrize(
  "mixer",
  [
    MambaConfig(),
    pytest.param(AttentionConfig(num_heads=12), marks=pytest.mark.nightly),
  ],
  ids=["mamba", "mha"],
)
def test_sixteen_thousand_tokens_of_a_deep_model_take_less_than_8_gb(mixer):
  config = ModelConfig(
    vocab_size=256, d_model=768, n_layers=24, mixers=(mixer,)
  )
  # Shapes only: nothing of this size is made or run.
  built = jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
  tokens = jax.ShapeDtypeStruct((1, 16_384), jnp.int32)
  x = jax.ShapeDtypeStruct((1, 16_384, 768), jnp.float32)
  function = jax.tree_util.Partial(features, built, tokens)
  size = diagnostics.influence_memory(function, x)
  activations = 24 * 16_384 * 768 * 4
  assert activations < size < 8e9


@pytest.fixture(params=["mamba", pytest.param("s4", marks=pytest.mark.nightly)])
def layer(request):
  """A layer as a function, its window and an input."""
  x = jax.random.normal(jax.random.key(2), (2, 7, 3))
  if request.param == "s4":
    return complex_layer, 1, x
  config = MambaConfig(
    d_state=1,
    d_conv=2,
    expand=1,
    dt_min=0.1,
    dt_max=1.0,
    polarization=Polarization(ones=1, zeros=1),
  )
  build = lambda key: Mamba(3, config, rngs=nnx.Rngs(key))
  return quick(build)(jax.random.key(0)).recurrence, 2, x


def complex_layer(x):
  """Decays that turn and depend on the input, y = Re Σ h."""
  size = jax.nn.sigmoid(x)
  a = jax.lax.complex(size * 0.6, size * 0.7)
  b = jax.lax.complex(x, jnp.square(x))
  recurrence = theory.from_arrays(a, jnp.ones_like(x), b, jnp.conj(b))
  readout = jax.tree_util.Partial(_real, recurrence.readout)
  return type(recurrence)(
    recurrence.a, recurrence.dt, recurrence.b, recurrence.initial_state, readout
  )


def _real(readout, h, t):
  return readout(h, t).real


def test_closed_form_kernel_and_autodiff_agree(layer):
  function, window, x = layer
  found = quick(
    functools.partial(diagnostics.layer_influence, function, window=window)
  )(x)
  times = np.arange(x.shape[1])
  far = times[:, None] >= times + window
  assert_close(found.closed_form[:, far], found.autodiff[:, far])
  assert not found.closed_form[:, ~far].any()
  later = times[:, None] < times
  assert not found.autodiff[:, later].any()
  assert not found.kernel[:, later].any()
  assert not found.decay[:, later].any()

  r = quick(function)(x)
  # The readouts are linear in the state: what passes through it is the sum.
  through = theory.outputs(r) - theory.outputs(
    r, jnp.zeros_like(theory.states(r))
  )
  assert_close(found.kernel.sum(2), through)
  assert_close(found.log_a_max, diagnostics.log_a_max(r))

  whole = functools.partial(_outputs, function)
  exact = diagnostics.influence(whole, x, range(x.shape[1]), batch_size=8)
  assert_close(np.moveaxis(exact.score, 0, 1), found.autodiff, jnp.float32)


def test_influence_of_a_layer_is_seen_where_float32_cannot_square_it():
  def layer(x):
    a = jnp.full_like(x, 0.5)
    return theory.from_arrays(a, jnp.ones_like(x), x)

  run = functools.partial(diagnostics.layer_influence, layer, window=1)
  found = quick(run)(jnp.ones((1, 90, 1)))
  expected = 0.5 ** np.arange(89, 0, -1.0)
  for value in (found.closed_form, found.autodiff):
    np.testing.assert_allclose(value[0, -1, :-1], expected, rtol=1e-5)
  assert bool(found.local.holds)


@pytest.mark.nightly
def test_layer_influence_finds_its_window():
  def layer(x):
    mixed = x + jnp.pad(x, ((0, 0), (2, 0), (0, 0)))[:, :-2]
    return theory.from_arrays(jnp.full_like(x, 0.5), jnp.ones_like(x), mixed)

  found = diagnostics.layer_influence(layer, jnp.ones((1, 6, 1)))
  far = np.tri(6, k=-3, dtype=bool)
  assert found.window == 3
  assert bool(found.local.holds)
  assert_close(found.closed_form[:, far], found.autodiff[:, far])


def _outputs(layer, x):
  return theory.outputs(layer(x))


def test_log_decay_is_the_logarithm_of_the_product_for_every_time():
  a = jax.random.uniform(jax.random.key(0), (2, 6, 3, 2))
  a = a.at[:, 3, 0, 0].set(0.0).at[:, :, 1, 1].set(1.0)
  r = theory.from_arrays(a, a, a)
  weights = theory.parallel_weights(a)
  for time in (0, 3, 5):
    found = diagnostics.log_decay(r, time)
    assert_close(jnp.exp(found), weights[:, time])
  np.testing.assert_array_equal(
    diagnostics.log_decay(r), diagnostics.log_decay(r, 5)
  )
  assert (diagnostics.log_decay(r, 5)[:, :3, 0, 0] == -jnp.inf).all()
  with pytest.raises(ValueError, match="time is 6"):
    diagnostics.log_decay(r, 6)


def test_log_decay_reaches_where_products_underflow():
  half = jnp.full((1, 2000, 1), 0.5)
  found = diagnostics.log_decay(theory.from_arrays(half, half, half))
  assert_close(found[0, 0], jnp.array([-1999 * math.log(2)]))
  one = theory.from_arrays(*[half[:, :1]] * 3)
  assert diagnostics.log_a_max(one) == -jnp.inf


def test_slope_of_a_layer_of_one_decay_is_log_a_max():
  def layer(x):
    a = jnp.full_like(x, 0.8)
    return theory.from_arrays(a, a, x)

  x = jnp.ones((1, 40, 1))
  found = diagnostics.influence(
    functools.partial(_outputs, layer), x, range(40), batch_size=40
  )
  curve = diagnostics.lag_curve(found)
  bound = float(diagnostics.log_a_max(layer(x))[0])
  fit = diagnostics.fit_log_slope(
    curve.lags, np.log(curve.score), log_a_max=bound
  )
  np.testing.assert_allclose(fit.slope, math.log(0.8), rtol=1e-5)
  np.testing.assert_allclose(fit.log_a_max, math.log(0.8), rtol=1e-5)
  assert fit.low <= fit.slope <= fit.high
  assert fit.points == 39
  assert fit.r_squared > 1 - 1e-9


def test_lag_curve_averages_the_pairs_of_a_lag():
  rng = np.random.default_rng(0)
  times = np.array([4, 1, 6])
  squared, error = rng.random((2, 3, 2, 7))
  mask = rng.random((3, 2, 7)) < 0.7
  found = diagnostics.lag_curve(
    diagnostics.Influence(times, squared, error, 9), mask
  )
  for lag in range(7):
    pairs = [
      (squared[k, row, t - lag], error[k, row, t - lag])
      for k, t in enumerate(times)
      for row in range(2)
      if t >= lag and mask[k, row, t - lag]
    ]
    assert found.pairs[lag] == len(pairs)
    if not pairs:
      assert np.isnan(found.squared[lag])
      continue
    value, own = np.array(pairs).T
    n = len(value)
    np.testing.assert_allclose(found.squared[lag], value.mean())
    np.testing.assert_allclose(found.log_score[lag], np.log(value).mean() / 2)
    np.testing.assert_allclose(
      found.probe_error[lag], np.sqrt((own**2).sum()) / n
    )
    expected = value.std(ddof=1) / n**0.5 if n > 1 else np.nan
    np.testing.assert_allclose(found.spread_error[lag], expected)


@pytest.mark.parametrize(("probes", "found_of_it"), [(4, 0.6), (16, 0.85)])
def test_log_bias_is_most_of_what_probes_take_from_the_logarithm(
  probes, found_of_it
):
  # Of one output direction a probe gives χ² with a degree of freedom.
  rng = np.random.default_rng(0)
  drawn = rng.chisquare(1, (probes, 1, 20_000, 1))
  squared, error = drawn.mean(0), drawn.std(0, ddof=1) / probes**0.5
  found = diagnostics.lag_curve(
    diagnostics.Influence(np.array([0]), squared, error, probes)
  )
  # E log χ²_P/P = ψ(P/2) - log(P/2) is -0.2704 for P = 4, -0.0638 for 16.
  lost = {4: 0.2704, 16: 0.0638}[probes] / 2
  assert found.log_score[0] == pytest.approx(-lost, abs=0.01)
  assert found_of_it * lost < found.log_bias[0] < lost
  exact = diagnostics.lag_curve(
    diagnostics.Influence(np.array([0]), 0 * squared, 0 * error, None)
  )
  assert exact.log_bias[0] == 0


def test_slope_leaves_out_lags_that_are_not_finite():
  lags = np.array([1.0, 2.0, 3.0, np.inf, np.nan])
  fit = diagnostics.fit_log_slope(lags, -0.5 * np.arange(1, 6), log_a_max=-0.4)
  assert fit.points == 3
  assert fit.within_bound is True


def test_slopes_interval_holds_the_truth_as_often_as_it_says():
  rng = np.random.default_rng(1)
  lags = np.arange(200)
  hits, textbook, runs = 0, 0, 400
  for _ in range(runs):
    noise = rng.normal(size=lags.size + 50)
    # Neighbouring scores share tokens: errors of correlation 1/2.
    for i in range(1, noise.size):
      noise[i] += 0.5 * noise[i - 1]
    fit = diagnostics.fit_log_slope(lags, 1 - 0.1 * lags + noise[50:])
    hits += fit.low <= -0.1 <= fit.high
    x, y = lags[1:], (1 - 0.1 * lags + noise[50:])[1:]
    residual = y - np.polyval(np.polyfit(x, y, 1), x)
    plain = np.sqrt((residual**2).sum() / 197 / ((x - x.mean()) ** 2).sum())
    textbook += abs(fit.slope + 0.1) <= 1.97 * plain
  assert 0.9 < hits / runs < 0.97
  # Its interval is 0.57 as wide as it should be.
  assert textbook / runs < 0.8


@pytest.mark.parametrize(
  ("n", "quantile"),
  # Tables of Student's distribution at 97.5 %, n - 2 degrees of freedom.
  [(3, 12.706), (4, 4.303), (5, 3.182), (7, 2.571), (12, 2.228), (62, 2.000)],
)
def test_slopes_interval_is_students(n, quantile):
  values = np.random.default_rng(n).normal(size=n)
  fit = diagnostics.fit_log_slope(np.arange(n), values, first=0)
  half = (fit.high - fit.low) / 2
  np.testing.assert_allclose(half / fit.standard_error, quantile, rtol=5e-3)


def test_slope_leaves_out_zeros_and_lags_out_of_range():
  lags = np.arange(10)
  values = np.where(lags == 4, -np.inf, -0.5 * lags)
  values[[0, 9]] = 100
  fit = diagnostics.fit_log_slope(lags, values, last=8)
  assert fit.points == 7
  np.testing.assert_allclose(fit.slope, -0.5)
  assert fit.within_bound is None  # Of an unknown bound nothing is said.
  with pytest.raises(ValueError, match="expected 3 or more"):
    diagnostics.fit_log_slope(lags, values, last=2)
  with pytest.raises(ValueError, match="confidence is 2"):
    diagnostics.fit_log_slope(lags, values, confidence=2)
  with pytest.raises(ValueError, match="log_score"):
    diagnostics.fit_log_slope(lags, values[1:])
