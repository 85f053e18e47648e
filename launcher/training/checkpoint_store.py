"""Checkpoints in an object store: a copy of each, from which a machine with an empty disk resumes.

    s3://bucket/folder/<run>-<settings>-<data>/run.json                              which run writes here
    s3://bucket/folder/<run>-<settings>-<data>/rationale/step-000400/manifest.json, state/...
    s3://bucket/folder/<run>-<settings>-<data>/rationale/best-000320-<content>/...   the best model of a manifest
    s3://bucket/folder/<run>-<settings>-<data>/rationale/LATEST
    s3://bucket/folder/<run>-<settings>-<data>/answer-<rationales>/...               trained on these rationales

``<settings>``, ``<data>`` and ``<rationales>`` are fingerprints (``launcher/training/identity.py``). Every
rank copies a share of the files behind the training (``launcher/training/checkpoint_flight.py``); when all have,
rank 0 puts the manifest, then LATEST, so that a half-copied checkpoint is never used. A fetched checkpoint is
verified by the manifest's sha256 when it is loaded, like any other, and the best model when it is fetched.

Earlier versions wrote into ``<run>-<settings>/<stage>`` and did not record the data. Such a checkpoint is
fetched only by the run folder that wrote it: a folder that still holds one of these checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_shards.atomic_files import commit_bytes, commit_folder, read_json
from data_shards.errors import ShardError
from data_shards.json_shapes import read_record
from data_shards.remote_files import (
    fetch_file,
    list_names,
    put_bytes,
    put_file,
    read_file,
    remove_folder,
)
from launcher.config.settings import Settings
from launcher.runs.checkpoint_names import (
    LATEST,
    MANIFEST,
    CheckpointError,
    as_latest,
    checkpoints_by_step,
    latest_checkpoint,
    names_by_step,
    read_latest,
    step_of,
)
from launcher.stages.jobs import IDENTITY_FACTS
from launcher.training.background import Background
from launcher.training.collectives import agreed
from launcher.training.identity import another_run, check_writer, store_root

ANSWER_S = 60.0  # for the store's first answer
_BEST = re.compile(r"best-\d+-[0-9a-f]{16}")


def checkpoint_store(settings: Settings, stage: str, facts: Mapping[str, Any]) -> str | None:
    """Where a stage's checkpoints are copied to, by its settings, data and rationales; None where no store is set."""
    root = store_root(settings, facts)
    if root is None:
        return None
    rationales = facts.get("rationales_fingerprint")
    return f"{root}/{stage}-{rationales}" if rationales else f"{root}/{stage}"


def upload_share(path: Path, url: str, *, rank: int, world_size: int, best: Path | None = None) -> None:
    """Copy a rank's share of a committed checkpoint's files to ``url``; rank 0 also copies a new best model.

    Args:
        best: the files of the best model that the checkpoint's manifest names.

    Raises:
        ShardError: the store refused it; the local checkpoint is kept.
        RunError: another run writes there.
    """
    manifest = read_json(path / MANIFEST)
    check_writer(url.rpartition("/")[0], manifest.get("run_id"))
    for file in sorted(manifest["files"])[rank::world_size]:
        put_file(path / "state" / file, f"{url}/{path.name}/state/{file}")
    described = manifest.get("best")
    if rank == 0 and best is not None and described is not None and _best_of_latest(url) != described["folder"]:
        for file in described["files"]:
            put_file(best / file, f"{url}/{described['folder']}/{file}")


