"""Tuning: the space is checked before anything starts; what came out is ranked, drawn and ready to run."""

from __future__ import annotations

import contextlib
import time
import types

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient

from data_shards.atomic_files import commit_bytes, commit_json, read_json
from launcher.config.loading import dump_settings, load_settings, parse_settings
from launcher.config.settings import SettingsError
from launcher.runs.journal import Journal
from launcher.runs.run_dir import RunDir
from launcher.tracking.run_log import open_tracker
from launcher.tuning.plots import correlations
from launcher.tuning.ray_tune import _scheduler
from launcher.tuning.results import describe_trials, rank
from launcher.tuning.space import check_space, with_values
from launcher.tuning.trial import TrialJob, run_trial
from launcher.tuning.tune import _finish, count_concurrent, end_trials, in_own_folder


def settings_of(space, *overrides):
    settings = load_settings(preset="demo", overrides=list(overrides))
    return settings.model_copy(update={"tuning": settings.tuning.model_copy(update={"space": space})})


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "tuning.space is empty"),
        ({"training.learnig_rate": {"uniform": [0.1, 0.2]}}, "did you mean training.learning_rate"),
        ({"training.learning_rate": {"uniform": [-0.1, 0.2]}}, "training.learning_rate"),
        ({"training.learning_rate": {"loguniform": ["1e-5", 0.1]}}, "write 1.0e-5, not 1e-5"),
        ({"training.learning_rate": {"loguniform": [0.0, 0.1]}}, "low above 0"),
        ({"training.learning_rate": {"normal": [0.0, 0.1]}}, "must be one of loguniform"),
        ({"training.learning_rate": 0.1}, "must be one of loguniform"),
        ({"training.micro_batch_size": {"choice": [8, 5]}}, "must be a multiple of micro_batch_size"),
        ({"run.chain": {"grid": ["two-stage", "three-stage"]}}, "run.chain"),
    ],
)
def test_a_space_that_cannot_be_is_refused_before_anything_starts(space, message):
    with pytest.raises(SettingsError, match=message):
        check_space(settings_of(space))


def test_a_trial_has_the_settings_of_the_tuning_with_values_of_its_own():
    settings = settings_of(
        {
            "run.chain": {"grid": ["two-stage", "answer"]},
            "run.seed": {"grid": [0, 1, 2]},
            "training.learning_rate": {"loguniform": [1e-4, 1e-2]},
        }
    )
    check_space(settings)
    trial = with_values(settings, {"run.chain": "answer", "training.learning_rate": 0.005})
    assert (trial.answer.format, trial.training.learning_rate, trial.tuning.space) == ("QCM-A", 0.005, {})
    assert trial.training.warmup_steps == settings.training.warmup_steps


def test_a_scheduler_that_has_nothing_to_watch_is_refused():
    for override in ("tuning.objective=accuracy", "tuning.stage=pipeline"):
        with pytest.raises(SettingsError, match="scheduler asha"):
            load_settings(preset="demo", overrides=[override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rationale.num_steps=null", "rationale.num_epochs=2"], "give rationale.num_steps instead of num_epochs"),
        (
            ["rationale.num_steps=100", "tuning.grace_steps=200"],
            r"grace_steps 200 is more than rationale.num_steps 100",
        ),
    ],
)
def test_a_scheduler_that_does_not_fit_the_steps_is_refused_before_anything_starts(overrides, message):
    with pytest.raises(SettingsError, match=message):
        check_space(load_settings(preset="demo", overrides=[*overrides, "tuning.space={run.seed: {grid: [0, 1]}}"]))


def test_trials_shorter_than_the_time_between_validations_can_be_tuned():
    settings = load_settings(
        preset="demo",
        overrides=["rationale.num_steps=20", "tuning.space={run.seed: {grid: [0, 1]}}"],
    )
    assert settings.training.validate_every > 20
    check_space(settings)
    assert _scheduler(settings) is not None  # Ray refuses a grace period above the number of steps


