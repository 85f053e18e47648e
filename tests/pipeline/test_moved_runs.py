"""A run that was stopped half-way: its whole working directory is moved and finishes there; a copy asks for --adopt."""

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

from data_shards.atomic_files import read_json
from launcher.runs.run_dir import RunDir

pytestmark = [pytest.mark.ray, pytest.mark.processes]

SETTINGS = {
    "run": {"chain": "answer", "name": "demo"},
    "data": {"mini_sqa": {"num_train": 64, "num_val": 16, "num_test": 16}, "samples_per_shard": 24},
    "answer": {"num_steps": 12, "max_target_tokens": 12},
    "training": {
        "checkpoint_every": 2,
        "validate_every": 6,
        "log_every": 1,
        "global_batch_size": 8,
        "micro_batch_size": 8,
    },
    "cluster": {"num_workers": 1},
}
STEPS = ("data", "train-answer", "evaluate")


@pytest.fixture
def ray_folder():
    """Where Ray keeps its logs; short, for its sockets' sake."""
    folder = tempfile.mkdtemp(prefix="ray-")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def start(folder, ray_folder, *arguments):
    environment = {**os.environ, "MLFLOW_TRACKING_URI": "", "RAY_TMPDIR": ray_folder}
    with open(folder / "output.log", "w", encoding="utf-8") as log:
        command = [sys.executable, "-m", "launcher", *arguments]
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)


def mmcot(folder, ray_folder, *arguments):
    status = start(folder, ray_folder, *arguments).wait(300)
    return status, (folder / "output.log").read_text(encoding="utf-8")


def parents_in(store):
    """The parent runs in a store, by their keys, with their children by step."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store}")
    runs = client.search_runs([client.get_experiment_by_name("mmcot").experiment_id])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    return client, {
        run.data.tags["mmcot.key"]: (
            run,
            {c.data.tags["mmcot.step"]: c for c in children if c.data.tags["mlflow.parentRunId"] == run.info.run_id},
        )
        for run in runs
        if "mlflow.parentRunId" not in run.data.tags
    }


def test_a_half_finished_run_is_moved_and_finished_and_a_copy_of_it_is_adopted(tmp_path, ray_folder):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    (old / "demo.yaml").write_text(yaml.safe_dump(SETTINGS), encoding="utf-8")
    # Absolute places in the settings, as in a job script.
    command = ["run", "--preset", "demo", "--config", "demo.yaml", "--set", f"tracking.uri=sqlite:///{old}/mlflow.db"]
    driver, deadline = start(old, ray_folder, *command), time.time() + 240
    while not (old / "runs" / "demo" / "answer" / "checkpoints" / "LATEST").exists():
        assert driver.poll() is None and time.time() < deadline, (old / "output.log").read_text()
        time.sleep(0.05)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(120) == 143, (old / "output.log").read_text()

    old.rename(new)
    known = RunDir(new / "runs" / "demo").identity()
    assert mmcot(new, ray_folder, "status", "runs/demo")[0] == 0
    status, output = mmcot(new, ray_folder, "run", "--config", "runs/demo/run.yaml")
    assert status == 0 and f"was moved from {old}/runs/demo" in output, output
    run_dir = RunDir(new / "runs" / "demo")
    assert [run_dir.marker(step)["attempt"] for step in STEPS] == [1, 2, 2] and run_dir.identity() == known
    status, output = mmcot(new, ray_folder, "sync", "runs/demo")
    assert status == 0, output
    assert run_dir.marker("data")["outputs"]["shards_dir"].startswith(f"{new}/data/") and not old.exists()

    client, parents = parents_in(new / "mlflow.db")
    parent, children = parents[f"{known}/pipeline"]
    assert len(parents) == 1 and set(children) == set(STEPS)
    assert {run.info.status for run in (parent, *children.values())} == {"FINISHED"}
    history = client.get_metric_history(children["train-answer"].info.run_id, "loss")
    assert sorted(point.step for point in history) == list(range(1, 13))
    assert {"run.yaml", "report.html"} <= {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"predictions", "scores.json"} <= {
        file.path for file in client.list_artifacts(children["evaluate"].info.run_id)
    }

    shutil.copytree(run_dir.path, new / "runs" / "copy")
    own = ["run", "--config", "runs/copy/run.yaml", "--set", "run.dir=runs/copy", "--set", "run.name=demo"]
    status, output = mmcot(new, ray_folder, *own)
    assert status == 1 and f"runs/copy is a copy of {new}/runs/demo" in output and "--adopt" in output, output
    status, output = mmcot(new, ray_folder, "sync", "runs/copy")
    assert status == 1 and "its values would be sent to the MLflow runs of that one" in " ".join(output.split()), output
    status, output = mmcot(new, ray_folder, *own, "--adopt")
    assert status == 0 and "is a run of its own from here on" in output, output
    copy = RunDir(new / "runs" / "copy")
    assert copy.identity() != known == run_dir.identity()
    manifests = list(copy.checkpoints("answer").glob("*/manifest.json"))
    assert manifests and {read_json(path)["run_id"] for path in manifests} == {copy.identity()}
    _, parents = parents_in(new / "mlflow.db")
    assert set(parents) == {f"{known}/pipeline", f"{copy.identity()}/pipeline"}
    assert set(parents[f"{copy.identity()}/pipeline"][1]) == set(STEPS) and not old.exists()
