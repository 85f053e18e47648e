"""The run's folder: the truth about what was done, with one owner at a time.

    runs/demo/
      run.yaml                     resolved settings
      lock.json                    owner (pid, host), attempt, heartbeat
      rank-token                   what the ranks of a training prove to each other that they know
      steps/<step>.json            a finished step: fingerprints of its inputs, outputs, attempt
      rationale/ answer/           checkpoints/ and model/ of each training
      rationales/ predictions/     what was written
      scores.json scores.val.json  logs/

The *attempt* grows with every owner. A process that belongs to an older attempt may not
commit anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import secrets
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import yaml

from data_shards.atomic_files import commit_bytes, commit_json, exclusive, read_json
from launcher.runs.background import beside
from launcher.config.loading import dump_settings, parse_settings
from launcher.config.settings import Settings, SettingsError

HEARTBEAT_S = 5.0
PARENT = "pipeline"  # the key of the whole run among its MLflow runs (mlflow.json)
TUNING = "tuning"  # the journal of a trial's objective, and of a tuning's best
STALE_AFTER_S = 60.0
_FREE_SETTINGS = {  # what may change between attempts, because no result depends on it
    ("run", "dir"),
    *(("data", name) for name in ("remote", "cache_dir", "cache_gb")),
    *(("cluster", name) for name in ("address", "num_workers", "min_workers", "use_gpu")),  # the last: see launcher/cluster/gpus.py
    *(("tracking", name) for name in ("uri", "send_every_s", "register_models")),
    ("generation", "max_attempts"), ("generation", "hang_timeout_s"), ("tuning", "max_concurrent"), ("tuning", "time_budget_s"),
    *(
        ("training", name)
        for name in (
            "checkpoint_every", "keep_checkpoints", "checkpoint_url", "validate_every", "log_every", "max_failures", "hang_timeout_s",
            "peak_tflops", "loader_processes", "activation_checkpointing", "offload", "nvme_dir",
        )
    ),
}  # fmt: skip


class RunError(RuntimeError):
    """The run's folder cannot be used as asked; the message names it."""


class Stopped(RuntimeError):
    """A step was asked to stop and did, with a checkpoint; the same command goes on."""


@dataclasses.dataclass(frozen=True)
class RunDir:
    """Paths in a run's folder."""

    path: Path

    def checkpoints(self, stage: str) -> Path:
        return self.path / stage / "checkpoints"

    def model(self, stage: str) -> Path:
        return self.path / stage / "model"

    def journal(self, stage: str) -> Path:
        return self.journal_of(stage)

    def journal_of(self, writer: str) -> Path:
        return self.path / "logs" / f"{writer}-metrics.jsonl"

    def ledger(self, stage: str, rank: int) -> Path:
        return self.path / "logs" / f"{stage}-ledger-rank{rank}.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def tracking(self) -> Path:
        """What MLflow is to be told, in order."""
        return self.path / "logs" / "tracking.jsonl"

    @property
    def mlflow_state(self) -> Path:
        """What MLflow has been told."""
        return self.path / "mlflow.json"

    def identity(self) -> str:
        """The run's id, which no other run has; made when it is first asked for (``launcher/training/identity.py`` asks first)."""
        path = self._identity_file
        if not path.exists():
            commit_bytes(path, uuid.uuid4().hex.encode())
        return path.read_text()

    def has_identity(self) -> bool:
        """Whether the run has an id yet."""
        return self._identity_file.exists()

    def take_identity(self, run_id: str) -> None:
        """Be the run of this id: it began in another folder, and its checkpoints are used here.

        Raises:
            RunError: it is no id.
        """
        if not re.fullmatch(r"[0-9A-Za-z_-]{1,64}", run_id):  # it becomes a part of MLflow's queries
            raise RunError(f"a checkpoint of {self.path} names the run id {run_id!r}, expected 32 hex digits; remove what names it")
        commit_bytes(self._identity_file, run_id.encode())

    @property
    def _identity_file(self) -> Path:
        return self.path / "logs" / "identity"

    @property
    def device(self) -> Path:
        """Whether the run computes on GPUs, decided at its first start."""
        return self.path / "device.json"

    def rank_token(self) -> str:
        """What this run's ranks know and others do not: drawn once by whichever rank comes first, readable by its user alone."""
        path = self.path / "rank-token"
        if not path.exists():
            draft = self.path / f".tmp-{uuid.uuid4().hex[:12]}-{path.name}"
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
                file.write(secrets.token_hex(32))
            try:
                os.link(draft, path)
            except FileExistsError:  # another rank was first, and its token counts
                pass
            except OSError:  # a file system without hard links
                os.replace(draft, path)
            draft.unlink(missing_ok=True)
        return path.read_text(encoding="ascii")

    @property
    def lengths(self) -> Path:
        return self.path / "lengths"

    @property
    def rationales(self) -> Path:
        return self.path / "rationales"

    @property
    def predictions(self) -> Path:
        return self.path / "predictions"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def scores(self, split: str) -> Path:
        return self.path / ("scores.json" if split == "test" else f"scores.{split}.json")

    def marker(self, step: str) -> dict[str, Any] | None:
        """The marker of a finished step, or None."""
        path = self.marker_path(step)
        return read_json(path) if path.exists() else None

    def data_marker(self) -> dict[str, Any] | None:
        """The marker of the data step; of a tuning and its new trials that of any trial, because all of them read one folder."""
        tuning = self.path.parent.parent if self.path.parent.name == "trials" else self.path
        others = sorted(tuning.glob("trials/*/steps/data.json")) if (tuning / "tune").is_dir() else []
        return self.marker("data") or (read_json(others[0]) if others else None)

    def marker_path(self, step: str) -> Path:
        return self.path / "steps" / f"{step}.json"

    def mark_done(self, step: str, marker: dict[str, Any]) -> None:
        """Commit a step's marker; the last act of a step."""
        commit_json(self.marker_path(step), marker)

    def request_stop(self, attempt: int) -> None:
        """Ask the ranks of an attempt to write a checkpoint and stop."""
        commit_json(self.path / "stop.json", {"attempt": attempt})

    def stop_requested(self, attempt: int) -> bool:
        """Whether that was asked of this attempt."""
        path = self.path / "stop.json"
        return path.exists() and read_json(path)["attempt"] == attempt

    def check_attempt(self, attempt: int) -> None:
        """Raise RunError if ``attempt`` no longer owns the run."""
        current = read_json(self.path / "lock.json")["attempt"]
        if current != attempt:
            raise RunError(f"{self.path} is now owned by attempt {current}; attempt {attempt} may not commit anything")


