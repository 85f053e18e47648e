"""Training on Ray: a lost worker is replaced, an error of our own is shown and not repeated."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from data_shards.atomic_files import commit_json
from launcher.runs.journal import JournalReader
from launcher.runs.run_dir import RunDir
from launcher.runs.signals import Stopped
from launcher.training.launch import WorkersFailed, launch_training
from launcher.training.ray_worker import _is_lost_peer

pytestmark = pytest.mark.ray


def signal_ranks(run_dir: RunDir, faults: list[tuple[int, int]], signalled: list[int]) -> None:
    """At each checkpoint (step, signal): signal the last rank that wrote its process number into its log."""
    for step, number in faults:
        deadline = time.time() + 120
        while (
            not (checkpoint := run_dir.checkpoints("rationale") / f"step-{step:06d}").exists()
            and time.time() < deadline
        ):
            time.sleep(0.005)
        assert checkpoint.exists()
        pid = int((run_dir.logs / "rationale-rank1.log").read_text().rpartition("process ")[2].split()[0])
        assert "ray" in " ".join(psutil.Process(pid).cmdline())
        os.kill(pid, number)
        signalled.append(pid)


@pytest.mark.long
def test_ranks_killed_with_9_and_hung_are_replaced_and_the_training_ends_at_its_last_step(make_job, ray_up, capfd):
    job = dataclasses.replace(make_job("ray-faults", hang_timeout_s=5), num_steps=100)
    run_dir, signalled, lines = RunDir(Path(job.run_dir)), [], []
    faults = [(2, signal.SIGKILL), (40, signal.SIGSTOP)]
    thread = threading.Thread(target=signal_ranks, args=(run_dir, faults, signalled))
    thread.start()
    launch_training(job, report=lines.append)
    thread.join()
    assert len(set(signalled)) == 2
    again = [f"  a worker was lost; starting again from the last checkpoint ({number} of 3)" for number in (1, 2)]
    assert lines[:2] == again and len(lines) == 3
    gloo = run_dir.logs / "rationale-collectives-gloo"
    assert lines[2] == f"  the last collectives of each rank are in {gloo}, in <rank>.json"
    assert (gloo / "0.json").exists() and not (gloo / "1.json").exists()  # the stopped rank wrote none
    points = JournalReader(run_dir.journal("rationale")).read()
    assert {point["step"] for point in points if "loss" in point["metrics"]} == set(range(1, 101))
    assert (run_dir.model("rationale") / "model.safetensors").exists()
    assert "Timeout (0:00:05)!" in (run_dir.logs / "rationale-rank0.log").read_text()
    assert not psutil.pid_exists(signalled[1])
    assert "A worker died" not in capfd.readouterr().out  # Ray's own lines


def test_a_stop_asked_for_in_the_last_step_is_not_forgotten(make_job, monkeypatch):
    job = make_job("stopped-late")
    run_dir = RunDir(Path(job.run_dir))

    def end_as_asked(group, work):
        os.kill(os.getpid(), signal.SIGTERM)
        commit_json(run_dir.model("rationale") / "config.json", {})

    monkeypatch.setattr("launcher.training.launch.RankGroup.run", end_as_asked)
    with pytest.raises(Stopped):
        launch_training(job)


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed."), True),
        (RuntimeError("Caught ShardError in DataLoader worker process 0.\nOriginal Traceback ..."), False),
        (RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"), True),
        (ValueError("a wrong value"), False),
    ],
)
def test_a_process_that_is_gone_is_told_from_an_error_that_would_come_again(error, is_lost):
    assert _is_lost_peer(error) == is_lost


def test_an_error_in_a_rank_is_shown_with_its_traceback_last_and_not_repeated(make_job, ray_up, tmp_path):
    job = make_job("ray-broken")
    job = dataclasses.replace(job, lengths=job.lengths | {"train": str(tmp_path / "none.npz")})
    lines = []
    with pytest.raises(WorkersFailed, match=r"stage 'rationale' failed\nrationale-rank[01] \(process") as caught:
        launch_training(job, report=lines.append)
    assert str(caught.value).strip().splitlines()[-1].startswith("FileNotFoundError") and lines == []
