"""Finding, verifying and loading a training's checkpoint (written by ``launcher/training/checkpoint.py``).

DeepSpeed's files are pickles: they are loaded only from a run's own folder, after every sha256 has matched on every
rank. A rank reads the files that it loads once, into memory (``launcher/training/held_files.py``), and its share of the
others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_shards.atomic_files import commit_bytes, commit_folder, commit_json
from data_shards.json_shapes import fault_of_shape, read_record
from data_shards.sealed_json import broken_seal
from launcher.runs.checkpoint_names import (
    CHECKPOINT,
    LATEST,
    MANIFEST,
    STATE,
    CheckpointError,
    as_latest,
    checkpoints_by_step,
    latest_checkpoint,
    step_of,
)
from launcher.stages.jobs import IDENTITY_FACTS
from launcher.training.checkpoint_files import damage_of, gather, hash_share
from launcher.training.checkpoint_writer import HostCopies
from launcher.training.collectives import agreed
from launcher.training.held_files import HeldFiles

_UNIVERSAL = "universal"
# Relative. Reduction order alone moves a loss by about 1e-6 in fp32; bf16 rounds at 4e-3.
PROBE_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


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
            damage = damage_of(path / STATE, manifest["files"], held=held if same_world else None)
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
    tag = _UNIVERSAL if found.is_universal else STATE
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
    if not missing:
        return []
    return [
        f"{path} was written by an earlier version, which did not record {', '.join(missing)}: they could not be "
        "compared; the next checkpoint has them"
    ]


def _latest(folder: Path) -> str | None:
    """The name in LATEST; the newest folder's name if LATEST names a missing one.

    Raises:
        CheckpointError: LATEST names one, and none is there.
    """
    path = latest_checkpoint(folder)
    if path is None or path.exists():
        return path.name if path else None
    newest = next(reversed(checkpoints_by_step(folder)), None)
    if newest is None:
        raise CheckpointError(
            f"{folder / LATEST} names {path.name}, and {folder} holds no checkpoint; restore it, or delete "
            f"{folder / LATEST} to start from the beginning"
        )
    return newest.name


def _read_manifest(path: Path) -> tuple[dict[str, Any], str | None]:
    try:
        manifest = read_record(path / MANIFEST, dict, remedy="restore it")
    except (OSError, ValueError) as error:
        return {}, f"{error}"
    if reason := broken_seal(manifest):
        return {}, f"{MANIFEST}: {reason}"
    if (fault := fault_of_shape(manifest, CHECKPOINT)) is not None:
        return {}, f"{MANIFEST}: {fault}"
    if manifest.get("step") != step_of(path.name):
        return {}, f"{MANIFEST} is of step {manifest.get('step')!r}"
    return manifest, None


def _files_of_universal(path: Path) -> dict[str, Any] | None:
    """The files of a converted checkpoint; None where they are not known, so that it is converted again."""
    try:
        return read_record(path, {str: dict})
    except (OSError, ValueError):
        return None


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
    files = agreed(lambda: _files_of_universal(manifest_path))
    if files is not None and damage_of(path / _UNIVERSAL, files) is None:
        return
    notes.append(f"{path} is converted to another number of workers")

    if dist.get_rank() == 0:
        staging = path / f".staging-{_UNIVERSAL}"
        shutil.rmtree(staging, ignore_errors=True)
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        command += [
            "--input_folder",
            str(path / STATE),
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
    files = gather(hash_share(path / _UNIVERSAL, dist.get_rank(), dist.get_world_size()))
    if dist.get_rank() == 0:
        commit_json(manifest_path, files)
    dist.barrier()
