"""Which task is handed out next; a plain value that knows neither Ray nor files.

queue = TaskQueue({task: expected_cost, ...}, max_attempts=3)
task = queue.take()                  # the most expensive one; None when there is none
queue.failed(task, "out of memory")  # True: it will be handed out again, next
queue.set_aside                      # {task: error} of those that always failed
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class TaskQueue(Generic[T]):
    """Hands tasks out, the most expensive first, so that what is handed out last is short."""

    def __init__(self, costs: Mapping[T, float], *, max_attempts: int) -> None:
        self._waiting = deque(sorted(costs, key=lambda task: -costs[task]))
        self._attempts = dict.fromkeys(costs, 0)
        self._max_attempts = max_attempts
        self.set_aside: dict[T, str] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def take(self) -> T | None:
        """The next task, or None."""
        if not self._waiting:
            return None
        task = self._waiting.popleft()
        self._attempts[task] += 1
        return task

    def failed(self, task: T, error: str) -> bool:
        """Put a task back to the front, or aside after its last attempt; returns whether it comes again."""
        if self._attempts[task] < self._max_attempts:
            self._waiting.appendleft(task)
            return True
        self.set_aside[task] = error
        return False
