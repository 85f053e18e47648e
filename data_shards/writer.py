"""Writing the data folder: text shards and feature shards.

    text/train-000000.tar       {qid}.json   the problem, every ScienceQA field and the caption
    text/train-000000.parquet   its index
    text/manifest.json          schema version, shards, counts, sha256, fingerprint (last)
    features/patch/train-000000.tar   {qid}.npy   float16 [p, D], p = 0 without a usable picture
    features/patch/manifest.json

A feature tar has the keys of its text tar in the same order. Shards contain raw text, not
tokens: both stages, every prompt format and any tokenizer share one build. The same input
gives the same bytes. Adding a feature never changes the text.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.atomic_files import (
    commit_json,
    committing,
    read_json,
    sha256_of_file,
)
from data_shards.index import write_index
from data_shards.manifest import (
    SCHEMA_VERSION,
    Shard,
    manifest_shards,
    read_manifest,
    read_problems,
)
from data_shards.picture_features import PICTURE_COUNTS
from data_shards.sealed_json import sealed
from data_shards.sources.question_set import SPLITS, QuestionSet
from mmcot.texts.sample import Sample


def write_text_shards(questions: QuestionSet, shards_dir: str | Path, *, samples_per_shard: int) -> dict[str, Any]:
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
        folder,
        "text",
        shards,
        {"counts": count_questions(everything), "lists": questions.lists, "ceilings": questions.ceilings},
    )


def count_questions(problems: Sequence[Sample]) -> dict[str, int]:
    """The counts of questions in the text manifest."""
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
    features_of: Callable[[Sample, Counter[str]], np.ndarray],
    shape: tuple[int, int],
) -> dict[str, Any]:
    """Write one feature array per problem into ``shards_dir/features/name`` and return its manifest.

    Args:
        features_of: maps a problem to its array, float16 [p, D] with p <= P, and counts pictures
            under the names of ``PICTURE_COUNTS``.
        shape: [P, D].
    """
    for shard in missing_feature_shards(shards_dir, name=name):
        write_feature_shard(
            shards_dir,
            name=name,
            shard=shard,
            arrays_of=lambda problems, counts: (features_of(problem, counts) for problem in problems),
        )
    return close_feature(shards_dir, name=name, shape=shape)


def missing_feature_shards(shards_dir: str | Path, *, name: str) -> list[Shard]:
    """Return the text shards that have no committed features yet."""
    folder = Path(shards_dir) / "features" / name
    return [
        shard
        for shard in manifest_shards(read_manifest(Path(shards_dir) / "text"))
        if not _note(folder, shard).exists()
    ]


def write_feature_shard(
    shards_dir: str | Path,
    *,
    name: str,
    shard: Shard,
    arrays_of: Callable[[Iterator[Sample], Counter[str]], Iterable[np.ndarray]],
) -> dict[str, int]:
    """Write and commit the features of one text shard.

    Args:
        arrays_of: maps the shard's problems to their arrays, in order, and counts pictures under the names of
            ``PICTURE_COUNTS``.

    Returns:
        The counts, which are also in the note that ``close_feature`` reads.
    """
    folder, counts = Path(shards_dir) / "features" / name, Counter(dict.fromkeys(PICTURE_COUNTS, 0))
    named, computed = itertools.tee(read_problems(Path(shards_dir) / "text", shard))
    arrays = (
        (f"{problem.qid}.npy", _npy_bytes(array))
        for problem, array in zip(named, arrays_of(computed, counts), strict=True)
    )
    written = _write_shard(folder, shard.split, shard.number, arrays, shard.num_samples)
    commit_json(_note(folder, shard), {"shard": dataclasses.asdict(written), "counts": dict(counts)})
    return dict(counts)


def close_feature(shards_dir: str | Path, *, name: str, shape: tuple[int, int]) -> dict[str, Any]:
    """Commit and return the manifest of a feature after all its shards."""
    folder, text = Path(shards_dir) / "features" / name, read_manifest(Path(shards_dir) / "text")
    notes = {shard: read_json(_note(folder, shard)) for shard in manifest_shards(text)}
    counts = {split: Counter(dict.fromkeys(PICTURE_COUNTS, 0)) for split in SPLITS}
    for shard, note in notes.items():
        counts[shard.split].update(note["counts"])
    extra = {
        "feature": name,
        "num_patches": shape[0],
        "dim": shape[1],
        "dtype": "float16",
        "counts": {split: dict(count) for split, count in counts.items()},
        "text_fingerprint": text["fingerprint"],
    }
    manifest = write_manifest(folder, "features", [Shard(**note["shard"]) for note in notes.values()], extra)
    for shard in notes:
        _note(folder, shard).unlink()
    return manifest


def _note(folder: Path, shard: Shard) -> Path:
    """The note of a complete feature shard with its counts; it is removed once the feature has its manifest."""
    return folder / f"{shard.name}.done.json"


def _write_shard(
    folder: Path, split: str, number: int, members: Iterable[tuple[str, bytes]], num_samples: int
) -> Shard:
    path = folder / f"{split}-{number:06d}.tar"
    with committing(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)  # mtime, uid and gid 0: the same input gives the same bytes
            info.size, info.mode = len(data), 0o444
            tar.addfile(info, io.BytesIO(data))
    index = path.with_suffix(".parquet")
    write_index(path, index)
    sha256, index_sha256 = sha256_of_file(path), sha256_of_file(index)
    return Shard(path.stem, split, num_samples, path.stat().st_size, sha256, index_sha256=index_sha256)


def write_manifest(folder: Path, kind: str, shards: list[Shard], extra: dict[str, Any]) -> dict[str, Any]:
    """Commit the manifest of a folder of shards, its last file, and return it."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "num_samples": {split: sum(s.num_samples for s in shards if s.split == split) for split in SPLITS},
        **extra,
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }
    manifest = sealed(content)
    commit_json(folder / "manifest.json", manifest)
    return manifest


def _json_bytes(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()
