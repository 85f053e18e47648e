"""The samples of a split, by number: text and features joined by position.

A sample is one read per member, verified by its checksum. For remote tars, ``prefetch`` requests
the bytes that will be needed, in few requests, and reading waits for them.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data_shards.errors import ShardError
from data_shards.manifest import problem_of_member, read_manifest
from data_shards.npy import parse_npy
from data_shards.range_requests import plan_ranges
from data_shards.shard_files import Members, RemoteAccess
from mmcot.texts.sample import Sample

_REQUESTS = 16  # at a time
_WINDOWS_HELD = 2  # the one in use and the next
_DEFAULT_ACCESS = RemoteAccess()


class SplitReader:
    """The samples of one split of a data folder, by number in shard order.

    Args:
        shards_dir: a local data folder; its tars may be elsewhere.
        features: name of the feature folder to join, or None for text alone.
        access: how remote tars are read.

    Raises:
        ShardError: a manifest or index is missing, or features and text do not match.
    """

    def __init__(
        self, shards_dir: str | Path, split: str, *, features: str | None = None, access: RemoteAccess = _DEFAULT_ACCESS
    ) -> None:
        shards_dir = Path(shards_dir)
        self.split = split
        self._text = Members(shards_dir / "text", split, "json", access)
        self._features: Members | None = None
        self.feature_shape = (0, 0)
        if features is not None:
            folder = shards_dir / "features" / features
            if not folder.exists():
                raise ShardError(f"{folder} does not exist; build it with `mmcot data shard`, or set data.features")
            self._features = Members(folder, split, "npy", access)
            if [s.num_samples for s in self._features.shards] != [s.num_samples for s in self._text.shards]:
                raise ShardError(f"{folder} does not hold the questions of {shards_dir / 'text'}; build it again")
            manifest = read_manifest(folder)
            self.feature_shape = (manifest["num_patches"], manifest["dim"])
        self.bytes_needed = 0
        self._joined: set[int] = set()
        self._pool: ThreadPoolExecutor | None = None
        self._held: deque[dict[tuple[str, int, int], tuple[Future, int]]] = deque(maxlen=_WINDOWS_HELD)

    def __len__(self) -> int:
        return len(self._text)

    @property
    def qids(self) -> np.ndarray:
        """Question ids by sample number; for a large split, use ``qid`` instead."""
        columns = [self._text.columns(shard)["qid"] for shard in range(len(self._text.shards))]
        return np.concatenate(columns or [np.empty(0, object)])

    def qid(self, sample: int) -> str:
        """The question id of a sample."""
        shard, position = self._text.place(sample)
        return str(self._text.columns(shard)["qid"][position])

    @property
    def shard_of_sample(self) -> np.ndarray:
        """Shard number of each sample, int32 [N]."""
        return np.repeat(np.arange(len(self._text.shards), dtype=np.int32), [s.num_samples for s in self._text.shards])

    @property
    def is_remote(self) -> bool:
        """Whether any tar is behind a URL."""
        parts = [self._text, *([self._features] if self._features else [])]
        return any(remote for part in parts for remote in part.is_remote)

    @property
    def bytes_read(self) -> int:
        """Bytes read from files and servers so far; ``bytes_needed`` of them were used."""
        return self._text.bytes_read + (self._features.bytes_read if self._features else 0)

    @property
    def num_requests(self) -> int:
        """Range requests to servers so far."""
        return self._text.num_requests + (self._features.num_requests if self._features else 0)

    def place(self, sample: int) -> tuple[int, int]:
        """Number of the shard in its split and position in the shard."""
        shard, position = self._text.place(sample)
        return self._text.shards[shard].number, position

    def problem(self, sample: int) -> Sample:
        """Read one question."""
        shard, position = self._text.place(sample)
        qid = str(self._text.columns(shard)["qid"][position])
        return problem_of_member(qid, self._read(self._text, shard, position), tar=self._text.locations[shard])

    def features(self, sample: int) -> np.ndarray | None:
        """Read one feature array, floats [p, D] with p = 0 where there is no picture."""
        if self._features is None:
            return None
        shard, position = self._text.place(sample)
        self._check_joined(self._features, shard)
        name = f"{self._features.locations[shard]}, member {self.qid(sample)}.npy"
        array = parse_npy(self._read(self._features, shard, position), name=name)
        if array.ndim != 2 or array.shape[1] != self.feature_shape[1] or len(array) > self.feature_shape[0]:
            raise ShardError(
                f"{name}: features of shape {array.shape}; expected at most "
                f"{self.feature_shape}; build the feature shards again"
            )
        return array

    def samples_of_shard(self, shard_name: str) -> np.ndarray:
        """Sample numbers of one text shard, such as ``train-000012``, in its order."""
        number = [shard.name for shard in self._text.shards].index(shard_name)
        return np.arange(self._text.first_sample[number], self._text.first_sample[number + 1])

    def prefetch(self, samples: np.ndarray, *, features: bool = True) -> None:
        """Start fetching the bytes of these samples, in their order; those of the last two calls are kept.

        Does nothing for local tars. Memory: the bytes of these samples while they are kept.
        """
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_REQUESTS, thread_name_prefix="prefetch")
        parts = [self._text, *([self._features] if self._features and features else [])]
        places = [self._text.place(sample) for sample in dict.fromkeys(map(int, samples))]
        if not any(part.in_ranges(shard) for part in parts for shard, _ in places[:1]):
            for shard in dict.fromkeys(shard for shard, _ in places):
                for part in parts:
                    if part.is_remote[shard]:
                        self._pool.submit(part.open_shard, shard)
            return
        self._held.append(_fetch_ranges(self._pool, parts, places))

    def close(self) -> None:
        """Close the shards that were opened."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
        self._held.clear()
        for members in (self._text, self._features):
            if members is not None:
                members.close()

    def _read(self, members: Members, shard: int, position: int) -> bytes:
        size = int(members.columns(shard)["size"][position])
        self.bytes_needed += size
        for window in self._held:
            if held := window.get((members.extension, shard, position)):
                future, start = held
                try:
                    return members.check(shard, position, future.result()[start : start + size])
                except ShardError:  # try once more with a read of its own, whose error is then raised
                    break
        return members.read(shard, position)

    def _check_joined(self, features: Members, shard: int) -> None:
        if shard not in self._joined:
            if not np.array_equal(features.columns(shard)["qid"], self._text.columns(shard)["qid"]):
                name = features.shards[shard].name
                raise ShardError(
                    f"{features.folder / name} does not hold the questions of its text shard in their order; "
                    "build it again"
                )
            self._joined.add(shard)


