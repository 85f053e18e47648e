"""The members of one kind in the shards of a split, addressed by sample number.

Indexes are opened when they are needed, and a limited number is kept, so that memory does not
grow with the data set. A member is read from the local tar, from a whole copy of a remote tar,
or from prefetched ranges.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import os
import stat
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Literal

import numpy as np

from data_shards.errors import ShardError
from data_shards.index import check_member, rows_of_extension
from data_shards.manifest import manifest_shards, open_index, read_manifest
from data_shards.remote_files import is_remote, read_range
from data_shards.shard_cache import ShardCache

_OPEN_SHARDS = 128


@dataclasses.dataclass(frozen=True)
class RemoteAccess:
    """How remote tars are read; it has no effect on local ones.

    ``ranges`` reads only the needed bytes and stores nothing; ``cache`` stores whole shards in
    ``cache_dir``, at most ``cache_bytes`` of them.
    """

    mode: Literal["ranges", "cache"] = "ranges"
    cache_dir: str = "~/.cache/mmcot"
    cache_bytes: int = 50 << 30


class Members:
    """All members of one extension in the shards of a split.

    Args:
        folder: contains the manifest, and the indexes or those downloaded so far.

    Raises:
        ShardError: a manifest or index is missing, or bytes differ from the index.
    """

    def __init__(self, folder: Path, split: str, extension: str, access: RemoteAccess) -> None:
        self.folder, self.extension, self.access = folder, extension, access
        self.shards = manifest_shards(read_manifest(folder), split)
        self.locations = [str(shard.tar(folder)) for shard in self.shards]
        self.is_remote = [is_remote(location) for location in self.locations]
        self.first_sample = [0, *itertools.accumulate(shard.num_samples for shard in self.shards)]
        self.bytes_read = self.num_requests = 0
        self.columns = functools.lru_cache(_OPEN_SHARDS)(self._read_columns)
        self._cache = ShardCache(access.cache_dir, max_bytes=access.cache_bytes)
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.first_sample[-1]

    def place(self, sample: int) -> tuple[int, int]:
        """Shard number of a sample and its position in the shard."""
        shard = bisect.bisect_right(self.first_sample, sample) - 1
        return shard, int(sample) - self.first_sample[shard]

    def in_ranges(self, shard: int) -> bool:
        """Whether a shard is remote and read by ranges."""
        return self.access.mode == "ranges" and self.is_remote[shard]

    def read(self, shard: int, position: int) -> bytes:
        """Read one member's bytes and verify their checksum."""
        offset, size = (int(self.columns(shard)[name][position]) for name in ("offset", "size"))
        if self.in_ranges(shard):
            data = self.fetch(shard, offset, size)
        else:
            data = self._pread(shard, offset, size)
            self._count(0 if self.is_remote[shard] else size)
        return self.check(shard, position, data)

    def fetch(self, shard: int, offset: int, size: int) -> bytes:
        """Read any range of a remote shard."""
        self._count(size)
        with self._lock:
            self.num_requests += 1
        return read_range(self.locations[shard], offset, size)

    def check(self, shard: int, position: int, data: bytes) -> bytes:
        """Verify that ``data`` is the indexed member's, and return it."""
        columns = self.columns(shard)
        check_member(
            data,
            size=int(columns["size"][position]),
            crc32=int(columns["crc32"][position]),
            name=(self.locations[shard], columns["qid"][position]),
        )
        return data

    def open_shard(self, shard: int) -> None:
        """Open a shard's index, and download its tar where whole shards are cached."""
        self.columns(shard)
        if not self.in_ranges(shard):
            self._descriptor(shard)

    def close(self) -> None:
        """Close the tars that were opened."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        while True:
            descriptor = self._descriptor(shard)
            with self._lock:  # another thread may have closed it in between
                if self._descriptors.get(shard) == descriptor:
                    return os.pread(descriptor, size, offset)

    def _descriptor(self, shard: int) -> int:
        with self._lock:
            if shard in self._descriptors:
                self._descriptors.move_to_end(shard)
                return self._descriptors[shard]
        location, facts = self.locations[shard], self.shards[shard]
        if self.is_remote[shard]:
            descriptor, fetched = self._cache.open(location, sha256=facts.sha256, size=facts.size_bytes)
            self._count(fetched)
        else:
            descriptor = _open_tar(location)
        with self._lock:
            if shard in self._descriptors:  # another thread was faster
                os.close(descriptor)
                return self._descriptors[shard]
            self._close_removed()
            self._descriptors[shard] = descriptor
            if len(self._descriptors) > _OPEN_SHARDS:
                os.close(self._descriptors.popitem(last=False)[1])
        return descriptor

    def _close_removed(self) -> None:
        """Close copies that the cache has removed: open files still take disk space."""
        for shard, descriptor in list(self._descriptors.items()):
            if self.is_remote[shard] and os.fstat(descriptor).st_nlink == 0:
                os.close(self._descriptors.pop(shard))

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            self.bytes_read += num_bytes

    def _read_columns(self, shard: int) -> dict[str, np.ndarray]:
        facts, path = self.shards[shard], self.shards[shard].index(self.folder)
        is_local = path.exists()
        columns = rows_of_extension(open_index(self.folder, facts), self.extension)
        if not is_local:
            self._count(path.stat().st_size)
        if len(columns["qid"]) != facts.num_samples:
            raise ShardError(
                f"{path} lists {len(columns['qid'])} .{self.extension} members, the manifest {facts.num_samples}; "
                "build it again with `mmcot data shard` or `mmcot data index`"
            )
        return columns


def _open_tar(path: str) -> int:
    remedy = "restore it, or build the shards again with `mmcot data shard` or `mmcot data index`"
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise ShardError(f"{path} is missing; {remedy}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ShardError(f"{path} is no file, expected a tar; {remedy}")
    return descriptor
