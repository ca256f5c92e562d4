"""`fit`: a run that can be killed at any moment and goes on exactly."""

import pathlib
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from ssmjax.training import sharding, sources, step
from ssmjax.training.checkpoints import Checkpoints
from ssmjax.training.config import FitConfig, FitResult, Hook
from ssmjax.training.determinism import ensure_deterministic
from ssmjax.training.fingerprint import fingerprint
from ssmjax.training.folder import RunFolder, StopRequest
from ssmjax.training.loading import (
  abstract_state,
  keep_description,
  unstacked,
  with_sharding,
)
from ssmjax.training.metrics import Sums, check_names
from ssmjax.training.report import Report


def fit(
  init: Callable[[int], Any],
  loss: step.Loss,
  optimizer: optax.GradientTransformation,
  data: Any,
  config: FitConfig,
  directory: str | pathlib.Path,
  *,
  settings: dict | None = None,
  evaluate: Callable[[Any, int], dict[str, float]] | None = None,
  hooks: Sequence[Hook] = (),
  on_metrics: Callable[[dict[str, Any]], None] | None = None,
  mesh: Mesh | None = None,
) -> FitResult:
  """Trains, or goes on with the training that the folder holds.

  The end of a run does not depend on how often it was stopped or killed: the
  parameters are the same to the bit and so are the metrics, but for the fields
  in `metrics.WALL_CLOCK`, on the same kind and number of devices and the same
  versions. On a GPU this needs `ensure_deterministic()` before JAX starts; the
  call sees to it if it is itself the first to use JAX.

  Args:
    init: from a seed to a model: an `nnx.Module` with float32 `nnx.Param`s.
    loss: `loss(model, batch, key) -> (loss_sum, weight, metric_sums)`, all sums
      over the examples it is given, see `gradient`.
    optimizer: an optax transformation, see `adamw`.
    data: a `Stream`, or an iterator of dicts of numpy arrays with `get_state`
      and `set_state` (all seeds then see the same batches).
    config: see `FitConfig`.
    directory: the run's folder.
    settings: JSON-able, what identifies the run beyond `config` (model, data,
      learning rate); a folder with other settings is refused.
    evaluate: `evaluate(model, step)` gives metrics of one seed's model, whose
      arrays are replicated over the mesh.
    hooks: called as `hook(step, models)` at every boundary of the grid.
    on_metrics: is given every line of metrics as a dict, in order, once it is
      written: `{"step", "event": "train" | "evaluate", "seed", <metric>:
      float, or None where it is not finite}`. Process 0 alone calls it. A run
      that goes on gives the lines after its checkpoint again, and none before.
      What it raises ends the run, as what a hook raises does.
    mesh: has an axis "data", over which batches are divided; by default the
      mesh of `jax.set_mesh`, or all devices, of every process.

  A run that goes on warns where its step computes something else than before,
  for another loss, learning rate or model under the same `settings` (not with
  strategy "pmap", and not on other devices or versions).

  SIGTERM or Ctrl-C stops the run at the next boundary, saved; a second Ctrl-C
  stops it at once.

  Returns:
    A `FitResult`. If the folder's run is over, at once.

  Raises:
    ValueError: the folder belongs to another configuration, a batch does not
      divide among devices and microbatches, a metric has the name of a field
      that every line has, or the loss's total weight is below 0. (A step whose
      total weight is 0 has a gradient of 0.)
    SaveError: the disk is full, or writing failed for another reason. What had
      been written is whole, and the same call goes on from there.
    NonFiniteError: loss, its total weight or gradient is not finite.

  Example, a regression by least squares on four numbers::

    class Data:                      # a Stream
      def kind(self, step):
        return 32                    # the batch size

      def batch(self, kind, step, seed):
        key = jax.random.fold_in(jax.random.key(seed), step)
        x = jax.random.normal(key, (kind, 4))
        return {"x": x, "y": x.sum(axis=1, keepdims=True)}

    def loss(model, batch, key):
      error = (model(batch["x"]) - batch["y"]) ** 2
      return error.sum(), error.size, {}

    result = fit(
      init=lambda seed: nnx.Linear(4, 1, rngs=nnx.Rngs(seed)),
      loss=loss,
      optimizer=adamw(1e-2, weight_decay=0.0),
      data=Data(),
      config=FitConfig(steps=1000, steps_per_dispatch=50, seeds=(0, 1)),
      directory="runs/regression",
    )
    result.models[1].kernel          # of seed 1
  """
  ensure_deterministic()  # still in time where JAX has not started
  if mesh is None:
    mesh = sharding.context_mesh() or sharding.data_mesh()
  sharding.check_mesh(mesh)
  if config.best is not None and evaluate is None:
    raise ValueError(
      f"fit: FitConfig.best is {config.best!r}, which needs evaluate=."
    )
  return _Run(
    init,
    loss,
    optimizer,
    data,
    config,
    directory,
    settings,
    evaluate,
    on_metrics,
    mesh,
  ).fit(hooks)


