"""MLflow: one run tree, points once, training never stopped by it."""

from __future__ import annotations

import pytest

from data_shards.storage import commit_bytes
from launcher.config import load_settings
from launcher.journal import Journal
from launcher.run_dir import RunDir
from launcher.tracking import open_tracker, tracking_uri


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
