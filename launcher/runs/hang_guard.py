"""A time limit on progress: a process without progress writes its stacks to its log."""

from __future__ import annotations

import faulthandler
import sys


def collective_timeout(hang_timeout_s: float) -> float:
    """Seconds after which a collective fails: later than the guard, which says where a rank hangs.

    It is also that of phases which the guard leaves out, in which ranks wait for one that reads, converts or copies.
    """
    return max(1800.0, 2 * hang_timeout_s)


class HangGuard:
    """Writes every thread's stack to this process's log, and ends it, after ``timeout_s`` without progress.

    A rank that hangs blocks the others in their next collective. All ranks that can still run end,
    and the training is restarted. A worker of a queue is ended by the driver: ``end=False``.
    """

    def __init__(self, timeout_s: float, *, end: bool = True) -> None:
        self._timeout_s, self._end = timeout_s, end

    def progress(self) -> None:
        """Restart the timer."""
        faulthandler.dump_traceback_later(self._timeout_s, exit=self._end, file=sys.stderr)

    def close(self) -> None:
        """Stop the timer."""
        faulthandler.cancel_dump_traceback_later()
