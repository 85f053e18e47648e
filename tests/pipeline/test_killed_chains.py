"""Chains of one, two and three stages, killed with -9 in each step: the results are those of an undisturbed run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import yaml
from extending_page import EXTENSION

from launcher.config.chains import EVALUATE
from launcher.runs.run_dir import RunDir

pytestmark = [pytest.mark.ray, pytest.mark.processes, pytest.mark.slow]

STAGES = {"answer": ["answer"], "two-stage": ["rationale", "answer"], "draft-first": ["draft", "rationale", "answer"]}
SMALL = {
    "extensions": ["my_parts"],
    "data": {"mini_sqa": {"num_train": 64, "num_val": 24, "num_test": 24}, "samples_per_shard": 24},
    "training": {
        "checkpoint_every": 2,
        "validate_every": 6,
        "log_every": 1,
        "global_batch_size": 8,
        "micro_batch_size": 8,
    },
    "generation": {"task_samples": 4},
    "cluster": {"num_workers": 1},
}


def start(folder, chain, name):
    stages = {stage: {"num_steps": 8, "max_target_tokens": 12} for stage in STAGES[chain]}
    settings = SMALL | {"run": {"chain": chain, "name": name}, "stages": stages}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    environment = {**os.environ, "MLFLOW_TRACKING_URI": "", "RAY_TMPDIR": str((folder / "ray").resolve())}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(folder / f"{name}.log", "a", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "launcher", "run", "--preset", "demo", "--config", f"{name}.yaml"],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def has_begun(run_dir, step):
    """Whether a step has committed a part of its work."""
    if step == "data":
        return (run_dir.path / "lock.json").exists()
    if step.startswith("train-"):
        return (run_dir.checkpoints(step.removeprefix("train-")) / "LATEST").exists()
    folder = run_dir.predictions / "parts" if step == EVALUATE else run_dir.texts(step)
    return any(folder.glob("*/*.jsonl"))


def kill_in(folder, chain, name, step):
    """Start the run, and kill its driver when the step has begun."""
    run_dir, driver, deadline = RunDir(folder / "runs" / name), start(folder, chain, name), time.time() + 240
    while not has_begun(run_dir, step):
        assert driver.poll() is None and time.time() < deadline, (folder / f"{name}.log").read_text()
        time.sleep(0.01)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert run_dir.marker(step) is None, f"{step} was done before the kill"


def files_of(run_dir, chain):
    """What a run has written: its texts, predictions and scores."""
    patterns = ("predictions/*.jsonl", "scores*.json", "drafts/*/*.jsonl", "rationales/*/*.jsonl")
    found = [path for pattern in patterns for path in run_dir.path.glob(pattern)]
    models = [run_dir.model(stage) / "model.safetensors" for stage in STAGES[chain]]
    return {str(path.relative_to(run_dir.path)): path.read_bytes() for path in (*found, *models)}


@pytest.fixture
def ray_folder(tmp_path):
    """Where Ray keeps its logs; short, for its sockets' sake."""
    folder = tempfile.mkdtemp(prefix="ray-")
    (tmp_path / "ray").symlink_to(folder)
    yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.usefixtures("ray_folder")
@pytest.mark.parametrize("chain", list(STAGES))
def test_a_chain_that_is_killed_in_each_step_writes_what_an_undisturbed_one_does(chain, tmp_path):
    (tmp_path / "my_parts.py").write_text(EXTENSION, encoding="utf-8")
    assert start(tmp_path, chain, "whole").wait(300) == 0, (tmp_path / "whole.log").read_text()
    whole = RunDir(tmp_path / "runs" / "whole")
    steps = [
        step for stage in STAGES[chain] for step in (f"train-{stage}", {"draft": "drafts"}.get(stage, f"{stage}s"))
    ]
    steps = ["data", *steps[:-1], EVALUATE]
    for step in steps:
        kill_in(tmp_path, chain, "killed", step)
    assert start(tmp_path, chain, "killed").wait(300) == 0, (tmp_path / "killed.log").read_text()
    killed = RunDir(tmp_path / "runs" / "killed")
    assert [killed.marker(step)["attempt"] for step in steps] == list(range(2, len(steps) + 2))
    expected, found = files_of(whole, chain), files_of(killed, chain)
    assert sorted(found) == sorted(expected) and all(found[name] == expected[name] for name in expected)
