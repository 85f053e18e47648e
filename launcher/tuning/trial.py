"""One trial of a tuning: a separate run inside Ray Tune.

A trial is a run folder, ``<tuning>/trials/<id>``, with everything a run has; so an interrupted
trial resumes from its checkpoints when the tuning resumes. The values reported to Tune come from
the run's journal (validation losses) and from its scores.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from data_shards.atomic_files import commit_json, fingerprint, read_json
from launcher.config.settings import Settings
from launcher.pipeline.pipeline import run_pipeline
from launcher.runs.checkpoint_names import MANIFEST, name_of
from launcher.runs.journal import Journal, JournalReader
from launcher.runs.records import read_scores
from launcher.runs.run_dir import TUNING, RunDir
from launcher.tuning.handover import hand_over
from launcher.tuning.space import with_values, without_arm

LOOK_EVERY_S = 0.5
OBJECTIVES = {"validation_loss": "min", "rougeL": "max", "accuracy": "max"}


@dataclasses.dataclass(frozen=True)
class TrialJob:
    """The values that all trials share; plain values, so that they can be sent to other processes."""

    settings: Settings
    folder: str
    parent_key: str
    working_dir: str


def run_trial(values: dict[str, Any], *, job: TrialJob) -> None:
    """Run one trial and report its progress to Tune; Tune calls it in a separate actor."""
    from ray import tune

    os.chdir(job.working_dir)  # paths of the settings are relative to where the tuning was started
    run_dir = _folder_of_trial(job, tune.get_context().get_trial_id(), tune.get_checkpoint(), values)
    reported = Journal(run_dir.journal_of(TUNING))  # the values reported to Tune, for the trial's run in MLflow
    settings = trial_settings(job.settings, values, run_dir)
    tuning, failures = job.settings.tuning, []

    def run() -> None:
        try:
            report = _Log(run_dir.path / "logs" / "trial.log")
            run_pipeline(settings, until=tuning.until, report=report, parent_key=job.parent_key, arm=values.get("arm"))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="trial", daemon=True)
    thread.start()
    watched = settings.chain.stages[-1].name if tuning.stage == "pipeline" else tuning.stage  # its chain may be its own
    reader, last = JournalReader(run_dir.journal(watched)), 0
    while True:
        alive = thread.is_alive()
        for point in reader.read():
            if "validation_loss" in point["metrics"] and point["step"] > last and tuning.objective == "validation_loss":
                last = point["step"]
                _report(
                    tune,
                    run_dir,
                    last,
                    {"validation_loss": point["metrics"]["validation_loss"]},
                    job.settings,
                    reported,
                )
        if not alive:
            break
        thread.join(LOOK_EVERY_S)
    if failures:
        raise failures[0]
    if tuning.objective != "validation_loss":
        scores = read_scores(run_dir.scores("val"))
        reached = {"accuracy": scores["accuracy"]["AVG"], "rougeL": scores["rationale"]["rougeL"]}
        known = {name: value for name, value in reached.items() if value is not None}
        _report(tune, run_dir, last + 1, known, job.settings, reported)


def trial_settings(settings: Settings, values: dict[str, Any], run_dir: RunDir) -> Settings:
    """The settings of a trial, in its folder."""
    own = with_values(settings, values)
    if settings.tuning.scheduler == "pbt":  # a checkpoint for each reported loss, from which another trial can start
        every = {"checkpoint_every": own.training.validate_every, "keep_checkpoints": 1000}
        own = own.model_copy(update={"training": own.training.model_copy(update=every)})
    return own.model_copy(
        update={"run": own.run.model_copy(update={"dir": str(run_dir.path), "name": run_dir.path.name})}
    )


def _report(
    tune: Any, run_dir: RunDir, step: int, metrics: dict[str, float], settings: Settings, reported: Journal
) -> None:
    """Report metrics to Tune; with population based training also the place of the step's checkpoint."""
    reported.log(step, metrics)
    values = {"step": step, **metrics}
    if settings.tuning.scheduler != "pbt":
        tune.report(values)
        return
    while not has_checkpoint(run_dir.checkpoints(settings.watched_stage), step):  # it is written after the loss
        time.sleep(LOOK_EVERY_S)
    with tempfile.TemporaryDirectory() as folder:
        commit_json(Path(folder) / "checkpoint.json", {"trial": run_dir.path.name, "step": step})
        tune.report(values, checkpoint=tune.Checkpoint.from_directory(folder))


def _folder_of_trial(job: TrialJob, trial_id: str, checkpoint: Any, values: dict[str, Any]) -> RunDir:
    """The trial's folder; a new one with another trial's checkpoint if Tune passes that checkpoint."""
    own = Path(job.folder) / "trials" / trial_id
    if checkpoint is None or job.settings.tuning.scheduler != "pbt":
        return RunDir(own)
    with checkpoint.as_directory() as folder:
        note = read_json(Path(folder) / "checkpoint.json")
    name = note["trial"] if "trial" in note else Path(note["run_dir"]).name  # a path in earlier versions
    source, step = RunDir(own.with_name(name)), note["step"]
    if source.path.name.startswith(trial_id):  # its own checkpoint: the tuning was interrupted
        return source
    stage = job.settings.watched_stage
    # The same step of the same trial may come again, with other values: the name tells them apart, and stays short.
    exchange = fingerprint([source.path.name, step, values])[:8]
    target = RunDir(own.with_name(f"{trial_id}-from-{source.path.name.partition('-from-')[0]}-{step}-{exchange}"))
    if not target.checkpoints(stage).exists():
        settings, names = trial_settings(job.settings, values, target), without_arm(job.settings, values)
        note = hand_over(source, target, step=step, stage=stage, settings=settings, names=names)
        _Log(target.path / "logs" / "trial.log")(note)
    return target


def has_checkpoint(folder: Path, step: int) -> bool:
    """Whether the checkpoint of this step is committed."""
    return (folder / name_of(step) / MANIFEST).exists()


class _Log:
    """Writes a trial's lines into its folder: the lines of several trials would mix on one console."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path

    def __call__(self, line: str) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")
