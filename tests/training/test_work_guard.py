"""A start or an export in which no rank works any more ends by itself; one that waits for another does not."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.processes
CODE = """
import sys, time
from pathlib import Path
from launcher.training.work_guard import ended_without_work
with ended_without_work(Path(sys.argv[1]), "rationale", int(sys.argv[2]), timeout_s=1.5, phase="the start"):
    until = time.monotonic() + float(sys.argv[3])
    while time.monotonic() < until:
        pass
    print("worked", flush=True)
    time.sleep(float(sys.argv[4]))
"""


def rank(folder, number, *, works, waits):
    command = [sys.executable, "-c", CODE, str(folder), str(number), str(works), str(waits)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ranks_that_all_do_nothing_end_with_their_stacks(tmp_path):
    ranks = [rank(tmp_path, number, works=0.5, waits=60) for number in range(2)]
    started = time.monotonic()
    for process in ranks:
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 1, errors
        assert "the start: no rank has read, written or computed for 2 s; ended" in errors and "line" in errors
    assert time.monotonic() - started < 20


def test_a_rank_that_waits_for_one_that_works_goes_on(tmp_path):
    waiting, working = rank(tmp_path, 0, works=0, waits=4), rank(tmp_path, 1, works=4, waits=0)
    assert waiting.wait(30) == 0 and working.wait(30) == 0
