"""The settings that generated texts depend on."""

from __future__ import annotations

from typing import Any

from launcher.config.settings import Settings


def generation_inputs(settings: Settings) -> dict[str, Any]:
    """The settings that generated texts depend on, in addition to model, data and prompts."""
    generation = settings.generation
    inputs = {
        "batch_size": generation.batch_size,
        "task_samples": generation.task_samples,
        "precision": generation.precision,
    }
    if generation.temperature > 0:
        inputs |= {"temperature": generation.temperature, "top_p": generation.top_p, "seed": settings.run.seed}
    return inputs
