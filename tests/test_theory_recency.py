"""Influence is what the theorem says it is, and dies away as it says."""

import functools

import appendix_b
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssmjax import diagnostics, theory
from ssmjax.models import MambaConfig
from ssmjax.models.kinds import MIXERS
from ssmjax.types import Recurrence

pytestmark = pytest.mark.usefixtures("strict", "x64")

REAL = sorted(
  appendix_b.FORMS.keys() - appendix_b.COMPLEX - appendix_b.NOT_LOCAL
)
COMPLEX = sorted(appendix_b.COMPLEX)
# By day a form of each way to make decays and inputs: all compile for long.
BY_DAY = {
  "s6", "mamba2", "hgrn2", "rg_lru", "mlstm", "longhorn", "dss", "h3",
  "megalodon",
}  # fmt: skip
LENGTH = 6


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[] if name in BY_DAY else [pytest.mark.nightly])
    for name in [*REAL, *COMPLEX]
  ],
)
@given(
  seed=st.integers(0, 2**31 - 1),
  scale=st.sampled_from([0.3, 1.0, 3.0]),
)
@settings(
  max_examples=5,
  deadline=None,
  derandomize=True,
  # The fixtures are contexts; it is right that they stay on.
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_influence_of_every_form_is_exact_and_bounded(name, seed, scale):
  group = COMPLEX if name in COMPLEX else REAL
  group = [other for other in group if (other in BY_DAY) == (name in BY_DAY)]
  p, x = drawn(seed, scale)
  result, jacobian = influence_of(tuple(group))(group.index(name), p, x)
  chex.assert_shape(result.jacobian, (3, LENGTH, LENGTH, 1, 3))
  check(result, jacobian)


@pytest.mark.parametrize(
  "name",
  [pytest.param("rwkv4_pair", marks=pytest.mark.nightly), "mlstm_pair"],
)
def test_influence_through_a_nonlinear_readout_is_exact_and_bounded(name):
  layer = getattr(appendix_b, name)

  @quick
  def run(p, x):
    bound = functools.partial(layer, p)
    local = theory.locality_premise(bound, x)
    return local, theory.recency(bound, x, window=1), autodiff(bound, x)

  for seed in range(5):
    p, x = drawn(seed, 1.0)
    with jax.numpy_rank_promotion("allow"):
      local, *sides = run(p, x)
    assert bool(local.holds)
    check(*sides)


def test_bound_is_an_equality_for_one_channel_that_ignores_its_input():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 1)))
  result = quick(lambda x: theory.recency(constant_layer, x, window=1))(x)
  far = np.tril_indices(9, -1)
  score, bound = np.asarray(result.score), np.asarray(result.bound)
  assert_close(score[:, *far], bound[:, *far])
  assert_close(result.product_bound[:, *far], bound[:, *far])
  assert_close(result.constant, result.a_priori_constant)
  # The logarithm of the score falls by log A_max a token.
  slope = np.polyfit(np.arange(1, 9), np.log(score[0, -1, :-1][::-1]), 1)[0]
  assert slope == pytest.approx(np.log(0.7))
  assert_close(-result.rate, jnp.log(jnp.full(2, 0.7)))


def test_slope_of_many_channels_tends_to_that_of_the_slowest():
  decays = jnp.asarray([0.2, 0.5, 0.9])

  def layer(x):
    a = jnp.broadcast_to(decays, (*x.shape[:2], 3))
    return theory.from_arrays(a, jnp.ones_like(a), a * x, a)

  x = jnp.ones((1, 41, 1))
  score = np.asarray(
    quick(lambda x: theory.recency(layer, x, window=1).score)(x)
  )[0, -1]
  slopes = np.diff(np.log(score[:-1][::-1]))
  assert (slopes <= np.log(0.9) + 1e-12).all()
  assert slopes[-1] == pytest.approx(np.log(0.9), abs=1e-6)


