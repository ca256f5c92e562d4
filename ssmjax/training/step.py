"""The train step as a pure function, and many of them in one dispatch."""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ssmjax.training import sharding
from ssmjax.training.metrics import check_names

Batch = dict[str, Any]
Loss = Callable[[Any, Batch, jax.Array], tuple[jax.Array, jax.Array, dict]]


class Stream(Protocol):
  """Data made on the device from the step's index: no pipeline, no cursor."""

  def kind(self, step: int) -> Hashable:
    """Names the shape of a step's batch; runs on the host."""

  def batch(self, kind: Any, step: jax.Array, seed: jax.Array) -> Batch:
    """Makes the whole global batch; traced, so `kind` alone sets shapes.

    `step` is int32 and `seed` uint32.
    """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that a step changes. Every array but `step` has a leading seed axis.

  Parameters and moments are the float32 masters: a model that computes in
  bfloat16 casts them itself, by its own configuration, since it knows which
  must not be cast (A_log, D, dt_bias, norms).
  """

  step: jax.Array  # int32, steps done
  params: Any  # nested dict, as nnx.to_pure_dict gives it
  opt_state: Any
  key: jax.Array  # uint32 [S, ...], jax.random.key_data


def gradient(
  loss: Loss,
  graphdef: nnx.GraphDef,
  params: Any,
  batch: Batch,
  key: jax.Array,
  *,
  microbatches: int = 1,
  axis: str | None = None,
) -> tuple[Any, dict[str, jax.Array]]:
  """Computes the gradient of the loss per unit of *global* weight.

      g = (Σ_{device, microbatch} ∇ loss_sum) / (Σ_{device, microbatch} weight)

  Sums are added up and divided once, so that neither microbatches nor devices
  change the result where examples have unequal weights.

  Args:
    loss: `loss(model, batch, key) -> (loss_sum, weight, metric_sums)`, sums
      over the examples given. A metric is a sum, divided by `weight` when it
      is logged, or a pair (sum, its own weight).
    graphdef: the model's structure, from `nnx.split`.
    params: its parameters, nested dict.
    batch: arrays `[B, ...]`, this device's part.
    key: a typed key; each device and microbatch folds in its index, so a loss
      that draws random numbers gives another, equally distributed, run on
      another number of devices or microbatches.
    microbatches: parts of the batch that are computed one after another.
    axis: mesh axis to sum over; None outside of `shard_map` and `pmap`.

  Returns:
    The gradient (for complex parameters its conjugate, the direction of
    ascent) and `metrics`: arrays `[2]` of (sum, weight), with "loss" and
    "grad_norm" added. A global weight of 0 gives a gradient of 0, and one that
    is below 0 or not finite a gradient of NaN.

  Raises:
    ValueError: a metric has the name of one that is added, or of a field that
      every line of metrics has.
  """
  if axis is not None:
    key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    # Gradients by replicated parameters would be summed over devices at every
    # use; by varying ones they stay local, and one psum follows at the end.
    params = _varying(params, axis)

  def sums(batch, key):
    def objective(params):
      total, weight, metrics = loss(nnx.merge(graphdef, params), batch, key)
      return _wide(total), (_wide(weight), _pairs(total, weight, metrics))

    grads, (weight, pairs) = jax.grad(objective, has_aux=True)(params)
    return _varying((grads, weight, pairs), axis)

  if microbatches == 1:
    total = sums(batch, key)
  else:
    parts = jax.tree.map(
      lambda x: x.reshape(microbatches, -1, *x.shape[1:]), batch
    )

    def add(total, part):
      index, batch = part
      new = sums(batch, jax.random.fold_in(key, index))
      return jax.tree.map(jnp.add, total, new), None

    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(sums, first, key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(
      add, _varying(zeros, axis), (jnp.arange(microbatches), parts)
    )
  if axis is not None:
    total = jax.lax.psum(total, axis)
  grads, weight, metrics = total
  # Weight 0 is nothing to learn from; below 0 or not finite is a mistake.
  divisor = jnp.where(weight == 0, jnp.inf, jnp.nan)
  divisor = jnp.where((weight > 0) & (weight < jnp.inf), weight, divisor)
  grads = jax.tree.map(lambda g: jnp.conj(g) / divisor.astype(g.dtype), grads)
  norm = optax.tree.norm(grads)
  metrics["grad_norm"] = jnp.stack([norm, jnp.ones_like(norm)])
  return grads, metrics


def make_program(
  loss: Loss,
  optimizer: optax.GradientTransformation,
  graphdef: nnx.GraphDef,
  *,
  steps: int,
  seeds: tuple[int, ...],
  microbatches: int = 1,
  axis: str | None = None,
  devices: int = 1,
  stream: Stream | None = None,
  kind: Hashable = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
  """Makes the pure function of one dispatch: `steps` steps in a `lax.scan`.

  Args:
    loss: see `gradient`.
    optimizer: an optax transformation.
    graphdef: the model's structure.
    steps: how many steps.
    seeds: one per run that is trained at once; `vmap` is used for two or more.
    microbatches: see `gradient`.
    axis: the mesh axis, see `gradient`.
    devices: its size.
    stream: makes the batches; None takes them from the second argument, whose
      arrays `[steps, B, ...]` all seeds share.
    kind: of the stream's batches.

  Returns:
    `program(state, batches) -> (state, metrics)`, metrics `[steps, S, 2]` of
    (sum, weight).
  """

  def update(step, seed, batch, params, opt_state, key_data):
    if stream is not None:
      batch = stream.batch(kind, step, seed)
      sharding.check_batch(batch, devices, microbatches)
      batch = sharding.share(batch, axis, devices)
    key = jax.random.fold_in(jax.random.wrap_key_data(key_data), step)
    grads, metrics = gradient(
      loss, graphdef, params, batch, key, microbatches=microbatches, axis=axis
    )
    # The model says what each parameter is, which the arrays alone do not.
    updates, opt_state = optimizer.update(
      grads, opt_state, params, model=nnx.merge(graphdef, params)
    )
    return optax.apply_updates(params, updates), opt_state, metrics

  optimizer = optax.with_extra_args_support(optimizer)
  over_seeds = jax.vmap(update, in_axes=(None, 0, None, 0, 0, 0))
  if len(seeds) == 1:
    over_seeds = _over_one(update)

  def one_step(state, batch):
    params, opt_state, metrics = over_seeds(
      state.step,
      jnp.asarray(seeds, jnp.uint32),
      batch,
      state.params,
      state.opt_state,
      state.key,
    )
    state = TrainState(state.step + 1, params, opt_state, state.key)
    return state, metrics

  def program(state, batches):
    return jax.lax.scan(one_step, state, batches, length=steps)

  return program


def init_state(
  init: Callable[[int], Any],
  optimizer: optax.GradientTransformation,
  seeds: tuple[int, ...],
) -> tuple[nnx.GraphDef, TrainState]:
  """Builds the state before the first step.

  Args:
    init: from a seed to a model, an `nnx.Module` of inexact `nnx.Param`s.
    optimizer: an optax transformation.
    seeds: one model each, stacked on a leading axis.

  Returns:
    The models' common structure and the state.

  Raises:
    ValueError: the model holds something else than parameters of at least 32
      bits, whose sums of small updates would be lost.
  """
  built = [nnx.split(init(seed)) for seed in seeds]
  graphdef = built[0][0]
  for _, variables in built:
    _check_variables(variables)
  trees = [nnx.to_pure_dict(variables) for _, variables in built]
  # jnp.full(4, 1.0) is weakly typed, which a step's result is not: the first
  # step would be compiled twice.
  strong = functools.partial(jax.tree.map, lambda x: x.astype(x.dtype))

  def assemble(trees):
    params = strong(jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees))
    keys = [jax.random.key_data(jax.random.key(seed)) for seed in seeds]
    opt_state = strong(jax.vmap(optimizer.init)(params))
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, opt_state, jnp.stack(keys))

  # Jitted, because one small program per array would take longer to compile.
  return graphdef, jax.jit(assemble)(trees)


def _over_one(update):
  """Like vmap over a seed axis of length one, without the vmap."""

  def over(step, seed, batch, *states):
    states = jax.tree.map(lambda x: x[0], states)
    results = update(step, seed[0], batch, *states)
    return jax.tree.map(lambda x: x[None], results)

  return over


def _pairs(total, weight, metrics: dict) -> dict[str, jax.Array]:
  """Metrics as arrays [2] of (sum, weight)."""
  check_names("the loss", metrics, taken=("loss", "grad_norm"))
  pairs = {"loss": (total, weight)}
  for name, value in metrics.items():
    pairs[name] = value if isinstance(value, tuple) else (value, weight)
  return {
    name: jnp.stack(jnp.broadcast_arrays(*map(_wide, pair)))
    for name, pair in pairs.items()
  }


def _wide(x) -> jax.Array:
  """A scalar in float32, or in float64 if it comes so."""
  x = jnp.asarray(x)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _varying(tree, axis: str | None):
  """Types every leaf as different from device to device."""
  if axis is None:
    return tree

  def cast(x):
    # Under pmap nothing is typed as varying, and the cast is the identity.
    if axis in jax.typeof(x).manual_axis_type.varying:
      return x
    return jax.lax.pcast(x, axis, to="varying")

  return jax.tree.map(cast, tree)


def _check_variables(variables) -> None:
  for path, variable in nnx.to_flat_state(variables):
    name = ".".join(map(str, path))
    if not isinstance(variable, nnx.Param):
      raise ValueError(
        f"fit: the model's {name} is a {type(variable).__name__}, expected "
        "nnx.Param only: a step changes nothing but parameters."
      )
    dtype = variable.get_value().dtype
    if not jnp.issubdtype(dtype, jnp.inexact) or jnp.finfo(dtype).bits < 32:
      raise ValueError(
        f"fit: the parameter {name} is {dtype}, expected float32 (or wider): "
        "keep float32 parameters and let the model compute in bfloat16."
      )
