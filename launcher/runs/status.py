"""The state of a run in human-readable lines, from its folder."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path
from typing import Any

from launcher.config.loading import tracking_uri, value_of
from launcher.config.settings import Settings
from launcher.config.sqlite_uris import sqlite_path
from launcher.runs.adoption import copied_from
from launcher.runs.checkpoint_names import latest_checkpoint
from launcher.runs.journal import JournalReader, progress_of
from launcher.runs.mlflow_pages import compare_page, mlflow_page
from launcher.runs.ownership import owner
from launcher.runs.places import uri_around
from launcher.runs.progress import describe_values, format_seconds
from launcher.runs.records import read_mlflow_state, read_scores, read_trials
from launcher.runs.run_dir import PARENT, RunDir
from launcher.runs.run_settings import RUN_SETTINGS, read_run_settings, settings_of

LOCAL_SERVER = "http://127.0.0.1:5000"  # where `mmcot mlflow up` listens
MOST_COMPARED = 16  # trials in one address


def describe_run(folder: Path) -> list[str]:
    """Lines on each step (progress, time left, last checkpoint), on the run's owner and on its MLflow page.

    Raises:
        RunError: the folder holds no run.
    """
    run_dir = RunDir(folder)
    settings = settings_of(run_dir)
    lines, current = [], owner(run_dir)
    if (run_dir.path / "trials").is_dir():
        return [*_describe_tuning(run_dir, settings, running=current is not None), *mlflow_lines(settings, run_dir)]
    next_step = None
    for step in settings.chain.steps:
        marker = run_dir.marker(step, needs=("seconds", "attempt"))
        if marker:
            lines.append(f"{step:<16} done in {marker['seconds']:.0f} s (attempt {marker['attempt']})")
            continue
        running = next_step is None and current is not None
        next_step = next_step or step
        lines.append(
            f"{step:<16} {'running' if running else 'to do'}{_progress(run_dir, step, settings, running=running)}"
        )
    if current:
        lines.append(
            f"owner: process {current['pid']} on {current['host']}, attempt {current['attempt']}, last heard of "
            f"{max(0.0, time.time() - current['heartbeat']):.0f} s ago"
        )
    elif next_step:
        lines.append(f"no process is running it; the same `mmcot run` resumes at {next_step!r}")
    if source := copied_from(run_dir):
        lines.append(f"a copy of {source}; `mmcot run --adopt` makes it a run of its own")
    scored = [split for split in ("val", "test") if run_dir.scores(split).exists()]
    lines += [f"{split}: {_scores(read_scores(run_dir.scores(split)))}" for split in scored]
    lines += [f"report: {run_dir.report}"] if run_dir.report.exists() else []
    return [*lines, *mlflow_lines(settings, run_dir)]


def _scores(scores: dict[str, Any]) -> str:
    average = scores["accuracy"]["AVG"]
    return f"{scores['num_questions']:,} questions" + (f", accuracy {average:.2f}" if average is not None else "")


def _describe_tuning(run_dir: RunDir, settings: Settings, *, running: bool) -> list[str]:
    """A line on every trial, by its values, and on what to do next."""
    tuning, finished = settings.tuning, run_dir.path / "trials.json"
    lines = [f"tuning of {tuning.stage}, {tuning.objective}, {tuning.num_samples} trials for each point of its grids"]
    if finished.exists():
        for trial in read_trials(finished, objective=tuning.objective):
            value = "-" if trial[tuning.objective] is None else f"{trial[tuning.objective]:.4f}"
            reached = f"{tuning.objective} {value}, step {trial['step']:,}"
            lines.append(f"{describe_values(trial['values'])}: {trial['state']}, {reached}")
        return lines if running else [*lines, f"finished; the best settings are in {run_dir.path / 'best.yaml'}"]
    for folder in sorted((run_dir.path / "trials").iterdir()):
        trial = RunDir(folder)
        if (folder / RUN_SETTINGS).exists():
            own = read_run_settings(folder)
            values = {name: value_of(own, name) for name in tuning.space}
            progress = _progress(trial, f"train-{settings.watched_stage}", own, running=running)
            lines.append(f"{describe_values(values)}{progress or ', not started'}")
    what = "running" if running else "no process is running it; the same command continues it"
    return [*lines, what]


def describe_start(settings: Settings, run_dir: RunDir) -> list[str]:
    """The first lines of a run: its folder, its device and its MLflow page."""
    cluster = settings.cluster
    workers = f"{cluster.num_workers} worker{'s' * (cluster.num_workers > 1)}"
    device = "a GPU each" if cluster.use_gpu else f"CPUs, {cluster.cpus_per_worker} for each"
    lines = [f"run: {run_dir.path}   {workers}, {device}", *mlflow_lines(settings, run_dir)]
    if cluster.env:
        shown = ", ".join(f"{name}={value}" for name, value in cluster.env.items())
        lines.append(f"environment of the workers: {shown}")
    needed, found = cluster.num_workers * cluster.cpus_per_worker, os.cpu_count() or 1
    if cluster.address == "local" and not cluster.use_gpu and needed > found:
        lines.append(
            f"note: {workers} with {cluster.cpus_per_worker} processors each share the {found} of this machine, which "
            f"is slower than cluster.num_workers={max(1, found // cluster.cpus_per_worker)}"
        )
    return lines


def describe_end(settings: Settings, run_dir: RunDir) -> list[str]:
    """The last lines of a run: its folder, its report and its MLflow page."""
    page = [f"report: {run_dir.report}   (a web page, works offline)"] if run_dir.report.exists() else []
    return ["", f"run: {run_dir.path}", *page, *mlflow_lines(settings, run_dir)]


def _progress(run_dir: RunDir, step: str, settings: Settings, *, running: bool) -> str:
    """The progress of a step by its journal, and its last checkpoint."""
    trained = settings.chain.stage_of_step(step)
    stage = trained.name if trained else None
    points = list(JournalReader(run_dir.journal_of(stage or step)).read())
    text = ""
    if found := progress_of(points):
        done, total, seconds = found
        text += f", {'step ' if stage else ''}{done:,} of {total:,}{'' if stage else ' questions'}"
        if losses := [
            point["metrics"]["loss"] for point in points if point["step"] == done and "loss" in point["metrics"]
        ]:
            text += f", loss {losses[-1]:.4f}"
        if running and seconds is not None:
            text += f", time left {format_seconds(seconds)}"
    latest = latest_checkpoint(run_dir.checkpoints(stage)) if stage else None
    return text + (f", last checkpoint {latest.name}" if latest else "")


def mlflow_lines(settings: Settings, run_dir: RunDir) -> list[str]:
    """Lines on how to open the run's page in MLflow; for a tuning also the page that compares its trials."""
    state = read_mlflow_state(run_dir.mlflow_state)
    uri = uri_around(run_dir.path, state["uri"]) if state.get("uri") else tracking_uri(settings)
    runs = state.get("runs", {})
    is_served = uri.startswith(("http://", "https://"))
    server = uri if is_served else LOCAL_SERVER
    ids = {"experiment_id": state.get("experiment_id"), "run_id": runs.get(PARENT)}
    page = mlflow_page(server, **ids)
    lines = [f"MLflow: {page}"] if is_served else [f"MLflow: {_command(uri, settings)}   then open", f"  {page}"]
    trials = [
        run_id
        for path in sorted(run_dir.path.glob("trials/*/mlflow.json"))
        if (run_id := read_mlflow_state(path).get("runs", {}).get(PARENT))
    ]
    if len(trials) > 1 and ids["experiment_id"]:
        which = "trials" if len(trials) <= MOST_COMPARED else f"the first {MOST_COMPARED} of {len(trials)} trials"
        compared = compare_page(server, experiment_id=ids["experiment_id"], run_ids=trials[:MOST_COMPARED])
        lines += [f"{which} compared:", f"  {compared}"]
    return lines


def _command(uri: str, settings: Settings) -> str:
    """The command that serves a database."""
    store = sqlite_path(uri)
    if not uri.startswith("sqlite:///") or store.name != "mlflow.db":
        return f"mmcot mlflow up --backend-store-uri {shlex.quote(uri)}"
    folder = settings.run_dir.parent
    folder = folder if folder.absolute() == store.parent else store.parent
    return "mmcot mlflow up" if folder == Path("runs") else f"mmcot mlflow up --runs {shlex.quote(str(folder))}"
