"""One small call of every public function that takes arrays, for meshes.

A case is a function of two trees: `whole`, of which every device has a copy,
and `rows`, whose leading axis a mesh divides.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ssmjax import data, diagnostics, models, ops, polarization, theory
from ssmjax.types import Polarization

# Rows, tokens, channels, states, heads, key width, taps of a convolution.
B, T, D, N, H, K, W = 2, 6, 4, 4, 2, 4, 3
IDS = jnp.asarray([[1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 0, 0]], jnp.int32)
TOKENS = jnp.arange(B * T).reshape(B, T) * 7 % 16
BOTH = Polarization(ones=1, zeros=1)


@dataclasses.dataclass(frozen=True)
class Case:
  """A call: its gradient is taken too where `gradient`, under jit or not."""

  run: Callable[[Any, Any], Any]
  whole: Any
  rows: Any
  gradient: bool = False
  jit: bool = True


def normal(*shape, seed=0, scale=0.5):
  values = np.random.default_rng(seed).standard_normal(shape) * scale
  return jnp.asarray(values, jnp.float32)


def decays(*shape, seed=0):
  return jax.nn.sigmoid(normal(*shape, seed=seed, scale=1.0))


# Arguments and state of each op; its static arguments; its arguments that have
# no rows. The definition and the step take the same ones.
OPS = {
  "causal_conv": (
    dict(x=normal(B, T, D), weight=normal(W, D, seed=1), bias=normal(D)),
    normal(B, W - 1, D, seed=2),
    ("weight", "bias"),
    {},
  ),
  "delta_rule": (
    dict(
      q=normal(B, T, H, K),
      k=normal(B, T, H, K, seed=1),
      v=normal(B, T, H, K, seed=2),
      beta=decays(B, T, H, seed=3),
      log_a=jnp.log(decays(B, T, H, seed=4)),
    ),
    normal(B, H, K, K, seed=5),
    (),
    {},
  ),
  "gated_linear_attention": (
    dict(
      q=normal(B, T, H, K),
      k=normal(B, T, H, K, seed=1),
      v=normal(B, T, H, K, seed=2),
      log_a=jnp.log(decays(B, T, H, K, seed=4)),
      bonus=normal(H, K, seed=6),
    ),
    normal(B, H, K, K, seed=5),
    ("bonus",),
    {},
  ),
  "linear_scan": (
    dict(a=decays(B, T, D), b=normal(B, T, D, seed=1)),
    normal(B, D, seed=2),
    (),
    {},
  ),
  "long_conv": (
    dict(x=normal(B, T, D), kernel=normal(T, D, seed=1), D=normal(D)),
    normal(B, T - 1, D, seed=2),
    ("kernel", "D"),
    {},
  ),
  "lti_matrix_scan": (
    dict(
      x=normal(B, T, D),
      a=normal(D, N, N, scale=0.2),
      b=normal(D, N, seed=1),
      c=normal(D, 2, N, seed=2),
    ),
    normal(B, D, N, seed=3),
    ("a", "b", "c"),
    {},
  ),
  "lti_scan": (
    dict(
      x=normal(B, T, D),
      a=decays(D, N),
      b=normal(D, N, seed=1),
      c=normal(D, N, seed=2),
      D=normal(D),
    ),
    normal(B, D, N, seed=3),
    ("a", "b", "c", "D"),
    {},
  ),
  "selective_scan": (
    dict(
      u=normal(B, T, D),
      delta=normal(B, T, D, seed=1),
      A=-decays(D, N - 2),
      B=normal(B, T, N, seed=2),
      C=normal(B, T, N, seed=3),
      D=normal(D),
      z=normal(B, T, D, seed=4),
      delta_bias=normal(D, seed=5),
    ),
    normal(B, D, N, seed=6),
    ("A", "D", "delta_bias"),
    dict(delta_softplus=True, polarization=BOTH),
  ),
  "ssd": (
    dict(
      x=normal(B, T, H, K),
      dt=normal(B, T, H, seed=1),
      A=-decays(H),
      B=normal(B, T, 1, N, seed=2),
      C=normal(B, T, 1, N, seed=3),
      D=normal(H),
      z=normal(B, T, H, K, seed=4),
      dt_bias=normal(H, seed=5),
    ),
    normal(B, H, K, N, seed=6),
    ("A", "D", "dt_bias"),
    dict(dt_softplus=True),
  ),
  "ttt_linear": (
    dict(
      q=normal(B, T, H, K),
      k=normal(B, T, H, K, seed=1),
      v=normal(B, T, H, K, seed=2),
      rate=decays(B, T, H, seed=3),
      learner=ops.TTTLearner(
        normal(H, K, K, seed=4),
        normal(H, K, seed=5),
        1 + normal(H, K, seed=6),
        normal(H, K, seed=7),
        1 / jnp.arange(1.0, 5.0),
      ),
    ),
    ops.TTTState(
      normal(B, H, K, K, seed=8),
      normal(B, H, K, seed=9),
      normal(B, H, K, K, seed=10),
      normal(B, H, K, seed=11),
      jnp.asarray([1, 2], jnp.int32),
    ),
    ("learner",),
    {},
  ),
}
STEPS = {
  "linear_scan": "linear_step",
  "lti_scan": "lti_step",
  "lti_matrix_scan": "lti_matrix_step",
  "selective_scan": "selective_step",
}


def op_cases() -> dict[str, Case]:
  """Each op with its definition and its step: states, restarts, gradients."""

  def case(function, arguments, shared, static, **rows):
    def run(whole, rows):
      return function(**whole, **rows, **static)

    rows |= {k: v for k, v in arguments.items() if k not in shared}
    whole = {k: v for k, v in arguments.items() if k in shared}
    return Case(run, whole, rows, gradient=True)

  cases = {}
  for name, (arguments, state, shared, static) in OPS.items():
    for full in (name, f"{name}_reference"):
      cases[full] = case(
        getattr(ops, full), arguments, shared, static,
        initial_state=state, segment_ids=IDS,
      )  # fmt: skip
    step = STEPS.get(name, f"{name}_step")
    token = {k: v if k in shared else v[:, 0] for k, v in arguments.items()}
    cases[step] = case(
      getattr(ops, step), token, shared, static,
      state=state, segment_ids=IDS[:, 0],
    )  # fmt: skip
  return cases


def lti_cases() -> dict[str, Case]:
  """Functions of parameters: channels are what is divided."""
  complexes = lambda seed: jax.lax.complex(
    normal(D, N, seed=seed), normal(D, N, seed=seed + 1)
  )
  a = jax.lax.complex(-decays(D, N), normal(D, N, seed=20))
  dt = decays(D, seed=1)
  calls = {
    "bilinear": (
      lambda A, B, dt: ops.bilinear(A, B, dt),
      (a, complexes(2), dt),
    ),
    "zero_order_hold": (
      lambda A, B, dt: ops.zero_order_hold(A, B, dt),
      (a, complexes(2), dt),
    ),
    "bilinear_dplr": (
      lambda A, P, B, dt: ops.bilinear_dplr(A, P, B, dt),
      (a, complexes(2), complexes(4), dt),
    ),
    "dss_kernel": (
      lambda A, W, dt: ops.dss_kernel(A, W, dt, T),
      (a, complexes(2), dt),
    ),
    "s4d_kernel": (
      lambda A, B, C, dt: ops.s4d_kernel(A, B, C, dt, T),
      (a, complexes(2), complexes(4), dt),
    ),
    "s4_dplr_kernel": (
      lambda A, P, B, C, dt: ops.s4_dplr_kernel(A, P, B, C, dt, T),
      (a, complexes(2), complexes(4), complexes(6), dt),
    ),
  }
  return {
    name: Case(lambda _, rows, f=f: f(*rows), (), rows)
    for name, (f, rows) in calls.items()
  }


def loose_op_cases() -> dict[str, Case]:
  targets = jnp.asarray([1, 0, 3, 2])
  return {
    "linear_cross_entropy": Case(
      lambda weight, rows: ops.linear_cross_entropy(
        rows[0], weight, rows[1], rows[2]
      ),
      normal(5, D),
      (normal(4, D), targets, decays(4)),
      gradient=True,
    ),
    "ttt_positions": Case(
      lambda _, rows: ops.ttt_positions(4, (B, T), *rows),
      (),
      (jnp.asarray([1, 2], jnp.int32), IDS),
    ),
  }


def shown(a, dt, b, c):
  return theory.from_arrays(a, dt, b, c)


RECURRENCE = (
  decays(B, T, D),
  decays(B, T, D, seed=1),
  normal(B, T, D, seed=2),
  normal(B, T, D, seed=3),
)


def layer(weights, x):
  """A selective layer of two taps, as the theory sees it."""
  gate = jnp.einsum("btm,md->btd", x, weights)
  before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
  return shown(jax.nn.sigmoid(gate), jnp.ones_like(gate), x + before, gate)


def theory_cases() -> dict[str, Case]:
  cases = {"from_arrays": Case(lambda _, r: shown(*r), (), RECURRENCE)}
  for name in (
    "kappa",
    "kappa_smoothing",
    "outputs",
    "oversmoothing",
    "parallel_form",
    "recency_premises",
    "rotating_frame",
    "smoothing_premises",
    "state_envelope",
    "states",
    "zero_order_hold",
  ):
    function = getattr(theory, name)
    cases[name] = Case(lambda _, r, f=function: f(shown(*r)), (), RECURRENCE)
  for name in ("parallel_weights", "spread"):
    function = getattr(theory, name)
    cases[name] = Case(lambda _, r, f=function: f(r), (), RECURRENCE[0])
  for name, options in {
    "dependence_window": {},
    "locality_premise": dict(window=2),
    "polarized_recency": dict(window=2),
    "recency": dict(window=2),
  }.items():
    function = functools.partial(getattr(theory, name), **options)
    cases[name] = Case(
      lambda w, x, f=function: f(functools.partial(layer, w), x),
      normal(D, D),
      normal(B, T, D, seed=1),
      jit=name != "dependence_window",
    )
  system = (-decays(N), decays(N), normal(N, seed=1), normal(N, seed=2))
  a, dt, b, c = system
  at = jnp.linspace(0.0, 3.0, 4)
  for name, run, rows in (
    ("cutoff", lambda w, r: theory.cutoff(0.1, *r), (a, b, c)),
    ("low_pass", lambda w, r: theory.low_pass(0.1, *r), (a, b, c)),
    ("low_pass_premise", lambda w, r: theory.low_pass_premise(r), a),
    ("transfer", lambda w, r: theory.transfer(*r), (at, a, b, c)),
    ("transfer_bound", lambda w, r: theory.transfer_bound(*r), (at, a, b, c)),
    (
      "discrete_transfer",
      lambda w, r: theory.discrete_transfer(*r),
      (at, jnp.exp(a), dt, b, c),
    ),
    (
      "stop_band_peak",
      lambda w, r: theory.stop_band_peak(*r, 1.0),
      (at, normal(4, seed=3)),
    ),
  ):
    cases[name] = Case(run, (), rows)
  return cases


def diagnostics_cases() -> dict[str, Case]:
  x = normal(B, T, D, seed=1)
  cases = {}
  for name in ("channel_spread", "sharpness"):
    function = getattr(diagnostics, name)
    cases[name] = Case(
      lambda _, rows, f=function: f(rows[0], mask=rows[1]), (), (x, IDS > 0)
    )
  for name in ("layer_smoothness", "log_a_max", "log_decay", "memory_length",
               "spectrum"):  # fmt: skip
    function = getattr(diagnostics, name)
    cases[name] = Case(lambda _, r, f=function: f(shown(*r)), (), RECURRENCE)
  for name, options in {
    "autodiff_jacobian": {},
    "layer_influence": dict(window=2),
  }.items():
    function = functools.partial(getattr(diagnostics, name), **options)
    cases[name] = Case(
      lambda w, x, f=function: f(functools.partial(layer, w), x),
      normal(D, D),
      x,
    )
  read = lambda w: lambda x: theory.outputs(layer(w, x))
  cases["influence"] = Case(
    lambda w, x: diagnostics.influence(read(w), x), normal(D, D), x, jit=False
  )
  cases["lag_curve"] = Case(
    lambda w, x: diagnostics.lag_curve(diagnostics.influence(read(w), x)),
    normal(D, D), x, jit=False,
  )  # fmt: skip
  cases["influence_memory"] = Case(
    lambda w, x: jnp.asarray(diagnostics.influence_memory(read(w), x) > 0),
    normal(D, D), x, jit=False,
  )  # fmt: skip
  cases["cumulative_share"] = Case(
    lambda grid, x: diagnostics.cumulative_share(x, grid), normal(3), x
  )
  cases["summarise"] = Case(
    lambda _, r: diagnostics.summarise(diagnostics.spectrum(shown(*r))),
    (), RECURRENCE, jit=False,
  )  # fmt: skip
  return cases


def polarization_cases() -> dict[str, Case]:
  a, delta = -decays(D, N), decays(B, T, D)
  return {
    "polarize": Case(
      lambda _, r: polarization.polarize(r, BOTH), (), decays(B, N)
    ),
    "polarize_log": Case(
      lambda _, r: polarization.polarize_log(r, BOTH), (), -decays(B, N)
    ),
    "selective_decay": Case(
      lambda A, delta: polarization.selective_decay(delta, A, BOTH), a, delta
    ),
  }


def data_cases() -> dict[str, Case]:
  config = data.RecallConfig(16, 2, vocab_size=16)
  index = jnp.arange(4, dtype=jnp.uint32)
  one = lambda f: lambda seed, rows: f(config, seed, rows)
  return {
    "recall_examples": Case(one(data.recall_examples), jnp.uint32(3), index),
    "recall_batch": Case(
      lambda whole, _: data.recall_batch(config, *whole, 4),
      (jnp.uint32(3), jnp.uint32(1)),
      (),
    ),
    "recall_example": Case(
      lambda whole, _: data.recall_example(config, *whole),
      (jnp.uint32(3), jnp.uint32(1)),
      (),
    ),
    "bits_per_byte": Case(
      lambda _, rows: data.bits_per_byte(rows[0].mean(), rows[1]),
      (),
      (normal(B), IDS),
    ),
  }


@functools.cache
def language_model():
  config = models.ModelConfig(16, 8, 1, mixers=(models.MambaConfig(),))
  return nnx.split(models.LanguageModel(config, rngs=nnx.Rngs(0)))


@functools.cache
def classifier():
  config = models.ClassifierConfig(3, 8, 1, vocab_size=16)
  return nnx.split(models.Classifier(config, rngs=nnx.Rngs(0)))


def models_cases() -> dict[str, Case]:
  graph, params = language_model()
  model = lambda params: nnx.merge(graph, params)
  class_graph, class_params = classifier()
  labels = jnp.where(IDS == 2, TOKENS, -100)
  return {
    "labelled_loss": Case(
      lambda p, rows: models.labelled_loss(model(p), rows),
      params,
      {"tokens": TOKENS, **models.gather_labels(labels, 3)},
      gradient=True,
    ),
    "gather_labels": Case(
      lambda _, rows: models.gather_labels(rows, 3), (), labels
    ),
    "classification_loss": Case(
      lambda p, rows: models.classification_loss(
        nnx.merge(class_graph, p), rows
      ),
      class_params,
      {"inputs": TOKENS, "labels": jnp.asarray([2, 0])},
      gradient=True,
    ),
    "prefill": Case(
      lambda p, rows: models.prefill(model(p), rows[0], None, rows[1]),
      params,
      (TOKENS, IDS),
    ),
    "generate": Case(
      lambda p, rows: models.generate(model(p), rows, 3), params, TOKENS
    ),
    "stream": Case(
      lambda p, rows: np.stack(list(models.stream(model(p), rows, 3)), 1),
      params,
      TOKENS,
      jit=False,
    ),
    "take_rows": Case(
      lambda p, rows: models.take_rows(model(p)(rows)[1], [1, 0]),
      params,
      TOKENS,
    ),
  }


CASES: dict[str, Callable[[], dict[str, Case]]] = {
  "ops": lambda: op_cases() | lti_cases() | loose_op_cases(),
  "theory": theory_cases,
  "diagnostics": diagnostics_cases,
  "polarization": polarization_cases,
  "data": data_cases,
  "models": models_cases,
}
