"""What watches over a rank: its progress, and requests to stop."""

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
# kill; Ctrl-C; a closed terminal. They all ask for the same: to stop where the same command can go on.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STOPPED = 128 + signal.SIGTERM  # the status of a command that was stopped, by whichever of them


@contextlib.contextmanager
def handling_stop(on_signal: Callable[[int, object], None]) -> Iterator[None]:
    """Have ``on_signal`` handle the signals that ask to stop while the block lasts; only the main thread gets any.

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
    """From here on Ctrl-C or SIGTERM ends the process at once."""
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
    """Yield a list that every signal to stop is added to, while the block lasts."""
    asked: list[int] = []
    with handling_stop(lambda number, frame: asked.append(number)):
        yield asked


@contextlib.contextmanager
def sigterm_stops() -> Iterator[None]:
    """SIGTERM, Ctrl-C and SIGHUP unwind the block and leave it as Stopped; a second SIGTERM or Ctrl-C ends the process.

    Raises:
        Stopped: one of them came.
    """

    def on_signal(number: int, frame: object) -> None:
        end_at_next_stop()
        raise KeyboardInterrupt  # of all exceptions the one that Ray lets out of its waits

    with handling_stop(on_signal):
        try:
            yield
        except (KeyboardInterrupt, SystemExit):  # SystemExit: Ray takes SIGTERM itself while it starts.
            raise Stopped("stopped as asked; what was committed stands, the same command goes on") from None


@contextlib.contextmanager
def sparing_children() -> Iterator[None]:
    """Let processes that are started in the block survive a closed terminal.

    This process can then stop in order and end them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # inherited by what is started
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopRequest:
    """Whether someone asked the training to stop: by a signal to this process, or the driver by a file."""

    def __init__(self, run_dir: RunDir, attempt: int) -> None:
        self._run_dir, self._attempt = run_dir, attempt
        self._signalled, self._looked_at = False, 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take the signals of ``STOP_SIGNALS`` as a request while the block lasts, where this is the main thread."""
        with handling_stop(self._on_signal):
            yield self

    def seen(self) -> bool:
        """Whether a request has come; the file is looked at once a second."""
        if not self._signalled and time.monotonic() - self._looked_at > _LOOK_EVERY_S:
            self._looked_at = time.monotonic()
            self._signalled = self._run_dir.stop_requested(self._attempt)
        return self._signalled

    def _on_signal(self, number: int, frame: object) -> None:
        self._signalled = True


class Stopped(RuntimeError):  # noqa: N818 (a public name)
    """A step stopped on request, with a checkpoint; the same command resumes it."""
