"""docs/performance.md and its picture have the numbers of benchmarks/results/ and no others."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"
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


def engine(median, tokens=6_000, margins=()):
    return {
        "tokens_per_processor_second": {"median": 100 * median, "each": []} | LOW,
        "ratio": {"median": median, "low": median - 0.1, "high": median + 0.1, "each": []},
        "tokens": tokens,
        "equal_texts": 128 - len(margins),
        "texts": 128,
        "differ_at": [{"token": 11, "margin": margin} for margin in margins],
    }


GENERATION = {
    "conditions": CONDITIONS,
    "data": "ScienceQA",
    "questions": 128,
    "tokens": 6_000,
    "longest": 256,
    "ended": 120,
    "different_texts": 70,
    "engines": {
        "ours, fp32, 64 rows": engine(4.6),
        "transformers, fp32, 32 rows, data order": engine(1.0),
        "Quick, int8 <rows>": engine(7.5, tokens=6_107, margins=(0.12, 0.004)),
    },
    "peers": {"Quick": {"quick": "1.0", "converter": "2.1"}},
    "left_out": {"Slow": "its program ended with status 1"},
    "sharing": {"8 candidates against one": {"median": 2.5, "low": 2.4, "high": 2.75, "each": []}},
    "no_cache_padded_to_512": {"tokens_per_processor_second": 12.34, "sources": 4},
    "peak_memory_gb": {"32": 1.0, "507": 1.25},
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


def test_the_picture_is_what_the_committed_results_give(page):
    generation = page.read_results(page.RESULTS)["generation"]
    assert page.PICTURE.read_text() == page.plot(generation), "run benchmarks/performance_page.py"


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


def test_engines_of_generation_have_their_own_tokens_and_margins_the_slowest_first(page):
    rows = [line for line in page.render({"generation": GENERATION}).splitlines() if " of 128 |" in line]
    assert rows == [
        "| transformers, fp32, 32 rows, data order | 100 | 1.00 (0.90 to 1.10) | 6,000 | 128 of 128 |  |",
        "| ours, fp32, 64 rows | 460 | 4.60 (4.50 to 4.70) | 6,000 | 128 of 128 |  |",
        "| Quick, int8 <rows> | 750 | 7.50 (7.40 to 7.60) | 6,107 | 126 of 128 | 0.004 to 0.1 |",
    ]


def test_versions_of_rivals_and_what_was_left_out_are_said(page):
    text = page.render({"generation": GENERATION})
    assert "Quick (quick 1.0, converter 2.1)." in text
    assert "Left out: Slow, because its program ended with status 1." in text


def test_the_picture_has_a_bar_of_proportional_length_for_each_engine_and_is_valid_xml(page):
    picture = ElementTree.fromstring(page.plot(GENERATION))
    bars = [float(each.get("width")) for each in picture.iter(f"{SVG}rect")][1:]  # the first is the background
    assert len(bars) == 3 and bars[1] / bars[0] == pytest.approx(4.6, rel=0.01)
    assert "Quick, int8 <rows>" in [each.text for each in picture.iter(f"{SVG}text")]
    assert any("2 texts differ" in each.text for each in picture.iter(f"{SVG}text"))