def test_optuna_and_a_grid_are_refused_together():
    with pytest.raises(SettingsError, match="goes through no grid"):
        load_settings(preset="demo", overrides=["tuning.search=optuna", "tuning.space={run.seed: {grid: [0, 1]}}"])


def test_a_trial_that_does_not_fit_is_refused_with_the_arithmetic(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    said = []
    assert count_concurrent(settings_of({}, "cluster.num_workers=2"), said.append) == 2
    assert count_concurrent(settings_of({}, "cluster.num_workers=1", "tuning.max_concurrent=3"), said.append) == 3
    with pytest.raises(SettingsError, match="one needs 6 of 4 CPU"):
        count_concurrent(settings_of({}, "cluster.num_workers=3", "cluster.cpus_per_worker=2"), said.append)


def test_the_best_trial_becomes_settings_that_run(tmp_path):
    settings = settings_of(
        {"training.learning_rate": {"loguniform": [1e-4, 1e-2]}, "training.schedule": {"choice": ["linear", "cosine"]}}
    )
    losses = [0.9, 0.3, None, 0.5, 0.7, 0.8]
    trials = [
        {
            "trial": f"t{number}",
            "values": {
                "training.learning_rate": 1e-4 * 2**number,
                "training.schedule": ["linear", "cosine"][number % 2],
            },
            "state": "failed" if loss is None else "finished",
            "step": 10,
            "validation_loss": loss,
            "error": "out of luck" if loss is None else None,
        }
        for number, loss in enumerate(losses)
    ]
    told, said = [], []

    class Parent:
        def __getattr__(self, name):
            return lambda *values, **named: told.append((name, values))

    class Told:
        parent = Parent()

    _finish(settings, RunDir(tmp_path), trials, Told(), said.append)
    best = parse_settings(yaml.safe_load((tmp_path / "best.yaml").read_text()))
    assert (best.training.learning_rate, best.training.schedule, best.tuning.space) == (2e-4, "cosine", {})
    assert any("out of luck" in line for line in said) and [t["trial"] for t in rank(trials, "validation_loss")][
        :2
    ] == ["t1", "t3"]
    assert {path.name for path in tmp_path.glob("*.png")} == {"best.png", "parallel.png", "importance.png"}
    with pytest.raises(RuntimeError, match="no trial reported"):
        _finish(settings, RunDir(tmp_path), [trials[2]], Told(), said.append)


@pytest.mark.parametrize(
    ("given", "folder", "best"),
    [(None, "runs/demo-tune", "runs/demo-tune-best"), ("else/where/", "else/where", "else/where-best")],
)
def test_a_tuning_and_its_best_run_have_folders_of_their_own(tmp_path, given, folder, best):
    overrides = [] if given is None else [f"run.dir={given}"]
    settings = in_own_folder(settings_of({"training.learning_rate": {"loguniform": [1e-4, 1e-2]}}, *overrides), "tune")
    assert str(settings.run_dir) == folder

    class Told:
        def __getattr__(self, name):
            return lambda *values, **named: None

    Told.parent = Told()
    trials = [
        {
            "trial": "a",
            "values": {"training.learning_rate": 1e-3},
            "state": "finished",
            "step": 10,
            "validation_loss": 0.1,
            "error": None,
        }
    ]
    _finish(settings, RunDir(tmp_path), trials, Told(), lambda line: None)
    assert str(parse_settings(yaml.safe_load((tmp_path / "best.yaml").read_text())).run_dir) == best


@pytest.fixture
def tuning_place(tmp_path, monkeypatch):
    """A tuning's settings and folder, and an SQLite store beside it."""
    from launcher.tracking.mlflow_store import create_store

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    database = f"sqlite:///{tmp_path / 'mlflow.db'}"
    create_store(database)
    settings = settings_of(
        {"training.learning_rate": {"grid": [0.1, 0.2]}},
        f"run.dir={tmp_path / 'tuned'}",
        f"tracking.uri={database}",
        "tracking.send_every_s=0.1",
    )
    commit_bytes(settings.run_dir / "run.yaml", b"")
    return settings, RunDir(settings.run_dir)


@pytest.fixture
def run_fake_trial(tuning_place, monkeypatch):
    """Run a trial with a pipeline that only writes losses and scores; returns what was reported to Tune."""
    import os

    from ray import tune

    settings, run_dir = tuning_place
    told = []

    def pipeline(own, *, until, report, parent_key, arm):
        trial = RunDir(own.run_dir)
        commit_bytes(trial.path / "run.yaml", b"")
        with (
            contextlib.closing(Journal(trial.journal("rationale"))) as journal,
            open_tracker(own, trial, report=report, parent_key=parent_key, arm=arm),
        ):
            for step in (10, 20):
                journal.log(step, {"loss": 2.0 / step, "validation_loss": own.training.learning_rate / step})
        commit_json(trial.scores("val"), {"num_questions": 1, "accuracy": {"AVG": 70.0}, "rationale": {"rougeL": None}})

    class Context:
        def get_trial_id(self):
            return "t0"

    monkeypatch.setattr("launcher.tuning.trial.run_pipeline", pipeline)
    monkeypatch.setattr(tune, "get_context", Context)
    monkeypatch.setattr(tune, "get_checkpoint", lambda: None)
    monkeypatch.setattr(tune, "report", told.append)

    def run(values, **tuning):
        base = settings.model_copy(update={"tuning": settings.tuning.model_copy(update=tuning)})
        job = TrialJob(
            settings=base,
            folder=str(run_dir.path),
            parent_key=f"{run_dir.identity()}/pipeline",
            working_dir=os.getcwd(),
        )
        with open_tracker(base, run_dir):
            time.sleep(0.3)  # the trial's run is below the tuning's, which MLflow must have by then
            run_trial(values, job=job)
            end_trials(base, run_dir)
        trial = RunDir(run_dir.path / "trials" / "t0")
        client = MlflowClient(settings.tracking.uri)
        parent = read_json(run_dir.mlflow_state)["runs"]["pipeline"]
        found = client.get_run(read_json(trial.mlflow_state)["runs"]["pipeline"])
        assert found.data.tags["mlflow.parentRunId"] == parent
        return told, found.data

    return run


def test_a_trials_run_has_the_values_it_tried_and_what_they_reached(run_fake_trial):
    for _ in range(2):  # the second time as after a kill: nothing comes twice
        told, data = run_fake_trial({"training.learning_rate": 0.2})
    assert told[:2] == [{"step": 10, "validation_loss": 0.02}, {"step": 20, "validation_loss": 0.01}]
    assert data.params["training.learning_rate"] == "0.2" and data.metrics == {
        "rationale_loss": 0.1,
        "rationale_validation_loss": 0.01,
        "validation_loss": 0.01,
    }


def test_a_trial_of_an_arm_says_which_and_has_its_score(run_fake_trial):
    arms = {"plain": {"run.chain": "two-stage", "training.learning_rate": 0.4}}
    told, data = run_fake_trial(
        {"arm": "plain", "run.seed": 3}, arms=arms, space={}, objective="accuracy", scheduler="none"
    )
    assert told == [{"step": 1, "accuracy": 70.0}] and data.metrics["accuracy"] == 70.0
    assert (data.params["arm"], data.params["run.seed"], data.params["training.learning_rate"]) == ("plain", "3", "0.4")


def test_the_tunings_run_has_the_best_value_and_settings_and_a_later_trial_can_better_them(tuning_place):
    settings, run_dir = tuning_place

    def finish(*losses, budget=None):
        tuned = settings.model_copy(update={"tuning": settings.tuning.model_copy(update={"time_budget_s": budget})})
        trials = [
            {
                "trial": f"t{number}",
                "values": {"training.learning_rate": 0.1 * (number + 1)},
                "state": "finished",
                "step": 10,
                "validation_loss": loss,
                "error": None,
            }
            for number, loss in enumerate(losses)
        ]
        with open_tracker(tuned, run_dir) as tracker:
            _finish(tuned, run_dir, trials, tracker, lambda line: None)
        return MlflowClient(settings.tracking.uri).get_run(read_json(run_dir.mlflow_state)["runs"]["pipeline"]).data

    early = finish(0.5, budget=60.0)
    assert (
        early.metrics == {"best_validation_loss": 0.5, "num_trials": 1, "num_failed": 0}
        and early.params["tuning.objective"] == "validation_loss"
    )
    assert early.tags["best.training.learning_rate"] == "0.1" and "best.training.learning_rate" not in early.params
    for data in (finish(0.5, 0.3), finish(0.5, 0.3)):
        assert data.metrics == {"best_validation_loss": 0.3, "num_trials": 2, "num_failed": 0}
        assert (
            data.tags["best.trial"],
            data.tags["best.training.learning_rate"],
            data.params["best.training.learning_rate"],
        ) == ("t1", "0.2", "0.2")


def test_what_decides_the_objective_has_the_highest_importance():
    chance = np.random.default_rng(0)
    rates, noise = chance.uniform(size=400), chance.uniform(size=400)
    trials = [
        {"values": {"rate": rate, "other": other, "kind": "ab"[int(rate > 0.5)]}}
        for rate, other in zip(rates, noise, strict=True)
    ]
    found = correlations(trials, ["rate", "other", "kind"], rates**2)
    assert found["rate"] == pytest.approx(1.0) and found["other"] < 0.2 and 0.7 < found["kind"] < 1


def test_a_trial_that_failed_before_its_first_report_keeps_its_values_after_a_restart(tmp_path, tiny_settings):
    commit_json(tmp_path / "params.json", {"training.learning_rate": 1e30})
    result = types.SimpleNamespace(config=None, metrics=None, path=str(tmp_path), error=RuntimeError("the loss is nan"))
    (trial,) = describe_trials([result], tiny_settings)
    assert (trial["values"], trial["state"]) == ({"training.learning_rate": 1e30}, "failed")


def test_a_trial_killed_after_its_last_marker_is_finished_here_and_in_mlflow(tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    settings = settings_of({"training.learning_rate": {"uniform": [0.1, 0.2]}}, f"run.dir={tmp_path / 'tuning'}")
    settings = settings.model_copy(update={"tracking": settings.tracking.model_copy(update={"uri": uri})})
    tuning, last = RunDir(settings.run_dir), settings.tuning.until
    for name in ("done", "open"):
        trial = RunDir(tuning.path / "trials" / name)
        own = settings.model_copy(update={"run": settings.run.model_copy(update={"dir": str(trial.path)})})
        commit_bytes(trial.path / "run.yaml", dump_settings(own).encode())
        with pytest.raises(KeyboardInterrupt), open_tracker(own, trial) as tracker, tracker.step(last):
            raise KeyboardInterrupt
        if name == "done":  # killed between its last marker and the end of its run
            trial.mark_done(last, {"step": last})
    end_trials(settings, tuning, send_all=False)
    end_trials(settings, tuning)  # nothing changes at a further start
    found = {
        name: {
            MlflowClient(uri).get_run(run_id).info.status
            for run_id in read_json(tuning.path / "trials" / name / "mlflow.json")["runs"].values()
        }
        for name in ("done", "open")
    }
    assert found == {"done": {"FINISHED"}, "open": {"KILLED"}}
    ends = RunDir(tuning.path / "trials" / "done").tracking.read_text().splitlines()
    assert sum('"end"' in line for line in ends) == 4
