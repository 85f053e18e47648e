"""Writing the data folder: text shards, and feature shards beside them.

    text/train-000000.tar       {qid}.json   the problem, every ScienceQA field and the caption
    text/train-000000.parquet   its index
    text/manifest.json          schema version, shards, counts, sha256, fingerprint (last)
    features/patch/train-000000.tar   {qid}.npy   float16 [p, D], p = 0 without a usable picture
    features/patch/manifest.json

A feature tar has every key of its text tar in the same order. Raw text, not tokens: both
stages, every prompt format and any tokenizer share one build. The same input gives the
same bytes. Adding a feature never touches the text.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_shards.index import ShardError, build_index, read_index, read_member, rows_of_extension, write_index
from data_shards.picture_features import PICTURE_COUNTS
from data_shards.sources.question_set import SPLITS, QuestionSet
from data_shards.remote_files import fetch_file, is_remote, local_copy
from data_shards.atomic_files import commit_json, committing, fingerprint, read_json, sha256_of_file
from data_shards.sources.tables import row_to_record
from mmcot.texts.problem import Problem, ProblemError

SCHEMA_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One tar of a manifest; ``name`` has no suffix, such as ``train-000012``.

    ``path`` is where the tar lies if it is a user's own, indexed in place; the index is
    always in the manifest's folder.
    """

    name: str
    split: str
    num_samples: int
    size_bytes: int
    sha256: str
    path: str | None = None

    def tar(self, folder: Path) -> Path | str:
        """The tar of a shard whose manifest lies in ``folder``: a path, or the URL of a remote one."""
        if self.path is None:
            return folder / f"{self.name}.tar"
        return self.path if "://" in self.path else Path(self.path)

    def index(self, folder: Path) -> Path:
        """The index of that tar."""
        return folder / f"{self.name}.parquet"

    @property
    def number(self) -> int:
        """Its number in its split."""
        return int(self.name.rpartition("-")[2])


def write_text_shards(
    questions: QuestionSet, shards_dir: str | Path, *, samples_per_shard: int
) -> dict[str, Any]:
    """Write the problems of every split into ``shards_dir/text`` and return its manifest."""
    folder = Path(shards_dir) / "text"
    shards = []
    for split in SPLITS:
        problems = questions.problems[split]
        for number, start in enumerate(range(0, len(problems), samples_per_shard)):
            chunk = problems[start : start + samples_per_shard]
            members = ((f"{problem.qid}.json", _json_bytes(problem.to_record())) for problem in chunk)
            shards.append(_write_shard(folder, split, number, members, len(chunk)))
    everything = [problem for split in SPLITS for problem in questions.problems[split]]
    return write_manifest(
        folder, "text", shards, {"counts": count_questions(everything), "lists": questions.lists, "ceilings": questions.ceilings}
    )


def count_questions(problems: Sequence[Problem]) -> dict[str, int]:
    """How many questions have what, as the text manifest states it."""
    return {
        "num_captions": sum(bool(problem.caption) for problem in problems),
        "num_with_image": sum(bool(problem.images) for problem in problems),
        "num_with_hint": sum(bool(problem.hint) for problem in problems),
        "num_with_both": sum(bool(problem.images and problem.hint) for problem in problems),
    }


def write_feature_shards(
    shards_dir: str | Path,
    *,
    name: str,
    features_of: Callable[[Problem, Counter[str]], np.ndarray],
    shape: tuple[int, int],
) -> dict[str, Any]:
    """Write one feature array a problem into ``shards_dir/features/name`` and return its manifest.

    Args:
        features_of: problem to its array, float16 [p, D] with p <= P; counts what it met
            under the names of ``PICTURE_COUNTS``.
        shape: [P, D].
    """
    for shard in missing_feature_shards(shards_dir, name=name):
        write_feature_shard(
            shards_dir, name=name, shard=shard, arrays_of=lambda problems, counts: (features_of(problem, counts) for problem in problems)
        )
    return close_feature(shards_dir, name=name, shape=shape)


def missing_feature_shards(shards_dir: str | Path, *, name: str) -> list[Shard]:
    """The text shards whose features are not committed yet."""
    folder = Path(shards_dir) / "features" / name
    return [shard for shard in manifest_shards(read_manifest(Path(shards_dir) / "text")) if not _note(folder, shard).exists()]


