"""Tasks on Ray workers: each task is run until it succeeds, or quarantined after ``max_attempts`` failures.

    set_aside = run_on_workers(GenerationWorker, job, costs, cluster=settings.cluster, is_committed=..., done=...)

A worker is a ``Worker(job)`` in a process of its own; it has ``is_ready()`` and ``run(task)``, and calls
``progress()`` while it runs. It commits a task's output itself. A worker that dies or makes no progress is
replaced, and its task is run again. If it dies after its commit and before its answer, the task is done.
This module does not depend on the kind of tasks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Generic, TypeVar, cast

from launcher.cluster.progress_watch import ProgressWatch, Watched
from launcher.cluster.task_queue import TaskQueue
from launcher.cluster.worker_process import WorkerProcess
from launcher.config.settings import Cluster
from mmcot.errors import OperationError

# This many workers that are lost while they start count as one failed start: the cause may be a lost node, or too
# little memory.
LOST_STARTS = 3
# In Ray's OutOfMemoryError and the errors that contain it, and in torch's.
_MEMORY = re.compile(r"low on memory|OutOfMemory|out of memory")
T = TypeVar("T", bound=Hashable)


class WorkersError(OperationError):
    """No worker could start; the message contains the last one's error."""


class NoProgress(RuntimeError):  # noqa: N818 (a public name)
    """A worker was ended because it made no progress; the message names its process."""


class Worker:
    """The base of workers; a worker is made from a job, and its process sets its ``progress``."""

    # The tasks that probably come after the one that runs, set before each; a worker may prepare for them, or begin.
    following: tuple[Any, ...] = ()

    @staticmethod
    def progress() -> None:
        """Report progress; called whenever a part of a task is done, such as a token or a picture."""

    def is_ready(self) -> bool:
        """Return True once everything is loaded."""
        return True


def run_on_workers(
    worker_class: type,
    job: Any,
    costs: Mapping[T, float],
    *,
    cluster: Cluster,
    gpus_per_worker: float,
    max_attempts: int,
    hang_timeout_s: float,
    is_committed: Callable[[T], bool],
    done: Callable[[T, Any], None],
    report: Callable[[str], None] = lambda line: None,
    smaller: Callable[[Any, int], Any] | None = None,
    tasks_ahead: int = 1,
) -> dict[T, str]:
    """Hand tasks to workers, the most expensive first; returns those that failed at every attempt, with their errors.

    Args:
        costs: what each task is expected to cost, in any unit.
        gpus_per_worker: GPUs a worker takes where ``cluster.use_gpu``.
        hang_timeout_s: a worker without progress for this long is replaced, and its task has failed.
        is_committed: whether a task's output is committed.
        done: called with each committed task and what ``run`` returned, or None where the worker died after the commit.
        report: called with a line on each worker that is replaced because it made no progress, or ended for lack of
            memory.
        smaller: the job with its batches halved so many times; later workers get one halving more whenever a worker
            was ended for lack of memory. None: the job has no batches.
        tasks_ahead: how many tasks a worker may prepare for while it runs one.

    Raises:
        WorkersError: workers fail before their first task, ``max_attempts`` times in a row.
    """
    actor_class = _actor_class(worker_class, cluster, gpus_per_worker)
    pool = _Pool(
        lambda halvings: actor_class.remote(worker_class, smaller(job, halvings) if smaller else job, hang_timeout_s),
        TaskQueue(costs, max_attempts=max_attempts),
        max_attempts=max_attempts,
        hang_timeout_s=hang_timeout_s,
        use_gpu=bool(cluster.use_gpu),
        is_committed=is_committed,
        done=done,
        report=report,
        tasks_ahead=tasks_ahead,
        **({"next_workers": "later ones have batches half as large"} if smaller else {}),
    )
    return pool.run(min(cluster.num_workers, len(costs)))


