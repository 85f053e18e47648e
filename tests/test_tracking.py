"""MLflow: one run tree, points once, training never stopped by it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from data_shards.storage import commit_bytes, commit_json, read_json
from launcher.config import load_settings
from launcher.guards import sigterm_stops
from launcher.journal import Journal
from launcher.run_dir import RunDir, Stopped
from launcher.tracking import _create_store, is_parent_finished, open_tracker, tracking_uri


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings = load_settings(preset="demo", overrides=[f"run.dir={tmp_path / 'runs' / 'a'}", "tracking.send_every_s=0.1"])
    run_dir = RunDir(settings.run_dir)
    commit_bytes(run_dir.path / "run.yaml", b"{}")
    return settings, run_dir


def log_once(settings, run_dir, points):
    with open_tracker(settings, run_dir) as tracker, tracker.step("train-rationale") as child:
        journal = Journal(run_dir.journal("rationale"))
        with child.follow(run_dir.journal("rationale")):
            for step, loss in points:
                journal.log(step, {"loss": loss})
        return tracker.client, child.run_id


def test_a_restart_continues_the_same_run_and_the_first_value_of_a_step_stands(place):
    settings, run_dir = place
    _, first = log_once(settings, run_dir, [(1, 0.9), (2, 0.8), (3, 0.7)])
    client, second = log_once(settings, run_dir, [(2, 5.0), (3, 5.0), (4, 0.6)])
    assert first == second
    history = {metric.step: metric.value for metric in client.get_metric_history(first, "loss")}
    assert history == {1: 0.9, 2: 0.8, 3: 0.7, 4: 0.6}
    assert len(client.get_metric_history(first, "loss")) == 4


def test_a_server_that_is_away_does_not_stop_a_step_and_the_points_come_later(place, monkeypatch):
    settings, run_dir = place
    from mlflow import MlflowClient

    def refuse(*args, **kwargs):
        raise ConnectionError("away")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", refuse)
        log_once(settings, run_dir, [(1, 0.9)])
    client, run_id = log_once(settings, run_dir, [(2, 0.8)])
    assert [m.step for m in client.get_metric_history(run_id, "loss")] == [1, 2]


def test_the_default_store_lies_beside_the_runs_and_the_environment_goes_before_it(place, monkeypatch):
    settings, run_dir = place
    assert tracking_uri(settings) == f"sqlite:///{run_dir.path.parent / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5999")
    assert tracking_uri(settings) == "http://127.0.0.1:5999"


def test_a_step_that_fails_is_marked_failed(place):
    settings, run_dir = place
    with pytest.raises(RuntimeError, match="boom"), open_tracker(settings, run_dir) as tracker, tracker.step("data") as child:
        raise RuntimeError("boom")
    assert tracker.client.get_run(child.run_id).info.status == "FAILED"


def test_a_kill_while_the_store_is_made_leaves_none_or_a_whole_one(tmp_path):
    path = tmp_path / "mlflow.db"
    code = (
        "import os, sys, threading; from alembic import command; from launcher.tracking import _create_store\n"
        "upgrade = command.upgrade\n"
        "command.upgrade = lambda *a: (threading.Timer(0.3, lambda: os._exit(9)).start(), upgrade(*a))\n"
        "_create_store(sys.argv[1])"
    )
    killed = subprocess.run([sys.executable, "-c", code, f"sqlite:///{path}"], capture_output=True, check=False)
    assert killed.returncode == 9 and not path.exists() and list(tmp_path.glob(".tmp-*"))
    _create_store(f"sqlite:///{path}")
    from mlflow import MlflowClient

    assert [e.name for e in MlflowClient(f"sqlite:///{path}").search_experiments()] == ["Default"]
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_run_whose_id_was_not_kept_in_time_is_found_again_and_no_second_one_made(place):
    settings, run_dir = place
    client, first = log_once(settings, run_dir, [(1, 0.9)])
    kept = read_json(run_dir.path / "mlflow.json")
    commit_json(run_dir.path / "mlflow.json", {"key": kept["key"]})  # as after a kill between MLflow's answer and our file
    _, second = log_once(settings, run_dir, [(2, 0.8)])
    assert first == second and read_json(run_dir.path / "mlflow.json") == kept
    assert len(client.search_runs([client.get_experiment_by_name("mmcot").experiment_id])) == 2


def test_a_parent_that_was_not_marked_finished_is_known(place):
    settings, run_dir = place
    assert is_parent_finished(run_dir)
    with open_tracker(settings, run_dir):
        assert not is_parent_finished(run_dir)
    assert is_parent_finished(run_dir)


def test_sigterm_leaves_the_runs_as_killed(place):
    settings, run_dir = place
    with pytest.raises(Stopped, match="the same command goes on"), sigterm_stops(), open_tracker(settings, run_dir) as tracker, tracker.step("data") as child:
        os.kill(os.getpid(), signal.SIGTERM)
    assert {tracker.client.get_run(run_id).info.status for run_id in (child.run_id, tracker.parent.run_id)} == {"KILLED"}
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_step_is_marked_done_only_after_mlflow_has_its_end(place, monkeypatch):
    from mlflow import MlflowClient

    from launcher.pipeline import _Pipeline

    settings, run_dir = place
    commit_json(run_dir.path / "lock.json", {"attempt": 1})
    statuses = []

    def mark_done(self, step, marker):  # a driver killed after this never looks at the step again
        statuses.append(MlflowClient(tracking_uri(settings)).get_run(marker["mlflow_run_id"]).info.status)

    monkeypatch.setattr(RunDir, "mark_done", mark_done)
    with contextlib.ExitStack() as resources:
        _Pipeline(settings, run_dir, 1, lambda line: None, resources, None)._step("data", {}, lambda child: {})
    assert statuses == ["FINISHED"]
