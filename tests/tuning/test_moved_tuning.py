"""A tuning that was killed, then copied or moved, continues where it is now and leaves its first place alone."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import yaml
from small_tuning import SMALL_TUNING

from data_shards.atomic_files import commit_bytes, commit_json, read_json
from launcher.cluster.reservation import reserved_by
from launcher.runs.run_dir import RunDir
from launcher.runs.run_settings import keep_name, write_or_verify_settings
from launcher.training import launch
from launcher.training.ray_group import RESERVATION_FILE
from launcher.tuning.ray_tune import _checkpoints_are_in, _saved_state_is_in

SAVED_AFTER_S = 6.0  # Ray Tune saves its state every five seconds


def mmcot(folder, *arguments):
    with open(folder / "output.log", "a") as log:
        command = [sys.executable, "-m", "launcher", *arguments]
        environment = {**os.environ, "MLFLOW_TRACKING_URI": ""}
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=environment)


def finish(folder, *arguments):
    assert mmcot(folder, *arguments).wait(300) == 0, (folder / "output.log").read_text()
    return (folder / "output.log").read_text()


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def killed(folder, tuning, pattern):
    """Start a tuning in runs/lr-tune and kill its driver once a file exists; returns when all processes have ended."""
    (folder / "tuning.yaml").write_text(yaml.safe_dump({**SMALL_TUNING, "tuning": tuning}))
    driver, deadline = mmcot(folder, "tune", "--preset", "demo", "--config", "tuning.yaml"), time.time() + 200
    while not any(folder.glob(pattern)):
        assert driver.poll() is None and time.time() < deadline, (folder / "output.log").read_text()
        time.sleep(0.05)
    time.sleep(SAVED_AFTER_S)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    before = None
    while (now := files_of(folder / "runs")) != before:
        before = now
        time.sleep(4)
    return folder / "runs" / "lr-tune"


# Ray Tune's saved state


def test_a_storage_in_the_saved_state_is_the_one_of_the_present_folder(tmp_path):
    from ray.train._internal.storage import StorageContext

    old = StorageContext(storage_path=str(tmp_path / "old"), experiment_dir_name="trials", trial_dir_name="t0")
    saved = pickle.dumps({"storage": old})
    shutil.rmtree(tmp_path / "old")
    with _saved_state_is_in(tmp_path / "new" / "trials", "5f0c"):
        storage = pickle.loads(saved)["storage"]
    assert (storage.trial_fs_path, storage.trial_dir_name) == (str(tmp_path / "new" / "trials" / "t0"), "t0")
    assert storage._timestamp == "5f0c" and not (tmp_path / "old").exists()
    assert pickle.loads(saved)["storage"].trial_fs_path == str(tmp_path / "old" / "trials" / "t0")


def test_a_checkpoint_that_a_trial_got_from_another_is_looked_for_in_the_present_folder(tmp_path):
    from ray.tune import Checkpoint

    own, got = (
        types.SimpleNamespace(checkpoint=Checkpoint(f"/old/tune/trials/{name}/checkpoint_000001"))
        for name in ("t0", "t1")
    )
    manager = types.SimpleNamespace(best_checkpoint_results=[own], latest_checkpoint_result=got)
    nothing = types.SimpleNamespace(best_checkpoint_results=[], latest_checkpoint_result=None)
    trials = [
        types.SimpleNamespace(run_metadata=types.SimpleNamespace(checkpoint_manager=m)) for m in (manager, nothing)
    ]
    _checkpoints_are_in(tmp_path, trials)
    assert [Path(each.checkpoint.path) for each in (own, got)] == [
        tmp_path / "t0" / "checkpoint_000001",
        tmp_path / "t1" / "checkpoint_000001",
    ]


# Workers


def test_only_the_folder_that_reserved_workers_releases_them(tmp_path, monkeypatch):
    released = []
    monkeypatch.setattr(launch, "release", lambda note: released.extend(reserved_by(note)))
    first = RunDir(tmp_path / "tuning" / "trials" / "t0")
    note = first.logs / RESERVATION_FILE
    commit_json(note, {"file": str(note), "groups": ["ab"]})
    commit_json(first.path / "lock.json", {"attempt": 3})
    copy = RunDir(tmp_path / "copy" / "trials" / "t0")
    shutil.copytree(first.path, copy.path)
    launch.release_workers(copy)
    assert released == [] and not copy.stop_requested(3)
    launch.release_workers(first)
    assert released == ["ab"] and first.stop_requested(3)
    commit_bytes(note, b"ab\n")  # of an earlier version
    assert reserved_by(note) == []


# Settings


def test_a_moved_tuning_keeps_its_name_with_the_settings_that_it_was_started_with(tmp_path, tiny_settings):
    def named(name):
        run = tiny_settings.run.model_copy(update={"name": name, "dir": str(tmp_path)})
        return tiny_settings.model_copy(update={"run": run})

    run_dir = RunDir(tmp_path)
    write_or_verify_settings(run_dir, named("lr-tune"))
    assert keep_name(run_dir, named("lr"), started_as="lr-tune").run.name == "lr-tune"
    assert keep_name(run_dir, named("lr")).run.name == "lr"
    assert keep_name(run_dir, named("other"), started_as="other-tune").run.name == "other"


# As a person does it


@pytest.mark.ray
@pytest.mark.long
def test_a_half_finished_tuning_that_was_moved_continues_and_keeps_what_is_finished(tmp_path):
    space = {"training.learning_rate": {"grid": [1e-3, 2e-3, 3e-3]}}
    tuning = {"space": space, "scheduler": "none", "num_samples": 1, "max_concurrent": 1}
    folder = killed(tmp_path, tuning, "runs/lr-tune/trials/*_00000/steps/train-rationale.json")
    (finished,) = [path.parents[1] for path in folder.glob("trials/*/steps/train-rationale.json")][:1]
    (tmp_path / "runs").rename(tmp_path / "kept")
    moved = tmp_path / "kept" / "lr-tune"
    model = moved / "trials" / finished.name / "rationale" / "model" / "model.safetensors"
    before = model.stat().st_mtime_ns
    output = finish(tmp_path, "tune", "--preset", "demo", "--config", "tuning.yaml", "--set", "run.dir=kept/lr-tune")
    assert f"{moved} was moved from {folder}" in output and not (tmp_path / "runs").exists()
    trials = read_json(moved / "trials.json")
    assert [(trial["state"], trial["step"]) for trial in trials] == 3 * [("finished", 40)]
    assert model.stat().st_mtime_ns == before
    assert read_json(moved / "trials" / finished.name / "lock.json")["attempt"] == 1
    shown = finish(tmp_path, "status", "kept/lr-tune").removeprefix(output)
    assert shown.count("finished, validation_loss") == 3 and "best settings are in kept/lr-tune/best.yaml" in shown
    finish(tmp_path, "report", "kept/lr-tune")
    assert (moved / "report.html").exists() and not (tmp_path / "runs").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_copied_population_leaves_the_first_alone_and_the_first_continues_after_a_move(tmp_path):
    space = {"training.learning_rate": {"loguniform": [1.0e-5, 3.0e-3]}}
    tuning = {"space": space, "scheduler": "pbt", "num_samples": 3, "max_concurrent": 2, "grace_steps": 20}
    first = killed(tmp_path, tuning, "runs/lr-tune/trials/*-from-*/handed_over.json")
    note = read_json(next(first.glob("trials/*-from-*/handed_over.json")))["note"]
    assert f"  {note}\n" in (tmp_path / "output.log").read_text()
    shutil.copytree(first, tmp_path / "runs" / "copy")
    before = files_of(first)
    copy = ("tune", "--preset", "demo", "--config", "tuning.yaml", "--set", "run.dir=runs/copy", "--adopt")
    finish(tmp_path, *copy)
    assert files_of(first) == before
    (tmp_path / "runs").rename(tmp_path / "kept")
    finish(tmp_path, "tune", "--config", "kept/lr-tune/run.yaml")
    assert not (tmp_path / "runs").exists()
    for name in ("copy", "lr-tune"):
        trials = read_json(tmp_path / "kept" / name / "trials.json")
        assert [trial["state"] for trial in trials] == 3 * ["finished"], trials
