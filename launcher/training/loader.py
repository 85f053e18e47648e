"""Prefetching of one rank's training steps, in order, by a thread or by processes.

The steps are the same at every number of processes: process i of n loads every n-th step,
and the steps are collected in turn.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data_shards.plan import Plan
from data_shards.stream import Step, load_ahead, walk_steps
from launcher.stages.jobs import TrainJob
from launcher.stages.plan import make_plan
from launcher.stages.samples import StageSamples, load_tokenizer, open_stage
from launcher.stages.token_lengths import read_lengths

STEPS_AHEAD = 2  # of each process


@dataclasses.dataclass
class StageStream:
    """One split of a job as a rank trains on it.

    ``samples`` and ``lengths`` are opened in the process that uses them; only job and split are sent to it.
    """

    job: TrainJob
    split: str

    def open(self) -> StageStream:
        """Open the samples; returns itself."""
        job = self.job
        self.samples: StageSamples = open_stage(
            job.settings,
            job.stage,
            self.split,
            shards_dir=job.shards_dir,
            tokenizer=load_tokenizer(job.settings, job.shards_dir),
            texts=job.texts,
            for_training=True,
        )
        # The driver reports how many texts were cut.
        self.lengths = read_lengths(job.lengths[self.split], ("source", "target"))
        return self

    def plan(self, epoch: int) -> Plan:
        """The plan of an epoch."""
        return make_plan(self.job.settings, self.lengths, self.samples.reader.shard_of_sample, epoch=epoch)

    def steps(self, *, rank: int, world_size: int, steps: range) -> Iterator[Step]:
        """Load one rank's share of these steps in a thread, a little ahead."""
        return load_ahead(
            walk_steps(self.plan, self.samples, rank=rank, world_size=world_size, steps=steps), num_ahead=STEPS_AHEAD
        )


class _Walker(IterableDataset):
    """The data set that a loader process iterates over."""

    def __init__(self, stream: StageStream, rank: int, world_size: int, steps: range) -> None:
        self.stream, self.rank, self.world_size, self.steps = stream, rank, world_size, steps

    def __iter__(self) -> Iterator[Step]:
        worker = get_worker_info()
        if worker is None:
            raise RuntimeError("a _Walker is read by the loader processes of a DataLoader only")
        stream = StageStream(self.stream.job, self.stream.split).open()
        return walk_steps(
            stream.plan,
            stream.samples,
            rank=self.rank,
            world_size=self.world_size,
            steps=self.steps[worker.id :: worker.num_workers],
        )


def load_steps(job: TrainJob, *, rank: int, world_size: int, steps: range, pin_memory: bool) -> Iterator[Step]:
    """Yield the training steps of a rank, loaded by ``training.loader_processes`` processes, or a thread at 0.

    Raises:
        ShardError: reading failed; raised at the step that needs the data.
        RuntimeError: a loader process was killed.
    """
    stream, processes = StageStream(job, "train"), job.settings.training.loader_processes
    if processes == 0:
        loaded = walk_steps(stream.open().plan, stream.samples, rank=rank, world_size=world_size, steps=steps)
        return load_ahead((step.pin_memory() for step in loaded) if pin_memory else loaded, num_ahead=STEPS_AHEAD)
    # A training process has threads and a GPU: it must not be forked.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["launcher.training.loader_forkserver"])
    loader = DataLoader(
        _Walker(stream, rank, world_size, steps),
        batch_size=None,
        num_workers=processes,
        prefetch_factor=STEPS_AHEAD,
        multiprocessing_context=context,
        pin_memory=pin_memory and torch.cuda.is_available(),
    )
    return iter(loader)
