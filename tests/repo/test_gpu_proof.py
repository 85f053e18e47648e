"""The proof for a GPU, known to run before one is there: every part at its tiny size, without Ray and MLflow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_proof.py"
WITHOUT = (
    "import runpy, sys; sys.modules.update(ray=None, mlflow=None); sys.argv = sys.argv[1:]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)

pytestmark = pytest.mark.processes


def test_every_part_runs_on_the_cpu_without_ray_and_mlflow_and_writes_its_json(tmp_path):
    command = [sys.executable, "-c", WITHOUT, str(SCRIPT), "--out", str(tmp_path), "--size", "tiny"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    parts = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(parts) == {"ceilings", "golden", "attention", "training", "decoding"}
    assert all("error" not in part for part in parts.values())
    assert sum(len(part["checks"]) for part in parts.values()) >= 17
    assert parts["training"]["steps"][0]["mfu"] > 0 and parts["decoding"]["speed"][0]["share_of_floor"] > 0


def test_a_part_that_fails_leaves_its_traceback_and_the_next_one_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu_proof

    def broken(tiny):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu_proof, "PARTS", {"broken": broken, "ceilings": gpu_proof.ceilings})
    assert gpu_proof.main(["--out", str(tmp_path), "--size", "tiny"]) == 1
    assert "no such kernel" in json.loads((tmp_path / "broken.json").read_text())["error"]
    assert (tmp_path / "ceilings.json").exists()
