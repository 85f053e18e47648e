"""Manifests of finished shards, and their contents: shards, indexes and questions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_shards.errors import ShardError
from data_shards.index import is_picture, picture_order, read_index, read_member, rows_of_extension
from data_shards.json_shapes import Whole, fault_of_shape, read_record
from data_shards.picture_features import PICTURE_COUNTS
from data_shards.remote_files import fetch_file, is_remote, local_copy
from data_shards.sealed_json import broken_seal
from data_shards.sources.question_set import SPLITS
from data_shards.sources.row_samples import sample_of_row
from data_shards.strict_json import parse_json
from mmcot.texts.sample import Sample, SampleError

SCHEMA_VERSION = 1
ORIGIN = "origin.json"  # beside the manifest of a mirrored folder: its URL
_REMEDY = "restore it, or build the shards again with `mmcot data shard` or `mmcot data index`"
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_COUNTS = {split: Whole() for split in SPLITS}
_OF_EVERY = {
    "kind": str,
    "num_samples": _COUNTS,
    "shards": [
        {
            "name": str,
            "split": str,
            "num_samples": Whole(),
            "size_bytes": Whole(),
            "sha256": str,
            "path?": (str, None),
            "index_sha256?": (str, None),
        }
    ],
    "fingerprint": str,
}
_PICTURES = {f"{name}?": Whole() for name in PICTURE_COUNTS}
_PICTURES |= {"num_with_features": Whole(), "num_no_image": Whole()}
_OF_KIND = {
    "text": {
        "counts": {str: Whole()},
        "lists": {str: [str]},
        "ceilings": (dict, None),
    },
    "features": {
        "feature": str,
        "num_patches": Whole(),
        "dim": Whole(),
        "dtype": str,
        "counts": dict.fromkeys(SPLITS, _PICTURES),
        "text_fingerprint": str,
    },
}
_ORIGIN = {"url": str}


@dataclasses.dataclass(frozen=True)
class Shard:
    """One tar of a manifest; ``name`` has no suffix, such as ``train-000012``.

    ``path`` is the location of a user's own tar that was indexed in place; the index is always
    in the manifest's folder. ``index_sha256`` is None in manifests of earlier versions.
    """

    name: str
    split: str
    num_samples: int
    size_bytes: int
    sha256: str
    path: str | None = None
    index_sha256: str | None = None

    def tar(self, folder: Path) -> Path | str:
        """The path or URL of the tar, where ``folder`` contains the manifest."""
        if self.path is None:
            return folder / f"{self.name}.tar"
        return self.path if "://" in self.path else Path(self.path)

    def index(self, folder: Path) -> Path:
        """The path of the tar's index."""
        return folder / f"{self.name}.parquet"

    @property
    def number(self) -> int:
        """The number of the shard in its split."""
        return int(self.name.rpartition("-")[2])


def read_problems(folder: Path, shard: Shard) -> Iterator[Sample]:
    """Yield the problems of a text shard in tar order.

    Pictures among its members are those of a question that names none.
    """
    for qid, data, pictures in json_members(folder, shard):
        yield with_pictures(problem_of_member(qid, data, tar=shard.tar(folder)), pictures)


def json_members(folder: Path, shard: Shard) -> Iterator[tuple[str, bytes, list[str]]]:
    """Yield the qid and the bytes of each ``{qid}.json`` in tar order, with the names of its picture members."""
    table = open_index(folder, shard)
    rows, pictures = rows_of_extension(table, "json"), _pictures_of(table)
    with local_copy(shard.tar(folder)) as path, open(path, "rb") as file:
        for qid, offset, size, crc32 in zip(*rows.values(), strict=True):
            name = (shard.tar(folder), qid)
            data = read_member(file.fileno(), offset=offset, size=size, crc32=crc32, name=name)
            yield qid, data, pictures.get(qid, [])


def with_pictures(problem: Sample, pictures: list[str]) -> Sample:
    """Return the sample with these pictures, if it names none."""
    return problem if problem.images or not pictures else dataclasses.replace(problem, images=tuple(pictures))


def _pictures_of(table: pa.Table) -> dict[str, list[str]]:
    """The names of a tar's picture members by their question."""
    found: dict[str, list[str]] = {}
    for extension in sorted(filter(is_picture, set(table["extension"].to_pylist())), key=picture_order):
        for qid in rows_of_extension(table, extension)["qid"]:
            found.setdefault(qid, []).append(f"{qid}.{extension}")
    return found


def problem_of_member(qid: str, data: bytes, *, tar: str | Path) -> Sample:
    """Parse the sample in a ``{qid}.json`` member, in ScienceQA's field names or those of a table.

    Raises:
        InputError: it is no JSON object, or its question is not valid; the message names tar and member.
    """
    try:
        return sample_of_row(qid, row_of_member(qid, data, tar=tar))
    except SampleError as error:
        raise (error if error.file else error.at(tar, member=f"member {qid}.json")) from None


