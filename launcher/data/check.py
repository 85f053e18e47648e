"""Verifying a finished data folder, shard by shard."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from data_shards.check import check_shards
from data_shards.manifest import manifest_shards, read_manifest, read_problems
from data_shards.mirror import local_folder
from data_shards.sources.duplicates import find_duplicates
from launcher.config.settings import Data


def check_data(shards_dir: str | Path, report: Callable[[str], None] = print, *, features: str | None = None) -> int:
    """Verify every shard of a folder and look for repeated questions; returns the number of samples checked.

    Args:
        features: the features to check of a remote folder, whose files cannot be listed; of a local folder all are.
    """
    shards_dir = local_folder(shards_dir, Data().cache_dir, features=features)
    total = 0
    for name, num_samples in check_shards(shards_dir):
        report(f"ok  {name}  {num_samples:,} samples")
        total += num_samples
    folder = Path(shards_dir) / "text"
    shards = manifest_shards(read_manifest(folder))
    duplicates = find_duplicates(
        dataclasses.replace(problem, split=shard.split) for shard in shards for problem in read_problems(folder, shard)
    )
    found = [
        ("the same text, no picture", duplicates.without_picture),
        ("the same text, pictures may differ", duplicates.with_picture),
    ]
    for label, pairs in found:
        for (first, second), texts in sorted(pairs.items()):
            where = f"within {first}" if first == second else f"LEAK between {first} and {second}"
            report(f"{where}: {len(texts):,} questions of {label}, such as {', '.join(texts[0][:4])}")
    if not any(pairs for _, pairs in found):
        report("no question comes twice")
    return total
