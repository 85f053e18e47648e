"""Blocks that are run by graphs, without a GPU: all but the graphs themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launcher.config.settings import Training
from launcher.training.block_graphs import _close, reason_without_graphs


@pytest.mark.parametrize(
    ("precision", "trains"),
    [("fp32", "all"), ("bf16", "all"), pytest.param("bf16", "lora", marks=pytest.mark.long)],
)
def test_steps_of_graphs_compute_the_losses_norms_and_weights_of_steps_without(precision, trains):
    script = Path(__file__).parents[1] / "helpers" / "graphed_steps.py"
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, precision, trains]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    # The step with the first occurrences has none; then two of the three shapes are kept, one is captured each time.
    assert found["failure"] is None and found["kept"] == 2 and found["replays"] >= 14, found
    losses = found["losses"]
    assert losses["graphed"] == [pytest.approx(values, rel=1e-6) for values in losses["plain"]]
    assert found["difference"] <= (1e-6 if precision == "fp32" else 0.0)
    assert all(0 < opening < 1 for opening in found["watched"])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"zero_stage": 0}, None),
        ({"zero_stage": 1, "precision": "bf16"}, None),
        ({"zero_stage": 1}, "ZeRO stage 1 in fp32 has buffers of its own"),
        ({"zero_stage": 2, "precision": "bf16"}, "ZeRO stage 2 in bf16 has buffers of its own"),
        ({"zero_stage": 1, "precision": "bf16", "offload": "cpu"}, "offload=cpu moves gradients"),
        ({"zero_stage": 0, "activation_checkpointing": True}, "activation_checkpointing reads the state"),
    ],
)
def test_where_graphs_are_not_possible_the_reason_is_known(settings, reason):
    found = reason_without_graphs(Training(**settings))
    assert found is None if reason is None else reason in found


def test_a_graph_whose_loss_differs_is_not_used():
    assert _close(1000.001, 1000.0, torch.float32) and not _close(1000.1, 1000.0, torch.float32)
    assert _close(1.01, 1.0, torch.bfloat16) and not _close(1.1, 1.0, torch.bfloat16)
    assert not _close(float("nan"), 1.0, torch.float32)
