"""Every commit point of jobs with every kind of fault: the job that runs again ends with the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HELPER = Path(__file__).parents[1] / "helpers" / "commit_points.py"
# A process is stopped between its last look at the lock and its rename, another one takes over and ends, the first one
# continues: its rename, or its line, comes last (docs/measurements.md, "Faults at every commit point").
KNOWN = {
    ("checkpoint", "SIGSTOP", "run/rationale/checkpoints/.tmp-LATEST"),
    ("checkpoint", "SIGSTOP", "run/rationale/checkpoints/LATEST"),
    ("checkpoint", "SIGSTOP", "store/bucket/demo-1-2/rationale/LATEST"),
    ("generation", "SIGSTOP", "run/rationales/.tmp-manifest.json"),
    ("generation", "SIGSTOP", "run/rationales/manifest.json"),
    ("tracking", "SIGSTOP", "run/logs/tracking.jsonl"),
    # An index that changes before its sha256 is taken: its tar is refused instead.
    ("data", "changed byte", "data/text/.tmp-val-000000.parquet"),
}


def trials(folder, *arguments):
    out = folder / "result.json"
    command = [sys.executable, str(HELPER), str(folder / "place"), "--out", str(out), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.exists(), result.stderr
    found = json.loads(out.read_text())
    unexpected = [each for each in found["wrong"] if (each["job"], each["fault"], each["point"][2]) not in KNOWN]
    assert unexpected == []
    return found


def num_trials(found):
    return {name: sum(map(sum, (kinds.values() for kinds in job["trials"].values()))) for name, job in found.items()}


@pytest.mark.processes
def test_a_small_set_of_faults_at_commit_points_of_every_job_but_data(tmp_path):
    jobs = ["texts", "folder", "generation", "journal", "checkpoint", "run folder", "tracking"]
    found = trials(tmp_path, "--share", "0.02", "--jobs", *jobs)["jobs"]
    assert list(found) == jobs and all(num_trials(found).values())
    assert {"fsync", "rename", "exchange", "upload", "send", "hand-out", "line"} == {
        kind for job in found.values() for kind in job["points"]
    }


@pytest.mark.slow
def test_every_fault_at_every_commit_point_of_every_job_but_data(tmp_path):
    jobs = ["texts", "folder", "generation", "journal", "checkpoint", "run folder", "tracking"]
    found = trials(tmp_path, "--jobs", *jobs)["jobs"]
    assert sum(num_trials(found).values()) >= 900


@pytest.mark.slow
def test_a_build_of_data_survives_faults_at_a_tenth_of_its_commit_points(tmp_path):
    found = trials(tmp_path, "--share", "0.1", "--jobs", "data")
    assert num_trials(found["jobs"])["data"] >= 12
