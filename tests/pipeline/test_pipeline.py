"""The demo at a tiny size, as a person runs it: real Ray, DeepSpeed, MLflow, and a real kill."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import psutil
import pytest

from data_shards.atomic_files import read_json
from data_shards.generation_ledger import read_ledger
from data_shards.reader import SplitReader
from launcher.config.chains import CHAINS
from launcher.runs.journal import JournalReader
from launcher.runs.run_dir import RunDir, shards_dir_of
from launcher.runs.sample_ledger import LedgerError, verify_ledger

STEPS = CHAINS["two-stage"].steps
SIZES = [
    "data.mini_sqa.num_train=64",
    "data.mini_sqa.num_val=16",
    "data.mini_sqa.num_test=16",
    "data.samples_per_shard=24",
    "rationale.num_steps=20",
    "rationale.max_target_tokens=24",
    "answer.num_steps=6",
    "training.checkpoint_every=5",
    "training.validate_every=10",
    "training.log_every=1",
    "training.ledger=true",
    "training.global_batch_size=16",
    "training.micro_batch_size=8",
    "generation.temperature=1",
    "generation.candidates=3",
    "generation.search=vote",
]

pytestmark = pytest.mark.ray


# Given to every command below, and to be found nowhere in what it leaves behind.
PLANTED = {
    name: f"pl4nted-{number}-{name.lower().replace('_', '-')}"
    for number, name in enumerate(
        (
            "MLFLOW_TRACKING_USERNAME",
            "MLFLOW_TRACKING_PASSWORD",
            "MLFLOW_TRACKING_TOKEN",
            "MLFLOW_AUTH_ADMIN_PASSWORD",
            "AWS_ACCESS_KEY_ID",
            "AWS_SECRET_ACCESS_KEY",
            "AWS_SESSION_TOKEN",
            "HF_TOKEN",
            "COMET_API_KEY",
            "RAY_AUTH_TOKEN",
            "AWS_SHARED_CREDENTIALS_FILE",
        )
    )
}


def start(folder, *arguments, log):
    command = [sys.executable, "-m", "launcher", *arguments]
    (folder / "credentials").write_text(PLANTED["AWS_SHARED_CREDENTIALS_FILE"])
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": "",
        **PLANTED,
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "credentials"),
        "RAY_TMPDIR": str(ray_folder(folder)),
    }
    return subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=environment)


def ray_folder(folder):
    """Where Ray keeps its logs; short, for its sockets' sake."""
    return (folder / "ray").resolve()


def mmcot(folder, *arguments, timeout=400):
    with open(folder / "output.log", "w+") as log:
        status = start(folder, *arguments, log=log).wait(timeout)
        log.seek(0)
        return status, log.read()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    (folder / "ray").symlink_to(tempfile.mkdtemp(prefix="ray-"))
    yield folder
    shutil.rmtree(ray_folder(folder), ignore_errors=True)


@pytest.fixture(scope="module")
def arguments():
    return ["run", "--preset", "demo", *[part for size in SIZES for part in ("--set", size)]]


@pytest.fixture(scope="module")
def finished(folder, arguments):
    """A demo whose driver was killed with -9 in the middle of stage one, then run again to its end."""
    with open(folder / "killed.log", "w") as log:
        driver = start(folder, *arguments, log=log)
        latest = folder / "runs" / "demo" / "rationale" / "checkpoints" / "LATEST"
        deadline = time.time() + 300
        while not latest.exists():
            assert driver.poll() is None and time.time() < deadline, (folder / "killed.log").read_text()
            time.sleep(0.05)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    status, output = mmcot(folder, *arguments)
    assert status == 0, output
    return output


def test_after_a_kill_of_the_driver_the_same_command_goes_on_at_the_unfinished_step(folder, finished):
    attempts = {step: read_json(folder / "runs" / "demo" / "steps" / f"{step}.json")["attempt"] for step in STEPS}
    assert attempts == {"data": 1, "train-rationale": 2, "rationales": 2, "train-answer": 2, "evaluate": 2}
    points = JournalReader(folder / "runs" / "demo" / "logs" / "rationale-metrics.jsonl").read()
    steps = [point["step"] for point in points if "loss" in point["metrics"]]
    assert set(steps) == set(range(1, 21))
    assert len(steps) < 2 * 20  # the second attempt began at a checkpoint, not at step one


