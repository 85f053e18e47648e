"""A full disk: one last message with step, path, needed and free space and the checkpoint that is kept."""

from __future__ import annotations

import errno
import os

import pytest

from data_shards.atomic_files import commit_bytes, commit_json
from launcher.config.loading import load_settings
from launcher.pipeline.full_disk import full_disk_explained
from launcher.pipeline.pipeline import run_pipeline
from launcher.pipeline.steps import Steps
from launcher.runs import ownership
from launcher.runs.run_dir import RunDir, RunError
from launcher.stages.jobs import TrainJob
from launcher.training import launch
from launcher.training.checkpoint import write_error
from launcher.training.ray_group import RanksFailed


@pytest.fixture
def place(tmp_path):
    settings = load_settings(preset="demo", overrides=[f"run.dir={tmp_path / 'run'}", "cluster.use_gpu=false"])
    run_dir = RunDir(settings.run_dir)
    run_dir.mark_done("data", {"step": "data", "inputs": {}, "outputs": {}})
    commit_bytes(run_dir.checkpoints("rationale") / "step-000400" / "state" / "weights", b"x" * 5_000_000)
    commit_bytes(run_dir.checkpoints("rationale") / "LATEST", b"step-000400\n")
    return settings, run_dir


def no_space(path):
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


WHOLE = (
    r"^the disk is full: step 'train-rationale' could not write {path}; \d+\.\d\d GB are free, a start needs 1 GB "
    r"\(0.005 GB a checkpoint\); the checkpoint step-000400 is kept: free some space and run again$"
)


def test_a_lock_that_cannot_be_released_does_not_hide_what_failed_first(place, monkeypatch):
    settings, run_dir = place
    commit, failed = ownership.commit_json, []

    def full_disk(path, value):
        if failed:
            raise no_space(path)
        commit(path, value)

    def step(self, name):
        failed.append(name)
        raise no_space(run_dir.path / "lengths" / "a.npz")

    monkeypatch.setattr(ownership, "commit_json", full_disk)
    monkeypatch.setattr(Steps, "run", step)
    with pytest.raises(RunError, match=WHOLE.format(path=".*/run/lengths/a.npz")):
        run_pipeline(settings, report=lambda line: None)


def test_the_path_is_that_of_the_checkpoint_whose_writing_failed(place):
    settings, run_dir = place
    folder = run_dir.checkpoints("rationale")
    with (
        pytest.raises(RunError, match=WHOLE.format(path=".*/run/rationale/checkpoints")),
        full_disk_explained(run_dir, settings),
    ):
        raise RuntimeError(f"a worker:\n{write_error('the checkpoint of step 800', no_space('x'), folder)}")


def test_another_error_is_kept_before_the_message_and_alone_without_a_full_disk(place):
    settings, run_dir = place
    with pytest.raises(RunError, match=r"^a loss is nan\nthe disk is full"), full_disk_explained(run_dir, settings):
        try:
            raise ValueError("a loss is nan")
        finally:
            raise no_space(run_dir.path / "lock.json")
    with pytest.raises(ValueError, match="a loss is nan"), full_disk_explained(run_dir, settings):
        raise ValueError("a loss is nan")


def test_a_worker_that_cannot_write_its_traceback_is_not_taken_for_a_lost_one(place, monkeypatch):
    settings, run_dir = place
    commit_json(run_dir.path / "lock.json", {"attempt": 1})
    job = TrainJob(
        stage="rationale",
        settings=settings,
        run_dir=str(run_dir.path),
        shards_dir="shards",
        lengths={},
        num_steps=5,
        attempt=1,
    )
    starts = []

    def run(group, work):
        starts.append(work)
        raise RanksFailed("rank 0:\n  OSError: [Errno 28] No space left on device: '/run/logs/rank0.log'\n")

    monkeypatch.setattr(launch.RankGroup, "run", run)
    with pytest.raises(launch.WorkersFailed, match="No space left on device"):
        launch.launch_training(job)
    assert starts == [launch.run_worker]
