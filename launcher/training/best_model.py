"""The model with the lowest validation loss, kept while a training goes on, and the end of one that gets no better.

    rationale/best/            a Hugging Face folder, as rationale/model; its mmcot.json names step and loss

The state is in every checkpoint's manifest (``validation``), so that a resumed training goes on as if it had not been
interrupted. Where checkpoints are copied to an object store, the model is copied with them, and the manifest names its
files (``best``; ``launcher/training/checkpoint_store.py``):

    {"folder": "best-000120-0f5c...", "step": 120, "validation_loss": 0.41, "files": {name: {size_bytes, sha256}}}
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_shards.atomic_files import fingerprint, link_file, sha256_of_file
from data_shards.json_shapes import NUMBER, Whole, read_record
from launcher.stages.jobs import MODEL_FACTS_FILE


@dataclasses.dataclass
class BestLoss:
    """The lowest validation loss so far.

    Attributes:
        loss: the lowest so far; infinite before the first.
        step: optimizer steps done when it was measured.
        num_worse: validations since then.
        has_ended: whether the training ended because of them.
    """

    loss: float = math.inf
    step: int = 0
    num_worse: int = 0
    has_ended: bool = False

    @classmethod
    def of_manifest(cls, manifest: dict[str, Any]) -> BestLoss:
        """The state when a checkpoint was saved; a new one for checkpoints of earlier versions."""
        facts = manifest.get("validation", {})
        return cls(**facts | {"loss": math.inf}) if facts.get("loss") is None else cls(**facts)

    def as_fact(self) -> dict[str, Any]:
        """The state for a checkpoint's manifest; JSON has no infinity."""
        return dataclasses.asdict(self) | {"loss": self.loss if math.isfinite(self.loss) else None}

    @property
    def reason(self) -> str:
        """Why the training ended, as a part of a sentence."""
        return (
            f"because the validation loss was not below the {self.loss:.4f} of step {self.step:,} in "
            f"{self.num_worse} validations (training.early_stopping_patience)"
        )

    def add(self, step: int, loss: float, *, patience: int | None) -> bool:
        """Take a validation loss into account; returns whether it is the lowest so far."""
        if loss < self.loss:
            self.loss, self.step, self.num_worse = loss, step, 0
            return True
        self.num_worse += 1
        self.has_ended = patience is not None and self.num_worse >= patience
        return False


def kept_facts(folder: Path) -> dict[str, Any]:
    """Step and validation loss of the kept model, and more; nothing where there is none."""
    path = folder / MODEL_FACTS_FILE
    shape = {"step?": Whole(), "validation_loss?": NUMBER}
    return read_record(path, shape, remedy=f"restore it, or delete {folder}") if path.exists() else {}


def link_best(folder: Path, copy: Path, best: BestLoss) -> bool:
    """Link the files of the kept model, which a later one replaces; returns whether it is that of ``best``."""
    facts = kept_facts(folder)
    if (facts.get("step"), facts.get("validation_loss")) != (best.step, best.loss):
        return False
    shutil.copytree(folder, copy, copy_function=link_file)
    return True


def describe_best(copy: Path, known: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a manifest tells of a kept model.

    Args:
        known: what the manifest before tells; where it is of the same model, no file is read.
    """
    facts = {name: kept_facts(copy)[name] for name in ("step", "validation_loss")}
    if known is not None and facts.items() <= known.items():
        return dict(known)
    files = {
        str(path.relative_to(copy)): {"size_bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        for path in sorted(copy.rglob("*"))
        if path.is_file()
    }
    return {"folder": f"best-{facts['step']:06d}-{fingerprint(files)}", **facts, "files": files}
