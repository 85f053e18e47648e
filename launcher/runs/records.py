"""The small files of a run's folder, each read by one function that verifies its shape; who writes them is beside it.

    read_lock(run_dir.path / "lock.json")["pid"]          # an int, or an error with file, key, value and remedy

An altered file is named here, before its values reach a calculation, a file name or MLflow.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from data_shards.json_shapes import ANY, NUMBER, Between, Shape, Text, Whole, read_record
from mmcot.errors import InputError

PARENT = "pipeline"  # the key of the whole run among its MLflow runs (mlflow.json)

_TIME = Between(0, 1e11)  # seconds since 1970, up to the year 5138
_TIME_MS = Whole(0, 10**14)
_STEP = Whole(0, 10**12)
_LOCK = {
    "pid": Whole(1, 2**31 - 1),
    "process_started": _TIME,
    "host": str,
    "attempt": Whole(),
    "heartbeat": _TIME,
    "released": bool,
    "since?": _TIME,
    "processes?": str,
}
_STATE = {
    "uri": str,
    "identity": str,
    "runs": {str: str},
    "applied": Whole(),
    "read": {str: Whole()},
    "refused": [dict],
    "experiment": str,
    "experiment_id": (str, int),
}
_SHARE = Between(0, 1)
_BY_AGREEMENT = {
    "mean": _SHARE,
    "bins": [{"up_to": _SHARE, "num_questions": Whole(), "num_right": Whole(), "accuracy": (NUMBER, None)}],
}
_SCORES = {
    "num_questions": Whole(),
    "accuracy": {"AVG": (NUMBER, None)},
    "rationale?": ({str: (NUMBER, None)}, None),
    "answers?": (dict, None),
    "parse_failure_rate?": (NUMBER, None),
    "agreement?": _BY_AGREEMENT,
    "rationale_agreement?": _BY_AGREEMENT,
}
_ALL_ACCURACIES = {"accuracy": {str: (NUMBER, None)}}
# Seconds are below zero where the clock was put back meanwhile.
_MARKER = {"step": str, "inputs": dict, "outputs": dict, "attempt": Whole(), "seconds": Between(-1e11, 1e11)}
_TRIAL = {"values": dict, "state": str, "step": _STEP}

# Lines that are appended (launcher/runs/journal.py)
POINT = {"step": _STEP, "time_ms": _TIME_MS, "metrics": {str: NUMBER}, "total?": _STEP, "note?": str}
LEDGER_LINE = {"step": _STEP, "steps_per_epoch": Whole(1, 10**12), "blocks": {str: [str]}}
TRACKING_LINE = {"run": str, "do": str}
_OF_TRACKING = {
    "start": {"time_ms": _TIME_MS, "name": str, "tags": {str: str}, "parent_key?": (str, None)},
    "params": {"values": {str: str}},
    "tags": {"values": {str: str}},
    "scores": {"values": {str: NUMBER}, "time_ms": _TIME_MS, "trained_by?": str},
    "artifact": {"path": str, "folder": (str, None)},
    "dataset": {"name": str, "digest": str, "source": str, "context": str, "profile": ANY},
    "follow": {"pattern": Text(r"[^/\0]+", "answer-metrics.jsonl"), "names?": {str: str}},
    "trained": {"name": str, "params": {str: str}, "tags": {str: str}},
    "model": {"name": str},
    "end": {"status": str, "time_ms": _TIME_MS},
}


def shape_of_tracking_line(line: Any) -> Shape:
    """The shape that a line of ``logs/tracking.jsonl`` must have, by what it does."""
    if not isinstance(line, dict) or not isinstance(line.get("do"), str):
        return TRACKING_LINE
    actions = "|".join(_OF_TRACKING)
    return TRACKING_LINE | _OF_TRACKING.get(line["do"], {"do": Text(actions, ", ".join(_OF_TRACKING))})


def read_marker(path: Path, *, needs: Collection[str] = ()) -> dict[str, Any]:
    """Read the marker of a finished step.

    Args:
        needs: the keys that must be there; the others may be absent. "shards_dir" is one of the outputs.

    Raises:
        InputError: it is not valid; so it is for each function of this module.
    """
    shape: dict[str, Any] = {name if name in needs else f"{name}?": each for name, each in _MARKER.items()}
    of_data = "shards_dir" in needs
    outputs = {"shards_dir" if of_data else "shards_dir?": str, "files?": {str: str}}
    shape = {name: each for name, each in shape.items() if not name.startswith("outputs")}
    shape["outputs" if of_data or "outputs" in needs else "outputs?"] = outputs
    return read_record(path, shape, remedy="restore it, or delete it and run again: the step is then done again")


def read_lock(path: Path) -> dict[str, Any]:
    """Read the lock of a run: its owner's process, attempt and heartbeat."""
    return read_record(path, _LOCK, remedy="restore it, or delete it if no process runs this folder")


