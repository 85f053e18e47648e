"""The state of a training, as one rank has it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launcher.runs.hang_guard import HangGuard
from launcher.runs.journal import Journal
from launcher.runs.run_dir import RunDir
from launcher.stages.jobs import TrainJob
from launcher.training.background import Background
from launcher.training.best_model import BestLoss
from launcher.training.block_graphs import BlockGraphs
from launcher.training.checkpoint_flight import CheckpointFlight
from launcher.training.collectives import host_sum
from launcher.training.engine_steps import block_loss
from launcher.training.loader import StageStream
from launcher.training.throughput import Meter
from mmcot.models.loss import Objective, count_units


@dataclasses.dataclass
class TrainingState:
    """The state of the loop; ``last_checkpoint`` is the step of the last committed checkpoint."""

    job: TrainJob
    rank: int
    world_size: int
    engine: Any
    tokenizer: Any
    streams: dict[str, StageStream]
    num_val_steps: int
    steps_per_epoch: int
    facts: dict[str, Any]
    probe: np.ndarray
    store: Any
    journal: Journal | None
    last_checkpoint: int
    meter: Meter
    hang_guard: HangGuard
    objective: Objective
    best: BestLoss
    graphs: BlockGraphs | None
    flight: CheckpointFlight | None = None
    store_is_away: bool = False  # whether the store has not taken the last checkpoint
    late_upload: Background[Any] | None = None  # of this rank, of a checkpoint that was given up

    @property
    def run_dir(self) -> RunDir:
        """The run's folder."""
        return RunDir(Path(self.job.run_dir))

    @property
    def checkpoints(self) -> Path:
        """The folder of the stage's checkpoints."""
        return self.run_dir.checkpoints(self.job.stage)

    def may_commit(self) -> None:
        """Raise RunError if a later attempt owns the run."""
        self.run_dir.check_attempt(self.job.attempt)

    @property
    def is_ready(self) -> bool:
        """Whether this rank has done its part of the present phase of the checkpoint in flight."""
        return self.flight is not None and self.flight.is_ready

    def new_flight(self, step: int) -> CheckpointFlight:
        """A checkpoint of ``step`` that is not begun yet; every rank calls it.

        Without the store at least two are kept on disk. While a rank still waits for the store it is not asked again.
        """
        keep = self.job.settings.training.keep_checkpoints
        (num_late,) = host_sum([float(self.late_upload is not None and not self.late_upload.is_done)])
        return CheckpointFlight(
            self.checkpoints,
            step=step,
            store=None if num_late else self.store,
            keep=max(keep, 2) if self.store_is_away else keep,
            may_commit=self.may_commit,
            best_folder=self.run_dir.best_model(self.job.stage),
        )

    def note(self, step: int, metrics: dict[str, float]) -> None:
        """Record metrics, on rank 0."""
        if self.journal:
            self.journal.log(step, metrics)

    def tell(self, step: int, text: str) -> None:
        """Record a sentence for the user, on rank 0."""
        if self.journal:
            self.journal.note(step, text)


def probe_loss(this: TrainingState) -> float:
    """Loss per token on a fixed batch, the same on every rank: the plan's first block."""
    this.engine.eval()
    block = this.streams["train"].samples.load_block(this.probe)
    with torch.no_grad():
        parts = block_loss(this.engine, block, this.objective).values()
    counts = count_units(block.tensors)
    return sum(part.item() / max(1.0, counts[unit]) for part, unit in parts)
