"""States lie closer together than inputs: when, by how much, and when not."""

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

from ssmjax import theory
from ssmjax.models import Mamba, MambaConfig
from ssmjax.types import Polarization, Recurrence

pytestmark = pytest.mark.usefixtures("strict", "x64")

REAL = sorted(appendix_b.FORMS.keys() - appendix_b.COMPLEX)
COMPLEX = sorted(appendix_b.COMPLEX)
# By day a form of each way to make decays and inputs: all compile for long.
BY_DAY = {
  "s6", "mamba2", "linear_attention_elu", "retnet", "gla", "hgrn2", "rg_lru",
  "rwkv4", "mlstm", "longhorn", "dss", "h3", "hgrn", "megalodon",
}  # fmt: skip
FORMS = pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[] if name in BY_DAY else [pytest.mark.nightly])
    for name in sorted(appendix_b.FORMS)
  ],
)
ROWS = 8
BOTH = Polarization(ones=1, zeros=1)
PAPER, OURS = quick(theory.oversmoothing), quick(theory.kappa_smoothing)
FRAME, HOLD = quick(theory.rotating_frame), quick(theory.zero_order_hold)
PREMISES = quick(theory.smoothing_premises)
ENVELOPE = quick(theory.state_envelope)


@FORMS
@pytest.mark.parametrize(
  "length", [pytest.param(2, marks=pytest.mark.nightly), 9]
)
@given(
  seed=st.integers(0, 2**31 - 1),
  scale=st.sampled_from([0.3, 1.0, 3.0]),
  centred=st.booleans(),
  begun=st.booleans(),
  polarized=st.booleans(),
  started=st.booleans(),
)
@settings(
  max_examples=12,
  deadline=None,
  derandomize=True,
  # The fixtures are contexts; it is right that they stay on.
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_bounds_hold_of_every_form_of_appendix_b_whenever_they_claim_to(
  name, seed, length, scale, **flags
):
  flags = {k: jnp.asarray(v) for k, v in flags.items()}
  group = group_of(name)
  p, x, noise = drawn(seed, length, scale)
  results = measured(group)(group.index(name), p, x, noise, flags)
  paper, ours, envelope = results
  chex.assert_tree_all_finite((paper.measured, paper.bound, paper.factor))

  at_most(paper.state_spread, paper.factor * paper.input_spread,
          where=paper.premises.applies)  # fmt: skip
  at_most(paper.measured, paper.bound, where=paper.applies)
  at_most(ours.state_spread, ours.bound, where=ours.applies)
  at_most(ours.state_spread, ours.hull_bound)
  # Where the paper's premises hold, ours do.
  applies = np.asarray(paper.premises.applies)
  if not flags["started"]:
    assert np.asarray(ours.applies)[applies].all()
  if envelope is not None:
    where = np.broadcast_to(
      np.asarray(paper.premises.applies)[:, None], envelope.states.shape
    )
    at_most(envelope.lower, envelope.sharp_lower, where=where)
    at_most(envelope.sharp_lower, envelope.states, where=where)
    at_most(envelope.states, envelope.sharp_upper, where=where)
    at_most(envelope.sharp_upper, envelope.upper, where=where)


@FORMS
def test_premise_holds_of_the_forms_of_which_it_is_said_to(name):
  group = group_of(name)
  off = dict.fromkeys(("centred", "begun", "polarized", "started"), False)
  flags = {k: jnp.asarray(v) for k, v in off.items()}
  args = drawn(0, 9, 0.3)
  paper, ours, _ = measured(group)(group.index(name), *args, flags)
  premises, kind = paper.premises, appendix_b.FORMS[name][1]
  if kind == "equal":
    assert bool(premises.conservative.holds)
    assert float(premises.conservative.fraction) == 1
    assert_close(ours.kappa, jnp.ones_like(ours.kappa))
  elif kind == "above":
    assert float(premises.contraction.fraction) == 0
    assert not premises.applies.any()
    assert (ours.kappa > 1).all()
  if name == "rwkv4":
    assert bool(premises.start.holds)
    assert bool(premises.case_i.all())
  if name.startswith("linear_attention"):
    assert jnp.isinf(ours.kappa).all()


def test_theorem_and_kappa_bound_are_equalities_where_they_are_said_to_be():
  for length in (2, 17):
    b = jnp.ones((1, length, 1)).at[:, 0].set(0.0)
    for decay in (0.0, 0.3, 0.99):
      a = jnp.full_like(b, decay)
      paper = PAPER(theory.from_arrays(a, 1 - a, b))
      assert bool(paper.premises.case_i.all() & paper.premises.case_ii.all())
      assert_close(paper.measured, paper.bound)
      for scale in (0.1, 7.0):
        layer = theory.from_arrays(a, scale * (1 - a), b)
        ours = OURS(layer)
        assert_close(ours.kappa, jnp.full((1, 1), scale))
        assert bool(ours.applies.all())
        assert_close(ours.measured, ours.joint_bound)
        assert_close(ours.state_spread, ours.hull_bound)


def test_kappa_bound_is_an_equality_at_opposite_ends_too():
  # h₁ = κm, from where the state goes all the way up towards κM.
  a = jnp.full((1, 9, 1), 0.7).at[:, 0].set(0.0)
  b = jnp.full((1, 9, 1), 2.0).at[:, 0].set(-3.0)
  ours = OURS(theory.from_arrays(a, 1.5 * (1 - a), b))
  assert_close(ours.measured, ours.joint_bound)


def test_a_single_token_has_no_spread():
  layer = theory.from_arrays(*jnp.full((3, 2, 1, 4), 0.5))
  paper, ours = PAPER(layer), OURS(layer)
  for side in (
    paper.measured, paper.bound, paper.factor, ours.state_spread, ours.bound,
    ours.hull_bound,
  ):  # fmt: skip
    assert not side.any()
  assert (paper.a_min == 1).all()
  assert_close(ours.kappa, jnp.full((2, 4), 0.5))
  envelope = quick(theory.state_envelope)(layer)
  for side in envelope[:-1]:
    assert_close(side, jnp.full((2, 1, 4), 0.25))


def test_case_i_fails_from_state_zero_unless_the_first_step_is_conservative():
  a = jnp.full((1, 5, 1), 0.5)
  b = jnp.full((1, 5, 1), 2.0)
  paper = PAPER(theory.from_arrays(a, 1 - a, b))
  assert bool(paper.premises.conservative.holds)
  assert float(paper.measured[0]) > 0 == float(paper.bound[0])
  assert not paper.applies.any()
  assert not paper.premises.start.holds
  # h₁ = 1 where it should be 2.
  assert float(paper.premises.start.excess) == pytest.approx(1)
  a = a.at[:, 0].set(0.0)
  paper = PAPER(theory.from_arrays(a, 1 - a, b))
  assert bool(paper.applies.all())
  assert float(paper.measured[0]) == float(paper.bound[0]) == 0
  # Or from a first state that lies among the inputs.
  a = jnp.full((1, 5, 1), 0.5)
  among = theory.from_arrays(a, 1 - a, b, initial_state=b[:, 0])
  assert bool(PAPER(among).applies.all())


def test_case_i_without_its_start_fails_in_half_of_random_channels():
  a, b = random_channels(0, 4000, offset=2.0)
  paper = PAPER(theory.from_arrays(a, 1 - a, b))
  failed = paper.state_spread > paper.factor * paper.input_spread
  assert float(failed.mean()) > 0.3
  assert not (failed & paper.premises.applies).any()
  a = a.at[:, 0].set(0.0)
  paper = PAPER(theory.from_arrays(a, 1 - a, b))
  assert paper.premises.applies.all()
  at_most(paper.state_spread, paper.factor * paper.input_spread)


def test_mambas_slowest_channel_never_meets_the_premise():
  dt = jnp.asarray(np.geomspace(1e-6, 30, 400))[None, :, None]
  a = jnp.exp(-dt)
  premises = PREMISES(
    theory.from_arrays(a, dt, jnp.ones_like(a)), tolerance=0.0
  )
  assert float(premises.contraction.fraction) == 0


@pytest.mark.parametrize(
  ("rate", "limit"), [(2, 0.797), (3, 0.940), (4, 0.980), (8, 0.9997)]
)
def test_mambas_other_channels_meet_the_premise_up_to_a_step(rate, limit):
  steps = [limit + 1, 0.5 * limit, limit - 5e-4, limit + 1e-3]
  dt = jnp.asarray(steps)[None, :, None]
  layer = theory.from_arrays(jnp.exp(-rate * dt), dt, jnp.ones_like(dt))
  contraction = PREMISES(layer).contraction
  assert float(contraction.fraction) == pytest.approx(2 / 3)
  # Of the first step nothing is asked.
  assert contraction.worst.tolist() == [0, 3, 0]


def test_zero_order_hold_restores_the_premise_of_every_mamba_channel():
  rng = np.random.default_rng(1)
  dt = jnp.asarray(rng.uniform(1e-3, 5.0, (16, 9, 1)))
  rates = jnp.arange(1.0, 17.0)[None, None]
  b = jnp.asarray(rng.normal(size=(16, 9, 16)))
  b = b - b.mean(1, keepdims=True)
  held = HOLD(theory.from_arrays(jnp.exp(-dt * rates), dt, b))
  exact = -jnp.expm1(-dt * rates) / rates
  assert_close(held.dt * held.b, exact * b)
  paper = PAPER(held)
  assert bool(paper.premises.conservative.holds)
  assert bool(paper.premises.case_ii.all())
  at_most(paper.state_spread, paper.factor * paper.input_spread)
  # In the layer's own terms: κ = 1/n throughout.
  ours = theory.kappa(theory.from_arrays(held.a, exact, b))
  assert_close(ours, jnp.broadcast_to(1 / rates[0], ours.shape))


def test_zero_order_hold_keeps_polarized_channels():
  a = jnp.asarray([1.0, 0.5, 0.0])[None, None] * jnp.ones((1, 4, 1))
  dt = jnp.full((1, 4, 1), 0.25)
  layer = theory.from_arrays(a, dt, jnp.ones((1, 4, 3)))
  held = HOLD(layer)
  h, before = theory.states(held), theory.states(layer)
  assert_close(h[..., ::2], before[..., ::2])
  assert_close(held.dt[..., 1], jnp.full((1, 4), 0.5))


def test_paper_fails_without_its_premise_and_the_kappa_bound_never_does():
  rng = np.random.default_rng(2)
  rates = jnp.asarray(rng.integers(1, 17, (1, 1, 4000)), jnp.float64)
  dt = jnp.asarray(np.logaddexp(0, rng.normal(0, 1.5, (1, 32, 4000))))
  b = jnp.asarray(rng.normal(size=(1, 32, 4000)))
  b = b - b.mean(1, keepdims=True)
  layer = theory.from_arrays(jnp.exp(-dt * rates), dt, b)
  paper, ours = PAPER(layer), OURS(layer)
  failed = paper.state_spread > paper.factor * paper.input_spread
  assert float(failed.mean()) > 0.25
  assert not (failed & paper.premises.applies).any()
  assert ours.applies.all()
  at_most(ours.state_spread, ours.bound)
  at_most(ours.state_spread, ours.hull_bound)
  assert float((ours.state_spread / ours.bound).max()) > 0.9


@pytest.mark.parametrize(
  ("change", "name", "worst"),
  [
    (dict(dt=0.6), "contraction", [0, 3, 1]),
    (dict(dt=-0.1), "contraction", [0, 3, 1]),
    (dict(a=-0.1), "contraction", [0, 3, 1]),
    (dict(a=np.nan), "contraction", [0, 3, 1]),
    (dict(dt=0.4), "conservative", [0, 3, 1]),
    (dict(shift=10.0), "centred", [0, 1]),
    (dict(first=100.0), "start", [0, 1]),
  ],
)
def test_a_premise_violated_on_purpose_is_caught(change, name, worst):
  arrays = {k: np.full((2, 6, 3), 0.5) for k in ("a", "dt")}
  b = np.random.default_rng(3).normal(size=(2, 6, 3))
  b -= b.mean(1, keepdims=True)
  initial = np.zeros((2, 3))
  sound = PREMISES(theory.from_arrays(*map(jnp.asarray, (*arrays.values(), b))))
  assert bool(getattr(sound, name).holds)
  assert bool(sound.applies.all())
  for key in change.keys() & arrays.keys():
    arrays[key][0, 3, 1] = change[key]
  b[0, :, 1] += change.get("shift", 0.0)
  initial[0, 1] = change.get("first", 0.0)
  layer = theory.from_arrays(
    *map(jnp.asarray, (*arrays.values(), b)),
    initial_state=jnp.asarray(initial),
  )
  premises = PREMISES(layer)
  caught = getattr(premises, name)
  assert not caught.holds
  assert not caught.excess <= 0
  assert caught.worst.tolist() == worst
  # Of t ≥ 2, at each of five times, or of whole channels.
  entries = 30 if len(worst) == 3 else 6
  assert float(caught.fraction) == pytest.approx(1 - 1 / entries)
  channel = caught.by_channel
  assert (channel < 1).tolist() == [False, True, False]
  if name == "conservative":
    assert not premises.case_i[0, 1]
  else:
    assert not premises.applies[0, 1]
  assert premises.applies[1].all()


def test_kappa_of_a_model_is_what_its_table_says():
  p, x, _ = drawn(6, 9, 1.0)
  run = quick(lambda a, dt, b: theory.kappa(theory.from_arrays(a, dt, b)))

  def of(name):
    a, dt, b, _ = appendix_b.arrays(name, p, x)
    return run(a, dt, b), *map(np.asarray, (a, dt))

  found, *_ = of("mega")
  delta = 1 / (1 + np.exp(-np.asarray(p[3, 0])))
  assert_close(found, np.broadcast_to(1 / delta, found.shape))
  for name in ("retnet", "gla", "rwkv5", "rwkv6"):
    found, a, _ = of(name)
    assert_close(found, 1 / (1 - a[:, 1:].max(1)))
  found, a, _ = of("rg_lru")
  a = a[:, 1:].max(1)
  assert_close(found, np.sqrt((1 + a) / (1 - a)))
  found, _, dt = of("s6")
  found, step, n = np.asarray(found), dt.max(1), np.arange(1, 5)
  assert (found >= np.maximum(step, 1 / n)).all()
  assert (found <= step + 1 / n).all()


def test_dropping_centring_breaks_case_ii_but_not_the_hull_bound():
  a, b = random_channels(4, 4000, offset=2.0)
  layer = theory.from_arrays(a, 0.9 * (1 - a), b)
  paper, ours = PAPER(layer), OURS(layer)
  failed = paper.state_spread > paper.factor * paper.input_spread
  assert paper.premises.contraction.holds
  assert float(failed.mean()) > 0.25
  assert not (failed & paper.premises.applies).any()
  at_most(ours.state_spread, ours.hull_bound)


def test_a_one_channel_has_no_kappa_and_a_zero_channel_is_not_smoothed():
  a = jnp.asarray([1.0, 0.5, 0.0])[None, None] * jnp.ones((1, 8, 1))
  b = jnp.cos(jnp.pi * jnp.arange(8.0))[None, :, None] * jnp.ones((1, 1, 3))
  layer = theory.from_arrays(a, jnp.full_like(a, 0.5), b)
  paper, ours = PAPER(layer), OURS(layer)
  assert jnp.isinf(ours.kappa).tolist() == [[True, False, False]]
  assert jnp.isinf(ours.hull_bound).tolist() == [[True, False, False]]
  assert float(paper.factor[0, 2]) == 1
  assert paper.premises.applies.tolist() == [[False, True, True]]
  # The zero-channel makes the joint bound say nothing of the others.
  assert float(paper.bound[0]) == float(paper.input_spread.max())
  # With Δ = 1 its state is its input.
  free = PAPER(theory.from_arrays(a[..., 2:], 1 + 0 * a[..., 2:],
                                                 b[..., 2:]))  # fmt: skip
  assert float(free.measured[0]) == float(free.bound[0]) == 2
  # A one-channel that takes nothing in stays where it is: κ asks nothing.
  idle = theory.from_arrays(a[..., :1], 0 * a[..., :1], b[..., :1],
                            initial_state=jnp.ones((1, 1)))  # fmt: skip
  idle = OURS(idle)
  assert float(idle.kappa[0, 0]) == float(idle.hull_bound[0, 0]) == 0


def test_complex_and_negative_decays_smooth_in_their_rotating_frame_only():
  t = jnp.arange(1, 8)[None, :, None].astype(jnp.float64)
  turn = jnp.exp(jax.lax.complex(jnp.zeros_like(t), 1.3 * t))
  decay = 0.8 * turn[:, :1]
  a = jnp.broadcast_to(decay, turn.shape).at[:, 0].set(0.0)
  dt = (1 - jnp.abs(a)).astype(jnp.float64)
  layer = theory.from_arrays(a, dt, turn)
  assert_close(theory.states(layer), turn)
  with pytest.raises(ValueError, match=r"Pass rotating_frame\(recurrence\)"):
    theory.oversmoothing(layer)
  framed = PAPER(FRAME(layer))
  assert bool(framed.applies.all())
  assert float(framed.measured[0]) < 1e-14

  # A decay of -1/2 moves further than its inputs do.
  layer = theory.from_arrays(
    jnp.full((1, 2, 1), -0.5), jnp.full((1, 2, 1), 0.5),
    jnp.asarray([-1.0, 1.0])[None, :, None],
  )  # fmt: skip
  paper = PAPER(layer)
  assert float(paper.measured[0]) == 1.25
  assert not paper.applies.any()
  framed = FRAME(layer)
  assert not jnp.iscomplexobj(framed.b)
  assert_close(theory.outputs(framed), theory.outputs(layer))


def test_hull_of_complex_inputs_is_that_of_the_plane():
  one = lambda *b: PREMISES(
    theory.from_arrays(
      jnp.full((1, len(b), 1), 0.5), jnp.full((1, len(b), 1), 0.5),
      jnp.asarray(b, jnp.complex128)[None, :, None],
    )
  ).centred  # fmt: skip
  assert bool(one(1, 1j, -1 - 1j).holds)
  assert bool(one(1, -1).holds)
  assert bool(one(2 + 1j, 0).holds)
  assert not one(1, 1j, 1 + 1j).holds
  assert not one(1, 1j, -1 + 1e-3j).holds


@pytest.mark.parametrize(
  ("init", "polarization"),
  [
    ("mamba", BOTH),
    pytest.param("authors", None, marks=pytest.mark.nightly),
  ],
)
def test_mamba_layers_are_bounded_and_their_slowest_channels_fail(
  init, polarization
):
  config = MambaConfig(
    d_state=4,
    init=init,
    polarization=polarization,
    implementation="chunked",
  )

  @quick
  def run(key, x):
    with jax.numpy_rank_promotion("allow"):
      model = Mamba(8, config, rngs=nnx.Rngs(key))
      layer = model.recurrence(x)
    return theory.oversmoothing(layer), theory.kappa_smoothing(layer)

  x = jax.random.normal(jax.random.key(1), (2, 33, 8), jnp.float32)
  with jax.numpy_dtype_promotion("standard"):
    paper, ours = run(jax.random.key(0), x)
  learned = slice(1, 5) if polarization else slice(None)
  contraction = paper.premises.contraction
  # float32 cannot tell e^-Δ + Δ from 1 below Δ ≈ 1e-3: to the tolerance.
  assert float(contraction.by_channel[:, learned][:, 0].max()) < 0.05
  assert float(contraction.by_channel[:, learned][:, 1:].min()) > 0.9
  assert ours.kappa.dtype == jnp.float32
  kappas = np.asarray(ours.kappa[..., learned])
  assert (kappas >= 1 / np.arange(1, 5) * (1 - 1e-3)).all()
  at_most(ours.state_spread, ours.hull_bound, rounding=1e-5)
  at_most(ours.state_spread, ours.bound, where=ours.applies, rounding=1e-5)
  if polarization:
    assert jnp.isinf(ours.kappa[..., 0]).all()
    assert (contraction.by_channel[:, 0] == 0).all()
    assert (paper.a_min[..., -1] == 0).all()


def test_rwkvs_normalised_state_is_the_ratio_of_its_sums():
  p, x, _ = drawn(5, 9, 1.0)

  @quick
  def run(p, x):
    one = theory.outputs(appendix_b.layer("rwkv4", p, x))
    with appendix_b.usual_promotion():
      return one, theory.outputs(appendix_b.rwkv4_pair(p, x))

  one, pair = run(p, x)
  assert_close(one[..., 0], pair.sum(-1))


def hostile(name, value, channels=2, length=3):
  """Channels that meet every premise, but for one value in the last."""
  arrays = {k: np.full((1, length, channels), 0.5) for k in ("a", "dt")}
  arrays["b"] = np.ones((1, length, channels))
  arrays["b"][:, 0] = 0
  arrays["h"] = np.zeros((1, 1, channels))
  arrays[name][:, -1, -1] = value
  a, dt, b, h = (jnp.asarray(v, jnp.float32) for v in arrays.values())
  return theory.from_arrays(a, dt, b, initial_state=h[:, 0])


@pytest.mark.parametrize(
  ("name", "value", "bound"),
  [
    *((k, np.nan, np.nan) for k in ("a", "dt")),
    ("a", np.inf, np.inf), ("a", 1.5, np.inf), ("a", -0.5, np.inf),
    ("a", 1.0, np.inf), ("dt", np.inf, np.inf), ("dt", -0.5, np.inf),
    ("b", np.nan, np.nan), ("b", np.inf, np.inf), ("b", -np.inf, np.inf),
    ("h", np.nan, None), ("h", np.inf, None), ("h", 9.0, None),
  ],
)  # fmt: skip
# XLA's reductions of few numbers keep NaN, those of many do not.
@pytest.mark.parametrize("channels", [2, 4099])
def test_no_theorem_on_smoothing_applies_to_a_hostile_value(
  name, value, bound, channels
):
  layer = hostile(name, value, channels)
  paper, ours = PAPER(layer), OURS(layer)
  envelope = ENVELOPE(layer)
  for applies in (paper.premises.applies, ours.applies, envelope.applies):
    assert np.asarray(applies)[0, :-1].all()
    assert not applies[0, -1]
  if bound is not None:
    np.testing.assert_array_equal(ours.bound[0, -1], bound)
    assert not np.isfinite(ours.hull_bound[0, -1])
  if np.isnan(value) or np.isinf(value):
    assert not np.isfinite(paper.measured[0])


def test_infinite_kappa_applies_to_nothing():
  one = jnp.ones((1, 3, 1))
  ours = OURS(theory.from_arrays(one, one, one))
  assert jnp.isinf(ours.kappa).all()
  assert not ours.applies.any()


def test_kappa_zero_needs_a_first_state_of_zero():
  a = jnp.full((1, 3, 2), 0.5)
  begun = jnp.asarray([[0.0, 1.0]])
  layer = theory.from_arrays(a, 0 * a, 0 * a + 1, initial_state=begun)
  ours = OURS(layer)
  assert not ours.kappa.any()
  assert (ours.state_spread <= ours.bound).tolist() == [[True, False]]
  assert ours.applies.tolist() == [[True, False]]


def test_smoothing_asks_nothing_of_the_first_step_but_its_state():
  a = jnp.full((1, 4, 1), 0.5)
  b = jnp.asarray([0.1, -1.0, 1.0, 0.0])[None, :, None]
  layer = theory.from_arrays(a, (a + 0.0).at[:, 0].set(5.0), b)
  paper = PAPER(layer)
  assert bool(paper.premises.contraction.holds)
  assert bool(paper.applies.all())
  at_most(paper.state_spread, paper.factor * paper.input_spread)
  single = PREMISES(theory.from_arrays(a[:, :1], a[:, :1], b[:, :1]))
  for premise in single[:2]:
    assert bool(premise.holds)
    assert float(premise.fraction) == 1
    assert premise.by_channel.tolist() == [1]


@pytest.mark.parametrize(
  "decay", [1 - 2.0**-23, 1 - 1e-5, 0.5, 1e-30, 1.0, 0.0]
)
@pytest.mark.parametrize("length", [2, 1000])
def test_factors_of_float32_are_those_of_float64(decay, length):
  a = jnp.full((1, length, 1), decay, jnp.float32)
  b = jnp.ones_like(a).at[:, 0].set(0.0)
  layer = theory.from_arrays(a, 1 - a, b)
  paper, ours = PAPER(layer), OURS(layer)
  with np.errstate(divide="ignore"):
    log = np.log1p(np.float64(np.float32(decay)) - 1)
  exact = -np.expm1((length - 1) * log)
  found = (
    paper.factor, paper.bound, ours.bound, ours.joint_bound, ours.hull_bound
  )  # fmt: skip
  for value in found:
    np.testing.assert_allclose(np.ravel(value), [exact], rtol=1e-6)
  # The states are those of equality: what is above is their rounding alone.
  np.testing.assert_allclose(paper.measured, [exact], rtol=1e-4)


def test_envelope_refuses_complex_inputs():
  one = jnp.full((1, 2, 1), 0.5)
  with pytest.raises(ValueError, match="b or the initial state is complex"):
    theory.state_envelope(
      theory.from_arrays(one, one, one.astype(jnp.complex128))
    )
  with pytest.raises(ValueError, match="kappa: dt is complex, expected real"):
    theory.kappa(theory.from_arrays(one, one.astype(jnp.complex128), one))


def random_channels(seed, channels, offset):
  rng = np.random.default_rng(seed)
  a = rng.uniform(0, 1, (1, 3, channels))
  return jnp.asarray(a), jnp.asarray(offset + rng.normal(size=a.shape))


def drawn(seed, length, scale):
  rng = np.random.default_rng(seed)
  p = rng.normal(size=(appendix_b.WEIGHTS, 3, 4))
  x = scale * rng.normal(size=(ROWS, length, 3))
  return tuple(map(jnp.asarray, (p, x, rng.normal(size=(ROWS, 4)))))


def group_of(name):
  """The forms that are compiled with this one."""
  group = COMPLEX if name in COMPLEX else REAL
  return [other for other in group if (other in BY_DAY) == (name in BY_DAY)]


def measured(group):
  return _measured(tuple(group))


@functools.cache
def _measured(group):
  """The theorems over every form of the group: compiled once a length."""

  @quick
  def run(index, p, x, noise, flags):
    layer = appendix_b.any_layer(group, index, p, x)
    layer = dressed(theory.rotating_frame(layer), noise, flags)
    envelope = None
    if not jnp.iscomplexobj(layer.b):
      envelope = theory.state_envelope(layer)
    paper = theory.oversmoothing(layer)
    return paper, theory.kappa_smoothing(layer), envelope

  return run


def dressed(r, noise, flags):
  """The layer centred, begun, polarized, started from a state, or not."""
  pick = lambda flag, yes, no: jnp.where(flags[flag], yes, no)
  a, dt, b = r.a, jnp.broadcast_to(r.dt, r.b.shape), r.b
  polar = a.at[..., 0].set(1.0).at[..., -1].set(0.0)
  a = pick("polarized", polar, a)
  a = pick("begun", a.at[:, 0].set(0.0), a)
  dt = pick("begun", dt.at[:, 0].set(1.0), dt)
  b = pick("centred", b - b.mean(1, keepdims=True), b)
  noise = noise.astype(r.initial_state.dtype)
  initial = pick("started", noise, jnp.zeros_like(noise))
  return Recurrence(a, dt, b, initial, r.readout)


def at_most(left, right, where=None, rounding=1e-12):
  """Left ≤ right but for rounding, relative to the largest of the right."""
  left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
  finite = np.abs(right[np.isfinite(right)])
  scale = np.maximum(np.abs(right), finite.max() if finite.size else 1.0)
  ok = left <= right + rounding * np.maximum(scale, 1e-3)
  ok = ok if where is None else ok | ~np.asarray(where)
  assert ok.all(), (left[~ok], right[~ok])