def publish_checkpoint(path: Path, url: str, *, keep: int, may_commit: Callable[[], None]) -> None:
    """Let the store's LATEST name a checkpoint that all ranks have copied, and remove old ones; rank 0 calls it.

    Args:
        keep: number of newest checkpoints to keep.
        may_commit: raises if this process no longer owns the run.

    Raises:
        ShardError: the store refused it; the local checkpoint is kept.
        RunError: another run writes there.
    """
    check_writer(url.rpartition("/")[0], read_json(path / MANIFEST).get("run_id"))
    may_commit()
    put_file(path / MANIFEST, f"{url}/{path.name}/{MANIFEST}")
    may_commit()
    put_bytes(as_latest(path.name), f"{url}/{LATEST}")
    names = list_names(url)
    # Copies that a kill has cut short have no manifest; those of later steps are made again.
    checkpoints = names_by_step(names)
    own = step_of(path.name)
    whole = [name for name in checkpoints if step_of(name) <= own and MANIFEST in list_names(f"{url}/{name}")]
    kept = whole[-keep:]
    needed = {_best_in(url, name) for name in kept}
    unneeded_best = [name for name in names if _BEST.fullmatch(name) and name not in needed]
    may_commit()
    for old in [name for name in checkpoints if name not in kept] + unneeded_best:
        remove_folder(f"{url}/{old}")


def why_silent(url: str) -> str | None:
    """Why the store does not answer, or None; rank 0 asks."""
    asked = Background(lambda: _latest(url), name="store", daemon=True)
    asked.wait(ANSWER_S)
    if not asked.is_done:
        return f"the object store {url} gave no answer in {ANSWER_S:.0f} s"
    try:
        asked.result()
    except ShardError as error:
        return str(error)
    except CheckpointError:  # it answers; who reads it reports that
        return None
    return None


def is_behind(url: str, step: int) -> bool:
    """Whether the store has no checkpoint of this step or a later one, as after a kill before its end."""
    name = _latest(url)
    return name is None or step_of(name) < step


def fetch_best(url: str, best: Mapping[str, Any], folder: Path, *, may_commit: Callable[[], None]) -> None:
    """Fetch the best model that a checkpoint's manifest names, and verify it; rank 0 calls it.

    Args:
        best: the manifest's ``best``.

    Raises:
        CheckpointError: a file is not the one that was copied, or lies elsewhere.
        FileNotFoundError: the store does not have it.
        ShardError: the store cannot be read.
    """
    if not _BEST.fullmatch(str(best["folder"])):
        raise CheckpointError(
            f"a manifest names {best['folder']!r} as the best model, expected such as best-000120-..."
        )
    place, staging = f"{url}/{best['folder']}", folder.with_name(".staging-best")
    _check_inside(place, best["files"])
    shutil.rmtree(staging, ignore_errors=True)
    for file, expected in best["files"].items():
        if (found := fetch_file(f"{place}/{file}", staging / file)) != expected["sha256"]:
            raise CheckpointError(
                f"{place}/{file} is not the file that was copied: its sha256 is {found[:12]}..., expected "
                f"{expected['sha256'][:12]}..."
            )
    may_commit()
    commit_folder(staging, folder)


def fetch_checkpoint(
    url: str, folder: Path, *, may_commit: Callable[[], None], facts: Mapping[str, Any] | None = None
) -> None:
    """Fetch the store's latest checkpoint if it is newer than the local one; every rank calls it.

    Args:
        facts: of the run that the checkpoints must belong to (``launcher/training/identity.py``).

    Raises:
        CheckpointError: it belongs to another run, or names files outside its folder.
    """
    name = agreed(lambda: _newer(url, folder))
    if name is None:
        return
    staging, rank = folder / f".staging-{name}", dist.get_rank()
    if rank == 0:
        may_commit()
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        fetch_file(f"{url}/{name}/manifest.json", staging / MANIFEST)
    dist.barrier()
    remedy = f"remove {url}/{name} from the store"
    manifest = agreed(lambda: read_record(staging / MANIFEST, {"files": {str: dict}}, remedy=remedy))
    _check_owner(url, name, manifest, facts or {})
    files = sorted(manifest["files"])
    _check_inside(f"{url}/{name}", files)
    for file in files[rank :: dist.get_world_size()]:
        fetch_file(f"{url}/{name}/state/{file}", staging / "state" / file)
    dist.barrier()
    if rank == 0:
        commit_folder(staging, folder / name)
        commit_bytes(folder / LATEST, as_latest(name))
    dist.barrier()


