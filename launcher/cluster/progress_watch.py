"""Finds processes of workers that hang."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from typing import Any

LOOK_EVERY_S = 10.0  # interval of progress requests, at most


@dataclasses.dataclass(eq=False)
class Watched:
    """A worker that is starting (no task) or runs a task, and the time since its last progress.

    Its actor has ``progress_of()``, of the concurrency group "watch": a number that changes with progress, and a name.
    """

    actor: Any
    task: Any = None
    name: str = ""
    following: tuple[Any, ...] = ()  # the tasks that it may prepare for
    progress_of: int | None = None  # None until its process has answered
    request: Any = None  # of its progress, not answered yet
    silent_s: float = 0.0


class ProgressWatch:
    """Finds workers without progress, by the clock of this process.

    A worker that is stopped, or that holds Python's global lock, cannot report by itself.
    """

    def __init__(self, timeout_s: float) -> None:
        self.every_s = min(LOOK_EVERY_S, timeout_s / 10)
        self._timeout_s = timeout_s
        self._looked_at = time.monotonic()

    def hung(self, workers: Iterable[Watched]) -> list[Watched]:
        """Return the workers without progress for the timeout; checks at most every ``every_s``."""
        elapsed = time.monotonic() - self._looked_at
        if elapsed < self.every_s:
            return []
        self._looked_at += elapsed
        hung = []
        for worker in workers:
            if self._has_moved(worker):
                worker.silent_s = 0.0
            elif worker.progress_of is not None:
                worker.silent_s += min(elapsed, 2 * self.every_s)  # longer only if this process itself was stopped
            if worker.silent_s > self._timeout_s + 2 * self.every_s:  # an answer may be as old as two checks
                hung.append(worker)
        return hung

    def _has_moved(self, worker: Watched) -> bool:
        import ray
        from ray.exceptions import RayError

        before = worker.progress_of
        if worker.request is not None:
            if not ray.wait([worker.request], timeout=0)[0]:
                return False
            try:
                worker.progress_of, worker.name = ray.get(worker.request)
            except RayError:  # if the worker is gone, its task's answer has the same error
                worker.request = None
                return False
        worker.request = worker.actor.progress_of.options(concurrency_group="watch").remote()
        return worker.progress_of != before
