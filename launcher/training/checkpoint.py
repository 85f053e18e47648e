"""Training checkpoints: written by all ranks, committed as one folder.

    rationale/checkpoints/step-000400/state/...      what DeepSpeed writes, a file a rank
    rationale/checkpoints/step-000400/manifest.json   step, world size, plan, probe loss, sha256 of every file
    rationale/checkpoints/step-000400/universal/...   the same for any world size, made when one is needed
    rationale/checkpoints/LATEST                      "step-000400", last

Every rank copies its state to main memory, and writes and hashes its files in a thread while the training goes on
(``launcher/training/checkpoint_writer.py``), into a staging folder. When all are written, rank 0
writes the manifest, renames the folder and moves LATEST. ``launcher/training/checkpoint_resume.py`` finds, verifies and
loads them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_shards.atomic_files import commit_bytes, commit_folder
from data_shards.sealed_json import commit_sealed
from launcher.runs.checkpoint_names import (
    LATEST,
    MANIFEST,
    STATE,
    CheckpointError,
    as_latest,
    checkpoints_by_step,
    latest_checkpoint,
    name_of,
    step_of,
)
from launcher.training.background import Background
from launcher.training.checkpoint_files import gather, hash_share
from launcher.training.checkpoint_writer import FileWriter, HostCopies
from launcher.training.collectives import agreed, gather_json


@dataclasses.dataclass
class PendingCheckpoint:
    """A checkpoint whose files are being written.

    Attributes:
        more_facts: facts that are computed meanwhile, on rank 0.
    """

    folder: Path
    step: int
    facts: dict[str, Any]
    staging: Path
    writer: FileWriter
    more_facts: Background[dict[str, Any]] | None = None

    @property
    def is_written(self) -> bool:
        """Whether this rank's part is done, so that ``commit_checkpoint`` need not wait for it."""
        return self.writer.is_done and (self.more_facts is None or self.more_facts.is_done)

    def wait(self) -> None:
        """Wait until this rank's part is done."""
        self.writer.wait()
        if self.more_facts is not None:
            self.more_facts.wait()


def reserve_memory(engine: Any) -> None:
    """Get the memory for the copies of a first checkpoint in a thread; every rank calls it after an optimizer step."""
    copies = engine.checkpoint_engine
    if not isinstance(copies, HostCopies) or engine.zero_nvme_offload_optimizer():  # it would copy files at once
        return
    with tempfile.TemporaryDirectory(prefix="mmcot-") as folder:
        copies.reserve(lambda: engine.save_checkpoint(folder, tag=STATE, save_latest=False))


def begin_checkpoint(
    engine: Any, folder: Path, *, step: int, facts: dict[str, Any], may_commit: Callable[[], None]
) -> PendingCheckpoint:
    """Copy the state after ``step`` optimizer steps and begin to write it; every rank calls it.

    Args:
        facts: what a resume compares, such as plan_fingerprint, world_size, zero_stage, and the run it belongs to
            (``launcher/training/identity.py``).
        may_commit: raises on rank 0 if this process no longer owns the run.

    Raises:
        CheckpointError: the disk is full, or could not be written to; the last checkpoint is kept.
    """
    # A name of its own: a process of an earlier attempt may still be writing its files.
    staging = folder / agreed(lambda: f".staging-{step:06d}-{secrets.token_hex(4)}")
    if dist.get_rank() == 0:
        may_commit()
        for stale in folder.glob(".staging-*"):
            shutil.rmtree(stale, ignore_errors=True)
        (staging / STATE).mkdir(parents=True)
    dist.barrier()
    try:
        engine.save_checkpoint(str(staging), tag=STATE, save_latest=False)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError when a disk is full
        raise write_error(f"the checkpoint of step {step}", error, folder) from error
    copies = engine.checkpoint_engine
    writer = copies.write() if isinstance(copies, HostCopies) else FileWriter([])
    return PendingCheckpoint(folder, step, dict(facts), staging, writer)


def commit_checkpoint(pending: PendingCheckpoint, *, keep: int, may_commit: Callable[[], None]) -> None:
    """Wait until every rank has written its files, and commit the checkpoint; every rank calls it.

    Args:
        keep: number of newest checkpoints to keep.
        may_commit: raises on rank 0 if this process no longer owns the run.

    Raises:
        CheckpointError: the disk is full, or could not be written to; the last checkpoint is kept.
    """
    folder, step, staging = pending.folder, pending.step, pending.staging
    written, facts, failure = {}, dict(pending.facts), None
    try:
        written = pending.writer.result()
        if pending.more_facts is not None:
            facts |= pending.more_facts.result()
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    failures = gather_json(failure)
    if found := next((each for each in failures if each is not None), None):
        if dist.get_rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)  # a full disk has some room again
        raise write_error(f"the checkpoint of step {step}", found, folder)
    own = {str(path.relative_to(staging / STATE)): file for path, file in written.items()}
    files = gather(hash_share(staging / STATE, dist.get_rank(), dist.get_world_size(), known=gather(own)))
    if dist.get_rank() == 0:
        may_commit()
        manifest = {"schema_version": 1, "step": step, **facts, "files": files}
        try:
            commit_sealed(staging / MANIFEST, manifest)
            commit_folder(staging, folder / name_of(step))
            may_commit()  # a stop of this process may have lasted, and a later attempt gone on from here
            commit_bytes(folder / LATEST, as_latest(name_of(step)))
        except OSError as error:
            raise write_error(f"the checkpoint of step {step}", error, folder) from error
        may_commit()
        checkpoints = checkpoints_by_step(folder)
        kept = [path for path in checkpoints if step_of(path.name) <= step][-keep:]  # later ones are made again
        for old in (path for path in checkpoints if path not in kept):
            shutil.rmtree(old)
    dist.barrier()


def write_error(what: str, error: Exception | str, folder: Path) -> CheckpointError:
    """An error that tells what could not be written, the free space, and which checkpoint of the folder is kept."""
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(place).free / 1e9
    latest = latest_checkpoint(folder)
    return CheckpointError(
        f"{what} could not be written to {folder} ({free:.2f} GB free): {error}; "
        + (
            f"{latest.name} is kept: free disk space and run again"
            if latest
            else "there is none yet: free disk space and run again"
        )
    )


@contextlib.contextmanager
def full_disk_explained(folder: Path) -> Iterator[None]:
    """Raise a CheckpointError where the disk gets full in the block, as when a journal is written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise write_error("the journal of the training", error, folder) from error
