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
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_shards.index import ShardError, index_path, read_index, write_index
from data_shards.scienceqa import SPLITS, ScienceQA
from data_shards.storage import commit_json, committing, fingerprint, read_json, sha256_of_file
from mmcot.problem import Problem

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Shard:
    """One tar of a manifest; ``name`` has no suffix, such as ``train-000012``."""

    name: str
    split: str
    num_samples: int
    size_bytes: int
    sha256: str


def write_text_shards(data: ScienceQA, shards_dir: str | Path, *, samples_per_shard: int) -> dict[str, Any]:
    """Write the problems of every split into ``shards_dir/text`` and return its manifest."""
    folder = Path(shards_dir) / "text"
    shards = []
    for split in SPLITS:
        problems = data.problems[split]
        for number, start in enumerate(range(0, len(problems), samples_per_shard)):
            chunk = problems[start : start + samples_per_shard]
            members = ((f"{problem.qid}.json", _json_bytes(problem.to_record())) for problem in chunk)
            shards.append(_write_shard(folder, split, number, members, len(chunk)))
    counts = {
        "num_captions": data.num_captions,
        "num_with_image": sum(bool(p.images) for split in SPLITS for p in data.problems[split]),
        "num_with_hint": sum(bool(p.hint) for split in SPLITS for p in data.problems[split]),
    }
    extra = {"counts": counts, "lists": data.lists, "ceilings": data.ceilings}
    return _write_manifest(folder, "text", shards, extra)


def write_feature_shards(
    data: ScienceQA,
    shards_dir: str | Path,
    *,
    name: str,
    featurize: Callable[[Image.Image], np.ndarray],
    shape: tuple[int, int],
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write one feature array a problem into ``shards_dir/features/name`` and return its manifest.

    Args:
        featurize: picture to float16 array of ``shape``.
        shape: [P, D].
        report: called with (samples done, samples in all) after each shard.
    """
    folder = Path(shards_dir) / "features" / name
    text = read_manifest(Path(shards_dir) / "text")
    counts = {s: Counter(num_with_features=0, num_no_image=0, num_picture_absent=0) for s in SPLITS}
    by_qid = {problem.qid: problem for split in SPLITS for problem in data.problems[split]}
    shards, done, total = [], 0, len(by_qid)
    for text_shard in manifest_shards(text):
        qids = shard_qids(Path(shards_dir) / "text" / f"{text_shard.name}.tar")
        count = counts[text_shard.split]
        arrays = ((f"{qid}.npy", _npy_bytes(_features(data, by_qid[qid], featurize, shape, count))) for qid in qids)
        number = int(text_shard.name.rpartition("-")[2])
        shards.append(_write_shard(folder, text_shard.split, number, arrays, len(qids)))
        done += len(qids)
        report(done, total)
    extra = {
        "feature": name, "num_patches": shape[0], "dim": shape[1], "dtype": "float16",
        "counts": {split: dict(count) for split, count in counts.items()}, "text_fingerprint": text["fingerprint"],
    }  # fmt: skip
    return _write_manifest(folder, "features", shards, extra)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read ``folder/manifest.json``.

    Raises:
        ShardError: there is none (the build did not finish), or its schema is another.
    """
    path = Path(folder) / "manifest.json"
    if not path.exists():
        raise ShardError(f"{path} does not exist: the folder was not built to its end; run `mmcot data shard`")
    manifest = read_json(path)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ShardError(
            f"{path} has schema version {manifest.get('schema_version')!r}, this program reads {SCHEMA_VERSION}; "
            "build the shards again with `mmcot data shard` into a new folder"
        )
    return manifest


def manifest_shards(manifest: dict[str, Any], split: str | None = None) -> list[Shard]:
    """The shards of a manifest, of one split or of all, in order."""
    return [Shard(**shard) for shard in manifest["shards"] if split in (None, shard["split"])]


def shard_qids(tar_path: str | Path) -> list[str]:
    """The qids of a shard in tar order, from its index."""
    return read_index(tar_path)["qid"].to_pylist()


def check_shards(shards_dir: str | Path) -> Iterator[tuple[str, int]]:
    """Hold every shard against its manifest and index; yield (shard path, samples) as they pass.

    Raises:
        ShardError: a file is missing, altered, or its keys are not those of the text.
    """
    shards_dir = Path(shards_dir)
    text = read_manifest(shards_dir / "text")
    folders = [shards_dir / "text", *sorted(path.parent for path in shards_dir.glob("features/*/manifest.json"))]
    for folder in folders:
        manifest = read_manifest(folder)
        if manifest.get("text_fingerprint", text["fingerprint"]) != text["fingerprint"]:
            raise ShardError(f"{folder} was built for other text shards; delete it and build the feature again")
        for shard in manifest_shards(manifest):
            tar = folder / f"{shard.name}.tar"
            _check_shard(tar, shard, shard_qids(shards_dir / "text" / tar.name))
            yield str(tar.relative_to(shards_dir)), shard.num_samples


def _check_shard(tar: Path, shard: Shard, qids: list[str]) -> None:
    if not tar.exists():
        raise ShardError(f"{tar} is missing; fetch it, or build the shards again")
    digest = sha256_of_file(tar)
    if digest != shard.sha256:
        raise ShardError(f"{tar} has sha256 {digest}, its manifest says {shard.sha256}; the shard was cut off or altered")
    if not index_path(tar).exists():
        raise ShardError(f"{index_path(tar)} is missing; build the shards again")
    found = shard_qids(tar)
    if found != qids or len(found) != shard.num_samples:
        raise ShardError(f"{tar} does not hold the keys of its text shard in their order; build it again")


def _features(
    data: ScienceQA,
    problem: Problem,
    featurize: Callable[[Image.Image], np.ndarray],
    shape: tuple[int, int],
    counts: Counter[str],
) -> np.ndarray:
    paths = [path for path in data.image_paths(problem) if path.exists()]
    if not paths:
        counts["num_picture_absent" if problem.images else "num_no_image"] += 1
        return np.zeros((0, shape[1]), dtype=np.float16)
    counts["num_with_features"] += 1
    with Image.open(paths[0]) as image:
        array = featurize(image)
    if array.shape != shape or array.dtype != np.float16:
        raise ValueError(f"question {problem.qid}: features of {array.dtype}{array.shape}, expected float16{shape}")
    return array


def _write_shard(folder: Path, split: str, number: int, members: Iterable[tuple[str, bytes]], num_samples: int) -> Shard:
    path = folder / f"{split}-{number:06d}.tar"
    with committing(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)  # mtime, uid and gid 0: the same input gives the same bytes
            info.size, info.mode = len(data), 0o444
            tar.addfile(info, io.BytesIO(data))
    write_index(path)
    return Shard(path.stem, split, num_samples, path.stat().st_size, sha256_of_file(path))


def _write_manifest(folder: Path, kind: str, shards: list[Shard], extra: dict[str, Any]) -> dict[str, Any]:
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