@pytest.mark.nightly
def test_a_convolution_wider_than_the_window_is_found():
  def layer(x):
    before = jnp.pad(x, ((0, 0), (2, 0), (0, 0)))
    return constant_layer(x + before[:, 1:-1] + before[:, :-2] ** 2)

  x = jnp.ones((1, 6, 1))

  def run(x):
    windows = (1, 2)
    premises = [theory.locality_premise(layer, x, window=n) for n in windows]
    return premises, autodiff(layer, x)

  premises, truth = quick(run)(x)
  result = theory.recency(layer, x)
  assert result.window == 3
  premises.append(result.premises.local)
  assert bool(premises.pop().holds)
  assert_close(result.jacobian, reached(truth, 3))
  check_bounds(result)
  assert np.isfinite(np.asarray(result.bound)).sum() == 3 + 2 + 1
  for window, premise in enumerate(premises, 1):
    assert not premise.holds
    t, s = premise.worst.tolist()
    assert window <= t - s <= 2
    # All pairs but those from `window` to 2 tokens apart.
    apart = sum(6 - lag for lag in range(window, 3))
    assert float(premise.fraction) == pytest.approx(1 - apart / 36)


@pytest.mark.nightly
def test_rwkv4_as_the_paper_writes_it_is_not_of_eq_1():
  p, x = drawn(0, 1.0)

  @quick
  def run(p, x):
    layer = functools.partial(appendix_b.layer, "rwkv4", p)
    local = theory.locality_premise(layer, x)
    return (
      local,
      theory.recency(layer, x, window=1).jacobian,
      autodiff(layer, x),
    )

  local, factorised, truth = run(p, x)
  assert not local.holds
  # What the factorised Jacobian misses is no rounding. As a pair of sums
  # (`rwkv4_pair`) RWKV-4 is of Eq. 1.
  error = jnp.abs(factorised - truth).max() / jnp.abs(truth).max()
  assert float(error) > 1e-2


def test_looking_ahead_is_found():
  def layer(x):
    ahead = jnp.concatenate([x[:, 1:], x[:, :1]], 1)
    return constant_layer(ahead)

  x = jnp.ones((1, 4, 1))
  premise = quick(lambda x: theory.locality_premise(layer, x))(x)
  assert not premise.holds
  # Four of the sixteen pairs: each token's next one.
  assert float(premise.fraction) == 12 / 16


@pytest.mark.parametrize(
  ("decay", "name", "excess"),
  [
    (1.0, "below_one", 0.0),
    (-1.0, "below_one", 0.0),
    (1.25, "below_one", 0.25),
    (0.6 + 1j * 0.8, "below_one", 0.0),
    (np.nan, "below_one", np.nan),
    (0.0, "above_zero", 0.0),
  ],
)
def test_a_decay_violated_on_purpose_is_caught(decay, name, excess):
  dtype = complex if isinstance(decay, complex) else float
  a = np.full((2, 5, 3), 0.5, dtype)
  a[1, 3, 2] = decay
  one = jnp.ones((2, 5, 3))
  layer = theory.from_arrays(jnp.asarray(a), one, one)
  premises = quick(theory.recency_premises)(layer)
  caught = getattr(premises, name)
  other = {"below_one": "above_zero", "above_zero": "below_one"}[name]
  assert not caught.holds
  assert caught.worst.tolist() == [1, 3, 2]
  assert float(caught.excess) == pytest.approx(excess, nan_ok=True)
  assert float(caught.fraction) == pytest.approx(23 / 24)
  assert (caught.by_channel < 1).tolist() == [False, False, True]
  if not np.isnan(excess):
    assert bool(getattr(premises, other).holds)


def test_one_channel_makes_the_bound_vacuous_and_its_influence_flat():
  layer = functools.partial(decaying_layer, (1.0,))
  x = jnp.ones((1, 12, 1))
  run = lambda x: (
    theory.recency(layer, x, window=1),
    theory.polarized_recency(layer, x, window=1),
  )  # fmt: skip
  result, split = quick(run)(x)
  far = np.tril_indices(12, -1)
  assert float(result.rate[0]) == 0
  assert not result.premises.below_one.holds
  for flat in (result.score, result.bound, split.lower[..., 0, 0]):
    assert_close(flat[:, *far], jnp.ones((1, 66)))
  assert float(split.floor[0]) == 1
  assert float(split.horizon[0]) == 0


