"""Theorems hold for the polarized layer, of every kind that polarizes.

A kind is here by having `polarizes` among `MIXERS`, its layer by its own
`recurrence`. Two show something else: H3 the diagonal one of its systems, and
RWKV-4, whose mean has a decay that depends on its past, the two sums of that
mean, as of which it is a layer of Eq. 1.
"""

import functools

import appendix_b
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from flax import nnx

from ssmjax import theory
from ssmjax.models.kinds import MIXERS
from ssmjax.models.layers import dense
from ssmjax.types import Polarization, Recurrence

pytestmark = pytest.mark.usefixtures("strict", "x64")

BOTH = Polarization(ones=1, zeros=1)
KINDS = [kind for kind, config in MIXERS.items() if config.polarizes]
WIDTH, LENGTH, ROUND = 4, 8, 64
# Steps and decays that leave something to be seen of them in a few tokens.
STEPS = {"dt_min": 0.3, "dt_max": 0.9}
SMALL = {
  "s4d": {"d_state": 2, "spectrum": "lin", **STEPS},
  "dss": {"d_state": 2, **STEPS},
  "h3": {"d_state": 2, "head_dim": 2, "d_conv": 2, **STEPS},
  "cema": {"d_state": 2, "expand": 1},
  "mamba": {"d_state": 2, "d_conv": 2, "expand": 1, **STEPS},
  # A norm takes out whatever has the direction of what is read.
  "mamba2": {
    "d_state": 2, "d_conv": 2, "expand": 1, "head_dim": 2, "norm": "none",
    **STEPS,
  },
  "longhorn": {"d_state": 2, "d_conv": 2, "expand": 1},
  "rglru": {"d_conv": 2, "decay_min": 0.3, "decay_max": 0.7},
  "hgrn2": {"num_heads": 2, "lower_bound": 0.2},
  "retnet": {"num_heads": 1, "expand_v": 1.0},
  "gla": {"num_heads": 1, "gate_rank": 2},
  "rwkv5": {"num_heads": 1, "width": 3},
  "rwkv6": {"num_heads": 1, "width": 3, "mix_rank": 2, "decay_rank": 2},
  "mlstm": {"num_heads": 1, "key_width": 2},
}  # fmt: skip
# What a token t reads was written before it, of a token and the one before.
WINDOWS = {"rwkv4": 3, "rwkv5": 3, "rwkv6": 3}
# By day one kind of each structure: of channels and of heads, real and
# complex, with a shown system and with shown sums.
BY_DAY = ("s4d", "h3", "mamba", "mamba2", "rwkv4", "gla")
INFLUENCE = [
  pytest.param(
    kind,
    held,
    id=f"{kind}-{'both' if held else 'plain'}",
    # Influence takes seconds to compile.
    marks=[] if held and kind == "mamba" else [pytest.mark.nightly],
  )
  for kind in KINDS
  for held in (BOTH, None)
]


