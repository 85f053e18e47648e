"""The order of tasks, without Ray and files.

queue = TaskQueue({task: expected_cost, ...}, max_attempts=3)
task = queue.take()                  # the most expensive one; None when there is none
later = queue.following(number=2)    # what a worker may prepare for meanwhile; they stay in the queue
queue.failed(task, "out of memory")  # True: it is the next task again
queue.set_aside                      # {task: error} of the quarantined tasks
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable, Mapping, Sequence
from itertools import islice
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

    def __contains__(self, task: T) -> bool:
        """Whether a task waits; a search of the whole queue."""
        return task in self._waiting

    def take(self, *, expected: Sequence[T] = (), others: Collection[T] = ()) -> T | None:
        """Take a task; None where the queue is empty.

        Args:
            expected: the tasks that this worker has prepared for; the first of them that waits is preferred.
            others: what other workers have prepared for, taken only where nothing else waits.
        """
        if not self._waiting:
            return None
        ahead = [task for task in expected if task in self] or self.following(others=others)
        task = ahead[0] if ahead else self._waiting[0]
        self._waiting.remove(task)
        self._attempts[task] += 1
        return task

    def following(self, *, others: Collection[T] = (), number: int = 1) -> tuple[T, ...]:
        """The first tasks that wait and are none of ``others``, at most ``number``."""
        return tuple(islice((task for task in self._waiting if task not in others), number))

    def has_failed(self, task: T) -> bool:
        """Whether a task that was taken had failed before."""
        return self._attempts[task] > 1

    def failed(self, task: T, error: str) -> bool:
        """Put a task back to the front, or quarantine it after its last attempt; returns whether it is retried."""
        if self._attempts[task] < self._max_attempts:
            self._waiting.appendleft(task)
            return True
        self.set_aside[task] = error
        return False
