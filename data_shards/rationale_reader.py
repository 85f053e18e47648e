"""Reading the generated texts of a complete output, by shard and position or by question.

reader = RationaleReader("runs/demo/rationales", "train")
reader.text(12, 256, "10")     # "Solution: ..."
"""

from __future__ import annotations

import bisect
import functools
from pathlib import Path

from data_shards.atomic_files import sha256_of_file
from data_shards.errors import ShardError
from data_shards.generated_texts import listed_files
from data_shards.text_lines import read_lines

_OPEN_FILES = 512


class RationaleReader:
    """The rationales, or other texts, of a split, by shard number and position; files are read when they are needed.

    Raises:
        ShardError: the output is not complete, a file is missing or changed, or a question has
            no rationale.
    """

    def __init__(self, output_dir: str | Path, split: str, *, field: str = "rationale") -> None:
        self.output_dir, self.split, self._field = Path(output_dir), split, field
        self._files = {
            name: file for name, file in listed_files(self.output_dir).items() if name.startswith(f"{split}/")
        }
        self._starts: dict[int, list[int]] = {}
        for name in sorted(self._files):
            shard, start = Path(name).stem.split("-")
            self._starts.setdefault(int(shard), []).append(int(start))
        self._lines = functools.lru_cache(_OPEN_FILES)(self._read_file)

    def text(self, shard: int, position: int, qid: str) -> str:
        """Return the rationale of the question ``qid``, at a position of a shard."""
        starts = self._starts.get(shard, [])
        index = bisect.bisect_right(starts, position) - 1
        lines = self._lines(f"{self.split}/{shard:06d}-{starts[index]:06d}.jsonl") if index >= 0 else []
        line = lines[position - starts[index]] if index >= 0 and position - starts[index] < len(lines) else None
        if line is None or line[0] != qid:
            raise ShardError(
                f"question {qid} of split {self.split!r} has no rationale in {self.output_dir}; run `mmcot rationales`"
            )
        return line[1]

    def by_qid(self) -> dict[str, str]:
        """Return all rationales by qid.

        Raises:
            ShardError: a qid occurs twice.
        """
        rationales: dict[str, str] = {}
        for name in sorted(self._files):
            for qid, text in self._read_file(name):
                if qid in rationales:
                    raise ShardError(
                        f"{self.output_dir / name}: question {qid} has a second rationale; delete {self.output_dir} "
                        "and run again"
                    )
                rationales[qid] = text
        return rationales

    def _read_file(self, name: str) -> list[tuple[str, str]]:
        path = self.output_dir / name
        if not path.exists() or sha256_of_file(path) != self._files[name]["sha256"]:
            raise ShardError(f"{path} is missing or not what was written; delete {self.output_dir} and run again")
        lines = read_lines(path, {"qid": str, self._field: str})
        if len(lines) != self._files[name]["num_samples"]:
            raise ShardError(
                f"{path} has {len(lines):,} lines, the manifest says {self._files[name]['num_samples']:,}; delete "
                f"{self.output_dir} and run again"
            )
        return [(line["qid"], line[self._field]) for line in lines]


def read_rationales(output_dir: str | Path, split: str, *, field: str = "rationale") -> dict[str, str]:
    """Return all rationales, or other texts, of a split by qid; ``field`` is their key in a line."""
    return RationaleReader(output_dir, split, field=field).by_qid()
