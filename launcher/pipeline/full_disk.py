"""A full disk, explained in one message: step, path, needed and free space, and the last checkpoint.

What fails because of it first is often not what fails last: the traceback of a worker cannot be written either, nor can
the run's lock be released.
"""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from launcher.config.settings import Settings
from launcher.pipeline.preflight import MIN_FREE_BYTES
from launcher.runs.checkpoint_names import latest_checkpoint
from launcher.runs.run_dir import RunDir, RunError

_TEXTS = ("No space left on device", "Disk quota exceeded", "the disk is full")

_PATH = re.compile(r"'(/[^'\n]+)'|could not be written to (/.+?) \(")


@contextlib.contextmanager
def full_disk_explained(run_dir: RunDir, settings: Settings) -> Iterator[None]:
    """Raise one RunError where the block fails because the disk is full."""
    try:
        yield
    except Exception as error:
        chain = _chain(error)
        full = [each for each in chain if _is_full(each)]
        if not full:
            raise
        first = chain[-1]
        before = "" if _is_full(first) else f"{first}\n"
        raise RunError(before + _explain(run_dir, settings, _path_of(full[-1]) or run_dir.path)) from error


def _chain(error: BaseException | None) -> list[BaseException]:
    """An exception and those that it hides, the first one last."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _is_full(error: BaseException) -> bool:
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return is_full or any(text in str(error) for text in _TEXTS)


def _path_of(error: BaseException) -> Path | None:
    """The file or folder that could not be written, where the exception names it."""
    if isinstance(error, OSError) and error.filename:
        return Path(error.filename)
    found = _PATH.search(str(error))
    return Path(found[1] or found[2]) if found else None


def _explain(run_dir: RunDir, settings: Settings, path: Path) -> str:
    step = next((step for step in settings.chain.steps if run_dir.marker(step) is None), settings.chain.steps[-1])
    place = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    stage = settings.chain.stage_of_step(step)
    latest = latest_checkpoint(run_dir.checkpoints(stage.name)) if stage else None
    kept, takes = "what was committed is kept", ""
    if latest:
        size = sum(file.stat().st_size for file in latest.rglob("*") if file.is_file())
        kept, takes = f"the checkpoint {latest.name} is kept", f" ({size / 1e9:.3f} GB a checkpoint)"
    return (
        f"the disk is full: step {step!r} could not write {path}; {shutil.disk_usage(place).free / 1e9:.2f} GB are "
        f"free, a start needs {MIN_FREE_BYTES / 1e9:.0f} GB{takes}; {kept}: free some space and run again"
    )
