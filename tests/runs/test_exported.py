"""A model of a run is opened only if it is the one that the run exported."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_shards.atomic_files import commit_bytes, commit_json, sha256_of_file
from launcher.cli.main import app
from launcher.config.loading import dump_settings, tracking_uri
from launcher.pipeline.attempt import Attempt
from launcher.runs import checked_files
from launcher.runs.exported import describe_export, sha256_of_weights, verify_model
from launcher.runs.run_dir import RunDir, RunError
from launcher.stages.jobs import GenerationJob
from launcher.tracking.run_log import open_tracker

FILES = ("model.safetensors", "config.json", "tokenizer.json")


@pytest.fixture
def run_dir(tmp_path, model_dir, tiny_settings):
    """A run's folder with two exported models and the markers of their trainings."""
    run_dir = RunDir(tmp_path / "runs" / "demo")
    settings = tiny_settings.model_copy(update={"run": tiny_settings.run.model_copy(update={"dir": str(run_dir.path)})})
    commit_bytes(run_dir.path / "run.yaml", dump_settings(settings).encode())
    for stage in ("rationale", "answer"):
        shutil.copytree(model_dir, run_dir.model(stage))
        run_dir.mark_done(
            f"train-{stage}",
            {
                "step": f"train-{stage}",
                "inputs": {},
                "outputs": describe_export(stage, run_dir.model(stage)),
                "attempt": 1,
                "seconds": 1.0,
            },
        )
    return run_dir


