"""Sharded generation: a queue of tasks over Ray workers, each task committed exactly once.

The driver hands tasks to workers; a worker reads its samples, writes their texts and
commits one file. A worker that dies is replaced and its task is run again. A task whose
file exists is never computed again. A task that always fails is quarantined and the others
continue. This is the driver's part; ``launcher/generation/generation_worker.py`` is the worker's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_shards.atomic_files import commit_json
from data_shards.generated_texts import (
    Task,
    close_output,
    list_tasks,
    open_output,
    reason_to_write_again,
)
from data_shards.index import rows_of_extension
from data_shards.manifest import manifest_shards, open_index, read_manifest, shard_qids
from launcher.cluster.worker_pool import WorkersError, run_on_workers
from launcher.generation.generation_worker import (
    GenerationError,
    GenerationWorker,
    TaskDone,
    check_attempt,
    describe_file,
)
from launcher.generation.task_lines import add_counts
from launcher.runs.exported import verify_model
from launcher.stages.jobs import GenerationJob

MOST_AHEAD = 8  # tasks whose samples a worker keeps in memory beside those of its own task


@dataclasses.dataclass
class Progress:
    """Progress of a generation; ``num_before`` questions were done before this attempt.

    ``busy_s`` and ``waited_s`` are summed over workers: time in tasks, and between tasks.
    """

    num_done: int
    num_total: int
    num_tokens: int = 0
    seconds: float = 0.0
    busy_s: float = 0.0
    waited_s: float = 0.0
    num_before: int = 0
    rows: int = 0
    rows_used: int = 0

    @property
    def rows_share(self) -> float:
        """The share of the engines' rows in which texts were written, over all steps."""
        return self.rows_used / self.rows if self.rows else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens a second since this attempt started, over all workers."""
        return self.num_tokens / self.seconds if self.seconds else 0.0

    @property
    def waiting_share(self) -> float:
        """The share of the workers' time that they waited for tasks."""
        return self.waited_s / (self.busy_s + self.waited_s) if self.waited_s else 0.0


