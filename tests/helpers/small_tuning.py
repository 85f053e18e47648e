"""The settings of a tuning whose trials take seconds."""

from __future__ import annotations

SMALL_TUNING = {
    "run": {"name": "lr"},
    "data": {"mini_sqa": {"num_train": 64, "num_val": 16, "num_test": 16}, "samples_per_shard": 24},
    "training": {
        "checkpoint_every": 10,
        "validate_every": 10,
        "log_every": 5,
        "micro_batch_size": 16,
        "warmup_steps": 0,
    },
    "rationale": {"num_steps": 40, "max_target_tokens": 24},
    "cluster": {"num_workers": 1},
}
