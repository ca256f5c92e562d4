"""Training: one step, one loop, and checkpoints that resume exactly."""

from ssmjax.training.checkpoints import Checkpoints, CheckpointWarning
from ssmjax.training.config import FitConfig, FitResult, Hook
from ssmjax.training.determinism import ensure_deterministic
from ssmjax.training.files import SaveError
from ssmjax.training.loading import load
from ssmjax.training.loop import fit
from ssmjax.training.metrics import WALL_CLOCK, read_metrics
from ssmjax.training.optimizers import (
  adamw,
  decay_mask,
  epoch_cosine,
  warmup_cosine,
)
from ssmjax.training.report import NonFiniteError
from ssmjax.training.sharding import Strategy, data_mesh, parallel
from ssmjax.training.step import (
  Loss,
  Stream,
  TrainState,
  gradient,
  init_state,
  make_program,
)

__all__ = [
  "WALL_CLOCK",
  "CheckpointWarning",
  "Checkpoints",
  "FitConfig",
  "FitResult",
  "Hook",
  "Loss",
  "NonFiniteError",
  "SaveError",
  "Strategy",
  "Stream",
  "TrainState",
  "adamw",
  "data_mesh",
  "decay_mask",
  "ensure_deterministic",
  "epoch_cosine",
  "fit",
  "gradient",
  "init_state",
  "load",
  "make_program",
  "parallel",
  "read_metrics",
  "warmup_cosine",
]
