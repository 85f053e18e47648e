"""The order of an epoch: the samples of each global batch, and the blocks of each rank.

A plan is a pure function of integer arrays, without files, tensors or processes. Every rank
computes the same plan:

    plan = Plan(source_lengths, target_lengths, shard_of_sample, seed=0, epoch=3,
                global_batch_size=32, micro_batch_size=4)
    plan.num_steps                         # global batches in this epoch
    plan.batch_blocks(step)                # [array([17, 3, 940, 12]), ...] sample numbers
    plan.local_blocks(step, rank=1, world_size=2)   # [(0, array), (3, array)], (index, None) is a dummy

The unit is a *block*, a micro-batch of samples with similar lengths of source and target. A
global batch is a random set of blocks, so that batches are mixed although blocks are not. It
follows that every sample occurs exactly once in an epoch, the global batches are the same at
every world size, every rank has the same number of micro-steps, and resuming needs one integer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from data_shards.token_blocks import check_budget, cut_by_tokens, order_by_lengths, rounded_up, split_largest
from mmcot.errors import InputError


class Plan:
    """One epoch's global batches as blocks of sample numbers.

    Shards are shuffled, then samples within a window of ``window_shards`` shards, so that
    reads stay local. Within a window samples are sorted into strips by source length, each
    strip by target length, and cut into blocks; blocks are then shuffled. The remainder of a
    window (less than a block, or less than a batch) is used in the next window, so only the
    epoch's last batch may be short.

    With ``max_tokens_per_block`` a block has as many similar samples as fit, instead of ``micro_batch_size``. All
    batches of an epoch but the last have equally many blocks; ``global_batch_size`` is then the mean number of their
    samples, and the number of steps of an epoch is the same as without it.

    Args:
        source_lengths: tokens of each sample's source, int [N].
        target_lengths: tokens of each sample's target, int [N].
        shard_of_sample: number of the shard that holds each sample, int [N].
        seed: seed of all shuffling.
        epoch: zero-based; each epoch has its own order.
        global_batch_size: samples per optimizer step, a multiple of ``micro_batch_size``.
        micro_batch_size: samples per block.
        window_shards: shards shuffled together.
        group_by_length: False makes blocks of random samples.
        max_tokens_per_block: tokens of a block at most, padding included (``data_shards/token_blocks.py``).

    Raises:
        ValueError: an argument is out of range, the arrays differ in length, or a sample exceeds the tokens of a block.
    """

    def __init__(
        self,
        source_lengths: np.ndarray,
        target_lengths: np.ndarray,
        shard_of_sample: np.ndarray,
        *,
        seed: int,
        epoch: int,
        global_batch_size: int,
        micro_batch_size: int,
        window_shards: int = 4,
        group_by_length: bool = True,
        max_tokens_per_block: int | None = None,
    ) -> None:
        lengths = [np.asarray(array) for array in (source_lengths, target_lengths, shard_of_sample)]
        _check_arguments(lengths, global_batch_size, micro_batch_size, window_shards)
        self.source_lengths, self.target_lengths, self.shard_of_sample = lengths
        self.num_samples = len(self.source_lengths)
        self.seed, self.epoch = seed, epoch
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.window_shards, self.group_by_length = window_shards, group_by_length
        self.max_tokens_per_block = max_tokens_per_block
        self.blocks_per_batch = global_batch_size // micro_batch_size
        if max_tokens_per_block is None:
            self._order = self._make_order()
            self._starts = np.append(np.arange(0, self.num_samples, micro_batch_size), self.num_samples)
        else:
            check_budget(self.source_lengths, self.target_lengths, max_tokens_per_block)
            self._order, self._starts = self._make_order_by_tokens(max_tokens_per_block)

    @property
    def num_steps(self) -> int:
        """Global batches in an epoch; the last may be short."""
        return -(-self.num_blocks // self.blocks_per_batch)

    @property
    def num_blocks(self) -> int:
        """Blocks in an epoch; the last may be short."""
        return len(self._starts) - 1

    @property
    def fingerprint(self) -> str:
        """A hash, 16 hex digits, of all arguments except ``epoch``; it does not depend on the world size."""
        digest = hashlib.sha256()
        settings = (self.seed, self.global_batch_size, self.micro_batch_size, self.window_shards, self.group_by_length)
        if self.max_tokens_per_block is not None:
            settings += (self.max_tokens_per_block,)
        digest.update(repr(settings).encode())
        for array in (self.source_lengths, self.target_lengths, self.shard_of_sample):
            digest.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
        return digest.hexdigest()[:16]

    def batch_blocks(self, step: int) -> list[np.ndarray]:
        """The blocks of one global batch: arrays of sample numbers.

        Raises:
            IndexError: ``step`` is outside the epoch.
        """
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} is outside this epoch of {self.num_steps} steps")
        first = step * self.blocks_per_batch
        last = min(first + self.blocks_per_batch, self.num_blocks)
        return np.split(self._order[self._starts[first] : self._starts[last]], self._inner_starts(first, last))

    def window_of_step(self, step: int) -> int:
        """Number of the window of shards that a step reads (with the remainder of the window before)."""
        return int(np.searchsorted(self._window_ends, step, side="right"))

    def local_blocks(self, step: int, *, rank: int, world_size: int) -> list[tuple[int, np.ndarray | None]]:
        """The blocks that one rank computes in a global batch, with their index in it.

        Blocks are assigned by falling cost, ``world_size`` at a time, the most expensive to the
        rank with the least work so far: ranks have similar work at each micro-step and in total.
        Where the number of blocks is no multiple of ``world_size``, further indexes have the
        block None: a dummy, which must have a zero gradient.

        Returns:
            pairs (index in the global batch, sample numbers or None), the same number of them
            on every rank.
        """
        if not 0 <= rank < world_size:
            raise InputError(f"rank {rank} must be in 0..{world_size - 1} (world_size {world_size})")
        blocks = self.batch_blocks(step)
        indexes, _ = self._deal(blocks, world_size)
        return [(int(index), blocks[index] if index < len(blocks) else None) for index in indexes[:, rank]]

    def _deal(self, blocks: list[np.ndarray], world_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Block indexes by micro-step and rank, int [M, W] (dummies from ``len(blocks)`` on), and work by rank, [W]."""
        num_rounds = -(-len(blocks) // world_size)
        costs = np.zeros(num_rounds * world_size, dtype=np.int64)
        costs[: len(blocks)] = self._costs(blocks)
        by_cost = np.argsort(-costs, kind="stable").reshape(num_rounds, world_size)
        indexes, work = np.empty_like(by_cost), np.zeros(world_size, dtype=np.int64)
        for dealt, longest_first in zip(indexes, by_cost, strict=True):
            dealt[np.argsort(work, kind="stable")] = longest_first
            work += costs[dealt]
        return indexes, work

    def padding_factor(self) -> float:
        """Tokens computed, padding included, over tokens needed: 1.0 is no padding."""
        computed = int(self._costs_of(self._order, self._starts[:-1]).sum()) if self.num_samples else 0
        return computed / max(1, int(self.source_lengths.sum()) + int(self.target_lengths.sum()))

    def longest_block(self) -> np.ndarray:
        """The block of this epoch with the most tokens, padding included: sample numbers.

        Raises:
            ValueError: the epoch has no block.
        """
        index = int(self._costs_of(self._order, self._starts[:-1]).argmax())
        return self._order[self._starts[index] : self._starts[index + 1]]

    def imbalance(self, world_size: int, *, max_steps: int = 1000) -> float:
        """Tokens of the busiest rank over those of the mean rank, over an epoch's first steps: 1.0 is even."""
        busiest = mean = 0.0
        for step in range(min(self.num_steps, max_steps)):
            _, work = self._deal(self.batch_blocks(step), world_size)
            busiest, mean = busiest + work.max(), mean + work.mean()
        return busiest / mean if mean else 1.0

    def _costs(self, blocks: list[np.ndarray]) -> np.ndarray:
        """Tokens of the blocks of a batch, int64 [n]; the last block may be short.

        Computed for all blocks at once, because every rank needs them at every step.
        """
        sizes = [len(block) for block in blocks]
        return self._costs_of(np.concatenate(blocks), np.cumsum([0, *sizes[:-1]]))

    def _costs_of(self, samples: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Tokens with padding of the blocks of ``samples`` that begin at ``starts``, int64 [n]."""
        longest = np.maximum.reduceat(self.source_lengths[samples].astype(np.int64), starts)
        longest += np.maximum.reduceat(self.target_lengths[samples].astype(np.int64), starts)
        return longest * np.diff(starts, append=len(samples))

    def _inner_starts(self, first: int, last: int) -> np.ndarray:
        return self._starts[first + 1 : last] - self._starts[first]

    def _make_order(self) -> np.ndarray:
        """All sample numbers in the order of the epoch, int64 [N]."""
        random = np.random.Generator(np.random.PCG64([self.seed, self.epoch]))
        left_samples = np.empty(0, dtype=np.int64)
        left_blocks = np.empty((0, self.micro_batch_size), dtype=np.int64)
        order, num_steps, window_ends = [], 0, []
        for window in self._windows(random):
            samples = random.permutation(np.concatenate([left_samples, *window]))
            num_full = len(samples) // self.micro_batch_size * self.micro_batch_size
            left_samples = samples[num_full:]
            blocks = self._cut_blocks(samples[:num_full])
            blocks = random.permutation(np.concatenate([left_blocks, blocks]))
            num_batched = len(blocks) // self.blocks_per_batch * self.blocks_per_batch
            order.append(self._mix_batches(blocks[:num_batched], random).reshape(-1))
            num_steps += num_batched // self.blocks_per_batch
            window_ends.append(num_steps)
            left_blocks = blocks[num_batched:]
        self._window_ends = np.array(window_ends[:-1], dtype=np.int64)  # the final remainder belongs to the last window
        return np.concatenate([*order, left_blocks.reshape(-1), left_samples]) if order else left_samples

    def _windows(self, random: np.random.Generator) -> Iterator[list[np.ndarray]]:
        """The shuffled shards window by window: the sample numbers of each shard."""
        shards = np.unique(self.shard_of_sample)
        random.shuffle(shards)
        by_shard = np.argsort(self.shard_of_sample, kind="stable")
        starts = np.searchsorted(self.shard_of_sample[by_shard], shards, side="left")
        ends = np.searchsorted(self.shard_of_sample[by_shard], shards, side="right")
        for first in range(0, len(shards), self.window_shards):
            window = slice(first, first + self.window_shards)
            yield [by_shard[start:end] for start, end in zip(starts[window], ends[window], strict=True)]

    def _make_order_by_tokens(self, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """All sample numbers in the order of the epoch, int64 [N], and where its blocks begin and end, int64 [n + 1].

        The number of steps does not depend on how many blocks an epoch has, so that it is the same in all epochs:
        where there are too few blocks for equal batches, the largest are halved.
        """
        random = np.random.Generator(np.random.PCG64([self.seed, self.epoch]))
        windows = [self._cut_tokens(random.permutation(np.concatenate(w)), max_tokens) for w in self._windows(random)]
        num_steps = -(-self.num_samples // self.global_batch_size)
        self.blocks_per_batch = max(1, -(-sum(map(len, windows)) // max(1, num_steps)))
        parts = split_largest([block for window in windows for block in window], num_steps * self.blocks_per_batch)
        order, num_blocks, window_ends, taken = [], 0, [], 0
        for window in windows:
            blocks = [part for whole in parts[taken : taken + len(window)] for part in whole]
            taken += len(window)
            order += [blocks[index] for index in self._mix(blocks, random)]
            num_blocks += len(blocks)
            window_ends.append(num_blocks // self.blocks_per_batch)
        self._window_ends = np.array(window_ends[:-1], dtype=np.int64)
        starts = np.cumsum([0, *map(len, order)])
        return (np.concatenate(order) if order else np.empty(0, dtype=np.int64)), starts

    def _cut_tokens(self, samples: np.ndarray, max_tokens: int) -> list[np.ndarray]:
        """Cut randomly ordered samples into blocks with similar lengths, each filled with tokens."""
        source, target = rounded_up(self.source_lengths[samples]), rounded_up(self.target_lengths[samples])
        if self.group_by_length:
            order = order_by_lengths(source, target, max_tokens=max_tokens)
            samples, source, target = samples[order], source[order], target[order]
        blocks = cut_by_tokens(source, target, max_tokens=max_tokens, max_rows=self.global_batch_size)
        return [samples[block] for block in blocks]

    def _mix(self, blocks: list[np.ndarray], random: np.random.Generator) -> np.ndarray:
        """An order of blocks in which each batch has about as many short and long ones as the window, int64 [n]."""
        longest = self._costs(blocks) // [len(block) for block in blocks]
        place = np.empty(len(blocks))
        for stratum in np.array_split(np.argsort(longest, kind="stable"), self.blocks_per_batch):
            place[random.permutation(stratum)] = (np.arange(len(stratum)) + random.random()) / max(1, len(stratum))
        return np.argsort(place, kind="stable")

    def _cut_blocks(self, samples: np.ndarray) -> np.ndarray:
        """Cut randomly ordered samples into blocks with similar lengths, int64 [n, micro_batch_size]."""
        size = self.micro_batch_size
        if self.group_by_length and len(samples):
            samples = samples[np.argsort(self.source_lengths[samples], kind="stable")]
            num_blocks = len(samples) // size
            blocks_per_strip = max(1, round(num_blocks**0.5))
            strip = np.arange(len(samples)) // (blocks_per_strip * size)
            samples = samples[np.lexsort((self.target_lengths[samples], strip))]
        return samples.reshape(-1, size)

    def _mix_batches(self, blocks: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Order randomly ordered blocks so that each batch has one block of every stratum of cost.

        Otherwise a batch of few blocks, each with similar lengths, would often miss whole kinds
        of questions. With strata each batch resembles the window, and costs about the same.
        """
        if not self.group_by_length or not len(blocks):
            return blocks
        costs = self._costs_of(blocks.reshape(-1), np.arange(0, blocks.size, self.micro_batch_size))
        strata = np.argsort(costs, kind="stable").reshape(self.blocks_per_batch, -1)
        return blocks[random.permuted(strata, axis=1).T.reshape(-1)]


def _check_arguments(
    arrays: list[np.ndarray], global_batch_size: int, micro_batch_size: int, window_shards: int
) -> None:
    sizes = [len(array) for array in arrays]
    if len(set(sizes)) != 1:
        raise InputError(
            f"source_lengths, target_lengths and shard_of_sample have {sizes} entries; expected equal numbers"
        )
    if micro_batch_size < 1 or window_shards < 1:
        raise InputError(
            f"micro_batch_size ({micro_batch_size}) and window_shards ({window_shards}) must be at least 1"
        )
    if global_batch_size < 1 or global_batch_size % micro_batch_size:
        nearest = max(1, round(global_batch_size / micro_batch_size)) * micro_batch_size
        raise InputError(
            f"global_batch_size ({global_batch_size}) must be a multiple of micro_batch_size ({micro_batch_size}); "
            f"try {nearest}"
        )
