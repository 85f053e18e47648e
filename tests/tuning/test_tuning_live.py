"""Tunings as a person runs them: real Ray Tune, real trainings, a real kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from mlflow.tracking import MlflowClient
from small_tuning import SMALL_TUNING

from data_shards.atomic_files import read_json
from launcher.runs.journal import JournalReader
from launcher.runs.run_dir import RunDir

pytestmark = pytest.mark.ray


def start(folder, tuning, **sections):
    settings = {
        **SMALL_TUNING,
        **{name: {**SMALL_TUNING.get(name, {}), **values} for name, values in sections.items()},
        "tuning": tuning,
    }
    (folder / "tuning.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "launcher", "tune", "--preset", "demo", "--config", "tuning.yaml"]
    with open(folder / "output.log", "a") as log:
        return subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "MLFLOW_TRACKING_URI": ""}
        )


def finish(process, folder, timeout=500):
    assert process.wait(timeout) == 0, (folder / "output.log").read_text()
    return {trial["trial"]: trial for trial in read_json(folder / "runs" / "lr-tune" / "trials.json")}


def children(folder):
    """MLflow's runs right below the tuning's, by name."""
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("mmcot").experiment_id], max_results=1000)
    (parent,) = [run for run in runs if run.info.run_name == "lr-tune"]
    return parent, {
        run.info.run_name: run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Two trials, one of which cannot train; their driver was killed with -9 in the middle, then started again."""
    folder = tmp_path_factory.mktemp("tuning")
    tuning = {"space": {"training.learning_rate": {"grid": [1e30, 1e-3]}}, "scheduler": "none", "num_samples": 1}
    driver = start(folder, tuning, rationale={"num_steps": 80})
    deadline = time.time() + 300
    while not (
        begun := sorted(
            (folder / "runs" / "lr-tune" / "trials").glob("*/rationale/checkpoints/step-000020/manifest.json")
        )
    ):
        assert driver.poll() is None and time.time() < deadline, (folder / "output.log").read_text()
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    return folder, begun[0].parents[3], finish(start(folder, tuning, rationale={"num_steps": 80}), folder)


@pytest.mark.long
def test_a_trial_that_fails_is_recorded_with_its_reason_and_stops_no_other(killed):
    _folder, _, trials = killed
    by_rate = {trial["values"]["training.learning_rate"]: trial for trial in trials.values()}
    assert (by_rate[1e-3]["state"], by_rate[1e-3]["step"]) == ("finished", 80)
    assert by_rate[1e30]["state"] == "failed" and "the loss is nan" in by_rate[1e30]["error"]


@pytest.mark.long
def test_after_a_kill_of_the_driver_the_same_command_goes_on_from_the_trials_checkpoints(killed):
    _folder, interrupted, trials = killed
    assert interrupted.name in trials
    points = JournalReader(RunDir(interrupted).journal("rationale")).read()
    steps = [point["step"] for point in points if "loss" in point["metrics"]]
    assert (
        sorted(set(steps)) == list(range(5, 81, 5)) and len(steps) < 2 * 16 - 2
    )  # the second attempt did not begin at step one


@pytest.mark.long
def test_every_trial_is_a_child_of_the_tuning_in_mlflow(killed):
    folder, _, trials = killed
    parent, runs = children(folder)
    assert parent.info.status == "FINISHED" and {"best.yaml", "trials.json", "parallel.png", "best.png"} <= {
        file.path for file in MlflowClient(f"sqlite:///{folder}/runs/mlflow.db").list_artifacts(parent.info.run_id)
    }
    statuses = {name: run.info.status for name, run in runs.items() if name in trials}
    assert statuses == {name: "FAILED" if trial["state"] == "failed" else "FINISHED" for name, trial in trials.items()}


@pytest.mark.long
def test_values_and_losses_of_trials_stand_on_the_trials_runs_and_the_best_on_the_tunings(killed):
    folder, _, trials = killed
    parent, runs = children(folder)
    (best,) = [trial for trial in trials.values() if trial["state"] == "finished"]
    data = runs[best["trial"]].data
    assert float(data.params["training.learning_rate"]) == 1e-3
    assert (
        data.metrics["validation_loss"]
        == data.metrics["rationale_validation_loss"]
        == best["validation_loss"]
        == parent.data.metrics["best_validation_loss"]
    )
    assert parent.data.params["best.training.learning_rate"] == "0.001" and parent.data.metrics["num_failed"] == 1
    assert "trials compared:\n  http://127.0.0.1:5000/#/compare-runs?runs=[%22" in (folder / "output.log").read_text()


@pytest.mark.slow
def test_the_best_settings_run_as_they_stand(killed):
    folder, _, _ = killed
    command = [
        sys.executable,
        "-m",
        "launcher",
        "train",
        "rationale",
        "--config",
        "runs/lr-tune/best.yaml",
        "--set",
        "rationale.num_steps=2",
    ]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "MLFLOW_TRACKING_URI": ""}, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "runs" / "lr-tune-best" / "rationale" / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_population_based_training_hands_weights_over(tmp_path):
    tuning = {
        "space": {"training.learning_rate": {"loguniform": [1.0e-5, 3.0e-3]}},
        "scheduler": "pbt",
        "num_samples": 4,
        "max_concurrent": 2,
        "grace_steps": 20,
    }
    trials = finish(start(tmp_path, tuning, rationale={"num_steps": 120}), tmp_path)
    assert len(trials) == 4
    heirs = sorted((tmp_path / "runs" / "lr-tune" / "trials").glob("*-from-*-*"))
    assert heirs, "nothing was handed over"
    for heir in heirs:
        origin = read_json(heir / "handed_over.json")
        donor, step = origin["trial"], origin["step"]
        assert origin["note"] in (tmp_path / "output.log").read_text()
        first = next(point for point in JournalReader(RunDir(heir).journal("rationale")).read() if point["metrics"])
        assert first["step"] > step
        given = (
            tmp_path
            / "runs"
            / "lr-tune"
            / "trials"
            / donor
            / "rationale"
            / "checkpoints"
            / f"step-{step:06d}"
            / "manifest.json"
        )
        assert given.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "tuning",
    [{"search": "optuna", "scheduler": "asha"}, {"scheduler": "median"}, {"scheduler": "asha", "time_budget_s": 45.0}],
)
def test_other_searches_schedulers_and_budgets_come_to_an_end(tmp_path, tuning):
    space = {"training.learning_rate": {"loguniform": [1.0e-5, 3.0e-3]}}
    trials = finish(
        start(tmp_path, {"space": space, "num_samples": 4, "grace_steps": 10, "reduction_factor": 2, **tuning}),
        tmp_path,
    )
    assert any(trial["validation_loss"] is not None for trial in trials.values())
    assert (tmp_path / "runs" / "lr-tune" / "best.yaml").exists()
