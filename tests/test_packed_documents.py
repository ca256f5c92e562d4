"""A document that is not finite leaves the others of its row alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import quick

from ssmjax import ops
from ssmjax.ops import scan as scan_module
from ssmjax.ops import selective_chunked
from ssmjax.ops.platform_passes import OTHERS
from ssmjax.types import Polarization

# Three documents, padding behind the second.
IDS = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 3, 3, 3]], np.int32)
T = IDS.shape[1]
D, N, H, K, P = 3, 2, 2, 3, 2
TOKENS, STATE = (1, T, D), (1, D, N)
HEADS = {"q": (1, T, H, K), "k": (1, T, H, K), "v": (1, T, H, P)}
RATES = {"A": (D, N), "D": (D,), "delta_bias": (D,)}
SCAN = {
  "u": TOKENS, "delta": TOKENS, "z": TOKENS, "B": (1, T, N), "C": (1, T, N)
}  # fmt: skip
SYSTEM = {"a": (D, N), "b": (D, N), "c": (D, N), "D": (D,)}
BOTH = Polarization(ones=1, zeros=1)


def learner(draw):
  shapes = (H, P, P), (H, P), (H, P), (H, P), (4,)
  return ops.TTTLearner(*(draw(s) for s in shapes))


def learner_state(draw):
  shapes = (1, H, P, P), (1, H, P), (1, H, P, P), (1, H, P)
  return ops.TTTState(*(draw(s) for s in shapes), jnp.ones(1, jnp.int32))


def scan(implementation, **options):
  return functools.partial(
    ops.selective_scan, implementation=implementation, **options
  )


def by_name(op, implementation):
  return functools.partial(op, implementation=implementation)


# Op, arrays of tokens, arrays without time, the initial state.
TABLE = {
  "selective associative": (scan("associative"), SCAN, RATES, STATE),
  "selective chunked": (scan("chunked"), SCAN, RATES, STATE),
  # The chunks of `jax.lax.associative_scan`, which accelerators have too.
  "selective complex": (
    lambda A, **args: ops.selective_scan(
      A=A * (1 + 1j), implementation="chunked", **args
    ),
    SCAN, RATES, STATE,
  ),
  "selective polarized": (
    scan("chunked", polarization=BOTH),
    SCAN | {"B": (1, T, N + 2), "C": (1, T, N + 2)}, RATES, (1, D, N + 2),
  ),
  "linear associative": (
    by_name(ops.linear_scan, "associative"), {"a": TOKENS, "b": TOKENS}, {},
    (1, D),
  ),
  "linear chunked": (
    by_name(ops.linear_scan, "chunked"), {"a": TOKENS, "b": TOKENS}, {}, (1, D)
  ),
  "attention": (
    by_name(ops.gated_linear_attention, "chunked"),
    HEADS | {"log_a": (1, T, H, K)}, {"bonus": (H, K)}, (1, H, K, P),
  ),
  "ssd": (
    by_name(ops.ssd, "chunked"),
    {"x": (1, T, H, P), "dt": (1, T, H), "B": (1, T, 1, N), "C": (1, T, 1, N),
     "z": (1, T, H, P)},
    {"A": (H,), "D": (H,), "dt_bias": (H,)}, (1, H, P, N),
  ),
  "delta": (
    by_name(ops.delta_rule, "chunked"),
    HEADS | {"beta": (1, T, H), "log_a": (1, T, H)}, {}, (1, H, K, P),
  ),
  "ttt": (
    by_name(ops.ttt_linear, "chunked"),
    dict.fromkeys("qkv", (1, T, H, P)) | {"rate": (1, T, H)},
    {"learner": learner}, learner_state,
  ),
  "lti associative": (
    by_name(ops.lti_scan, "associative"), {"x": TOKENS}, SYSTEM, STATE
  ),
  "lti chunked": (
    by_name(ops.lti_scan, "chunked"), {"x": TOKENS}, SYSTEM, STATE
  ),
  "lti matrix": (
    by_name(ops.lti_matrix_scan, "chunked"), {"x": TOKENS},
    {"a": (D, N, N), "b": (D, N), "c": (D, 2, N)}, STATE,
  ),
  "short convolution": (
    ops.causal_conv, {"x": TOKENS}, {"weight": (3, D)}, (1, 2, D)
  ),
  "long convolution": (
    by_name(ops.long_conv, "fft"), {"x": TOKENS}, {"kernel": (4, D)}, (1, 3, D)
  ),
}  # fmt: skip


def check(case):
  op, tokens, shared, state = TABLE[case]
  rng = np.random.default_rng(0)

  def draw(shape):
    if callable(shape):
      return shape(draw)
    # Decays, rates and logarithms of decays are all right in this range.
    return jnp.asarray(-rng.uniform(0.1, 0.5, shape), jnp.float32)

  tokens = {name: draw(shape) for name, shape in tokens.items()}
  shared = {name: draw(shape) for name, shape in shared.items()}
  state = draw(state)

  def loss(tokens, state, kept, last):
    """Of finite documents, and of the final state where it is of one."""
    y, final = op(
      **tokens, **shared, initial_state=state, segment_ids=jnp.asarray(IDS)
    )
    kept = kept.reshape(kept.shape + (1,) * (y.ndim - 2))
    total = jnp.where(kept, y * jnp.cos(y), 0).sum()
    for x in jax.tree.leaves(final):
      total += jnp.where(last, x, 0).real.sum()
    return total, (y, final)

  both = jax.value_and_grad(loss, (0, 1), has_aux=True, allow_int=True)
  both = quick(both)

  def seen(tokens, state, bad):
    """All that is to stay as it is while document `bad` is not finite."""
    kept = (IDS > 0) & (bad != IDS)
    (_, (y, final)), grads = both(tokens, state, jnp.asarray(kept), bad != 3)
    own = {name: np.asarray(x)[kept] for name, x in grads[0].items()}
    padded = [np.asarray(x)[IDS == 0] for x in (y, *grads[0].values())]
    floats = lambda tree: [
      np.asarray(x) for x in jax.tree.leaves(tree) if x.dtype.kind in "fc"
    ]
    return dict(
      y=np.asarray(y)[kept], grads=own, padded=padded,
      final=floats(final) if bad != 3 else [],
      state=floats(grads[1]) if bad != 1 else [],
    )  # fmt: skip

  def hold(found, expected, where):
    assert not any(np.any(x != 0) for x in found["padded"]), where
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(
        x, y, rtol=1e-4, atol=1e-5, err_msg=str(where)
      ),
      found, expected,
    )  # fmt: skip

  padded = np.flatnonzero(IDS[0] == 0)
  for bad, place in ((1, 1), (2, 4), (3, 9)):
    expected = seen(tokens, state, bad)
    for value in (np.nan, np.inf):
      filled = {k: x.at[:, padded].set(value) for k, x in tokens.items()}
      for name, x in filled.items():
        sick = filled | {name: x.at[:, place].set(value)}
        hold(seen(sick, state, bad), expected, (case, bad, name, value))
      if bad == 1:
        sick = jax.tree.map(
          lambda x, value=value: (
            jnp.full_like(x, value) if x.dtype.kind == "f" else x
          ),
          state,
        )
        hold(seen(filled, sick, 1), expected, (case, "state", value))


# By day the forms that run by default, but for two ops whose own tests say it.
LATE = {
  *("selective associative", "selective complex", "selective polarized"),
  *("linear associative", "lti associative", "attention", "delta"),
}


@pytest.mark.parametrize(
  "case",
  [
    pytest.param(case, marks=[pytest.mark.nightly] if case in LATE else [])
    for case in TABLE
  ],
)
def test_what_is_not_finite_stays_in_its_document(case):
  check(case)


@pytest.mark.nightly
@pytest.mark.parametrize(
  "case", ["selective chunked", "linear chunked", "attention", "ssd", "delta"]
)
def test_what_is_not_finite_stays_in_its_document_on_accelerators(
  case, monkeypatch
):
  # The forms that a platform without a kernel takes, run on this one.
  pick = lambda *args, default, **forms: default(*args)
  monkeypatch.setattr(jax.lax, "platform_dependent", pick)
  for table in (scan_module._CHUNKED, selective_chunked.CHUNKED):
    monkeypatch.setitem(table, "cpu", table[OTHERS])
  jax.clear_caches()
  try:
    check(case)
  finally:
    jax.clear_caches()
