"""The step: exact sums over microbatches, devices and seeds."""

import dataclasses
import functools
import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_run
from checks import assert_close
from flax import nnx
from jax.sharding import AxisType

from ssmjax.models import LanguageModel, ModelConfig
from ssmjax.training import (
  adamw,
  data_mesh,
  decay_mask,
  ensure_deterministic,
  epoch_cosine,
  gradient,
  init_state,
  make_program,
  parallel,
  warmup_cosine,
)

OPTIMIZER = adamw(1e-2, clip=0.5)


def test_gradient_is_that_of_the_weighted_mean():
  graphdef, params = split()
  batch = toy_run.Examples().batch(16, 3, 0)

  def mean(params):
    model = nnx.merge(graphdef, params)
    total, weight, _ = toy_run.plain_loss(model, batch, None)
    return total / weight

  found, metrics = jax.jit(
    functools.partial(gradient, toy_run.plain_loss, graphdef)
  )(params, batch, jax.random.key(0))
  value, expected = jax.jit(jax.value_and_grad(mean))(params)
  assert_close(found, expected)
  total, weight = metrics["loss"]
  assert_close(total / weight, value)
  norm, one = metrics["grad_norm"]
  assert_close(norm, optax.tree.norm(expected))
  assert one == 1
  assert metrics["accuracy"][1] == 16
  assert metrics["w_accuracy"][1] == weight


def test_accumulation_equals_the_big_batch_with_unequal_weights():
  graphdef, params = split()
  batch = toy_run.Examples().batch(16, 3, 0)
  batch["w"] = batch["w"].at[:8].multiply(100.0)  # the halves weigh unequally
  whole, parts = (
    gradient(
      toy_run.plain_loss,
      graphdef,
      params,
      batch,
      jax.random.key(0),
      microbatches=n,
    )
    for n in (1, 4)
  )
  assert_close(parts, whole)


def test_bfloat16_compute_keeps_float32_parameters_and_sums():
  def half(tree):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)

  def loss(model, batch, key):
    total, weight, metrics = toy_run.plain_loss(half(model), batch, key)
    return total.astype(jnp.bfloat16), weight, metrics

  graphdef, params = split()
  batch = toy_run.Examples().batch(16, 3, 0)
  found, metrics = gradient(
    loss, graphdef, params, batch, jax.random.key(0), microbatches=2
  )
  expected, _ = gradient(
    toy_run.plain_loss, graphdef, params, batch, jax.random.key(0)
  )
  assert_close(found, expected, "bfloat16")
  for leaf in jax.tree.leaves((found, metrics)):
    assert leaf.dtype == jnp.float32


def test_weight_zero_gives_gradient_zero():
  graphdef, params = split()
  batch = toy_run.Examples().batch(16, 3, 0)
  batch["w"] = jnp.zeros(16)
  found, metrics = gradient(
    toy_run.plain_loss, graphdef, params, batch, jax.random.key(0)
  )
  assert not any(x.any() for x in jax.tree.leaves(found))
  assert metrics["loss"][1] == 0


@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf, -np.inf])
def test_weight_that_cannot_be_gives_no_gradient_of_zero(weight):
  graphdef, params = split()

  def loss(model, batch, key):
    return model.scale[...].sum(), weight, {}

  found, _ = gradient(loss, graphdef, params, {}, jax.random.key(0))
  assert all(np.isnan(x).all() for x in jax.tree.leaves(found))


def test_step_descends_in_complex_parameters():
  class Pole(nnx.Module):
    def __init__(self):
      self.z = nnx.Param(jnp.asarray(1.0 + 1.0j))

  def loss(model, batch, key):
    return jnp.abs(model.z[...] - (2.0 - 1.0j)) ** 2, 1.0, {}

  program, state = program_of(
    loss, optax.sgd(0.1), steps=100, init=lambda seed: Pole()
  )
  state, _ = jax.jit(program)(state, {})
  assert_close(state.params["z"][0], np.complex64(2.0 - 1.0j))


