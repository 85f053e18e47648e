"""Which room may import which, and where heavy libraries may be imported.

Read from the source, then measured in fresh processes.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("mmcot", "data_shards", "launcher")
MAY_IMPORT = {
    "mmcot": {"mmcot"},
    "data_shards": {"data_shards", "mmcot.errors", "mmcot.file_kinds", "mmcot.texts.sample"},
    "launcher": set(PACKAGES),
}
# A room may import rooms of a lower floor. A file that lies flat in a package is a room of its own.
FLOORS = {
    "launcher": {
        "config": 1,
        "runs": 2,
        "evaluation": 2,
        "cluster": 3,
        "stages": 3,
        "data": 4,
        "training": 4,
        "generation": 5,
        "report": 5,
        "tracking": 6,
        "pipeline": 7,
        "tuning": 8,
        "compat": 8,
        "cli": 9,
    },
    "mmcot": {"texts": 1, "vision": 1, "models": 2, "metrics": 2, "decoding": 3},
    "data_shards": {"sources": 2, "mini_sqa": 3},
}
ALIASES = {  # names of earlier versions; they import what they stand for
    "launcher.rank",
    "launcher.predict",
    "launcher.run_dir",
    "launcher.worker",
    "mmcot.model",
    "mmcot.problem",
}
# Where a heavy library may be imported at all, as folders or files of launcher/; elsewhere in launcher/ it may not.
HOMES = {
    "ray": ("cluster/", "training/ray_worker.py", "training/launch.py", "training/ray_group.py", "tuning/"),
    "deepspeed": ("training/",),
    "mlflow": ("tracking/",),
    "typer": ("cli/",),
}
HEAVY = (
    "torch",
    "transformers",
    "ray",
    "deepspeed",
    "mlflow",
    "evaluate",
    "datasets",
    "pandas",
    "matplotlib",
    "huggingface_hub",
)
# Modules of launcher/ that need torch as soon as they are imported; all others wait until a function needs it.
HEAVY_MODULES = {
    "stages": {"samples", "build_model"},
    "training": {
        "loop",
        "deepspeed_engine",
        "engine_steps",
        "checkpoint",
        "checkpoint_files",
        "checkpoint_flight",
        "checkpoint_resume",
        "checkpoint_store",
        "collectives",
        "export",
        "loader",
        "loader_forkserver",
        "step_checks",
        "throughput",
        "torchrun",
        "block_graphs",
        "whole_gradients",
        "zero_stage",
        "opening",
        "shared_memory",
        "rank_sockets",
        "frozen_weights",
        "retrieval",
        "training_state",
    },
    "generation": {"predictor"},
    "tracking": {"pyfunc_model"},
    "compat": {"published_runs"},
}
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@cache
def imported(path: Path) -> frozenset[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides which room it reaches"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def room_of(module: str) -> str | None:
    """The room of a module of ours, such as "launcher/runs", or "data_shards/plan" of a flat file."""
    package, *rest = module.split(".")
    return f"{package}/{rest[0]}" if package in PACKAGES and rest else None


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def arrows() -> dict[str, set[str]]:
    """Each room, and the rooms that it imports."""
    found: dict[str, set[str]] = {}
    for path in FILES:
        if module_of(path) in ALIASES or (path.name == "__init__.py" and path.parent.parent == ROOT):
            continue
        own = room_of(module_of(path))
        targets = {room_of(name) for name in imported(path)} - {None, own}
        found.setdefault(own, set()).update(target for target in targets if is_room(target))
    return found


def is_room(room: str) -> bool:
    return (ROOT / room).is_dir() or (ROOT / f"{room}.py").is_file()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_its_package_may(path):
    package = path.relative_to(ROOT).parts[0]
    ours = {name for name in imported(path) if name.split(".")[0] in PACKAGES}
    if module_of(path) not in ALIASES:
        assert {
            name for name in ours if not any(name == a or name.startswith(f"{a}.") for a in MAY_IMPORT[package])
        } <= {"mmcot", "mmcot.texts"}
    for library, homes in HOMES.items():
        if library in {name.split(".")[0] for name in imported(path)}:
            place = str(path.relative_to(ROOT / "launcher")) if package == "launcher" else ""
            assert any(place.startswith(home) for home in homes if place), (
                f"{path}: {library} may be imported in launcher/{', launcher/'.join(homes)} alone"
            )


@pytest.mark.parametrize("package", PACKAGES)
def test_every_room_has_a_floor_and_imports_only_lower_floors(package):
    floors = FLOORS[package]
    rooms = {path.name for path in (ROOT / package).iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == set(floors)
    upward = [
        (room, target)
        for room, targets in arrows().items()
        for target in targets
        if room.startswith(package)
        and target.startswith(package)
        and floors.get(target.split("/")[1], 0) >= floors.get(room.split("/")[1], 99)
    ]
    assert upward == []


def test_no_circle_of_rooms():
    try:
        list(TopologicalSorter(arrows()).static_order())
    except CycleError as error:
        pytest.fail(f"rooms import each other in a circle: {' -> '.join(error.args[1])}")


def test_no_circle_of_modules():
    modules = {module_of(path) for path in FILES}
    graph = {
        module_of(path): {name for name in imported(path) if name in modules} - {module_of(path)} for path in FILES
    }
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")


def loaded_by(modules: list[str]) -> set[str]:
    """The heavy libraries that a fresh process has after importing some modules."""
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        f"print(*(n for n in {(*HEAVY, 'typer')!r} if n in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize("room", sorted(FLOORS["launcher"]))
def test_a_room_imports_nothing_heavy_before_a_function_needs_it(room):
    heavy = HEAVY_MODULES.get(room, set())
    modules = [
        f"launcher.{room}.{path.stem}"
        for path in sorted((ROOT / "launcher" / room).glob("*.py"))
        if path.stem not in heavy
    ]
    assert loaded_by(modules) <= ({"typer"} if room == "cli" else set())


@pytest.mark.parametrize(
    "modules",
    [
        ["mmcot"],
        ["mmcot.vision.encoder_kinds", "mmcot.vision.patches"],
        ["mmcot.texts.prompts"],
        ["mmcot.metrics.metrics"],
    ],
    ids=str,
)
def test_names_and_prompts_of_the_method_are_known_without_torch(modules):
    assert loaded_by(modules) == set()


def test_no_module_reads_pickles_or_runs_a_shell():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert "pickle.load" not in text and "shell=True" not in text and "allow_pickle=True" not in text, path
        assert "torch.load(" not in text or "weights_only=True" in text, path
