"""Jobs that the driver sends to its workers: plain, picklable values."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from data_shards.mirror import local_folder
from launcher.config.settings import Settings

MODEL_FACTS_FILE = "mmcot.json"
# In a checkpoint's manifest: the run it belongs to (launcher/training/identity.py), and where it was handed over, the
# trial of a tuning that it is from (launcher/tuning/handover.py).
IDENTITY_FACTS = ("run_id", "settings_fingerprint", "data_fingerprint", "rationales_fingerprint")
HANDED_OVER = "handed_over_by"


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """The job of a rank: plain values that can be sent to its process.

    ``lengths`` maps a split to the file with its samples' token counts, ``texts`` the name of each text that the stage
    reads to its folder. ``run_facts`` identify the run in its
    checkpoints (``launcher/training/identity.py``); a job of an earlier version has none, and the first rank
    computes them.
    """

    stage: str
    settings: Settings
    run_dir: str
    shards_dir: str
    lengths: dict[str, str]
    num_steps: int
    attempt: int
    texts: dict[str, str] = dataclasses.field(default_factory=dict)
    run_facts: dict[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON values, as ``launcher.training.torchrun`` reads them."""
        return {**vars(self), "settings": self.settings.model_dump()}


@dataclasses.dataclass(frozen=True)
class GenerationJob:
    """The job of a worker: plain values that can be sent to its process.

    The output's text field has the stage's name. ``texts`` are the folders of the texts that it reads; ``step`` is
    the run's step that it belongs to. With ``other_pictures`` every question has the pictures of another one.
    """

    stage: str
    settings: Settings
    model_dir: str
    shards_dir: str
    output_dir: str
    texts: dict[str, str] = dataclasses.field(default_factory=dict)
    run_dir: str | None = None
    attempt: int | None = None
    step: str | None = None
    other_pictures: bool = False

    def local_shards_dir(self) -> Path:
        """The data folder on this machine."""
        return local_folder(self.shards_dir, self.settings.data.cache_dir, features=self.settings.data.features)


def model_facts(settings: Settings, stage: str) -> dict[str, Any]:
    """The format and limits of a model's prompts; stored with the weights."""
    spec = settings.stage(stage)
    return {
        "stage": stage,
        "format": spec.format,
        "max_source_tokens": spec.max_source_tokens,
        "max_target_tokens": spec.max_target_tokens,
        "use_caption": settings.data.use_caption,
        "features": settings.data.features,
    }
