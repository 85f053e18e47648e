"""Verifying shards against their manifest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_shards.atomic_files import sha256_of_file
from data_shards.errors import ShardError
from data_shards.index import build_index
from data_shards.manifest import (
    Shard,
    manifest_shards,
    open_index,
    read_manifest,
    shard_qids,
)
from data_shards.remote_files import local_copy


def check_shards(shards_dir: str | Path) -> Iterator[tuple[str, int]]:
    """Verify every shard against its manifest and index; yield (shard path, samples) of each valid one.

    Raises:
        ShardError: a file is missing, changed, not a complete tar, or its keys differ from those of the text.
    """
    shards_dir = Path(shards_dir)
    text = read_manifest(shards_dir / "text")
    folders = [shards_dir / "text", *sorted(path.parent for path in shards_dir.glob("features/*/manifest.json"))]
    for folder in sorted(path for path in shards_dir.glob("features/*") if path.is_dir()):
        if folder not in folders:
            raise ShardError(f"{folder} has no manifest: its build did not finish; run `mmcot data shard` again")
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
                raise ShardError(
                    f"{tar} has sha256 {digest}, its manifest has {shard.sha256}; the shard was cut off or "
                    "altered: restore it, or build the shards again"
                )
            table = build_index(path, name=tar)
    except FileNotFoundError:
        raise ShardError(f"{tar} is missing; fetch it, or build the shards again") from None
    if not table.equals(open_index(folder, shard)):
        raise ShardError(
            f"{shard.index(folder)} does not list the {len(table):,} members of {tar}; one of the two files was "
            "altered: build the index again with `mmcot data shard` or `mmcot data index`"
        )
    found = shard_qids(folder, shard, extension)
    if found != qids or len(found) != shard.num_samples:
        raise ShardError(f"{tar} does not hold the keys of its text shard in their order; build it again")
