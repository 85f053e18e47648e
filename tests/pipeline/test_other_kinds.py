"""Pairs and documents through a whole run: real Ray, training, evaluation, predict, report, and a later evaluation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile

import pytest
from PIL import Image

from data_shards.atomic_files import read_json

pytestmark = [pytest.mark.ray, pytest.mark.processes, pytest.mark.long]

SIZES = [
    "run.chain=answer",
    "answer.format=P-T",
    "answer.num_steps=4",
    "answer.max_target_tokens=16",
    "data.max_pictures=9",
    "data.mini_sqa.num_train=48",
    "data.mini_sqa.num_val=8",
    "data.mini_sqa.num_test=8",
    "training.checkpoint_every=2",
    "training.validate_every=2",
    "cluster.num_workers=1",
]


@pytest.fixture
def mmcot(tmp_path):
    ray_folder = tempfile.mkdtemp(prefix="ray-")  # short, for its sockets' sake

    def run(*arguments):
        environment = {**os.environ, "MLFLOW_TRACKING_URI": "", "RAY_TMPDIR": ray_folder}
        done = subprocess.run(
            [sys.executable, "-m", "launcher", *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    yield run
    shutil.rmtree(ray_folder, ignore_errors=True)


@pytest.mark.parametrize(
    ("form", "rows"),
    [
        ("captions", [{"qid": "a", "image": "a.png"}]),
        ("episodes", [{"qid": "a", "document": [{"image": "a.png"}, {"text": "is"}, {"image": "a.png"}]}]),
    ],
)
def test_a_run_on_texts_about_pictures_is_scored_shown_and_asked(mmcot, tmp_path, form, rows):
    sets = [part for size in [*SIZES, f"data.mini_sqa.form={form}"] for part in ("--set", size)]
    assert "ROUGE-L" in mmcot("run", "--preset", "demo", *sets)
    run = tmp_path / "runs" / "demo"
    scores = read_json(run / "scores.json")
    assert set(scores["answers"]) == {"exact_match", "vqa_accuracy", "anls", "answer_rougeL"}
    mmcot("evaluate", "runs/demo", "--split", "test")
    assert read_json(run / "evaluations" / "test" / "scores.json") == scores
    lines = (run / "predictions" / "test.jsonl").read_text(encoding="utf-8")
    assert (run / "evaluations" / "test" / "predictions.jsonl").read_text(encoding="utf-8") == lines
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    (tmp_path / "ask.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = json.loads(mmcot("predict", "--model", "runs/demo", "--input", "ask.jsonl").strip().splitlines()[-1])
    assert answer["qid"] == "a" and answer["choice"] is None
    assert (run / "report.html").stat().st_size > 10_000
