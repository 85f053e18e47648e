"""Seconds from the kill of a training worker until the training trains again, in one run.

    python benchmarks/recovery.py [KILLS]

The demo's stage one on two local workers, with a checkpoint every 10 steps. A worker is killed with -9, every second
time shortly after the training went on, so that no process stands by yet, and every second time later.
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
from launcher.training.ray_group import STANDBY_AFTER_S
from launcher.training.torchrun import read_job

SETTINGS = [
    "rationale.num_steps=100000",
    "training.checkpoint_every=10",
    "training.log_every=1",
    "training.validate_every=100000",
    "training.max_failures=1000",
    "data.mini_sqa.num_train=640",
]
EARLY_S, LATE_S = 5.0, STANDBY_AFTER_S + 15.0


def write_job(folder: Path) -> Path:
    """Write the job of the demo's stage one."""
    command = [sys.executable, "-m", "launcher", "train", "rationale", "--preset", "demo", "--write-job", "job.json"]
    changes = [part for change in SETTINGS for part in ("--set", change)]
    subprocess.run([*command, *changes], cwd=folder, check=True, capture_output=True)
    return folder / "job.json"


def main(num_kills: int) -> None:
    """Kill workers of one training and print how long each kill has stopped it."""
    with tempfile.TemporaryDirectory() as name:
        run_dir = RunDir(Path(name) / "run")
        job = dataclasses.replace(read_job(write_job(Path(name))), run_dir=str(run_dir.path))
        run_dir.path.mkdir()
        (run_dir.path / "lock.json").write_text(json.dumps({"attempt": job.attempt}))
        found: dict[str, list[tuple[float, float]]] = {"without": [], "with": []}

        def steps() -> list[int]:
            points = JournalReader(run_dir.journal("rationale")).read()
            return [point["step"] for point in points if "loss" in point["metrics"]]

        def kill() -> None:
            for number in range(num_kills):
                before = len(steps())
                while len(steps()) == before:  # until it trains
                    time.sleep(0.05)
                time.sleep(LATE_S if number % 2 else EARLY_S)
                pid = int((run_dir.logs / "rationale-rank1.log").read_text().rpartition("process ")[2].split()[0])
                killed, before = time.time(), steps()
                os.kill(pid, signal.SIGKILL)
                time.sleep(0.5)  # what was already on its way to the journal
                before = steps()
                while len(now := steps()) == len(before):
                    time.sleep(0.02)
                again = time.time() - killed
                while max(now) <= max(before):
                    time.sleep(0.02)
                    now = steps()
                kind = "with" if number % 2 else "without"
                found[kind].append((again, time.time() - killed))
                print(
                    f"{kind} processes that stand by: trains again after {again:.1f} s, "
                    f"at a new step after {found[kind][-1][1]:.1f} s",
                    flush=True,
                )
            run_dir.request_stop(job.attempt)

        thread = threading.Thread(target=kill)
        thread.start()
        with ray_session(load_settings(preset="demo").cluster):
            try:
                launch_training(job, report=lambda line: print(line, flush=True))
            except Exception as error:  # it was asked to stop
                print(type(error).__name__)
        thread.join()
        for kind, pairs in found.items():
            seconds = sorted(again for again, _ in pairs)
            print(
                f"{kind} processes that stand by: median {statistics.median(seconds):.1f} s "
                f"({seconds[0]:.1f} to {seconds[-1]:.1f} over {len(seconds)})"
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 6)
