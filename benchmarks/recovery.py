"""Cost of a lost worker beyond the restart of an empty Ray Train function, in one run.

    python benchmarks/recovery.py [ROUNDS]

Interleaved: two Ray Train workers that only record their start, one killed with -9, the same
trainer started again, seconds until both run; and a training of ours, one worker killed with -9,
seconds until the next step beyond the last one that was logged.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from launcher.cluster.ray_session import ray_session
from launcher.config.loading import load_settings
from launcher.runs.journal import JournalReader
from launcher.runs.run_dir import RunDir
from launcher.training.launch import launch_training
from launcher.training.torchrun import read_job


def empty_worker(folder: str) -> None:
    import ray.train
    import torch  # what every training imports

    rank = ray.train.get_context().get_world_rank()
    (Path(folder) / f"{time.time():.3f}-{rank}-{os.getpid()}").touch()
    while not (Path(folder) / "end").exists():
        time.sleep(0.05)
    assert torch


def starts(folder: Path) -> list[tuple[float, int]]:
    """(time, pid) of every start, in order."""
    names = sorted(path.name for path in folder.iterdir() if path.name != "end")
    return [(float(name.split("-")[0]), int(name.split("-")[2])) for name in names]


def empty_recovery(folder: Path, number: int) -> float:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    folder.mkdir(parents=True)
    killed: list[float] = []

    def kill() -> None:
        while len(starts(folder)) < 2:
            time.sleep(0.05)
        killed.append(time.time())
        os.kill(starts(folder)[1][1], signal.SIGKILL)
        while len(starts(folder)) < 4:
            time.sleep(0.05)
        (folder / "end").touch()

    thread = threading.Thread(target=kill)
    thread.start()
    for attempt in range(2):
        trainer = TorchTrainer(
            empty_worker,
            train_loop_config=str(folder),
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(
                name=f"empty-{number}-{attempt}",
                storage_path=str(folder.parent / "ray"),
                failure_config=FailureConfig(max_failures=0),
            ),
        )
        try:
            trainer.fit()
        except Exception:
            assert attempt == 0
    thread.join()
    return starts(folder)[3][0] - killed[0]


def our_recovery(job_path: Path, folder: Path) -> float:
    job = dataclasses.replace(read_job(job_path), run_dir=str(folder))
    run_dir = RunDir(folder)
    folder.mkdir(parents=True)
    (folder / "lock.json").write_text(json.dumps({"attempt": job.attempt}))
    seconds: list[float] = []

    def last() -> int:
        return max(
            (p["step"] for p in JournalReader(run_dir.journal("rationale")).read() if "loss" in p["metrics"]), default=0
        )

    def kill() -> None:
        while last() < 25:
            time.sleep(0.02)
        pid = int((run_dir.logs / "rationale-rank1.log").read_text().rpartition("process ")[2].split()[0])
        killed, step = time.time(), last()
        os.kill(pid, signal.SIGKILL)
        while last() <= step + 1:  # this step may have been in progress when the worker was killed
            time.sleep(0.02)
        seconds.append(time.time() - killed)

    thread = threading.Thread(target=kill)
    thread.start()
    launch_training(job)
    thread.join()
    return seconds[0]


def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        changes = [
            "rationale.num_steps=60",
            "training.checkpoint_every=10",
            "training.log_every=1",
            "training.validate_every=1000",
            "data.mini_sqa.num_train=640",
        ]
        command = [
            sys.executable,
            "-m",
            "launcher",
            "train",
            "rationale",
            "--preset",
            "demo",
            "--write-job",
            "job.json",
        ]
        subprocess.run(
            [*command, *(part for change in changes for part in ("--set", change))],
            cwd=folder,
            check=True,
            capture_output=True,
        )
        pairs = []
        with ray_session(load_settings(preset="demo").cluster):
            for number in range(rounds):
                pairs.append(
                    (
                        empty_recovery(folder / f"empty-{number}", number),
                        our_recovery(folder / "job.json", folder / f"ours-{number}"),
                    )
                )
                print(f"empty function {pairs[-1][0]:.1f} s, our training {pairs[-1][1]:.1f} s", flush=True)
        shares = sorted(ours - empty for empty, ours in pairs)
        print(
            f"our share: median {statistics.median(shares):.1f} s ({shares[0]:.1f} to {shares[-1]:.1f} over {rounds})"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
