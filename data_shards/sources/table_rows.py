"""From a table to its rows, each with the line on which it begins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_shards.sources.csv_rows import read_csv
from data_shards.sources.row_samples import FIELDS
from data_shards.strict_json import parse_json, read_text
from mmcot.errors import Faults, InputError

SUFFIXES = (".jsonl", ".csv")


def read_rows(
    file: Path, notes: list[str] | None = None, faults: Faults | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (the line on which it begins, row) of a .jsonl or .csv file.

    Args:
        notes: a list to which sentences on what was recognised are added.
        faults: gathers rows that are no JSON object, or do not fit the header; None raises the first.

    Raises:
        InputError: a row is not valid, or, with ``faults`` too, the rest of the file cannot be read.
    """
    if file.suffix.lower() == ".csv":
        yield from _csv_rows(file, notes, faults)
        return
    try:
        text = read_text(file)
    except InputError as error:
        _refuse(error, faults)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = _json_row(line, file, number)
            except InputError as error:
                _refuse(error, faults)
            else:
                yield number, row


def _csv_rows(file: Path, notes: list[str] | None, faults: Faults | None) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        table = read_csv(file, FIELDS, faults)
        if notes is not None:
            notes.extend(table.notes)
        for line, fields in table.rows:
            row: dict[str, Any] = dict(fields)
            for name in ("choices", "answers", "image"):
                if name in row:
                    row[name] = [part.strip() for part in row[name].split("|")]
            yield line, row
    except InputError as error:
        _refuse(error, faults)


def _refuse(error: InputError, faults: Faults | None) -> None:
    if faults is None:
        raise error
    faults.add(error)


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
