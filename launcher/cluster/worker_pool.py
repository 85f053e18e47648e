"""Tasks over Ray workers: each is handed out until it is done, or set aside after so many failures.

    set_aside = run_on_workers(GenerationWorker, job, costs, cluster=settings.cluster, stands=..., done=...)

A worker is a ``Worker(job)`` in a process of its own; it has ``is_ready()`` and ``run(task)``, and calls
``progress()`` while it runs. It commits what a task makes by itself, so a worker that dies or makes no
progress is replaced and its task is run again, and one that dies between its commit and its answer is
believed. What tasks are, this module does not know.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import psutil

from launcher.cluster.task_queue import TaskQueue
from launcher.config.settings import Cluster
from launcher.runs.hang_guard import HangGuard

# So many workers lost in their start count as one that failed by itself: nodes go, but memory may also never suffice.
LOST_STARTS = 3
LOOK_EVERY_S = 10.0  # at workers' progress, at most
_BYTES_OF_PROGRESS = 1 << 20  # a model or a tar that is still arriving is progress as well
T = TypeVar("T")


class WorkersError(RuntimeError):
    """Workers that never start; the message has the last one's error."""


class NoProgress(RuntimeError):  # noqa: N818 (a public name)
    """A worker was ended because it made no progress; the message names its process."""


class Worker:
    """What runs tasks, made of a job; its ``progress`` is set by the process it runs in."""

    @staticmethod
    def progress() -> None:
        """To be called whenever a part of a task is done: a token, a picture."""

    def is_ready(self) -> bool:
        """True once everything is loaded."""
        return True


class WorkerProcess:
    """The actor of a worker; its progress can be asked for while it runs.

    The worker is made by ``start`` and not with the actor, so that a process that is there and blocked in
    its start is told from one whose node is not there yet.
    """

    def __init__(self, worker_class: type, job: Any, hang_timeout_s: float) -> None:
        self._make = lambda: worker_class(job)
        self._num_parts, self._guarded_at = 0, 0.0
        self._guard_every_s = min(
            1.0, hang_timeout_s / 10
        )  # a token may take a millisecond, starting the guard's clock some of its own
        self._guard = HangGuard(hang_timeout_s, end=False)
        self._name = f"process {os.getpid()} on {socket.gethostname()}"

    def start(self) -> str:
        """Load what tasks need; returns which process this is."""
        self._guard.progress()
        self._worker = self._make()
        self._worker.progress = self._progress
        self._worker.is_ready()
        self._guard.close()
        return self._name

    def run(self, task: Any) -> Any:
        """Run a task; returns what its worker returns."""
        self._guard.progress()
        try:
            return self._worker.run(task)
        finally:
            self._guard.close()

    def progress_of(self) -> tuple[int, str]:
        """A number that grows while there is progress, and which process this is."""
        return self._num_parts + _bytes_moved() // _BYTES_OF_PROGRESS, self._name

    def _progress(self) -> None:
        self._num_parts += 1
        if (now := time.monotonic()) - self._guarded_at > self._guard_every_s:
            self._guarded_at = now
            self._guard.progress()


def _bytes_moved() -> int:
    """Bytes that this process has read from disks and written anywhere.

    They include a model or tar that is being downloaded, but no reads from sockets or /proc.
    """
    try:
        io = psutil.Process().io_counters()
    except (AttributeError, OSError, RuntimeError, ValueError, psutil.Error):  # not available on this system
        return 0
    return io.read_bytes + io.write_chars


@dataclasses.dataclass(eq=False)
class _Watched:
    """A worker that is starting (no task) or in a task, and for how long it has made no progress."""

    actor: Any
    task: Any = None
    name: str = ""
    progress_of: int | None = None  # None until its process is known to be there
    asked: Any = None
    silent_s: float = 0.0


class _Watch:
    """Finds workers without progress, by the clock of this process.

    A worker that is stopped, or that holds Python's global lock, cannot report by itself.
    """

    def __init__(self, timeout_s: float) -> None:
        self.every_s = min(LOOK_EVERY_S, timeout_s / 10)
        self._timeout_s = timeout_s
        self._looked_at = time.monotonic()

    def hung(self, workers: Iterable[_Watched]) -> list[_Watched]:
        """Those that have made no progress for the time allowed; looks again only after a while."""
        elapsed = time.monotonic() - self._looked_at
        if elapsed < self.every_s:
            return []
        self._looked_at += elapsed
        hung = []
        for worker in workers:
            if self._has_moved(worker):
                worker.silent_s = 0.0
            elif worker.progress_of is not None:
                worker.silent_s += min(elapsed, 2 * self.every_s)  # more only where this process itself was stopped
            if worker.silent_s > self._timeout_s + 2 * self.every_s:  # an answer is as old as two looks
                hung.append(worker)
        return hung

    def _has_moved(self, worker: _Watched) -> bool:
        import ray

        before = worker.progress_of
        if worker.asked is not None:
            if not ray.wait([worker.asked], timeout=0)[0]:
                return False
            try:
                worker.progress_of, worker.name = ray.get(worker.asked)
            except ray.exceptions.RayActorError:  # its task's answer says the same, if it is gone
                worker.asked = None
                return False
        worker.asked = worker.actor.progress_of.options(concurrency_group="watch").remote()
        return worker.progress_of != before