def _fetch_ranges(
    pool: ThreadPoolExecutor, parts: list[Members], places: list[tuple[int, int]]
) -> dict[tuple[str, int, int], tuple[Future, int]]:
    """Start fetching the members at ``places``; returns by member the fetched range and the member's start in it."""
    shards = list(dict.fromkeys(shard for shard, _ in places))
    list(pool.map(lambda pair: pair[0].columns(pair[1]), [(part, shard) for part in parts for shard in shards]))
    keys = [(number, shard, position) for shard, position in places for number in range(len(parts))]
    where = np.array(
        [
            [parts[number].columns(shard)[name][position] for name in ("offset", "size")]
            for number, shard, position in keys
        ]
    )
    files = np.array([number + len(parts) * shard for number, shard, _ in keys])
    ranges, range_of_member = plan_ranges(files, where[:, 0], where[:, 1])
    futures: dict[int, Future] = {}
    for index in range_of_member:  # in the order in which they are needed
        if index not in futures:
            file, start, stop = map(int, ranges[index])
            futures[index] = pool.submit(parts[file % len(parts)].fetch, file // len(parts), start, stop - start)
    return {
        (parts[number].extension, shard, position): (futures[index], int(offset - ranges[index][1]))
        for (number, shard, position), (offset, _), index in zip(keys, where, range_of_member, strict=True)
    }
