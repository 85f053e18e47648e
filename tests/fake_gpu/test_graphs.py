"""Training steps whose blocks are CUDA graphs."""

from __future__ import annotations

import pytest
from fake_gpu import run_on_fake_gpu

pytestmark = pytest.mark.fake_gpu


@pytest.mark.parametrize(
    "training",
    [
        ("1", "bf16", "all"),
        ("0", "fp32", "all"),
        ("1", "bf16", "lora"),
        ("1", "bf16", "bridge", "layers"),
        ("0", "fp32", "all", "embed"),
    ],
    ids="-".join,
)
def test_a_known_shape_is_one_launch_and_a_dropped_one_is_captured_again(training):
    counts = run_on_fake_gpu("graphs.py", *training)
    assert counts["failure"] is None and counts["kept"] == 2, counts
    assert counts["eager"]["launch"] > 600 and counts["eager"]["graph"] == 0
    assert counts["replayed"]["graph"] == 2 and counts["replayed"]["launch"] <= 60, counts  # two blocks and the update
    assert counts["replayed"]["device_waits"] == 0 and counts["replayed"]["waits_of_our_code"] == 1
    assert counts["dropped"]["launch"] > 600 and counts["again"]["launch"] <= 60 and counts["again"]["graph"] == 1
