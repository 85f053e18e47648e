"""A time limit on progress: a process that makes none leaves its stacks in its log."""

from __future__ import annotations

import faulthandler
import sys


class HangGuard:
    """Leaves every thread's stack in this process's log, and ends it, when it makes no progress for a while.

    A rank that hangs stops the others in their next collective; whichever of them can still
    run ends, and the training is started again. A worker of a queue is ended by the driver: ``end=False``.
    """

    def __init__(self, timeout_s: float, *, end: bool = True) -> None:
        self._timeout_s, self._end = timeout_s, end

    def progress(self) -> None:
        """Count anew from here."""
        faulthandler.dump_traceback_later(self._timeout_s, exit=self._end, file=sys.stderr)

    def close(self) -> None:
        """Watch no more."""
        faulthandler.cancel_dump_traceback_later()
