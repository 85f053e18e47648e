"""A training on Ray workers, with its restarts after lost workers.

    launch_training(job)     # in the driver: starts the workers, returns when they are done

The first rank that fails writes its traceback into ``logs/<stage>-rank<r>.log``; the driver
prints it last.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_shards.atomic_files import read_json
from launcher.cluster.gpu_faults import GpuFault, hold_gpus, read_faults
from launcher.cluster.reservation import release, reserved_by
from launcher.cluster.worker_pool import lack_of_memory
from launcher.runs.run_dir import RunDir
from launcher.runs.signals import Stopped, end_at_next_stop, handling_stop
from launcher.stages.jobs import TrainJob
from launcher.training.flight_recorder import how_to_read, written_since
from launcher.training.ray_group import RESERVATION_FILE, RankGroup
from launcher.training.ray_worker import run_worker

_EXTENSION_ERROR = re.compile(r"ExtensionError: (extension [^\n]*)")
_FULL_DISK = re.compile(r"[^\n]*(No space left on device|Disk quota exceeded)[^\n]*")


class WorkersFailed(RuntimeError):  # noqa: N818, the name is public
    """The training's workers failed; the message ends in the first rank's traceback."""


def release_workers(run_dir: RunDir) -> None:
    """Release the workers of a training after its driver was ended by another process, which calls this.

    Ray releases them only after its dashboard reports the end of the driver, and there may be no dashboard.
    """
    note = run_dir.logs / RESERVATION_FILE
    if reserved_by(note):
        run_dir.request_stop(read_json(run_dir.path / "lock.json")["attempt"])
    if note.exists():
        release(note)


def launch_training(job: TrainJob, *, report: Callable[[str], None] = lambda line: None) -> None:
    """Run a training on Ray workers; lost workers are replaced and resume from LATEST.

    This function decides about restarts, not Ray: after a lost worker a restart helps, an exception
    in our own code would only be raised again. SIGTERM to this process, Ctrl-C or a closed
    terminal make the workers write a checkpoint and stop.

    Raises:
        WorkersFailed: a worker raised, or workers were lost more often than allowed.
        Stopped: a stop was requested.
    """
    run_dir = RunDir(Path(job.run_dir))
    with RankGroup(job, report) as group:
        _run_until_done(job, run_dir, group, report)


def _run_until_done(job: TrainJob, run_dir: RunDir, group: RankGroup, report: Callable[[str], None]) -> None:
    max_failures = job.settings.training.max_failures
    faults: list[GpuFault] = []
    held: list[Any] = []  # handles that keep Ray from assigning failed GPUs again
    for num_losses in range(max_failures + 1):
        started = time.time()
        _remove_failures(run_dir.logs, job)  # what is there afterwards is of this start, whatever the clocks say
        try:
            with _stop_requests(run_dir, job.attempt, report):
                group.run(run_worker)
            # Also in the last step: the pipeline must not start the next one.
            if run_dir.stop_requested(job.attempt):
                raise Stopped(
                    f"training of stage {job.stage!r} stopped as requested; the same command resumes from "
                    "its checkpoint"
                )
            return
        except Stopped:
            raise
        except Exception as error:
            if run_dir.stop_requested(job.attempt):  # a tuning ended this trial and took its workers
                raise Stopped(f"training of stage {job.stage!r} was ended") from None
            if text := _first_traceback(run_dir.logs, job):
                raise WorkersFailed(f"training of stage {job.stage!r} failed\n{text}") from None
            if found := _EXTENSION_ERROR.search(str(error)):  # the same at every start
                raise WorkersFailed(f"training of stage {job.stage!r}, in a worker: {found[1]}") from None
            if found := _FULL_DISK.search(str(error)):  # where the traceback could not be written either
                raise WorkersFailed(f"training of stage {job.stage!r}, in a worker: {found[0].strip()}") from None
            if num_losses == max_failures:
                raise WorkersFailed(
                    f"training of stage {job.stage!r} lost workers {num_losses + 1} times (training.max_failures is "
                    f"{max_failures}); the checkpoints are kept, run again to resume. The last loss:\n{error}"
                    + _recorded(run_dir.logs, job, since=started)
                ) from None
            reason = f" for lack of memory ({found})" if (found := lack_of_memory(error)) else ""
            group.keep_standby = group.keep_standby and not reason
            report(
                f"  a worker was lost{reason}; starting again from the last checkpoint ({num_losses + 1} of "
                f"{max_failures})"
            )
            if line := _recorded(run_dir.logs, job, since=started):
                report(f"  {line.strip()}")
            found = read_faults(run_dir.logs.glob(f"{job.stage}-rank*.{job.attempt}.gpu-fault"))
            for fault in found:
                report(f"  {fault} failed and is excluded from now on: {fault.error.splitlines()[0]}")
            if found:
                faults += found
                group.give_up_places()  # a GPU can only be held by another if nothing holds it
                held += hold_gpus(found)
            _check_gpus_left(job, faults, num_held=len(held))


def _recorded(logs: Path, job: TrainJob, *, since: float) -> str:
    """A line on the collectives that ranks which hung have written, or nothing."""
    folders = written_since(logs, job.stage, since)
    return f"\n{how_to_read(folders)}" if folders else ""


def _check_gpus_left(job: TrainJob, faults: list[GpuFault], *, num_held: int) -> None:
    """Raise WorkersFailed if too few GPUs are left: Ray would wait for them without end."""
    import ray

    cluster = job.settings.cluster
    left, needed = int(ray.cluster_resources().get("GPU", 0)) - num_held, cluster.min_workers or cluster.num_workers
    if faults and left < needed:
        raise WorkersFailed(
            f"training of stage {job.stage!r} needs {needed} GPUs, {left} are left without "
            f"{', '.join(map(str, faults))}, whose hardware failed; the checkpoints are kept. Repair or exclude these "
            "GPUs (CUDA_VISIBLE_DEVICES) and run again, or set cluster.min_workers lower"
        )


@contextlib.contextmanager
def _stop_requests(run_dir: RunDir, attempt: int, report: Callable[[str], None]) -> Iterator[None]:
    """Pass SIGTERM, Ctrl-C or SIGHUP to the ranks as a request, once; a second signal ends this process."""

    def on_signal(number: int, frame: object) -> None:
        end_at_next_stop()
        run_dir.request_stop(attempt)
        report("  stop requested: writing a checkpoint first; Ctrl-C or SIGTERM again ends at once, without one")

    with handling_stop(on_signal):
        yield


def _remove_failures(logs: Path, job: TrainJob) -> None:
    """Remove what ranks of earlier starts have written about their ends; it stays in their logs."""
    for kind in ("failure", "gpu-fault"):
        for path in logs.glob(f"{job.stage}-rank*.{job.attempt}.{kind}"):
            path.unlink()


def _first_traceback(logs: Path, job: TrainJob) -> str:
    failures = list(logs.glob(f"{job.stage}-rank*.{job.attempt}.failure"))
    return min(failures, key=lambda path: path.stat().st_mtime).read_text(encoding="utf-8") if failures else ""
