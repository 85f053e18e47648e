"""The run's folder: the record of finished work, with one owner at a time.

    runs/demo/
      run.yaml                     resolved settings
      lock.json                    owner (pid, host), attempt, heartbeat
      rank-token                   the secret by which the ranks of a training authenticate to each other
      steps/<step>.json            a finished step: fingerprints of its inputs, outputs, attempt
      rationale/ answer/           checkpoints/ and model/ of each training, by the names of the chain's stages
      rationales/ predictions/     generated texts
      scores.json scores.val.json  logs/
      evaluations/<split>/         answers and scores of `mmcot evaluate RUN`

The *attempt* grows with every owner. A process of an older attempt must not commit anything.
"""

from __future__ import annotations

import dataclasses
import os
import re
import secrets
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Any

from data_shards.atomic_files import commit_bytes, commit_json
from launcher.runs.places import place_around
from launcher.runs.records import PARENT as PARENT
from launcher.runs.records import read_attempt, read_marker, read_short_text
from mmcot.errors import OperationError

_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")  # it is used in MLflow's queries
TUNING = "tuning"  # the journal of a trial's objective, and of a tuning's best values


class RunError(OperationError):
    """The run's folder cannot be used for the requested action; the message names it."""


@dataclasses.dataclass(frozen=True)
class RunDir:
    """Paths in a run's folder."""

    path: Path

    def checkpoints(self, stage: str) -> Path:
        """The folder of a stage's checkpoints."""
        return self.path / stage / "checkpoints"

    @property
    def zero_stage(self) -> Path:
        """The ZeRO stage of the run's trainings, where the settings leave it open."""
        return self.path / "zero_stage.json"

    def model(self, stage: str) -> Path:
        """The folder of a stage's exported model."""
        return self.path / stage / "model"

    def best_model(self, stage: str) -> Path:
        """The folder of a stage's model with the lowest validation loss."""
        return self.path / stage / "best"

    def journal(self, stage: str) -> Path:
        """The journal of a stage's training."""
        return self.journal_of(stage)

    def journal_of(self, writer: str) -> Path:
        """The journal of a stage, or of another step that writes one."""
        return self.path / "logs" / f"{writer}-metrics.jsonl"

    def ledger(self, stage: str, rank: int) -> Path:
        """The ledger of one rank: the question ids of every step (``sample_ledger.py``)."""
        return self.path / "logs" / f"{stage}-ledger-rank{rank}.jsonl"

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.path / "report.html"

    @property
    def tracking(self) -> Path:
        """The queue of what is to be logged to MLflow, in order."""
        return self.path / "logs" / "tracking.jsonl"

    @property
    def mlflow_state(self) -> Path:
        """What has been logged to MLflow, and the ids of its runs."""
        return self.path / "mlflow.json"

    def identity(self) -> str:
        """Return the run's unique id; made at the first call, which is in ``launcher/training/identity.py``.

        Raises:
            RunError: the file holds something else.
        """
        path = self._identity_file
        if not path.exists():
            commit_bytes(path, uuid.uuid4().hex.encode())
        found = read_short_text(path)
        if not _ID.fullmatch(found):
            raise RunError(
                f"{path} holds {found!r}, expected 32 hex digits; write the run_id of a checkpoint's manifest into it, "
                "or delete it: the next start takes the id from there"
            )
        return found

    def has_identity(self) -> bool:
        """Whether the run has an id yet."""
        return self._identity_file.exists()

    def take_identity(self, run_id: str) -> None:
        """Take the id of a run that was started in another folder, and continue it with its checkpoints.

        Raises:
            RunError: it is not a valid id.
        """
        if not _ID.fullmatch(run_id):
            raise RunError(
                f"a checkpoint of {self.path} names the run id {run_id!r}, expected 32 hex digits; remove the "
                "checkpoint"
            )
        commit_bytes(self._identity_file, run_id.encode())

    @property
    def _identity_file(self) -> Path:
        return self.path / "logs" / "identity"

    @property
    def handed_over(self) -> Path:
        """Which checkpoint of another trial this trial of a tuning began with (``launcher/tuning/handover.py``)."""
        return self.path / "handed_over.json"

    @property
    def device(self) -> Path:
        """Whether the run computes on GPUs, decided at its first start."""
        return self.path / "device.json"

    def rank_token(self) -> str:
        """Return the secret that only this run's ranks know.

        The first rank draws it; the file is readable by its user alone.
        """
        path = self.path / "rank-token"
        if not path.exists():
            draft = self.path / f".tmp-{uuid.uuid4().hex[:12]}-{path.name}"
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
                file.write(secrets.token_hex(32))
            try:
                os.link(draft, path)
            except FileExistsError:  # another rank was first, and its token is used
                pass
            except OSError:  # a file system without hard links
                os.replace(draft, path)
            draft.unlink(missing_ok=True)
        return read_short_text(path)

    @property
    def lengths(self) -> Path:
        """The folder of token counts (``launcher/stages/token_lengths.py``)."""
        return self.path / "lengths"

    def texts(self, name: str) -> Path:
        """The folder of a text that a stage writes for every question, such as the rationales."""
        return self.path / name

    @property
    def predictions(self) -> Path:
        """The folder of generated answers and predictions."""
        return self.path / "predictions"

    def evaluation(self, split: str) -> Path:
        """The folder of a later evaluation of a split (`mmcot evaluate RUN`)."""
        return self.path / "evaluations" / split

    @property
    def logs(self) -> Path:
        """The folder of journals, ledgers and logs."""
        return self.path / "logs"

    def scores(self, split: str) -> Path:
        """The scores of a split."""
        return self.path / ("scores.json" if split == "test" else f"scores.{split}.json")

    @property
    def scores_with_other_pictures(self) -> Path:
        """The scores of the test split with the pictures of other questions (``generation.other_pictures``)."""
        return self.predictions / "scores.test-other-pictures.json"

    def marker(self, step: str, *, needs: Collection[str] = ()) -> dict[str, Any] | None:
        """Return the marker of a finished step, or None.

        Args:
            needs: the keys that the marker must have.

        Raises:
            InputError: the marker is not valid.
        """
        path = self.marker_path(step)
        return read_marker(path, needs=needs) if path.exists() else None

    def data_marker(self) -> dict[str, Any] | None:
        """Return the marker of the data step, with the present place of the data folder, or None.

        For a tuning and its new trials it is that of any trial, because all trials read one data folder.
        """
        tuning = self.path.parent.parent if self.path.parent.name == "trials" else self.path
        others = sorted(tuning.glob("trials/*/steps/data.json")) if (tuning / "tune").is_dir() else []
        owner = self if not others or self.marker("data") else RunDir(others[0].parents[1])
        marker = owner.marker("data")
        if marker and (shards_dir := marker.get("outputs", {}).get("shards_dir")):
            marker["outputs"]["shards_dir"] = place_around(owner.path, shards_dir)
        return marker

    def marker_path(self, step: str) -> Path:
        """The file of a step's marker."""
        return self.path / "steps" / f"{step}.json"

    def mark_done(self, step: str, marker: dict[str, Any]) -> None:
        """Commit a step's marker, as the step's last action."""
        commit_json(self.marker_path(step), marker)

    def request_stop(self, attempt: int) -> None:
        """Request that the ranks of an attempt write a checkpoint and stop."""
        commit_json(self.path / "stop.json", {"attempt": attempt})

    def stop_requested(self, attempt: int) -> bool:
        """Whether a stop of this attempt was requested."""
        path = self.path / "stop.json"
        return path.exists() and read_attempt(path) == attempt

    def check_attempt(self, attempt: int) -> None:
        """Raise RunError if ``attempt`` no longer owns the run."""
        current = read_attempt(self.path / "lock.json")
        if current != attempt:
            raise RunError(f"{self.path} is now owned by attempt {current}; attempt {attempt} must not commit anything")


def shards_dir_of(run_dir: RunDir) -> str:
    """Return the path or URL of a run's data folder.

    Raises:
        RunError: the run's data step is not done, or the folder does not exist.
    """
    from data_shards.remote_files import is_remote  # brings fsspec, which the team's MLflow server has not

    marker = run_dir.marker("data", needs=("shards_dir",))
    if marker is None:
        raise RunError(f"{run_dir.path} has no finished data step; give the folder of a run, such as runs/demo")
    shards_dir = place_around(run_dir.path, marker["outputs"]["shards_dir"])
    if not is_remote(shards_dir) and not Path(shards_dir).exists():
        raise RunError(missing_data(run_dir, shards_dir))
    return shards_dir


def missing_data(run_dir: RunDir, shards_dir: str) -> str:
    """The error message for a data folder that does not exist."""
    return (
        f"{shards_dir}, the data folder of {run_dir.path}, does not exist; put it back, or run `mmcot run` with the "
        "run's own settings and --set data.shards_dir=ITS-PLACE"
    )
