"""One rank's blocks in the order of the plan, loaded before the training needs them.

``walk_steps`` reads the global steps over all epochs and yields what one rank computes. Several
walkers may share the work, each with every n-th step; their number does not change the blocks.

    for step in walk_steps(plans, samples, rank=0, world_size=2, steps=range(40, 100)):
        for index, block in step.blocks: ...
"""

from __future__ import annotations

import dataclasses
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

import numpy as np

from data_shards.plan import Plan

T = TypeVar("T")


class Samples(Protocol):
    """The samples that a walker loads."""

    @property
    def bytes_read(self) -> int:
        """Bytes read from files and servers so far."""
        ...

    @property
    def bytes_needed(self) -> int:
        """Bytes of them that were used."""
        ...

    @property
    def is_remote(self) -> bool:
        """Whether any tar is behind a URL."""
        ...

    def load_block(self, samples: np.ndarray, is_dummy: bool, epoch: int) -> Any:
        """Load samples as one batch, in the form of an epoch; a dummy must contribute no gradient."""

    def prefetch(self, samples: np.ndarray) -> None:
        """Start fetching samples that will be loaded; the current and the next window are kept."""


@dataclasses.dataclass(frozen=True)
class Step:
    """What one rank computes in a global step.

    ``blocks`` are pairs (index in the global batch, loaded block). ``bytes_read`` and
    ``bytes_needed`` count since this walker's last step.
    """

    number: int
    blocks: list[tuple[int, Any]]
    bytes_read: int = 0
    bytes_needed: int = 0

    def pin_memory(self) -> Step:
        """The same step in page-locked memory."""
        return dataclasses.replace(self, blocks=[(index, block.pin_memory()) for index, block in self.blocks])


def walk_steps(
    plan_of_epoch: Callable[[int], Plan], samples: Samples, *, rank: int, world_size: int, steps: range
) -> Iterator[Step]:
    """Load one rank's share of some global steps; remote samples are fetched one window ahead.

    Args:
        plan_of_epoch: maps an epoch number to its plan; steps count over all epochs.
        steps: the steps, in rising order; ``range(first + i, last, n)`` for walker i of n.
    """

    def dealt(plan: Plan, step: int) -> list[tuple[int, np.ndarray, bool]]:
        filler = plan.batch_blocks(step)[0]
        blocks = plan.local_blocks(step, rank=rank, world_size=world_size)
        return [(index, filler if block is None else block, block is None) for index, block in blocks]

    def prefetch(window: tuple[Plan, list[int]] | None) -> None:
        if window and samples.is_remote:
            samples.prefetch(np.concatenate([block for step in window[1] for _, block, _ in dealt(window[0], step)]))

    windows = _windows(plan_of_epoch, steps)
    current = next(windows, None)
    prefetch(current)
    numbers = iter(steps)
    read, needed = samples.bytes_read, samples.bytes_needed
    while current:
        following = next(windows, None)
        prefetch(following)
        plan, local_steps = current
        for step in local_steps:
            blocks = [
                (index, samples.load_block(block, is_dummy, plan.epoch)) for index, block, is_dummy in dealt(plan, step)
            ]
            yield Step(next(numbers), blocks, samples.bytes_read - read, samples.bytes_needed - needed)
            read, needed = samples.bytes_read, samples.bytes_needed
        current = following


def _windows(plan_of_epoch: Callable[[int], Plan], steps: range) -> Iterator[tuple[Plan, list[int]]]:
    """The steps window by window: a plan and steps of its epoch that share a window of shards."""
    plan = plan_of_epoch(0)
    steps_per_epoch = plan.num_steps
    for epoch, numbers in itertools.groupby(steps, lambda step: step // steps_per_epoch):
        plan = plan if plan.epoch == epoch else plan_of_epoch(epoch)
        local_steps = [number - epoch * steps_per_epoch for number in numbers]
        for _, window in itertools.groupby(local_steps, plan.window_of_step):
            yield plan, list(window)


def load_ahead(items: Iterable[T], *, num_ahead: int = 2) -> Iterator[T]:
    """Yield the same items, produced by a thread up to ``num_ahead`` items early.

    Raises:
        Exception: the error that producing an item raised, in place of the item.
    """
    ready: queue.Queue = queue.Queue(maxsize=num_ahead)
    stopped = threading.Event()
    end = object()

    def put(item: Any) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def load() -> None:
        try:
            for item in items:
                put((item, None))
                if stopped.is_set():
                    return
            put((end, None))
        except BaseException as error:
            put((end, error))

    thread = threading.Thread(target=load, name="load_ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stopped.set()
        thread.join()
