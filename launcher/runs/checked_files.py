"""A file's sha256, computed once a process while the file stays as it is."""

from __future__ import annotations

import functools
from pathlib import Path

from data_shards.atomic_files import sha256_of_file


def sha256_of_unchanged(path: str | Path) -> str:
    """The file's sha256; it is read again only when size, modification time or inode have changed."""
    status = Path(path).stat()
    return _sha256(str(Path(path).absolute()), status.st_size, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=4096)
def _sha256(path: str, size: int, mtime_ns: int, inode: int) -> str:
    return sha256_of_file(path)
