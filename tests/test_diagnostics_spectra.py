"""Spectra count the decays in use, also while a model is trained."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_close, quick
from flax import nnx

from ssmjax import diagnostics, theory
from ssmjax.training import FitConfig, fit

pytestmark = pytest.mark.usefixtures("strict")

SPECTRUM = quick(
  diagnostics.spectrum,
  static_argnames=("state_axes", "bins", "levels", "thresholds"),
)


def decays(a):
  """A recurrence of these decays."""
  return theory.from_arrays(a, jnp.ones_like(a), jnp.ones_like(a))


def random_decays():
  return jax.random.uniform(jax.random.key(0), (2, 9, 3, 4))


# XLA's reductions of few numbers keep NaN, those of many do not.
@pytest.mark.parametrize("length", [4, 5000])
def test_a_decay_that_is_nan_is_not_left_out(length):
  a = jnp.full((1, length, 2, 1), 0.5).at[0, -1, 1, 0].set(jnp.nan)
  found = SPECTRUM(decays(a))
  both = [False, True]
  for value in (
    found.a_min, found.a_max, found.memory[:, 0], found.quantiles[0],
  ):  # fmt: skip
    assert jnp.isnan(value).tolist() == both
  assert float(found.histogram.sum()) == pytest.approx(1 - 0.5 / length)
  assert jnp.isnan(diagnostics.log_a_max(decays(a))).all()


@pytest.mark.parametrize("masked", [False, True])
def test_spectrum_is_what_counting_gives(masked):
  mask = np.ones((2, 9), bool)
  a = random_decays()
  if masked:
    mask[0, 5:], mask[1, 0] = False, False
    a = jnp.where(jnp.asarray(mask)[..., None, None], a, jnp.nan)
  found = SPECTRUM(
    decays(a),
    mask=jnp.asarray(mask) if masked else None,
    bins=7,
    levels=(0.1, 0.5),
    thresholds=(0.3, 0.5),
  )
  kept = np.asarray(a, np.float64)[mask]  # [samples, C, N]
  low, high = kept.min((0, 2)), kept.max((0, 2))
  assert_close(found.a_min, low, jnp.float32)
  assert_close(found.a_max, high, jnp.float32)
  assert_close(found.spread, high - low, jnp.float32)
  assert_close(found.token_spread, np.ptp(kept, 2).mean(0), jnp.float32)
  counts, edges = np.histogram(kept, 7, (0, 1))
  assert_close(found.histogram, counts / counts.sum(), jnp.float32)
  assert_close(found.edges, edges, jnp.float32)
  quantiles = np.quantile(kept, (0.1, 0.5), axis=(0, 2))
  assert_close(found.quantiles, quantiles, jnp.float32)
  mean = np.exp(np.log(kept).mean(0))
  assert_close(found.mean_decay, mean, jnp.float32)
  assert_close(found.memory, -1 / np.log(mean), jnp.float32)
  above = [(mean > level).mean() for level in (0.3, 0.5)]
  assert_close(found.share_above, np.array(above), jnp.float32)
  assert_close(found.share_below, 1 - np.array(above), jnp.float32)


def test_memory_is_the_time_in_which_a_token_falls_to_one_over_e():
  rates = jnp.array([0.001, 0.1, 2.0])
  a = jnp.broadcast_to(jnp.exp(-rates), (1, 12, 3))
  found = diagnostics.memory_length(decays(a))
  # Near 1, float32 holds a decay's rate to 6e-8 over the rate only.
  np.testing.assert_allclose(found, 1 / rates, rtol=1e-4)
  total = jnp.exp(diagnostics.log_decay(decays(a))[0, 0])
  np.testing.assert_allclose(total, jnp.exp(-11 / found), rtol=1e-5)


def test_exact_channels_remember_for_ever_and_not_at_all():
  a = jnp.broadcast_to(jnp.array([1.0, 0.5, 0.0]), (2, 5, 4, 3))
  found = SPECTRUM(decays(a), bins=4)
  np.testing.assert_allclose(
    found.memory, [[jnp.inf, 1 / math.log(2), 0]] * 4, rtol=1e-6
  )
  assert_close(found.histogram, np.array([1, 0, 1, 1]) / 3, jnp.float32)
  np.testing.assert_array_equal(found.spread, np.ones(4))
  np.testing.assert_array_equal(found.mean_decay, a[0, 0])


def test_spectrum_of_scalar_states_and_of_moduli():
  a = random_decays()[..., 0]
  scalar = SPECTRUM(decays(a))
  assert scalar.spread.shape == (3,)
  np.testing.assert_array_equal(scalar.token_spread, np.zeros(3))
  pooled = SPECTRUM(decays(a), state_axes=1)
  assert pooled.spread.shape == ()
  assert_close(pooled.spread, scalar.a_max.max() - scalar.a_min.min())
  turned = jax.lax.complex(a * jnp.cos(a), a * jnp.sin(a))
  assert_close(SPECTRUM(decays(turned)).quantiles, scalar.quantiles)


def test_cumulative_share_is_the_share_of_values_that_are_at_most():
  values = random_decays()
  grid = jnp.linspace(-0.1, 1.1, 9)
  expected = (np.asarray(values)[..., None] <= np.asarray(grid)).mean(
    (0, 1, 2, 3)
  )
  found = diagnostics.cumulative_share(values, grid)
  assert_close(found, expected, jnp.float32)
  assert found[0] == 0
  assert found[-1] == 1


def test_spectrum_says_what_does_not_fit():
  r = decays(random_decays())
  with pytest.raises(ValueError, match="state_axes is 3"):
    diagnostics.spectrum(r, state_axes=3)
  with pytest.raises(ValueError, match="bins is 0"):
    diagnostics.spectrum(r, bins=0)
  with pytest.raises(ValueError, match="memory_length: mask has shape"):
    diagnostics.memory_length(r, mask=jnp.ones((2, 3), bool))
  with pytest.raises(ValueError, match="every is 0"):
    diagnostics.SpectrumRecorder(lambda model: {}, every=0)


class Decay(nnx.Module):
  """One decay, learned."""

  def __init__(self):
    self.rate = nnx.Param(jnp.ones(()))


def shown(model):
  """The recurrences of the one layer there is."""
  a = jnp.exp(-model.rate[...]) * jnp.ones((1, 4, 2, 1))
  return {"layer 0": decays(a)}


class Data:
  """Batches of nothing."""

  def kind(self, step):
    return 8

  def batch(self, kind, step, seed):
    return {"x": jnp.zeros((kind,))}


def loss(model, batch, key):
  """Drives the rate to 0."""
  total = jnp.square(model.rate[...]) * jnp.ones_like(batch["x"])
  return total.sum(), jnp.float32(total.size), {}


def train(folder, steps, hooks):
  config = FitConfig(
    steps=8, log_every=2, save_every=2, steps_per_dispatch=2, progress=False
  )
  hooks = [*hooks, _Stop(steps)]
  return fit(
    lambda seed: Decay(), loss, optax.sgd(0.1), Data(), config, folder,
    hooks=hooks,
  )  # fmt: skip


class _Stop:
  """A hook that ends the run by an error, as a crash would."""

  def __init__(self, at):
    self.at = at

  def __call__(self, step, models):
    if step == self.at:
      raise KeyboardInterrupt


def test_recorder_writes_decays_during_training_once_also_after_a_crash(
  tmp_path,
):
  path = tmp_path / "decays.jsonl"
  record = lambda: diagnostics.SpectrumRecorder(shown, every=4, path=path)
  with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
    with pytest.raises(KeyboardInterrupt):
      train(tmp_path / "run", 6, [record()])
    with open(path, "a") as file:
      file.write('{"step": 6, "lay')  # Cut short.
    result = train(tmp_path / "run", None, [record()])
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert [line["step"] for line in lines] == [4, 8]
  assert {line["layer"] for line in lines} == {"layer 0"}
  rate = float(result.model.rate[...])
  np.testing.assert_allclose(lines[1]["a_max"], math.exp(-rate), rtol=1e-5)
  np.testing.assert_allclose(lines[0]["a_max"], math.exp(-(0.8**4)), rtol=1e-5)
  np.testing.assert_allclose(
    lines[1]["memory_quartiles"], [1 / rate] * 3, rtol=1e-4
  )
  assert lines[1]["spread_cumulative"][0] == 1


def test_recorder_asks_for_no_model_between_its_steps():
  recorder = diagnostics.SpectrumRecorder(shown, every=10)

  def models():
    raise AssertionError("not due")

  recorder(5, models)
  assert recorder.records == []
  with jax.numpy_rank_promotion("allow"):
    recorder(10, lambda: (Decay(), Decay()))
  assert [r["model"] for r in recorder.records] == [0, 1]


def test_summary_of_exact_channels_is_json():
  a = jnp.broadcast_to(jnp.array([1.0, 0.5, 0.0]), (2, 5, 4, 3))
  found = diagnostics.summarise(SPECTRUM(decays(a)))
  assert json.loads(json.dumps(found, allow_nan=False)) == found
  np.testing.assert_allclose(found["memory_infinite"], 1 / 3, rtol=1e-6)
  zero, half, one = found["memory_quartiles"]
  assert zero == 0
  assert half == pytest.approx(1 / math.log(2))
  assert one is None
