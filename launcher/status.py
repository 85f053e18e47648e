"""What a run's folder says about the run, for a person."""

from __future__ import annotations

import shlex
from pathlib import Path

from launcher.config import Settings
from launcher.journal import JournalReader
from launcher.run_dir import RunDir, owner, settings_of
from launcher.tracking import tracking_uri

STAGE_OF_STEP = {"train-rationale": "rationale", "train-answer": "answer"}


def describe_run(folder: Path) -> list[str]:
    """Lines on each step, the last checkpoint, the owner and MLflow.

    Raises:
        RunError: the folder holds no run.
    """
    run_dir = RunDir(folder)
    settings = settings_of(run_dir)
    lines, current = [], owner(run_dir)
    next_step = None
    for step in settings.chain.steps:
        marker = run_dir.marker(step)
        if marker:
            lines.append(f"{step:<16} done in {marker['seconds']:.0f} s (attempt {marker['attempt']})")
            continue
        running = next_step is None and current is not None
        next_step = next_step or step
        lines.append(f"{step:<16} {'running' if running else 'to do'}{_training_state(run_dir, step)}")
    if current:
        lines.append(f"owner: process {current['pid']} on {current['host']}, attempt {current['attempt']}")
    elif next_step:
        lines.append(f"nobody is running it; the same `mmcot run` goes on at {next_step!r}")
    return [*lines, *_mlflow_lines(settings, run_dir)]


def describe_end(settings: Settings, run_dir: RunDir) -> list[str]:
    """The last lines of a run: where it lies and how to open the MLflow page."""
    page = [f"report: {run_dir.report}   (a page to look at, offline)"] if run_dir.report.exists() else []
    return ["", f"run: {run_dir.path}", *page, *_mlflow_lines(settings, run_dir)]


def _training_state(run_dir: RunDir, step: str) -> str:
    stage = STAGE_OF_STEP.get(step)
    if stage is None:
        return ""
    points = [point for point in JournalReader(run_dir.journal(stage)).read() if "loss" in point["metrics"]]
    latest = run_dir.checkpoints(stage) / "LATEST"
    text = f", step {points[-1]['step']:,}, loss {points[-1]['metrics']['loss']:.4f}" if points else ""
    return text + (f", last checkpoint {latest.read_text().strip()}" if latest.exists() else "")


def _mlflow_lines(settings: Settings, run_dir: RunDir) -> list[str]:
    uri = tracking_uri(settings)
    if not uri.startswith("sqlite:"):
        return [f"MLflow: {uri}"]
    folder = settings.run_dir.parent
    command = f"mmcot mlflow up --backend-store-uri {uri}"
    if uri == f"sqlite:///{folder.absolute() / 'mlflow.db'}":
        command = "mmcot mlflow up" if folder == Path("runs") else f"mmcot mlflow up --runs {shlex.quote(str(folder))}"
    return [f"MLflow: {command}   then open http://127.0.0.1:5000"]
