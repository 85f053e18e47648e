"""Training checkpoints: written by all ranks, committed as one folder.

    rationale/checkpoints/step-000400/state/...      what DeepSpeed writes, a file a rank
    rationale/checkpoints/step-000400/manifest.json   step, world size, plan, probe loss, sha256 of every file
    rationale/checkpoints/step-000400/universal/...   the same for any world size, made when one is needed
    rationale/checkpoints/LATEST                      "step-000400", last

Every rank copies its state to main memory, and writes and hashes its files in a thread while the training goes on
(``launcher/training/checkpoint_writer.py``), into a staging folder. When all are written, rank 0
writes the manifest, renames the folder and moves LATEST. DeepSpeed's files are pickles:
they are loaded only from a run's own folder, after every sha256 has matched on every rank. A rank reads the files that
it loads once, into memory (``launcher/training/held_files.py``), and its share of the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from data_shards.atomic_files import (
    commit_bytes,
    commit_folder,
    commit_json,
    read_json,
    sha256_of_file,
)
from launcher.runs.checkpoint_names import (
    LATEST,
    MANIFEST,
    CheckpointError,
    as_latest,
    checkpoints_by_step,
    latest_checkpoint,
    name_of,
    step_of,
)
from launcher.stages.jobs import HANDED_OVER, IDENTITY_FACTS
from launcher.training.background import Background
from launcher.training.checkpoint_writer import FileWriter, HostCopies
from launcher.training.collectives import broadcast_json, gather_json
from launcher.training.held_files import HeldFiles
from launcher.training.host_memory import may_hold

_STATE, _UNIVERSAL = "state", "universal"
# Relative. Reduction order alone moves a loss by about 1e-6 in fp32; bf16 rounds at 4e-3.
PROBE_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
# DeepSpeed's files: without a rank in its name, every rank loads one, else that rank alone.
_STATES_FILE = re.compile(r"(?:bf16_)?(?:zero_pp_rank_(\d+)_)?mp_rank_\d+_(?:model|optim)_states\.pt")


@dataclasses.dataclass(frozen=True)
class VerifiedCheckpoint:
    """A verified checkpoint, and why newer ones were renamed and not used.

    Attributes:
        held: the files that this rank loads; ``load_state`` frees their memory.
    """

    path: Path
    manifest: dict[str, Any]
    is_universal: bool
    notes: list[str]
    held: HeldFiles

    @property
    def step(self) -> int:
        """Optimizer steps done when it was saved."""
        return self.manifest["step"]


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
        copies.reserve(lambda: engine.save_checkpoint(folder, tag=_STATE, save_latest=False))


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
        (staging / _STATE).mkdir(parents=True)
    dist.barrier()
    try:
        engine.save_checkpoint(str(staging), tag=_STATE, save_latest=False)
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
    own = {str(path.relative_to(staging / _STATE)): file for path, file in written.items()}
    files = _gather(_hash_share(staging / _STATE, dist.get_rank(), dist.get_world_size(), known=_gather(own)))
    if dist.get_rank() == 0:
        may_commit()
        manifest = {"schema_version": 1, "step": step, **facts, "files": files}
        try:
            commit_json(staging / MANIFEST, manifest)
            commit_folder(staging, folder / name_of(step))
            commit_bytes(folder / LATEST, as_latest(name_of(step)))
        except OSError as error:
            raise write_error(f"the checkpoint of step {step}", error, folder) from error
        checkpoints = checkpoints_by_step(folder)
        kept = [path for path in checkpoints if step_of(path.name) <= step][-keep:]  # later ones are made again
        for old in (path for path in checkpoints if path not in kept):
            shutil.rmtree(old)
    dist.barrier()


def find_checkpoint(
    folder: Path, *, facts: dict[str, Any], may_commit: Callable[[], None]
) -> VerifiedCheckpoint | None:
    """Verify the newest checkpoint, or the newest before one that is damaged; every rank calls it.

    A damaged checkpoint is renamed to ``damaged-step-N``. One of another world size is converted, once.

    Raises:
        CheckpointError: all are damaged, or one was written with other facts.
    """
    notes: list[str] = []
    rank = dist.get_rank()
    while (name := agreed(lambda: _latest(folder))) is not None:
        path = folder / name
        manifest, damage = agreed(lambda path=path: _read_manifest(path))
        held = HeldFiles()
        if damage is None:
            same_world = manifest.get("world_size") == facts["world_size"]
            damage = _damage(path / _STATE, manifest["files"], held=held if same_world else None)
        if damage is None:
            _check_facts(path, manifest, facts)
            notes += _unknown_facts(path, manifest, facts)
            is_universal = manifest["world_size"] != facts["world_size"] and manifest["zero_stage"] > 0
            if is_universal and facts["nvme"]:
                raise CheckpointError(
                    f"{path} was written by {manifest['world_size']} workers; with offload=nvme a training cannot "
                    f"resume from it with {facts['world_size']}"
                )
            if is_universal:
                _convert(path, notes)
            return VerifiedCheckpoint(path, manifest, is_universal, notes, held)
        held.clear()
        notes.append(
            f"{path} is damaged ({damage}); it is kept as {path.with_name('damaged-' + path.name).name}, "
            "the one before is used"
        )
        if rank == 0:
            may_commit()
            _rename_damaged(folder, path)
        dist.barrier()
    if notes:
        raise CheckpointError(
            f"{folder} holds no checkpoint that is whole: {'; '.join(notes)}; "
            "restore one, or delete the folder to start from the beginning"
        )
    return None


def load_state(engine: Any, found: VerifiedCheckpoint) -> None:
    """Load a checkpoint into an engine that was built for it; every rank calls it."""
    tag = _UNIVERSAL if found.is_universal else _STATE
    adam = getattr(engine.optimizer, "optimizer", engine.optimizer)
    settings = [{name: group[name] for name in ("weight_decay", "lr_ratio")} for group in adam.param_groups]
    copies = engine.checkpoint_engine
    with copies.holding(found.held) if isinstance(copies, HostCopies) else contextlib.nullcontext():
        loaded, _ = engine.load_checkpoint(str(found.path), tag=tag)
    if loaded is None:
        raise CheckpointError(f"{found.path}: DeepSpeed found nothing to load in {found.path / tag}")
    for state in adam.state.values():  # torch's optimizers keep what they are given, here views of the held files
        state.update({name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)})
    found.held.clear()
    if found.is_universal:
        # ZeRO-3 takes every group's settings from the first group, and lets all groups share one step counter, which
        # each group then advances.
        for group, own in zip(adam.param_groups, settings, strict=True):
            group.update(own)
        for state in adam.state.values():
            if "step" in state:
                state["step"] = torch.full_like(state["step"], found.step)


def check_probe(path: Path, *, expected: float, found: float, precision: str) -> None:
    """Compare the probe batch's loss after a load with the one stored at the save."""
    if not abs(found - expected) <= PROBE_TOLERANCE[precision] * max(1.0, abs(expected)):  # NaN fails too
        raise CheckpointError(
            f"{path}: the probe batch's loss is {found:.6f} after loading and was {expected:.6f} when saved; "
            "the weights are not those that were saved"
        )


