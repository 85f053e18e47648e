"""Who may know whom, read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("mmcot", "data_shards", "launcher")
MAY_KNOW = {"mmcot": {"mmcot"}, "data_shards": {"data_shards", "mmcot.texts.problem"}, "launcher": set(ROOMS)}
LAUNCHER_ONLY = {"ray", "deepspeed", "mlflow", "typer"}
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide who knows whom"
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_its_room_may_know(path):
    room = path.relative_to(ROOT).parts[0]
    names = imported(path)
    ours = {name for name in names if name.split(".")[0] in ROOMS}
    allowed = MAY_KNOW[room]
    assert {name for name in ours if not any(name == a or name.startswith(f"{a}.") for a in allowed)} == set()
    if room != "launcher":
        assert {name.split(".")[0] for name in names} & LAUNCHER_ONLY == set()


@pytest.mark.parametrize("name", ["training/loop.py", "training/deepspeed_engine.py", "training/checkpoint.py", "stages/samples.py"])
def test_the_training_function_can_be_started_without_ray(name):
    assert {n for n in imported(ROOT / "launcher" / name) if n.split(".")[0] == "ray"} == set()


def test_no_module_reads_pickles_or_runs_a_shell():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert "pickle.load" not in text and "shell=True" not in text and "allow_pickle=True" not in text, path
        assert "torch.load(" not in text or "weights_only=True" in text, path
