"""Blocks of a plan by a budget of tokens: as many questions of similar lengths as fit.

A block of n questions is computed as n rows of its longest source and its longest target, so its tokens are
n * (longest source + longest target). Lengths count rounded up to multiples of 16, as a GPU computes them at most.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from mmcot.errors import InputError

LENGTH_MULTIPLE = 16


def rounded_up(lengths: np.ndarray) -> np.ndarray:
    """Lengths rounded up to multiples of 16, int64."""
    return -(-lengths.astype(np.int64) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def check_budget(source_lengths: np.ndarray, target_lengths: np.ndarray, max_tokens: int) -> None:
    """Check that every question fits into a block of its own.

    Raises:
        ValueError: the longest question has more tokens.
    """
    tokens = rounded_up(source_lengths) + rounded_up(target_lengths)
    if len(tokens) and (longest := tokens[index := int(tokens.argmax())]) > max_tokens:
        raise InputError(
            f"max_tokens_per_block ({max_tokens:,}) is below the longest question, {longest:,} tokens (source "
            f"{source_lengths[index]:,}, target {target_lengths[index]:,}, each rounded up to a multiple of "
            f"{LENGTH_MULTIPLE}); give at least {longest:,}, or lower max_source_tokens or max_target_tokens"
        )


def cut_by_tokens(
    source_lengths: np.ndarray, target_lengths: np.ndarray, *, max_tokens: int, max_rows: int
) -> list[slice]:
    """Cut ordered questions into consecutive blocks, each as long as the budget allows.

    Args:
        source_lengths: int [N], in the order of the questions.
        target_lengths: int [N]; with its source no question is longer than the budget.
        max_rows: questions of a block at most.
    """
    source, target = rounded_up(source_lengths), rounded_up(target_lengths)
    blocks, start = [], 0
    while start < len(source):
        rows = min(max_rows, int(max_tokens // (source[start] + target[start])), len(source) - start)
        longest = np.maximum.accumulate(source[start : start + rows])
        longest += np.maximum.accumulate(target[start : start + rows])
        fitting = int(np.searchsorted(longest * np.arange(1, rows + 1), max_tokens, side="right"))
        blocks.append(slice(start, start + fitting))
        start += fitting
    return blocks


def order_by_lengths(source_lengths: np.ndarray, target_lengths: np.ndarray, *, max_tokens: int) -> np.ndarray:
    """The order in which neighbours have similar lengths of source and of target, int64 [N].

    Strips of similar sources, in each of them the targets rising and falling in turn, so that there is no jump
    between strips.
    """
    by_source = np.argsort(source_lengths, kind="stable")
    num_blocks = int((source_lengths + target_lengths).sum()) / max_tokens
    num_strips = max(1, round(num_blocks**0.5))
    strip = np.arange(len(by_source)) * num_strips // max(1, len(by_source))
    target = target_lengths[by_source].astype(np.int64)
    return by_source[np.lexsort((np.where(strip % 2, -target, target), strip))]


def split_largest(blocks: Sequence[np.ndarray], number: int) -> list[list[np.ndarray]]:
    """Halve the blocks with the most questions until there are ``number`` in all; returns the parts of each.

    There are fewer where every block has one question.
    """
    parts = [[block] for block in blocks]
    heap = [(-len(block), index, 0) for index, block in enumerate(blocks)]
    heapq.heapify(heap)
    for _ in range(number - len(blocks)):
        size, index, part = heapq.heappop(heap)
        if size == -1:
            break
        first, second = np.array_split(parts[index][part], 2)
        parts[index][part] = first
        parts[index].append(second)
        heapq.heappush(heap, (-len(first), index, part))
        heapq.heappush(heap, (-len(second), index, len(parts[index]) - 1))
    return parts
