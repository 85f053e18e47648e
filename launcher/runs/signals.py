"""Signals and requests to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import psutil

from launcher.runs.run_dir import RunDir

_LOOK_EVERY_S = 1.0
# kill; Ctrl-C; a closed terminal. They all request the same: to stop so that the same command can resume.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STOPPED = 128 + signal.SIGTERM  # the status of a stopped command, after any of them


@contextlib.contextmanager
def handling_stop(on_signal: Callable[[int, object], None]) -> Iterator[None]:
    """Handle the signals that request a stop by ``on_signal`` while the block lasts, in the main thread only.

    A signal that this process was started to ignore (nohup; a script's background job) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: handler for number in STOP_SIGNALS if (handler := signal.getsignal(number)) is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_at_next_stop() -> None:
    """Let the next Ctrl-C or SIGTERM end the process at once."""
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a script's background job ignores Ctrl-C
            signal.signal(number, _end_at_once)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a closed terminal may send it twice: the shell does, and the kernel


def _end_at_once(number: int, frame: object) -> None:
    """End this process after the processes that it has started.

    Some of Ray's processes take half a minute to detect that their parent is gone.
    """
    signal.signal(number, signal.SIG_DFL)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()
    os.kill(os.getpid(), number)


@contextlib.contextmanager
def noting_stop() -> Iterator[list[int]]:
    """Yield a list to which every stop signal is added while the block lasts."""
    received: list[int] = []
    with handling_stop(lambda number, frame: received.append(number)):
        yield received


@contextlib.contextmanager
def sigterm_stops() -> Iterator[None]:
    """Raise Stopped from the block after SIGTERM, Ctrl-C or SIGHUP; a second SIGTERM or Ctrl-C ends the process.

    Raises:
        Stopped: one of these signals was received.
    """

    def on_signal(number: int, frame: object) -> None:
        end_at_next_stop()
        raise KeyboardInterrupt  # the only exception that Ray passes on from its waits

    with handling_stop(on_signal):
        try:
            yield
        except (KeyboardInterrupt, SystemExit):  # SystemExit: Ray handles SIGTERM itself while it starts
            raise Stopped("stopped on request; what was committed is kept, the same command resumes") from None


@contextlib.contextmanager
def sparing_children() -> Iterator[None]:
    """Let processes that are started in the block survive a closed terminal.

    This process can then stop in order and end them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # child processes inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopRequest:
    """A request to stop the training: a signal to this process, or a file of the driver."""

    def __init__(self, run_dir: RunDir, attempt: int) -> None:
        self._run_dir, self._attempt = run_dir, attempt
        self._signalled, self._looked_at = False, 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take the signals of ``STOP_SIGNALS`` as a request while the block lasts, in the main thread only."""
        with handling_stop(self._on_signal):
            yield self

    def seen(self) -> bool:
        """Whether a stop was requested; the file is checked once per second."""
        if not self._signalled and time.monotonic() - self._looked_at > _LOOK_EVERY_S:
            self._looked_at = time.monotonic()
            self._signalled = self._run_dir.stop_requested(self._attempt)
        return self._signalled

    def _on_signal(self, number: int, frame: object) -> None:
        self._signalled = True


class Stopped(RuntimeError):  # noqa: N818 (a public name)
    """A step stopped on request, with a checkpoint; the same command resumes it."""
