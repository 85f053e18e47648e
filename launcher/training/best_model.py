"""The model with the lowest validation loss, kept while a training goes on, and the end of one that gets no better.

    rationale/best/            a Hugging Face folder, as rationale/model; its mmcot.json names step and loss

The state is in every checkpoint's manifest (``validation``), so that a resumed training goes on as if it had not been
interrupted.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any


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
