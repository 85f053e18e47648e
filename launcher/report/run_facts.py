"""The facts of a run, read from its folder, as plain JSON values for the report's page.

    facts = read_run(Path("runs/demo"))
    facts["scores"]["test"]["accuracy"]["AVG"]                # 99.0
    facts["curves"]["rationale"]["loss"]["values"][0]         # 7.09
    facts["missing"]                                          # ["Step 'evaluate' is not done: ..."]

A run may be unfinished: ``missing`` names what does not exist. Questions, predictions and
pictures are read in ``launcher/report/questions.py``, attention in ``launcher/report/attention.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_shards.json_shapes import Whole, fault_of_shape, read_record
from data_shards.strict_json import parse_json
from launcher.config.settings import Settings
from launcher.evaluation.agreement import ANSWERS, RATIONALES
from launcher.runs.exported import verify_model
from launcher.runs.journal import JournalReader
from launcher.runs.records import read_heartbeat, read_mlflow_state, read_scores
from launcher.runs.run_dir import RunDir
from launcher.runs.run_settings import read_run_settings
from mmcot.errors import InputError
from mmcot.file_kinds import fault_of

SPLITS = ("val", "test")
MAX_POINTS = (
    600  # of a curve on the page; a longer one keeps the lowest and the highest of each of half as many stretches
)
MAX_NOTES = 50
_LOST_WITHOUT = {
    "data": "no questions are known",
    "evaluate": "there are no answers and no scores",
}


def read_run(folder: Path) -> dict[str, Any]:
    """Everything but questions and pictures.

    Raises:
        RunError: the folder holds no run.
    """
    run_dir, settings = RunDir(folder), read_run_settings(folder)
    steps = read_steps(run_dir, settings.chain.steps)
    stages = settings.chain.stage_names
    scores = {split: read_scores(path) for split in SPLITS if (path := run_dir.scores(split)).exists()}
    points = {stage: list(JournalReader(run_dir.journal(stage)).read()) for stage in stages}
    notes = {stage: _notes(points[stage]) for stage in stages}
    return {
        "name": settings.run.name,
        "folder": folder.absolute().name,
        "is_mini_sqa": settings.data.path is None and settings.data.shards_dir is None,
        "is_science_qa": False,
        "stages": list(stages),
        "settings": flatten(settings.model_dump()),
        "steps": steps,
        "missing": [
            f"Step '{step['name']}' is not done: {_lost_without(step['name'], settings)}."
            for step in steps
            if not step["done"]
        ],
        "models": {stage: describe_model(run_dir.model(stage)) for stage in stages},
        "training": {stage: _training(points[stage], settings, stage) for stage in stages},
        "curves": {stage: curves_of(points[stage]) for stage in stages},
        "notes": {stage: lines for stage, lines in notes.items() if lines},
        "scores": scores,
        "agreement": {split: agreement_with_intervals(part) for split, part in scores.items()},
        "choice_orders": read_record(path, dict) if (path := folder / "choice_order.json").exists() else None,
        "mlflow": read_mlflow_state(folder / "mlflow.json").get("runs", {}),
        "time": _time(run_dir, points),
    }


def read_steps(run_dir: RunDir, steps: Iterable[str]) -> list[dict[str, Any]]:
    """Each step in order: whether it is done, its seconds and its attempt."""
    markers = {step: run_dir.marker(step) for step in steps}
    return [
        {
            "name": step,
            "done": marker is not None,
            "seconds": (marker or {}).get("seconds"),
            "attempt": (marker or {}).get("attempt"),
        }
        for step, marker in markers.items()
    ]


def curves_of(points: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every metric of a journal's points: {"steps", "values", "num_points"}, thinned for the page.

    Of a step that a restart wrote again the first value is kept; a value that is not finite becomes null.
    """
    found: dict[str, dict[int, float | None]] = {}
    for point in points:
        for name, value in point.get("metrics", {}).items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                found.setdefault(name, {}).setdefault(int(point["step"]), _number(value))
    curves = {}
    for name, values in found.items():
        kept = thin(sorted(values.items()))
        curves[name] = {
            "steps": [step for step, _ in kept],
            "values": [value for _, value in kept],
            "num_points": len(values),
        }
    return curves


