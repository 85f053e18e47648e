"""A job of a run's folder: lines and points are queued and sent to a stand-in of MLflow."""

from __future__ import annotations

import contextlib
from pathlib import Path

from fault_stand_ins import Server, open_server

from data_shards.leftovers import remove_leftovers
from launcher.config.loading import load_settings
from launcher.runs.journal import Journal
from launcher.runs.ownership import owned
from launcher.runs.run_dir import RunDir
from launcher.runs.run_settings import settings_of, write_or_verify_settings
from launcher.runs.signals import sigterm_stops
from launcher.tracking import run_log
from launcher.tracking.mlflow_sync import MlflowSync
from launcher.tracking.run_log import open_tracker
from launcher.tracking.sending import is_everything_logged, sync_run


def track(folder: Path, *, take_over: bool = False) -> None:
    """A run with one step: its lines and points are queued, and sent several times meanwhile."""
    settings = load_settings(preset="demo", overrides=[f"run.dir={folder / 'run'}", "tracking.uri=http://stand-in"])
    run_dir = RunDir(settings.run_dir)
    run_dir.path.mkdir(exist_ok=True)
    write_or_verify_settings(run_dir, settings)
    open_server(folder / "server.jsonl")
    run_log.describe_environment = lambda: {"mmcot.python": "3"}
    with sigterm_stops(), owned(run_dir, take_over=take_over) as number:
        remove_leftovers(run_dir.path, staging=not take_over)
        if not run_dir.has_identity():
            run_dir.take_identity("0" * 32)
        if run_dir.marker("train-rationale") is not None and is_everything_logged(run_dir):
            return
        sync = MlflowSync(run_dir, uri="http://stand-in", experiment="mmcot")
        may_log = lambda: run_dir.check_attempt(number)  # noqa: E731
        with open_tracker(settings, run_dir, sends=False, may_log=may_log) as tracker:
            if run_dir.marker("train-rationale") is None:
                _tracked_step(run_dir, number, tracker, sync)
        _send(sync)


def _tracked_step(run_dir: RunDir, number: int, tracker, sync: MlflowSync) -> None:
    with tracker.step("train-rationale") as child:
        journal = Journal(run_dir.journal("rationale"))
        child.log_dataset(name="mini", digest="1", source="data", context="training", profile={})
        child.follow(run_dir.journal("rationale").name)
        for step in range(4):
            journal.log(step + 1, {"loss": 1 / (step + 1)})
            if step == 1:
                _send(sync)
        child.log_scores({"accuracy": 0.5})
    run_dir.check_attempt(number)
    run_dir.mark_done("train-rationale", {"outputs": {}})
    _send(sync)


def _send(sync: MlflowSync) -> None:
    with contextlib.suppress(Exception):  # tracking never stops a run
        sync.send()


def sync(folder: Path) -> None:
    """`mmcot sync`: a former owner that continues may still add the line at which it was stopped."""
    open_server(folder / "server.jsonl")
    run_dir = RunDir(folder / "run")
    sync_run(run_dir, settings_of(run_dir))


def read_server(folder: Path):
    """What arrived: every run, parameter, tag and score, and no (key, step) twice."""
    run_dir, content = RunDir(folder / "run"), Server(folder / "server.jsonl").content()
    assert is_everything_logged(run_dir)
    for run in content.values():
        seen = [(point[0], point[1]) for point in run["points"]]
        assert len(seen) == len(set(seen)), f"points arrived twice: {seen}"
        assert seen == sorted(seen), f"a history steps back: {seen}"
    return content
