"""The proof for a GPU, known to run before one is there: every part at its tiny size, without Ray and MLflow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_proof.py"
PARTS = [
    "ceilings",
    "golden",
    "attention",
    "decoding",
    "zero",
    "training",
    "memory",
    "features",
    "loaders",
    "hang",
]
# As a module that Python imports at its start, so that processes of processes lack these packages too.
LACKS = """
import sys
from importlib.machinery import PathFinder

LACKS = ("ray", "mlflow", "typer", "evaluate", "webdataset", "rich", "datasets")

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in LACKS else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.fixture
def bare_environment(tmp_path):
    """An environment of processes that lack what a machine with torch, transformers and DeepSpeed may lack."""
    (tmp_path / "lacks").mkdir()
    (tmp_path / "lacks" / "sitecustomize.py").write_text(LACKS)
    path = os.pathsep.join([str(tmp_path / "lacks"), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def proof(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import gpu_proof

    return gpu_proof


@pytest.mark.long
def test_every_part_runs_on_the_cpu_without_ray_and_mlflow_and_writes_its_json(tmp_path, bare_environment):
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out"), "--cpu", "--time-factor", "6"]
    result = subprocess.run(command, capture_output=True, text=True, env=bare_environment)
    assert result.returncode == 0, result.stdout + result.stderr
    parts = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    assert set(parts) == set(PARTS)
    assert all("error" not in part for part in parts.values())
    assert sum(len(part["checks"]) for part in parts.values()) >= 40
    assert parts["training"]["steps"][0]["mfu"] > 0 and parts["decoding"]["speed"][0]["share_of_floor"] > 0
    assert "no check failed" in result.stdout


@pytest.mark.processes
def test_every_part_is_imported_without_ray_mlflow_typer_evaluate_and_webdataset(bare_environment):
    script = (
        "import importlib.util, sys\nfor name in sys.argv[1:]: importlib.import_module(f'benchmarks.gpu_parts.{name}')"
    )
    script += "\nassert importlib.util.find_spec('ray') is None"
    script += "\nimport launcher.training.loop, launcher.training.deepspeed_engine, benchmarks.gpu_parts.rank"
    result = subprocess.run(
        [sys.executable, "-c", script, *PARTS], capture_output=True, text=True, env=bare_environment, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_the_list_has_every_part_and_its_limit_and_they_take_nine_minutes_together(proof, capsys):
    assert proof.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == PARTS
    assert sum(int(line.split()[1]) for line in lines) == 540


def test_a_part_that_fails_leaves_what_it_has_found_and_its_traceback(tmp_path, monkeypatch, proof):
    from benchmarks.gpu_parts import ceilings

    def broken(run):
        run.keep({"launch_us": 3.0, "checks": {"a launch is fast": True}})
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(ceilings, "ceilings", broken)
    assert proof.main(["--out", str(tmp_path), "--here", "ceilings"]) == 1
    found = json.loads((tmp_path / "ceilings.json").read_text())
    assert found["launch_us"] == 3.0 and "no such kernel" in found["error"]
    assert found["checks"] == {"a launch is fast": True, proof.RUNS_TO_ITS_END: False}


@pytest.mark.processes
def test_a_part_that_exceeds_its_limit_is_ended_and_the_status_is_1(tmp_path, monkeypatch, proof, capsys):
    monkeypatch.setitem(proof.PARTS, "golden", proof.Part(1, "too slow"))
    assert proof.main(["--out", str(tmp_path), "--cpu", "--parts", "golden", "--time-factor", "0.2"]) == 1
    found = json.loads((tmp_path / "golden.json").read_text())
    assert found["error"].startswith("it was ended after its limit of 0.2 s") and found["seconds"] < 10
    assert "1 checks FAILED" in capsys.readouterr().out


def test_a_part_is_ended_with_processes_that_have_sessions_of_their_own(proof):
    script = "import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True); print(1, flush=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{script}; input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout and process.stdout.readline()
    family = psutil.Process(process.pid).children(recursive=True)
    proof.end_with_children(process)
    assert family and not psutil.wait_procs(family, timeout=5)[1]


@pytest.mark.parametrize(
    ("judged", "checks", "status"),
    [
        (True, {"ids are equal": True}, 0),
        (True, {"ids are equal": False}, 1),
        (False, {"ids are equal": False}, 0),
        (False, {"the part runs to its end": False}, 1),
    ],
)
def test_the_status_is_1_if_a_judged_check_failed_or_a_part_ended_early(proof, capsys, judged, checks, status):
    result = {"part": "decoding", "seconds": 2.0, "limit_s": 90.0, "checks": checks, "headline": "9 tokens/s"}
    assert proof.print_summary([result], judged=judged) == status
    assert "9 tokens/s" in capsys.readouterr().out


def test_peaks_are_compared_with_a_forecast_within_five_percent(tmp_path, proof):
    from benchmarks.gpu_parts.memory import BlockShape, Case, is_as_forecast, read_forecast

    shapes = [{"rows": 8, "source": 96, "target": 64, "peak_bytes": 5 * 2**30}]
    common = {"size": "base", "zero_stage": 1, "checkpointing": False, "offload": "none", "trains": "all"}
    combinations = [
        {**common, "gpus": 1, "shapes": shapes},
        {**common, "gpus": 8, "shapes": shapes},
        {**common, "gpus": 1, "offload": "cpu", "shapes": shapes},
        {**common, "gpus": 1, "trains": "lora", "shapes": shapes},
        {**common, "gpus": 1, "error": "out of memory"},
    ]
    (path := tmp_path / "memory.json").write_text(json.dumps({"combinations": combinations}))
    assert read_forecast(path) == {Case("base", 1, BlockShape(8, 96, 64)): 5.0}
    assert [is_as_forecast(found, 5.0) for found in (4.7, 4.8, 5.2, 5.3)] == [False, True, True, False]


def test_a_wait_at_a_line_that_is_not_intended_is_named(proof):
    from benchmarks.gpu_parts.decoding import INTENDED_WAITS
    from benchmarks.gpu_parts.machine import unexpected

    waits = {INTENDED_WAITS[0]: 32, "mmcot/models/t5.py: if mask.all():": 1}
    assert unexpected(waits, INTENDED_WAITS) == ["mmcot/models/t5.py: if mask.all():"]
