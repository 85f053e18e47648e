"""Training checkpoints: written by all ranks, committed as one folder.

    rationale/checkpoints/step-000400/state/...     what DeepSpeed writes, a file a rank
    rationale/checkpoints/step-000400/manifest.json  step, world size, plan, probe loss, sha256 of every file
    rationale/checkpoints/LATEST                     "step-000400", last

Every rank writes into a staging folder and hashes its share; after a barrier rank 0
writes the manifest, renames the folder and moves LATEST. DeepSpeed's files are pickles:
they are loaded only from a run's own folder, after every sha256 has matched.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_shards.storage import commit_bytes, commit_folder, commit_json, read_json, sha256_of_file

_TAG = "state"
# Relative. Reduction order alone moves a loss by about 1e-6 in fp32; bf16 rounds at 4e-3.
PROBE_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message names its folder."""


def save_checkpoint(
    engine: Any, folder: Path, *, step: int, facts: dict[str, Any], keep: int, may_commit: Callable[[], None]
) -> None:
    """Commit the state after ``step`` optimizer steps; every rank calls it.

    Args:
        facts: what must agree at a resume, such as plan_fingerprint, world_size, zero_stage.
        keep: newest checkpoints that stay.
        may_commit: raises on rank 0 if this process no longer owns the run.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    staging = folder / f".staging-{step:06d}"
    if rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(staging), tag=_TAG, save_latest=False)
    dist.barrier()
    files = _gather(_hash_share(staging, rank, world_size))
    if rank == 0:
        may_commit()
        commit_json(staging / "manifest.json", {"schema_version": 1, "step": step, **facts, "files": files})
        commit_folder(staging, folder / f"step-{step:06d}")
        commit_bytes(folder / "LATEST", f"step-{step:06d}\n".encode())
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def latest_checkpoint(folder: Path) -> Path | None:
    """The folder LATEST names, or None before the first checkpoint."""
    latest = folder / "LATEST"
    if not latest.exists():
        return None
    path = folder / latest.read_text().strip()
    if not (path / "manifest.json").exists():
        raise CheckpointError(f"{latest} names {path.name}, which is not there; write the name of another step-N into it")
    return path


def load_checkpoint(engine: Any, path: Path, *, facts: dict[str, Any]) -> dict[str, Any]:
    """Verify and load a checkpoint; every rank calls it. Returns its manifest.

    Raises:
        CheckpointError: a file is missing or altered, or a fact is another.
    """
    manifest = read_json(path / "manifest.json")
    for key, value in facts.items():
        if manifest.get(key) != value:
            raise CheckpointError(
                f"{path} was written with {key} = {manifest.get(key)!r}, now it is {value!r}; "
                "go on with the settings it was written with, or start another run.dir"
            )
    found = _gather(_hash_share(path, dist.get_rank(), dist.get_world_size()))
    for name in sorted({*manifest["files"], *found}):
        if found.get(name) != (expected := manifest["files"].get(name)):
            raise CheckpointError(
                f"{path / name} is missing or altered or was added (expected {expected}, found {found.get(name)}); "
                f"restore it, or write the name of an older step-N into {path.parent / 'LATEST'}"
            )
    loaded, _ = engine.load_checkpoint(str(path), tag=_TAG)
    if loaded is None:
        raise CheckpointError(f"{path}: DeepSpeed found nothing to load in {path / _TAG}")
    return manifest


def check_probe(path: Path, *, expected: float, found: float, precision: str) -> None:
    """Compare the probe batch's loss after a load with the one stored at the save."""
    if not abs(found - expected) <= PROBE_TOLERANCE[precision] * max(1.0, abs(expected)):  # NaN fails too
        raise CheckpointError(
            f"{path}: the probe batch's loss is {found:.6f} after loading and was {expected:.6f} when saved; "
            "the weights are not those that were saved"
        )


def _hash_share(folder: Path, rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    """Hash every ``world_size``-th file; all ranks go by the first rank's listing."""
    listing = [sorted(str(path.relative_to(folder)) for path in (folder / _TAG).rglob("*") if path.is_file())]
    dist.broadcast_object_list(listing, src=0)
    paths = {name: folder / name for name in listing[0][rank::world_size]}
    return {
        name: {"size_bytes": path.stat().st_size, "sha256": sha256_of_file(path)} for name, path in paths.items()
    }


def _gather(share: dict[str, Any]) -> dict[str, Any]:
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, share)
    return {name: value for part in shares for name, value in sorted(part.items())}
