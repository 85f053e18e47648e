"""Loading the samples of a task, in a thread that is ahead of the worker.

    loader = TaskLoader(job, tokenizer, pad_token_id=0, device=torch.device("cuda"))
    loaded = loader.take(task, progress)     # loaded ahead, or now
    loader.start(*following)                 # while the texts of ``task`` are written

One thread reads, so that it alone uses the shards. An error while a task is loaded is raised when that task is
taken. Where a task is taken that was not started, those that were are dropped. Features wait as they are stored;
the encoder's batches, padded and in the model's dtype, are made while the task runs, one ahead.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.generated_texts import Task
from launcher.stages.jobs import GenerationJob
from mmcot.texts.sample import Sample

if TYPE_CHECKING:
    import torch

    from mmcot.decoding.source_batches import SourceBatch

LOOK_EVERY_S = 1.0  # how often a worker that waits for its samples reports their progress


@dataclasses.dataclass(frozen=True)
class LoadedTask:
    """A task's samples in the form of the model: token ids, and the encoder's batches on the host, to be used once.

    ``samples`` are the questions themselves where candidates vote by their answers; else there are none.
    """

    qids: Sequence[str]
    sources: Sequence[Sequence[int]]
    feature_shape: tuple[int, int]
    batches: Iterator[SourceBatch]
    samples: Sequence[Sample] = ()


class _Dropped(Exception):  # noqa: N818 (nobody sees it)
    """Nobody takes this task any more."""


class TaskLoader:
    """Loads the samples of tasks of one stage, one task after the other.

    Args:
        device: where the model runs; for a GPU the batches are in page-locked memory.
    """

    def __init__(self, job: GenerationJob, tokenizer: Any, *, pad_token_id: int, device: torch.device) -> None:
        self._job, self._tokenizer, self._pad_token_id, self._device = job, tokenizer, pad_token_id, device
        self._samples: dict[str, Any] = {}  # by split; used by the thread alone
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="next-task")
        self._ahead: dict[Task, tuple[Future[LoadedTask], threading.Event]] = {}
        self._num_read = 0

    def start(self, *tasks: Task) -> None:
        """Start loading tasks in this order, except those that are loaded already; all others are dropped."""
        for other in [other for other in self._ahead if other not in tasks]:
            loading, is_dropped = self._ahead.pop(other)
            loading.cancel()
            is_dropped.set()  # where it runs already
        for task in tasks:
            if task not in self._ahead:
                is_dropped = threading.Event()
                self._ahead[task] = self._thread.submit(self._load, task, is_dropped), is_dropped

    def is_loaded(self, task: Task) -> bool:
        """Whether ``take`` returns a task at once."""
        loading = self._ahead[task][0] if task in self._ahead else None
        return loading is not None and loading.done() and loading.exception() is None

    def take(self, task: Task, progress: Callable[[], None] = lambda: None) -> LoadedTask:
        """Return a task's samples.

        Args:
            progress: called while they are waited for and more of them have been read.

        Raises:
            Exception: whatever loading this task raised.
        """
        if task not in self._ahead:
            self.start(task)
        (loading, _), seen = self._ahead.pop(task), self._num_read
        progress()
        while wait([loading], timeout=LOOK_EVERY_S).not_done:
            if self._num_read != seen:
                seen = self._num_read
                progress()
        return loading.result()

    def _load(self, task: Task, is_dropped: threading.Event) -> LoadedTask:
        from mmcot.decoding.source_batches import batch_sources
        from mmcot.models.device import DTYPES

        samples = self._open(task.split)
        reader = samples.reader
        numbers = reader.samples_of_shard(task.shard)[task.start : task.start + task.num_samples]
        if samples.is_remote:
            samples.prefetch(numbers)
            if self._job.other_pictures:
                samples.prefetch(np.sort(samples.others(numbers)))
        sources, features, other_pictures = [], [], self._job.other_pictures
        for number in numbers:
            if is_dropped.is_set():
                raise _Dropped(task)
            pair, own = samples.read(number)
            sources.append(pair.source_ids)
            features.append(samples.features_of_another(number, own) if other_pictures else own)
            self._num_read += 1
        batches = batch_sources(
            sources,
            features,
            feature_shape=reader.feature_shape,
            pad_token_id=self._pad_token_id,
            dtype=DTYPES[self._job.settings.generation.precision],
            for_gpu=self._device.type == "cuda",
        )
        qids = [reader.qid(number) for number in numbers]
        votes = self._job.settings.generation.search == "vote"
        problems = [reader.problem(number) for number in numbers] if votes else []
        return LoadedTask(qids, sources, reader.feature_shape, _one_ahead(batches), problems)

    def _open(self, split: str) -> Any:
        from launcher.stages.samples import open_stage

        if split not in self._samples:
            job = self._job
            self._samples[split] = open_stage(
                job.settings,
                job.stage,
                split,
                shards_dir=job.shards_dir,
                tokenizer=self._tokenizer,
                texts=job.texts,
            )
        return self._samples[split]


def _one_ahead(batches: Iterator[SourceBatch]) -> Iterator[SourceBatch]:
    """Yield batches; while one is used, a thread makes the next."""
    with ThreadPoolExecutor(1, thread_name_prefix="next-batch") as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch
