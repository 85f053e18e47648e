"""Workers that Ray's memory monitor ends: lost ones with their reason, tried again with smaller batches, then named."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError

from launcher.cluster.worker_pool import _is_lost, lack_of_memory
from launcher.generation.text_tasks import _with_smaller_batches
from launcher.stages.jobs import GenerationJob


def test_an_end_by_the_memory_monitor_is_a_lost_worker_and_its_reason_is_rays_line():
    error = OutOfMemoryError("Task was killed due to the node running low on memory.\nMemory on the node was 0.97.")
    assert _is_lost(error) and lack_of_memory(error) == "Task was killed due to the node running low on memory."
    assert _is_lost(ActorDiedError()) and lack_of_memory(ActorDiedError()) is None


def test_every_halving_halves_the_rows_down_to_one(tiny_settings):
    job = GenerationJob("rationale", tiny_settings, model_dir="m", shards_dir="s", output_dir="o")
    sizes = [_with_smaller_batches(job, halvings).settings.generation.batch_size for halvings in (0, 1, 2, 9)]
    whole = tiny_settings.generation.batch_size
    assert sizes == [whole, whole // 2, whole // 4, 1]


@pytest.mark.ray
def test_a_node_without_memory_ends_a_generation_in_a_sentence(model_dir, tiny_data, tmp_path):
    command = [
        sys.executable,
        "-m",
        "launcher",
        "rationales",
        "--model",
        str(model_dir),
        "--shards",
        str(tiny_data.path),
    ]
    command += ["--split", "val", "--out", str(tmp_path / "out"), "--set", "rationale.format=QCM-E"]
    command += ["--set", "cluster.num_workers=1", "--set", "generation.max_attempts=2"]
    full = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "50"}
    result = subprocess.run(command, env=os.environ | full, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    said = result.stdout + result.stderr
    assert result.returncode == 1 and "Traceback" not in said, said
    assert "a worker was ended for lack of memory" in said and "memory" in said.strip().splitlines()[-1], said