def claim_settings(run_dir: RunDir, settings: Settings) -> None:
    """Write run.yaml, or check that the standing one says the same.

    Raises:
        SettingsError: the folder belongs to a run of other settings.
    """
    path = run_dir.path / "run.yaml"
    if not path.exists():
        commit_bytes(path, dump_settings(settings).encode())
        return
    standing = without_free(parse_settings(yaml.safe_load(path.read_text(encoding="utf-8"))).model_dump())
    now = without_free(settings.model_dump())
    differing = [name for name in sorted({*standing, *now}) if standing.get(name) != now.get(name)]
    if differing:
        changes = "; ".join(f"{name} was {standing.get(name)!r} and is now {now.get(name)!r}" for name in differing[:4])
        raise SettingsError(
            f"{run_dir.path} holds a run of other settings ({changes}); go on with its own with --config {path} --set run.dir={run_dir.path}, "
            "or give this run a folder of its own with --set run.dir=runs/ANOTHER-NAME"
        )


def settings_of(run_dir: RunDir) -> Settings:
    """The settings a run was made with, in this place.

    Raises:
        RunError: the folder holds no run.
    """
    path = run_dir.path / "run.yaml"
    if not path.exists():
        raise RunError(f"{run_dir.path} holds no run (no run.yaml); give the folder of one, such as runs/demo")
    settings = parse_settings(yaml.safe_load(path.read_text(encoding="utf-8")))
    return settings.model_copy(update={"run": settings.run.model_copy(update={"dir": str(run_dir.path)})})


def shards_dir_of(run_dir: RunDir) -> str:
    """The data folder a run was made with: its path or URL.

    Raises:
        RunError: the run's data step is not done.
    """
    marker = run_dir.marker("data")
    if marker is None:
        raise RunError(f"{run_dir.path} has no finished data step; give the folder of a run, such as runs/demo")
    return marker["outputs"]["shards_dir"]


@contextlib.contextmanager
def owned(run_dir: RunDir) -> Iterator[int]:
    """Own the run while the block lasts; yields the attempt.

    Raises:
        RunError: another living process owns it.
    """
    path = run_dir.path / "lock.json"
    attempt = 1
    with exclusive(run_dir.path):
        if path.exists():
            lock = read_json(path)
            if _is_alive(lock):
                raise RunError(
                    f"{run_dir.path} is being run by process {lock['pid']} on {lock['host']} (attempt {lock['attempt']}); "
                    "wait for it, end it, or use another run.dir"
                )
            attempt = lock["attempt"] + 1
        commit_json(path, _lock(attempt))
    try:
        with beside(partial(_beat, path, attempt), name="heartbeat"):
            yield attempt
    finally:
        _write_own_lock(path, attempt, released=True)


def owner(run_dir: RunDir) -> dict[str, Any] | None:
    """The lock of the living owner, or None."""
    path = run_dir.path / "lock.json"
    lock = read_json(path) if path.exists() else None
    return lock if lock and _is_alive(lock) else None


def _lock(attempt: int) -> dict[str, Any]:
    pid = os.getpid()
    return {
        "pid": pid, "process_started": psutil.Process(pid).create_time(), "host": socket.gethostname(),
        "attempt": attempt, "heartbeat": time.time(), "released": False,
    }  # fmt: skip


def _is_alive(lock: dict[str, Any]) -> bool:
    if lock["released"]:
        return False
    if lock["host"] != socket.gethostname():
        return time.time() - lock["heartbeat"] < STALE_AFTER_S
    try:
        process = psutil.Process(lock["pid"])
        return abs(process.create_time() - lock["process_started"]) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _beat(path: Path, attempt: int, stopped: threading.Event) -> None:
    while not stopped.wait(HEARTBEAT_S):
        with contextlib.suppress(OSError):  # a full or absent disk now may be well at the next beat
            _write_own_lock(path, attempt, released=False)


def _write_own_lock(path: Path, attempt: int, *, released: bool) -> None:
    """Renew the lock, unless another attempt has taken the run over."""
    with exclusive(path.parent):
        if read_json(path)["attempt"] == attempt:
            commit_json(path, {**_lock(attempt), "released": released})


def without_free(values: dict[str, Any], prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    """Flatten to dotted names, leaving out what may change between attempts."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = (*prefix, key)
        if isinstance(value, dict):
            flat |= without_free(value, name)
        elif name not in _FREE_SETTINGS:
            flat[".".join(name)] = value
    return flat
