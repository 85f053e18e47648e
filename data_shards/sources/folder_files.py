"""Which files of a folder are read, and why the others are not.

A folder of tables has a file for each split, ``train.jsonl``, or a set of them, ``train-00000-of-00002.jsonl`` to
``train-00001-of-00002.jsonl``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from mmcot.errors import Faults, InputError

SPLIT_NAMES = {"validation": "val", "valid": "val", "dev": "val", "train": "train", "val": "val", "test": "test"}
# A part of a set; on the Hugging Face Hub some have a hash of their content behind it.
_PART = re.compile(r"(?P<split>.+)-(?P<number>\d+)-of-(?P<total>\d+)(-[0-9a-f]{16})?")
_COPY = re.compile(r"(~|\.(bak|orig|old|swp|tmp|part|crdownload))$|^[#~]|^Copy of | copy\b|\(\d+\)")


def split_files(folder: Path, suffixes: Collection[str]) -> list[tuple[Path, str]]:
    """Return the tables of a folder with their splits, the parts of a set in order.

    Raises:
        InputError: a split has two sources, or a part of a set is missing.
    """
    found: dict[str, dict[str, list[Path]]] = {}  # by split, then by source: a file, or the common name of a set
    for path in sorted(folder.iterdir()):
        split = split_of(path, suffixes)
        if split is None:
            continue
        if not path.exists():
            raise InputError("it is a link to a file that does not exist; restore it, or remove the link").at(path)
        part = _PART.fullmatch(path.stem)
        source = f"{part['split']}-*-of-{part['total']}{path.suffix}" if part else path.name
        found.setdefault(split, {}).setdefault(source, []).append(path)
    faults = Faults()
    for split, sources in found.items():
        if len(sources) > 1:
            names = " and ".join(paths[0].name for paths in sources.values())
            faults.add(InputError(f"the split {split!r} has {len(sources)} sources, {names}; keep one").at(folder))
        for paths in sources.values():
            with faults.gathered(folder):
                _check_set(paths)
    faults.raise_any()
    return [(path, split) for split, sources in found.items() for paths in sources.values() for path in paths]


def split_of(path: Path, suffixes: Collection[str]) -> str | None:
    """The split that a table's name tells; None for another file."""
    if path.suffix.lower() not in suffixes or path.is_dir():
        return None
    part = _PART.fullmatch(path.stem)
    return SPLIT_NAMES.get((part["split"] if part else path.stem).lower())


def _check_set(paths: Sequence[Path]) -> None:
    parts = [_PART.fullmatch(path.stem) for path in paths]
    if (first := parts[0]) is None:
        return
    numbers = {int(part["number"]) for part in parts if part}
    if len(numbers) < len(parts):
        by_number = sorted((int(part["number"]), path.name) for path, part in zip(paths, parts, strict=True) if part)
        one, other = next(pair for pair in itertools.pairwise(by_number) if pair[0][0] == pair[1][0])
        raise InputError(f"{one[1]} and {other[1]} are the same part of a set; keep one")
    total = int(first["total"])
    if beyond := [number for number in numbers if number >= total]:
        raise InputError(f"part {max(beyond)} is beyond a set of {total}, with parts 0 to {total - 1}; rename them")
    if num_missing := total - len(numbers):
        missing = next(number for number in range(total) if number not in numbers)
        name = f"{first['split']}-{missing:0{len(first['number'])}d}-of-{first['total']}{paths[0].suffix}"
        raise InputError(
            f"{paths[0].name} is part of a set of {total:,}, of which {num_missing:,} "
            f"{'is' if num_missing == 1 else 'are'} missing, such as {name}; add what is missing, or remove the set"
        )


def ignored_files(folder: Path, read: Collection[Path], tables: Collection[str] = ()) -> list[tuple[Path, str]]:
    """Return what lies in a folder and is not read, each with the reason.

    Args:
        read: the files that are read.
        tables: suffixes of tables, whose names tell a split.
    """
    used = {path.absolute() for path in read}
    used |= {parent for path in used for parent in path.parents}
    return [(path, _reason(path, tables)) for path in sorted(folder.iterdir()) if path.absolute() not in used]


def _reason(path: Path, tables: Collection[str]) -> str:
    if path.name.startswith("."):
        return "hidden"
    if _COPY.search(path.name):
        return "a copy of an editor or a download"
    if path.is_dir():
        return "a folder; pictures that questions name are opened in it"
    if not path.exists():
        return "a link to a file that does not exist"
    if path.suffix.lower() in tables:
        return "its name is none of a split: train, val or test"
    return "no file of this form of data"
