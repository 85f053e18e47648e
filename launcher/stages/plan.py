"""The plan of a stage's training."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from data_shards.plan import Plan
from launcher.config.settings import Settings


def make_plan(
    settings: Settings, lengths: Mapping[str, np.ndarray], shard_of_sample: np.ndarray, *, epoch: int
) -> Plan:
    """Return the plan of an epoch; the driver counts steps with it, and every rank trains by it.

    Raises:
        ValueError: ``training.max_tokens_per_block`` is below the longest question.
    """
    training = settings.training
    return Plan(
        lengths["source"],
        lengths["target"],
        shard_of_sample,
        seed=settings.run.seed,
        epoch=epoch,
        global_batch_size=training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        window_shards=training.window_shards,
        group_by_length=training.group_by_length,
        max_tokens_per_block=training.max_tokens_per_block,
    )