def write_feature_shard(
    shards_dir: str | Path, *, name: str, shard: Shard, arrays_of: Callable[[Iterator[Problem], Counter[str]], Iterable[np.ndarray]]
) -> dict[str, int]:
    """Write the features of one text shard, committed with a note that ``close_feature`` reads; returns what was counted.

    Args:
        arrays_of: the shard's problems to their arrays, in order; counts what it met.
    """
    folder, counts = Path(shards_dir) / "features" / name, Counter(dict.fromkeys(PICTURE_COUNTS, 0))
    named, computed = itertools.tee(read_problems(Path(shards_dir) / "text", shard))
    arrays = ((f"{problem.qid}.npy", _npy_bytes(array)) for problem, array in zip(named, arrays_of(computed, counts), strict=True))
    written = _write_shard(folder, shard.split, shard.number, arrays, shard.num_samples)
    commit_json(_note(folder, shard), {"shard": dataclasses.asdict(written), "counts": dict(counts)})
    return dict(counts)


def close_feature(shards_dir: str | Path, *, name: str, shape: tuple[int, int]) -> dict[str, Any]:
    """Commit the manifest of a feature all of whose shards are written, and return it."""
    folder, text = Path(shards_dir) / "features" / name, read_manifest(Path(shards_dir) / "text")
    notes = {shard: read_json(_note(folder, shard)) for shard in manifest_shards(text)}
    counts = {split: Counter(dict.fromkeys(PICTURE_COUNTS, 0)) for split in SPLITS}
    for shard, note in notes.items():
        counts[shard.split].update(note["counts"])
    extra = {
        "feature": name, "num_patches": shape[0], "dim": shape[1], "dtype": "float16",
        "counts": {split: dict(count) for split, count in counts.items()}, "text_fingerprint": text["fingerprint"],
    }  # fmt: skip
    manifest = write_manifest(folder, "features", [Shard(**note["shard"]) for note in notes.values()], extra)
    for shard in notes:
        _note(folder, shard).unlink()
    return manifest


def _note(folder: Path, shard: Shard) -> Path:
    """What stands beside a feature shard until the feature's manifest does: it is whole, and what it met."""
    return folder / f"{shard.name}.done.json"


def read_problems(folder: Path, shard: Shard) -> Iterator[Problem]:
    """The problems of a text shard in tar order."""
    rows = rows_of_extension(open_index(folder, shard), "json")
    with local_copy(shard.tar(folder)) as path, open(path, "rb") as file:
        for qid, offset, size, crc32 in zip(*rows.values(), strict=True):
            name = (shard.tar(folder), qid)
            data = read_member(file.fileno(), offset=offset, size=size, crc32=crc32, name=name)
            yield problem_of_member(qid, data, tar=shard.tar(folder))


