"""A chain of three stages, defined by an extension, through real Ray and DeepSpeed, with kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from data_shards.atomic_files import read_json

pytestmark = [pytest.mark.ray, pytest.mark.processes]

EXTENSION = """
from launcher.config.chains import ANSWERS, Chain, Stage

CHAINS = {
    "draft-first": Chain(
        "draft-first",
        "QCM→D, QCMD→R, QCMDR→A",
        (
            Stage("draft", "QCM-E", writes="drafts"),
            Stage("rationale", "QCMG-E", reads=("drafts",), starts_from="draft", writes="rationales"),
            Stage("answer", "QCMG-A", reads=("drafts", "rationales"), writes=ANSWERS),
        ),
    )
}
"""
SETTINGS = """
extensions: [draft_chain]
run: {name: three, chain: draft-first}
data: {mini_sqa: {num_train: 64, num_val: 8, num_test: 8}, samples_per_shard: 24}
stages:
  draft: {num_steps: 4, max_target_tokens: 16}
  rationale: {num_steps: 3, max_target_tokens: 16, learning_rate: 1.0e-4, global_batch_size: 4, micro_batch_size: 4}
  answer: {num_steps: 3, max_target_tokens: 16}
training: {checkpoint_every: 2, validate_every: 2, log_every: 1}
cluster: {num_workers: 1}
"""


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
    (folder / "parts" / "draft_chain.py").write_text(EXTENSION, encoding="utf-8")
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


def test_status_and_report_show_all_stages(folder, run_dir):
    lines = output_of(mmcot(folder, "status", "runs/three", "--allow-extensions"))
    assert all(name in lines for name in ("train-draft", "drafts", "train-rationale", "train-answer"))
    output_of(mmcot(folder, "report", "runs/three", "--allow-extensions", "--looking", "1"))
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert '"train-draft"' in page and '"stages":["draft","rationale","answer"]' in page


def test_an_extension_is_imported_only_where_it_is_allowed_and_the_same(folder, run_dir):
    refused = output_of(mmcot(folder, "status", "runs/three"), status=1)
    assert "draft_chain" in refused and "--allow-extensions" in refused
    missing = output_of(mmcot(folder, "status", "runs/three", "--allow-extensions", path=False), status=1)
    assert "draft_chain" in missing and "Python path" in missing
    module = folder / "parts" / "draft_chain.py"
    module.write_text(EXTENSION + "\nprint('IMPORTED')\n", encoding="utf-8")
    changed = output_of(mmcot(folder, "status", "runs/three", "--allow-extensions"), status=1)
    assert "another extension" in changed and "IMPORTED" not in changed
