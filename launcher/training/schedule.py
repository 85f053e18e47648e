"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from launcher.config.settings import Training


def learning_rate(step: int, *, training: Training, total_steps: int) -> float:
    """Linear warm-up to the peak, then decay to ``final_lr_fraction`` of it by ``schedule``."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    done = min(1.0, (step - training.warmup_steps) / max(1, total_steps - training.warmup_steps))
    height = {"linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done)), "constant": 1.0}[
        training.schedule
    ]
    return training.learning_rate * (training.final_lr_fraction + (1.0 - training.final_lr_fraction) * height)
