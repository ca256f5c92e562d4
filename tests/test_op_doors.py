"""Every function of `ssmjax.ops` says what is wrong with what it is given."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssmjax import ops

B, T, D, N, H, K, P, W = 2, 3, 4, 2, 2, 3, 2, 3


def array(*shape):
  return np.full(shape, 0.5, np.float32)


def heads(*time):
  return dict(q=array(B, *time, H, K), k=array(B, *time, H, K))


def arguments():
  """Valid arguments of all functions, arrays of NumPy."""
  table = {}

  def family(name, step, op, state, **more):
    """Over time, its definition and one step; `op` is made of time axes."""
    whole = op(T) | dict(initial_state=state, segment_ids=np.ones((B, T), int))
    table[name] = whole | more
    table[f"{name}_reference"] = whole
    table[step] = op() | dict(state=state, segment_ids=np.ones(B, int))

  def selective(*t):
    tokens = dict(u=array(B, *t, D), delta=array(B, *t, D), z=array(B, *t, D))
    maps = dict(B=array(B, *t, N), C=array(B, *t, N))
    rates = dict(A=array(D, N), D=array(D), delta_bias=array(D))
    return tokens | maps | rates | dict(polarization=None)

  def ssd(*t):
    maps = dict(B=array(B, *t, 1, N), C=array(B, *t, 1, N))
    tokens = dict(
      x=array(B, *t, H, P), dt=array(B, *t, H), z=array(B, *t, H, P)
    )
    rates = dict(A=array(H), D=array(H), dt_bias=array(H))
    return maps | tokens | rates | dict(polarization=None, dt_limits=(0.0, 1.0))

  def attention(*t):
    values = dict(v=array(B, *t, H, P), log_a=array(B, *t, H))
    return heads(*t) | values | dict(bonus=array(H, K), scale=1.0)

  def delta(*t):
    return heads(*t) | dict(
      v=array(B, *t, H, P), beta=array(B, *t, H), log_a=array(B, *t, H)
    )

  def ttt(*t):
    tokens = {name: array(B, *t, H, P) for name in ("q", "k", "v")}
    shapes = (H, P, P), (H, P), (H, P), (H, P), (4,)
    learner = ops.TTTLearner(*(array(*shape) for shape in shapes))
    return tokens | dict(rate=array(B, *t, H), learner=learner)

  system = dict(a=array(D, N), b=array(D, N), c=array(D, N), D=array(D))
  matrices = dict(a=array(D, N, N), b=array(D, N), c=array(D, 1, N))
  shapes = (B, H, P, P), (B, H, P), (B, H, P, P), (B, H, P)
  learned = ops.TTTState(*(array(*s) for s in shapes), np.zeros(B, np.int32))
  form = dict(implementation="chunked")
  family("selective_scan", "selective_step", selective, array(B, D, N), **form)
  table["selective_step"] |= dict(implementation="reference")
  family(
    "linear_scan", "linear_step",
    lambda *t: dict(a=array(B, *t, D), b=array(B, *t, D)), array(B, D), **form,
  )  # fmt: skip
  family("gated_linear_attention", "gated_linear_attention_step", attention,
         array(B, H, K, P), **form)  # fmt: skip
  family("ssd", "ssd_step", ssd, array(B, H, P, N), **form)
  family("delta_rule", "delta_rule_step", delta, array(B, H, K, P), **form)
  family("ttt_linear", "ttt_linear_step", ttt, learned, **form)
  family("lti_scan", "lti_step", lambda *t: dict(x=array(B, *t, D)) | system,
         array(B, D, N), **form)  # fmt: skip
  family(
    "lti_matrix_scan", "lti_matrix_step",
    lambda *t: dict(x=array(B, *t, D)) | matrices, array(B, D, N), **form,
  )  # fmt: skip
  family("causal_conv", "causal_conv_step",
         lambda *t: dict(x=array(B, *t, D), weight=array(W, D), bias=array(D)),
         array(B, W - 1, D))  # fmt: skip
  family("long_conv", "long_conv_step",
         lambda *t: dict(x=array(B, *t, D), kernel=array(W, D), D=array(D)),
         array(B, W - 1, D), implementation="fft")  # fmt: skip
  line = array(D, N)
  table["zero_order_hold"] = table["bilinear"] = dict(
    A=line, B=line, dt=array(D)
  )
  table["bilinear_dplr"] = dict(A=line, P=line, B=line, dt=array(D), Q=line)
  table["s4d_kernel"] = dict(
    A=line, B=line, C=line, dt=array(D), length=4, discretization="zoh"
  )
  table["dss_kernel"] = dict(A=line, W=line, dt=array(D), length=4)
  table["s4_dplr_kernel"] = dict(
    A=line, P=line, B=line, C=line, dt=array(D), length=4, Q=line
  )
  table["hippo_legs"] = table["hippo_legs_dplr"] = dict(size=2)
  table["hippo_legt"] = dict(size=2, window=1.0)
  table["linear_cross_entropy"] = dict(
    features=array(B, D), weight=array(N, D), targets=np.zeros(B, np.int32),
    weights=array(B), softcap=1.0,
  )  # fmt: skip
  table["ttt_positions"] = dict(
    size=4, shape=(B, T), start=np.zeros(B, np.int32),
    segment_ids=np.ones((B, T), np.int32),
  )  # fmt: skip
  return table


TABLE = arguments()


def call(name, args):
  """Trace the function only; values do not matter here."""
  return jax.eval_shape(lambda: getattr(ops, name)(**args))


def test_the_table_has_every_function():
  assert {*TABLE, "TTTLearner", "TTTState"} == set(ops.__all__)
  flags = {"delta_softplus", "dt_softplus", "reverse", "dense"}
  flags |= {"conjugate_pairs"}
  # Those of a family have the same doors; one of them tells all arguments.
  flags |= {"implementation", "polarization", "dt_limits", "scale"}
  for name, args in TABLE.items():
    known = inspect.signature(getattr(ops, name)).parameters
    assert set(known) - flags <= set(args), name


@pytest.mark.parametrize("name", TABLE)
def test_what_is_no_array_or_number_is_named(name):
  args = TABLE[name]
  call(name, args)
  parameters = inspect.signature(getattr(ops, name)).parameters
  for key, value in args.items():
    wrong = ["text", [[0.5], [1.0]]]
    if isinstance(value, np.ndarray):
      wrong += [
        np.full(value.shape, "a"),
        np.zeros(value.shape, bool),
        object(),
      ]
    required = parameters[key].default is inspect.Parameter.empty
    if required:
      wrong.append(None)
    for other in wrong:
      with pytest.raises(ValueError, match=rf"^{name}: {key}\b.* expected"):
        call(name, args | {key: other})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
      for field in value._fields:
        for other in (None, "text", [0.5]):
          spoiled = args | {key: value._replace(**{field: other})}
          with pytest.raises(ValueError, match=rf"{name}: {key}\.{field} is"):
            call(name, spoiled)


@pytest.mark.parametrize(
  "name", [x for x in TABLE if "segment_ids" in TABLE[x]]
)
def test_a_batch_of_no_rows_has_results_of_no_rows(name):
  args = TABLE[name]
  if name == "ttt_positions":
    args = args | dict(start=None)
  tree = jax.tree.map(
    lambda x: x[:0] if isinstance(x, np.ndarray) and x.shape[0] == B else x,
    args,
  )
  shared = ("A", "a", "b", "c", "D", "weight", "kernel", "bias", "learner",
            "bonus", "delta_bias", "dt_bias")  # fmt: skip
  if name == "ttt_positions":
    tree["shape"] = (0, T)
  rows = tree | {
    key: value
    for key, value in args.items()
    if key in shared and not (name.startswith("linear") and key in "ab")
  }
  expected, found = call(name, args), call(name, rows)
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for x, y in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    assert (x.shape, x.dtype) == ((0, *y.shape[1:]), y.dtype)


@pytest.mark.parametrize("op", ["selective_scan", "ssd", "delta_rule"])
def test_parameters_have_gradients_of_zero_from_a_batch_of_no_rows(op):
  args = {k: v for k, v in TABLE[op].items() if k != "polarization"}
  parameter = "A" if "A" in args else "log_a"
  no_rows = ("A", "D", "delta_bias", "dt_bias")
  rows = {
    k: v[:0] if isinstance(v, np.ndarray) and k not in no_rows else v
    for k, v in args.items()
  }
  slope = jax.jit(
    jax.grad(lambda x: getattr(ops, op)(**rows | {parameter: x})[0].sum())
  )
  found = slope(jnp.asarray(rows[parameter]))
  assert found.shape == rows[parameter].shape
  assert not np.asarray(found).any()


@pytest.mark.parametrize(
  "name", [x for x in TABLE if "implementation" in TABLE[x]]
)
def test_an_unknown_implementation_is_named(name):
  for wrong in ("fused", 1, ["chunked"]):
    with pytest.raises(ValueError, match=f"{name}: implementation is"):
      call(name, TABLE[name] | dict(implementation=wrong))


@pytest.mark.parametrize(
  "name", [x for x in TABLE if "initial_state" in TABLE[x]]
)
def test_a_sequence_of_no_tokens_is_refused(name):
  args = TABLE[name]
  none = {
    key: value[:, :0]
    for key, value in args.items()
    if isinstance(value, np.ndarray) and value.shape[:2] == (B, T)
  }
  with pytest.raises(ValueError, match=f"{name}: . has no time steps"):
    call(name, args | none)