def thin(points: list[tuple[int, float | None]], *, limit: int = MAX_POINTS) -> list[tuple[int, float | None]]:
    """At most ``limit`` points: the ends, and of each stretch between them the lowest and the highest."""
    if len(points) <= limit:
        return points
    num_stretches = (limit - 2) // 2
    inner, kept = points[1:-1], []
    for number in range(num_stretches):
        stretch = inner[number * len(inner) // num_stretches : (number + 1) * len(inner) // num_stretches]
        finite = [point for point in stretch if point[1] is not None] or stretch
        ends = {min(finite, key=_height), max(finite, key=_height)}
        kept += sorted(ends, key=lambda point: point[0])
    return [points[0], *kept, points[-1]]


def describe_model(folder: Path) -> dict[str, Any] | None:
    """Size and shape of an exported model, read from its files; None where there is none."""
    if not (folder / "config.json").exists():
        return None
    verify_model(folder)
    config = read_record(folder / "config.json", dict, remedy="restore the model, or export it again")
    kept = (
        "d_model",
        "num_layers",
        "num_decoder_layers",
        "num_heads",
        "d_ff",
        "vocab_size",
        "fusion",
        "vision_num_patches",
        "vision_dim",
    )
    return {
        "num_parameters": sum(_num_weights(path) for path in folder.glob("*.safetensors")),
        "shape": {name: config[name] for name in kept if name in config},
    }


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and prefix + name != "training.deepspeed":
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def wilson(num_right: int, num: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927), in percent."""
    if num == 0:
        return 0.0, 100.0
    z = 1.959964
    share, spread = num_right / num, z * z / num
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / num + spread / (4 * num)) / (1 + spread)
    return round(100 * max(0.0, middle - half), 2), round(100 * min(1.0, middle + half), 2)


def agreement_with_intervals(scores: dict[str, Any]) -> dict[str, Any]:
    """Accuracy by agreement of answers and rationales, with its 95 % interval; empty where there was no vote."""
    found: dict[str, Any] = {}
    for key in (ANSWERS, RATIONALES):
        if key in scores:
            bins = []
            for part in scores[key]["bins"]:
                low, high = wilson(part["num_right"], part["num_questions"])
                bins.append({**part, "low": low, "high": high})
            found[key] = {**scores[key], "bins": bins}
    return found


def _lost_without(step: str, settings: Settings) -> str:
    if stage := settings.chain.stage_of_step(step):
        return f"there is no model of the stage {stage.name}"
    return _LOST_WITHOUT.get(step, f"{step} are not complete")


def _training(points: list[dict[str, Any]], settings: Settings, stage: str) -> dict[str, Any]:
    spec = settings.stage(stage)
    return {
        "last_step": max((point["step"] for point in points if point.get("metrics")), default=None),
        "num_steps": spec.num_steps,
        "num_epochs": spec.num_epochs,
        "format": spec.format,
    }


def _time(run_dir: RunDir, points: dict[str, list[dict[str, Any]]]) -> dict[str, int | None]:
    """The first and the last recorded time in milliseconds since 1970."""
    path = run_dir.path / "lock.json"
    heartbeat = read_heartbeat(path) if path.exists() else None
    times = [point["time_ms"] for part in points.values() for point in part if "time_ms" in point]
    times += [int(1000 * heartbeat)] if heartbeat is not None else []
    return {"first_ms": min(times, default=None), "last_ms": max(times, default=None)}


def _notes(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"step": point["step"], "text": point["note"]} for point in points if "note" in point][-MAX_NOTES:]


def _num_weights(path: Path) -> int:
    """Numbers in a .safetensors file, from its header alone.

    Raises:
        InputError: it has no valid header.
    """
    if (fault := fault_of(path, "the weights of a model")) is not None:
        raise InputError(fault)
    remedy = "restore the model, or export it again"
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise InputError(f"its header would have {size:,} bytes, more than the file; {remedy}").at(path)
        start = file.read(size)
    header = parse_json(start, path, member="header", remedy=remedy)
    if (fault := fault_of_shape(header, {str: {"shape?": [Whole(0, 2**40)]}})) is not None:
        raise InputError(f"{fault}; {remedy}").at(path, member="header")
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if "shape" in tensor)


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _height(point: tuple[int, float | None]) -> float:
    return 0.0 if point[1] is None else point[1]
