"""The last collectives of a rank, written down when a training hangs: torch's flight recorder.

    logs/rationale-collectives-nccl/rank0       what torch's `torchfrtrace FOLDER` compares between the ranks
    logs/rationale-collectives-nccl/0.json      the same for a reader, without the stacks
    logs/rationale-collectives-gloo/0.json      of sums in main memory, and of trainings on processors

torch's recorder keeps the last 2,000 collectives of a process. The hang guard writes them shortly before it ends the
process, and NCCL's watchdog writes ``rank0`` itself when a collective exceeds its timeout. The files without a suffix
are pickles, which only ``torchfrtrace`` loads; this code never does. The tool does not know gloo's groups.
"""

from __future__ import annotations

import os
from collections.abc import Callable, MutableMapping
from pathlib import Path

from data_shards.atomic_files import commit_bytes

_PLACE = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")  # torch's names, the newer one first
_BACKENDS = {"nccl": "_dump_nccl_trace", "gloo": "_dump_fr_trace"}  # torch keeps a recorder for each


def folder_of(logs: Path, stage: str, backend: str) -> Path:
    """The folder of all ranks' collectives."""
    return logs / f"{stage}-collectives-{backend}"


def choose_place(logs: Path, stage: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Let NCCL's watchdog write into the run's logs, unless the environment names another place."""
    if any(name in environment for name in _PLACE):
        return
    folder = folder_of(logs, stage, "nccl").absolute()
    folder.mkdir(parents=True, exist_ok=True)  # torch does not make it
    environment[_PLACE[0]] = f"{folder}/rank"  # torch appends the rank's number


def write_collectives(logs: Path, stage: str, rank: int) -> str:
    """Write this rank's last collectives; returns a sentence on where they are and how to read them."""
    from torch._C import _distributed_c10d as recorders

    written = []
    for backend, name in _BACKENDS.items():
        dump: Callable[[], bytes] | None = getattr(recorders, name, None)
        if dump is None:  # a torch without NCCL
            continue
        readable = getattr(recorders, f"{name}_json")()
        if b'"entries":[{' not in readable.replace(b" ", b""):
            continue
        folder = folder_of(logs, stage, backend)
        commit_bytes(folder / f"{rank}.json", readable)
        if backend == "nccl":
            commit_bytes(folder / f"rank{rank}", dump())
        written.append(folder)
    return f"rank {rank}: {how_to_read(written)}" if written else f"rank {rank} has made no collective yet"


def how_to_read(folders: list[Path]) -> str:
    """A sentence on folders of collectives."""
    tool = [
        f"; `torchfrtrace {folder}` compares the ranks (it loads pickles: use it on your own runs alone)"
        for folder in folders
        if folder.name.endswith("-nccl")
    ]
    return f"the last collectives of each rank are in {' and '.join(map(str, folders))}, in <rank>.json" + "".join(tool)


def written_since(logs: Path, stage: str, since: float) -> list[Path]:
    """The folders that have got a rank's collectives since a time in seconds."""
    folders = [folder_of(logs, stage, backend) for backend in _BACKENDS]
    return [
        folder
        for folder in folders
        if any(path.stat().st_mtime >= since for path in folder.glob("*") if path.is_file())
    ]