def test_decay_zero_breaks_a_premise_that_the_theorem_does_not_need():
  layer = functools.partial(decaying_layer, (0.0, 0.5))
  x = jnp.ones((1, 5, 1))
  result = quick(lambda x: theory.recency(layer, x, window=1))(x)
  assert not result.premises.above_zero.holds
  assert bool(result.premises.below_one.holds)
  check_bounds(result)


def test_decays_above_one_are_bounded_by_their_own_growth():
  layer = functools.partial(decaying_layer, (1.2, 0.3))
  x = jnp.ones((1, 8, 1))
  result = quick(lambda x: theory.recency(layer, x, window=1))(x)
  assert float(result.rate[0]) < 0
  check_bounds(result)


def test_polarized_influence_is_bounded_from_both_sides_and_stays():
  rng = np.random.default_rng(0)
  p, x = jnp.asarray(rng.normal(size=(8, 3, 4))), np.zeros((4, 40, 3))
  x = jnp.asarray(1.0 + 0.3 * rng.uniform(-1, 1, size=x.shape))

  def layer(x):
    a, dt, b, c = appendix_b.arrays("s6", p, x)
    a = a.at[..., 0].set(1.0).at[..., -1].set(0.0)
    # Token t reads, and token s writes, into the one-channel with one sign.
    b = b.at[..., 0].set(jnp.abs(b[..., 0]) + jnp.exp(x[..., 0]))
    c = c.at[..., 0].set(jnp.exp(-x[..., 1]))
    return theory.from_arrays(a, dt, b, c)

  run = lambda x: (
    theory.polarized_recency(layer, x, window=1),
    autodiff(layer, x),
  )
  split, truth = quick(run)(x)
  check_split(split, truth)
  assert split.ones.tolist() == [[True, False, False, False]] * 4
  assert (np.asarray(split.floor) > 0).all()
  horizon = np.asarray(split.horizon)
  assert (horizon < 30).all()
  lags = np.arange(40)[:, None] - np.arange(40)[None]
  for row in range(4):
    beyond = lags > horizon[row]
    assert beyond.sum() > 20
    lower = np.asarray(split.lower)[row].max((-1, -2))
    score = np.abs(np.asarray(truth)[row]).max((-1, -2))
    assert (lower[beyond] > 0).all()
    floor = float(split.floor[row]) - np.asarray(split.remainder)[row]
    assert (score[beyond] >= floor[beyond] - 1e-12).all()


def test_without_a_one_channel_the_lower_bound_is_nothing():
  layer = functools.partial(decaying_layer, (0.9, 0.0))
  x = jnp.ones((1, 6, 1))
  run = lambda x: (
    theory.polarized_recency(layer, x, window=1),
    theory.recency(layer, x, window=1),
  )  # fmt: skip
  split, plain = quick(run)(x)
  assert not split.lower.any()
  assert not split.ones.any()
  assert float(split.floor[0]) == 0
  assert np.isinf(float(split.horizon[0]))
  assert_close(split.constant, plain.constant)
  far = np.tril_indices(6, -1)
  assert_close(split.upper[:, *far][..., 0, 0], plain.bound[:, *far])


@pytest.mark.parametrize("length", [1, 2])
def test_shortest_sequences_have_no_influence_or_one(length):
  layer = functools.partial(decaying_layer, (0.5, 1.0))
  x = jnp.ones((1, length, 1))
  run = lambda x: (
    theory.recency(layer, x, window=1),
    theory.polarized_recency(layer, x, window=1),
  )  # fmt: skip
  result, split = quick(run)(x)
  assert np.isfinite(np.asarray(result.bound)).sum() == length - 1
  assert np.count_nonzero(result.jacobian) == length - 1
  assert not np.isnan(np.asarray(split.horizon)).any()


