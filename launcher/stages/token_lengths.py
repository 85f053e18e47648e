"""Token counts of every sample of a split for the plan; counted once and cached."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_shards.atomic_files import committing, fingerprint
from launcher.config.settings import Settings

if TYPE_CHECKING:
    from launcher.stages.samples import StageSamples

NAMES = ("source", "target", "source_cut", "target_cut")
_PARALLEL_FROM = 50_000  # samples; below, starting processes takes longer than counting
_CHUNK = 2_000


@dataclasses.dataclass(frozen=True)
class LengthsOf:
    """The key of lengths, with which another process can open the samples."""

    settings: Settings
    stage: str
    split: str
    shards_dir: str
    texts: dict[str, str]

    def open(self) -> StageSamples:
        """Open the samples."""
        from launcher.stages.samples import load_tokenizer, open_stage

        return open_stage(
            self.settings,
            self.stage,
            self.split,
            shards_dir=self.shards_dir,
            tokenizer=load_tokenizer(self.settings, self.shards_dir),
            texts=self.texts,
            for_training=True,
        )


def cached_lengths(key: LengthsOf, samples: StageSamples, cache_dir: str | Path, inputs: dict) -> Path:
    """Return the file of the lengths of all samples, counted once for these ``inputs``, which determine them."""
    path = Path(cache_dir) / f"{fingerprint(inputs)}.npz"
    if not path.exists():
        lengths = count_lengths(key, samples)
        with committing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **lengths)  # pyright: ignore[reportArgumentType] (no array is named allow_pickle)
    return path


def read_lengths(path: str | Path, names: Sequence[str] = NAMES) -> dict[str, np.ndarray]:
    """Read token counts, int32 [N] each: source, target, source_cut, target_cut, or only those of ``names``."""
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in names}


def count_lengths(key: LengthsOf, samples: StageSamples, *, processes: int | None = None) -> dict[str, np.ndarray]:
    """Encode every sample and count its tokens, in several processes for a large split.

    Args:
        processes: None uses all processors of this machine for a large split, and one for a small one.
    """
    chunks = [range(start, min(start + _CHUNK, len(samples))) for start in range(0, len(samples), _CHUNK)]
    if processes is None:
        processes = len(os.sched_getaffinity(0)) if len(samples) >= _PARALLEL_FROM else 1
    if processes > 1:
        context = multiprocessing.get_context("forkserver")
        with ProcessPoolExecutor(processes, mp_context=context, initializer=_open_in_process, initargs=(key,)) as pool:
            counted = list(pool.map(_count_in_process, chunks))
    else:
        counted = [_count(samples, chunk) for chunk in chunks]
    columns = np.concatenate(counted or [np.empty((0, len(NAMES)), np.int32)])
    return {name: np.ascontiguousarray(columns[:, index]) for index, name in enumerate(NAMES)}


def _count(samples: StageSamples, chunk: range) -> np.ndarray:
    """Token counts of the samples of ``chunk`` in the order of ``NAMES``, int32 [chunk, 4]."""
    if samples.is_remote:
        samples.reader.prefetch(np.arange(chunk.start, chunk.stop), features=False)
    pairs = (samples.encode(sample) for sample in chunk)
    counts = [(len(pair.source_ids), len(pair.target_ids), pair.source_cut, pair.target_cut) for pair in pairs]
    return np.array(counts, dtype=np.int32)


_samples: StageSamples


def _open_in_process(key: LengthsOf) -> None:
    global _samples
    _samples = key.open()


def _count_in_process(chunk: range) -> np.ndarray:
    return _count(_samples, chunk)