def fetch_latest(
    settings: Settings, stage: str, folder: Path, *, facts: Mapping[str, Any], may_commit: Callable[[], None]
) -> list[str]:
    """Fetch a stage's latest checkpoint from its store; every rank calls it.

    If the store has none, search the folders of an earlier version. Their checkpoints may belong to another run,
    trained on other data, so they are fetched only if ``folder`` holds one of them.

    Returns:
        A sentence for each folder of an earlier version that was found and not used.
    """
    base, url = settings.training.checkpoint_url, checkpoint_store(settings, stage, facts)
    if base is None or url is None:
        return []
    own, others = agreed(lambda: _older_stores(base.rstrip("/"), settings.run.name, stage, url, folder))
    for place in [*own, url]:
        fetch_checkpoint(place, folder, facts=facts, may_commit=may_commit)
    return [
        f"{place} holds checkpoints of an earlier version, which did not record their data; they are not used. If they "
        f"are of this run and its data, copy the folder to {url} before the start"
        for place in others
    ]


def _older_stores(base: str, run_name: str, stage: str, url: str, folder: Path) -> list[list[str]]:
    """An earlier version's folders for this name and stage: those this run's own folder wrote, and newer others."""
    if list_names(url):
        return [[], []]
    own: list[str] = []
    others: list[str] = []
    for name in list_names(base):
        place = f"{base}/{name}/{stage}"
        if re.fullmatch(re.escape(run_name) + "-[0-9a-f]{16}", name) and _newer(place, folder):
            (own if _wrote(folder, place) else others).append(place)
    return [own, others]


def _wrote(folder: Path, place: str) -> bool:
    """Whether ``place`` has a local checkpoint of an earlier version: the same manifest, every sha256 included."""
    for path in checkpoints_by_step(folder):
        with contextlib.suppress(FileNotFoundError, ValueError):
            manifest = json.loads(read_file(f"{place}/{path.name}/{MANIFEST}"))
            if "run_id" not in manifest and manifest == read_json(path / MANIFEST):
                return True
    return False


def _check_owner(url: str, name: str, manifest: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Refuse another run's checkpoint before it is copied; facts that an earlier version did not record pass."""
    for key in IDENTITY_FACTS:
        if key not in facts or manifest.get(key, facts[key]) == facts[key]:
            continue
        if key == "run_id":
            raise CheckpointError(another_run(url.rpartition("/")[0], manifest[key], facts[key]))
        raise CheckpointError(
            f"{url}/{name} was written with {key} = {manifest[key]!r}, now it is {facts[key]!r}; it is not used: "
            "remove it from the store"
        )


def _check_inside(place: str, files: Iterable[str]) -> None:
    """Refuse a manifest that names files outside its folder."""
    if strange := [file for file in files if ".." in Path(file).parts or Path(file).is_absolute()]:
        raise CheckpointError(f"{place} names files outside its folder, such as {strange[0]!r}; it is not used")


def _newer(url: str, folder: Path) -> str | None:
    name, local = _latest(url), latest_checkpoint(folder)
    is_needed = name is not None and (local is None or not local.exists() or step_of(name) > step_of(local.name))
    return name if is_needed else None


def _latest(url: str) -> str | None:
    """The checkpoint that a store's LATEST names; None where there is none."""
    try:
        return read_latest(read_file(f"{url}/{LATEST}").decode(), source=f"{url}/{LATEST}")
    except FileNotFoundError:
        return None


def _best_of_latest(url: str) -> str | None:
    """The folder of the best model of the store's latest checkpoint: it is whole, because the manifest came later."""
    name = _latest(url)
    return None if name is None else _best_in(url, name)


def _best_in(url: str, name: str) -> str | None:
    """The folder of the best model that a checkpoint's manifest names."""
    try:
        return (json.loads(read_file(f"{url}/{name}/{MANIFEST}")).get("best") or {}).get("folder")
    except (FileNotFoundError, ValueError):  # a copy that was interrupted or altered: nobody can resume from it
        return None