@pytest.mark.nightly
def test_complex_inputs_go_in_as_their_parts():
  rng = np.random.default_rng(4)
  x = jnp.asarray(rng.normal(size=(2, 5, 2)))

  def layer(x):
    z = jax.lax.complex(x[..., :1], x[..., 1:])
    a = 0.8 * jnp.exp(-(z**2)) / (1 + jnp.abs(jnp.exp(-(z**2))).astype(z.dtype))
    ones = jnp.ones_like(z)
    return theory.from_arrays(a, jnp.ones((1, 1, 1)), z**3, ones - z)

  # A complex output as well.
  run = lambda x: (theory.recency(layer, x, window=1), autodiff(layer, x))
  result, truth = quick(run)(x)
  assert jnp.iscomplexobj(result.jacobian)
  check(result, truth)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(x=jnp.ones((2, 3))), r": x has shape \(2, 3\) and dtype"),
    (dict(x=jnp.ones((1, 3, 1), jnp.int32)), "expected real"),
    (dict(window=0), ": window is 0, expected a number of tokens from"),
    (dict(window=4), "window is 4, .* from 1 to T=3"),
  ],
)
def test_bad_arguments_are_named(change, message):
  x = change.pop("x", jnp.ones((1, 3, 1)))
  for function in (
    theory.recency, theory.polarized_recency, theory.locality_premise
  ):  # fmt: skip
    with pytest.raises(ValueError, match=message):
      function(constant_layer, x, **change)


@functools.cache
def small_mamba():
  """A Mamba whose convolution is 4 wide, 10 tokens, and the true Jacobian."""
  # Steps and decays that leave something to be seen of them in a few tokens.
  config = MambaConfig(d_state=2, expand=1, dt_min=0.3, dt_max=0.9)
  x = jax.random.normal(jax.random.key(1), (2, 10, 2), jnp.float32)

  @quick
  def run(key, x):
    model = config.build(2, 1, nnx.Rngs(key))
    truth = jax.vmap(jax.jacrev(lambda x: model(x[None])[0][0]))(x)
    return model, jnp.moveaxis(truth, 3, 2)

  with appendix_b.usual_promotion():
    return *run(jax.random.key(0), x), x


def test_window_of_a_mamba_is_found_and_its_bound_holds_at_every_pair():
  model, truth, x = small_mamba()
  with appendix_b.usual_promotion():
    window = theory.dependence_window(model.recurrence, x)
    assert window == 4
    run = lambda model, x: (
      theory.recency(model.recurrence, x, window=window),
      theory.polarized_recency(model.recurrence, x, window=window),
    )  # fmt: skip
    result, split = quick(run)(model, x)
  far = np.tri(10, k=-4, dtype=bool)
  assert np.isfinite(np.asarray(result.bound)).sum() == 2 * far.sum()
  assert_close(result.jacobian[:, far], truth[:, far])
  assert_close(split.jacobian[:, far], truth[:, far])
  size = np.abs(truth[:, far])
  for side in (result.bound, result.product_bound):
    assert (size.max((-1, -2)) <= np.asarray(side)[:, far] * (1 + 1e-5)).all()
  assert (size <= np.asarray(split.upper)[:, far] * (1 + 1e-5)).all()
  for found in (result, split):
    assert bool(found.premises.local.holds)
    assert found.applies.all()


def test_a_window_too_small_for_a_mamba_fails_a_premise():
  model, truth, x = small_mamba()
  run = quick(lambda model, x: theory.recency(model.recurrence, x, window=1))
  with appendix_b.usual_promotion():
    result = run(model, x)
  far = np.tri(10, k=-1, dtype=bool)
  error = np.abs(result.jacobian - truth)[:, far].max() / np.abs(truth).max()
  assert error > 0.1
  assert (np.abs(truth).max((-1, -2)) > result.bound)[:, far].any()
  assert not result.premises.local.holds
  assert not result.applies.any()
  # All pairs but those of lags 1 to 3.
  share = 1 - (9 + 8 + 7) / 100
  assert float(result.premises.local.fraction) == pytest.approx(share)


# How far each kind looks back; None where there is no window.
WINDOWS = {
  "mamba": 4, "mamba2": 4, "longhorn": 4, "rglru": 4, "rwkv4": None,
  "rwkv5": 3, "rwkv6": 3,
}  # fmt: skip
MORE = {
  "hgrn2": {"num_heads": 2}, "retnet": {"num_heads": 1},
  "gla": {"num_heads": 1, "gate_rank": 2}, "linear_attention": {"num_heads": 1},
  "mamba2": {"head_dim": 2}, "rwkv5": {"num_heads": 1},
  "mlstm": {"num_heads": 1},
  "rwkv6": {"num_heads": 1, "mix_rank": 2, "decay_rank": 2},
  "ttt_linear": {"num_heads": 1},
}  # fmt: skip


