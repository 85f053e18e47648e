"""A user's own webdataset tars, indexed in place.

Members with the same key belong to one question: ``{qid}.json`` (the question, in ScienceQA's
field names or those of ``tables.py``) and optionally pictures ``{qid}.png`` (.jpg, .jpeg, .webp), several as
``{qid}.0.png``, ``{qid}.1.png``, ..., or ready-made features ``{qid}.npy``. A document's pictures are found by the
names in its parts, or are taken in the order of their numbers. Nothing is copied or rewritten: the output folder
contains indexes and manifests that name the tars.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.atomic_files import commit_json, read_json, sha256_of_file
from data_shards.errors import ShardError
from data_shards.index import (
    check_member,
    is_picture,
    picture_order,
    read_index,
    read_member,
    rows_of_extension,
    write_index,
)
from data_shards.manifest import json_members, row_of_member, with_pictures
from data_shards.npy import parse_npy
from data_shards.picture_features import PICTURE_COUNTS
from data_shards.remote_files import check_url, is_remote, local_copy, read_range
from data_shards.sources.columns import notes_on_fields
from data_shards.sources.folder_files import SPLIT_NAMES
from data_shards.sources.question_set import SPLITS, Picture
from data_shards.sources.row_samples import FIELDS, sample_of_row
from data_shards.writer import (
    Shard,
    count_questions,
    manifest_shards,
    read_manifest,
    write_manifest,
)
from mmcot.errors import Faults, InputError
from mmcot.texts.sample import Sample, SampleError


def index_tars(
    tars: Mapping[str, Sequence[Path | str]],
    output_dir: str | Path,
    *,
    features: str | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Index tars into a data folder and return its text manifest.

    Args:
        tars: the tars of each split, in order: paths or URLs.
        features: the name of the features in ``.npy`` members; None ignores these members.
        report: called with a line on tars that contain several archives, or members of no question.

    Raises:
        ShardError: a tar is damaged or contains no question, or a feature is missing or has another shape.
        InputError: a question is not valid.
        FaultsError: there are several such faults.
    """
    for path in (path for paths in tars.values() for path in paths if is_remote(path)):
        check_url(str(path))  # before it is written to a file
    output_dir = Path(output_dir)
    _check_output(output_dir, features)
    folder, staging = output_dir / "text", output_dir / ".staging-text"
    shutil.rmtree(staging, ignore_errors=True)  # of a killed process
    (folder / "manifest.json").unlink(missing_ok=True)  # the folder is unfinished until the end
    faults, shards = Faults(), []
    try:
        for split in SPLITS:
            for number, path in enumerate(tars.get(split, ())):
                try:
                    has_features = features is not None
                    shards.append(_index(path, staging, split, number, has_features=has_features, report=report))
                except ShardError as error:
                    faults.add(error)
        everything = _read_questions(staging, shards, faults, report)
        faults.raise_any()
        _take_indexes(staging, folder, shards)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    commit_json(
        output_dir / "inputs.json", {"indexed": [str(path) for split in SPLITS for path in tars.get(split, ())]}
    )
    manifest = write_manifest(
        folder, "text", shards, {"counts": count_questions(everything), "lists": {}, "ceilings": None}
    )
    if features is not None:
        _index_features(output_dir / "features" / features, folder, shards, features, manifest["fingerprint"])
    return manifest


def _check_output(output_dir: Path, features: str | None) -> None:
    """Check that nothing else stands where indexes are written."""
    if features is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", features):
        raise InputError(
            f"features {features!r} is no name for a folder; give letters, digits, '_', '-' and dots, such as vit"
        )
    manifest, inputs = output_dir / "text" / "manifest.json", output_dir / "inputs.json"
    made = read_json(inputs) if inputs.exists() else None
    if (manifest.exists() or inputs.exists()) and not (isinstance(made, dict) and "indexed" in made):
        raise InputError(f"{output_dir} has shards of another origin, which would be lost; give another one by --out")