@pytest.mark.parametrize(
  ("strategy", "microbatches"),
  [
    ("shard_map", 2),
    ("pmap", 1),
    pytest.param("shard_map", 1, marks=pytest.mark.nightly),
    pytest.param("pmap", 2, marks=pytest.mark.nightly),
  ],
)
def test_eight_devices_equal_one(strategy, microbatches):
  one = trained(data_mesh(jax.devices()[:1]), "shard_map")
  eight = trained(data_mesh(), strategy, microbatches=microbatches)
  assert_close(eight, one, "float32")


def test_pmap_equals_shard_map_to_the_bit():
  mesh = data_mesh()
  loss = toy_run.loss  # with its noise: the same keys on the same devices
  assert_same(
    trained(mesh, "pmap", loss=loss), trained(mesh, "shard_map", loss=loss)
  )


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_users_mesh_may_have_other_axes_and_either_type(axis_type):
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
  expected = trained(data_mesh(jax.devices()[:1]), "shard_map")
  assert_close(trained(mesh, "shard_map"), expected, "float32")
  with jax.set_mesh(mesh):
    assert_close(trained(mesh, "shard_map"), expected, "float32")


def test_batches_given_equal_batches_made():
  mesh = data_mesh(jax.devices()[:4])
  made = [toy_run.Examples().batch(16, step, 0) for step in range(3)]
  stack = jax.tree.map(lambda *x: np.stack(x), *made)
  given = run(mesh, "shard_map", stack, loss=toy_run.plain_loss, stream=None)
  assert_close(given, trained(mesh, "shard_map"), "float32")


def test_one_dispatch_of_many_steps_equals_many_of_one():
  mesh = data_mesh(jax.devices()[:2])
  many = trained(mesh, "shard_map", steps=1, dispatches=3)
  assert_close(many, trained(mesh, "shard_map"), "float32")


def test_several_seeds_equal_each_alone():
  mesh = data_mesh(jax.devices()[:2])
  together = trained(mesh, "shard_map", seeds=(5, 2**32 - 1))
  for i, seed in enumerate((5, 2**32 - 1)):
    alone = trained(mesh, "shard_map", seeds=(seed,))
    mine = jax.tree.map(lambda x, i=i: x[i : i + 1], together)
    assert_close(mine, alone, "float32")


def test_one_seed_is_not_mapped_over():
  shapes = []

  def loss(model, batch, key):
    # Under vmap a value is a batch tracer, which hides an axis.
    shapes.append("Batch" in type(batch["x"]).__name__)
    return toy_run.plain_loss(model, batch, key)

  for seeds in ((0,), (0, 1)):
    program, state = program_of(loss, OPTIMIZER, seeds=seeds)
    jax.make_jaxpr(program)(state, {})
  assert len(shapes) == 2
  assert not shapes[0]


def test_random_losses_get_a_key_per_step_device_and_microbatch():
  def loss(model, batch, key):
    draw = jax.random.uniform(key)
    return 0.0 * model.scale[...].sum(), 1.0, {"x": (draw, 1), "xx": draw**2}

  def draws(devices, microbatches):
    mesh = data_mesh(jax.devices()[:devices])
    program, state = program_of(
      loss,
      OPTIMIZER,
      steps=2,
      axis="data",
      devices=devices,
      microbatches=microbatches,
    )
    _, metrics = parallel(program, mesh)(state, {})
    return np.asarray(metrics["x"])[:, 0], np.asarray(metrics["xx"])[:, 0]

  for devices, microbatches in ((1, 2), (2, 1)):
    (x, n), (xx, _) = (
      np.moveaxis(d, -1, 0) for d in draws(devices, microbatches)
    )
    assert (n == 2).all()
    variance = xx / 2 - (x / 2) ** 2
    assert (variance > 1e-6).all()  # not one number twice
    assert x[0] != x[1]


