"""The worker of a sharded generation: one replica of the model that writes the texts of tasks, in a Ray actor.

A worker keeps one engine (``mmcot/decoding/engine.py``): while it writes a task's texts, a thread loads the samples of
the tasks that probably come next (``launcher/generation/task_loading.py``), and their texts take the rows that become
free. What a file holds depends on the model, the data and the task alone, because a text does not depend on the rows
beside it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_shards.atomic_files import sha256_of_file
from data_shards.generated_texts import Task, sha256_written, write_task
from data_shards.text_lines import read_lines
from launcher.cluster.worker_pool import Worker
from launcher.generation.task_lines import answers_of, count_lines, line_shape, task_lines
from launcher.generation.task_loading import LoadedTask, TaskLoader
from launcher.runs.exported import sha256_of_weights, verify_model
from launcher.runs.run_dir import RunDir
from launcher.runs.system_metrics import sampling
from launcher.stages.jobs import GenerationJob
from mmcot.errors import OperationError


class GenerationError(OperationError):
    """Generation could not complete; the message names the task and the reason."""


@dataclasses.dataclass(frozen=True)
class TaskDone:
    """A worker's result of a task: its file's counts and sha256, seconds in the task, seconds before it.

    ``rows`` counts the rows of all steps meanwhile, ``rows_used`` those in which a text was written; ``num_tokens``
    are those of all candidates.
    """

    file: dict[str, Any]
    busy_s: float
    waited_s: float
    rows: int = 0
    rows_used: int = 0
    num_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class BegunTask:
    """A task whose texts were submitted to the engine, question by question, each with its candidates in order."""

    loaded: LoadedTask
    writings: Sequence[Any]

    @property
    def is_done(self) -> bool:
        """Whether every text has ended."""
        return all(writing.text is not None for writing in self.writings)


class GenerationWorker(Worker):
    """One replica of the model that runs tasks, in a Ray actor."""

    def __init__(self, job: GenerationJob) -> None:
        import torch  # heavy imports in the worker only, not in the driver

        from mmcot.decoding.engine import open_engine
        from mmcot.decoding.sampling import Sampling
        from mmcot.models.device import DTYPES, open_device
        from mmcot.models.opening import open_model
        from mmcot.texts.tokenizer import open_tokenizer

        torch.set_num_threads(job.settings.cluster.cpus_per_worker)
        self.job = job
        verify_model(job.model_dir)
        self.tokenizer = open_tokenizer(job.model_dir)
        precision = job.settings.generation.precision
        device = open_device(use_gpu=bool(job.settings.cluster.use_gpu), precision=precision)
        self.model = open_model(job.model_dir, dtype=DTYPES[precision]).eval()
        self.model.to(device)  # pyright: ignore[reportArgumentType], transformers' wrapper hides Module.to
        spec, generation = job.settings.stage(job.stage), job.settings.generation
        chosen = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size")
        self.token_choice = Sampling(seed=job.settings.run.seed, **{name: getattr(generation, name) for name in chosen})
        self.engine = open_engine(
            self.model,
            self.tokenizer,
            num_rows=generation.batch_size,
            max_source_tokens=spec.max_source_tokens,
            max_new_tokens=spec.max_target_tokens,
            on_part=lambda: self.progress(),
        )
        self.begun: dict[Task, BegunTask] = {}
        self.loader = TaskLoader(job, self.tokenizer, pad_token_id=self.model.config.pad_token_id, device=device)
        self.free_since: float | None = None
        if job.run_dir is not None and job.step is not None:
            self.sampling = sampling(RunDir(Path(job.run_dir)).logs, job.step, gpus=device.type == "cuda")
            self.sampling.__enter__()  # until this process ends

    def run(self, task: Task) -> TaskDone:
        """Run and commit a task; the texts of the tasks that follow take the rows that it leaves free."""
        started, rows = time.perf_counter(), self.engine.rows
        waited = started - (self.free_since or started)
        before = rows.num_steps, rows.num_row_steps
        for other in [other for other in self.begun if other not in (task, *self.following)]:
            self._leave(other)
        begun = self.begun.pop(task, None) or self._begin(task)
        try:
            texts = self._write(begun, self.following)
        except Exception:  # perhaps of a task that follows, whose texts were written as well
            self.engine.clear()
            if not self.begun:
                raise
            self.begun.clear()
            texts = self._write(self._begin(task), ())
        self._commit(task, begun.loaded, texts)
        path = Path(self.job.output_dir) / task.file_name
        file = describe_file(path, task, self.job.stage)
        if file["sha256"] != sha256_written(self.job.output_dir, task):
            raise GenerationError(f"{path} is not what was written to it a moment ago; check the disk")
        self.free_since = time.perf_counter()
        steps, row_steps = rows.num_steps - before[0], rows.num_row_steps - before[1]
        num_tokens = sum(text.num_tokens for text in texts)
        return TaskDone(file, self.free_since - started, waited, steps * rows.num_rows, row_steps, num_tokens)

    def _begin(self, task: Task) -> BegunTask:
        """Submit a task's texts, once its samples are loaded."""
        from mmcot.decoding.requests import Request, Source, candidates

        loaded, generation = self.loader.take(task, self.progress), self.job.settings.generation
        requests = [
            Request(
                Source(ids),  # features are in the batches
                key=qid,
                sampling=self.token_choice,
                min_new_tokens=generation.min_new_tokens,
                with_log_probs=generation.candidates > 1,
            )
            for qid, ids in zip(loaded.qids, loaded.sources, strict=True)
        ]
        every = [each for request in requests for each in candidates(request, generation.candidates)]
        return BegunTask(loaded, self.engine.submit(every, batches=loaded.batches))

    def _leave(self, task: Task) -> None:
        for writing in self.begun.pop(task).writings:
            self.engine.cancel(writing)

    def _write(self, begun: BegunTask, following: Sequence[Task]) -> list[Any]:
        """Write a task's texts to their end, and some of the tasks that follow."""
        self.loader.start(*(task for task in following if task not in self.begun))
        while not begun.is_done:
            for task in following:
                if task not in self.begun and self.loader.is_loaded(task):
                    self.begun[task] = self._begin(task)
            self.engine.step()
            self.progress()
        return [writing.text for writing in begun.writings]

    def _commit(self, task: Task, loaded: LoadedTask, texts: Sequence[Any]) -> None:
        job, generation = self.job, self.job.settings.generation
        lines = task_lines(
            job.stage,
            loaded.qids,
            [texts[start : start + generation.candidates] for start in range(0, len(texts), generation.candidates)],
            search=generation.search,
            answer_of=answers_of(job.settings.stage(job.stage).format, loaded.samples),
        )
        check_attempt(job)
        write_task(job.output_dir, task, lines, weights=sha256_of_weights(job.model_dir), seed=job.settings.run.seed)


def check_attempt(job: GenerationJob) -> None:
    """Raise RunError if a later attempt owns the run."""
    if job.run_dir is not None and job.attempt is not None:
        RunDir(Path(job.run_dir)).check_attempt(job.attempt)


def describe_file(path: Path, task: Task, stage: str) -> dict[str, Any]:
    """A committed file's counts and sha256.

    Raises:
        GenerationError: it has another number of lines than its task.
    """
    lines = read_lines(path, line_shape(stage))
    if len(lines) != task.num_samples:
        raise GenerationError(
            f"{path} has {len(lines)} lines, its task has {task.num_samples}; delete the file and run again"
        )
    return count_lines(stage, lines) | {"sha256": sha256_of_file(path)}
