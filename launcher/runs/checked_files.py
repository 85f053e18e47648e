"""A file's sha256, computed once per process while the file does not change."""

from __future__ import annotations

import functools
from pathlib import Path

from data_shards.atomic_files import sha256_of_file


def sha256_of_unchanged(path: str | Path) -> str:
    """Return the file's sha256; the file is read again only if size, modification time or inode have changed."""
    status = Path(path).stat()
    return _sha256(str(Path(path).absolute()), status.st_size, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=4096)
def _sha256(path: str, size: int, mtime_ns: int, inode: int) -> str:
    return sha256_of_file(path)
