"""A checkpoint from its copy to its end, while the training goes on.

    copying      the training stops while every rank copies its state to main memory
    writing      a thread of every rank writes and hashes its files
    committing   all ranks: the checkpoint is renamed to its name, LATEST is moved
    uploading    a thread of every rank copies its share to the object store, where there is one
    publishing   a thread of rank 0 puts the manifest, then LATEST, there

After writing, uploading and publishing a rank is ready. A sum over the ranks tells all of them, at the same step, that
all are, and they go to the next phase together (``advance``). A kill in any phase leaves the checkpoint before. A store
that refuses or does not answer ends the flight, with the checkpoint on disk; the next one tries again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_shards.atomic_files import read_json
from data_shards.errors import ShardError
from launcher.runs.checkpoint_names import MANIFEST, CheckpointError, latest_checkpoint, name_of
from launcher.training.background import Background
from launcher.training.best_model import BestLoss, describe_best, link_best
from launcher.training.checkpoint import PendingCheckpoint, begin_checkpoint, commit_checkpoint
from launcher.training.checkpoint_store import publish_checkpoint, upload_share
from launcher.training.collectives import gather_json


class CheckpointFlight:
    """A checkpoint that is not whole yet; there is one at a time.

    Args:
        folder: of the stage's checkpoints.
        store: the stage's folder in the object store, or None.
        keep: number of newest checkpoints to keep.
        may_commit: raises on rank 0 if this process no longer owns the run.
        best_folder: of the best model.

    Attributes:
        is_committed: whether it is on disk, so that a training resumes from it.
        is_done: whether it is also in the store, or was given up there.
        store_failure: why the store has not taken it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        step: int,
        store: str | None,
        keep: int,
        may_commit: Callable[[], None],
        best_folder: Path,
    ) -> None:
        self.step, self.is_committed, self.is_done = step, False, False
        self.store_failure: str | None = None
        self._folder, self._store, self._keep, self._may_commit = folder, store, keep, may_commit
        self._best_folder = best_folder
        self._pending: PendingCheckpoint | None = None
        self._task: Background[Any] | None = None  # of this rank, in the present phase
        self._best: Path | None = None  # links to the best model's files, on rank 0
        self._advance: Callable[[], None] = self._commit

    def begin(self, engine: Any, *, facts: dict[str, Any], best: BestLoss) -> None:
        """Copy the state and begin to write it; every rank calls it.

        Args:
            facts: of the manifest (``begin_checkpoint``).
            best: which model the best is.

        Raises:
            CheckpointError: the disk is full, or could not be written to.
        """
        pending = begin_checkpoint(engine, self._folder, step=self.step, facts=facts, may_commit=self._may_commit)
        if self._link_best(pending.staging, best):
            pending.more_facts = Background(self._describe_best, name="checkpoint-best")
        self._pending = pending

    def upload(self, best: BestLoss) -> None:
        """Begin to copy a committed checkpoint to the store, which a kill kept from it; every rank calls it."""
        self.is_committed = True
        if dist.get_rank() == 0:
            for stale in self._folder.glob(".staging-*"):  # as after the kill
                shutil.rmtree(stale, ignore_errors=True)
        self._link_best(self._folder / ".staging-upload", best)
        self._begin_upload()

    @property
    def is_stored(self) -> bool:
        """Whether the store has it."""
        return self.is_done and self._store is not None and self.store_failure is None

    @property
    def is_ready(self) -> bool:
        """Whether this rank's part of the present phase is done."""
        parts = [self._pending is None or self._pending.is_written, self._task is None or self._task.is_done]
        return all(parts)

    def wait(self) -> None:
        """Wait until this rank's part of the present phase is done."""
        if self._pending is not None:
            self._pending.wait()
        if self._task is not None:
            self._task.wait()

    def advance(self) -> None:
        """Wait for the end of the present phase on all ranks, and begin the next; every rank calls it.

        Raises:
            CheckpointError: the disk is full, or could not be written to; the last checkpoint is kept.
            RunError: another run writes to the store.
        """
        self._advance()

    def give_up_store(self, reason: str) -> Background[Any] | None:
        """Leave the checkpoint on disk alone; every rank calls it. Returns what this rank is still doing there."""
        self.store_failure, self.is_done = reason, True
        return self._task

    def _commit(self) -> None:
        assert self._pending is not None
        commit_checkpoint(self._pending, keep=self._keep, may_commit=self._may_commit)
        self._pending, self.is_committed = None, True
        if self._store is None:
            self._end()
        else:
            self._begin_upload()

    def _begin_upload(self) -> None:
        path, store, best = self._folder / name_of(self.step), self._store, self._best
        rank, world_size = dist.get_rank(), dist.get_world_size()
        assert store is not None
        # A daemon: nobody publishes what a process copies after its training has failed.
        self._task = Background(
            lambda: upload_share(path, store, rank=rank, world_size=world_size, best=best),
            name="checkpoint-upload",
            daemon=True,
        )
        self._advance = self._begin_to_publish

    def _begin_to_publish(self) -> None:
        if self._store_has_failed():
            return
        path, store, keep, may_commit = self._folder / name_of(self.step), self._store, self._keep, self._may_commit
        assert store is not None
        if dist.get_rank() == 0:
            self._task = Background(
                lambda: publish_checkpoint(path, store, keep=keep, may_commit=may_commit),
                name="checkpoint-publish",
                daemon=True,
            )
        self._advance = self._end

    def _end(self) -> None:
        if self._store_has_failed():
            return
        if self._best is not None:
            shutil.rmtree(self._best, ignore_errors=True)
        self.is_done = True

    def _store_has_failed(self) -> bool:
        """End the flight on every rank where the store has refused a rank's part of this phase.

        Raises:
            Exception: on every rank, what else kept one of them from its part.
        """
        own: BaseException | None = None
        if (task := self._task) is not None:
            self._task = None
            try:
                task.result()
            except Exception as error:
                own = error
        failures = gather_json(None if own is None else [isinstance(own, ShardError), f"{own}"])
        found = [each for each in failures if each is not None]
        if own is not None and not isinstance(own, ShardError):
            raise own
        if others := [text for is_of_store, text in found if not is_of_store]:
            raise CheckpointError(others[0])
        if found:
            self.give_up_store(found[0][1])
        return bool(found)

    def _link_best(self, staging: Path, best: BestLoss) -> bool:
        """Keep the best model's files until they are copied, on rank 0; whether there are any."""
        if self._store is None or dist.get_rank() != 0 or not best.step:
            return False
        self._best = staging.with_name(f"{staging.name}-best")
        if not link_best(self._best_folder, self._best, best):
            self._best = None
        return self._best is not None

    def _describe_best(self) -> dict[str, Any]:
        assert self._best is not None
        last = latest_checkpoint(self._folder)
        known = read_json(last / MANIFEST).get("best") if last is not None and (last / MANIFEST).exists() else None
        return {"best": describe_best(self._best, known)}