@pytest.mark.parametrize(
  "kind",
  [
    pytest.param(kind, marks=[] if kind in BY_DAY else [pytest.mark.nightly])
    for kind in KINDS
  ],
)
def test_held_channels_sum_or_forget_exactly_and_states_are_bounded(kind):
  show = quick(lambda key, x: shown_and_own(kind, key, x))
  eq1, own = jax.tree.map(np.asarray, show(jax.random.key(0), tokens()))
  held = np.moveaxis(eq1.a, channels_of(kind, eq1.a), 0)
  assert (held[0] == 1).all()
  assert (held[-1] == 0).all()
  assert ((np.abs(held[1:-1]) > 0) & (np.abs(held[1:-1]) < 1)).all()
  states, *_ = analyse(*flat(eq1))
  one, zero = (of(eq1.a, value) for value in (1, 0))
  drive = flat(eq1)[1] * flat(eq1)[2]
  # Whatever enters a one-channel stays in it, at any distance; of a
  # zero-channel's past there is nothing.
  assert drive[..., one].any()
  total = np.cumsum(drive[..., one], 1)
  assert_close(states[..., one], total, jnp.float32)
  np.testing.assert_array_equal(states[..., zero], drive[..., zero])

  # The mean of RWKV-4 is what over-smoothing is about, not its sums.
  own = eq1 if own is None else own
  _, paper, ours = analyse(*flat(own))
  spread, slack = np.asarray(ours.state_spread), 1 + 1e-5
  assert (spread <= slack * np.asarray(ours.hull_bound)).all()
  applies = np.asarray(ours.applies)
  assert (spread <= slack * np.asarray(ours.bound))[applies].all()
  applies = np.asarray(paper.premises.applies)
  claim = np.asarray(paper.factor * paper.input_spread)
  assert (spread <= slack * claim)[applies].all()
  # A sum has no bound that is free of T (a mean has); a zero-channel is not
  # smoothed, and makes the theorem say nothing of all channels together.
  one, zero = (of(own.a, value) for value in (1, 0))
  assert one.any() == (kind != "rwkv4")
  assert np.isinf(ours.kappa[:, one]).all()
  assert zero.any()
  assert (np.asarray(paper.factor)[:, zero] == 1).all()
  np.testing.assert_array_equal(paper.bound, paper.input_spread.max(-1))


@pytest.mark.parametrize(("kind", "held"), INFLUENCE)
def test_influence_through_one_channels_stays_and_other_influence_dies(
  kind, held
):
  config, window = small(kind, held)

  @quick
  def run(key, x):
    with appendix_b.usual_promotion():
      model = config.build(WIDTH, 1, nnx.Rngs(key))
      truth = jax.vmap(jax.jacrev(lambda x: model(x[None])[0][0]))(x)
      shown = functools.partial(shows(kind), model)
      return theory.polarized_recency(shown, x, window=window), truth

  split, truth = run(jax.random.key(0), tokens())
  far = np.tri(LENGTH, k=-window, dtype=bool)
  truth = np.moveaxis(truth, 3, 2)[:, far]
  assert_close(split.jacobian[:, far], truth, jnp.float32)
  size, slack = np.abs(truth), 1e-5 * np.abs(truth).max()
  assert (np.asarray(split.lower)[:, far] <= size + slack).all()
  assert (np.asarray(split.upper)[:, far] >= size - slack).all()
  decaying = np.abs(np.asarray(split.decaying)[:, far]).max((-1, -2))
  assert (decaying <= np.asarray(split.remainder)[:, far] + slack).all()
  assert (np.asarray(split.rho) < 1).all()
  if held is None:
    assert not split.ones.any()
    return
  ones = np.moveaxis(split.ones, channels_of(kind, split.ones[:, None]) - 1, 0)
  assert ones[0].all()
  assert not ones[1:].any()
  assert (np.asarray(split.floor) > 0).all()
  if kind == "retnet":
    return  # Its queries turn against its keys, for ever.
  # One token again and again: what is left of it is the same at every lag.
  kept = split.kept[1, -1, window - 1 : LENGTH - window]
  assert_close(kept, jnp.broadcast_to(kept[:1], kept.shape), jnp.float32)


@pytest.mark.nightly
def test_shown_sums_and_systems_are_those_of_their_layers():
  for kind in ("h3", "rwkv4"):

    @quick
    def run(key, x, kind=kind):
      model = small(kind)[0].build(WIDTH, 1, nnx.Rngs(key))
      return theory.outputs(shows(kind)(model, x)), model(x)[0]

    with appendix_b.usual_promotion():
      shown, y = run(jax.random.key(0), tokens())
    assert_close(shown, y, jnp.float32)


def shown_and_own(kind, key, x):
  """What a layer shows here, and its own recurrence if that is another."""
  with appendix_b.usual_promotion():
    model = small(kind)[0].build(WIDTH, 1, nnx.Rngs(key))
    return shows(kind)(model, x), (
      model.recurrence(x) if kind == "rwkv4" else None
    )


