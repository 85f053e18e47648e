"""The order of tasks, without Ray and files.

queue = TaskQueue({task: expected_cost, ...}, max_attempts=3)
task = queue.take()                  # the most expensive one; None when there is none
queue.failed(task, "out of memory")  # True: it is the next task again
queue.set_aside                      # {task: error} of the quarantined tasks
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class TaskQueue(Generic[T]):
    """A queue of tasks, the most expensive first, so that the last ones are short."""

    def __init__(self, costs: Mapping[T, float], *, max_attempts: int) -> None:
        self._waiting = deque(sorted(costs, key=lambda task: -costs[task]))
        self._attempts = dict.fromkeys(costs, 0)
        self._max_attempts = max_attempts
        self.set_aside: dict[T, str] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def take(self) -> T | None:
        """Take the next task; None where the queue is empty."""
        if not self._waiting:
            return None
        task = self._waiting.popleft()
        self._attempts[task] += 1
        return task

    def failed(self, task: T, error: str) -> bool:
        """Put a task back to the front, or quarantine it after its last attempt; returns whether it is retried."""
        if self._attempts[task] < self._max_attempts:
            self._waiting.appendleft(task)
            return True
        self.set_aside[task] = error
        return False
