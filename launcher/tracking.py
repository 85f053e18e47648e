"""What a run tells MLflow, written down first: a tree of one parent run a pipeline and a child a step.

    with open_tracker(settings, run_dir) as tracker, tracker.step("train-rationale") as child:
        child.log_params({"learning_rate": 1e-3})
        child.follow("rationale-metrics.jsonl")      # points are sent as they are written

Every call appends a line to ``logs/tracking.jsonl`` and returns:

    {"run": "train-rationale", "do": "params", "time_ms": 1790000000000, "values": {"learning_rate": "0.001"}}

A thread (``launcher/mlflow_sync.py``) makes MLflow agree with the file, now or when a server
that was away is back. Nothing here imports MLflow or waits for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launcher.config import setting_names, value_of
from launcher.journal import LineFile
from launcher.run_dir import PARENT, RunDir, Stopped
from launcher.settings import Settings

_LONGEST_PARAM = 6000  # characters MLflow takes


@dataclasses.dataclass(frozen=True)
class RunLog:
    """One run of the tree: what is told of it is appended to the file."""

    file: LineFile
    run: str

    def log_params(self, params: dict[str, Any]) -> None:
        """Parameters; the first value of each stands, as in MLflow."""
        self._append("params", values={key: str(value)[:_LONGEST_PARAM] for key, value in params.items()})

    def log_tags(self, tags: dict[str, str]) -> None:
        """Tags; the last value of each stands."""
        self._append("tags", values=tags)

    def log_scores(self, scores: dict[str, float | None]) -> None:
        """Final values; the first of each stands."""
        self._append("scores", values={key: float(value) for key, value in scores.items() if value is not None})

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """A file to be copied into the run's artifacts."""
        self._append("artifact", path=str(path.absolute()), folder=folder)

    def log_dataset(self, *, name: str, digest: str, source: str, context: str, profile: dict[str, Any]) -> None:
        """A data set the run read; ``context`` says what for, such as "training"."""
        self._append("dataset", name=name, digest=digest[:36], source=source, context=context, profile=profile)

    def log_model(self, **values: Any) -> None:
        """A finished model for the registry; see ``launcher/registry.py`` for the values."""
        self._append("model", **values)

    def follow(self, pattern: str) -> None:
        """Send the points of all files of this name in ``logs/``, now and later."""
        self._append("follow", pattern=pattern)

    @contextlib.contextmanager
    def running(self, *, name: str, tags: dict[str, str], parent_key: str | None = None) -> Iterator[None]:
        """Begin or continue the run; its end is that of the block.

        Args:
            parent_key: of a run of another folder that this one is a child of.
        """
        self._append("start", name=name, tags=tags, parent_key=parent_key)
        try:
            yield
        except BaseException as error:
            self.end("FAILED" if isinstance(error, Exception) and not isinstance(error, Stopped) else "KILLED")
            raise
        self.end("FINISHED")

    def end(self, status: str) -> None:
        """The run's end: FINISHED, FAILED or KILLED."""
        self._append("end", status=status)

    def _append(self, do: str, **values: Any) -> None:
        self.file.append({"run": self.run, "do": do, "time_ms": int(time.time() * 1000), **values})


@dataclasses.dataclass(frozen=True)
class Tracker:
    """The parent run of a pipeline, and its children."""

    parent: RunLog

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[RunLog]:
        """The child run of a step, continued if it exists."""
        child = RunLog(self.parent.file, name)
        with child.running(name=name, tags={"mmcot.step": name}):
            yield child


@contextlib.contextmanager
def open_tracker(
    settings: Settings, run_dir: RunDir, *, report: Callable[[str], None] = print, parent_key: str | None = None
) -> Iterator[Tracker]:
    """Open (or continue) the parent run of a run's folder, and send while the block lasts."""
    from launcher.environment import describe_environment
    from launcher.mlflow_sync import sending

    file = LineFile(run_dir.tracking)
    parent = RunLog(file, PARENT)
    with contextlib.closing(file), sending(settings, run_dir, report=report):
        with parent.running(name=settings.run.name, tags={"mmcot.run_dir": str(run_dir.path)}, parent_key=parent_key):
            parent.log_params({name: value_of(settings, name) for name in setting_names()})
            parent.log_tags(describe_environment())
            parent.log_artifact(run_dir.path / "run.yaml")
            yield Tracker(parent)
