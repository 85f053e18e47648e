"""How many questions of a file are answered, on standard error; standard output has the answers alone.

On a terminal it is one line that is rewritten, elsewhere a line every ``PLAIN_EVERY_S``:

      120 of 300 questions answered, 4.1 a second, time left 0:44
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import typer

from launcher.cli.options import say
from launcher.runs.background import background_thread
from launcher.runs.progress import format_seconds, format_time_left

PLAIN_EVERY_S = 30.0
_LIVE_EVERY_S = 0.5
_CLEAR = "\r\x1b[K"


class AnswerProgress:
    """Prints the sentences and the progress of a prediction."""

    def __init__(self) -> None:
        self._is_live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._lock = threading.RLock()  # a signal's handler may print while a line is printed
        self._num_before = self._num_done = self._num_total = 0
        self._began_at = time.monotonic()

    def say(self, line: str) -> None:
        """Print a sentence in place of the rewritten line."""
        with self._lock:
            self._clear()
            say(line, err=True)

    def answer(self, line: str) -> None:
        """Print an answer to standard output, which may be the same terminal."""
        with self._lock:
            self._clear()
            typer.echo(line)

    @contextlib.contextmanager
    def counting(self, num_done: int, num_total: int) -> Iterator[Callable[[int], None]]:
        """Show the progress while the block lasts; yields the function that gets the number of questions done."""
        self._num_before = self._num_done = num_done
        self._num_total, self._began_at = num_total, time.monotonic()
        with background_thread(self._show, name="progress"):
            yield self._count
        with self._lock:
            self._clear()

    def _count(self, num_done: int) -> None:
        self._num_done = num_done

    def _show(self, stopped: threading.Event) -> None:
        while not stopped.wait(_LIVE_EVERY_S if self._is_live else PLAIN_EVERY_S):
            with self._lock:
                if not self._is_live:
                    say(self._line(), err=True)
                    continue
                with contextlib.suppress(OSError, ValueError):  # a terminal that was closed
                    sys.stderr.write(_CLEAR + self._line())
                    sys.stderr.flush()

    def _line(self) -> str:
        seconds, num_new = time.monotonic() - self._began_at, self._num_done - self._num_before
        line = f"  {self._num_done:,} of {self._num_total:,} questions answered"
        if not num_new:
            return f"{line}, at work for {format_seconds(seconds)}"
        left = (self._num_total - self._num_done) * seconds / num_new
        return f"{line}, {num_new / seconds:.1f} a second, {format_time_left(left)}"

    def _clear(self) -> None:
        if self._is_live:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(_CLEAR)
                sys.stderr.flush()
