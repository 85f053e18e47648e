"""The presets of other systems through whole small runs: real Ray, training, evaluation, predict and report."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mlflow
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data_shards.atomic_files import read_json

pytestmark = [pytest.mark.ray, pytest.mark.processes, pytest.mark.long]

SIZES = ["answer.num_steps=4", "data.mini_sqa.num_train=48", "data.mini_sqa.num_val=8", "data.mini_sqa.num_test=8"]
SIZES += ["training.checkpoint_every=2", "training.validate_every=2", "training.log_every=2"]
CHOICES = ["--choice", "yes", "--choice", "no"]
STAGES = {"llava": ["stages.align.num_steps=4"], "blip2": ["stages.match.num_steps=4"]}


@pytest.fixture(scope="module")
def mmcot(tmp_path_factory):
    """Runs the command in a folder that holds the language model; returns its output."""
    folder, ray_folder = tmp_path_factory.mktemp("systems"), tempfile.mkdtemp(prefix="ray-")

    def run(*arguments):
        environment = {**os.environ, "MLFLOW_TRACKING_URI": "", "RAY_TMPDIR": ray_folder}
        command = [sys.executable, "-m", "launcher", *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run.folder = folder
    run("run", "--preset", "language", *[part for size in SIZES for part in ("--set", size)])
    yield run
    shutil.rmtree(ray_folder, ignore_errors=True)


def metrics_of(folder: Path) -> set[str]:
    store = mlflow.MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    runs = store.search_runs([experiment.experiment_id for experiment in store.search_experiments()])
    return {name for run in runs for name in run.data.metrics}


@pytest.mark.parametrize("preset", ["frozen", "llava", "flamingo", "blip2"])
def test_a_system_trains_around_the_language_model_answers_and_is_asked(mmcot, preset):
    folder = mmcot.folder
    sizes = [*SIZES, *STAGES.get(preset, [])]
    said = mmcot("run", "--preset", preset, *[part for size in sizes for part in ("--set", size)])
    run = folder / "runs" / preset
    assert "with the pictures of other questions: AVG" in said
    assert read_json(run / "scores.json")["num_questions"] == 8
    assert read_json(run / "predictions" / "scores.test-other-pictures.json")["num_questions"] == 8
    language, trained = (
        load_file(folder / "runs" / name / "answer" / "model" / "model.safetensors") for name in ("language", preset)
    )
    common = [name for name in trained if name in language]
    is_frozen = all(torch.equal(trained[name], language[name]) for name in common)
    assert len(common) > 40 and is_frozen == (preset != "llava")
    Image.new("RGB", (40, 40), "red").save(folder / "a.png")
    answer = mmcot("predict", "--model", f"runs/{preset}", "--image", "a.png", "--question", "Hot?", *CHOICES)
    assert answer.strip()
    assert (run / "report.html").stat().st_size > 100_000
    metrics = metrics_of(folder)
    assert "test_other_pictures_accuracy_AVG" in metrics
    expected = {"flamingo": {"attention_gate_0", "feed_forward_gate_1"}, "blip2": {"temperature", "retrieval_at_1"}}
    assert expected.get(preset, set()) <= metrics