def test_state_is_donated():
  program, state = program_of(toy_run.plain_loss, OPTIMIZER)
  compiled = parallel(program, data_mesh(jax.devices()[:1]))
  after, _ = compiled(state, {})
  again, _ = compiled(after, {})
  assert all(x.is_deleted() for x in jax.tree.leaves(after))
  assert int(again.step) == 6


def test_batch_that_does_not_divide_is_refused_with_the_numbers():
  program, state = program_of(
    toy_run.plain_loss, OPTIMIZER, axis="data", devices=8, microbatches=3
  )
  with pytest.raises(ValueError, match=r"16 examples .* 8 devices × 3 micro"):
    parallel(program, data_mesh())(state, {})


@pytest.mark.parametrize(
  ("variable", "match"),
  [
    (nnx.Param(jnp.ones(2, jnp.bfloat16)), "parameter odd is bfloat16"),
    (nnx.Param(jnp.ones(2, jnp.int32)), "parameter odd is int32"),
    (nnx.BatchStat(jnp.ones(2)), "odd is a BatchStat"),
  ],
)
def test_model_of_other_things_than_wide_parameters_is_refused(variable, match):
  class Odd(nnx.Module):
    def __init__(self):
      self.odd = variable

  with pytest.raises(ValueError, match=match):
    init_state(lambda seed: Odd(), OPTIMIZER, (0,))


@pytest.mark.parametrize(
  "name",
  ["loss", "grad_norm", "step", "event", "seed", "seconds"]
  + ["tokens_per_second"],
)
def test_metric_with_a_taken_name_is_refused(name):
  graphdef, params = split()
  with pytest.raises(ValueError, match=f"named '{name}', which is taken"):
    gradient(
      lambda model, batch, key: (model.scale[...].sum(), 1.0, {name: 1.0}),
      graphdef,
      params,
      {},
      jax.random.key(0),
    )


def test_decay_mask_spares_dynamics_norms_and_biases():
  params = {
    "blocks": {  # stacked: a bias has two axes
      "A_log": jnp.ones((3, 4, 2)),
      "D": jnp.ones((3, 4)),
      "dt_bias": jnp.ones((3, 4)),
      "dt_proj": {"kernel": jnp.ones((3, 2, 4)), "bias": jnp.ones((3, 4))},
      "norm": {"scale": jnp.ones((3, 4)), "weight": jnp.ones((3, 4))},
      "layers": {0: {"kernel": jnp.ones((3, 4, 4))}},
    },
    "embedding": jnp.ones((5, 4)),
    "vector": jnp.ones(4),
  }
  marked = [
    jax.tree_util.keystr(path, simple=True, separator=".")
    for path, mark in jax.tree.leaves_with_path(decay_mask(params))
    if mark
  ]
  expected = ["blocks.dt_proj.kernel", "blocks.layers.0.kernel", "embedding"]
  assert sorted(marked) == expected


class Gated(nnx.Module):
  """A user's mixer with its own time scales, that says nothing of them."""

  def __init__(self, width):
    self.gamma = nnx.Param(jnp.ones(width))
    self.rates = nnx.Param(jnp.ones(width))
    self.kernel = nnx.Param(jnp.ones((width, width)))
    self.B = nnx.Param(jnp.ones((width, width)), weight_decay=True)
    self.levels = nnx.Param(jnp.ones((width, 3)), weight_decay=False)

  def __call__(self, x, state=None, segment_ids=None):
    return self.gamma[...] * self.rates[...] * x, ()

  def init_state(self, batch_size, max_length=None):
    return ()


@dataclasses.dataclass(frozen=True)
class GatedConfig:
  """Its configuration."""

  def build(self, d_model, n_layers, rngs):
    return Gated(d_model)


def gated_model():
  config = ModelConfig(16, 8, 4, mixers=GatedConfig(), remat=False)
  return LanguageModel(config, rngs=nnx.Rngs(0))