def test_the_ledger_of_a_killed_and_resumed_training_adds_up_and_a_forged_one_does_not(folder, finished, tmp_path):
    run_dir = RunDir(folder / "runs" / "demo")
    qids = [str(qid) for qid in SplitReader(folder / shards_dir_of(run_dir), "train").qids]
    lines = verify_ledger(run_dir, "rationale", qids)
    assert len(lines) == 5 and all(line.endswith("64 questions, each exactly once") for line in lines)
    forged_dir = RunDir(tmp_path)
    shutil.copytree(run_dir.logs, forged_dir.logs)
    path = forged_dir.ledger("rationale", 1)
    forged = [json.loads(line) for line in path.read_text().splitlines()]
    stolen = next(iter(forged[0]["blocks"].values()))[0]
    for line in forged:
        if line["step"] == 1:
            next(iter(line["blocks"].values()))[0] = stolen
    path.write_text("".join(json.dumps(line) + "\n" for line in forged))
    with pytest.raises(LedgerError, match=rf"epoch 0: questions used twice \['{stolen}'\], never"):
        verify_ledger(forged_dir, "rationale", qids)


def test_the_last_lines_are_the_table_the_run_and_how_to_open_mlflow(finished):
    tail = finished.splitlines()[-17:]
    assert any(line.split() == ["NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "AVG"] for line in tail)
    assert any(line.endswith("ceiling, text alone, greedy chain") for line in tail)
    assert max(len(line) for line in finished.splitlines() if line.count(".") > 5) <= 80
    assert (
        "run: runs/demo" in tail
        and tail[-3].startswith("report: runs/demo/report.html")
        and tail[-2] == "MLflow: mmcot mlflow up   then open"
    )
    assert re.search(
        r"http://127\.0\.0\.1:5000/#/experiments/1/runs/[0-9a-f]{32}\?workflowType=machine_learning$", tail[-1]
    )


def test_every_question_has_one_rationale_and_one_prediction(folder, finished):
    run = folder / "runs" / "demo"
    rationales = [
        json.loads(line)["qid"] for path in run.glob("rationales/*/*.jsonl") for line in path.read_text().splitlines()
    ]
    assert len(rationales) == len(set(rationales)) == 96
    assert len((run / "predictions" / "test.jsonl").read_text().splitlines()) == 16
    scores = read_json(run / "scores.json")
    assert (
        scores["num_questions"] == 16
        and set(scores["accuracy"]) >= {"NAT", "AVG"}
        and scores["rationale"]["rougeL"] > 0
    )


def test_candidates_are_voted_on_and_their_agreement_is_kept_everywhere(folder, finished):
    from mlflow import MlflowClient

    run = folder / "runs" / "demo"
    for text, num_questions in (("rationales", 96), ("predictions/parts", 32)):
        ledger = list(read_ledger(run / text))
        assert len({(text.split, text.qid, text.candidate) for text in ledger}) == len(ledger) == 3 * num_questions
        assert all(text.weights and text.seed == 0 for text in ledger)
    lines = [json.loads(line) for line in (run / "predictions" / "test.jsonl").read_text().splitlines()]
    agreements = [line["agreement"] for line in lines]
    assert set(agreements) <= {0, 1 / 3, 2 / 3, 1} and all("rationale_agreement" in line for line in lines)
    mean = read_json(run / "scores.json")["agreement"]["mean"]
    assert mean == pytest.approx(sum(agreements) / 16, abs=1e-4)
    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("mmcot").experiment_id])
    (parent,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    assert parent.data.metrics["test_agreement"] == mean
    assert "Agreement" in (run / "report.html").read_text()


def test_mlflow_holds_one_parent_with_a_child_a_step_and_no_point_twice(folder, finished):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mmcot")
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {run.data.tags["mmcot.step"]: run for run in runs if "mlflow.parentRunId" in run.data.tags}
    assert len(parents) == 1 and set(children) == set(STEPS) and len(runs) == 6
    assert {run.info.status for run in runs} == {"FINISHED"}
    history = client.get_metric_history(children["train-rationale"].info.run_id, "loss")
    assert sorted(metric.step for metric in history) == list(range(1, 21))
    parent = parents[0].data
    assert parent.params["training.zero_stage"] == "auto" and all(
        child.data.params.items() >= parent.params.items() for child in children.values()
    )
    losses = {f"{stage}_{name}" for stage in ("rationale", "answer") for name in ("loss", "validation_loss")}
    assert {*losses, "val_accuracy_AVG", "test_accuracy_AVG", "val_rougeL", "test_rougeL"} <= set(parent.metrics)
    assert parent.metrics["rationale_loss"] == children["train-rationale"].data.metrics["loss"]
    history = client.get_metric_history(parents[0].info.run_id, "rationale_loss")
    assert sorted(metric.step for metric in history) == list(range(1, 21))
    training = children["train-rationale"].data.metrics
    assert {
        "mfu",
        "gate_opening",
        "padding_factor",
        "memory_gb",
        "time_share_backward",
        "validation_loss",
        "grad_norm",
    } <= set(training)
    assert 0 < training["mfu"] < 1 and 0 < training["gate_opening"] < 1
    assert {"generation_tokens_per_s", "generation_rows_share"} <= set(children["rationales"].data.metrics)
    assert len(children["data"].inputs.dataset_inputs) == 3 and len(children["train-answer"].inputs.dataset_inputs) == 2
    assert "report.html" in [file.path for file in client.list_artifacts(parents[0].info.run_id)]
    assert client.get_model_version_by_alias("answer", "champion").run_id == parents[0].info.run_id


def test_a_finished_run_does_nothing_and_says_so(folder, arguments, finished):
    status, output = mmcot(folder, *arguments)
    assert status == 0 and "there is nothing to do" in output


def test_a_run_folder_of_other_settings_is_refused_naming_run_dir(folder, arguments, finished):
    status, output = mmcot(folder, *arguments, "--set", "training.learning_rate=0.5")
    assert status == 1 and "training.learning_rate was 0.001 and is now 0.5" in output and "run.dir" in output


def test_status_tells_what_was_done(folder, finished):
    status, output = mmcot(folder, "status", "runs/demo")
    assert status == 0 and all(step in output for step in STEPS) and "done in" in output and "MLflow" in output


def test_no_secret_of_the_environment_stands_in_anything_a_run_leaves_behind(folder, finished):
    secrets = {name: value.encode() for name, value in PLANTED.items()}
    both = f"{PLANTED['MLFLOW_TRACKING_USERNAME']}:{PLANTED['MLFLOW_TRACKING_PASSWORD']}".encode()
    secrets["as HTTP sends both"] = base64.b64encode(both)
    files = [
        path
        for place in (folder, ray_folder(folder))
        for path in place.rglob("*")
        if path.is_file() and path.name != "credentials"
    ]
    assert {
        "run.yaml",
        "report.html",
        "tracking.jsonl",
        "mlflow.json",
        "mlflow.db",
        "output.log",
        "killed.log",
        "raylet.out",
    } <= {path.name for path in files}
    found = [
        (str(path), name)
        for path in files
        for data in [path.read_bytes()]
        for name, secret in secrets.items()
        if secret in data
    ]
    assert found == []


def test_no_process_of_the_killed_driver_is_left(folder, finished):
    deadline = time.time() + 30
    while time.time() < deadline:
        left = [p.pid for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]
        if not left:
            return
        time.sleep(1)
    raise AssertionError(f"processes of the finished runs are still alive: {left}")


def test_help_answers_in_under_a_second():
    for arguments in (
        ["--help"],
        ["run", "--help"],
        ["data", "--help"],
        ["train", "rationale", "--help"],
        ["status", "--help"],
    ):
        started = time.perf_counter()
        output = subprocess.run(
            [sys.executable, "-m", "launcher", *arguments], capture_output=True, text=True, check=True
        ).stdout
        assert "Usage: mmcot" in output
        assert time.perf_counter() - started < 1.0
