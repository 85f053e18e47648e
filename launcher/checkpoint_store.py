"""Checkpoints in an object store: a copy of each, from which a machine that starts empty goes on.

    s3://bucket/folder/<run>-<fingerprint of its settings>/<stage>/step-000400/manifest.json, state/...
    s3://bucket/folder/<run>-<fingerprint of its settings>/<stage>/LATEST

Every rank copies a share of the files; after a barrier rank 0 puts the manifest, then
LATEST, so that a half-copied checkpoint is never one. What was copied is verified by the
manifest's sha256 like any other when it is loaded.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from data_shards.remote import fetch_file, list_names, put_bytes, put_file, read_file, remove_folder
from data_shards.storage import commit_bytes, commit_folder, read_json
from launcher.checkpoint import CheckpointError, agreed, latest_checkpoint, step_of
from launcher.run_dir import settings_fingerprint
from launcher.settings import Settings


def checkpoint_store(settings: Settings, stage: str) -> str | None:
    """Where a stage's checkpoints are copied to; None where no store is set. Other settings, another place."""
    if settings.training.checkpoint_url is None:
        return None
    return f"{settings.training.checkpoint_url.rstrip('/')}/{settings.run.name}-{settings_fingerprint(settings)}/{stage}"


def upload_checkpoint(folder: Path, url: str, *, step: int, keep: int) -> None:
    """Copy the committed checkpoint of ``step`` to ``url``; every rank calls it.

    Raises:
        ShardError: the store did not take it; the local one stands.
    """
    name = f"step-{step:06d}"
    path, rank = folder / name, dist.get_rank()
    files = agreed(lambda: sorted(read_json(path / "manifest.json")["files"]))
    for file in files[rank :: dist.get_world_size()]:
        put_file(path / "state" / file, f"{url}/{name}/state/{file}")
    dist.barrier()
    if rank == 0:
        put_file(path / "manifest.json", f"{url}/{name}/manifest.json")
        put_bytes(f"{name}\n".encode(), f"{url}/LATEST")
        for old in sorted((other for other in list_names(url) if other.startswith("step-")), key=step_of)[:-keep]:
            remove_folder(f"{url}/{old}")
    dist.barrier()


def fetch_checkpoint(url: str, folder: Path, *, may_commit: Callable[[], None]) -> None:
    """Bring the store's latest checkpoint here if it is newer than the local one; every rank calls it."""
    name = agreed(lambda: _newer(url, folder))
    if name is None:
        return
    staging, rank = folder / f".staging-{name}", dist.get_rank()
    if rank == 0:
        may_commit()
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        fetch_file(f"{url}/{name}/manifest.json", staging / "manifest.json")
    dist.barrier()
    files = agreed(lambda: sorted(read_json(staging / "manifest.json")["files"]))
    if strange := [file for file in files if ".." in Path(file).parts or Path(file).is_absolute()]:
        raise CheckpointError(f"{url}/{name} names files outside its folder, such as {strange[0]!r}; it is not used")
    for file in files[rank :: dist.get_world_size()]:
        fetch_file(f"{url}/{name}/state/{file}", staging / "state" / file)
    dist.barrier()
    if rank == 0:
        commit_folder(staging, folder / name)
        commit_bytes(folder / "LATEST", f"{name}\n".encode())
    dist.barrier()


def _newer(url: str, folder: Path) -> str | None:
    try:
        name = read_file(f"{url}/LATEST").decode().strip()
    except FileNotFoundError:
        return None
    if not re.fullmatch(r"step-\d+", name):
        raise CheckpointError(f"{url}/LATEST holds {name!r}, expected such as step-000400; write one of the checkpoints there into it")
    local = latest_checkpoint(folder)
    return name if local is None or step_of(name) > step_of(local.name) else None
