"""Commit points of a process, and a fault at one of them.

A commit point is a call by which a job makes something durable or visible: for itself (fsync, rename, exchange, a line
that is appended), for a store or a server (upload, send), or for another process (hand-out). ``Points`` sees all of
them in their order. Without a fault it is a trace of the job.
"""

from __future__ import annotations

import errno
import io
import os
import random
import re
import signal
import threading
import time
import types
from pathlib import Path

from data_shards import atomic_files
from launcher.runs import journal, run_dir
from launcher.training import checkpoint_writer

KINDS = ("fsync", "rename", "exchange", "upload", "send", "hand-out", "line")
FAULTS = (
    "kill -9",
    "kill -9 half-way",
    "kill -9 after",
    "SIGTERM",
    "SIGHUP",
    "SIGSTOP",
    "EIO",
    "ENOSPC",
    "changed byte",
    "store away",
    "clock jump",
)
_DAY_S = 86400.0
_TEMPORARY = re.compile(r"\.tmp-(?:[0-9a-f]{8}\.\d+\.[0-9a-f]{8}|[0-9a-f]{12})-")
_STAGING = re.compile(r"\.staging-(\d+)-[0-9a-f]{8}")
current: Points


class Points:
    """The commit points of this process.

    Args:
        fault: what happens at the point ``number``; None: nothing.
        note: takes the path of a file with a changed byte.
    """

    def __init__(self, root: Path, *, fault: str | None = None, number: int = -1, seed: str = "", note=lambda path: 0):
        self.root, self.fault, self.number, self.note = root, fault, number, note
        self.seen: list[list] = []  # kind, path, whether it has bytes that may change
        self.is_away = False  # the store and the server
        self._chance, self._lock = random.Random(seed), threading.Lock()

    def at(self, kind: str, path, call, *, half=None, file: Path | None = None, num_bytes: int | None = None):
        """A commit point: ``call`` commits ``path``.

        Args:
            half: commits the first half of it, where that is possible.
            file: what is on the disk after it; None: nothing.
            num_bytes: only the last bytes of the file are new.
        """
        with self._lock:
            number, is_it = len(self.seen), self.fault is not None and len(self.seen) == self.number
            self.seen.append([kind, self._name(path), file is not None and not _is_folder_sync(kind, file)])
        if is_it:
            result = self._happen(kind, call, half, file, num_bytes)
        else:
            if self.is_away and kind in ("upload", "send"):
                raise ConnectionError("the store is away")
            result = call()
        if file is not None and not is_it and not _has_bytes(file):
            self.seen[number][2] = False
        return result

    def _happen(self, kind, call, half, file, num_bytes):
        fault = self.fault
        if fault in ("EIO", "ENOSPC"):
            if half is not None and (written := half()):
                return written  # the rest fails
            raise OSError(getattr(errno, fault), os.strerror(getattr(errno, fault)))
        if fault == "kill -9 half-way":
            half()
        if fault in ("kill -9", "kill -9 half-way"):
            _signal_here(signal.SIGKILL)
        if fault in ("SIGTERM", "SIGHUP", "SIGSTOP"):
            _signal_here(getattr(signal, fault))
        if fault == "clock jump":
            real, offset = time.time, _DAY_S if self.number % 2 else -_DAY_S
            time.time = lambda: real() + offset
        if fault == "store away":
            self.is_away = True
            if kind in ("upload", "send"):
                raise ConnectionError("the store is away")
        result = call()
        if fault == "kill -9 after":
            _signal_here(signal.SIGKILL)
        if fault == "changed byte":
            self._change_byte(file, num_bytes)
        return result

    def _change_byte(self, file: Path, num_bytes: int | None) -> None:
        if file.is_dir():
            file = self._chance.choice(sorted(path for path in file.rglob("*") if path.is_file()))
        content = bytearray(file.read_bytes())
        first = len(content) - (num_bytes or len(content))
        content[self._chance.randrange(first, len(content))] ^= 1 << self._chance.randrange(8)
        with open(file, "r+b") as target:
            target.write(content)
        self.note(self._name(file))

    def _name(self, path) -> str:
        text = str(path)
        text = os.path.relpath(text, self.root) if os.path.isabs(text) else text
        return _STAGING.sub(r".staging-\1", _TEMPORARY.sub(".tmp-", text))


def _is_folder_sync(kind: str, file: Path) -> bool:
    return kind == "fsync" and file.is_dir()


def _has_bytes(file: Path) -> bool:
    if file.is_dir():
        return any(path.is_file() and path.stat().st_size for path in file.rglob("*"))
    return file.is_file() and file.stat().st_size > 0


def _signal_here(number: int) -> None:
    signal.pthread_kill(threading.get_ident(), number)  # the thread at the point does not run on


class _LineWriter(io.FileIO):
    """The file below a ``LineFile``: every write of it is a point, and may be cut in the middle."""

    _fails: OSError | None = None

    def write(self, data):
        if self._fails is not None:
            error, self._fails = self._fails, None
            raise error
        data = bytes(data)
        return current.at(
            "line",
            self.name,
            lambda: super(_LineWriter, self).write(data),
            half=lambda: self._write_half(data),
            file=Path(self.name),
            num_bytes=len(data),
        )

    def _write_half(self, data: bytes) -> int:
        if current.fault in ("EIO", "ENOSPC"):  # as write(2) does: fewer bytes, then the error
            number = getattr(errno, current.fault)
            self._fails = OSError(number, os.strerror(number))
        return super().write(data[: len(data) // 2])


def _open_lines(path, mode="r", **options):
    if mode != "a":
        return open(path, mode, **options)
    raw = _LineWriter(str(path), "a")
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=options["encoding"], line_buffering=True)


def install(points: Points) -> None:
    """Let the product's commits in this process be points."""
    global current
    current = points
    fsync, exchange = atomic_files._fsync, atomic_files._exchange
    atomic_files._fsync = lambda path: points.at("fsync", path, lambda: fsync(path), file=Path(path))
    atomic_files._exchange = lambda first, second: points.at(
        "exchange", second, lambda: exchange(first, second), file=Path(second)
    )

    def moving(move):
        return lambda source, target: points.at("rename", target, lambda: move(source, target), file=Path(target))

    def fsync_open(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        return points.at("fsync", path, lambda: os.fsync(descriptor), file=Path(path))

    atomic_files.os = _os_with(replace=moving(os.replace))
    run_dir.os = _os_with(link=moving(os.link))
    checkpoint_writer.os = _os_with(fsync=fsync_open)
    journal.open = _open_lines


def _os_with(**functions):
    return types.SimpleNamespace(**{**vars(os), **functions})
