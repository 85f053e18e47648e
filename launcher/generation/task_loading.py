"""Loading the samples of a task, in a thread that is ahead of the worker.

    loader = TaskLoader(job, tokenizer, pad_token_id=0, device=torch.device("cuda"))
    loaded = loader.take(task, progress)     # loaded ahead, or now
    loader.start(following)                  # while the texts of ``task`` are written

One thread reads, so that it alone uses the shards. An error while a task is loaded is raised when that task is
taken. At most one task is ahead; where another one is taken, it is dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from data_shards.generated_texts import Task
from launcher.stages.jobs import GenerationJob

if TYPE_CHECKING:
    import torch

    from mmcot.decoding.source_batches import SourceBatch

LOOK_EVERY_S = 1.0  # how often a worker that waits for its samples reports their progress


@dataclasses.dataclass(frozen=True)
class LoadedTask:
    """A task's samples in the form of the model: token ids, and the encoder's batches on the host."""

    qids: Sequence[str]
    sources: Sequence[Sequence[int]]
    feature_shape: tuple[int, int]
    batches: Sequence[SourceBatch]


class TaskLoader:
    """Loads the samples of tasks of one stage, one task after the other.

    Args:
        device: where the model runs; for a GPU the batches are in page-locked memory.
    """

    def __init__(self, job: GenerationJob, tokenizer: Any, *, pad_token_id: int, device: torch.device) -> None:
        self._job, self._tokenizer, self._pad_token_id, self._device = job, tokenizer, pad_token_id, device
        self._samples: dict[str, Any] = {}  # by split; used by the thread alone
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="next-task")
        self._ahead: tuple[Task, Future[LoadedTask]] | None = None
        self._num_read = 0

    def start(self, task: Task) -> None:
        """Start loading a task, unless it is loaded already."""
        if self._ahead is None or self._ahead[0] != task:
            self._drop()
            self._ahead = task, self._thread.submit(self._load, task)

    def take(self, task: Task, progress: Callable[[], None] = lambda: None) -> LoadedTask:
        """Return a task's samples.

        Args:
            progress: called while they are waited for and more of them have been read.

        Raises:
            Exception: whatever loading this task raised.
        """
        self.start(task)
        assert self._ahead is not None
        (_, loading), self._ahead, seen = self._ahead, None, self._num_read
        progress()
        while wait([loading], timeout=LOOK_EVERY_S).not_done:
            if self._num_read != seen:
                seen = self._num_read
                progress()
        return loading.result()

    def _drop(self) -> None:
        if self._ahead is not None:
            self._ahead[1].cancel()
            self._ahead = None

    def _load(self, task: Task) -> LoadedTask:
        from mmcot.decoding.source_batches import batch_sources
        from mmcot.models.device import DTYPES

        samples = self._open(task.split)
        reader = samples.reader
        numbers = reader.samples_of_shard(task.shard)[task.start : task.start + task.num_samples]
        if samples.is_remote:
            samples.prefetch(numbers)
        sources, features = [], []
        for number in numbers:
            sources.append(samples.encode(number).source_ids)
            features.append(reader.features(number))
            self._num_read += 1
        batches = batch_sources(
            sources,
            features,
            feature_shape=reader.feature_shape,
            pad_token_id=self._pad_token_id,
            dtype=DTYPES[self._job.settings.generation.precision],
            for_gpu=self._device.type == "cuda",
        )
        return LoadedTask([reader.qid(number) for number in numbers], sources, reader.feature_shape, list(batches))

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
