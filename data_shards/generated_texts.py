"""Files of generated texts: one committed file per task.

A task is a range of at most 256 samples of one text shard. Its output,
``rationales/train/000012-000256.jsonl`` (shard number, first position in the shard), has
one line per sample in shard order:

    {"qid": "10", "rationale": "Solution: ...", "num_tokens": 31, "finish": "eos"}

With several candidates a question, the line has the chosen text, and all of them under "candidates", each with its
number.

A file is committed whole and never computed twice. ``rationales/manifest.json`` contains the
inputs that the texts depend on (model, data, generation settings); a folder takes no output of
other inputs. An entry of the ledger, ``rationales/ledger/train/000012-000256.json``, is committed before its file:

    {"sha256": ..., "num_samples": 256, "weights": ..., "seed": 0, "texts": [["10", 0], ["10", 1], ...]}

It tells which candidates of which questions the file holds, and the model's weights and the seed that they are of. The
manifest of a complete output also has the sha256 of every file. ``data_shards/generation_ledger.py`` reads the ledger.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data_shards.atomic_files import commit_bytes, sha256_of_file
from data_shards.errors import ShardError
from data_shards.json_shapes import Whole, fault_of_shape, read_record
from data_shards.manifest import manifest_shards, read_manifest
from data_shards.sealed_json import broken_seal, commit_sealed, read_sealed
from data_shards.text_lines import KEYS_OF_TEXTS, read_lines, texts_of
from mmcot.errors import InputError

MAX_TASK_SAMPLES = 256
_LEDGER = "ledger"
_FILE = {"sha256": str, "num_samples": Whole()}
_FILES = {str: _FILE}
# Entries of earlier versions have the keys of _FILE alone.
_ENTRY = {**_FILE, "weights?": (str, None), "seed?": int, "texts?": [[(str, Whole())]]}
_MANIFEST = {"inputs": dict, "complete": bool, "files?": _FILES, "summary?": dict}
_FILE_NAME = re.compile(r"(train|val|test)/\d{6,}-\d{6,}\.jsonl")


@dataclasses.dataclass(frozen=True, order=True)
class Task:
    """Samples ``start`` to ``start + num_samples`` of a text shard."""

    split: str
    shard: str
    start: int
    num_samples: int

    @property
    def file_name(self) -> str:
        """Such as ``train/000012-000256.jsonl``."""
        return f"{self.split}/{self.shard.rpartition('-')[2]}-{self.start:06d}.jsonl"


def list_tasks(shards_dir: str | Path, splits: Iterable[str], *, task_samples: int = MAX_TASK_SAMPLES) -> list[Task]:
    """Cut splits of a data folder into tasks, in shard order.

    Raises:
        ValueError: ``task_samples`` is not in 1..256.
    """
    if not 1 <= task_samples <= MAX_TASK_SAMPLES:
        raise ValueError(f"task_samples ({task_samples}) must be in 1..{MAX_TASK_SAMPLES}")
    manifest = read_manifest(Path(shards_dir) / "text")
    return [
        Task(split, shard.name, start, min(task_samples, shard.num_samples - start))
        for split in splits
        for shard in manifest_shards(manifest, split)
        for start in range(0, shard.num_samples, task_samples)
    ]


def open_output(output_dir: str | Path, inputs: dict[str, Any]) -> None:
    """Write the inputs of ``output_dir`` to its manifest, or verify that they are the same.

    Raises:
        ShardError: the folder contains output of other inputs.
    """
    path = Path(output_dir) / "manifest.json"
    if path.exists():
        stored = read_output(path)["inputs"]
        differing = sorted(key for key in {*stored, *inputs} if stored.get(key) != inputs.get(key))
        if differing:
            key = differing[0]
            raise ShardError(
                f"{path}: these files were made with {key} = {stored.get(key)!r}, now it is {inputs.get(key)!r}; "
                "outputs of different inputs are not mixed: choose another folder, or delete this one"
            )
    else:
        commit_sealed(path, {"schema_version": 1, "inputs": inputs, "complete": False})


def close_output(output_dir: str | Path, *, files: dict[str, Any], summary: dict[str, Any]) -> None:
    """Mark the output complete: write every file with its sha256, and the counts, to the manifest."""
    path = Path(output_dir) / "manifest.json"
    commit_sealed(path, {**read_output(path), "complete": True, "summary": summary, "files": files})


def reason_to_write_again(output_dir: str | Path, task: Task, qids: Sequence[str]) -> str | None:
    """Why a task's standing file is not what was written for these questions; None where it is.

    The sha256 is that of the manifest of a complete output, else of the ledger.
    """
    path, manifest_path = Path(output_dir) / task.file_name, Path(output_dir) / "manifest.json"
    manifest: dict[str, Any] = read_output(manifest_path) if manifest_path.exists() else {"complete": False}
    try:
        entry = read_entry(output_dir, task.file_name)
    except ValueError as error:
        return str(error)
    listed = manifest["files"].get(task.file_name) if manifest["complete"] else entry
    if listed is None:
        return "no record of its sha256 was kept"
    data = path.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != listed["sha256"]:
        return f"its sha256 is {found[:12]}..., {listed['sha256'][:12]}... was written"
    lines = read_lines(path, KEYS_OF_TEXTS)
    if [line["qid"] for line in lines] != list(qids):
        return "it holds the texts of other questions"
    if entry is not None and (entry["sha256"] != found or entry.get("texts", texts := texts_of(lines)) != texts):
        return "its entry in the ledger is of other texts"
    return None


def write_task(
    output_dir: str | Path, task: Task, lines: list[dict[str, Any]], *, weights: str | None = None, seed: int = 0
) -> Path:
    """Commit the output of one task.

    Args:
        weights: the sha256 of the weights of the model that wrote the texts, for the ledger.
        seed: of their sampling, for the ledger.
    """
    path = Path(output_dir) / task.file_name
    data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "num_samples": len(lines)}
    commit_sealed(
        _entry_path(output_dir, task.file_name), {**entry, "weights": weights, "seed": seed, "texts": texts_of(lines)}
    )
    commit_bytes(path, data)
    return path


def sha256_written(output_dir: str | Path, task: Task) -> str:
    """The sha256 of what ``write_task`` has written last, from the ledger."""
    if (entry := read_entry(output_dir, task.file_name)) is None:
        raise ShardError(
            f"{_entry_path(output_dir, task.file_name)} is missing; delete {task.file_name}, and run again"
        )
    return entry["sha256"]


def read_entry(output_dir: str | Path, file_name: str) -> dict[str, Any] | None:
    """Read a file's entry in the ledger; None where there is none.

    Raises:
        InputError: it has another shape, or was altered.
    """
    path, remedy = _entry_path(output_dir, file_name), f"delete it and {file_name}, and run again"
    if not path.exists():
        return None
    entry = read_record(path, _ENTRY, remedy=remedy)
    if reason := broken_seal(entry):
        raise InputError(f"{reason}; {remedy}").at(path)
    return entry


def files_in_ledger(output_dir: str | Path) -> list[str]:
    """The names of the committed files that have an entry; an entry is committed before its file."""
    entries = sorted((Path(output_dir) / _LEDGER).glob("*/*.json"))
    names = [f"{path.parent.name}/{path.stem}.jsonl" for path in entries]
    return [name for name in names if _FILE_NAME.fullmatch(name) and (Path(output_dir) / name).exists()]


def _entry_path(output_dir: str | Path, file_name: str) -> Path:
    return Path(output_dir) / _LEDGER / f"{Path(file_name).with_suffix('.json')}"


def read_output(path: Path) -> dict[str, Any]:
    """Read the manifest of an output.

    Raises:
        ShardError: it has another shape, or was altered.
    """
    remedy = f"restore it, or delete {path.parent} and run again"
    try:
        manifest = read_sealed(path, remedy=remedy)
    except ValueError as error:
        raise ShardError(str(error)) from None
    fault = fault_of_shape(manifest, _MANIFEST)
    if fault is None and manifest["complete"] and "files" not in manifest:
        fault = "the key 'files' is missing, expected an object"
    if fault is None and manifest["complete"]:
        found = sum(file["num_samples"] for file in manifest["files"].values())
        total = manifest.get("summary", {}).get("num_samples", found)
        fault = None if total == found else f"it counts {str(total)[:40]} texts, its files have {found:,}"
    if fault is not None:
        raise ShardError(f"{path} cannot be used: {fault}; {remedy}")
    return manifest


def verified_files(output_dir: str | Path) -> dict[str, dict[str, Any]]:
    """Return the files of a complete output with their counts, each verified by its sha256.

    Raises:
        ShardError: the output is not complete, or a file is missing or changed.
    """
    files = listed_files(Path(output_dir))
    for name, file in files.items():
        if not (Path(output_dir) / name).is_file() or sha256_of_file(Path(output_dir) / name) != file["sha256"]:
            raise ShardError(
                f"{Path(output_dir) / name} is missing or not what was written; delete {output_dir} and run again"
            )
    return files


def listed_files(output_dir: Path) -> dict[str, dict[str, Any]]:
    """Return the files in the manifest of a complete output; every name must be that of a task."""
    path = output_dir / "manifest.json"
    manifest: dict[str, Any] = read_output(path) if path.exists() else {"complete": False}
    if not manifest["complete"]:
        raise ShardError(f"{output_dir} is not complete; run `mmcot rationales` to its end first")
    if strange := [name for name in manifest["files"] if not _FILE_NAME.fullmatch(name)]:
        raise ShardError(
            f"{path} names a file {strange[0]!r}, expected such as train/000012-000256.jsonl; delete {output_dir} "
            "and run again"
        )
    return manifest["files"]
