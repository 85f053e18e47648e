"""What a run logs to MLflow, in a file first: a tree of one parent run per pipeline and a child per step.

    with open_tracker(settings, run_dir) as tracker, tracker.step("train-rationale") as child:
        child.log_params({"shards_dir": "data/mini"})  # in addition to all settings, which every run has
        child.follow("rationale-metrics.jsonl")        # points are sent as they are written

Every call appends a line to ``logs/tracking.jsonl`` and returns:

    {"run": "train-rationale", "do": "params", "time_ms": 1790000000000, "values": {"shards_dir": "data/mini"}}

Settings, losses and scores are on the same run, so that MLflow can compare and plot them: every run has the
settings, and the parent has the scores and each stage's losses (``rationale_loss``, ``rationale_validation_loss``,
``answer_loss``, ...).

A thread (``launcher/tracking/sending.py``) applies the file to MLflow, at once or when an unreachable
server is available again. This module does not import MLflow or wait for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.config.loading import value_of
from launcher.config.setting_names import setting_names
from launcher.config.settings import Settings
from launcher.runs.journal import LineFile
from launcher.runs.places import stored_path
from launcher.runs.run_dir import PARENT, TUNING, RunDir
from launcher.runs.run_settings import RUN_SETTINGS
from launcher.runs.signals import Stopped
from launcher.tracking.descriptions import describe_parent, describe_step
from launcher.tracking.environment_tags import describe_environment
from launcher.tracking.sending import sending

_LONGEST_PARAM = 6000  # characters that MLflow accepts
_CUT = " ... (cut; run.yaml has all of it)"
_STAGE_METRICS = (
    "loss",
    "validation_loss",
    "retrieval_at_1",
)  # metrics of a stage's journal that the parent run has too


@dataclasses.dataclass(frozen=True)
class RunLog:
    """One run of the tree: each call appends a line to the file, which is in ``folder/logs``.

    Attributes:
        may_log: raises if this process no longer owns the run.
    """

    file: LineFile
    run: str
    folder: Path
    may_log: Callable[[], None] = lambda: None

    def log_params(self, params: dict[str, Any]) -> None:
        """Log parameters; the first value of each is kept, as in MLflow."""
        self._append("params", values={key: _text_of(value) for key, value in params.items()})

    def log_tags(self, tags: dict[str, str]) -> None:
        """Log tags; the last value of each is kept."""
        self._append("tags", values=tags)

    def log_scores(self, scores: Mapping[str, float | None], *, trained_by: str | None = None) -> None:
        """Log final values; the first of each is kept.

        Args:
            trained_by: the step whose model they are of; they are then also that model's.
        """
        values = {key: float(value) for key, value in scores.items() if value is not None}
        self._append("scores", values=values, **({"trained_by": trained_by} if trained_by else {}))

    def log_trained(self, name: str, *, params: dict[str, Any], tags: dict[str, str]) -> None:
        """Log that this run trained a model, a LoggedModel of MLflow."""
        self._append("trained", name=name, params={key: _text_of(value) for key, value in params.items()}, tags=tags)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Log a file, which is copied into the run's artifacts."""
        self._append("artifact", path=stored_path(self.folder, path), folder=folder)

    def log_dataset(self, *, name: str, digest: str, source: str, context: str, profile: dict[str, Any]) -> None:
        """Log a data set that the run read; ``context`` is its use, such as "training"."""
        self._append("dataset", name=name, digest=digest[:36], source=source, context=context, profile=profile)

    def log_model(self, **values: Any) -> None:
        """Log a finished model for the registry; see ``launcher/tracking/registry.py`` for the values."""
        self._append("model", **values)

    def follow(self, pattern: str, *, names: dict[str, str] | None = None) -> None:
        """Send the points of all files of this name in ``logs/``, now and later.

        Args:
            names: only these metrics, with their names in this run; None: all, with their names in the file.
        """
        self._append("follow", pattern=pattern, **({"names": names} if names else {}))

    @contextlib.contextmanager
    def running(self, *, name: str, tags: dict[str, str], parent_key: str | None = None) -> Iterator[None]:
        """Start or continue the run; it ends with the block.

        Args:
            parent_key: key of the parent run, where that belongs to another folder.
        """
        self._append("start", name=name, tags=tags, parent_key=parent_key)
        try:
            yield
        except BaseException as error:
            self.end("FAILED" if isinstance(error, Exception) and not isinstance(error, Stopped) else "KILLED")
            raise
        self.end("FINISHED")

    def end(self, status: str) -> None:
        """Log the run's end: FINISHED, FAILED or KILLED."""
        self._append("end", status=status)

    def _append(self, do: str, **values: Any) -> None:
        self.may_log()
        self.file.append({"run": self.run, "do": do, "time_ms": int(time.time() * 1000), **values})


@dataclasses.dataclass(frozen=True)
class Tracker:
    """The parent run of a pipeline, and its children, each with the same parameters."""

    parent: RunLog
    settings: Settings
    params: dict[str, Any] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[RunLog]:
        """The child run of a step, continued if it exists."""
        child = dataclasses.replace(self.parent, run=name)
        with child.running(name=name, tags={"mmcot.step": name, **describe_step(self.settings, name)}):
            child.log_params(self.params)
            yield child


@contextlib.contextmanager
def open_tracker(
    settings: Settings,
    run_dir: RunDir,
    *,
    report: Callable[[str], None] = print,
    parent_key: str | None = None,
    arm: str | None = None,
    sends: bool = True,
    may_log: Callable[[], None] = lambda: None,
) -> Iterator[Tracker]:
    """Start (or continue) the parent run of a run's folder, and send until the block ends.

    Args:
        parent_key: key of the tuning's run, where this one is a trial.
        arm: the tuning's arm that this trial belongs to; it becomes a parameter.
        sends: send to MLflow; else only the file is written.
        may_log: raises if this process no longer owns the run: what it would log is another attempt's by then.
    """
    file = LineFile(run_dir.tracking)
    params = _settings_params(settings) | ({"arm": arm} if arm else {})
    if parent_key:  # trials are compared by their parameters, and these two differ in all of them
        params = {name: value for name, value in params.items() if name not in ("run.dir", "run.name")}
    tracker = Tracker(RunLog(file, PARENT, run_dir.path, may_log), settings, params)
    parent = tracker.parent
    with (
        contextlib.closing(file),
        sending(settings, run_dir, report=report) if sends else contextlib.nullcontext(),
        parent.running(
            name=settings.run.name,
            tags={"mmcot.run_dir": str(run_dir.path), **describe_parent(settings, run_dir)},
            parent_key=parent_key,
        ),
    ):
        parent.log_params(params)
        parent.log_tags(describe_environment())
        parent.log_artifact(run_dir.path / RUN_SETTINGS)
        for stage in settings.chain.stage_names:
            parent.follow(run_dir.journal(stage).name, names={name: f"{stage}_{name}" for name in _STAGE_METRICS})
        parent.follow(run_dir.journal_of(TUNING).name)
        yield tracker


def _settings_params(settings: Settings) -> dict[str, Any]:
    """Every setting by its dotted name; those of a tuning only if there is one."""
    is_tuning = bool(settings.tuning.space or settings.tuning.arms)
    names = [name for name in setting_names() if name != "stages" and (is_tuning or not name.startswith("tuning."))]
    names += [f"stages.{stage}.{key}" for stage, spec in settings.stages.items() for key in type(spec).model_fields]
    return {name: value_of(settings, name) for name in names}


def _text_of(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST_PARAM else text[: _LONGEST_PARAM - len(_CUT)] + _CUT