@pytest.mark.parametrize(
  "kind",
  [
    pytest.param(kind, marks=[] if kind == "rwkv4" else [pytest.mark.nightly])
    for kind in MIXERS
  ],
)
def test_window_of_every_kind_that_has_eq_1_is_found_or_refused(kind):
  x = jax.random.normal(jax.random.key(1), (1, 7, 4), jnp.float32)
  with appendix_b.usual_promotion():
    model = MIXERS[kind](**MORE.get(kind, {})).build(4, 1, nnx.Rngs(0))
    try:
      model.recurrence(x)
    except NotImplementedError:
      return
    measure = functools.partial(theory.dependence_window, model.recurrence, x)
    expected = WINDOWS.get(kind, 1)
    if expected is None:
      with pytest.raises(ValueError, match="last of T=7 tokens depends on the"):
        measure()
    else:
      assert measure() == expected


def no_end(x):
  return constant_layer(jnp.cumsum(x, 1))


def ahead(x):
  return constant_layer(jnp.roll(x, -1, 1))


def broken(x):
  return constant_layer(jnp.sqrt(x))


def begun(x):
  r = constant_layer(x)
  return Recurrence(r.a, r.dt, r.b, x[:, 0], r.readout)


@pytest.mark.parametrize(
  ("layer", "message"),
  [
    (no_end, "pass one of more tokens"),
    (ahead, "depends on token 1, expected no later one"),
    (broken, "has a derivative that is not finite"),
    (begun, "or the initial state. depends on token"),
  ],
)
def test_a_window_that_is_not_to_be_had_is_refused(layer, message):
  with pytest.raises(ValueError, match=f"dependence_window: .*{message}"):
    theory.dependence_window(layer, jnp.zeros((1, 4, 1)))


def test_a_window_cannot_be_measured_while_tracing():
  x = jnp.ones((1, 3, 1))
  for function in (
    theory.recency, theory.polarized_recency, diagnostics.layer_influence
  ):  # fmt: skip
    run = jax.jit(functools.partial(function, constant_layer))
    with pytest.raises(ValueError, match="window is None, but x or the layer"):
      run(x)


@functools.cache
def behind_a_convolution():
  @quick
  def run(decay, x):
    def layer(x):
      mixed = x + 2 * jnp.pad(x, ((0, 0), (2, 0), (0, 0)))[:, :-2]
      return decaying_layer((decay, 0.9), mixed)

    return (
      theory.polarized_recency(layer, x, window=3),
      theory.recency(layer, x, window=3), autodiff(layer, x),
    )  # fmt: skip

  return run


@pytest.mark.parametrize("decay", [1.5, -1.5, 1.0, 0.5])
def test_two_sided_bound_holds_behind_a_convolution_for_any_decay(decay):
  split, result, truth = behind_a_convolution()(decay, jnp.ones((1, 9, 1)))
  far = np.tri(9, k=-3, dtype=bool)
  size = np.abs(truth)[:, far]
  assert (size <= np.asarray(split.upper)[:, far] + 1e-12).all()
  assert (size >= np.asarray(split.lower)[:, far] - 1e-12).all()
  slack = 1e-12 * size.max()
  for side in (result.bound, result.product_bound):
    assert (size[..., 0, 0] <= np.asarray(side)[:, far] + slack).all()
  assert bool(split.premises.below_one.holds) == (abs(decay) <= 1)
  assert split.applies.all() == (abs(decay) <= 1)
  assert result.applies.all() == (abs(decay) < 1)


def test_a_closure_may_read_the_state():
  def layer(x):
    r = constant_layer(x)
    scale = 1 + x.sum(-1)

    def readout(h, t):
      return h * jax.lax.dynamic_index_in_dim(scale, t, 1)

    return Recurrence(r.a, r.dt, r.b, r.initial_state, readout)

  x = jnp.ones((1, 4, 1))
  run = lambda x: (
    theory.recency(layer, x, window=1), autodiff(layer, x),
    theory.polarized_recency(layer, x, window=1).jacobian,
    diagnostics.layer_influence(layer, x, window=1),
    theory.outputs(theory.rotating_frame(layer(x))),
  )  # fmt: skip
  result, truth, split, parts, _ = quick(run)(x)
  check(result, truth)
  assert_close(split, truth)
  assert_close(parts.closed_form, jnp.abs(truth)[..., 0, 0])


