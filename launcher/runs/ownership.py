"""The lock of a run, one owner at a time: ``lock.json`` with its process, attempt and heartbeat.

A process of this machine is looked up. Of any other owner (another host, another PID namespace) only one thing is
proof of life: its heartbeat changes while one watches, by one's own clock. Its time stamp proves nothing, because
clocks differ.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from data_shards.atomic_files import commit_json, exclusive
from launcher.runs.background import background_thread
from launcher.runs.records import read_attempt, read_lock
from launcher.runs.run_dir import RunDir, RunError

HEARTBEAT_S = 5.0
LOCK_WAIT_S = 20.0  # for a process that writes lock.json, which takes no time
SILENT_S = 30.0  # without a heartbeat an owner elsewhere counts as dead
STALE_AFTER_S = 60.0  # for what is only shown, by both clocks


@contextlib.contextmanager
def owned(
    run_dir: RunDir, *, take_over: bool = False, report: Callable[[str], None] = lambda line: None
) -> Iterator[int]:
    """Hold the lock of the run while the block lasts; yields the attempt.

    Args:
        take_over: from any owner, without watching; one that is alive can commit nothing any more.
        report: takes a line before the owner is watched, which takes ``SILENT_S``.

    Raises:
        RunError: another living process owns it.
    """
    path = run_dir.path / "lock.json"
    seen = _read(path)
    if not take_over and seen is not None:
        is_alive = _is_alive(seen)
        if is_alive or (is_alive is None and _beats(path, seen, report)):
            raise RunError(_refusal(run_dir, _read(path) or seen))
    with _locked(run_dir):
        lock = _read(path)
        if not take_over and lock is not None and lock != seen and _is_alive(lock) is not False:
            raise RunError(_refusal(run_dir, lock))  # taken while this process watched
        attempt = lock["attempt"] + 1 if lock else 1
        since = time.time()
        commit_json(path, _lock(attempt, since))
    try:
        with background_thread(partial(_beat, path, attempt, since), name="heartbeat"):
            yield attempt
    finally:
        with contextlib.suppress(TimeoutError):  # an owner that has ended is found dead without it
            _write_own_lock(path, attempt, since, released=True)


@contextlib.contextmanager
def _locked(run_dir: RunDir) -> Iterator[None]:
    try:
        with exclusive(run_dir.path, wait_s=LOCK_WAIT_S):
            yield
    except TimeoutError as error:
        raise RunError(str(error)) from None


def owner(run_dir: RunDir) -> dict[str, Any] | None:
    """Return the lock if its owner seems alive, or None; an owner elsewhere is judged by its clock and this one."""
    lock = _read(run_dir.path / "lock.json")
    if lock is None or (is_alive := _is_alive(lock)) is False:
        return None
    return lock if is_alive or abs(time.time() - lock["heartbeat"]) < STALE_AFTER_S else None


def _read(path: Path) -> dict[str, Any] | None:
    return read_lock(path) if path.exists() else None


def _refusal(run_dir: RunDir, lock: dict[str, Any]) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(lock.get("since", lock["process_started"])))
    return (
        f"{run_dir.path} is being run by process {lock['pid']} on {lock['host']} since {since} by its clock (attempt "
        f"{lock['attempt']}); wait for it, end it, or use another run.dir. If it can do nothing any more, "
        "`mmcot run --take-over` continues the run here"
    )


def _lock(attempt: int, since: float) -> dict[str, Any]:
    pid = os.getpid()
    return {
        "pid": pid,
        "process_started": psutil.Process(pid).create_time(),
        "host": socket.gethostname(),
        "processes": _processes(),
        "attempt": attempt,
        "since": since,
        "heartbeat": time.time(),
        "released": False,
    }


def _processes() -> str:
    """Names the kernel and PID namespace in which a process id has a meaning; empty where they are not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_alive(lock: dict[str, Any]) -> bool | None:
    """Whether the owner is alive; None where this machine cannot look it up."""
    if lock["released"]:
        return False
    if lock["host"] != socket.gethostname() or lock.get("processes", _processes()) != _processes():
        return None
    try:
        process = psutil.Process(lock["pid"])
        return abs(process.create_time() - lock["process_started"]) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _beats(path: Path, seen: dict[str, Any], report: Callable[[str], None]) -> bool:
    """Watch the lock of an owner elsewhere; whether it changes and is not released."""
    report(
        f"{path.parent} was last run by process {seen['pid']} on {seen['host']}; watching up to {SILENT_S:.0f} s "
        "whether its heartbeat changes"
    )
    until = time.monotonic() + SILENT_S
    while time.monotonic() < until:
        time.sleep(min(1.0, SILENT_S / 10))
        if (lock := _read(path)) != seen:
            return lock is not None and not lock["released"]
    return False


def _beat(path: Path, attempt: int, since: float, stopped: threading.Event) -> None:
    while not stopped.wait(HEARTBEAT_S):
        with contextlib.suppress(OSError):  # a full or missing disk may be usable at the next heartbeat
            _write_own_lock(path, attempt, since, released=False)


def _write_own_lock(path: Path, attempt: int, since: float, *, released: bool) -> None:
    """Renew the lock, unless another attempt owns the run now."""
    with exclusive(path.parent, wait_s=LOCK_WAIT_S):
        if read_attempt(path) == attempt:
            commit_json(path, {**_lock(attempt, since), "released": released})