class _Run:
  """One call of `fit`."""

  def __init__(
    self,
    init,
    loss,
    optimizer,
    data,
    config,
    directory,
    settings,
    evaluate,
    on_metrics,
    mesh,
  ):
    self._on_metrics = on_metrics
    self._config, self._evaluate, self._mesh = config, evaluate, mesh
    self._init, self._loss, self._optimizer = init, loss, optimizer
    self._source = sources.source_of(data)
    self._directory = pathlib.Path(directory).absolute()
    self._settings = settings or {}
    self._programs: dict = {}
    self._digests: dict[str, str] = {}
    self._evaluated: list[dict] = []
    self._best: float | None = None
    self._over: str | None = None

  def fit(self, hooks: Sequence[Hook]) -> FitResult:
    config = self._config
    self._graphdef, abstract = abstract_state(
      self._init, self._optimizer, config.seeds
    )
    parameters = sum(x.size for x in jax.tree.leaves(abstract.params))
    identity = {
      "settings": self._settings,
      "fit": config.identity(),
      "parameters": parameters,
    }
    free = tuple(f"fit.{name}" for name in FitConfig.MAY_CHANGE)
    with (
      RunFolder(self._directory, identity, self._mesh, free) as folder,
      StopRequest(config.minutes) as stop,
    ):
      self._folder = folder
      if jax.process_index() == 0:
        keep_description(self._directory, self._graphdef, abstract.params)
      self._checkpoints = Checkpoints(
        self._directory,
        config=folder.identity,
        keep=config.keep,
        best_mode=config.best_mode,
        may_change=free,
      )
      try:
        self._restore(abstract)
        if self._over is None:
          self._train(hooks, stop, abstract)
      finally:
        self._checkpoints.close()
    return FitResult(
      models=self._models(),
      step=self._step,
      finished=self._over in ("finished", "stopped early"),
      reason=self._over or "",
      metrics=tuple(self._evaluated),
      state=self._state,
    )

  def _restore(self, abstract: step.TrainState) -> None:
    """Takes up the newest checkpoint, or starts."""
    shardings = sharding.state_sharding(abstract, self._mesh)
    self._step, self._sums = 0, Sums()
    if self._checkpoints.latest is None:
      _, state = step.init_state(
        self._init, self._optimizer, self._config.seeds
      )
      # A fresh copy: device_put may share buffers, and ours will be donated.
      copy = jax.jit(
        lambda x: jax.tree.map(jnp.copy, x), out_shardings=shardings
      )
      self._state = copy(state)
      return
    abstract = with_sharding(abstract, shardings)
    self._state, progress = self._checkpoints.restore(abstract)
    self._step = progress["step"]
    self._sums = Sums(progress["sums"])
    self._best = progress["best"]
    self._over = progress["over"]
    self._check_steps()
    programs = progress.get("programs", {})  # earlier versions kept none
    if programs.get("environment") == self._folder.environment:
      self._digests = programs["digests"]
    self._evaluated = progress["evaluated"]
    self._source.restore(progress["cursor"])

  def _check_steps(self) -> None:
    """Lets a finished run go on to more steps; raises if all are done."""
    done, asked = self._step, self._config.steps
    if self._over == "finished" and asked > done:
      self._over = None
    if asked < done or (asked == done and self._over is None):
      raise ValueError(
        f"fit: FitConfig.steps is {asked}, and the run in {self._directory} "
        f"has done {done} steps. Ask for more steps, or take its models by "
        "training.load."
      )

  def _train(
    self, hooks: Sequence[Hook], stop: StopRequest, abstract: step.TrainState
  ) -> None:
    config = self._config
    self._report = Report(
      self._directory,
      config,
      self._source,
      self._checkpoints,
      step=self._step,
      sums=self._sums,
      on_metrics=self._on_metrics,
    )
    self._report.begin(abstract, self._mesh)
    if not self._folder.exact:
      self._report.say(
        "This GPU run is not exact: call ssmjax.training.ensure_deterministic()"
        " before JAX starts."
      )
    if self._step:
      self._report.say(f"Going on after step {self._step}.")
    try:
      while self._over is None:
        self._cell(stop)
        self._boundary(hooks, stop)
      self._checkpoints.wait()
      if self._over in ("minutes", "sigint", "sigterm"):
        self._report.say(
          f"Stopped ({self._over}) and saved after step {self._step} of "
          f"{config.steps}. To go on, run the same command again."
        )
    finally:
      self._report.close()

  def _cell(self, stop: StopRequest) -> None:
    """Dispatches the steps up to the next boundary."""
    end = self._next()
    size = self._config.steps_per_dispatch
    compiled = len(self._programs)
    with stop.timed("cell") as timing:
      for run in self._source.runs(self._step, end, size):
        batches = run.batches
        if batches:
          sharding.check_batch(
            jax.tree.map(lambda x: x[0], batches),
            self._mesh.shape[sharding.AXIS] // jax.process_count(),
            self._config.microbatches,
          )
          batches = sharding.place(batches, self._mesh, self._config.strategy)
        program = self._programs.get((run.kind, run.steps))
        if program is None:
          with self._report.compiling(run):
            program = self._program(run)
            self._compare(run, program, batches)
            self._state, metrics = program(self._state, batches)
        else:
          self._state, metrics = program(self._state, batches)
        self._report.add(run, metrics)
      if len(self._programs) > compiled:
        timing.name = "compile"
    self._step = end

  def _boundary(self, hooks: Sequence[Hook], stop: StopRequest) -> None:
    """Does what is due after `self._step` steps."""
    self._checkpoints.check()
    config = self._config
    last = self._step == config.steps
    if self._step % config.log_every == 0 or last:
      self._report.line_due(self._step)
    save = last or self._step % config.save_every == 0
    score = None
    if self._evaluate is not None and (
      last or self._step % (config.evaluate_every or config.steps) == 0
    ):
      with stop.timed("evaluate"):
        self._report.drain()
        with self._report.clock_stopped():
          score, improved, passed = self._evaluation()
      save |= improved
      if passed:
        self._over = "stopped early"
        self._report.rest(self._step)
    for hook in hooks:
      hook(self._step, self._models)
    if last:
      self._over = self._over or "finished"
    reason = None if self._over else self._interrupted(stop)
    if save or self._over or reason:
      self._save(score)
    self._over = self._over or reason

  def _interrupted(self, stop: StopRequest) -> str | None:
    """Asks whether to stop here, given what comes before the next boundary."""
    next_end = self._next()
    size = self._config.steps_per_dispatch
    needed = self._source.programs(self._step, next_end, size)
    due = ["cell"]
    due += ["compile"] * len(needed - self._programs.keys())
    every = self._config.evaluate_every or self._config.steps
    if self._evaluate is not None and next_end % every == 0:
      due.append("evaluate")
    # Before the first save: as if it wrote 100 MB/s.
    size = sum(x.nbytes for x in jax.tree.leaves(self._state))
    return stop.reason(due, self._checkpoints.save_seconds or size / 1e8)

  def _evaluation(self) -> tuple[float | None, bool, bool]:
    """Evaluates all seeds: (score, is it the best, may we stop)."""
    config = self._config
    assert self._evaluate is not None
    self._evaluated = []
    for model in self._models():
      found = self._evaluate(model, self._step)
      check_names("evaluate", found)
      self._evaluated.append({n: float(value) for n, value in found.items()})
    self._report.evaluated(self._step, self._evaluated)
    if config.best is None:
      return None, False, False
    missing = [m for m in self._evaluated if config.best not in m]
    if missing:
      raise ValueError(
        f"fit: evaluate gave {sorted(missing[0])}, without the metric "
        f"{config.best!r} that FitConfig.best names."
      )
    scores = [metrics[config.best] for metrics in self._evaluated]
    score = float(np.mean(scores))
    sign = 1.0 if config.best_mode == "max" else -1.0
    improved = not np.isnan(score) and (
      self._best is None or sign * score > sign * self._best
    )
    if improved:
      self._best = score
    limit = config.stop_above
    return score, improved, limit is not None and all(s > limit for s in scores)

  def _save(self, score: float | None) -> None:
    self._report.drain()
    progress = {
      "step": self._step,
      "sums": self._report.sums.to_json(),
      "best": self._best,
      "over": self._over,
      "evaluated": self._evaluated,
      "cursor": self._source.cursor(),
      "programs": {
        "environment": self._folder.environment,
        "digests": self._digests,
      },
    }
    with self._report.clock_stopped():
      self._report.sync()
      self._checkpoints.save(self._step, self._state, progress, best=score)

  def _program(self, run: sources.Run):
    config = self._config
    program = sharding.parallel(
      step.make_program(
        self._loss,
        self._optimizer,
        self._graphdef,
        steps=run.steps,
        seeds=config.seeds,
        microbatches=config.microbatches,
        axis=sharding.AXIS,
        devices=self._mesh.shape[sharding.AXIS],
        stream=self._source.stream,
        kind=run.kind,
      ),
      self._mesh,
      config.strategy,
    )
    self._programs[run.kind, run.steps] = program
    return program

  def _compare(self, run: sources.Run, program, batches) -> None:
    """Warns if the step computes something else than in the run so far."""
    if not hasattr(program, "trace"):  # pmap's
      return
    # The call that follows finds this trace again and does not repeat it.
    digest = fingerprint(program.trace(self._state, batches).jaxpr)
    # By what decides a program; the address of an object in a kind does not.
    name = f"{run.steps} × {re.sub('0x[0-9a-f]+', '', repr(run.kind))}"
    known = self._digests.get(name, digest)
    if known != digest:
      self._digests = {}  # of other programs: they have changed as well
      warnings.warn(
        f"fit: the step computes something else than in the run so far, in "
        f"{self._directory}, which goes on after step {self._step}. The "
        "loss, the learning rate or its schedule, another number of the "
        "optimizer, the model's or the stream's code, or a setting of JAX may "
        "have changed. If that was not meant, change it back or choose another "
        "folder; settings= refuses a folder of another run.",
        stacklevel=6,
      )
    self._digests[name] = digest

  def _next(self) -> int:
    config = self._config
    return sources.next_boundary(self._step, config.steps, config.grid())

  def _models(self) -> tuple[Any, ...]:
    return unstacked(
      self._graphdef, self._state.params, len(self._config.seeds)
    )
