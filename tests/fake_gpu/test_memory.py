"""The memory of a training on a GPU is what the page says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_gpu import run_on_fake_gpu  # pyright: ignore[reportAttributeAccessIssue], of tests/helpers

ROOT = Path(__file__).parents[2]
CHOSEN = {"size": "base", "zero_stage": 1, "gpus": 4, "checkpointing": False, "offload": "none"}

pytestmark = pytest.mark.fake_gpu


@pytest.mark.parametrize("place", [0, 2], ids=["typical", "longest"])
def test_the_peaks_of_base_are_within_5_percent_of_the_pages(place):
    (row,) = (
        one
        for one in json.loads((ROOT / "docs/data/memory.json").read_text(encoding="utf-8"))["combinations"]
        if CHOSEN.items() <= one.items()
    )
    shape = row["shapes"][place]
    lengths = [str(shape[name]) for name in ("rows", "source", "target")]
    script = str(ROOT / "benchmarks/memory.py")
    measured = run_on_fake_gpu(script, "--one", json.dumps(CHOSEN), "--shape", *lengths)
    assert measured["parameters"] == row["parameters"]
    for found, expected in (
        (measured["steady_bytes"], row["steady_bytes"]),
        (measured["shapes"][0]["peak_bytes"], shape["peak_bytes"]),
    ):
        assert found == pytest.approx(expected, rel=0.05)
