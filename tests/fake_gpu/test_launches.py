"""What a block and a step of a training ask of a GPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from fake_gpu import run_on_fake_gpu

pytestmark = pytest.mark.fake_gpu


def test_a_block_of_the_base_size_launches_at_most_1700_kernels_and_waits_for_none():
    counts = run_on_fake_gpu("block.py", "96", "64")
    assert counts["launch"] <= 1700 and counts["sync"] == 0 and counts["d2h"] == 0, counts


def test_lengths_that_are_no_multiples_of_8_launch_more_kernels():
    rounded, odd = run_on_fake_gpu("block.py", "96", "64"), run_on_fake_gpu("block.py", "93", "61")
    assert odd["launch"] > rounded["launch"] and odd["sync"] == 0, (rounded, odd)


@pytest.mark.parametrize(("stage", "precision"), [("1", "bf16"), ("2", "bf16"), ("0", "fp32")])
def test_a_step_waits_for_no_more_than_its_norm_and_its_loss(stage, precision):
    counts = run_on_fake_gpu("step.py", stage, precision)
    assert counts["device_waits"] == 0 and counts["waits_of_our_code"] == 1, counts


def test_a_point_has_rates_mfu_and_the_gpus_shares_of_time_and_waits_once():
    counts = run_on_fake_gpu("step.py", "1", "bf16")
    rates = {"tokens_per_s", "questions_per_s", "mfu", "tflops_per_s", "gpu_memory_peak_gb"}
    shares = {f"time_share_{name}" for name in ("forward", "backward", "update", "wait", "own", "device_idle")}
    assert rates | shares <= counts["point"].keys() and counts["waits_of_a_point"] <= 1, counts


def test_a_rank_of_nccl_writes_its_last_collectives_in_the_form_of_torchs_tool(tmp_path):
    told = run_on_fake_gpu("collectives.py", str(tmp_path))
    folder = tmp_path / "answer-collectives-nccl"
    assert f"`torchfrtrace {folder}` compares the ranks" in told
    entries = json.loads((folder / "0.json").read_text())["entries"]
    assert [entry["input_sizes"] for entry in entries] == [[[7]], [[9]]]
    tool = [sys.executable, "-m", "torch.distributed.flight_recorder.fr_trace", str(folder)]
    assert subprocess.run(tool, capture_output=True, check=False).returncode == 0


def test_a_step_of_decoding_is_a_graph_that_a_worker_captures_once_for_each_pair_of_widths():
    first, third = run_on_fake_gpu("decoding.py", "64", "1", "bf16"), run_on_fake_gpu("decoding.py", "64", "3", "bf16")
    assert first["nodes"] <= 230 and first["captures"] == 2, first
    assert third["captures"] == 0 and third["all_captures"] == 2, third


def test_decoding_waits_for_a_gpu_once_in_eight_tokens_and_for_nothing_else():
    counts = run_on_fake_gpu("decoding.py", "64", "3", "bf16")
    assert counts["sync"] == counts["d2h"] == counts["looks"] <= counts["steps"] / 8 + 1, counts
    assert counts["h2d_pageable"] == 0 and counts["malloc"] == 0, counts


def test_gated_layers_are_in_the_graphs_and_wait_for_nothing_more():
    first, third = (run_on_fake_gpu("decoding.py", "64", tasks, "bf16", "layers") for tasks in ("1", "3"))
    assert first["nodes"] <= 230 + 12 * 10 and first["captures"] == 2 and third["captures"] == 0, first
    assert third["sync"] == third["d2h"] == third["looks"] <= third["steps"] / 8 + 1, third
    assert third["h2d_pageable"] == 0 and third["malloc"] == 0, third


def test_a_task_of_256_texts_takes_as_many_steps_as_its_longest_one_where_all_are_decoded_together():
    all_rows, some_rows = (run_on_fake_gpu("decoding.py", rows, "3", "bf16") for rows in ("256", "64"))
    assert all_rows["steps"] == 64 and all_rows["tokens"] == some_rows["tokens"], all_rows
    assert some_rows["steps"] <= 1.3 * some_rows["tokens"] / 64, some_rows
