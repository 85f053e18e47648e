"""docs/quickstart.ipynb: every cell runs, on a demo of a tiny size."""

from __future__ import annotations

import json
import os
from pathlib import Path

import matplotlib
import pytest
from docs_samples import demo

ROOT = Path(__file__).parents[2]
NOTEBOOK = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
RUN = "!mmcot run --preset demo"


def test_the_notebook_has_no_output_and_types_one_command():
    assert all(not cell["outputs"] for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code")
    assert [cell for cell in CELLS if "!" in cell] == [RUN]


@pytest.mark.ray
@pytest.mark.processes
@pytest.mark.long
def test_every_cell_of_the_notebook_runs(tmp_path, monkeypatch, capsys):
    matplotlib.use("Agg")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    names: dict[str, object] = {}
    for cell in CELLS:
        if cell == RUN:
            with demo(tmp_path, []):
                continue
        exec(compile(cell, "quickstart.ipynb", "exec"), names)
    assert os.getcwd() == str(tmp_path) and capsys.readouterr().out.count("\n") >= 2
    assert names["attention"].shape == (len(names["tokens"]), 64)
    assert names["attention"].sum(axis=1) == pytest.approx(1.0, abs=1e-4)
