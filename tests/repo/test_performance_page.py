"""docs/performance.md has the numbers of benchmarks/results/ and no others."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONDITIONS = {
    "commit": "0123456789",
    "uncommitted_changes": False,
    "versions": {"torch": "2"},
    "cores": 2,
    "load_average": 1.0,
}
RATIO = {"median": 0.96, "low": 0.9, "high": 1.0, "each": [0.9, 1.0]}

LOW = {"low": 0.0, "high": 1.0}


def loop(seconds, of_bare_loop=RATIO):
    return {
        "seconds_per_step": {"median": seconds, "low": seconds, "high": seconds, "each": [seconds, seconds]},
        "tokens_per_processor_second": 100.0,
        "of_bare_loop": of_bare_loop,
        "padded_over_real": 1.1,
    }


TRAINING = {
    "conditions": CONDITIONS,
    "data": "ScienceQA",
    "questions": 504,
    "real_tokens": 60_000,
    "batch": 8,
    "block": 4,
    "threads": 1,
    "steps": 4,
    "checks": {
        "trainer": {"relative_difference": 1e-8},
        "tiny_model": {"ours, ZeRO-2": {"first_step": 1e-8, "all_steps": 1e-7, "steps": 50}},
        "this_model": {"ours, ZeRO-2": {"first_step": 1e-8, "all_steps": 1e-7, "steps": 4}},
    },
    "loops": {
        "bare loop, fused AdamW": loop(1.0),
        "ours, ZeRO-2": loop(2.0),
        "Trainer, padded to 512": loop(9.0, {"median": 0.1, "each": [0.1, 0.1]} | LOW),
        "Trainer, dynamic padding": loop(2.4, {"median": 0.8, "each": [0.75, 0.8]} | LOW),
    },
}


@pytest.fixture
def page(monkeypatch):
    """The program that makes the page."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import performance_page

    yield performance_page
    sys.modules.pop("performance_page")


def test_the_page_is_what_the_committed_results_give(page):
    assert page.PAGE.read_text() == page.render(page.read_results(page.RESULTS)), "run benchmarks/performance_page.py"


def test_the_committed_results_name_no_path_and_no_home(page):
    for path in page.RESULTS.glob("*.json"):
        text = path.read_text()
        assert '"/' not in text and "/home" not in text and "/root" not in text and "/tmp" not in text, path.name


def test_what_reaches_an_aim_and_what_misses_it_is_said(page):
    missed = copy.deepcopy(TRAINING)
    missed["loops"]["ours, ZeRO-2"] = loop(2.2, RATIO | {"median": 0.94, "each": [0.8, 0.8]})
    for report, word in ((TRAINING, "reached"), (missed, "**missed**")):
        rows = [line for line in page.render({"training": report}).splitlines() if ">= " in line]
        assert len(rows) == 2 and all(row.endswith(f"| {word} |") for row in rows), rows


def test_ours_is_compared_with_the_fastest_padding_of_the_trainer(page):
    assert "at its best (dynamic padding) | >= 1.15 | 1.23 (1.20 to 1.25)" in page.render({"training": TRAINING})


def test_a_pause_of_a_checkpoint_is_compared_with_its_aim(page):
    report = {"commit": "0123456", "processors": 2, "parameters": 5, "seconds": {"ours, training stops": [0.5, 2, 3]}}
    assert "| <= 1 s | 2.00 (0.50 to 3.00) s | **missed** |" in page.render({"checkpoints": report})


def test_a_part_without_results_is_named_as_not_measured(page):
    text = page.render({"training": TRAINING})
    assert "`python benchmarks/stream.py` has not been measured." in text
    assert "`python benchmarks/training.py` has not been measured." not in text


def test_uncommitted_changes_and_a_busy_machine_are_said(page, tmp_path):
    changed = CONDITIONS | {"uncommitted_changes": True, "load_average": 9.0}
    (tmp_path / "training.json").write_text(json.dumps(TRAINING | {"conditions": changed}))
    text = page.render(page.read_results(tmp_path))
    assert "commit 0123456 with uncommitted changes" in text and "other programs used the machine" in text
