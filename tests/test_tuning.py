"""Tuning: the space is checked before anything starts; what came out is ranked, drawn and ready to run."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

from launcher.config import load_settings, parse_settings
from launcher.settings import SettingsError
from launcher.trial import copy_checkpoint, has_checkpoint
from launcher.tune import _finish, count_concurrent, in_own_folder, rank
from launcher.tuning_plots import correlations
from launcher.tuning_space import check_space, with_values


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
    settings = settings_of({"run.chain": {"grid": ["two-stage", "answer"]}, "run.seed": {"grid": [0, 1, 2]}, "training.learning_rate": {"loguniform": [1e-4, 1e-2]}})
    check_space(settings)
    trial = with_values(settings, {"run.chain": "answer", "training.learning_rate": 0.005})
    assert (trial.answer.format, trial.training.learning_rate, trial.tuning.space) == ("QCM-A", 0.005, {})
    assert trial.training.warmup_steps == settings.training.warmup_steps


def test_a_scheduler_that_has_nothing_to_watch_is_refused():
    for override in ("tuning.objective=accuracy", "tuning.stage=pipeline"):
        with pytest.raises(SettingsError, match="scheduler asha"):
            load_settings(preset="demo", overrides=[override])


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
    settings = settings_of({"training.learning_rate": {"loguniform": [1e-4, 1e-2]}, "training.schedule": {"choice": ["linear", "cosine"]}})
    losses = [0.9, 0.3, None, 0.5, 0.7, 0.8]
    trials = [
        {"trial": f"t{number}", "values": {"training.learning_rate": 1e-4 * 2**number, "training.schedule": ["linear", "cosine"][number % 2]},
         "state": "failed" if loss is None else "finished", "step": 10, "validation_loss": loss, "error": "out of luck" if loss is None else None}
        for number, loss in enumerate(losses)
    ]  # fmt: skip
    told, said = [], []

    class Parent:
        def __getattr__(self, name):
            return lambda *values, **named: told.append((name, values))

    class Told:
        parent = Parent()

    from launcher.run_dir import RunDir

    _finish(settings, RunDir(tmp_path), trials, Told(), said.append)
    best = parse_settings(yaml.safe_load((tmp_path / "best.yaml").read_text()))
    assert (best.training.learning_rate, best.training.schedule, best.tuning.space) == (2e-4, "cosine", {})
    assert any("out of luck" in line for line in said) and [t["trial"] for t in rank(trials, "validation_loss")][:2] == ["t1", "t3"]
    assert {path.name for path in tmp_path.glob("*.png")} == {"best.png", "parallel.png", "importance.png"}
    with pytest.raises(RuntimeError, match="no trial reported"):
        _finish(settings, RunDir(tmp_path), [trials[2]], Told(), said.append)


@pytest.mark.parametrize(("given", "folder", "best"), [(None, "runs/demo-tune", "runs/demo-tune-best"), ("else/where/", "else/where", "else/where-best")])
def test_a_tuning_and_its_best_run_have_folders_of_their_own(tmp_path, given, folder, best):
    from launcher.run_dir import RunDir

    overrides = [] if given is None else [f"run.dir={given}"]
    settings = in_own_folder(settings_of({"training.learning_rate": {"loguniform": [1e-4, 1e-2]}}, *overrides), "tune")
    assert str(settings.run_dir) == folder

    class Told:
        def __getattr__(self, name):
            return lambda *values, **named: None

    Told.parent = Told()
    trials = [{"trial": "a", "values": {"training.learning_rate": 1e-3}, "state": "finished", "step": 10, "validation_loss": 0.1, "error": None}]
    _finish(settings, RunDir(tmp_path), trials, Told(), lambda line: None)
    assert str(parse_settings(yaml.safe_load((tmp_path / "best.yaml").read_text())).run_dir) == best


def test_what_decides_the_objective_has_the_highest_importance():
    chance = np.random.default_rng(0)
    rates, noise = chance.uniform(size=400), chance.uniform(size=400)
    trials = [{"values": {"rate": rate, "other": other, "kind": "ab"[int(rate > 0.5)]}} for rate, other in zip(rates, noise, strict=True)]
    found = correlations(trials, ["rate", "other", "kind"], rates**2)
    assert found["rate"] == pytest.approx(1.0) and found["other"] < 0.2 and 0.7 < found["kind"] < 1


def test_a_checkpoint_is_handed_over_whole_and_as_the_latest(tmp_path):
    donor, heir = tmp_path / "a" / "checkpoints", tmp_path / "b" / "checkpoints"
    for step in (10, 20):
        (donor / f"step-{step:06d}").mkdir(parents=True)
        (donor / f"step-{step:06d}" / "manifest.json").write_text("{}")
    (donor / "LATEST").write_text("step-000020\n")
    copy_checkpoint(donor, heir, step=10)
    assert has_checkpoint(heir, 10) and not has_checkpoint(heir, 20) and (heir / "LATEST").read_text() == "step-000010\n"
