"""The files of a checkpoint's folder: listed by rank 0, hashed and verified by all ranks together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from data_shards.atomic_files import sha256_of_file
from launcher.training.collectives import agreed, gather_json
from launcher.training.held_files import HeldFiles
from launcher.training.host_memory import may_hold

# DeepSpeed's files: without a rank in its name, every rank loads one, else that rank alone.
_STATES_FILE = re.compile(r"(?:bf16_)?(?:zero_pp_rank_(\d+)_)?mp_rank_\d+_(?:model|optim)_states\.pt")


def hash_share(
    folder: Path, rank: int, world_size: int, *, known: Mapping[str, dict[str, Any]] = MappingProxyType({})
) -> dict[str, dict[str, Any]]:
    """Hash every ``world_size``-th file that is not ``known``; all ranks use rank 0's listing."""
    names = _names(folder)
    return {
        name: known[name]
        if name in known
        else {"size_bytes": (folder / name).stat().st_size, "sha256": sha256_of_file(folder / name)}
        for name in names[rank::world_size]
    }


def _names(folder: Path) -> list[str]:
    """Rank 0's listing of the files in a folder."""
    return agreed(lambda: sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))


def gather(share: dict[str, Any]) -> dict[str, Any]:
    """The entries of all ranks' dicts, on every rank."""
    return {name: value for part in gather_json(share) for name, value in sorted(part.items())}


def damage_of(folder: Path, expected: dict[str, Any], *, held: HeldFiles | None = None) -> str | None:
    """What is wrong with the files of a folder, or None, the same on every rank.

    Each rank reads a share of the files. With ``held`` it reads those that it loads as well, and keeps them in
    memory; where there is no room for them, DeepSpeed reads them again.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    names = _names(folder)
    kept = [[name for name in names if held is not None and _is_loaded_by(name, each)] for each in range(world_size)]
    rest = [name for name in names if not any(name in each for each in kept)]
    contents, mine = held or HeldFiles(), kept[rank] + rest[rank::world_size]
    hold = may_hold(sum((folder / name).stat().st_size for name in kept[rank]))
    num_threads = max(1, min(len(mine), torch.get_num_threads()))
    with ThreadPoolExecutor(num_threads) as pool:
        read = list(pool.map(lambda name: contents.read(folder / name, hold=hold and name in kept[rank]), mine))
    parts = gather_json(dict(zip(mine, read, strict=True)))
    altered = {name for part in parts for name, file in part.items() if file != expected.get(name)}
    if wrong := min(altered | (expected.keys() ^ set(names)), default=None):
        return f"{wrong} is missing or altered or was added"
    return None


def _is_loaded_by(name: str, rank: int) -> bool:
    """Whether DeepSpeed loads this file in a rank of a group of the size that wrote it."""
    match = _STATES_FILE.fullmatch(name)
    return match is not None and match[1] in (None, str(rank))
