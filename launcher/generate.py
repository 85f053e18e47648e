"""Sharded generation: a queue of tasks over Ray workers, each task committed exactly once.

The driver hands tasks to workers; a worker reads its samples, writes their texts and
commits one file. A worker that dies is replaced and its task is run again; a task whose
file stands is never computed again. What a file holds depends on the model, the data and
the task alone: batches never cross a task.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_shards.rationales import Task, read_lines, write_task
from data_shards.storage import sha256_of_file
from launcher.jobs import GenerationJob
from launcher.run_dir import RunDir


class GenerationError(RuntimeError):
    """Generation could not complete; the message names the task and the reason."""


@dataclasses.dataclass
class Progress:
    """How far a generation is."""

    num_done: int
    num_total: int
    num_tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds if self.seconds else 0.0


class GenerationWorker:
    """Holds one replica of the model and runs tasks; lives in a Ray actor."""

    def __init__(self, job: GenerationJob) -> None:
        import torch  # heavy imports belong to the worker, not to the driver's queue
        from transformers import AutoTokenizer

        from mmcot.model import T5ForMultimodalGeneration

        torch.set_num_threads(job.settings.cluster.cpus_per_worker)
        self.job = job
        self.tokenizer = AutoTokenizer.from_pretrained(job.model_dir)
        self.model = T5ForMultimodalGeneration.from_pretrained(job.model_dir).eval()
        if job.settings.cluster.use_gpu:
            self.model.to("cuda")
        self.samples: dict[str, Any] = {}

    def run(self, task: Task) -> int:
        """Run and commit a task; returns the tokens it wrote."""
        from launcher.samples import open_stage
        from mmcot.generation import generate_texts

        job, spec = self.job, getattr(self.job.settings, self.job.stage)
        if task.split not in self.samples:
            self.samples[task.split] = open_stage(
                job.settings, job.stage, task.split,
                shards_dir=job.shards_dir, tokenizer=self.tokenizer, rationales_dir=job.rationales_dir,
            )  # fmt: skip
        samples = self.samples[task.split]
        numbers = samples.reader.samples_of_shard(task.shard)[task.start : task.start + task.num_samples]
        if samples.is_remote:
            samples.prefetch(numbers)
        texts = generate_texts(
            self.model,
            self.tokenizer,
            [samples.encode(number).source_ids for number in numbers],
            [samples.reader.features(number) for number in numbers],
            feature_shape=samples.reader.feature_shape,
            max_new_tokens=spec.max_target_tokens,
            batch_size=job.settings.generation.batch_size,
        )
        lines = [
            {"qid": samples.reader.qid(number), job.stage: text.text, "num_tokens": text.num_tokens, "finish": text.finish}
            for number, text in zip(numbers, texts, strict=True)
        ]
        if job.run_dir is not None and job.attempt is not None:
            RunDir(Path(job.run_dir)).check_attempt(job.attempt)
        write_task(job.output_dir, task, lines)
        return sum(line["num_tokens"] for line in lines)


def run_tasks(
    job: GenerationJob, tasks: Sequence[Task], *, report: Callable[[Progress], None] = lambda progress: None
) -> dict[str, dict[str, Any]]:
    """Run all tasks whose file does not stand yet; returns every file with its counts.

    Raises:
        GenerationError: a task failed ``generation.max_attempts`` times.
    """
    output_dir = Path(job.output_dir)
    missing = [task for task in tasks if not (output_dir / task.file_name).exists()]
    if missing:
        _run_missing(job, missing, sum(task.num_samples for task in tasks), report)
    return {task.file_name: _describe(output_dir / task.file_name, task, job.stage) for task in tasks}


def _run_missing(
    job: GenerationJob, missing: Sequence[Task], num_total: int, report: Callable[[Progress], None]
) -> None:
    import ray

    cluster = job.settings.cluster
    actor_class = ray.remote(GenerationWorker).options(
        num_cpus=cluster.cpus_per_worker, num_gpus=int(cluster.use_gpu), max_restarts=0, max_task_retries=0
    )
    queue, attempts = deque(missing), dict.fromkeys(missing, 0)
    progress = Progress(num_total - sum(task.num_samples for task in missing), num_total, 0, 0.0)
    started = time.perf_counter()
    running: dict[Any, tuple[Task, Any]] = {}

    def start_next(worker: Any) -> None:
        if queue:
            task = queue.popleft()
            attempts[task] += 1
            running[worker.run.remote(task)] = (task, worker)

    for _ in range(min(cluster.num_workers, len(missing))):
        start_next(actor_class.remote(job))
    while running:
        (finished, *_), _ = ray.wait(list(running), num_returns=1)
        task, worker = running.pop(finished)
        try:
            progress.num_tokens += ray.get(finished)
        except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError) as error:
            lost = isinstance(error, ray.exceptions.RayActorError)
            if lost:
                ray.kill(worker)  # one that only cannot be reached must not write beside its successor
                worker = actor_class.remote(job)
            if (Path(job.output_dir) / task.file_name).exists():  # it died between the commit and its answer
                progress.num_done += task.num_samples
                start_next(worker)
                continue
            if attempts[task] >= job.settings.generation.max_attempts:
                raise GenerationError(
                    f"task {task.file_name} failed {attempts[task]} times; the other tasks' files stand, "
                    f"run again to retry it. The last error:\n{error}"
                ) from None
            queue.appendleft(task)
        else:
            progress.num_done += task.num_samples
            progress.seconds = time.perf_counter() - started
            report(progress)
        start_next(worker)


def _describe(path: Path, task: Task, stage: str) -> dict[str, Any]:
    lines = read_lines(path)
    if len(lines) != task.num_samples:
        raise GenerationError(f"{path} has {len(lines)} lines, its task has {task.num_samples}; delete the file and run again")
    return {
        "num_samples": len(lines),
        "num_tokens": sum(line["num_tokens"] for line in lines),
        "num_truncated": sum(line["finish"] == "length" for line in lines),
        "num_empty": sum(not line[stage].strip() for line in lines),
        "sha256": sha256_of_file(path),
    }
