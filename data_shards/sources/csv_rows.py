"""Rows of a CSV file, each with the line on which it begins; what does not fit its header is refused.

Fields are separated by commas, semicolons or tabs: the one by which the header has the most known columns, or that of a
first line ``sep=;``. Capitals and spaces around the names of known columns do not count. The notes say what was
recognised.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from data_shards.strict_json import read_text
from mmcot.errors import InputError

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_MAX_FIELD = min(sys.maxsize, 2**31 - 1)


@dataclasses.dataclass(frozen=True)
class CsvTable:
    """A table's rows as (line, {column: text}), empty fields left out, and notes for people."""

    rows: Iterator[tuple[int, dict[str, str]]]
    notes: tuple[str, ...]


def read_csv(path: Path, known: Collection[str]) -> CsvTable:
    """Open a CSV file; rows are read while they are taken.

    Args:
        known: the names of columns that are used.

    Raises:
        InputError: the file is no such table, also while rows are taken; the message has the line.
    """
    text, notes = read_text(path), []
    first, _, rest = text.partition("\n")
    skipped, separator = 0, None
    if first.strip().strip('"').lower().startswith("sep="):
        separator, text, skipped = first.strip().strip('"')[4:] or "\t", rest, 1
        first = rest.partition("\n")[0]
    else:
        separator = max(_SEPARATORS, key=lambda each: len(_known(first, each, known)))
    if separator != ",":
        notes.append(f"{path} is separated by {_SEPARATORS.get(separator, repr(separator))}")
    csv.field_size_limit(_MAX_FIELD)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    except TypeError:
        raise InputError(f"{path}, line 1: the separator {separator!r} is no single character") from None
    header = next(_lines(reader, path, skipped), (0, []))[1]
    columns = [_known_name(name, known) for name in header]
    changed = [f"{name!r} as {column!r}" for name, column in zip(header, columns, strict=True) if name != column]
    if changed:
        notes.append(f"{path}: columns are read without capitals and spaces: {', '.join(changed)}")
    for column in columns:
        if column and columns.count(column) > 1:
            raise InputError(f"{path}, line {1 + skipped}: the column {column!r} occurs more than once; rename one")
    return CsvTable(_rows(reader, path, skipped, columns), tuple(notes))


def _rows(reader: Any, path: Path, skipped: int, columns: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    for line, fields in _lines(reader, path, skipped):
        if surplus := [field for field in fields[len(columns) :] if field]:
            raise InputError(
                f"{path}, line {line}: {len(fields)} fields, and the header has {len(columns)} columns; beyond them "
                f"are {', '.join(map(repr, surplus))[:200]}. A field that contains the separator needs quotes around it"
            )
        if len(fields) < len(columns):
            raise InputError(
                f"{path}, line {line}: {len(fields)} fields, and the header has {len(columns)} columns; "
                f"{', '.join(map(repr, columns[len(fields) :]))} {'is' if len(columns) - len(fields) == 1 else 'are'} "
                "missing. An empty field is written as nothing between two separators"
            )
        yield line, {column: field for column, field in zip(columns, fields, strict=False) if field != ""}


def _lines(reader: Any, path: Path, skipped: int) -> Iterator[tuple[int, list[str]]]:
    """Yield (the line on which a row begins, its fields); empty lines are left out."""
    while True:
        line = reader.line_num + 1 + skipped
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise InputError(
                    f"{path}, line {line}: a field of the row that begins here opens a quote that never ends; close "
                    'it, or write a quote inside a quoted field twice ("")'
                ) from None
            last = reader.line_num + skipped
            where = f"line {line}" if last <= line else f"lines {line} to {last}"
            raise InputError(
                f"{path}, {where}: {error}; a quoted field ends with a quote before the separator, and a quote inside "
                'it is written twice ("")'
            ) from None
        if fields:
            yield line, fields


def _known(header: str, separator: str, known: Collection[str]) -> set[str]:
    names = next(csv.reader([header.strip()], delimiter=separator), [])
    return {name for name in (_known_name(name, known) for name in names) if name in known}


def _known_name(name: str, known: Collection[str]) -> str:
    """Return the known column that a name means, or the name as it is."""
    plain = name.strip().lower().replace(" ", "_")
    return name if name in known or plain not in known else plain
