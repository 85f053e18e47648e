"""What killed writers leave: ``.tmp-*`` files and folders, and ``.staging-*`` folders.

A temporary name has a mark of its process, so that those of a living one are never removed. Of a process that cannot be
looked up (another machine or PID namespace, an earlier version) it is removed after ten minutes without a change, by
the clock of the file system.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from data_shards.atomic_files import process_mark

SILENT_S = 600.0
_MARK = re.compile(r"\.tmp-([0-9a-f]{8}\.\d+)\.")


def remove_leftovers(folder: Path, *, staging: bool) -> tuple[int, int]:
    """Remove what killed processes have left anywhere in a folder; returns its number and bytes.

    Args:
        staging: remove ``.staging-*`` too; the caller holds the lock of those who write them.
    """
    found = [path for path in folder.rglob(".tmp-*") if not _is_written(path)]
    found += list(folder.rglob(".staging-*")) if staging else []
    count = size = 0
    for path in found:
        with contextlib.suppress(OSError):  # read-only, or gone
            bytes_of_it = sum(part.stat().st_size for part in (path, *path.rglob("*")) if part.is_file())
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            count, size = count + 1, size + bytes_of_it
    return count, size


def describe_leftovers(count: int, size: int) -> Iterator[str]:
    """A line on what was removed, or none."""
    if count:
        yield f"removed {count:,} unfinished file{'s' * (count > 1)} of killed processes ({size / 1e6:.1f} MB)"


def _is_written(path: Path) -> bool:
    """Whether the process that writes a temporary file may be alive."""
    found = _MARK.match(path.name)
    machine, _, pid = found[1].partition(".") if found else ("", "", "")
    if machine == process_mark().partition(".")[0]:
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return False
        except OSError:  # of another user
            return True
        return True
    try:
        with tempfile.TemporaryFile(dir=path.parent) as now:
            return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime < SILENT_S
    except OSError:
        return True
