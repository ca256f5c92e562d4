"""How strongly the output at t depends on the input at s, of a whole model."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssmjax.diagnostics.norms import norm
from ssmjax.types import Array, Float, gathered

__all__ = ["Influence", "influence", "influence_memory"]

Progress = Callable[[Sequence[Any]], Iterable[Any]]


class Influence(NamedTuple):
  """Squared Frobenius norms of ∂yₜ/∂xₛ, at [k, row, s] for t = times[k].

  Attributes:
    times: t, `[K]`.
    squared: ‖∂yₜ/∂xₛ‖_F², or an unbiased estimate of it, `[K, B, T]`, float64
      (float32 has no squares of norms below 1e-19).
    standard_error: of `squared`, from the probes' own spread; 0 where exact.
    probes: random probes for each t; None where exact.
  """

  times: np.ndarray
  squared: np.ndarray
  standard_error: np.ndarray
  probes: int | None

  @property
  def score(self) -> np.ndarray:
    """‖∂yₜ/∂xₛ‖_F; of an estimate, the root: too low by ≈ error²/(2 score)."""
    return np.sqrt(self.squared)

  @property
  def score_error(self) -> np.ndarray:
    """Standard error of `score`, to first order; 0 where the score is 0."""
    twice = 2 * self.score
    return np.divide(
      self.standard_error, twice, out=np.zeros_like(twice), where=twice > 0
    )


@gathered
def influence(
  function: Callable[[Array], Array],
  x: Float[Array, "B T M"],
  times: Sequence[int] | None = None,
  *,
  probes: int | None = None,
  key: Array | None = None,
  batch_size: int = 1,
  progress: Progress | None = None,
) -> Influence:
  """Measure the influence of every input token on some output tokens.

  score(t, s) = ‖∂yₜ/∂xₛ‖_F,  y = function(x)

  Exactly, row by row of the Jacobian: ‖∂yₜ/∂xₛ‖_F² = Σ_d ‖∂y_td/∂xₛ‖², one
  pull-back for each t and d, for small models. Or by P random probes v of
  independent signs, one pull-back each: E[v vᵀ] = I, so that

    E ‖(∂yₜ/∂xₛ)ᵀ v‖² = tr(JᵀE[v vᵀ]J) = ‖∂yₜ/∂xₛ‖_F²

  without bias, with variance 2 Σ_{d≠e} (JJᵀ)_de² ≤ 2 ‖J‖_F⁴ for one probe
  (Hutchinson 1990): a relative error of at most √(2/P), whatever D is.

  One pull-back holds the function's own residuals. A model whose blocks are
  under `jax.checkpoint` keeps one activation a block; `influence_memory` tells
  what a size would take.

  Args:
    function: maps x `[B, T, M]` to y `[B, T, D]`, each row for itself. Give a
      `jax.tree_util.Partial` of a module-level function over a model's
      arrays: they are then arguments, not constants, of the compiled
      program, which is compiled once for all models of a size.
    x: inputs, such as a language model's embeddings, `[B, T, M]`.
    times: which t; by default the last only.
    probes: P ≥ 2 random probes for each t; None for the exact norm.
    key: of the probes; by default `jax.random.key(0)`.
    batch_size: pull-backs at once; memory grows with it.
    progress: wraps the sequence of batches, as `tqdm.tqdm` does, to show a
      bar.

  Returns:
    The squared norms and their error.

  Raises:
    ValueError: shapes, dtypes or numbers that do not fit.

  >>> double = lambda x: 2 * jnp.cumsum(x, 1)
  >>> influence(double, jnp.ones((1, 3, 4)), [1]).score
  array([[[4., 4., 0.]]])
  """
  width = _check(function, x, batch_size)
  length = x.shape[1]
  times = [length - 1] if times is None else [int(t) for t in times]
  if not times or not all(0 <= t < length for t in times):
    raise ValueError(
      f"influence: times is {times}, expected one or more of 0 to {length - 1}."
    )
  if probes is not None and probes < 2:
    raise ValueError(
      f"influence: probes is {probes}, expected 2 or more, without which there"
      " is no error bar, or None for the exact norm."
    )
  key = jax.random.key(0) if key is None else key
  each = width if probes is None else probes
  jobs = [(k, i) for k in range(len(times)) for i in range(each)]
  batches = [jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)]
  shape = (len(times), *x.shape[:2])
  mean, scatter = np.zeros(shape), np.zeros(shape)
  function = _as_pytree(function)
  for batch in batches if progress is None else progress(batches):
    # The last one is filled up: one program for all.
    full = batch + batch[-1:] * (batch_size - len(batch))
    t = np.asarray([times[k] for k, _ in full], np.int32)
    which = np.asarray([i for _, i in full], np.int32)
    norms = _pull_back(function, x, t, which, key, probes is None)
    norms = np.asarray(norms, np.float64)
    for (k, i), squared in zip(batch, norms**2, strict=False):
      # Welford: the sums of squares of squares need not cancel.
      change = squared - mean[k]
      mean[k] += change / (i + 1)
      scatter[k] += change * (squared - mean[k])
  if probes is None:
    squared, error = mean * width, np.zeros(shape)
  else:
    squared, error = mean, np.sqrt(scatter / (probes * (probes - 1)))
  return Influence(np.asarray(times), squared, error, probes)


@gathered
def influence_memory(
  function: Callable[[Array], Array],
  x: Any,
  *,
  batch_size: int = 1,
) -> int:
  """Tell the bytes that one batch of probes takes, without running it.

  The program of `influence` is compiled and its `memory_analysis()` read:
  arguments, results and temporary buffers together.

  Args:
    function: as in `influence`; the arrays of a `Partial` may be
      `jax.ShapeDtypeStruct`s, as `jax.eval_shape` gives them.
    x: as in `influence`, or a `jax.ShapeDtypeStruct`.
    batch_size: pull-backs at once.

  Returns:
    Bytes on the default backend.

  Raises:
    ValueError: as in `influence`.
    NotImplementedError: the backend does not tell.
  """
  _check(function, x, batch_size)
  index = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
  key = jax.eval_shape(jax.random.key, 0)
  lowered = _pull_back.lower(_as_pytree(function), x, index, index, key, False)
  memory = lowered.compile().memory_analysis()
  if memory is None:
    raise NotImplementedError(
      f"influence_memory: {jax.default_backend()} does not tell the memory of"
      " its programs. Ask under jax.default_device(jax.devices('cpu')[0])."
    )
  return int(
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes
  )


@functools.partial(jax.jit, static_argnames=("exact",))
def _pull_back(function, x, times, which, key, exact):
  """‖vᵀ ∂yₜ/∂xₛ‖ of each seed v, `[n, B, T]`."""
  y, pull = jax.vjp(function, x)
  batch, _, width = y.shape

  def one(t, i):
    if exact:
      seed = jnp.broadcast_to(jnp.arange(width) == i, (batch, width))
    else:
      # Each row its own signs, so that rows err independently.
      own = jax.random.fold_in(jax.random.fold_in(key, t), i)
      seed = jax.random.rademacher(own, (batch, width), y.dtype)
    seeds = jnp.zeros_like(y).at[:, t].set(seed.astype(y.dtype))
    return norm(pull(seeds)[0])

  if len(times) == 1:
    return one(times[0], which[0])[None]
  return jax.vmap(one)(times, which)


def _as_pytree(function):
  if isinstance(function, jax.tree_util.Partial):
    return function
  return jax.tree_util.Partial(function)


def _check(function, x, batch_size):
  """Raise ValueError for what does not fit; D."""
  if len(x.shape) != 3 or 0 in x.shape:
    raise ValueError(
      f"influence: x has shape {tuple(x.shape)}, expected (B, T, M)."
    )
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      f"influence: x has dtype {x.dtype}, expected a real floating type:"
      " embeddings, not tokens."
    )
  if batch_size < 1:
    raise ValueError(
      f"influence: batch_size is {batch_size}, expected 1 or more."
    )
  y = jax.eval_shape(lambda f, x: f(x), _as_pytree(function), x)
  shape = getattr(y, "shape", None)
  if shape is None or len(shape) != 3 or shape[:2] != tuple(x.shape[:2]):
    raise ValueError(
      f"influence: the function gives {y}, expected one array of shape"
      f" (B={x.shape[0]}, T={x.shape[1]}, D)."
    )
  if not jnp.issubdtype(y.dtype, jnp.floating):
    raise ValueError(
      f"influence: the function gives dtype {y.dtype}, expected a real"
      " floating type."
    )
  return shape[-1]