def run_on_workers(
    worker_class: type,
    job: Any,
    costs: Mapping[T, float],
    *,
    cluster: Cluster,
    gpus_per_worker: float,
    max_attempts: int,
    hang_timeout_s: float,
    stands: Callable[[T], bool],
    done: Callable[[T, Any], None],
    report: Callable[[str], None] = lambda line: None,
) -> dict[T, str]:
    """Hand tasks to workers, the most expensive first; returns those that always failed, with their errors.

    Args:
        costs: what each task is expected to cost, in any unit.
        gpus_per_worker: GPUs a worker takes where ``cluster.use_gpu``.
        hang_timeout_s: a worker that makes no progress for so long is replaced, its task has failed.
        stands: whether a task's output is committed.
        done: told of each task that is, with what ``run`` returned, or None where its worker died after the commit.
        report: told of each worker that is replaced because it made no progress.

    Raises:
        WorkersError: workers fail before their first task, ``max_attempts`` times in a row.
    """
    import ray

    actor_class = _actor_class(worker_class, cluster, gpus_per_worker)
    queue, watch = TaskQueue(costs, max_attempts=max_attempts), _Watch(hang_timeout_s)
    waiting: dict[
        Any, _Watched
    ] = {}  # a worker takes its first task when it is there: those of nodes that join later, later
    failed_starts = 0.0  # in a row; see LOST_STARTS

    def start_worker() -> None:
        actor = actor_class.remote(worker_class, job, hang_timeout_s)
        waiting[actor.start.remote()] = _Watched(actor)

    def start_next(actor: Any, name: str) -> None:
        if (task := queue.take()) is not None:
            waiting[actor.run.remote(task)] = _Watched(actor, task, name, progress_of=-1)

    def after_start(worker: _Watched, error: Exception | None, name: str) -> None:
        nonlocal failed_starts
        if error is None:
            failed_starts = 0
            start_next(worker.actor, name)
            return
        failed_starts += 1 / LOST_STARTS if _is_lost(error) else 1
        ray.kill(worker.actor)
        if failed_starts >= max_attempts:
            raise WorkersError(
                f"workers failed {failed_starts:g} times in a row before their first task; the last:\n{error}"
            ) from None
        start_worker()

    def after_task(worker: _Watched, error: Exception | None, result: Any) -> None:
        if error is None or stands(worker.task):  # it may die between commit and answer
            done(worker.task, result)
        else:
            queue.failed(worker.task, str(error))
        if isinstance(error, (ray.exceptions.RayActorError, NoProgress)) or (
            error is not None and cluster.use_gpu
        ):  # CUDA errors stay in a process
            ray.kill(worker.actor)  # one that only cannot be reached must not write beside its successor
            start_worker()
        else:
            start_next(worker.actor, worker.name)

    def settle(answer: Any, error: Exception | None = None) -> None:
        worker, result = waiting.pop(answer), None
        try:
            result = ray.get(answer) if error is None else None
        except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError) as caught:
            error = caught
        if worker.task is None:
            after_start(worker, error, result)
        else:
            after_task(worker, error, result)

    for _ in range(min(cluster.num_workers, len(costs))):
        start_worker()
    while (queue and waiting) or any(worker.task is not None for worker in waiting.values()):
        for answer in ray.wait(list(waiting), num_returns=1, timeout=watch.every_s)[0]:
            settle(answer)
        hung = watch.hung(waiting.values())
        for answer in [answer for answer, worker in waiting.items() if worker in hung]:
            error = NoProgress(
                f"{waiting[answer].name} made no progress for {hang_timeout_s:g} s (generation.hang_timeout_s) and "
                "was ended; "
                "what its threads were at stands in Ray's log of it"
            )
            report(f"  a worker is replaced: {error}")
            settle(answer, error)
    return queue.set_aside


def _actor_class(worker_class: type, cluster: Cluster, gpus_per_worker: float) -> Any:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    named = type(worker_class.__name__, (WorkerProcess,), {})  # the name by which a person finds its processes
    return ray.remote(
        num_cpus=cluster.cpus_per_worker,
        num_gpus=gpus_per_worker if cluster.use_gpu else 0,
        max_restarts=0,
        max_task_retries=0,
        concurrency_groups={"watch": 1},
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            placement_group=None
        ),  # a tuning's trial has a group of its own
    )(named)


def _is_lost(error: Exception) -> bool:
    """Whether a process ended, rather than its worker's own code failing or blocking."""
    import ray

    return isinstance(error, ray.exceptions.RayActorError) and not error.actor_init_failed