@quick
def analyse(a, dt, b):
  """States, and both bounds of their spread: compiled once for all kinds."""
  eq1 = theory.from_arrays(a, dt, b)
  frame = theory.rotating_frame(eq1)
  return (
    theory.states(eq1), theory.oversmoothing(frame),
    theory.kappa_smoothing(frame),
  )  # fmt: skip


def flat(eq1):
  """a, dt and b with one axis of channels, and idle ones up to a round size."""
  found = []
  for x in (eq1.a, np.broadcast_to(eq1.dt, eq1.b.shape), eq1.b):
    x = x.reshape(*x.shape[:2], -1)
    found.append(np.pad(x, ((0, 0), (0, 0), (0, -x.shape[-1] % ROUND))))
  found[0][..., eq1.a[0, 0].size :] = 0.5
  return found


def of(a, value):
  """The flat channels whose decay is this at every t but the first."""
  found = (a[:, 1:] == value).all((0, 1)).ravel()
  return np.pad(found, (0, -found.size % ROUND))


def tokens():
  """A row of tokens drawn at random, and one of the same all over."""
  x = jax.random.normal(jax.random.key(1), (2, LENGTH, WIDTH), jnp.float32)
  return x.at[1].set(x[1, :1])


def small(kind, held=BOTH):
  """A small configuration, and how far back its tokens look."""
  config = MIXERS[kind](**SMALL.get(kind, {}), polarization=held)
  return config, WINDOWS.get(kind) or getattr(config, "d_conv", 0) or 1


def channels_of(kind, a):
  """The axis of `[B, T, *S]` along which decays are held."""
  if MIXERS[kind].polarizes == "heads":
    return 2
  return 3 if a.ndim == 5 else a.ndim - 1


def shows(kind):
  own = lambda model, x: model.recurrence(x)
  return {"h3": diagonal_system, "rwkv4": sums}.get(kind, own)


def diagonal_system(model, x):
  """H3 from its shifted keys on: S = (H·P², N)."""
  q, k, v = model._split(x)
  products = model._products(model.shift(k)[0], v)
  flat = products.reshape(*x.shape[:2], -1)
  repeat = lambda w: jnp.repeat(w, flat.shape[-1] // len(w), 0)
  a, dt, b, c = map(repeat, model.system.weights())
  b = b * flat[..., None]
  readout = jax.tree_util.Partial(_read_system, model, c, q, products)
  return Recurrence(
    jnp.broadcast_to(a, b.shape), dt[None, None, :, None], b,
    jnp.zeros_like(b[:, 0]), readout,
  )  # fmt: skip


def sums(model, x):
  """RWKV-4's Σ e^k v and Σ e^k of the tokens before: S = (2, A)."""
  k, v, r, _ = model._before_scan(x, None, None)
  write = jnp.exp(k)
  b = jnp.stack([write * v, write], -2)
  b = jnp.concatenate([jnp.zeros_like(b[:, :1]), b[:, :-1]], 1)
  a = jnp.broadcast_to(jnp.exp(model._log_decay()), b.shape)
  readout = jax.tree_util.Partial(_read_sums, model, k, v, r)
  one = jnp.ones((1, 1, 1, 1), b.dtype)
  return Recurrence(a, one, b, jnp.zeros_like(b[:, 0]), readout)


def _read_system(model, c, q, products, h, t):
  q, products = (_at(value, t) for value in (q, products))
  y = (c * h).sum(-1).real.reshape(products.shape)
  y = y + model.D[...][:, None, None] * products
  return model._write(q, y, jnp.float32)


def _read_sums(model, k, v, r, h, t):
  k, v, r = (_at(value, t) for value in (k, v, r))
  now = jnp.exp(model.bonus[...] + k)
  mean = (h[:, 0] + now * v) / (h[:, 1] + now)
  return dense(r * mean, model.out_proj[...])


def _at(value, t):
  return jax.lax.dynamic_index_in_dim(value, t, 1, keepdims=False)
