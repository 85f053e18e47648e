"""The module of docs/extending.md (a chain, a bridge, a metric, a form) through real Ray and DeepSpeed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from extending_page import BLOCKS, COMMAND, EXTENSION
from extending_page import SETTINGS as OF_PAGE

from data_shards.atomic_files import read_json

pytestmark = [pytest.mark.ray, pytest.mark.processes]

SETTINGS = (
    OF_PAGE
    + """
data: {mini_sqa: {num_train: 64, num_val: 8, num_test: 8}, samples_per_shard: 24}
training: {checkpoint_every: 2, validate_every: 2, log_every: 1}
cluster: {num_workers: 1}
"""
)


def mmcot(folder, *arguments, path=True):
    environment = {**os.environ, "MLFLOW_TRACKING_URI": "", "RAY_TMPDIR": str(folder.parent / "r")}
    roots = [os.environ.get("PYTHONPATH", "")] + ([str(folder / "parts")] if path else [])
    environment["PYTHONPATH"] = os.pathsep.join(part for part in roots if part)
    return subprocess.Popen(
        [sys.executable, "-m", "launcher", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def output_of(process, *, status=0):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    (folder / "parts").mkdir()
    (folder / "parts" / "my_parts.py").write_text(EXTENSION, encoding="utf-8")
    (folder / "settings.yaml").write_text(SETTINGS, encoding="utf-8")
    run = ["run", "--preset", "demo", "--config", "settings.yaml"]
    for step in ("drafts", "rationales"):  # killed as soon as a step has begun, and continued
        process = mmcot(folder, *run)
        begun = folder / "runs" / "three" / step
        deadline = time.time() + 240
        while not begun.exists():
            assert process.poll() is None and time.time() < deadline, process.stdout.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    output_of(mmcot(folder, *run))
    return folder


@pytest.fixture(scope="module")
def run_dir(folder):
    return folder / "runs" / "three"


def test_its_steps_follow_from_the_chain_and_each_is_done(run_dir):
    names = ["data", "train-draft", "drafts", "train-rationale", "rationales", "train-answer", "evaluate"]
    markers = {path.stem: read_json(path) for path in (run_dir / "steps").iterdir()}
    assert sorted(markers) == sorted(names)
    steps = markers["train-rationale"]["inputs"]
    assert steps["starts_from"] == "draft"
    assert steps["starts_from_sha256"] == markers["train-draft"]["outputs"]["draft_model"]


def test_a_prediction_has_the_texts_of_every_stage(folder, run_dir):
    line = json.loads((run_dir / "predictions" / "test.jsonl").read_text().split("\n")[0])
    assert set(line) == {"qid", "rationale", "answer_text", "prediction", "texts"} and set(line["texts"]) == {"drafts"}
    (folder / "ask.jsonl").write_text('{"qid": "a", "question": "Hot?", "choices": ["yes", "no"]}\n')
    asked = ["predict", "--model", "runs/three", "--input", "ask.jsonl", "--allow-extensions"]
    answer = json.loads(output_of(mmcot(folder, *asked)).strip().split("\n")[-1])
    assert set(answer["texts"]) == {"drafts"} and "rationale" in answer


def test_the_bridge_of_the_page_is_trained_and_the_report_says_that_it_has_no_maps(run_dir):
    from safetensors import safe_open

    with safe_open(run_dir / "answer" / "model" / "model.safetensors", "pt") as weights:
        assert [name for name in weights.keys() if "bridge" in name] == [  # noqa: SIM118 (no dict)
            "encoder.bridge.project.bias",
            "encoder.bridge.project.weight",
        ]
    assert "The fusion 'mean_patch' has no attention maps" in (run_dir / "report.html").read_text(encoding="utf-8")


def test_a_metric_and_a_form_of_the_page_are_used(folder, run_dir):
    scores = read_json(run_dir / "scores.json")
    assert 0 <= scores["rationale"]["length_ratio"] <= 100
    (folder / "sums.pairs").write_text("\n".join(f"{n} plus one? = {n + 1}" for n in range(20)))
    sets = ["data.path=sums.pairs", "data.features=null", "data.shards_dir=sums"]
    arguments = ["--preset", "demo", "--config", "settings.yaml", *(part for each in sets for part in ("--set", each))]
    output_of(mmcot(folder, "data", "shard", *arguments))
    assert read_json(folder / "sums" / "text" / "manifest.json")["num_samples"] == {"train": 16, "val": 2, "test": 2}


def test_status_evaluate_and_report_know_all_stages(folder, run_dir):
    lines = output_of(mmcot(folder, "status", "runs/three", "--allow-extensions"))
    assert all(name in lines for name in ("train-draft", "drafts", "train-rationale", "train-answer"))
    output_of(mmcot(folder, "evaluate", "runs/three", "--allow-extensions", "--split", "val"))
    evaluation = run_dir / "evaluations" / "val"
    assert read_json(evaluation / "scores.json") == read_json(run_dir / "scores.val.json")
    assert (evaluation / "predictions.jsonl").read_bytes() == (run_dir / "predictions" / "val.jsonl").read_bytes()
    output_of(mmcot(folder, "report", "runs/three", "--allow-extensions", "--looking", "1"))
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert '"train-draft"' in page and '"stages":["draft","rationale","answer"]' in page


def test_the_command_of_the_page_shows_the_seconds_of_every_step(folder):
    (folder / "with_command.py").write_text(f"{COMMAND}\nfrom launcher.cli.main import app\napp()\n", encoding="utf-8")
    plain = folder / "runs" / "plain"
    (plain / "steps").mkdir(parents=True)
    (plain / "run.yaml").write_text("rationale: {num_steps: 1}\nanswer: {num_steps: 1}\n", encoding="utf-8")
    (plain / "steps" / "data.json").write_text('{"seconds": 7.2}', encoding="utf-8")
    command = [sys.executable, "with_command.py", "seconds", "runs/plain"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["data", "7", "s"], done.stderr


def test_every_recipe_is_one_addition_of_at_most_60_lines():
    assert len(BLOCKS) == 6 and all(len(block.splitlines()) <= 60 for block in BLOCKS)


def test_an_extension_is_imported_only_where_it_is_allowed_and_the_same(folder, run_dir):
    refused = output_of(mmcot(folder, "status", "runs/three"), status=1)
    assert "my_parts" in refused and "--allow-extensions" in refused
    missing = output_of(mmcot(folder, "status", "runs/three", "--allow-extensions", path=False), status=1)
    assert "my_parts" in missing and "Python path" in missing
    module = folder / "parts" / "my_parts.py"
    module.write_text(EXTENSION + "\nprint('IMPORTED')\n", encoding="utf-8")
    changed = output_of(mmcot(folder, "status", "runs/three", "--allow-extensions"), status=1)
    assert "another extension" in changed and "IMPORTED" not in changed
