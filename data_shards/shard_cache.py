"""Remote shards kept whole on this machine: fetched once for all its processes, within a bound.

A shard is verified against its manifest's sha256 as it arrives. When the bound is
reached, those not used for longest go first; a process that still reads one keeps it
until it closes it, as POSIX has it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from data_shards.index import ShardError
from data_shards.remote import fetch_file
from data_shards.storage import exclusive

_STALE_S = 3600


class ShardCache:
    """Whole shards in ``folder``, at most ``max_bytes`` of them.

    Raises:
        ShardError: a shard is larger than the bound, or not what its manifest says.
    """

    def __init__(self, folder: str | Path, *, max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(folder).expanduser() / "shards", max_bytes

    def open(self, url: str, *, sha256: str, size: int) -> tuple[int, int]:
        """A descriptor of the shard's copy, and the bytes that had to be fetched for it (0 or its size)."""
        path = self.folder / f"{sha256}.tar"
        if size > self.max_bytes:
            raise ShardError(f"{url} has {size / 1e9:.1f} GB, data.cache_gb allows {self.max_bytes / 1e9:.1f}; raise it, or set data.remote=ranges")
        try:
            return self._open(path), 0
        except FileNotFoundError:
            pass
        with exclusive(self.folder / "claims" / sha256[:2]):  # one process fetches, the others wait for it
            try:
                return self._open(path), 0
            except FileNotFoundError:
                pass
            self._make_room(size)
            found = fetch_file(url, path)
            if found != sha256:
                path.unlink()
                raise ShardError(f"{url} has sha256 {found}, its manifest says {sha256}; copy the shard there again")
            descriptor = self._open(path)
            self._make_room(0)  # others may have fetched at the same time
            return descriptor, size

    def _open(self, path: Path) -> int:
        descriptor = os.open(path, os.O_RDONLY)
        os.utime(descriptor)
        return descriptor

    def _make_room(self, size: int) -> None:
        with exclusive(self.folder):
            for path in self.folder.glob(".tmp-*"):  # left by processes that were killed
                if path.stat().st_mtime < time.time() - _STALE_S:
                    path.unlink(missing_ok=True)
            standing = sorted(((path, path.stat()) for path in self.folder.glob("*.tar")), key=lambda entry: entry[1].st_mtime)
            excess = sum(stat.st_size for _, stat in standing) + size - self.max_bytes
            for path, stat in standing:
                if excess <= 0:
                    return
                path.unlink()
                excess -= stat.st_size
