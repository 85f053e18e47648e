"""Local copies of the small files of a remote data folder."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from data_shards.atomic_files import (
    commit_bytes,
    commit_json,
    exclusive,
    fingerprint,
)
from data_shards.errors import ShardError
from data_shards.json_shapes import read_record
from data_shards.manifest import ORIGIN, check_shape, with_urls
from data_shards.remote_files import is_remote, read_file
from data_shards.sealed_json import broken_seal
from data_shards.strict_json import parse_json

_LAYOUT = 2  # of a local copy; 1 changed the manifests
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def mirror_folder(url: str, cache_dir: str | Path, *, features: str | None) -> Path:
    """Copy the small files of a remote data folder (manifests, tokenizer) to a folder of this machine.

    The manifests contain the URLs of the tars; each index is downloaded when it is needed. A data
    folder that has changed gets a new local folder.

    Raises:
        ShardError: there is no finished data folder, or it has no feature of that name.
    """
    url = url.rstrip("/")
    names = ["text", *([f"features/{features}"] if features else [])]
    manifests = {}
    for name in names:
        try:
            manifests[name] = _parse_manifest(read_file(f"{url}/{name}/manifest.json"), f"{url}/{name}")
        except FileNotFoundError:
            raise ShardError(
                f"{url}/{name}/manifest.json does not exist; copy a finished data folder to that URL"
            ) from None
    key = fingerprint([url, _LAYOUT, *(manifest["fingerprint"] for manifest in manifests.values())])
    folder = Path(cache_dir).expanduser() / "folders" / key
    with exclusive(folder):
        if not (folder / "origin.json").exists():
            for name in _TOKENIZER_FILES:
                with contextlib.suppress(FileNotFoundError):
                    commit_bytes(folder / "tokenizer" / name, read_file(f"{url}/tokenizer/{name}"))
            for name, manifest in manifests.items():
                commit_json(folder / name / "manifest.json", manifest)
                commit_json(folder / name / ORIGIN, {"url": f"{url}/{name}"})
            commit_json(folder / "origin.json", {"url": url})
    return folder


def local_folder(location: str | Path, cache_dir: str | Path, *, features: str | None) -> Path:
    """Return a data folder on this machine: the folder itself, or the local copy of a remote one."""
    return mirror_folder(str(location), cache_dir, features=features) if is_remote(location) else Path(location)


def origin_of(folder: str | Path) -> str | None:
    """Return the URL of a mirrored data folder; None for any other folder."""
    path = Path(folder) / "origin.json"
    remedy = f"restore it, or delete {folder} and run again"
    return read_record(path, {"url": str}, remedy=remedy)["url"] if path.exists() else None


def _parse_manifest(data: bytes, folder: str) -> dict[str, Any]:
    """Parse a manifest, whose tars must be behind URLs."""
    manifest = parse_json(data, f"{folder}/manifest.json", remedy="copy the finished data folder there again")
    if reason := broken_seal(manifest):
        raise ShardError(f"{folder}/manifest.json cannot be used: {reason}; copy the finished data folder there again")
    check_shape(manifest, f"{folder}/manifest.json")
    local = [shard["path"] for shard in with_urls(manifest, folder)["shards"] if not is_remote(shard["path"])]
    if local:
        raise ShardError(f"{folder} names tars of another machine, such as {local[0]}; index them by URL")
    return manifest
