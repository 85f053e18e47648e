"""A time limit on progress: a process without progress writes its stacks to its log."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections.abc import Callable

_LEAD = 0.1  # share of the time limit that is left when ``before_end`` is called


def collective_timeout(hang_timeout_s: float) -> float:
    """Seconds after which a collective fails: later than the guard, which says where a rank hangs.

    It is also that of phases which the guard leaves out, in which ranks wait for one that reads, converts or copies.
    """
    return max(1800.0, 2 * hang_timeout_s)


class HangGuard:
    """Writes every thread's stack to this process's log, and ends it, after ``timeout_s`` without progress.

    A rank that hangs blocks the others in their next collective. All ranks that can still run end,
    and the training is restarted. A worker of a queue is ended by the driver: ``end=False``.

    Args:
        timeout_s: seconds without progress.
        end: whether the process ends.
        before_end: called in a thread shortly before; returns a sentence for the log. The stacks are written by a
            timer that needs neither this call nor Python.
    """

    def __init__(self, timeout_s: float, *, end: bool = True, before_end: Callable[[], str] | None = None) -> None:
        self._timeout_s, self._end = timeout_s, end
        self._watch = _Watch(timeout_s * (1 - _LEAD), before_end) if before_end else None

    def progress(self) -> None:
        """Restart the timer."""
        faulthandler.dump_traceback_later(self._timeout_s, exit=self._end, file=sys.stderr)
        if self._watch:
            self._watch.progress()

    def close(self) -> None:
        """Stop the timer."""
        faulthandler.cancel_dump_traceback_later()
        if self._watch:
            self._watch.close()


class _Watch:
    """A thread that calls a function once if there is no progress for some seconds."""

    def __init__(self, timeout_s: float, call: Callable[[], str]) -> None:
        self._timeout_s, self._call = timeout_s, call
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._last = 0.0

    def progress(self) -> None:
        self._last = time.monotonic()
        if self._thread is None:
            self._stopped = threading.Event()
            self._thread = threading.Thread(target=self._run, args=(self._stopped,), name="hang-guard", daemon=True)
            self._thread.start()

    def close(self) -> None:
        self._stopped.set()  # not joined: it may be in a call that blocks
        self._thread = None

    def _run(self, stopped: threading.Event) -> None:
        called_at = None  # the progress before which it was called
        while not stopped.wait(min(1.0, self._timeout_s / 20)):
            last = self._last
            if time.monotonic() - last < self._timeout_s or called_at == last:
                continue
            called_at = last
            try:
                text = self._call()
            except Exception as error:
                text = f"the last collectives could not be written ({type(error).__name__}: {error})"
            print(f"no progress for {time.monotonic() - last:,.0f} s; {text}", file=sys.stderr, flush=True)
