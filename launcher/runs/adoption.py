"""Continuing a run: in its folder, in a folder that was moved, or in a copy, which becomes a run of its own first.

A folder holds its mark (``launcher/runs/places.py``). One with another device or inode was moved if its old place no
longer holds the run, else it is a copy. Inodes change where a folder is moved to another file system or restored.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable
from pathlib import Path

from data_shards.atomic_files import commit_bytes
from data_shards.json_shapes import read_record
from data_shards.sealed_json import broken_seal, commit_sealed
from launcher.runs.checkpoint_names import MANIFEST
from launcher.runs.places import read_mark, renew_mark
from launcher.runs.run_dir import RunDir, RunError


def copied_from(run_dir: RunDir) -> Path | None:
    """Return the folder that this one is a copy of; None for one that is the run's own, moved or not."""
    mark = read_mark(run_dir.path)
    if mark is None or _is_marked(run_dir) or not run_dir.has_identity():
        return None
    other = RunDir(Path(mark["path"]))
    is_other = other.has_identity() and not other.path.samefile(run_dir.path)
    return other.path if is_other and other.identity() == run_dir.identity() else None


def continue_here(run_dir: RunDir, *, adopt: bool = False, report: Callable[[str], None]) -> None:
    """Continue the run in its folder and renew the folder's mark; the caller owns the run.

    Args:
        adopt: a folder without a mark of its own becomes another run, with a new id.

    Raises:
        RunError: it is a copy, and ``adopt`` is not given.
    """
    mark, here = read_mark(run_dir.path), str(run_dir.path.absolute())
    if adopt and run_dir.has_identity():
        if mark is not None and (_is_marked(run_dir) or mark["path"] == here):
            report(f"{run_dir.path} is no copy, --adopt changes nothing")
        else:
            new = _take_new_identity(run_dir)
            report(f"{run_dir.path} is a run of its own from here on, with the id {new} and new runs in MLflow")
    elif source := copied_from(run_dir):
        raise RunError(
            f"{run_dir.path} is a copy of {source}, which holds the same run; continue it there, or give --adopt to "
            "make this folder a run of its own, with a new id and new runs in MLflow"
        )
    elif mark is not None and mark["path"] != here:
        report(f"{run_dir.path} was moved from {mark['path']}; the run continues here")
    renew_mark(run_dir.path)


def replace_run_id(manifest: Path, *, old: str, new: str) -> None:
    """Give a checkpoint to the run ``new``, if it is of the run ``old`` and its manifest is whole."""
    with contextlib.suppress(ValueError):  # damaged, or altered: loading it reports that
        content = read_record(manifest, dict)
        if content.get("run_id") == old and broken_seal(content) is None:
            commit_sealed(manifest, {**content, "run_id": new})


def _is_marked(run_dir: RunDir) -> bool:
    mark, status = read_mark(run_dir.path), run_dir.path.stat()
    return mark is not None and (mark["device"], mark["inode"]) == (status.st_dev, status.st_ino)


def _take_new_identity(run_dir: RunDir, parent: tuple[str, str] | None = None) -> str:
    """Replace the run's id everywhere, and the ids of a tuning's trials; after a kill, the next call completes it.

    Args:
        parent: the old and the new id of the tuning, where this is a trial.
    """
    old, draft = run_dir.identity(), run_dir.logs / "identity-new"
    if not draft.exists() or draft.read_text() == old:
        commit_bytes(draft, uuid.uuid4().hex.encode())
    new = draft.read_text()
    for trial in sorted(run_dir.path.glob("trials/*")):
        if RunDir(trial).has_identity():
            _take_new_identity(RunDir(trial), (old, new))
    if parent is not None:
        text = run_dir.tracking.read_text(encoding="utf-8") if run_dir.tracking.exists() else ""
        was, now = (f'"parent_key": "{run_id}/' for run_id in parent)
        commit_bytes(run_dir.tracking, text.replace(was, now).encode())
    for manifest in run_dir.path.glob(f"*/checkpoints/*/{MANIFEST}"):
        replace_run_id(manifest, old=old, new=new)
    run_dir.mlflow_state.unlink(missing_ok=True)
    run_dir.take_identity(new)
    renew_mark(run_dir.path)
    draft.unlink()
    return new