def test_decay_mask_of_a_users_module_is_that_of_one_layer():
  stacked = decay_mask(gated_model()).blocks[0].mixer
  for mixer in (stacked, decay_mask(Gated(8))):
    marks = {k: bool(v) for k, v in nnx.to_pure_dict(nnx.state(mixer)).items()}
    assert marks == {
      "B": True, "gamma": False, "kernel": True, "levels": False,
      "rates": False,
    }  # fmt: skip
  # What is taken out of a stack is still what it was.
  assert not bool(decay_mask(gated_model().block(2)).mixer.rates.get_value())


def test_step_pulls_on_what_the_model_says():
  optimizer = adamw(0.1, weight_decay=0.5)
  loss = lambda model, batch, key: (jnp.zeros(()), 1.0, {})
  graphdef, state = init_state(lambda seed: gated_model(), optimizer, (0,))
  program = make_program(loss, optimizer, graphdef, steps=1, seeds=(0,))
  params = jax.jit(program)(state, {"x": jnp.ones((1, 1))})[0].params
  mixer = params["blocks"][0]["mixer"]
  shrunk = {name: bool((value < 1).all()) for name, value in mixer.items()}
  assert shrunk == {
    "B": True, "gamma": False, "kernel": True, "levels": False, "rates": False,
  }  # fmt: skip


def test_decay_goes_by_the_model_where_a_transformation_hides_parameters():
  module = Gated(4)
  params = nnx.to_pure_dict(nnx.state(module))
  kinds = {name: "still" if name == "B" else "decayed" for name in params}
  optimizer = optax.multi_transform(
    {"decayed": adamw(0.1, weight_decay=0.5), "still": optax.set_to_zero()},
    kinds,
  )
  zero = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(
    zero, optimizer.init(params), params, model=module
  )
  moved = {name for name, update in updates.items() if (update != 0).any()}
  assert moved == {"kernel"}


def test_adamw_is_that_of_optax():
  params = {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}
  grads = jax.tree.map(jnp.cos, params)
  ours = adamw(1e-2, weight_decay=0.3, b2=0.95)
  theirs = optax.adamw(1e-2, b2=0.95, weight_decay=0.3, mask=decay_mask)
  states = ours.init(params), theirs.init(params)
  assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
  chex.assert_trees_all_equal(
    ours.update(grads, states[0], params)[0],
    theirs.update(grads, states[1], params)[0],
  )


def test_decay_all_decays_what_the_mask_spares():
  params = {"A_log": jnp.ones((2, 2)), "kernel": jnp.ones((2, 2))}
  zero = jax.tree.map(jnp.zeros_like, params)

  def shrinks(**options):
    optimizer = adamw(0.1, weight_decay=0.5, **options)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    return {name: bool((u != 0).all()) for name, u in updates.items()}

  assert shrinks() == {"A_log": False, "kernel": True}
  assert shrinks(decay_all=True) == {"A_log": True, "kernel": True}
  only = lambda params: {"A_log": True, "kernel": False}
  assert shrinks(mask=only) == {"A_log": True, "kernel": False}
  with pytest.raises(ValueError, match="both mask and decay_all"):
    adamw(0.1, mask=only, decay_all=True)


def test_clipping_bounds_the_global_norm():
  params = {"kernel": jnp.zeros((2, 2))}
  optimizer = optax.chain(adamw(1.0, clip=1e-3, weight_decay=0.0, eps=1.0))
  big = {"kernel": jnp.full((2, 2), 1e6)}
  updates, _ = optimizer.update(big, optimizer.init(params), params)
  # m̂ / (√v̂ + 1) with every component 1e-3 / 2.
  assert_close(updates["kernel"], np.full((2, 2), -5e-4 / 1.0005, np.float32))


def test_epoch_cosine_is_the_papers():
  schedule = epoch_cosine(1e-3, epochs=64, steps_per_epoch=10)
  found = np.asarray([schedule(step) for step in range(640)])
  epochs = np.arange(640) // 10
  assert_close(found, 0.5e-3 * (1 + np.cos(np.pi * epochs / 64)), "float32")
  assert_close(found.sum() / 10 * 0.1, 0.1 * 0.5e-3 * 65, "float32")


