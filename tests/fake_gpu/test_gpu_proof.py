"""Parts of the proof where values mean nothing: waits, kernels of attention and memory are judged all the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_gpu import run_file_on_fake_gpu

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_proof.py"

PARTS = ["attention", "decoding", "training", "memory"]

pytestmark = pytest.mark.fake_gpu


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    out = tmp_path_factory.mktemp("proof")
    options = ["--out", str(out), "--size", "tiny", "--not-judged", "--time-factor", "5", "--parts", *PARTS]
    result = run_file_on_fake_gpu(SCRIPT, *options, timeout_s=1200)
    found = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    errors = {name: part["error"] for name, part in found.items() if "error" in part}
    assert result.returncode == 0 and not errors, f"{errors}\n{result.stdout[-2000:]}{result.stderr[-2000:]}"
    return found


def test_every_part_runs_to_its_end(parts):
    assert sorted(parts) == sorted(PARTS) and all(part["machine"]["device"] for part in parts.values())


def test_the_waits_of_a_step_and_of_decoding_are_the_intended_ones(parts):
    assert parts["training"]["checks"]["a step waits nowhere but where it must"]
    assert parts["training"]["steps"][0]["waits"], "no wait was found at all"
    assert parts["decoding"]["checks"]["the host waits nowhere but where it must"], parts["decoding"]["waits"]
    assert parts["decoding"]["waits"], "no wait was found at all"


def test_memory_is_counted_and_attention_is_not_cudnns(parts):
    assert all(peak > 0 for peak in parts["memory"]["peaks_gib"].values())
    assert parts["attention"]["checks"]["the product never takes cuDNN's attention"]