def problem_of_member(qid: str, data: bytes, *, tar: str | Path) -> Problem:
    """The problem in a ``{qid}.json`` member, in ScienceQA's field names or those of a table.

    Raises:
        ProblemError: it is no JSON object, or the question in it cannot be used; the tar and the member are named.
    """
    try:
        row = json.loads(data)
        if not isinstance(row, dict):
            raise ProblemError(f"expected an object with a question's fields, found {str(row)[:80]!r}")
        return Problem.from_scienceqa(qid, row_to_record(row))
    except ProblemError as error:
        raise ProblemError(f"{tar}, member {qid}.json: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ProblemError(f"{tar}, member {qid}.json: no valid JSON ({error}); write the shard again") from None


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read ``folder/manifest.json``.

    Raises:
        ShardError: there is none (the build did not finish), or its schema is another.
    """
    path = Path(folder) / "manifest.json"
    if not path.exists():
        raise ShardError(f"{path} does not exist: the folder was not built to its end; run `mmcot data shard` or `mmcot data index` again")
    manifest = read_json(path)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ShardError(
            f"{path} has schema version {manifest.get('schema_version')!r}, this program reads {SCHEMA_VERSION}; "
            "build the shards again with `mmcot data shard` into a new folder"
        )
    return manifest


def manifest_shards(manifest: dict[str, Any], split: str | None = None) -> list[Shard]:
    """The shards of a manifest, of one split or of all, in order."""
    for shard in manifest["shards"]:
        if not _NAME.fullmatch(shard["name"]) or shard["split"] not in SPLITS:  # both become file names
            raise ShardError(
                f"a manifest names a shard {shard['name']!r} of split {shard['split']!r}, expected such as train-000012 of {', '.join(SPLITS)}; "
                "build the shards again"
            )
    return [Shard(**shard) for shard in manifest["shards"] if split in (None, shard["split"])]


def shard_qids(folder: Path, shard: Shard, extension: str) -> list[str]:
    """The qids of a shard in tar order, from its index."""
    return rows_of_extension(open_index(folder, shard), extension)["qid"].tolist()


def open_index(folder: Path, shard: Shard) -> pa.Table:
    """Read a shard's index; that of a mirrored folder is fetched when it is first needed."""
    path, tar = shard.index(folder), str(shard.tar(folder))
    if not path.exists() and is_remote(tar):
        fetch_file(tar.removesuffix(".tar") + ".parquet", path)
    return read_index(path)


def check_shards(shards_dir: str | Path) -> Iterator[tuple[str, int]]:
    """Hold every shard against its manifest and index, and read it to its end; yield (shard path, samples) as they pass.

    Raises:
        ShardError: a file is missing, altered, no whole tar, or its keys are not those of the text.
    """
    shards_dir = Path(shards_dir)
    text = read_manifest(shards_dir / "text")
    folders = [shards_dir / "text", *sorted(path.parent for path in shards_dir.glob("features/*/manifest.json"))]
    for folder in folders:
        manifest = read_manifest(folder)
        if manifest.get("text_fingerprint", text["fingerprint"]) != text["fingerprint"]:
            raise ShardError(f"{folder} was built for other text shards; delete it and build the feature again")
        extension = {"text": "json", "features": "npy"}[manifest["kind"]]
        for shard, text_shard in zip(manifest_shards(manifest), manifest_shards(text), strict=True):
            _check_shard(folder, shard, extension, shard_qids(shards_dir / "text", text_shard, "json"))
            yield f"{folder.relative_to(shards_dir)}/{shard.name}", shard.num_samples


def _check_shard(folder: Path, shard: Shard, extension: str, qids: list[str]) -> None:
    tar = shard.tar(folder)
    try:
        with local_copy(tar) as path:
            if (digest := sha256_of_file(path)) != shard.sha256:
                raise ShardError(f"{tar} has sha256 {digest}, its manifest says {shard.sha256}; the shard was cut off or altered")
            table = build_index(path, name=tar)
    except FileNotFoundError:
        raise ShardError(f"{tar} is missing; fetch it, or build the shards again") from None
    if not table.equals(open_index(folder, shard)):
        raise ShardError(
            f"{shard.index(folder)} does not list the {len(table):,} members of {tar}; one of them was altered: make the index again "
            "with `mmcot data shard` or `mmcot data index`"
        )
    found = shard_qids(folder, shard, extension)
    if found != qids or len(found) != shard.num_samples:
        raise ShardError(f"{tar} does not hold the keys of its text shard in their order; build it again")


def _write_shard(folder: Path, split: str, number: int, members: Iterable[tuple[str, bytes]], num_samples: int) -> Shard:
    path = folder / f"{split}-{number:06d}.tar"
    with committing(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)  # mtime, uid and gid 0: the same input gives the same bytes
            info.size, info.mode = len(data), 0o444
            tar.addfile(info, io.BytesIO(data))
    write_index(path, path.with_suffix(".parquet"))
    return Shard(path.stem, split, num_samples, path.stat().st_size, sha256_of_file(path))


def write_manifest(folder: Path, kind: str, shards: list[Shard], extra: dict[str, Any]) -> dict[str, Any]:
    """Commit the manifest of a folder of shards, its last file, and return it."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "num_samples": {split: sum(s.num_samples for s in shards if s.split == split) for split in SPLITS},
        **extra,
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }
    manifest = {**content, "fingerprint": fingerprint(content)}
    commit_json(folder / "manifest.json", manifest)
    return manifest


def _json_bytes(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()
