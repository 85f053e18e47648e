"""Atomic commits of files: a reader sees the old file or the whole new one, never a part.

As usual on POSIX: write under a temporary name in the same folder, fsync, rename, fsync the
folder. A killed process leaves a ``.tmp-*`` file that no process reads (``data_shards/leftovers.py``).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_shards.strict_json import read_json_file
from mmcot.errors import BusyError

_HERE, _RENAME_EXCHANGE = -100, 2  # AT_FDCWD and a flag of Linux's renameat2


def process_mark() -> str:
    """A mark of this process for temporary names: where its id has a meaning (kernel and PID namespace), and its id."""
    return f"{_where_ids_count()}.{os.getpid()}"


@functools.cache
def _where_ids_count() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        place = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        place = uuid.uuid4().hex
    return hashlib.sha256(place.encode()).hexdigest()[:8]


@contextlib.contextmanager
def committing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; if the block succeeds, the file is renamed to ``path`` atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".tmp-{process_mark()}.{uuid.uuid4().hex[:8]}-{path.name}"
    try:
        yield temporary
        _fsync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                "the disk is full; what was committed is kept: free some space and run again",
                str(path),
            ) from None
        raise
    _fsync(path.parent)


@contextlib.contextmanager
def exclusive(folder: str | Path, *, wait_s: float | None = None) -> Iterator[None]:
    """Hold a lock on a folder; other processes of this machine wait for it.

    Args:
        wait_s: seconds to wait; None waits for as long as it takes, as for a build of the same data.

    Raises:
        TimeoutError: another process held it for longer.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / ".lock", "w") as file:
        if wait_s is None:
            fcntl.flock(file, fcntl.LOCK_EX)
        elif not _locked_within(file.fileno(), wait_s):
            raise BusyError(
                f"{file.name} has been locked by another process for {wait_s:g} s, which is stopped or waits for its "
                "disk; continue or end that process, and run again"
            )
        yield


def _locked_within(descriptor: int, wait_s: float) -> bool:
    until = time.monotonic() + wait_s
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() > until:
            return False
        time.sleep(0.05)


def commit_bytes(path: str | Path, data: bytes) -> None:
    """Write ``data`` as the whole content of ``path``, or leave the file unchanged."""
    with committing(path) as temporary:
        temporary.write_bytes(data)


def commit_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, keys in their given order."""
    commit_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def commit_folder(staging: str | Path, target: str | Path) -> None:
    """Rename a finished folder to ``target``; an old folder of that name is removed.

    Linux exchanges the two at once. Elsewhere, and on file systems that cannot, a kill may come between the removal of
    the old folder and the renaming.
    """
    staging, target = Path(staging), Path(target)
    for path in staging.rglob("*"):
        if path.is_file():
            _fsync(path)
    if target.exists() and _exchange(staging, target):
        _fsync(target.parent)
        shutil.rmtree(staging)
        return
    if not staging.exists():  # another owner has removed it; what stands may be that owner's
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(staging))
    if target.exists():
        shutil.rmtree(target)
    os.replace(staging, target)
    _fsync(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two folders, atomically; False where this system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = (os.fsencode(first), os.fsencode(second))
    return rename is not None and rename(_HERE, names[0], _HERE, names[1], _RENAME_EXCHANGE) == 0


def link_file(source: str | Path, target: str | Path) -> None:
    """Link a file, without a second copy of its content; copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def clear_unfinished(folder: str | Path, name: str = "*") -> None:
    """Remove the temporary files of killed writers from a folder; the caller must hold its lock (``exclusive``)."""
    for path in Path(folder).glob(f".tmp-*-{name}"):
        path.unlink(missing_ok=True)


def read_json(path: str | Path) -> Any:
    """Read a JSON file that this package wrote; it may hold NaN.

    Raises:
        InputError: it is not valid JSON.
    """
    return read_json_file(path, finite=False, remedy="restore or delete the file")


def sha256_of_file(path: str | Path) -> str:
    """Return the file's sha256 as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """Return 16 hex digits of a hash of a JSON value; equal values have equal fingerprints."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
