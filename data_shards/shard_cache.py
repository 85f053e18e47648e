"""A bounded cache of whole remote shards on this machine, shared by all its processes.

A downloaded shard is verified by the sha256 in its manifest. When the bound is reached, the least
recently used shards are removed. A process that has a removed shard open can still read it, as
POSIX guarantees.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from data_shards.atomic_files import exclusive
from data_shards.errors import ShardError
from data_shards.remote_files import fetch_file

_STALE_S = 3600
_MAX_FETCHES = 10


class ShardCache:
    """Whole shards in ``folder``, at most ``max_bytes`` of them.

    Raises:
        ShardError: a shard is larger than the bound, or its sha256 differs from its manifest.
    """

    def __init__(self, folder: str | Path, *, max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(folder).expanduser() / "shards", max_bytes

    def open(self, url: str, *, sha256: str, size: int) -> tuple[int, int]:
        """Return a descriptor of the shard's copy, and the bytes that were downloaded for it (0 or its size)."""
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise ShardError(
                f"{url}: its manifest gives {sha256!r} as sha256, expected 64 hex digits; build the shards again"
            )
        path = self.folder / f"{sha256}.tar"
        if size > self.max_bytes:
            raise ShardError(
                f"{url} has {size / 1e9:.1f} GB, data.cache_gb allows {self.max_bytes / 1e9:.1f}; raise it, or set "
                "data.remote=ranges"
            )
        for _ in range(_MAX_FETCHES):  # other processes may need the space before it is opened
            with contextlib.suppress(FileNotFoundError):
                return self._open_or_fetch(url, path, sha256, size)
        raise ShardError(
            f"{url} was removed from the cache {_MAX_FETCHES} times before it could be read; raise data.cache_gb, or "
            "set data.remote=ranges"
        )

    def _open_or_fetch(self, url: str, path: Path, sha256: str, size: int) -> tuple[int, int]:
        with contextlib.suppress(FileNotFoundError):
            return self._open(path), 0
        with exclusive(self.folder / "claims" / sha256[:2]):  # one process downloads, the others wait for it
            with contextlib.suppress(FileNotFoundError):
                return self._open(path), 0
            self._make_room(size)
            found = self._fetch(url, path)
            if found != sha256:
                path.unlink()
                raise ShardError(f"{url} has sha256 {found}, its manifest has {sha256}; copy the shard there again")
            descriptor = self._open(path)
            self._make_room(0)  # other processes may have downloaded at the same time
            return descriptor, size

    def _open(self, path: Path) -> int:
        descriptor = os.open(path, os.O_RDONLY)
        os.utime(descriptor)
        return descriptor

    def _make_room(self, size: int) -> None:
        with exclusive(self.folder):
            for path in self.folder.glob(".tmp-*"):  # of killed processes
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_mtime < time.time() - _STALE_S:
                        path.unlink()
            stored = sorted(self._stored(), key=lambda entry: entry[1].st_mtime)
            excess = sum(stat.st_size for _, stat in stored) + size - self.max_bytes
            for path, stat in stored:
                if excess <= 0:
                    return
                path.unlink(missing_ok=True)
                excess -= stat.st_size

    def _stored(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Complete shards; ``glob`` also finds files that are still being downloaded."""
        for path in self.folder.glob("*.tar"):
            if not path.name.startswith("."):
                with contextlib.suppress(FileNotFoundError):
                    yield path, path.stat()

    def _fetch(self, url: str, path: Path) -> str:
        try:
            return fetch_file(url, path)
        except FileNotFoundError as error:
            raise ShardError(f"{url} does not exist ({error}); copy the shard there again") from error