def exchange(path):
    """Change one byte and keep the size."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def mmcot(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.mark.parametrize("name", FILES)
def test_an_exchanged_file_is_refused_by_name_with_both_sha256_and_what_to_delete(run_dir, name):
    folder = run_dir.model("rationale")
    expected = sha256_of_file(folder / name)
    verify_model(folder)
    exchange(folder / name)
    with pytest.raises(RunError) as caught:
        verify_model(folder)
    message = str(caught.value)
    assert str(folder / name) in message and expected[:12] in message and sha256_of_file(folder / name)[:12] in message
    assert f"delete {run_dir.marker_path('train-rationale')} and {folder}, and run again" in message


def test_a_missing_file_and_an_added_one_are_refused_by_name(run_dir):
    folder = run_dir.model("answer")
    commit_json(folder / "adapter_config.json", {})
    with pytest.raises(RunError, match=r"adapter_config.json was added"):
        verify_model(folder)
    (folder / "adapter_config.json").unlink()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(RunError, match=r"tokenizer.json is missing"):
        verify_model(folder)


def test_a_marker_of_an_earlier_version_vouches_for_the_weights_alone(run_dir):
    folder = run_dir.model("rationale")
    run_dir.mark_done("train-rationale", {"outputs": {"rationale_model": sha256_of_file(folder / "model.safetensors")}})
    exchange(folder / "config.json")
    verify_model(folder)
    exchange(folder / "model.safetensors")
    with pytest.raises(RunError, match=r"model.safetensors is not the file that was exported"):
        verify_model(folder)


@pytest.mark.parametrize("is_earlier", [False, True])
def test_a_model_is_found_to_be_a_runs_through_a_link_and_a_relative_path(run_dir, monkeypatch, is_earlier):
    if is_earlier:
        run_dir.mark_done(
            "train-rationale",
            {"outputs": {"rationale_model": sha256_of_file(run_dir.model("rationale") / "model.safetensors")}},
        )
    exchange(run_dir.model("rationale") / "model.safetensors")
    (run_dir.path.parent / "link").symlink_to(run_dir.model("rationale"))
    monkeypatch.chdir(run_dir.model("answer"))
    for path in (run_dir.path.parent / "link", "../../rationale/model"):
        with pytest.raises(RunError, match="is not the file that was exported"):
            verify_model(path)


def test_a_model_without_a_marker_is_opened_as_it_is(run_dir, tmp_path):
    shutil.copytree(run_dir.model("rationale"), tmp_path / "elsewhere")
    exchange(tmp_path / "elsewhere" / "model.safetensors")
    verify_model(tmp_path / "elsewhere")
    run_dir.marker_path("train-answer").unlink()
    exchange(run_dir.model("answer") / "model.safetensors")
    verify_model(run_dir.model("answer"))


def test_a_process_reads_each_file_once_until_it_is_exchanged(run_dir, monkeypatch):
    folder, read = run_dir.model("rationale"), []
    monkeypatch.setattr(
        checked_files, "sha256_of_file", lambda path: (read.append(Path(path).name), sha256_of_file(path))[1]
    )
    for _ in range(3):
        verify_model(folder)
    assert sorted(read) == sorted(set(read))
    read.clear()
    times = os.stat(folder / "config.json")
    other = (folder / "config.json").read_bytes().replace(b"1", b"2", 1)
    commit_bytes(folder / "config.json", other)  # another inode
    os.utime(folder / "config.json", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(RunError, match="config.json is not the file"):
        verify_model(folder)
    assert read == ["config.json"]


# Who opens one


def test_predict_refuses_it(run_dir):
    exchange(run_dir.model("answer") / "model.safetensors")
    status, output = mmcot("predict", "--model", run_dir.path, "--question", "Which?", "--choice", "a", "--choice", "b")
    assert (
        status == 1
        and re.search(r"answer/model/model.safetensors is not the file that was exported", output)
        and "Traceback" not in output
    )


def test_report_refuses_it(run_dir, tmp_path):
    exchange(run_dir.model("answer") / "config.json")
    status, output = mmcot("report", run_dir.path, "--out", tmp_path / "report.html")
    assert (
        status == 1
        and "answer/model/config.json is not the file that was exported" in output
        and not (tmp_path / "report.html").exists()
    )


def test_rationales_refuse_a_model_of_a_run(run_dir, tiny_data, tmp_path):
    exchange(run_dir.model("rationale") / "tokenizer.json")
    status, output = mmcot(
        "rationales",
        "--model",
        run_dir.model("rationale"),
        "--shards",
        tiny_data.path,
        "--split",
        "val",
        "--out",
        tmp_path / "out",
        "--set",
        "rationale.format=QCM-E",
    )
    assert status == 1 and "rationale/model/tokenizer.json is not the file that was exported" in output
    assert not (tmp_path / "out").exists()  # its manifest would name a model that wrote nothing


def test_a_generation_refuses_it_before_ray_is_started_and_in_every_worker(run_dir, tiny_settings, tiny_data, tmp_path):
    from launcher.generation.text_tasks import GenerationWorker, write_split_texts

    exchange(run_dir.model("rationale") / "model.safetensors")
    job = GenerationJob(
        stage="rationale",
        settings=tiny_settings,
        model_dir=str(run_dir.model("rationale")),
        shards_dir=str(tiny_data.path),
        output_dir=str(tmp_path / "out"),
    )
    with pytest.raises(RunError, match="is not the file that was exported"):
        write_split_texts(job, ["val"], {}, open_ray=lambda: pytest.fail("Ray was started"))
    with pytest.raises(RunError, match="is not the file that was exported"):
        GenerationWorker(job)


def test_a_training_that_starts_from_a_runs_model_refuses_it(run_dir, tiny_settings, tiny_data):
    from launcher.stages.build_model import build_model
    from launcher.stages.samples import load_tokenizer, open_stage

    settings = tiny_settings.model_copy(
        update={"model": tiny_settings.model.model_copy(update={"pretrained": str(run_dir.model("rationale"))})}
    )
    samples = open_stage(
        settings,
        "rationale",
        "train",
        shards_dir=tiny_data.path,
        tokenizer=load_tokenizer(settings, tiny_data.path),
    )
    build_model(settings, samples)
    exchange(run_dir.model("rationale") / "model.safetensors")
    with pytest.raises(RunError, match="is not the file that was exported"):
        build_model(settings, samples)


@pytest.mark.parametrize("step", ["rationales", "train-answer", "evaluate"])
def test_every_later_step_of_the_pipeline_refuses_it(run_dir, tiny_settings, step):
    exchange(run_dir.model("rationale") / "model.safetensors")
    run_dir.marker_path(step).unlink(missing_ok=True)
    attempt = Attempt(tiny_settings, run_dir, 1, lambda line: None, contextlib.ExitStack())
    with pytest.raises(RunError, match="rationale/model/model.safetensors is not the file that was exported"):
        attempt.run_step(step, {}, lambda child: pytest.fail("the step ran"))


def test_a_bundle_for_mlflow_is_made_of_the_exported_models_and_holds_what_verifies_it(run_dir, tiny_settings):
    import mlflow
    from mlflow import MlflowClient

    settings = tiny_settings.model_copy(update={"run": tiny_settings.run.model_copy(update={"dir": str(run_dir.path)})})
    outputs = {stage: run_dir.marker(f"train-{stage}")["outputs"] for stage in ("rationale", "answer")}
    with open_tracker(settings, run_dir) as tracker, tracker.step("train-rationale") as child:
        run_dir.marker_path("train-rationale").unlink()  # it is marked as done only after this
        child.log_model(
            name="rationale",
            stages=["rationale"],
            alias="candidate",
            accuracy=None,
            data="d",
            tags={},
            exports={"rationale": outputs["rationale"]},
        )
        exchange(run_dir.model("answer") / "model.safetensors")
        tracker.parent.log_model(
            name="answer",
            stages=["rationale", "answer"],
            alias="champion",
            accuracy=1.0,
            data="d",
            tags={},
            exports=outputs,
        )
    client = MlflowClient(tracking_uri(settings))
    assert client.search_model_versions("name = 'answer'") == []
    refused = json.loads(run_dir.mlflow_state.read_text())["refused"]
    assert (
        len(refused) == 1 and "answer/model/model.safetensors is not the file that was exported" in refused[0]["error"]
    )
    mlflow.set_tracking_uri(client.tracking_uri)
    try:
        source = client.get_model_version_by_alias("rationale", "candidate").source
        bundle = Path(mlflow.artifacts.download_artifacts(source, dst_path=str(run_dir.path.parent / "bundle")))
        mlflow.pyfunc.load_model(str(bundle))
        exchange(next(bundle.rglob("model.safetensors")))
        with pytest.raises(RunError, match="rationale/model/model.safetensors is not the file that was exported"):
            mlflow.pyfunc.load_model(str(bundle))
    finally:
        mlflow.set_tracking_uri(None)


def test_the_sha256_of_weights_is_that_of_one_file_or_of_all_files_in_the_order_of_their_names(tmp_path):
    with pytest.raises(RunError, match="has no .safetensors"):
        sha256_of_weights(tmp_path)
    (tmp_path / "model-2.safetensors").write_bytes(b"two")
    assert sha256_of_weights(tmp_path) == sha256_of_file(tmp_path / "model-2.safetensors")
    (tmp_path / "model-1.safetensors").write_bytes(b"one")
    both = "".join(hashlib.sha256(part).hexdigest() for part in (b"one", b"two"))
    assert sha256_of_weights(tmp_path) == hashlib.sha256(both.encode()).hexdigest()