def test_influence_premises_are_about_all_tokens_but_the_first():
  a = jnp.full((1, 3, 1), 0.5).at[:, 0].set(2.0)
  one = jnp.ones_like(a)
  premises = theory.recency_premises(theory.from_arrays(a, one, one))
  assert bool(premises.below_one.holds)
  assert premises.below_one.worst[1] > 0
  # Of a single token nothing is asked.
  single = theory.recency_premises(
    theory.from_arrays(a[:, :1], one[:, :1], one[:, :1])
  )
  for premise in single[:2]:
    assert bool(premise.holds)
    assert float(premise.fraction) == 1
    assert premise.worst.tolist() == [-1, -1, -1]


def constant_layer(x):
  return decaying_layer((0.7,), x)


def decaying_layer(decays, x):
  """Constant decays, b = x and c = 1 in every channel."""
  a = jnp.broadcast_to(jnp.asarray(decays), (*x.shape[:2], len(decays)))
  b = jnp.broadcast_to(x, a.shape)
  return theory.from_arrays(a, jnp.ones((1, 1, 1)), b, jnp.ones((1, 1, 1)))


def drawn(seed, scale):
  rng = np.random.default_rng(seed)
  p = rng.normal(size=(appendix_b.WEIGHTS, 3, 4))
  return jnp.asarray(p), jnp.asarray(scale * rng.normal(size=(3, LENGTH, 3)))


@functools.cache
def influence_of(group):
  @quick
  def run(index, p, x):
    layer = functools.partial(appendix_b.any_layer, group, index, p)
    return theory.recency(layer, x, window=1), autodiff(layer, x)

  return run


def autodiff(layer, x):
  """∂yₜ/∂xₛ at [t, s, output, input] by reverse mode, 0 for s ≥ t."""

  def row(x):
    y = theory.outputs(layer(x[None]))[0]
    return (y.real, y.imag) if jnp.iscomplexobj(y) else (y,)

  parts = jax.vmap(jax.jacrev(row))(x)
  full = jax.lax.complex(*parts) if len(parts) == 2 else parts[0]
  return reached(jnp.transpose(full, (0, 1, 3, 2, 4)), 1)


def reached(jacobian, window):
  times = jnp.arange(jacobian.shape[1])
  far = (times[:, None] >= times[None] + window)[None, :, :, None, None]
  return jnp.where(far, jacobian, jnp.zeros_like(jacobian))


def check(result, truth):
  assert_close(result.jacobian, truth)
  check_bounds(result)


def check_bounds(result, rounding=1e-12):
  score, bound = np.asarray(result.score), np.asarray(result.bound)
  product = np.asarray(result.product_bound)
  assert not np.isnan(score + bound).any()
  slack = 1 + rounding
  # An absolute term for influences that underflow together.
  floor = rounding * score.max()
  assert (score <= slack * product + floor).all()
  if (np.asarray(result.a_max) <= 1).all():
    assert (product <= slack * bound + floor).all()
  assert (score <= slack * bound + floor).all()
  constants = np.asarray(result.constant), np.asarray(result.a_priori_constant)
  if (np.asarray(result.a_max) < 1).all():
    assert (constants[0] <= slack * constants[1]).all()


def check_split(split, truth, rounding=1e-12):
  size = np.abs(np.asarray(truth))
  slack = rounding * size.max()
  assert (np.asarray(split.lower) <= size + slack).all()
  assert (np.asarray(split.upper) >= size - slack).all()
  decaying = np.abs(np.asarray(split.decaying)).max((-1, -2))
  assert (decaying <= np.asarray(split.remainder) + slack).all()
  dtype = jnp.float32 if rounding > 1e-8 else None
  assert_close(split.kept + split.decaying, truth, dtype)
