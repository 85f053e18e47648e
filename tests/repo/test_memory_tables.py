"""The pages' tables of GPU memory are those of the measured numbers."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def memory_tables(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import memory_tables  # pyright: ignore[reportMissingImports], a script's module

    yield memory_tables
    sys.modules.pop("memory_tables")


@pytest.fixture
def result(memory_tables):
    return json.loads(memory_tables.DATA.read_text(encoding="utf-8"))


def test_the_pages_show_the_measured_numbers(memory_tables, result):
    made, shown = memory_tables.tables(result), []
    for path in memory_tables.PAGES:
        page = path.read_text(encoding="utf-8")
        assert memory_tables.filled(page, made) == page, f"{path.name}: run python benchmarks/memory_tables.py"
        shown += re.findall(r"<!-- memory: (\w+) -->\n\|", page)
    assert sorted(shown) == sorted(made)


def test_the_numbers_name_where_and_with_what_they_were_measured(result):
    assert set(result["machine"]) == {"device", "torch", "transformers", "deepspeed", "commit"}
    assert "dirty" not in result["machine"]["commit"]


def test_every_combination_of_the_program_is_there_once(monkeypatch, result):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import memory  # pyright: ignore[reportMissingImports], a script's module

    found = [memory.Combination(**{key: one[key] for key in memory.KEYS}) for one in result["combinations"]]
    sys.modules.pop("memory")
    assert [one.name for one in found] == [one.name for one in memory.combinations()]


def test_a_combination_that_could_not_run_shows_its_error_and_no_number(memory_tables):
    failed = {
        "size": "xl",
        "precision": "bf16",
        "zero_stage": 1,
        "gpus": 1,
        "checkpointing": False,
        "offload": "none",
        "trains": "all",
        "error": "out of memory",
    }
    row = memory_tables.combinations({"combinations": [failed]}).splitlines()[-1]
    assert "did not run: out of memory" in row and not re.search(r"\d\.\d", row)


def test_a_linear_rule_is_found_again_with_its_error(memory_tables):
    (slope, constant), error = memory_tables.fitted([[1e9, 1], [2e9, 1], [4e9, 1]], [5e9, 8e9, 14e9])
    assert np.allclose([slope, constant], [3.0, 2e9]) and error < 1e-9
    (_, _), error = memory_tables.fitted([[1e9, 1], [2e9, 1], [4e9, 1]], [5e9, 9e9, 14e9])
    assert 0.01 < error < 0.2