def write_split_texts(
    job: GenerationJob,
    splits: Sequence[str],
    inputs: dict[str, Any],
    *,
    open_ray: Callable[[], None] = lambda: None,
    report: Callable[[Progress], None] = lambda progress: None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Write a stage's texts for some splits; only missing files are computed.

    Args:
        inputs: what the content depends on; a folder made with other inputs is refused.
        open_ray: called before the first task, if there is one to run.
        say: takes console lines about replaced workers.

    Returns:
        Every file with its counts and sha256, and the counts over all files.

    Raises:
        GenerationError: tasks were quarantined; the others' files are committed.
        RunError: the model is not the one that its run exported.
        ShardError: the folder holds output of other inputs.
    """
    open_output(job.output_dir, inputs)
    tasks = list_tasks(job.local_shards_dir(), splits, task_samples=job.settings.generation.task_samples)
    files = run_tasks(job, tasks, open_ray=open_ray, report=report, say=say)
    summary = add_counts(files.values())
    check_attempt(job)
    close_output(job.output_dir, files=files, summary=summary)
    return files, summary


def run_tasks(
    job: GenerationJob,
    tasks: Sequence[Task],
    *,
    open_ray: Callable[[], None] = lambda: None,
    report: Callable[[Progress], None] = lambda progress: None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, dict[str, Any]]:
    """Run all tasks without a file, and those whose file was altered; returns every file with its counts.

    Raises:
        GenerationError: tasks failed ``generation.max_attempts`` times; all others are done.
        RunError: the model is not the one that its run exported.
    """
    output_dir = Path(job.output_dir)
    missing = _missing(job, tasks, say)
    if missing:
        verify_model(job.model_dir)  # as every worker does; in the driver the error is one sentence
        open_ray()
    # Described by the workers that wrote them: hashing all files in the driver would take long.
    files: dict[Task, dict[str, Any]] = {}
    quarantined = (
        _run_missing(job, missing, sum(task.num_samples for task in tasks), files, report, say) if missing else {}
    )
    check_attempt(job)  # a worker's refusal to commit is no failed task
    commit_json(output_dir / "set_aside.json", {task.file_name: error for task, error in quarantined.items()})
    if quarantined:
        task, error = next(iter(quarantined.items()))
        raise GenerationError(
            f"{len(quarantined)} of {len(tasks)} tasks failed {job.settings.generation.max_attempts} times and were "
            f"quarantined ({output_dir / 'set_aside.json'} has their errors and questions); the other files are "
            "committed, run again to retry these tasks. "
            f"The first, task {task.file_name}:\n{error['error']}"
        )
    return {
        task.file_name: files.get(task) or describe_file(output_dir / task.file_name, task, job.stage) for task in tasks
    }


def _missing(job: GenerationJob, tasks: Sequence[Task], say: Callable[[str], None]) -> list[Task]:
    """The tasks without a file; a file that is not what was written is renamed, and its task is run again."""
    output_dir, missing, altered = Path(job.output_dir), [], []
    qids_of = _qids_by_task(job)
    for task in tasks:
        path = output_dir / task.file_name
        if not path.exists():
            missing.append(task)
        elif reason := reason_to_write_again(output_dir, task, qids_of(task)):
            path.replace(path.with_name(f"altered-{path.name}"))
            altered.append(f"{path} is not what was written ({reason})")
            missing.append(task)
    if altered:
        say(
            f"{altered[0]}{f'; so are {len(altered) - 1} others' if altered[1:] else ''}; kept as altered-*, their "
            f"{sum(task.num_samples for task in missing):,} questions are written again"
        )
    return missing


def expected_costs(shards_dir: str | Path, tasks: Sequence[Task]) -> dict[Task, int]:
    """The bytes of each task's questions, an estimate of its time: longer questions get longer texts."""
    folder = Path(shards_dir) / "text"
    shards = {shard.name: shard for shard in manifest_shards(read_manifest(folder))}
    sizes = {
        name: rows_of_extension(open_index(folder, shards[name]), "json")["size"]
        for name in {task.shard for task in tasks}
    }
    return {task: int(sizes[task.shard][task.start : task.start + task.num_samples].sum()) for task in tasks}


def _run_missing(
    job: GenerationJob,
    missing: Sequence[Task],
    num_total: int,
    files: dict[Task, dict[str, Any]],
    report: Callable[[Progress], None],
    say: Callable[[str], None],
) -> dict[Task, dict[str, Any]]:
    """Hand tasks to workers, the longest first, and record their files; returns the failed tasks with their errors."""
    generation = job.settings.generation
    num_before = num_total - sum(task.num_samples for task in missing)
    progress = Progress(num_before, num_total, num_before=num_before)
    started = time.perf_counter()

    def done(task: Task, result: TaskDone | None) -> None:
        if result is not None:
            files[task] = result.file
            progress.num_tokens += result.num_tokens
            progress.busy_s += result.busy_s
            progress.waited_s += result.waited_s
            progress.rows += result.rows
            progress.rows_used += result.rows_used
        progress.num_done += task.num_samples
        progress.seconds = time.perf_counter() - started
        report(progress)

    try:
        quarantined = run_on_workers(
            GenerationWorker,
            job,
            expected_costs(job.local_shards_dir(), missing),
            cluster=job.settings.cluster,
            gpus_per_worker=generation.gpus_per_worker,
            max_attempts=generation.max_attempts,
            hang_timeout_s=generation.hang_timeout_s,
            is_committed=lambda task: (Path(job.output_dir) / task.file_name).exists(),
            done=done,
            report=say,
            smaller=_with_smaller_batches,
            tasks_ahead=_tasks_ahead(missing, generation.batch_size),
        )
    except WorkersError as error:
        raise GenerationError(str(error)) from None
    qids_of = _qids_by_task(job)
    return {task: {"error": error, "qids": qids_of(task)} for task, error in quarantined.items()}


def _tasks_ahead(tasks: Sequence[Task], num_rows: int) -> int:
    """How many tasks keep an engine's rows in use while the longest text of a task is written, at most ``MOST_AHEAD``.

    It may be several times as long as the others.
    """
    return min(MOST_AHEAD, math.ceil(4 * num_rows * len(tasks) / sum(task.num_samples for task in tasks)))


def _with_smaller_batches(job: GenerationJob, halvings: int) -> GenerationJob:
    generation = job.settings.generation
    batch_size = max(1, generation.batch_size >> halvings)
    changed = generation.model_copy(update={"batch_size": batch_size})
    return dataclasses.replace(job, settings=job.settings.model_copy(update={"generation": changed}))


def _qids_by_task(job: GenerationJob) -> Callable[[Task], list[str]]:
    """A function that returns a task's question ids; a shard's index is read once for its tasks in a row."""
    folder = job.local_shards_dir() / "text"
    shards = {shard.name: shard for shard in manifest_shards(read_manifest(folder))}
    qids_of_shard = functools.lru_cache(1)(lambda name: shard_qids(folder, shards[name], "json"))
    return lambda task: qids_of_shard(task.shard)[task.start : task.start + task.num_samples]
