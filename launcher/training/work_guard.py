"""A guard for phases in which a rank waits long for another one: the start, and the export of the model.

There a rank without progress need not hang: another may be reading weights or converting a checkpoint. Every rank
touches a file in the run's logs while it works, that is reads, writes or uses the processor:

    logs/working/rationale-0

A rank ends, after its stacks are in its log, where no rank has worked for the time limit. A wait in NCCL uses the
processor and counts as work, so that there a collective's own timeout remains.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil

from launcher.runs.background import background_thread

_BUSY = 0.05  # of a processor, from which on a rank works
_MOVED = 100_000  # bytes read or written in a look, from which on a rank works


@contextlib.contextmanager
def ended_without_work(logs: Path, stage: str, rank: int, *, timeout_s: float, phase: str) -> Iterator[None]:
    """End this process where no rank has worked for ``timeout_s`` in the block.

    Args:
        logs: of the run, which all ranks see.
        phase: for the log, such as "the start".
    """
    folder = logs / "working"
    folder.mkdir(parents=True, exist_ok=True)
    with background_thread(partial(_watch, folder, stage, rank, timeout_s, phase), name="work-guard"):
        yield


def _watch(folder: Path, stage: str, rank: int, timeout_s: float, phase: str, stopped: threading.Event) -> None:
    own, every_s = folder / f"{stage}-{rank}", min(5.0, timeout_s / 10)
    before, seen, since = _work_done(), None, time.monotonic()
    while not stopped.wait(every_s):
        now = _work_done()
        if now[0] - before[0] > _BUSY * every_s or now[1] - before[1] > _MOVED:
            with contextlib.suppress(OSError):  # a full or missing disk may be usable at the next look
                own.touch()
        before = now
        if (files := _times(folder, stage)) != seen:
            seen, since = files, time.monotonic()
        elif time.monotonic() - since > timeout_s:
            faulthandler.dump_traceback(sys.stderr)
            print(f"{phase}: no rank has read, written or computed for {timeout_s:.0f} s; ended", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)


def _work_done() -> tuple[float, int]:
    """Seconds of processor time, but for this thread, and bytes read and written; of this process and its children."""
    seconds, moved = -time.thread_time(), 0
    for pid in _with_children(os.getpid()):
        with contextlib.suppress(psutil.Error, AttributeError, OSError):
            process = psutil.Process(pid)
            times = process.cpu_times()
            seconds += times.user + times.system
            io = process.io_counters()  # pyright: ignore[reportAttributeAccessIssue] (not on every system)
            moved += io.read_chars + io.write_chars
    return seconds, moved


def _with_children(pid: int) -> list[int]:
    """A process and all below it, as Linux lists them; psutil would read every process of the machine."""
    children: list[int] = []
    with contextlib.suppress(OSError, ValueError):  # it has ended, or the kernel has no such list
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            children += map(int, path.read_text(encoding="ascii").split())
    return [pid, *(below for child in children for below in _with_children(child))]


def _times(folder: Path, stage: str) -> dict[str, int]:
    """The times of all ranks' files; only their changes mean something, because clocks differ."""
    found = {}
    with contextlib.suppress(OSError):
        found = {path.name: path.stat().st_mtime_ns for path in folder.glob(f"{stage}-*")}
    return found
