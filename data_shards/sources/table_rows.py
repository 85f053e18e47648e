"""From a table to its rows, each with the line on which it begins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_shards.sources.csv_rows import Refuse, read_csv
from data_shards.sources.row_samples import FIELDS
from data_shards.strict_json import decode_strict, may_have_halves, parse_json, read_text
from mmcot.errors import InputError

SUFFIXES = (".jsonl", ".csv")


def read_rows(
    file: Path, notes: list[str] | None = None, *, refuse: Refuse | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (the line on which it begins, row) of a .jsonl or .csv file.

    Args:
        notes: a list to which sentences on what was recognised are added.
        refuse: gets the fault, with its line, of a row that cannot be read, and reading continues; None: it is raised.
            What leaves open where the next row begins, such as a quote that never ends, is always raised.

    Raises:
        InputError: a row is no JSON object, or does not fit the header.
    """
    if file.suffix.lower() == ".csv":
        yield from _csv_rows(file, notes, refuse)
        return
    text = read_text(file)
    has_halves = may_have_halves(text)
    for number, line in enumerate(text.split("\n"), start=1):
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


def _csv_rows(file: Path, notes: list[str] | None, refuse: Refuse | None) -> Iterator[tuple[int, dict[str, Any]]]:
    table = read_csv(file, FIELDS, refuse=refuse)
    if notes is not None:
        notes.extend(table.notes)
    for line, fields in table.rows:
        row: dict[str, Any] = dict(fields)
        for name in ("choices", "answers", "image"):
            if name in row:
                row[name] = [part.strip() for part in row[name].split("|")]
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
