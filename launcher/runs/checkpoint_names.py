"""Names of a stage's checkpoints, in a run's folder and in an object store; only this module defines them.

rationale/checkpoints/step-000400/manifest.json     a checkpoint: committed whole
rationale/checkpoints/LATEST                        "step-000400", written last
rationale/checkpoints/damaged-step-000400           one that failed its verification
"""

from __future__ import annotations

import re
from pathlib import Path

from data_shards.json_shapes import NUMBER, Whole
from launcher.runs.records import read_short_text
from mmcot.errors import OperationError

LATEST = "LATEST"
MANIFEST = "manifest.json"
STATE = "state"  # the folder of DeepSpeed's files, in a checkpoint
_FILE = {"size_bytes": Whole(), "sha256": str}
# What a checkpoint's manifest must have to be loaded, copied or handed over.
CHECKPOINT = {
    "step": Whole(),
    "world_size": Whole(1, 10**9),
    "zero_stage": Whole(0, 3),
    "files": {str: _FILE},
    "probe_loss?": (NUMBER, None),
    "run_id?": str,
    "validation?": {"loss": (NUMBER, None), "step": Whole(), "num_worse": Whole(), "has_ended": bool},
    "best?": ({"folder": str, "files": {str: _FILE}}, None),
}
_NAME = re.compile(r"step-[0-9]{1,12}")


class CheckpointError(OperationError):
    """A checkpoint is not valid; the message names its folder."""


def name_of(step: int) -> str:
    """Return the name of a step's folder: ``step-000400`` of 400."""
    return f"step-{step:06d}"


def step_of(name: str) -> int:
    """Return the step in a folder's name: 400 of ``step-000400``."""
    return int(name.rpartition("-")[2])


def names_by_step(names: list[str]) -> list[str]:
    """Return the names of checkpoints among ``names``, the oldest first."""
    return sorted((name for name in names if _NAME.fullmatch(name)), key=step_of)


def checkpoints_by_step(folder: Path) -> list[Path]:
    """Return the checkpoints in a stage's folder, the oldest first."""
    found = (path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))
    return sorted(found, key=lambda path: step_of(path.name))


def as_latest(name: str) -> bytes:
    """Return the content of the file LATEST."""
    return f"{name}\n".encode()


def read_latest(content: str, *, source: str) -> str:
    """Parse the content of the file LATEST; ``source`` is its path, for messages.

    Raises:
        CheckpointError: it is not the name of a checkpoint; files of the named folder would be unpickled.
    """
    name = content.strip()
    if not _NAME.fullmatch(name):
        raise CheckpointError(
            f"{source} holds {name!r}, expected such as step-000400; write one of the checkpoints there into it"
        )
    return name


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the folder that LATEST names, or None before the first checkpoint.

    Raises:
        CheckpointError: LATEST contains something else.
    """
    path = folder / LATEST
    return folder / read_latest(read_short_text(path), source=str(path)) if path.exists() else None
