"""The actor that runs a worker in a process of its own and reports its progress."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

import psutil

from launcher.runs.hang_guard import HangGuard

_BYTES_OF_PROGRESS = 1 << 20  # a model or a tar that is still being downloaded is progress as well


class WorkerProcess:
    """The actor of a worker; its progress can be requested while it runs.

    The worker is made by ``start`` and not with the actor. So a process that exists and is blocked in its start
    differs from one whose node has not joined yet.
    """

    def __init__(self, worker_class: type, job: Any, hang_timeout_s: float) -> None:
        self._make = lambda: worker_class(job)
        self._num_parts, self._guarded_at = 0, 0.0
        # A token may take a millisecond, and resetting the guard's timer takes a part of that.
        self._guard_every_s = min(1.0, hang_timeout_s / 10)
        self._guard = HangGuard(hang_timeout_s, end=False)
        self._name = f"process {os.getpid()} on {socket.gethostname()}"

    def start(self) -> str:
        """Load what tasks need; returns the name of this process."""
        self._guard.progress()
        self._worker = self._make()
        self._worker.progress = self._progress
        self._worker.is_ready()
        self._guard.close()
        return self._name

    def run(self, task: Any, following: tuple[Any, ...] = ()) -> Any:
        """Run a task; returns what its worker returns. ``following`` are the tasks that probably come next."""
        self._guard.progress()
        self._worker.following = following
        try:
            return self._worker.run(task)
        finally:
            self._guard.close()

    def progress_of(self) -> tuple[int, str]:
        """Return a number that grows while there is progress, and the name of this process."""
        return self._num_parts + _bytes_moved() // _BYTES_OF_PROGRESS, self._name

    def _progress(self) -> None:
        self._num_parts += 1
        if (now := time.monotonic()) - self._guarded_at > self._guard_every_s:
            self._guarded_at = now
            self._guard.progress()


def _bytes_moved() -> int:
    """Bytes that this process has read from disks and written anywhere.

    They include a model or tar that is being downloaded, but no reads from sockets or /proc.
    """
    try:
        io = psutil.Process().io_counters()  # pyright: ignore[reportAttributeAccessIssue] (not on every system)
    except (AttributeError, OSError, RuntimeError, ValueError, psutil.Error):
        return 0
    return io.read_bytes + io.write_chars
