"""Rows of Parquet files, read in batches, with values as they are typed.

table = open_parquet(Path("train-00000-of-00002.parquet"))
table.columns, table.num_rows           # of the whole file
for number, row in table.rows(["qid", "question"]): ...
RowsByNumber(path, ["image"])[17]       # one row later, for its pictures
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmcot.errors import InputError
from mmcot.file_kinds import LFS_POINTER

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_ROWS = 256  # read at a time, with their pictures
_ROWS_LATER = 64
_KEPT = 4  # batches of rows that were read later
_BUFFER = 1 << 20  # bytes of a column that are read at a time, in place of a whole group of rows
_MAGIC = b"PAR1"
_AGAIN = "download it again, or write it again"


class ParquetTable:
    """An open Parquet file."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self.path = path
        with _as_input_error(path):
            self.file = pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
            self.columns: list[str] = list(self.file.schema_arrow.names)
        self.num_rows: int = self.file.metadata.num_rows
        for column in self.columns:
            if self.columns.count(column) > 1:
                raise InputError(f"the column {column!r} occurs more than once; rename one").at(path)

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (number from 0, row) of these columns.

        Raises:
            InputError: the file is damaged.
        """
        number = 0
        for batch in batches(self, columns, _ROWS):
            for row in batch.to_pylist():
                yield number, row
                number += 1


def batches(
    table: ParquetTable, columns: Sequence[str], size: int, groups: Sequence[int] | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield batches of at most ``size`` rows of these columns.

    Raises:
        InputError: the file is damaged.
    """
    with _as_input_error(table.path):
        yield from table.file.iter_batches(size, row_groups=groups, columns=list(columns), use_threads=False)


class RowsByNumber:
    """Single rows of a Parquet file, mostly asked for in about their order: a step forward is cheap, one back is not.

    Memory is that of a few batches, whatever the size of the file's groups of rows. Threads may share it.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self._table = ParquetTable(path)
        self._columns = [column for column in columns if column in self._table.columns]
        metadata: pq.FileMetaData = self._table.file.metadata
        self._starts = [0]  # the first row of each group, and the end
        for group in range(metadata.num_row_groups):
            self._starts.append(self._starts[-1] + metadata.row_group(group).num_rows)
        self._kept: OrderedDict[int, pa.RecordBatch] = OrderedDict()
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._next, self._group_end = 0, 0  # the row that comes next, and the end of the group from which it comes
        self._lock = threading.Lock()

    def __getitem__(self, number: int) -> dict[str, Any]:
        with self._lock:
            start, batch = self._batch_with(number)
        return batch.slice(number - start, 1).to_pylist()[0]

    def _batch_with(self, number: int) -> tuple[int, pa.RecordBatch]:
        for start, batch in self._kept.items():
            if start <= number < start + batch.num_rows:
                return start, batch
        if not self._next <= number < self._group_end:
            group = max(each for each, start in enumerate(self._starts[:-1]) if start <= number)
            self._batches = batches(self._table, self._columns, _ROWS_LATER, [group])
            self._next, self._group_end = self._starts[group], self._starts[group + 1]
        while True:
            start, batch = self._next, next(self._batches)
            self._next += batch.num_rows
            if number < self._next:
                self._kept[start] = batch
                if len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
                return start, batch


@contextlib.contextmanager
def _as_input_error(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, InputError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise InputError(_fault_of(path, error)).at(path) from None


def _fault_of(path: Path, error: Exception) -> str:
    """What a file is that cannot be read as Parquet, and what to do."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(200)
        file.seek(max(0, size - len(_MAGIC)))
        end = file.read()
    if not size:
        return f"it is empty (0 bytes), expected a Parquet file; {_AGAIN}"
    if start.startswith(LFS_POINTER):
        return (
            "it is a Git LFS pointer, expected a Parquet file; run `git lfs pull` in its repository (install git-lfs "
            "first), or download the file itself"
        )
    if not start.startswith(_MAGIC):
        kind = "a text" if start.isascii() and b"\0" not in start else "a file of another kind"
        return (
            f"it is {kind} that starts with {start[:24]!r}, expected a Parquet file; give it the ending of what it "
            "is (.jsonl, .json or .csv), or download it again"
        )
    if end != _MAGIC:
        return f"it is cut off: {size:,} bytes of a Parquet file without its end; {_AGAIN}"
    said = " ".join(str(error).split())[:200]
    return f"it is a damaged Parquet file ({type(error).__name__}: {said}); {_AGAIN}"
