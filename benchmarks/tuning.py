"""Savings of ASHA: eight learning rates, stopped early or all run to the end, in one run.

    python benchmarks/tuning.py [FOLDER [SCHEDULER...]]

The same eight draws of a learning rate for the demo's stage one, once with ASHA and once to the end. Prints the steps
taken, the best trial's accuracy when its settings run the whole pipeline (both stages, at the demo's length), and the
seconds from the report that ends a trial until its workers have ended.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml

from data_shards.atomic_files import read_json
from launcher.runs.journal import JournalReader
from launcher.runs.run_dir import RunDir

SPACE = {"training.learning_rate": {"loguniform": [1.0e-4, 1.0e-2]}}
SETTINGS = {
    "training": {"checkpoint_every": 100, "validate_every": 100, "micro_batch_size": 16},
    "cluster": {"num_workers": 1},
}


def tune(folder: Path, name: str, scheduler: str) -> tuple[list[dict], float, list[float]]:
    """Run a tuning; returns its trials, its seconds, and the seconds each stopped trial's processes still ran."""
    values = {
        **SETTINGS,
        "run": {"name": name},
        "tuning": {"space": SPACE, "scheduler": scheduler, "num_samples": 8, "grace_steps": 100},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    started = time.time()
    with open(folder / f"{name}.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "launcher", "tune", "--preset", "demo", "--config", f"{name}.yaml"],
            cwd=folder,
            stdout=log,
            stderr=log,
        )
    seen: dict[str, dict[int, float]] = {}  # trial: the last time each of its processes was seen
    while process.poll() is None:
        for pid, trial in training_processes(folder / "runs" / name):
            seen.setdefault(trial, {})[pid] = time.time()
        time.sleep(0.2)
    assert process.returncode == 0, (folder / f"{name}.log").read_text()
    trials = read_json(folder / "runs" / name / "trials.json")
    freed = [
        max(seen[trial["trial"]].values()) - last_reported(folder / "runs" / name, trial)
        for trial in trials
        if trial["state"] == "stopped early"
    ]
    return trials, time.time() - started, freed


def training_processes(run_dir: Path) -> list[tuple[int, str]]:
    """(pid, trial) of the training workers that have a trial's journal or log open."""
    found = []
    for process in psutil.process_iter(["pid", "name"]):
        try:
            paths = [file.path for file in process.open_files()] if "ray::" in " ".join(process.cmdline()) else []
        except psutil.Error:
            continue
        for path in paths:
            if path.startswith(f"{run_dir}/trials/") and path.endswith("-metrics.jsonl"):
                found.append((process.pid, Path(path).relative_to(run_dir / "trials").parts[0]))
    return found


def last_reported(run_dir: Path, trial: dict) -> float:
    """The time at which the trial's last validation loss was logged."""
    points = JournalReader(RunDir(run_dir / "trials" / trial["trial"]).journal("rationale")).read()
    return next(
        point["time_ms"] / 1000
        for point in points
        if point["step"] == trial["step"] and "validation_loss" in point["metrics"]
    )


def accuracy(folder: Path, name: str) -> float:
    """The accuracy of the best settings in the whole pipeline with the demo's steps."""
    command = [sys.executable, "-m", "launcher", "run", "--config", f"runs/{name}/best.yaml"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return read_json(folder / "runs" / f"{name}-best" / "scores.json")["accuracy"]["AVG"]


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["MLFLOW_TRACKING_URI"] = ""
    for scheduler in sys.argv[2:] or ("asha", "none"):
        name = f"lr-{scheduler}"
        trials, seconds, freed = tune(folder, name, scheduler)
        best = min(
            (trial for trial in trials if trial["validation_loss"] is not None),
            key=lambda trial: trial["validation_loss"],
        )
        result = {
            "scheduler": scheduler,
            "steps": sum(trial["step"] for trial in trials),
            "seconds": round(seconds),
            "best learning rate": best["values"]["training.learning_rate"],
            "validation loss": best["validation_loss"],
            "accuracy of its pipeline": accuracy(folder, name),
            "freed after, seconds": [round(value, 1) for value in freed],
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
