"""What watches over a rank: its progress, and requests to stop."""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import sys
import threading
import time
from collections.abc import Iterator

from launcher.run_dir import RunDir, Stopped

_LOOK_EVERY_S = 1.0


@contextlib.contextmanager
def sigterm_stops() -> Iterator[None]:
    """SIGTERM unwinds the block as Ctrl-C does and leaves it as Stopped; a second one ends the process.

    Raises:
        Stopped: SIGTERM came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def on_signal(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise KeyboardInterrupt  # of all exceptions the one that Ray lets out of its waits

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        if not asked and isinstance(error, KeyboardInterrupt):
            raise
        # SystemExit: Ray takes SIGTERM itself while it starts.
        raise Stopped("stopped as asked; what was committed stands, the same command goes on") from None
    finally:
        signal.signal(signal.SIGTERM, before)


class HangGuard:
    """Ends this process, with every thread's stack in its log, when it makes no progress for a while.

    A rank that hangs stops the others in their next collective; whichever of them can still
    run ends, and the training is started again.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def progress(self) -> None:
        """Count anew from here."""
        faulthandler.dump_traceback_later(self._timeout_s, exit=True, file=sys.stderr)

    def close(self) -> None:
        """Watch no more."""
        faulthandler.cancel_dump_traceback_later()


class StopRequest:
    """Whether someone asked the training to stop: SIGTERM to this process, or the driver by a file."""

    def __init__(self, run_dir: RunDir, attempt: int) -> None:
        self._run_dir, self._attempt = run_dir, attempt
        self._signalled, self._looked_at = False, 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take SIGTERM as a request while the block lasts, where this is the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.signal(signal.SIGTERM, self._on_signal)
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, before)

    def seen(self) -> bool:
        """Whether a request has come; the file is looked at once a second."""
        if not self._signalled and time.monotonic() - self._looked_at > _LOOK_EVERY_S:
            self._looked_at = time.monotonic()
            self._signalled = self._run_dir.stop_requested(self._attempt)
        return self._signalled

    def _on_signal(self, number: int, frame: object) -> None:
        self._signalled = True
