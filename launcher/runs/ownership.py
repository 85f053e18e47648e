"""The lock of a run, one owner at a time: ``lock.json`` with its process, attempt and heartbeat."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from data_shards.atomic_files import commit_json, exclusive, read_json
from launcher.runs.background import background_thread
from launcher.runs.run_dir import RunDir, RunError

HEARTBEAT_S = 5.0
STALE_AFTER_S = 60.0


@contextlib.contextmanager
def owned(run_dir: RunDir) -> Iterator[int]:
    """Hold the lock of the run while the block lasts; yields the attempt.

    Raises:
        RunError: another living process owns it.
    """
    path = run_dir.path / "lock.json"
    attempt = 1
    with exclusive(run_dir.path):
        if path.exists():
            lock = read_json(path)
            if _is_alive(lock):
                raise RunError(
                    f"{run_dir.path} is being run by process {lock['pid']} on {lock['host']} (attempt "
                    f"{lock['attempt']}); wait for it, end it, or use another run.dir"
                )
            attempt = lock["attempt"] + 1
        commit_json(path, _lock(attempt))
    try:
        with background_thread(partial(_beat, path, attempt), name="heartbeat"):
            yield attempt
    finally:
        _write_own_lock(path, attempt, released=True)


def owner(run_dir: RunDir) -> dict[str, Any] | None:
    """Return the lock if its owner is alive, or None."""
    path = run_dir.path / "lock.json"
    lock = read_json(path) if path.exists() else None
    return lock if lock and _is_alive(lock) else None


def _lock(attempt: int) -> dict[str, Any]:
    pid = os.getpid()
    return {
        "pid": pid,
        "process_started": psutil.Process(pid).create_time(),
        "host": socket.gethostname(),
        "attempt": attempt,
        "heartbeat": time.time(),
        "released": False,
    }


def _is_alive(lock: dict[str, Any]) -> bool:
    if lock["released"]:
        return False
    if lock["host"] != socket.gethostname():
        return time.time() - lock["heartbeat"] < STALE_AFTER_S
    try:
        process = psutil.Process(lock["pid"])
        return abs(process.create_time() - lock["process_started"]) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _beat(path: Path, attempt: int, stopped: threading.Event) -> None:
    while not stopped.wait(HEARTBEAT_S):
        with contextlib.suppress(OSError):  # a full or missing disk may be usable at the next heartbeat
            _write_own_lock(path, attempt, released=False)


def _write_own_lock(path: Path, attempt: int, *, released: bool) -> None:
    """Renew the lock, unless another attempt owns the run now."""
    with exclusive(path.parent):
        if read_json(path)["attempt"] == attempt:
            commit_json(path, {**_lock(attempt), "released": released})