def _check_facts(path: Path, manifest: dict[str, Any], facts: dict[str, Any]) -> None:
    reasons = {
        "zero_stage": " (stages keep different parts of the state)",
        "precision": " (fp32 weights are stored differently)",
        "run_id": " (it belongs to another run)",
        "settings_fingerprint": " (settings that results depend on)",
        "data_fingerprint": " (texts, features and tokenizer)",
        "rationales_fingerprint": " (the rationales that this stage reads)",
    }
    restored = {
        "run_id": "restore the checkpoints of this run",
        "data_fingerprint": "restore the data it was written with",
        "rationales_fingerprint": "restore the rationales it was written with",
    }
    for key, value in facts.items():
        is_unknown = key in IDENTITY_FACTS and key not in manifest
        if key != "world_size" and not is_unknown and manifest.get(key) != value:
            raise CheckpointError(
                f"{path} was written with {key} = {manifest.get(key)!r}, now it is {value!r}{reasons.get(key, '')}; "
                f"{restored.get(key, 'resume with the settings it was written with')}, or start another run.dir"
            )


def _unknown_facts(path: Path, manifest: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    """A note on a checkpoint of an earlier version, which does not name its run."""
    missing = [key for key in IDENTITY_FACTS if key in facts and key not in manifest]
    if not missing or HANDED_OVER in manifest:
        return []
    return [
        f"{path} was written by an earlier version, which did not record {', '.join(missing)}: they could not be "
        "compared; the next checkpoint has them"
    ]


def _latest(folder: Path) -> str | None:
    """The name in LATEST; the newest folder's name if LATEST names a missing one."""
    path = latest_checkpoint(folder)
    if path is not None and not path.exists():
        path = next(reversed(checkpoints_by_step(folder)), None)
    return path.name if path else None


def _read_manifest(path: Path) -> tuple[dict[str, Any], str | None]:
    try:
        return read_json(path / MANIFEST), None
    except (OSError, ValueError) as error:
        return {}, f"{error}"


def _damage(folder: Path, expected: dict[str, Any], *, held: HeldFiles | None = None) -> str | None:
    """What is wrong with the files of a folder, or None, the same on every rank.

    Each rank reads a share of the files. With ``held`` it reads those that it loads as well, and keeps them in
    memory; where there is no room for them, DeepSpeed reads them again.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    names = _names(folder)
    kept = [[name for name in names if held is not None and _is_loaded_by(name, each)] for each in range(world_size)]
    rest = [name for name in names if not any(name in each for each in kept)]
    contents, mine = held or HeldFiles(), kept[rank] + rest[rank::world_size]
    hold = may_hold(sum((folder / name).stat().st_size for name in kept[rank]))
    num_threads = max(1, min(len(mine), torch.get_num_threads()))
    with ThreadPoolExecutor(num_threads) as pool:
        read = list(pool.map(lambda name: contents.read(folder / name, hold=hold and name in kept[rank]), mine))
    parts = gather_json(dict(zip(mine, read, strict=True)))
    altered = {name for part in parts for name, file in part.items() if file != expected.get(name)}
    if wrong := min(altered | (expected.keys() ^ set(names)), default=None):
        return f"{wrong} is missing or altered or was added"
    return None


def _is_loaded_by(name: str, rank: int) -> bool:
    """Whether DeepSpeed loads this file in a rank of a group of the size that wrote it."""
    match = _STATES_FILE.fullmatch(name)
    return match is not None and match[1] in (None, str(rank))


def _rename_damaged(folder: Path, path: Path) -> None:
    target = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(target, ignore_errors=True)
    path.rename(target)
    older = next(reversed(checkpoints_by_step(folder)), None)
    if older is None:
        (folder / LATEST).unlink(missing_ok=True)
    else:
        commit_bytes(folder / LATEST, as_latest(older.name))


def _convert(path: Path, notes: list[str]) -> None:
    """Make ``path/universal``, DeepSpeed's form for any world size, unless it exists."""
    manifest_path = path / f"{_UNIVERSAL}.json"
    files = agreed(lambda: read_json(manifest_path) if manifest_path.exists() else None)
    if files is not None and _damage(path / _UNIVERSAL, files) is None:
        return
    notes.append(f"{path} is converted to another number of workers")

    if dist.get_rank() == 0:
        staging = path / f".staging-{_UNIVERSAL}"
        shutil.rmtree(staging, ignore_errors=True)
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        command += [
            "--input_folder",
            str(path / _STATE),
            "--output_folder",
            str(staging),
            "--num_extract_workers",
            "1",
            "--num_merge_workers",
            "1",
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise CheckpointError(
                f"{path} could not be converted to another number of workers:\n{result.stderr[-2000:]}"
            )
        manifest_path.unlink(missing_ok=True)
        commit_folder(staging, path / _UNIVERSAL)
    dist.barrier()
    files = _gather(_hash_share(path / _UNIVERSAL, dist.get_rank(), dist.get_world_size()))
    if dist.get_rank() == 0:
        commit_json(manifest_path, files)
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


def agreed(compute: Callable[[], Any]) -> Any:
    """Rank 0's result of ``compute``, a JSON value, on every rank."""
    return broadcast_json(compute() if dist.get_rank() == 0 else None)


def _hash_share(
    folder: Path, rank: int, world_size: int, *, known: Mapping[str, dict[str, Any]] = MappingProxyType({})
) -> dict[str, dict[str, Any]]:
    """Hash every ``world_size``-th file that is not ``known``; all ranks use rank 0's listing."""
    names = _names(folder)
    return {
        name: known[name]
        if name in known
        else {"size_bytes": (folder / name).stat().st_size, "sha256": sha256_of_file(folder / name)}
        for name in names[rank::world_size]
    }


def _names(folder: Path) -> list[str]:
    """Rank 0's listing of the files in a folder."""
    return agreed(lambda: sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))


def _gather(share: dict[str, Any]) -> dict[str, Any]:
    return {name: value for part in gather_json(share) for name, value in sorted(part.items())}
