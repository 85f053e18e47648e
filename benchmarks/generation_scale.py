"""What the engine itself costs, and the memory it takes, from 100 to 100,000 texts of simulated lengths.

    PYTHONPATH=.:benchmarks python benchmarks/generation_scale.py [--out DIR]

A decoder without weights ends each text at its own length, drawn with a seed; sources are as long as real ones. Tasks
of 256 texts follow each other as in a worker: each is submitted while the two before are written. Printed: processor
time a token, the share of rows in use and the peak of Python's memory.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from results import write_results

from mmcot.decoding.row import Row
from mmcot.decoding.rows import Rows
from mmcot.decoding.source_batches import batch_sources

NUM_TEXTS, NUM_ROWS, TASK, END = (100, 1_000, 10_000, 100_000), 64, 256, 1


class SimulatedDecoder:
    """A ``Decoder`` whose texts are as long as their sources' first token says."""

    def __init__(self, num_rows: int, max_new_tokens: int) -> None:
        self.num_rows, self.max_new_tokens = num_rows, max_new_tokens
        self._lengths = torch.zeros(num_rows, dtype=torch.long)

    def admit(self, rows: Sequence[int], states: Sequence[int]) -> list[int]:
        """Take the lengths of texts."""
        self._lengths[list(rows)] = torch.tensor(states)
        return [0] * len(rows)

    def move(self, row: int, *, to: int, num_positions: int) -> None:
        """Move a length."""
        self._lengths[to] = self._lengths[row]

    def step(self, token_ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Logits of the end token at a text's last position, of another one before."""
        is_last = torch.tensor(positions) + 1 >= self._lengths[: len(positions)]
        return torch.stack([is_last.float() * 2, is_last.float() * 3, torch.ones(len(positions)) * 2.5], dim=1)


def read(input_ids: torch.Tensor, **others: torch.Tensor) -> list[int]:
    """The length of each source's text."""
    return input_ids[:, 0].tolist()


def tasks_of(num_texts: int) -> Iterator[list[list[int]]]:
    """The sources of each task; their first token is the length of their text."""
    chance = random.Random(0)
    for start in range(0, num_texts, TASK):
        yield [
            [max(1, min(255, round(chance.lognormvariate(3.5, 0.7)))), *[2] * chance.randint(30, 300)]
            for _ in range(min(TASK, num_texts - start))
        ]


def submit(rows: Rows, sources: list[list[int]]) -> list[Row]:
    """Let the texts of a task wait."""
    written = [Row(max_new_tokens=256, ends=frozenset([END]), index=index) for index in range(len(sources))]
    batches = batch_sources(sources, [None] * len(sources), feature_shape=(1, 1), pad_token_id=0, dtype=torch.float32)
    rows.add([[row] for row in written], batches)
    return written


def write_all(num_texts: int) -> dict[str, Any]:
    """Write this many texts; raises AssertionError where a text has another length than it should."""
    rows = Rows(read, SimulatedDecoder(NUM_ROWS, 256))
    tasks = ((sources, submit(rows, sources)) for sources in tasks_of(num_texts))
    started, num_tokens, begun = time.process_time(), 0, deque(itertools.islice(tasks, 3))
    while begun:
        sources, written = begun.popleft()
        while not all(row.has_ended for row in written):
            rows.step()
        assert [len(row.ids) for row in written] == [source[0] for source in sources]
        num_tokens += sum(len(row.ids) for row in written)
        begun.extend(itertools.islice(tasks, 1))
    seconds = time.process_time() - started
    return {
        "texts": num_texts,
        "tokens": num_tokens,
        "microseconds_a_token": 1e6 * seconds / num_tokens,
        "rows_in_use": rows.num_row_steps / (rows.num_steps * NUM_ROWS),
    }


def peak_mb(work: Callable[[], Any]) -> float:
    """The peak of Python's memory while some work is done, in megabytes."""
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


def main(out: Path | None) -> None:
    torch.set_num_threads(1)
    write_all(NUM_TEXTS[0])
    report = []
    for number in NUM_TEXTS:
        found = write_all(number)
        if number <= 10_000:  # measuring memory takes several times as long
            found["peak_mb"] = peak_mb(lambda number=number: write_all(number))
        print(found, flush=True)
        report.append(found)
    write_results(out, "generation-scale", {"sizes": report})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    main(parser.parse_args().out)
