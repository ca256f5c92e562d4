"""AdamW as the paper and as the field use it, and their schedules."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

# For trees from elsewhere, the last name of a parameter that sets a time scale
# or a skip: the decay A in all its parametrizations, with S4's P and B, D, and
# the bias or logarithm of the step Δ; RWKV's decays, bonus and token shifts; a
# filter's frequencies; the scale and shift of norms as TensorFlow has them.
_DYNAMICS = re.compile(
  r"A|A_\w+|\w+_A|B|D|P|dt|log_dt|dt_bias|log_step|Lambda\w*|decay_param"
  r"|time_(decay|first|mix\w*)|bonus|mix_(?!up|down)\w+|filter_frequency"
  r"|token_scale|tau|gamma|beta"
)


def adamw(
  learning_rate: optax.ScalarOrSchedule,
  *,
  weight_decay: float = 0.1,
  clip: float | None = None,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  mask: Callable[[Any], Any] | None = None,
  decay_all: bool = False,
) -> optax.GradientTransformation:
  """Builds AdamW with a decay mask and, if asked, gradient clipping.

      θ ← θ − lr·(m̂ / (√v̂ + eps) + weight_decay·mask·θ)

  Args:
    learning_rate: a number, or a schedule from the step's index (from 0).
    weight_decay: decoupled decay, multiplied by the learning rate.
    clip: largest global norm of the gradient; None does not clip.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    mask: from parameters to a tree of booleans, True where decay applies;
      None means `decay_mask`: what a parameter says of itself decides,
      `nnx.Param(value, weight_decay=False)`, and without that its name and
      its number of axes.
    decay_all: decay every tensor, A_log, D, norms and biases included. This is
      what the code of the paper does.

  Returns:
    The transformation. Moments have the dtype of the parameters (float32). Its
    `update` takes `model=`, the module that the parameters are of, for arrays
    without what the module says of them: `fit` passes it.

  >>> optimizer = adamw(1e-3, clip=1.0)
  >>> len(optimizer.init({"kernel": jax.numpy.zeros((2, 2))}))
  2
  """
  if decay_all and mask is not None:
    raise ValueError("adamw: found both mask and decay_all, expected one.")
  if decay_all or mask is not None:
    decay = optax.add_decayed_weights(weight_decay, mask)
  else:
    decay = _decay_by_metadata(weight_decay)
  update = optax.chain(
    optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
    decay,
    optax.scale_by_learning_rate(learning_rate),
  )
  if clip is None:
    return update
  return optax.chain(optax.clip_by_global_norm(clip), update)


def decay_mask(params: Any) -> Any:
  """Marks the parameters that weight decay may pull to zero.

  Not to be marked are those whose zero is not neutral: A_log, D and dt_bias
  (decay drives all A to −1, and the states lose their diversity), biases and
  the scales of norms. Of each parameter the first rule that speaks decides:

  1. What it says of itself where it is made, `nnx.Param(value,
     weight_decay=False)` or `True`. All parameters of this library's models
     whose zero is not neutral say so.
  2. Its name, where it is one of those that published models give to decays,
     skips, biases and norms: for arrays from elsewhere.
  3. Its number of axes: two or more are a matrix, which is marked. In the
     stacked blocks of this library's models the axis of the stack does not
     count (`layer_axes` of a parameter's metadata says how many do), so that a
     user's own vector is a vector at any depth.

  Args:
    params: a module, its `nnx.state`, or any tree of arrays. A tree of arrays
      has lost what the module said: give the module where there is one.

  Returns:
    The same tree with booleans.

  >>> decay_mask({"A_log": jnp.ones((4, 2)), "kernel": jnp.ones((4, 2))})
  {'A_log': False, 'kernel': True}
  """

  def mark(path, leaf):
    decays = _decays(path, leaf)
    return jax.tree.map(lambda _: decays, leaf)

  return jax.tree_util.tree_map_with_path(
    mark, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
  )


def epoch_cosine(
  learning_rate: float, *, epochs: int, steps_per_epoch: int
) -> optax.Schedule:
  """Makes a cosine to zero that takes one step per epoch.

      lr_e = lr·(1 + cos(π·e / epochs)) / 2,   e = ⌊step / steps_per_epoch⌋

  The rate is constant within an epoch and never zero: the last epoch has
  e = epochs − 1, and steps after it keep its rate. This is the paper's schedule
  for associative recall.

  Args:
    learning_rate: the first epoch's rate.
    epochs: how many, at least 1.
    steps_per_epoch: at least 1.

  Raises:
    ValueError: one of the numbers is below 1.

  >>> round(float(epoch_cosine(1.0, epochs=4, steps_per_epoch=10)(29)), 4)
  0.5
  """
  for name, value in (("epochs", epochs), ("steps_per_epoch", steps_per_epoch)):
    if value < 1:
      raise ValueError(f"epoch_cosine: {name} is {value}, expected at least 1.")

  def schedule(step):
    # Beyond the last epoch the cosine would rise again.
    epoch = jnp.minimum(step // steps_per_epoch, epochs - 1)
    return learning_rate * 0.5 * (1.0 + jnp.cos(math.pi * epoch / epochs))

  return schedule


def warmup_cosine(
  learning_rate: float, *, steps: int, warmup: int, end: float = 0.0
) -> optax.Schedule:
  """Makes a linear warm-up from 0 followed by a cosine down to `end`.

  Args:
    learning_rate: the peak, reached after `warmup` steps.
    steps: all steps, warm-up included.
    warmup: steps of the warm-up.
    end: the rate at the last step (the paper's language models: 1e-5).

  >>> float(warmup_cosine(1.0, steps=100, warmup=10)(10))
  1.0
  """
  return optax.warmup_cosine_decay_schedule(
    0.0, learning_rate, warmup, steps, end
  )


def _decay_by_metadata(rate):
  """Weight decay of what `decay_mask` marks in a model, or in parameters."""

  def init(params):
    return optax.add_decayed_weights(rate, decay_mask).init(params)

  def update(updates, state, params=None, *, model=None, **_):
    mask = decay_mask
    if model is not None:
      marks = nnx.to_pure_dict(decay_mask(nnx.state(model)))
      marks = dict(jax.tree_util.tree_leaves_with_path(marks))
      # By their paths: a transformation around this one may hide some.
      mask = lambda params: jax.tree_util.tree_map_with_path(
        lambda path, leaf: marks.get(path, _decays(path, leaf)), params
      )
    return optax.add_decayed_weights(rate, mask).update(updates, state, params)

  return optax.GradientTransformationExtraArgs(init, update)


def _decays(path: tuple, leaf: Any) -> bool:
  axes = None
  if isinstance(leaf, nnx.Variable):
    metadata = leaf.get_metadata()
    if metadata.get("weight_decay") is not None:
      return bool(metadata["weight_decay"])
    axes, leaf = metadata.get("layer_axes"), leaf.get_value()
  names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
  last = names[-1] if names else ""
  if _DYNAMICS.fullmatch(last) or "bias" in last or last == "scale":
    return False
  if any("norm" in name.lower() for name in names):
    return False
  return (jnp.ndim(leaf) if axes is None else axes) > 1