def row_of_member(qid: str, data: bytes, *, tar: str | Path) -> dict[str, Any]:
    """Parse the fields of a ``{qid}.json`` member.

    Raises:
        InputError: it is no JSON object; the message names tar and member.
    """
    member = f"member {qid}.json"
    row = parse_json(data, tar, member=member)
    if not isinstance(row, dict):
        raise SampleError(f"expected an object with a question's fields, found {str(row)[:80]!r}").at(
            tar, member=member
        )
    return row


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read ``folder/manifest.json``; that of a mirrored folder gets the URLs of its tars.

    Raises:
        ShardError: there is none (the build did not finish), it was altered, or has another schema version or shape.
        InputError: it is no JSON object.
    """
    path = Path(folder) / "manifest.json"
    if not path.exists():
        raise ShardError(
            f"{path} does not exist: the build of the folder did not finish; run `mmcot data shard` or `mmcot data "
            "index` again"
        )
    manifest = read_record(path, dict, remedy=_REMEDY)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ShardError(
            f"{path} has schema version {manifest.get('schema_version')!r}, this program reads {SCHEMA_VERSION}; "
            "build the shards again with `mmcot data shard` into a new folder"
        )
    if reason := broken_seal(manifest):
        raise ShardError(f"{path} cannot be used: {reason}; {_REMEDY}")
    check_shape(manifest, path)
    origin = path.with_name(ORIGIN)
    if not origin.exists():
        return manifest
    return with_urls(manifest, read_record(origin, _ORIGIN, remedy=f"delete {path.parent.parent} and run again")["url"])


def check_shape(manifest: dict[str, Any], name: object) -> None:
    """Verify that a manifest has what its readers need.

    Args:
        name: its path or URL, for messages.

    Raises:
        ShardError: it has not.
    """
    fault = fault_of_shape(manifest, _OF_EVERY)
    if fault is None and manifest["kind"] not in _OF_KIND:
        fault = f"the key 'kind' is {manifest['kind']!r}, expected one of {', '.join(_OF_KIND)}"
    fault = fault or fault_of_shape(manifest, _OF_KIND[manifest["kind"]])
    known = {field.name for field in dataclasses.fields(Shard)}
    if fault is None and (unknown := {key for shard in manifest["shards"] for key in shard} - known):
        fault = f"a shard has the unknown key {min(unknown)!r}, expected {', '.join(sorted(known))}"
    if fault is None:
        fault = _fault_of_shards(manifest)
    if fault is not None:
        raise ShardError(f"{name} cannot be used: {fault}; {_REMEDY}")


def _fault_of_shards(manifest: dict[str, Any]) -> str | None:
    """What is wrong with the names and numbers of shards, which are used in file names and sums."""
    shards = manifest["shards"]
    if fault := _fault_of_names(manifest):
        return fault
    for split, number in manifest["num_samples"].items():
        found = sum(shard["num_samples"] for shard in shards if shard["split"] == split)
        if found != number:
            return f"it counts {number:,} samples of {split}, its shards have {found:,}"
    return None


def _fault_of_names(manifest: dict[str, Any]) -> str | None:
    """Which shard has a name or split that may be no part of a file's name; None where all are fine."""
    for shard in manifest["shards"]:
        if not _NAME.fullmatch(shard["name"]) or shard["split"] not in SPLITS:
            return (
                f"it names a shard {shard['name']!r} of split {shard['split']!r}, expected such as train-000012 of "
                f"{', '.join(SPLITS)}"
            )
    return None


def with_urls(manifest: dict[str, Any], url: str) -> dict[str, Any]:
    """The manifest of the folder at ``url``, with the full URL of every tar."""
    shards = [{**shard, "path": shard["path"] or f"{url}/{shard['name']}.tar"} for shard in manifest["shards"]]
    return {**manifest, "shards": shards}


def manifest_shards(manifest: dict[str, Any], split: str | None = None) -> list[Shard]:
    """Return the shards of a manifest, of one split or of all, in order."""
    if fault := _fault_of_names(manifest):
        raise ShardError(f"a manifest cannot be used: {fault}; {_REMEDY}")
    return [Shard(**shard) for shard in manifest["shards"] if split in (None, shard["split"])]


def shard_qids(folder: Path, shard: Shard, extension: str) -> list[str]:
    """Return the qids of a shard in tar order, from its index."""
    return rows_of_extension(open_index(folder, shard), extension)["qid"].tolist()


def open_index(folder: Path, shard: Shard) -> pa.Table:
    """Read a shard's index; that of a mirrored folder is downloaded at its first use.

    Raises:
        ShardError: it is missing, or not the one that the manifest names, or a member would lie outside the tar.
    """
    path, tar = shard.index(folder), str(shard.tar(folder))
    if not path.exists() and is_remote(tar):
        fetch_file(tar.removesuffix(".tar") + ".parquet", path)
    table = read_index(path, sha256=shard.index_sha256)
    offsets, sizes = (table[name].to_numpy() for name in ("offset", "size"))
    room = shard.size_bytes
    if ((offsets < 0) | (offsets > room) | (sizes < 0) | (sizes > room - offsets)).any():
        raise ShardError(
            f"{path} has members outside of {tar}, which has {room:,} bytes by its manifest; restore it, or build it "
            "again with `mmcot data shard` or `mmcot data index`"
        )
    return table
