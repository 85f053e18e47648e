"""Checkpoints in an object store: a copy of each, from which a machine that starts empty goes on.

    s3://bucket/folder/<run>/<stage>/step-000400/manifest.json, state/...
    s3://bucket/folder/<run>/<stage>/LATEST

Every rank copies a share of the files; after a barrier rank 0 puts the manifest, then
LATEST, so that a half-copied checkpoint is never one. What was copied is verified by the
manifest's sha256 like any other when it is loaded.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch.distributed as dist

from data_shards.remote import fetch_file, list_names, put_bytes, put_file, read_file, remove_folder
from data_shards.storage import commit_bytes, commit_folder, read_json
from launcher.checkpoint import agreed, latest_checkpoint


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
        for old in [other for other in list_names(url) if other.startswith("step-")][:-keep]:
            remove_folder(f"{url}/{old}")
    dist.barrier()


def fetch_checkpoint(url: str, folder: Path) -> None:
    """Bring the store's latest checkpoint here if it is newer than the local one; every rank calls it."""
    name = agreed(lambda: _newer(url, folder))
    if name is None:
        return
    staging, rank = folder / f".staging-{name}", dist.get_rank()
    if rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        fetch_file(f"{url}/{name}/manifest.json", staging / "manifest.json")
    dist.barrier()
    files = agreed(lambda: sorted(read_json(staging / "manifest.json")["files"]))
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
    local = latest_checkpoint(folder)
    return name if local is None or name > local.name else None