class _Pool(Generic[T]):
    """Workers, what each of them does, and the queue of their tasks; arguments as for ``run_on_workers``."""

    def __init__(
        self,
        make_actor: Callable[[int], Any],
        queue: TaskQueue[T],
        *,
        max_attempts: int,
        hang_timeout_s: float,
        use_gpu: bool,
        is_committed: Callable[[T], bool],
        done: Callable[[T, Any], None],
        report: Callable[[str], None],
        tasks_ahead: int = 1,
        next_workers: str = "another one tries its task again",
    ) -> None:
        self._make_actor, self._queue = make_actor, queue
        self._max_attempts, self._hang_timeout_s, self._use_gpu = max_attempts, hang_timeout_s, use_gpu
        self._is_committed, self._done, self._report = is_committed, done, report
        self._tasks_ahead = tasks_ahead
        self._next_workers = next_workers  # what they do after a lack of memory, for a message
        self._watch = ProgressWatch(hang_timeout_s)
        # By the answer that is awaited. A worker takes its first task once it has started, so workers of nodes that
        # join later take theirs later.
        self._waiting: dict[Any, Watched] = {}
        self._failed_starts = 0.0  # in a row; see LOST_STARTS
        self._halvings = 0  # of the batches of workers that are still to start

    def run(self, num_workers: int) -> dict[T, str]:
        """Start the workers and run all tasks; returns the quarantined ones with their errors."""
        import ray

        for _ in range(num_workers):
            self._start_worker()
        while (self._queue and self._waiting) or any(worker.task is not None for worker in self._waiting.values()):
            for answer in ray.wait(list(self._waiting), num_returns=1, timeout=self._watch.every_s)[0]:
                self._settle(answer)
            hung = self._watch.hung(self._waiting.values())
            for answer in [answer for answer, worker in self._waiting.items() if worker in hung]:
                error = NoProgress(
                    f"{self._waiting[answer].name} made no progress for {self._hang_timeout_s:g} s "
                    "(generation.hang_timeout_s) and was ended; the stacks of its threads are in its Ray log"
                )
                self._report(f"  a worker is replaced: {error}")
                self._settle(answer, error)
        return self._queue.set_aside

    def _start_worker(self) -> None:
        actor = self._make_actor(self._halvings)
        self._waiting[actor.start.remote()] = Watched(actor)

    def _start_next_task(self, actor: Any, name: str, expected: Sequence[T] = ()) -> None:
        others = {task for worker in self._waiting.values() for task in worker.following}
        if (task := self._queue.take(expected=expected, others=others)) is not None:
            # A process that dies while it prepares for another task is charged to the one that it runs; at its next
            # attempts nothing is prepared for, so that the task fails by itself alone.
            is_alone = self._queue.has_failed(task)
            following = () if is_alone else self._following(expected, others)
            answer = actor.run.remote(task, following)
            self._waiting[answer] = Watched(actor, task, name, following, progress_of=-1)

    def _following(self, expected: Sequence[T], others: set[T]) -> tuple[T, ...]:
        """What a worker may prepare for: what it has prepared for and still waits, then what no other prepares for."""
        prepared = [task for task in expected if task in self._queue]
        others = others.union(prepared)
        return (*prepared, *self._queue.following(others=others, number=self._tasks_ahead))[: self._tasks_ahead]

    def _settle(self, answer: Any, error: Exception | None = None) -> None:
        """Handle a worker's answer, or the error with which it is replaced."""
        import ray
        from ray.exceptions import RayError

        worker, result = self._waiting.pop(answer), None
        try:
            result = cast(Any, ray.get(answer) if error is None else None)
        except RayError as caught:
            error = caught
        if error is not None and (reason := lack_of_memory(error)):
            self._halvings += 1
            self._report(f"  a worker was ended for lack of memory ({reason}); {self._next_workers}")
        if worker.task is None:
            self._after_start(worker, error, result)
        else:
            self._after_task(worker, error, result)

    def _after_start(self, worker: Watched, error: Exception | None, name: Any) -> None:
        import ray

        if error is None:
            self._failed_starts = 0.0
            self._start_next_task(worker.actor, name)
            return
        self._failed_starts += 1 / LOST_STARTS if _is_lost(error) else 1
        ray.kill(worker.actor)
        if self._failed_starts >= self._max_attempts:
            raise WorkersError(
                f"workers failed {self._failed_starts:g} times in a row before their first task; the last:\n{error}"
            ) from None
        self._start_worker()

    def _after_task(self, worker: Watched, error: Exception | None, result: Any) -> None:
        import ray

        if error is None or self._is_committed(worker.task):  # a worker may die between commit and answer
            self._done(worker.task, result)
        else:
            self._queue.failed(worker.task, str(error))
        # After a CUDA error a process cannot use its GPU any more.
        if error is not None and (_is_lost(error) or isinstance(error, NoProgress) or self._use_gpu):
            ray.kill(worker.actor)  # it may only be unreachable, and must not write at the same time as its successor
            self._start_worker()
        else:
            self._start_next_task(worker.actor, worker.name, worker.following)


def _actor_class(worker_class: type, cluster: Cluster, gpus_per_worker: float) -> Any:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    named = type(worker_class.__name__, (WorkerProcess,), {})  # the name of the processes in lists of processes
    # A tuning's trial has a placement group of its own, which holds the trial's processes alone.
    no_group = PlacementGroupSchedulingStrategy(placement_group=None)  # pyright: ignore[reportArgumentType] (allowed)
    return cast(Any, ray.remote)(
        num_cpus=cluster.cpus_per_worker,
        num_gpus=gpus_per_worker if cluster.use_gpu else 0,
        max_restarts=0,
        max_task_retries=0,
        concurrency_groups={"watch": 1},
        scheduling_strategy=no_group,
    )(named)


def _is_lost(error: Exception) -> bool:
    """Whether a process ended, rather than its worker's own code failing or blocking."""
    from ray.exceptions import RayActorError, RayError, RayTaskError

    if isinstance(error, RayActorError):
        return not error.actor_init_failed
    return isinstance(error, RayError) and not isinstance(error, RayTaskError)


def lack_of_memory(error: Exception) -> str | None:
    """Ray's sentence on a process that its memory monitor has ended, or torch's on a GPU; None for any other error."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if _MEMORY.search(line)), None)