def _take_indexes(staging: Path, folder: Path, shards: Sequence[Shard]) -> None:
    """Put complete indexes in the place of earlier ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        os.replace(shard.index(staging), shard.index(folder))


def pictures_in_tars(shards_dir: str | Path) -> Callable[[Sample], list[Picture]]:
    """Return a function from a problem to its encoded pictures, read from the indexed tars.

    In place of a picture that the problem names and its tar does not have there is a path that does not exist.
    """
    folder = Path(shards_dir) / "text"
    where: dict[str, list[tuple[str, Path | str, int, int, int]]] = {}  # by qid; the extension first
    for shard in manifest_shards(read_manifest(folder)):
        table = read_index(shard.index(folder))
        for extension in sorted(filter(is_picture, set(table["extension"].to_pylist())), key=picture_order):
            for qid, offset, size, crc32 in zip(*rows_of_extension(table, extension).values(), strict=True):
                where.setdefault(qid, []).append((extension, shard.tar(folder), int(offset), int(size), int(crc32)))

    def pictures(problem: Sample) -> list[Picture]:
        found: list[Picture] = []
        for member in _in_order(problem, where.get(problem.qid, [])):
            if isinstance(member, Path):  # missing
                found.append(member)
                continue
            _, path, offset, size, crc32 = member
            name = (path, problem.qid)
            if is_remote(path):
                data = read_range(str(path), offset, size)
                check_member(data, size=size, crc32=crc32, name=name)
                found.append(data)
            else:
                with open(path, "rb") as file:
                    found.append(read_member(file.fileno(), offset=offset, size=size, crc32=crc32, name=name))
        return found

    return pictures


def _in_order(problem: Sample, members: list[Any]) -> list[Any]:
    """Order the pictures as the sample names them, if it names members, else by their numbers; a path if missing."""
    by_name = {member[0]: member for member in members}
    named = [name.removeprefix(f"{problem.qid}.").lower() for name in problem.images]
    absent = [Path("not-in-its-tar") / name for name in problem.images]
    if any(name in by_name for name in named):
        return [by_name.get(name, path) for name, path in zip(named, absent, strict=True)]
    return [*members, *absent[len(members) :]]


def _read_questions(
    folder: Path, shards: Sequence[Shard], faults: Faults, report: Callable[[str], None]
) -> list[Sample]:
    """Read all questions of the tars, and gather the faults of all members."""
    found: dict[str, Sample] = {}
    tar_of: dict[str, Path | str] = {}
    renamed: list[str] = []
    resplit: list[str] = []
    unused = Counter[str]()
    for shard in shards:
        tar = shard.tar(folder)
        for qid, data, pictures in json_members(folder, shard):
            with faults.gathered(tar, member=f"member {qid}.json"):
                if qid in found:
                    raise SampleError(
                        f"the id {qid!r} is also that of a member of {tar_of[qid]}; expected unique ids (a member's "
                        "file name up to the first dot, without folders): rename the member"
                    )
                row = row_of_member(qid, data, tar=tar)
                problem = with_pictures(sample_of_row(qid, row), pictures)
                if not problem.has_answer:
                    raise SampleError("the answer is missing; training and scoring need it")
                found[qid], tar_of[qid] = problem, tar
                if str(inside := row.get("qid", qid)) != qid:
                    renamed.append(f"{inside!r} in {qid}.json")
                if (split := row.get("split")) and SPLIT_NAMES.get(str(split)) != shard.split:
                    resplit.append(f"{split!r} in {qid}.json")
                unused.update(row.keys() - FIELDS)
    if renamed:
        report(
            f"note: the JSON of {len(renamed):,} members has another qid than the member's name, such as {renamed[0]}; "
            "the name is used"
        )
    if resplit:
        report(
            f"note: the JSON of {len(resplit):,} members has another split than was given for its tar, such as "
            f"{resplit[0]}; the given one is used"
        )
    for note in notes_on_fields(unused):
        report(note)
    return list(found.values())


def _index(
    location: Path | str,
    folder: Path,
    split: str,
    number: int,
    *,
    has_features: bool,
    report: Callable[[str], None],
) -> Shard:
    name = f"{split}-{number:06d}"
    with local_copy(location) as path:
        table = write_index(path, folder / f"{name}.parquet", name=location, report=report)
        size, sha256 = path.stat().st_size, sha256_of_file(path)
    num_samples = len(rows_of_extension(table, "json")["qid"])
    if not num_samples:
        raise ShardError(f"{location} contains no .json member; expected one {{qid}}.json for each question")
    orphans = set(table["qid"].to_pylist()) - set(rows_of_extension(table, "json")["qid"])
    if orphans:
        report(
            f"{location}: members of {len(orphans):,} names belong to no question, such as those of {min(orphans)!r} "
            f"(there is no {min(orphans)}.json); they are left out"
        )
    read = {"json", "npy"} if has_features else {"json"}
    members = zip(table["qid"].to_pylist(), table["extension"].to_pylist(), strict=True)
    endings = Counter(ending for qid, ending in members if qid not in orphans)
    unread = {ending: times for ending, times in endings.items() if ending not in read and not is_picture(ending)}
    for ending, times in unread.items():
        why = "give them a name by --features NAME" if ending == "npy" else "pictures, .json and .npy are"
        report(f"note: {location}: {times:,} members ending in .{ending} are not read; {why}")
    place = str(location if is_remote(location) else Path(location).absolute())
    return Shard(name, split, num_samples, size, sha256, place, sha256_of_file(folder / f"{name}.parquet"))


def _index_features(folder: Path, text: Path, shards: list[Shard], name: str, text_fingerprint: str) -> None:
    counts = {split: dict.fromkeys(PICTURE_COUNTS, 0) for split in SPLITS}
    num_patches, dims = 0, set()
    for shard in shards:
        with local_copy(shard.tar(text)) as path, open(path, "rb") as file:
            table = write_index(path, shard.index(folder), name=shard.path)
            rows, qids = rows_of_extension(table, "npy"), rows_of_extension(table, "json")["qid"]
            if not np.array_equal(rows["qid"], qids):
                raise ShardError(
                    f"{shard.path}: every question needs one .npy of features (of shape [0, D] without a picture)"
                )
            for qid, offset, size, crc32 in zip(*rows.values(), strict=True):
                place = f"{shard.path}, member {qid}.npy"
                data = read_member(file.fileno(), offset=offset, size=size, crc32=crc32, name=(shard.tar(text), qid))
                array = _check_features(parse_npy(data, name=place), place)
                num_patches = max(num_patches, len(array))
                dims.add(array.shape[1])
                counts[shard.split]["num_with_features" if len(array) else "num_no_image"] += 1
    if len(dims) != 1:
        raise ShardError(f"the features have different widths {sorted(dims)}; expected one width")
    extra = {
        "feature": name,
        "num_patches": num_patches,
        "dim": dims.pop(),
        "dtype": "float",
        "counts": counts,
        "text_fingerprint": text_fingerprint,
    }
    shards = [dataclasses.replace(shard, index_sha256=sha256_of_file(shard.index(folder))) for shard in shards]
    write_manifest(folder, "features", shards, extra)


def _check_features(array: np.ndarray, place: str) -> np.ndarray:
    if array.ndim != 2:
        raise ShardError(f"{place}: features of shape {array.shape}, expected [patches, width]")
    with np.errstate(over="ignore"):
        finite = np.isfinite(array.astype(np.float32, copy=False)).all()  # a model reads float32
    if not finite:
        raise ShardError(
            f"{place}: features contain NaN or infinite values, or values beyond float32, expected finite ones; "
            "make it again"
        )
    return array
