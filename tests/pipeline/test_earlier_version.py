"""What version 0.1.0 made still works: two runs, a job, a registered model (``tests/golden/run_0_1_0/README.md``)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_shards.atomic_files import commit_json, read_json
from launcher.cli.main import app
from launcher.config.loading import load_settings
from launcher.runs.journal import JournalReader
from launcher.runs.run_dir import RunDir

MADE = Path(__file__).parents[1] / "golden" / "run_0_1_0" / "made.tar.xz"
FINISHED, INTERRUPTED = "runs/finished", "runs/interrupted"


def is_text(path):
    return path.name == "MLmodel" or path.suffix in (".json", ".jsonl", ".yaml")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """What the archive holds, with the place it lies in written into it."""
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(MADE) as archive:
        archive.extractall(folder, filter="data")
    folder /= "run_0_1_0"
    for path in filter(is_text, folder.rglob("*")):
        if "PLACE" in (text := path.read_text(encoding="utf-8")):
            path.write_text(text.replace("PLACE", str(folder)), encoding="utf-8")
    return folder


@pytest.fixture
def place(unpacked, monkeypatch):
    """The folder the runs were made in; paths in their settings start here."""
    monkeypatch.chdir(unpacked)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return unpacked


@pytest.fixture
def interrupted(place):
    """The interrupted run as the kill left it, before and after a test."""
    kept = place / "kept"
    shutil.copytree(place / INTERRUPTED, kept)
    yield place / INTERRUPTED
    shutil.rmtree(place / INTERRUPTED)
    kept.rename(place / INTERRUPTED)


def mmcot(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def rank(job):
    """Run a job as its only rank, as ``srun`` starts it."""
    environment = {
        **os.environ,
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    result = subprocess.run(
        [sys.executable, "-m", "launcher.rank", str(job)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def losses(run):
    points = JournalReader(run / "logs" / "rationale-metrics.jsonl").read()
    return {point["step"]: point["metrics"]["loss"] for point in points if "loss" in point["metrics"]}


def notes(run):
    return [
        point["note"] for point in JournalReader(run / "logs" / "rationale-metrics.jsonl").read() if "note" in point
    ]


def assert_resumed_from_its_checkpoint(run, place):
    """It ends where the finished run of the same settings ended, by the last hundred steps alone."""
    assert any("step-000700 was written by an earlier version" in note for note in notes(run))
    points = [
        point for point in JournalReader(run / "logs" / "rationale-metrics.jsonl").read() if "loss" in point["metrics"]
    ]
    assert [point["step"] for point in points[-6:]] == [700, 720, 740, 760, 780, 800]
    expected = losses(place / FINISHED)
    # Another processor rounds otherwise, and a training amplifies it: 4% after a hundred steps were seen.
    assert {step: loss for step, loss in losses(run).items() if step > 700} == {
        step: pytest.approx(expected[step], rel=1e-3 if step == 720 else 0.1) for step in range(720, 801, 20)
    }


@pytest.fixture(scope="module")
def questions(unpacked):
    """The test questions as rows of an own data set, in the order of the old predictions; pictures by their paths."""
    (source,) = unpacked.glob("data/mini_sqa-source-*")
    pictures = source.relative_to(unpacked) / "images" / "test"
    problems, rows = read_json(source / "problems.json"), []
    for line in lines_of(unpacked / FINISHED / "predictions" / "test.jsonl"):
        problem = problems[line["qid"]]
        row = {
            "qid": line["qid"],
            "question": problem["question"],
            "choices": problem["choices"],
            "context": problem["hint"],
        }
        picture = {"image": str(pictures / line["qid"] / problem["image"])} if problem["image"] else {}
        rows.append(row | picture)
    return rows


def assert_as_before(answers, unpacked):
    before = lines_of(unpacked / FINISHED / "predictions" / "test.jsonl")
    assert [{name: answer[name] for name in before[0]} for answer in answers] == before


def test_status_prints_the_steps_of_a_finished_run(place):
    lines = mmcot("status", FINISHED).splitlines()
    assert [line.split()[:2] for line in lines[:5]] == [
        [step, "done"] for step in ("data", "train-rationale", "rationales", "train-answer", "evaluate")
    ]


def test_status_says_where_an_interrupted_run_stands(place):
    output = mmcot("status", INTERRUPTED)
    assert (
        "step 700 of 800" in output
        and "last checkpoint step-000700" in output
        and "resumes at 'train-rationale'" in output
    )


def test_report_writes_a_page_of_a_finished_run(place, tmp_path):
    mmcot("report", FINISHED, "--out", tmp_path / "page.html", "--looking", 1)
    page, scores = (tmp_path / "page.html").read_text(encoding="utf-8"), read_json(place / FINISHED / "scores.json")
    assert f'"AVG":{scores["accuracy"]["AVG"]}' in page


def test_predict_answers_as_the_earlier_version_did(place, questions, tmp_path):
    (place / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions), encoding="utf-8")
    mmcot("predict", "--model", FINISHED, "--input", "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert_as_before(lines_of(tmp_path / "out.jsonl"), place)


def test_a_registered_model_answers_as_the_earlier_version_did(place, questions):
    import mlflow

    assert_as_before(mlflow.pyfunc.load_model(str(place / "registered" / "model")).predict(questions), place)


def test_a_finished_run_run_again_has_nothing_to_do(place):
    assert "there is nothing to do" in mmcot("run", "--config", f"{FINISHED}/run.yaml")


def test_the_settings_of_a_run_are_read_as_they_were_meant(place):
    settings = load_settings(config=place / FINISHED / "run.yaml")
    quiz = settings.data.mini_sqa
    assert (quiz.shuffle_choices, quiz.extra_choices, settings.data.permute_choices, settings.cluster.use_gpu) == (
        False,
        0,
        False,
        False,
    )
    assert (settings.model.shape.distance_bias, settings.model.shape.near_bias, settings.rationale.gate_start) == (
        1.0,
        0.0,
        None,
    )


def test_a_preset_that_has_changed_is_met_with_the_command_that_goes_on(place):
    result = CliRunner().invoke(
        app,
        [
            "run",
            "--preset",
            "demo",
            "--config",
            "quiz.yaml",
            "--set",
            "data.shards_dir=data/quiz",
            "--set",
            f"run.dir={FINISHED}",
        ],
    )
    assert result.exit_code == 1 and f"--config {FINISHED}/run.yaml --set run.dir={FINISHED}" in result.output


@pytest.mark.processes
def test_a_job_for_torchrun_goes_on_from_its_checkpoint_to_its_end(interrupted, place):
    commit_json(
        interrupted / "lock.json", read_json(interrupted / "lock.json") | {"attempt": 2}
    )  # as writing the job left it
    rank(place / "runs" / "job.json")
    assert_resumed_from_its_checkpoint(interrupted, place)


def test_sync_sends_all_values_of_a_finished_run_to_a_fresh_mlflow(place, tmp_path):
    from mlflow import MlflowClient

    shutil.copytree(place / FINISHED, tmp_path / "runs" / "finished")
    uri = f"sqlite:///{tmp_path}/fresh.db"
    mmcot("sync", tmp_path / "runs" / "finished", "--uri", uri)
    state = read_json(tmp_path / "runs" / "finished" / "mlflow.json")
    client = MlflowClient(uri)
    assert state["refused"] == []
    sent = {point.step: point.value for point in client.get_metric_history(state["runs"]["train-rationale"], "loss")}
    assert sent == losses(place / FINISHED)
    assert (
        client.get_run(state["runs"]["pipeline"]).data.metrics["test_accuracy_AVG"]
        == read_json(place / FINISHED / "scores.json")["accuracy"]["AVG"]
    )
    assert client.get_model_version_by_alias("answer", "champion").run_id == state["runs"]["pipeline"]


@pytest.mark.long
@pytest.mark.ray
def test_an_interrupted_training_run_again_resumes_from_its_checkpoint(interrupted, place):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launcher", "train", "rationale", "--config", f"{INTERRUPTED}/run.yaml"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr
    assert_resumed_from_its_checkpoint(interrupted, place)
    assert {path.stem: read_json(path)["attempt"] for path in (interrupted / "steps").glob("*.json")} == {
        "data": 1,
        "train-rationale": 2,
    }


def test_a_tuning_and_its_new_trials_read_the_data_of_its_earlier_trials(tmp_path):
    (tmp_path / "tune").mkdir()
    RunDir(tmp_path / "trials" / "a").mark_done("data", marker := {"outputs": {"shards_dir": "data/quiz"}})
    assert RunDir(tmp_path).data_marker() == RunDir(tmp_path / "trials" / "b").data_marker() == marker
    assert RunDir(tmp_path / "runs" / "b").data_marker() is None


def test_the_saved_state_of_a_tuning_finds_the_names_it_imports():
    import launcher.run_dir
    import launcher.training.launch
    import launcher.worker

    assert (launcher.run_dir.RunDir, launcher.worker.free_workers) == (RunDir, launcher.training.launch.release_workers)


def test_the_model_class_has_its_old_name():
    import mmcot.model
    import mmcot.models.t5

    assert mmcot.model.T5ForMultimodalGeneration is mmcot.models.t5.T5ForMultimodalGeneration


def test_the_quiz_has_its_old_names():
    import data_shards.mini_sqa
    from data_shards.mini_sqa import generate

    assert (data_shards.mini_sqa.write_mini_sqa, data_shards.mini_sqa.content_sha256) == (
        generate.write_mini_sqa,
        generate.content_sha256,
    )


def test_the_script_of_an_older_installation_finds_the_command():
    import launcher.cli

    assert launcher.cli.app is app
