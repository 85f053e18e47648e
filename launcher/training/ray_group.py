"""The processes of a training's ranks on Ray, and others that stand by to take the places of lost ones."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from launcher.cluster.progress_watch import ProgressWatch, Watched
from launcher.cluster.reservation import Place, PlacesLost, Reservation
from launcher.runs.run_dir import RunDir
from launcher.stages.jobs import TrainJob
from launcher.training.ray_worker import Prepared, RankPlace, RayTrainWorker

RESERVATION_FILE = "placement_group"  # in the run's logs: what Ray has reserved for the running training
STANDBY_AFTER_S = 15.0  # of training: a short one is not slowed by the start of more processes
GROW_AFTER_S = 60.0  # of training with fewer workers: to start again with more computes some steps twice
MAX_PLACES_LOST = 20  # before any rank ran, in one training
START_TIMEOUT_S = 300.0  # of the processes
SAY_EVERY_S = 30.0
STOP_WITHIN_S = 10.0  # for ranks that still read a model or a checkpoint, to notice the request themselves
_MORE_ERRORS_S = 0.5  # after the first error: the end of the process that has caused it may be noticed later
_ANSWER_S = 5.0  # for a process to say that it is there, or to end
_LOOK_EVERY_S = 0.5
LOOPBACK = "127.0.0.1"


class StopRequested(RuntimeError):  # noqa: N818, as the next
    """A stop was requested before the training began; nothing of it is lost."""


class RanksFailed(RuntimeError):  # noqa: N818, as launch.py's
    """Ranks raised an error or were lost; the message has the error of each."""


class StandbyWorker(RayTrainWorker):
    """One that takes the place of a lost one; the name is for lists of processes."""


@dataclasses.dataclass
class _Process:
    """The actor of a process, and its answer once it has loaded what a training needs."""

    actor: Any
    ready: Any


class RankGroup:
    """Runs the ranks of a training, again after losses, and ends all of its processes with its block.

    Lost processes are replaced by ones that stand by on the same nodes, with everything imported. What runs is an actor
    a rank and no Ray Train: its restart takes a new controller and new processes, which import torch first.
    """

    def __init__(self, job: TrainJob, report: Callable[[str], None]) -> None:
        self._job, self._report, self._cluster = job, report, job.settings.cluster
        self._run_dir = RunDir(Path(job.run_dir))
        self._note = self._run_dir.logs / RESERVATION_FILE
        self._reservation: Reservation | None = None
        self._standby: dict[Place, _Process] = {}
        self._last: dict[Place, Prepared] = {}  # the last process at each place
        self._num_places_lost = 0
        self.keep_standby = True

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.give_up_places()

    def give_up_places(self) -> None:
        """Give back what is reserved; the next run reserves anew."""
        reservation, self._reservation = self._reservation, None
        self._standby.clear()
        self._last.clear()
        if reservation is not None:
            reservation.close()

    def run(self, work: Callable[..., None]) -> None:
        """Call ``work(job, rank=, world_size=, gpu_index=)`` in every rank, and return when all have returned.

        With ``cluster.min_workers`` it starts again with more ranks where there is room for them.

        Raises:
            RanksFailed: a rank raised an error or was lost; all have been ended.
            StopRequested: a stop of this attempt was requested and the ranks had not begun to train.
        """
        while True:
            processes: dict[Place, _Process] = {}
            try:
                if self._reservation is None:
                    self._reservation = Reservation(self._cluster, self._note)
                for place in self._reservation.wait(self._report, self._check_stop):
                    processes[place] = self._standing_by(place) or self._start(RayTrainWorker, place)
                self._forget_standby()
                if self._work(work, processes):
                    _end_gently(processes)
                    return
                self._report("  there is room for more workers; starting again with them from the last checkpoint")
            except PlacesLost:  # before any rank ran, so no attempt of the training was lost
                self._replace_places()
            finally:
                _end(processes)

    def _replace_places(self) -> None:
        """Reserve anew where the places were given back; those of a lost node Ray replaces itself."""
        self._num_places_lost += 1
        if self._num_places_lost > MAX_PLACES_LOST:
            raise RanksFailed(
                f"places for workers were lost {self._num_places_lost} times before any of them ran; see with `ray "
                "status` which nodes come and go, or whether another program gives the places back"
            )
        self.give_up_places()

    def _start(self, kind: type, place: Place) -> _Process:
        """Start a process. The place holds the processors; its first process learns which GPU it holds."""
        import ray

        assert self._reservation is not None
        use_gpu = bool(self._cluster.use_gpu)
        actor_class: Any = cast(Any, ray.remote)(
            num_cpus=0,
            num_gpus=1 if use_gpu and place not in self._last else 0,
            max_restarts=0,
            max_task_retries=0,
            concurrency_groups={"watch": 1},
            scheduling_strategy=self._reservation.strategy(place),
        )(kind)
        actor = actor_class.remote()
        return _Process(actor, actor.prepare.remote(use_gpu=use_gpu, num_threads=self._cluster.cpus_per_worker))

    def _standing_by(self, place: Place) -> _Process | None:
        """Take the process that stands by at a place, if it still lives."""
        import ray
        from ray.exceptions import RayError

        if (process := self._standby.pop(place, None)) is not None:
            with contextlib.suppress(RayError):
                if ray.wait([process.ready], timeout=0)[0]:
                    ray.get(process.actor.progress_of.options(concurrency_group="watch").remote(), timeout=_ANSWER_S)
                return process
            _end({place: process})
        return None

    def _forget_standby(self) -> None:
        _end(self._standby)
        self._standby.clear()

    def _work(self, work: Callable[..., None], processes: dict[Place, _Process]) -> bool:
        """Run all ranks to their ends; returns False where there is room for more of them."""
        import ray

        prepared = self._prepared(processes)
        first = next(iter(processes))
        address = LOOPBACK if self._cluster.address == "local" else prepared[first].address
        port = cast(int, ray.get(processes[first].actor.free_port.remote(address), timeout=START_TIMEOUT_S))
        waiting = {}
        for place, rank in rank_places(prepared, address, port).items():
            answer = processes[place].actor.run.remote(work, self._job, rank, self._last.get(place))
            # It has answered, so a silence counts from now on.
            waiting[answer] = Watched(processes[place].actor, task=rank.rank, name=prepared[place].name, progress_of=0)
        self._last.update(prepared)
        watch, started = ProgressWatch(self._job.settings.training.hang_timeout_s), time.monotonic()
        lines = self._journal_size()
        stop_at: float | None = None
        while waiting:
            self._settle(waiting, ray.wait(list(waiting), timeout=min(_LOOK_EVERY_S, watch.every_s))[0])
            if hung := watch.hung(waiting.values()):
                limit = f"for {self._job.settings.training.hang_timeout_s:g} s (training.hang_timeout_s)"
                raise RanksFailed(f"rank {hung[0].task} ({hung[0].name}) does not answer {limit} and was ended")
            trained_s, has_to_stop = time.monotonic() - started, self._has_to_stop()
            if has_to_stop:
                stop_at = stop_at or trained_s + STOP_WITHIN_S
                # Its first line says that all ranks have opened what they need.
                if trained_s > stop_at and self._journal_size() == lines:
                    self._check_stop()
            if self.keep_standby and not self._standby and trained_s > STANDBY_AFTER_S:
                self._standby = {place: self._start(StandbyWorker, place) for place in processes}
            if trained_s > GROW_AFTER_S and not has_to_stop and self._has_more_room(len(processes)):
                return False
        return True

    def _prepared(self, processes: dict[Place, _Process]) -> dict[Place, Prepared]:
        """Wait until all processes have loaded what a training needs."""
        import ray
        from ray.exceptions import RayError

        started = said = time.monotonic()
        starting = {process.ready: place for place, process in processes.items()}
        found: dict[Place, Prepared] = {}
        while starting:
            self._check_stop()
            for answer in ray.wait(list(starting), timeout=_LOOK_EVERY_S)[0]:
                place = starting.pop(answer)
                try:
                    found[place] = ray.get(answer)
                except RayError as error:
                    if place not in self._reserved():
                        raise PlacesLost(f"node {place.node} was lost") from None
                    raise RanksFailed(f"a worker could not start: {error}") from None
                if found[place].node != place.node:
                    raise PlacesLost(f"node {place.node} was lost")
                if place in self._last:  # only the first process at a place was told its GPU
                    found[place] = dataclasses.replace(found[place], gpus=self._last[place].gpus)
            now = time.monotonic()
            if starting and not set(starting.values()) <= self._reserved():
                raise PlacesLost("a node was lost while workers started")
            if now - started > START_TIMEOUT_S:
                raise RanksFailed(f"{len(starting)} of {len(processes)} workers did not start in {START_TIMEOUT_S:g} s")
            if now - said > SAY_EVERY_S:
                said = now
                self._report(f"  waiting for {len(starting)} of {len(processes)} workers to start")
        return {place: found[place] for place in processes}

    def _settle(self, waiting: dict[Any, Watched], answers: list[Any]) -> None:
        """Take the answers of ranks that have ended; raises RanksFailed if one has failed."""
        import ray
        from ray.exceptions import RayError

        failed: dict[int, str] = {}
        while answers:
            for answer in answers:
                rank = waiting.pop(answer).task
                try:
                    ray.get(answer)
                except RayError as error:
                    failed[rank] = str(error)
            more = bool(failed and waiting)
            answers = ray.wait(list(waiting), num_returns=1, timeout=_MORE_ERRORS_S)[0] if more else []
        if failed:
            raise RanksFailed("\n".join(f"rank {rank}: {error}" for rank, error in sorted(failed.items())))

    def _has_to_stop(self) -> bool:
        return self._run_dir.stop_requested(self._job.attempt)

    def _check_stop(self) -> None:
        """Raise StopRequested if a stop was requested."""
        if self._has_to_stop():
            raise StopRequested(f"stage {self._job.stage!r} had not begun to train")

    def _journal_size(self) -> int:
        with contextlib.suppress(FileNotFoundError), open(self._run_dir.journal(self._job.stage), "rb") as file:
            return file.seek(0, 2)  # opened, so that another node's lines are seen on NFS
        return 0

    def _reserved(self) -> set[Place]:
        assert self._reservation is not None
        return set(self._reservation.places())

    def _has_more_room(self, num_workers: int) -> bool:
        assert self._reservation is not None
        return num_workers < self._cluster.num_workers and len(self._reservation.places()) > num_workers


def rank_places(prepared: dict[Place, Prepared], address: str, port: int) -> dict[Place, RankPlace]:
    """Number the ranks, node by node in the order of the places.

    Args:
        prepared: the process at each place.
        address: of rank 0.
        port: on which rank 0 opens torch's store.
    """
    nodes: dict[str, list[Place]] = {}
    for place in prepared:
        nodes.setdefault(place.node, []).append(place)
    found: dict[Place, RankPlace] = {}
    for node_rank, places in enumerate(nodes.values()):
        gpus = [gpu for place in places for gpu in prepared[place].gpus]
        for local_rank, place in enumerate(places):
            found[place] = RankPlace(
                rank=len(found),
                world_size=len(prepared),
                local_rank=local_rank,
                local_world_size=len(places),
                node_rank=node_rank,
                address=address,
                port=port,
                gpus=gpus,
            )
    return found


def _end(processes: dict[Place, _Process]) -> None:
    """End processes at once."""
    import ray

    for process in processes.values():
        ray.kill(process.actor)


def _end_gently(processes: dict[Place, _Process]) -> None:
    """Let processes that are done run what they run at their ends."""
    import ray

    ends = [process.actor.__ray_terminate__.remote() for process in processes.values()]
    ray.wait(ends, num_returns=len(ends), timeout=_ANSWER_S)
