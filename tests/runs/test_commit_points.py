"""Every commit point of jobs with every kind of fault: the job that runs again ends with the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HELPER = Path(__file__).parents[1] / "helpers" / "commit_points.py"


def trials(folder, *arguments):
    command = [sys.executable, str(HELPER), str(folder), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.processes
def test_texts_and_replaced_folders_survive_every_fault_at_every_commit_point(tmp_path):
    found = trials(tmp_path, "0", "1.0", "texts", "folder")
    assert found["wrong"] == []
    assert found["points"]["texts"] >= 20 and len(found["tried"]) == 6
    assert set(found["tried"].values()) == {sum(found["points"].values())}


@pytest.mark.slow
def test_a_build_of_data_survives_faults_at_a_tenth_of_its_commit_points(tmp_path):
    found = trials(tmp_path, "0", "0.1", "data")
    assert found["wrong"] == [] and sum(found["tried"].values()) >= 12