def read_attempt(path: Path) -> int:
    """Read the attempt in a lock, or in a request to stop."""
    remedy = "restore it, or delete it if no process runs this folder"
    return read_record(path, {"attempt": Whole()}, remedy=remedy)["attempt"]


def read_heartbeat(path: Path) -> float | None:
    """Read the last heartbeat in a lock; None where there is none."""
    return read_record(path, {"heartbeat?": _TIME}).get("heartbeat")


def read_mlflow_state(path: Path, *, needs: Collection[str] = ()) -> dict[str, Any]:
    """Read what was logged to MLflow, or nothing where there is no file.

    Args:
        needs: the keys that must be there, where the file is of a run with this version.
    """
    if not path.exists():
        return {}
    remedy = "restore it, or delete it: everything is then sent again, into new runs"
    state = read_record(path, dict, remedy=remedy)
    shape: Shape = {name if name in needs and state else f"{name}?": each for name, each in _STATE.items()}
    return read_record(path, {str: str} if PARENT in state else shape, remedy=remedy)  # of 0.1.0's first form: ids


def read_scores(path: Path) -> dict[str, Any]:
    """Read the scores of a split."""
    remedy = "restore it, or delete it and the marker steps/evaluate.json, and run again"
    read_record(path, _ALL_ACCURACIES, remedy=remedy)
    return read_record(path, _SCORES, remedy=remedy)


def read_trials(path: Path, *, objective: str) -> list[dict[str, Any]]:
    """Read the trials of a finished tuning."""
    return read_record(path, [_TRIAL | {objective: (NUMBER, None)}], remedy="restore it, or delete it and run again")


def read_place(path: Path) -> dict[str, Any]:
    """Read where the folder of a run was when it was last started."""
    shape = {"device": int, "inode": int, "path": Text(r"[^\0]+", "/b/runs/demo"), "earlier": [Text(r"[^\0]+", "/a")]}
    return read_record(path, shape, remedy="restore it, or delete it if the folder is no copy of another run's")


def read_code(path: Path) -> dict[str, Any]:
    """Read which code has begun and last continued a step."""
    return read_record(path, {"began": str, "last": (str, None)}, remedy="restore or delete it")


def read_device(path: Path) -> bool:
    """Read whether a run computes on GPUs."""
    remedy = 'restore it, or write {"use_gpu": true} or {"use_gpu": false}, as the run was started'
    return read_record(path, {"use_gpu": bool}, remedy=remedy)["use_gpu"]


def read_zero_stage(path: Path) -> dict[str, Any]:
    """Read the ZeRO stage that was chosen for a run."""
    remedy = 'restore it, or write {"zero_stage": ..., "reason": ""} with the zero_stage of a checkpoint\'s manifest'
    return read_record(path, {"zero_stage": Whole(0, 3), "reason": str}, remedy=remedy)


def read_hand_over(path: Path) -> dict[str, Any] | None:
    """Read which checkpoint a trial began with; None where it began with none."""
    if not path.exists():
        return None
    return read_record(path, {"trial": str, "step": _STEP, "note": str}, remedy="restore or delete it")


def read_short_text(path: Path) -> str:
    """Read a file of one line, such as LATEST; bytes that are no text become the sign for them."""
    try:
        return path.read_bytes()[:1000].decode("utf-8", errors="replace")
    except IsADirectoryError:
        raise InputError("it is a folder, expected a file of one line; remove it").at(path) from None