def test_schedules_hold_their_last_value():
  cosine = epoch_cosine(1.0, epochs=4, steps_per_epoch=3)
  assert cosine(12) == cosine(50) == cosine(11)
  assert_close(cosine(jnp.arange(12)), np.asarray([*map(cosine, range(12))]))
  warm = warmup_cosine(1.0, steps=12, warmup=2, end=0.1)
  assert warm(12) == warm(13) == warm(50)


def test_epochs_of_no_steps_are_refused():
  with pytest.raises(ValueError, match="epoch_cosine: epochs is 0"):
    epoch_cosine(1.0, epochs=0, steps_per_epoch=3)
  with pytest.raises(ValueError, match="steps_per_epoch is 0"):
    epoch_cosine(1.0, epochs=3, steps_per_epoch=0)


def test_warmup_cosine_rises_falls_and_ends():
  schedule = warmup_cosine(1e-3, steps=100, warmup=10, end=1e-5)
  values = np.asarray([schedule(step) for step in range(101)])
  assert values[0] == 0
  assert values.argmax() == 10
  assert (np.diff(values[10:]) < 0).all()
  assert_close(values[[10, 100]], np.asarray([1e-3, 1e-5]), "float32")


@functools.cache
def initial(init, optimizer, seeds):
  graphdef, state = init_state(init, optimizer, seeds)
  return graphdef, jax.tree.map(np.asarray, state)


def test_determinism_is_asked_for_in_time_or_denied(monkeypatch):
  started = [False]
  monkeypatch.setattr("ssmjax.training.determinism._found", None)
  monkeypatch.setattr(
    "jax._src.xla_bridge.backends_are_initialized", lambda: started[0]
  )
  monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
  assert ensure_deterministic()
  flag = "--xla_gpu_deterministic_ops"
  assert os.environ["XLA_FLAGS"] == f"--xla_dump_to=x {flag}=true"
  assert ensure_deterministic()
  for off in ("false", "0"):
    monkeypatch.setenv("XLA_FLAGS", f"{flag} {flag}={off}")
    assert not ensure_deterministic()
  monkeypatch.setenv("XLA_FLAGS", "")
  started[0] = True
  assert ensure_deterministic()  # a CPU needs no flag
  monkeypatch.setattr("jax.default_backend", lambda: "gpu")
  assert not ensure_deterministic()
  monkeypatch.setenv("XLA_FLAGS", f"{flag}=true")  # too late
  assert not ensure_deterministic()


def split(seed=0):
  graphdef, variables = nnx.split(toy_run.init(seed))
  return graphdef, nnx.to_pure_dict(variables)


@dataclasses.dataclass(frozen=True)
class Sixteen:
  def kind(self, step):
    return 16

  def batch(self, kind, step, seed):
    return toy_run.Examples().batch(kind, step, seed)


def program_of(
  loss,
  optimizer,
  *,
  init=toy_run.init,
  steps=3,
  seeds=(0,),
  stream=Sixteen(),
  **options,
):
  graphdef, state = initial(init, optimizer, seeds)
  program = make_program(
    loss,
    optimizer,
    graphdef,
    steps=steps,
    seeds=seeds,
    stream=stream,
    kind=16,
    **options,
  )
  return program, state


@functools.cache
def trained(
  mesh, strategy, *, loss=toy_run.plain_loss, dispatches=1, **options
):
  """Parameters and moments after three steps on the mesh."""
  return run(mesh, strategy, {}, loss=loss, dispatches=dispatches, **options)


def run(mesh, strategy, batches, *, loss, dispatches=1, **options):
  program, state = program_of(
    loss, OPTIMIZER, axis="data", devices=mesh.shape["data"], **options
  )
  compiled = parallel(program, mesh, strategy)
  for _ in range(dispatches):
    state, _ = compiled(state, batches)
  tree = {"params": state.params, "opt_state": state.opt_state}
  return jax.tree.map(np.asarray, tree)


def assert_same(found, expected):
  """Equal to the bit, leaf by leaf."""
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
