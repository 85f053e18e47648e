"""From a table to its rows, each with the line on which it begins, or its number where a file has no lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_shards.sources.columns import Columns
from data_shards.sources.csv_rows import Refuse, read_csv
from data_shards.sources.parquet_rows import ParquetTable
from data_shards.strict_json import (
    NotJsonError,
    decode_strict,
    may_have_halves,
    parse_json,
    read_json_file,
    read_text,
)
from mmcot.errors import InputError

WITH_LINES = (".jsonl", ".csv")
SUFFIXES = (*WITH_LINES, ".json", ".parquet")
Rows = Iterator[tuple[int, dict[str, Any]]]


def place_of(file: Path, number: int) -> tuple[str, int | None, str | None]:
    """The place of a row that ``read_rows`` numbered: its line, or ``row 0`` and so on in a file without lines."""
    if file.suffix.lower() in WITH_LINES:
        return str(file), number, None
    return str(file), None, f"row {number}"


def read_rows(
    file: Path, notes: list[str] | None = None, *, refuse: Refuse | None = None, columns: Columns | None = None
) -> Rows:
    """Yield (the line on which it begins, row) of a table; without lines, its number from 0.

    Args:
        notes: a list to which sentences on what was recognised are added.
        refuse: gets the fault, with its place, of a row that cannot be read, and reading continues; None: it is raised.
            What leaves open where the next row begins, such as a quote that never ends, is always raised.
        columns: gives the columns their names, and counts those that are not used.

    Raises:
        InputError: a row is no JSON object, or does not fit the header; or the file is no such table.
    """
    columns = Columns() if columns is None else columns
    columns.lack_ids = False
    suffix = file.suffix.lower()
    if suffix == ".csv":
        return _csv_rows(file, notes, refuse, columns)
    if suffix == ".parquet":
        return _parquet_rows(file, columns)
    return _taken(_array_rows(file, refuse) if suffix == ".json" else _lines_rows(file, refuse), columns)


def _taken(rows: Rows, columns: Columns) -> Rows:
    for number, row in rows:
        yield number, columns.take(row)


def _lines_rows(file: Path, refuse: Refuse | None) -> Rows:
    text = read_text(file)
    has_halves = may_have_halves(text)
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removeprefix("\ufeff")  # of a file that was appended to this one
        if not line.strip():
            continue
        try:
            row = _quick_row(line)
            if row is None or has_halves:
                row = _json_row(line, file, number)
        except InputError as error:
            if refuse is None:
                raise
            refuse(error)
        else:
            yield number, row


def _quick_row(line: str) -> dict[str, Any] | None:
    """Parse a row; None where something is wrong with it."""
    try:
        row = decode_strict(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _csv_rows(file: Path, notes: list[str] | None, refuse: Refuse | None, columns: Columns) -> Rows:
    table = read_csv(file, columns.known, refuse=refuse)
    columns.see(table.columns)
    if notes is not None:
        notes.extend(table.notes)
    for line, fields in table.rows:
        row: dict[str, Any] = columns.take(dict(fields))
        for name in ("choices", "answers", "image"):
            if name in row:
                row[name] = [part.strip() for part in row[name].split("|")]
        if "choices" in row and "answer" in table.columns:
            row.setdefault("answer", None)  # an empty field: it is not known
        yield line, row


def _json_row(line: str, file: Path, number: int) -> dict[str, Any]:
    hint = "; a JSONL file has one object a line" if line.strip() in "[{" else ""
    try:
        row = parse_json(line, file, line=number)
    except InputError as error:
        if hint:
            raise InputError(f"{error.problem}{hint}").at(file, line=number) from None
        raise
    if not isinstance(row, dict):
        raise InputError(f"expected an object, found {str(row)[:200]!r}{hint}").at(file, line=number)
    return row


def _array_rows(file: Path, refuse: Refuse | None) -> Rows:
    for number, row in enumerate(_array(file)):
        if isinstance(row, dict):
            yield number, row
            continue
        name, _, member = place_of(file, number)
        error = InputError(f"expected an object, found {str(row)[:200]!r}").at(name, member=member)
        if refuse is None:
            raise error
        refuse(error)


def _array(file: Path) -> list[Any]:
    """The array of a .json file.

    Raises:
        InputError: it is another value, or no JSON.
    """
    try:
        value = read_json_file(file)
    except NotJsonError as error:
        if _has_objects_in_lines(file):
            raise InputError(f"it has one object a line; name it {file.stem}.jsonl").at(file) from None
        raise error
    if isinstance(value, list):
        return value
    raise InputError(f"{_in_words(value)}; expected an array of objects, one a row: [{{...}}, {{...}}]").at(file)


def _in_words(value: Any) -> str:
    if not isinstance(value, dict):
        return f"it is {str(value)[:80]!r}"
    names = ", ".join(map(repr, [*value][:4])) + (", ..." if len(value) > 4 else "")
    kinds = set(map(type, value.values()))
    if kinds == {list}:
        what = f'lists of values by column ({names}; in pandas: df.to_json(file, orient="records"))'
    elif kinds == {dict}:
        what = (
            f"objects by key ({names}); give each object its key as 'qid' (problems.json and pid_splits.json of "
            "ScienceQA are read by their folder)"
        )
    else:
        what = f"one object with {names}" if names else "an empty object"
    return f"it is {what}"


def _has_objects_in_lines(file: Path) -> bool:
    lines = [line for line in read_text(file).split("\n") if line.strip()]
    try:
        return len(lines) > 1 and all(isinstance(parse_json(line, file), dict) for line in lines[:2])
    except InputError:
        return False


def _parquet_rows(file: Path, columns: Columns) -> Rows:
    table = ParquetTable(file)
    used = [column for column in table.columns if column in columns.known] or table.columns[:1]
    columns.see(table.columns)
    columns.lack_ids = not columns.has_ids(table.columns)
    columns.leave_out([column for column in table.columns if column not in used], table.num_rows)
    for number, row in _taken(table.rows(used), columns):
        # An answer that is null is not known; any other null is a field that is missing.
        yield number, {name: value for name, value in row.items() if value is not None or name == "answer"}
