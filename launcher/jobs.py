"""What crosses from the driver to its workers: plain, picklable values."""

from __future__ import annotations

import dataclasses
from typing import Any

from launcher.config import Settings


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """What a rank needs to know; plain values, so that it crosses processes.

    ``lengths`` maps a split to the file with its samples' token counts.
    """

    stage: str
    settings: Settings
    run_dir: str
    shards_dir: str
    lengths: dict[str, str]
    num_steps: int
    attempt: int
    rationales_dir: str | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON values, as ``launcher.rank`` reads them."""
        return {**vars(self), "settings": self.settings.model_dump()}


@dataclasses.dataclass(frozen=True)
class GenerationJob:
    """What a worker needs to know; plain values, so that it crosses processes.

    ``stage`` is "rationale" or "answer"; the output's text field has that name.
    """

    stage: str
    settings: Settings
    model_dir: str
    shards_dir: str
    output_dir: str
    rationales_dir: str | None = None
    run_dir: str | None = None
    attempt: int | None = None
