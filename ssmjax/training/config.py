"""What a run is told and what it came to."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from ssmjax.training import sharding, step
from ssmjax.types import Positive, Range, Seed, Size, check_fields

# hook(step, models): `models()` gives the seeds' models as they stand.
Hook = Callable[[int, Callable[[], tuple[Any, ...]]], None]


@dataclasses.dataclass(frozen=True)
class FitConfig:
  """What a run does, apart from model, loss, optimizer and data.

  All intervals count steps from 0. Their multiples are the grid on which
  dispatches end and on which alone the run saves, evaluates and stops; best
  they are multiples of `steps_per_dispatch`, since a cell that is shorter goes
  step by step.

  When a run goes on, `steps` may be more, and `log_every`, `evaluate_every`,
  `save_every`, `keep`, `minutes`, `progress` and `tensorboard` others. The
  steps that follow are the same to the bit where all intervals, old and new,
  are multiples of `steps_per_dispatch`; else equal but for rounding. A schedule
  belongs to the optimizer: one that was made for fewer steps keeps its last
  rate, one that is made anew for more steps gives other rates from there on.

  Attributes:
    steps: all steps of the run.
    seeds: one run per seed, trained at once (parameters, data and RNG each
      its own), with one line per seed in the metrics.
    steps_per_dispatch: steps in one call of the device, by `lax.scan`; more
      than 1 pays where a step takes less than some 10 ms.
    microbatches: parts of each device's batch computed one after another.
    strategy: "shard_map", or "pmap" for those who come from there.
    log_every: steps between two lines of metrics.
    evaluate_every: steps between two evaluations; None only at the end.
    save_every: steps between two checkpoints.
    keep: how many of the latest checkpoints to keep, at least 2.
    best: the metric of `evaluate` (mean over seeds) by which the best
      checkpoint is kept, whenever it improves.
    best_mode: whether "max" or "min" is better.
    stop_above: stops early once `best` is above this for every seed at one
      evaluation; several seeds therefore all train on until the slowest passes.
    minutes: stops in time to have saved after so many minutes; None for never.
    progress: say what the run does (parameters, devices, data, when it
      compiles) and show a bar (tqdm) or lines; False for neither.
    tensorboard: write events for TensorBoard into the run's folder, too; needs
      tensorboardX.
  """

  steps: Size
  seeds: tuple[Seed, ...] = (0,)
  steps_per_dispatch: Size = 1
  microbatches: Size = 1
  strategy: sharding.Strategy = "shard_map"
  log_every: Size = 100
  evaluate_every: Size | None = None
  save_every: Size = 1000
  keep: Annotated[int, Range(least=2)] = 2
  best: str | None = None
  best_mode: Literal["max", "min"] = "max"
  stop_above: float | None = None
  minutes: Positive | None = None
  progress: bool = True
  tensorboard: bool = False

  def __post_init__(self):
    check_fields(self)
    if not len(set(self.seeds)) == len(self.seeds) > 0:
      raise ValueError(
        f"FitConfig: seeds are {self.seeds}, expected one or more, distinct."
      )
    if self.stop_above is not None and self.best is None:
      raise ValueError(
        "FitConfig: stop_above needs best, the metric that it looks at."
      )

  def identity(self) -> dict:
    """Gives the fields that a folder records, JSON-able."""
    fields = dataclasses.asdict(self)
    for name in ("keep", "minutes", "progress", "tensorboard"):
      del fields[name]
    return fields

  # Fields of `identity` that may be others when a run goes on.
  MAY_CHANGE: ClassVar = ("steps", "log_every", "evaluate_every", "save_every")

  def grid(self) -> tuple[int, ...]:
    """Gives the intervals whose multiples are boundaries."""
    intervals = (self.steps_per_dispatch, self.log_every, self.save_every)
    return (*intervals, self.evaluate_every or self.steps)


@dataclasses.dataclass(frozen=True)
class FitResult:
  """What a run came to.

  Attributes:
    models: one per seed, with the parameters after the last step.
    step: steps done.
    finished: whether the run is over; if not, the same call goes on.
    reason: "finished", "stopped early", "minutes", "sigint" or
      "sigterm".
    metrics: per seed, the last evaluation's metrics (empty without one).
    state: the train state.
  """

  models: tuple[Any, ...]
  step: int
  finished: bool
  reason: str
  metrics: tuple[dict[str, float], ...]
  state: step.TrainState

  @property
  def model(self) -> Any:
    """The first seed's model."""
    return self.models[0]
