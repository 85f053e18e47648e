"""The settings that generated texts depend on."""

from __future__ import annotations

from typing import Any

from launcher.config.settings import Generation, Settings

# Where they have their default, an output of a version without them has the same inputs.
_OF_ALL_TEXTS = ("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens")
_OF_SAMPLING = ("top_k", "min_p", "candidates", "search")


def generation_inputs(settings: Settings) -> dict[str, Any]:
    """The settings that generated texts depend on, in addition to model, data and prompts."""
    generation = settings.generation
    inputs = {
        "batch_size": generation.batch_size,
        "task_samples": generation.task_samples,
        "precision": generation.precision,
    } | _changed(generation, _OF_ALL_TEXTS)
    if generation.temperature > 0:
        inputs |= {"temperature": generation.temperature, "top_p": generation.top_p, "seed": settings.run.seed}
        inputs |= _changed(generation, _OF_SAMPLING)
    return inputs


def _changed(generation: Generation, names: tuple[str, ...]) -> dict[str, Any]:
    """The settings of these names that do not have their default."""
    fields = Generation.model_fields
    return {name: value for name in names if (value := getattr(generation, name)) != fields[name].default}
