"""The rows of ``mmcot predict --input``, each a question to answer or the reason why it is none.

    found = read_questions(Path("in.jsonl"), check)
    found.rows[0]     # Row(line=1, qid="a1", sample=Sample(...))
    found.rows[1]     # Row(line=2, qid=None, error="no valid JSON (Expecting value at character 1)")

A row is one as for own data (``data_shards/sources/tables.py``), its answer not needed. A row without an id gets the
number of its line.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_shards.sources.columns import notes_on_fields
from data_shards.sources.row_samples import FIELDS, id_of_row, sample_of_row
from data_shards.sources.table_rows import WITH_LINES, read_rows
from mmcot.errors import Faults, InputError, MissingFileError
from mmcot.texts.sample import Sample, SampleError


@dataclasses.dataclass(frozen=True)
class Row:
    """A row, with either its sample or its error; ``qid`` is None where the id cannot be read."""

    line: int
    qid: str | None
    sample: Sample | None = None
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Questions:
    """The rows of a file in their order, their faults, and sentences on what was recognised."""

    rows: list[Row]
    faults: Faults
    notes: list[str]


def read_questions(path: Path, check: Callable[[Sample], None]) -> Questions:
    """Read and check all rows of a file.

    Args:
        check: raises ``InputError`` for a sample that the models cannot answer.

    Raises:
        MissingFileError: the file does not exist.
        InputError: it is no .jsonl or .csv file, or cannot be divided into rows.
    """
    if not path.is_file():
        raise MissingFileError(f"--input {path} does not exist; give a .jsonl or .csv file of questions")
    if path.suffix.lower() not in WITH_LINES:
        raise InputError(f"--input {path} ends with {path.suffix!r}; expected a file of questions in .jsonl or .csv")
    notes: list[str] = []
    found: list[tuple[int, dict[str, Any] | InputError]] = []
    for line, row in read_rows(path, notes, refuse=lambda error: found.append((error.line or 0, error))):
        found.append((line, row))
    written = _written_ids(found)
    rows = [_read_row(path, line, row, written, check) for line, row in found]
    faults = Faults()
    for row in rows:
        if row.error:
            faults.add(SampleError(row.error).at(path, line=row.line))
    return Questions(rows, faults, [*notes, *_notes(path, [row for _, row in found if isinstance(row, dict)])])


def _written_ids(found: list[tuple[int, dict[str, Any] | InputError]]) -> dict[str, int]:
    """The first line of each id that is written in the file."""
    lines: dict[str, int] = {}
    for line, row in found:
        with contextlib.suppress(InputError):
            if isinstance(row, dict) and (qid := id_of_row(row)) is not None:
                lines.setdefault(qid, line)
    return lines


def _read_row(
    path: Path,
    line: int,
    row: dict[str, Any] | InputError,
    written: dict[str, int],
    check: Callable[[Sample], None],
) -> Row:
    qid = None
    try:
        if isinstance(row, InputError):
            raise row
        given = id_of_row(row)
        qid = str(line) if given is None else given
        _require_own_id(qid, given is not None, line, written.get(qid))
        sample = sample_of_row(qid, row, to_predict=True)
        check(sample)
    except InputError as error:
        return Row(line, qid, error=describe_error(error.problem))
    return Row(line, qid, sample)


def _require_own_id(qid: str, is_given: bool, line: int, first: int | None) -> None:
    if is_given and first != line:
        raise SampleError(
            f"question {qid} occurs twice, first on line {first} and again on line {line}; give every question an id "
            "of its own"
        )
    if not is_given and first is not None:
        raise SampleError(
            f"the row has no id and would get its line number, {line}, which is the id of the row on line {first}; "
            "give it an id"
        )


def describe_error(message: str) -> str:
    """An error as one line that every file can hold, bytes of file names that are no UTF-8 as escapes."""
    return " ".join(message.encode("utf-8", "backslashreplace").decode().split())


def _notes(path: Path, rows: list[dict[str, Any]]) -> list[str]:
    unknown = Counter(name for row in rows for name in row.keys() - FIELDS)
    unnamed = sum(row.get("qid", row.get("id", "")) == "" for row in rows)
    notes = [f"note: {path}: {unnamed:,} of {len(rows):,} rows have no id and get the number of their line"]
    return (notes if unnamed else []) + notes_on_fields(unknown)
