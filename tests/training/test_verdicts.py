"""Whether a training's workers were lost or failed does not depend on any clock."""

from __future__ import annotations

import os

import pytest

from data_shards.atomic_files import commit_json
from launcher.config.loading import load_settings
from launcher.runs.run_dir import RunDir
from launcher.stages.jobs import TrainJob
from launcher.training import launch
from launcher.training.ray_group import RanksFailed


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function that launches a training whose start of each number does what is given; returns the starts."""
    settings = load_settings(preset="demo", overrides=[f"run.dir={tmp_path}", "cluster.use_gpu=false"])
    commit_json(tmp_path / "lock.json", {"attempt": 3})
    (tmp_path / "logs").mkdir()
    job = TrainJob(
        stage="rationale",
        settings=settings,
        run_dir=str(RunDir(tmp_path).path),
        shards_dir="shards",
        lengths={},
        num_steps=5,
        attempt=3,
    )
    starts = []

    def launch_with(*what_happens):
        def run(group, work):
            starts.append(len(starts))
            what_happens[starts[-1]]()
            raise RanksFailed("rank 1: the actor died")

        monkeypatch.setattr(launch.RankGroup, "run", run)
        monkeypatch.setattr(launch, "_check_gpus_left", lambda job, faults, *, num_held: None)  # asks Ray
        with pytest.raises(launch.WorkersFailed) as raised:
            launch.launch_training(job)
        return starts, str(raised.value)

    return launch_with


def fail(folder, *, hours, attempt=3):
    def write():
        path = folder / "logs" / f"rationale-rank1.{attempt}.failure"
        path.write_text("rationale-rank1 (process 7):\nValueError: a label is negative")
        when = path.stat().st_mtime + 3600 * hours
        os.utime(path, (when, when))

    return write


@pytest.mark.parametrize("hours", [-24, 0, 24])
def test_an_error_in_a_worker_whose_clock_is_wrong_ends_the_run_with_it(start, tmp_path, hours):
    starts, message = start(fail(tmp_path, hours=hours))
    assert starts == [0] and "ValueError: a label is negative" in message


@pytest.mark.parametrize("hours", [-24, 24])
def test_an_error_of_an_earlier_attempt_is_not_taken_for_one_of_this(start, tmp_path, hours):
    fail(tmp_path, hours=hours, attempt=2)()
    fail(tmp_path, hours=hours)()  # of this attempt's earlier training of the stage
    starts, message = start(*[lambda: None] * 4)
    assert starts == [0, 1, 2, 3] and "lost workers 4 times" in message
