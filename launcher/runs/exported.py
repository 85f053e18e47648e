"""Exported models, verified by the marker of the step that trained them.

    <run>/rationale/model/model.safetensors, config.json, tokenizer.json, ...
    <run>/steps/train-rationale.json       "outputs": {"rationale_model": sha256, "files": {"config.json": sha256, ...}}

A process that opens a model of a run verifies it first, once. A model outside a run has no
marker and is opened without verification.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.runs.checked_files import sha256_of_unchanged
from launcher.runs.records import read_marker
from launcher.runs.run_dir import RunError

WEIGHTS = "model.safetensors"


def describe_export(stage: str, folder: Path) -> dict[str, Any]:
    """Return the outputs in a training's marker: the sha256 of the files of the exported model.

    Raises:
        RunError: the folder has no weights.
    """
    files = {name: sha256_of_unchanged(folder / name) for name in _names(folder)}
    if WEIGHTS not in files:
        raise RunError(f"{folder} has no {WEIGHTS}; restore it, or delete the folder and run again")
    return {f"{stage}_model": files[WEIGHTS], "files": files}


def sha256_of_weights(folder: str | Path) -> str:
    """The sha256 of a model's weights: that of its one .safetensors, or of the sha256s of several, in name order.

    Raises:
        RunError: the folder has no weights.
    """
    hashes = [sha256_of_unchanged(path) for path in sorted(Path(folder).glob("*.safetensors"))]
    if not hashes:
        raise RunError(f"{folder} has no .safetensors; give the folder of a model")
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def verify_model(folder: str | Path) -> None:
    """Verify the files of an exported model by the marker of its run, if it has one.

    Raises:
        RunError: a file is missing, was altered or was added.
    """
    if found := _place_in_run(Path(folder)):
        place, marker = found
        verify_export(place, read_marker(marker, needs=("outputs",))["outputs"], source=str(marker))


def verify_export(folder: Path, outputs: Mapping[str, Any], *, source: str) -> None:
    """Verify the files of ``<run>/<stage>/model`` against the outputs of ``describe_export``.

    Args:
        source: where ``outputs`` is stored, for messages.

    Raises:
        RunError: a file is missing, was altered or was added.
    """
    stage = folder.parent.name
    expected = dict(outputs.get("files", {}))
    is_whole = bool(expected)  # a marker of an earlier version has the sha256 of the weights alone
    if weights := outputs.get(f"{stage}_model"):
        expected[WEIGHTS] = str(weights)
    remedy = (
        f"restore it, or delete {source} and {folder}, and run again: the model is then exported again from its "
        "last checkpoint"
    )
    for name, sha256 in sorted(expected.items()):
        path = folder / name
        if not path.is_file():
            raise RunError(f"{path} is missing, {source} says that it was exported (sha256 {sha256[:12]}...); {remedy}")
        if (found := sha256_of_unchanged(path)) != sha256:
            raise RunError(
                f"{path} is not the file that was exported: its sha256 is {found[:12]}..., {source} says "
                f"{sha256[:12]}...; {remedy}"
            )
    if is_whole and (added := [name for name in _names(folder) if name not in expected]):
        raise RunError(
            f"{folder / added[0]} was added to an exported model ({source} does not name it, and a loader may read "
            "it); move it elsewhere"
        )


def _place_in_run(folder: Path) -> tuple[Path, Path] | None:
    """Return a model's folder in its run and the marker of its training; None outside a run.

    ``folder`` may also be a link to the model's folder.
    """
    for path in (Path(os.path.abspath(folder)), folder.resolve()):
        stage = path.parent.name
        marker = path.parent.parent / "steps" / f"train-{stage}.json"
        if path.name == "model" and marker.is_file():
            return path, marker
    return None


def _names(folder: Path) -> list[str]:
    """Return the files that a loader may read; hidden files belong to the file system."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in paths if not any(part.startswith(".") for part in path.parts))
