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
