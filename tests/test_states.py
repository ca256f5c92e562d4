"""A state that is not the one a mixer makes is refused where it enters."""

import collections
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from experiments.recall_zoo import SIZES
from ssmjax.models import LanguageModel, ModelConfig, prefill
from ssmjax.models.kinds import MIXERS

KINDS = pytest.mark.parametrize("kind", MIXERS)
ROWS, LENGTH, WIDTH = 3, 4, 64
Other = collections.namedtuple("Other", "hidden")


def build(kind, width=WIDTH):
  config = MIXERS[kind](**SIZES.get(kind, {}))
  return jax.eval_shape(lambda: config.build(width, 2, nnx.Rngs(0)))


def state_of(model, *sizes):
  return jax.eval_shape(lambda m: m.init_state(*sizes), model)


def call(model, x, state):
  return jax.eval_shape(lambda m, x, s: m(x, s), model, x, state)


def step(model, x, state):
  first = jax.ShapeDtypeStruct((x.shape[0], *x.shape[2:]), x.dtype)
  return jax.eval_shape(lambda m, x, s: m.step(x, s), model, first, state)


def wrong_states(right, others):
  """States that differ from the right one in one array, or altogether."""
  yield from others
  yield Other(jax.ShapeDtypeStruct((ROWS,), jnp.float32))
  leaves, structure = jax.tree.flatten(right)
  for index, leaf in enumerate(leaves):
    one_row = jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype)
    flat = jax.ShapeDtypeStruct((ROWS,), leaf.dtype)
    half = jax.ShapeDtypeStruct(leaf.shape, jnp.float16)
    for other in (one_row, half) + (flat,) * (len(leaf.shape) > 1):
      yield structure.unflatten([*leaves[:index], other, *leaves[index + 1 :]])


@KINDS
def test_state_of_other_rows_sizes_or_types_is_refused(kind):
  mixer, x = build(kind), jax.ShapeDtypeStruct((ROWS, LENGTH, WIDTH), "float32")
  name = type(mixer).__name__
  right = state_of(mixer, ROWS)
  others = [state_of(mixer, 1), state_of(mixer, ROWS + 1)]
  wide = state_of(build(kind, 2 * WIDTH), ROWS)
  # Some states have the configuration's sizes alone.
  others += [wide] * (wide != right)
  for wrong in wrong_states(right, others):
    for run, function in ((call, name), (step, f"{name}.step")):
      message = rf"^{function}: state.*expected.*init_state\({ROWS}"
      with pytest.raises(ValueError, match=message):
        run(mixer, x, wrong)
  with pytest.raises(ValueError, match=f"^{name}.step: state is None, expect"):
    step(mixer, x, None)


@pytest.mark.parametrize("kind", ["attention", "hyena"])
def test_state_with_room_for_any_number_of_tokens_goes_in(kind):
  mixer, x = build(kind), jax.ShapeDtypeStruct((ROWS, LENGTH, WIDTH), "float32")
  _, made = call(mixer, x, None)
  for state in (state_of(mixer, ROWS, 7), state_of(mixer, ROWS, 1), made):
    assert step(mixer, x, state)[1] == state


def test_language_model_refuses_a_state_of_other_rows():
  kinds = ("rwkv_channel_mix", "attention", "hyena")
  mixers = tuple(MIXERS[kind](**SIZES.get(kind, {})) for kind in kinds)
  config = ModelConfig(16, WIDTH, 6, mixers)
  model = jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
  tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
  right, one = state_of(model, ROWS, 9), state_of(model, 1, 9)
  assert call(model, tokens, right)[1] == right
  read = lambda m, x, s: jax.eval_shape(prefill, m, x, s)
  part = right._replace(layers=(*right.layers[:2], one.layers[2]))
  shift = right.layers[0].shift
  deep = jax.ShapeDtypeStruct((6, *shift.shape[1:]), shift.dtype)
  deep = right._replace(layers=(type(one.layers[0])(deep), *right.layers[1:]))
  for wrong, message in (
    (
      one,
      r"state.layers\[0\]\.shift is float32\(2, 1, 64\), expected float32\(2",
    ),
    (part, r"state.layers\[2\]\.\w+ is .*\(2, 1, .*expected .*\(2, 3, "),
    (deep, r"shift is float32\(6, 3, 64\), expected float32\(2, 3, 64\)"),
    (right._replace(layers=right.layers[:2]), "is 2 states, expected a tuple"),
    (right._replace(length=one.length), r"state.length has shape \(1,\), exp"),
    (tuple(right), "state is a tuple, expected a ModelState"),
  ):
    for run in (call, step, read):
      with pytest.raises(ValueError, match=f"^LanguageModel.*{message}"):
        run(model, tokens, wrong)
  with pytest.raises(ValueError, match=r"LanguageModel.step: state is None"):
    step(model, tokens, None)


def test_block_refuses_a_state_of_other_rows_of_a_users_mixer():
  class Mean(nnx.Module):
    def __call__(self, x, state=None, segment_ids=None):
      return x, x[:, -1]

    def step(self, x, state, segment_ids=None):
      return x, x

    def init_state(self, batch_size, max_length=None):
      return jnp.zeros((batch_size, 8), jnp.float32)

  class MeanConfig:
    def build(self, d_model, n_layers, rngs):
      return Mean()

  model = LanguageModel(ModelConfig(16, 8, 2, MeanConfig()), rngs=nnx.Rngs(0))
  block, x = model.block(1), jnp.ones((ROWS, LENGTH, 8))
  block(x, jnp.zeros((ROWS, 8)))
  found = r"state is float32\(1, 8\), expected float32\(3, 8\)"
  with pytest.raises(ValueError, match=f"Block: {found}"):
    block(x, jnp.zeros((1, 8)))
  with pytest.raises(ValueError, match=f"Block.step: {found}"):
    block.step(x[:, 0], jnp.zeros((1, 8)))


def test_state_is_checked_without_a_computation():
  mixer = MIXERS["rwkv_channel_mix"]().build(8, 2, nnx.Rngs(0))
  run = jax.make_jaxpr(functools.partial(type(mixer).step, mixer))
  count = lambda *arguments: len(run(*arguments).jaxpr.eqns)
  before = count(jnp.ones((1, 8)), mixer.init_state(1))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("ssmjax.models.channel_mix.check_step", lambda *_: None)
    assert count(jnp.ones((1, 8)), mixer.init_state(1)) == before
