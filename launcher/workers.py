"""Tasks over Ray workers: each is handed out until it is done, or set aside after so many failures.

    set_aside = run_on_workers(Worker, job, costs, cluster=settings.cluster, stands=..., done=...)

A worker is an actor made of ``Worker(job)``; it has ``is_ready()`` and ``run(task)``. It commits what a
task makes by itself, so a worker that dies is replaced and its task is run again, and one that dies
between its commit and its answer is believed. What tasks are, this module does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from launcher.settings import Cluster
from launcher.task_queue import TaskQueue

# So many workers lost in their start count as one that failed by itself: nodes go, but memory may also never suffice.
LOST_STARTS = 3
T = TypeVar("T")


class WorkersError(RuntimeError):
    """Workers that never start; the message has the last one's error."""


def run_on_workers(
    worker_class: type, job: Any, costs: Mapping[T, float],
    *, cluster: Cluster, gpus_per_worker: float, max_attempts: int, stands: Callable[[T], bool], done: Callable[[T, Any], None],
) -> dict[T, str]:  # fmt: skip
    """Hand tasks to workers, the most expensive first; returns those that always failed, with their errors.

    Args:
        costs: what each task is expected to cost, in any unit.
        gpus_per_worker: GPUs a worker takes where ``cluster.use_gpu``.
        stands: whether a task's output is committed.
        done: told of each task that is, with what ``run`` returned, or None where its worker died after the commit.

    Raises:
        WorkersError: workers fail before their first task, ``max_attempts`` times in a row.
    """
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    actor_class = ray.remote(worker_class).options(
        num_cpus=cluster.cpus_per_worker, num_gpus=gpus_per_worker if cluster.use_gpu else 0,
        max_restarts=0, max_task_retries=0,
        scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=None),  # a tuning's trial has a group of its own
    )  # fmt: skip
    queue = TaskQueue(costs, max_attempts=max_attempts)
    starting: dict[Any, Any] = {}  # a worker takes its first task when it is there: those of nodes that join later, later
    running: dict[Any, tuple[T, Any]] = {}
    failed_starts = 0.0  # in a row; see LOST_STARTS

    def start_worker() -> None:
        worker = actor_class.remote(job)
        starting[worker.is_ready.remote()] = worker

    def start_next(worker: Any) -> None:
        if (task := queue.take()) is not None:
            running[worker.run.remote(task)] = (task, worker)

    for _ in range(min(cluster.num_workers, len(costs))):
        start_worker()
    while running or (queue and starting):
        (finished, *_), _ = ray.wait([*running, *starting], num_returns=1)
        if finished in starting:
            worker = starting.pop(finished)
            try:
                ray.get(finished)
            except ray.exceptions.RayActorError as error:
                failed_starts += 1 if error.actor_init_failed else 1 / LOST_STARTS
                if failed_starts >= max_attempts:
                    raise WorkersError(f"workers failed {failed_starts:g} times in a row before their first task; the last:\n{error}") from None
                start_worker()
            else:
                failed_starts = 0
                start_next(worker)
            continue
        task, worker = running.pop(finished)
        error, result = None, None
        try:
            result = ray.get(finished)
        except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError) as caught:
            error = caught
        if error is None or stands(task):  # it may die between commit and answer
            done(task, result)
        else:
            queue.failed(task, str(error))
        if isinstance(error, ray.exceptions.RayActorError) or (error is not None and cluster.use_gpu):  # CUDA errors stay in a process
            ray.kill(worker)  # one that only cannot be reached must not write beside its successor
            start_worker()
        else:
            start_next(worker)
    return queue.set_aside
