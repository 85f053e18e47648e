"""What a rank that hangs leaves behind: its stacks, and its last collectives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from launcher.training.flight_recorder import choose_place, folder_of, how_to_read, written_since

HANGS = """
import sys, time
from launcher.runs.hang_guard import HangGuard

def before_end():
    {call}

def where_it_hangs():
    {hang}

guard = HangGuard(0.6, before_end=before_end)
guard.progress()
where_it_hangs()
"""
SLEEP = "time.sleep(60)"


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)


def test_a_rank_without_progress_calls_the_dump_once_and_then_writes_its_stacks_and_ends():
    result = run(HANGS.format(call="return 'see the folder'", hang=SLEEP))
    assert result.returncode == 1
    assert result.stderr.count("see the folder") == 1
    assert result.stderr.index("see the folder") < result.stderr.index("Timeout (0:00:00.600000)!")
    assert "where_it_hangs" in result.stderr


@pytest.mark.parametrize("call", ["raise OSError('disk full')", "time.sleep(60)", "guard.nothing"])
def test_a_dump_that_fails_or_hangs_itself_does_not_hide_the_stacks(call):
    result = run(HANGS.format(call=call, hang=SLEEP))
    assert result.returncode == 1 and "where_it_hangs" in result.stderr
    if "OSError" in call:
        assert "could not be written (OSError: disk full)" in result.stderr


def test_progress_and_a_closed_guard_call_no_dump():
    busy = "[(time.sleep(0.1), guard.progress()) for _ in range(12)]; guard.close(); time.sleep(1.2)"
    result = run(HANGS.format(call="return 'see the folder'", hang=busy))
    assert result.returncode == 0 and result.stderr == ""


def test_the_last_collectives_are_written_for_a_reader(tmp_path):
    code = f"""
import torch, torch.distributed as dist
from pathlib import Path
from launcher.training.flight_recorder import write_collectives
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
print(write_collectives(Path({str(tmp_path)!r}), "answer", 0))
dist.all_reduce(torch.ones(7))
print(write_collectives(Path({str(tmp_path)!r}), "answer", 0))
"""
    before, after = run(code).stdout.splitlines()
    folder = tmp_path / "answer-collectives-gloo"
    assert before == "rank 0 has made no collective yet"
    assert after == f"rank 0: the last collectives of each rank are in {folder}, in <rank>.json"
    entries = json.loads((folder / "0.json").read_text())["entries"]
    assert [(entry["profiling_name"], entry["input_sizes"]) for entry in entries] == [("gloo:all_reduce", [[7]])]


def test_nccl_writes_into_the_runs_logs_unless_another_place_is_named(tmp_path):
    environment: dict[str, str] = {}
    choose_place(tmp_path, "answer", environment)
    assert environment == {"TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/answer-collectives-nccl/rank"}
    assert folder_of(tmp_path, "answer", "nccl").is_dir()
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        environment = {name: "/var/tmp/mine"}
        choose_place(tmp_path, "answer", environment)
        assert environment == {name: "/var/tmp/mine"}


def test_only_collectives_of_this_start_are_named(tmp_path):
    folder = folder_of(tmp_path, "answer", "nccl")
    choose_place(tmp_path, "answer", {})
    assert written_since(tmp_path, "answer", 0.0) == []
    (folder / "rank0").write_bytes(b"x")
    assert written_since(tmp_path, "answer", time.time() - 60) == [folder]
    assert f"are in {folder}, in <rank>.json; `torchfrtrace {folder}` compares" in how_to_read([folder])
    os.utime(folder / "rank0", (1, 1))
    assert written_since(tmp_path, "answer", time.time() - 60) == []
