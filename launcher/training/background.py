"""A function that runs in a thread, while the training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """Runs ``work`` once, in a thread: ``is_done``, then ``result()``.

    Args:
        daemon: whether the work ends with the process; otherwise a process that ends by itself waits for it.
    """

    def __init__(self, work: Callable[[], T], *, name: str, daemon: bool = False) -> None:
        self._work, self._error = work, None
        self._results: list[T] = []
        self._thread = threading.Thread(target=self._run, name=name, daemon=daemon)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether ``result`` returns at once."""
        return not self._thread.is_alive()

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait for the end, at most so many seconds."""
        self._thread.join(timeout_s)

    def result(self) -> T:
        """Wait for the end; returns what ``work`` returned.

        Raises:
            BaseException: what ``work`` raised.
        """
        self.wait()
        if self._error is not None:
            raise self._error
        return self._results[0]

    def _run(self) -> None:
        try:
            self._results.append(self._work())
        except BaseException as error:  # whatever it is, the caller learns it from result
            self._error = error
