"""Streaming a split: samples by number, and one rank's blocks in the order of the plan.

A ``SplitReader`` joins text and features index by index and reads a sample with one
``pread`` a member, checksummed. ``stream_blocks`` walks the global steps over all epochs
and yields what one rank computes, one step ahead of the training in a thread:

    for step, blocks in stream_blocks(plans, load_block, rank=0, world_size=2, first_step=40, num_steps=100):
        for index, block in blocks: ...
"""

from __future__ import annotations

import io
import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.index import ShardError, read_index, read_member, rows_of_extension
from data_shards.plan import Plan
from data_shards.writer import manifest_shards, problem_of_member, read_manifest
from mmcot.problem import Problem


class _Members:
    """All members of one extension in the shards of a split, addressed by sample number."""

    def __init__(self, folder: Path, split: str, extension: str) -> None:
        shards = manifest_shards(read_manifest(folder), split)
        self.names = [shard.name for shard in shards]
        self.paths = [shard.tar(folder) for shard in shards]
        columns = [rows_of_extension(read_index(shard.index(folder)), extension) for shard in shards]
        self.shard_of_sample = np.repeat(np.arange(len(shards)), [len(c["qid"]) for c in columns]).astype(np.int32)
        empty = {"qid": np.empty(0, object), "offset": np.empty(0, int), "size": np.empty(0, int), "crc32": np.empty(0, int)}
        joined = {name: np.concatenate([c[name] for c in columns] or [empty[name]]) for name in empty}
        self.qids, self.offsets, self.sizes, self.crcs = joined.values()
        self._descriptors: dict[int, int] = {}

    def read(self, sample: int) -> bytes:
        shard = int(self.shard_of_sample[sample])
        if shard not in self._descriptors:
            self._descriptors[shard] = os.open(self.paths[shard], os.O_RDONLY)
        return read_member(
            self._descriptors[shard],
            offset=int(self.offsets[sample]),
            size=int(self.sizes[sample]),
            crc32=int(self.crcs[sample]),
            name=f"{self.paths[shard]}, question {self.qids[sample]}",
        )

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


class SplitReader:
    """The samples of one split of a data folder, by number in shard order.

    Args:
        features: name of the feature folder to join, or None for text alone.

    Raises:
        ShardError: a manifest or index is missing, or features and text do not match.
    """

    def __init__(self, shards_dir: str | Path, split: str, *, features: str | None = None) -> None:
        shards_dir = Path(shards_dir)
        self.split = split
        self._text = _Members(shards_dir / "text", split, "json")
        self._features = None
        self.feature_shape = (0, 0)
        if features is not None:
            folder = shards_dir / "features" / features
            if not folder.exists():
                raise ShardError(f"{folder} does not exist; build it with `mmcot data shard`, or set data.features")
            self._features = _Members(folder, split, "npy")
            if not np.array_equal(self._features.qids, self._text.qids):
                raise ShardError(f"{folder} does not hold the questions of {shards_dir / 'text'} in their order; build it again")
            manifest = read_manifest(folder)
            self.feature_shape = (manifest["num_patches"], manifest["dim"])

    def __len__(self) -> int:
        return len(self._text.qids)

    @property
    def qids(self) -> np.ndarray:
        """Question ids by sample number."""
        return self._text.qids

    @property
    def shard_of_sample(self) -> np.ndarray:
        """Shard number of each sample, int32 [N]."""
        return self._text.shard_of_sample

    def problem(self, sample: int) -> Problem:
        """Read one question."""
        return problem_of_member(str(self.qids[sample]), self._text.read(sample))

    def features(self, sample: int) -> np.ndarray | None:
        """Read one feature array, float16 [p, D] with p = 0 where there is no picture."""
        if self._features is None:
            return None
        array = np.lib.format.read_array(io.BytesIO(self._features.read(sample)), allow_pickle=False)
        if array.ndim != 2 or array.shape[1] != self.feature_shape[1] or len(array) > self.feature_shape[0]:
            raise ShardError(
                f"question {self.qids[sample]}: features of shape {array.shape}; expected at most "
                f"{self.feature_shape}; build the feature shards again"
            )
        return array

    def samples_of_shard(self, shard_name: str) -> np.ndarray:
        """Sample numbers of one text shard, such as ``train-000012``, in its order."""
        number = self._text.names.index(shard_name)
        return np.flatnonzero(self.shard_of_sample == number)

    def close(self) -> None:
        """Close the shards that were opened."""
        self._text.close()
        if self._features is not None:
            self._features.close()


def stream_blocks(
    plan_of_epoch: Callable[[int], Plan],
    load_block: Callable[[np.ndarray, bool], Any],
    *,
    rank: int,
    world_size: int,
    first_step: int,
    num_steps: int,
    prefetch_steps: int = 2,
) -> Iterator[tuple[int, list[tuple[int, Any]]]]:
    """Yield ``(step, [(block index, loaded block), ...])`` of one rank.

    Args:
        plan_of_epoch: epoch number to its plan; steps count over all epochs.
        load_block: (sample numbers, is_dummy) to a batch. A dummy is loaded from the
            first block of its global batch and must contribute no gradient.
        first_step, num_steps: steps ``first_step`` to ``num_steps - 1`` are yielded.
        prefetch_steps: steps loaded ahead by a thread.

    Raises:
        Exception: whatever reading raised, at the step that needed it.
    """
    ready: queue.Queue = queue.Queue(maxsize=prefetch_steps)
    stopped = threading.Event()

    def put(item: Any) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def load() -> None:
        try:
            plan = plan_of_epoch(0)
            for step in range(first_step, num_steps):
                epoch, local_step = divmod(step, plan.num_steps)
                plan = plan if plan.epoch == epoch else plan_of_epoch(epoch)
                dealt = plan.local_blocks(local_step, rank=rank, world_size=world_size)
                filler = plan.batch_blocks(local_step)[0]
                put((step, [(i, load_block(filler if b is None else b, b is None)) for i, b in dealt]))
                if stopped.is_set():
                    return
        except BaseException as error:
            put(error)
        else:
            put(None)

    thread = threading.Thread(target=load, name="stream_blocks", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
