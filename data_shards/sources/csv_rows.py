"""Rows of a CSV file, each with the line on which it begins; what does not fit its header is refused.

Fields are separated by commas, semicolons or tabs: the one by which the header has the most known columns, or that of a
first line ``sep=;``. Capitals and spaces around the names of known columns do not count. The notes say what was
recognised.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import re
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from data_shards.strict_json import read_text
from mmcot.errors import InputError

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
Refuse = Callable[[InputError], None]
_MAX_FIELD = min(sys.maxsize, 2**31 - 1)


@dataclasses.dataclass(frozen=True)
class CsvTable:
    """A table's columns, its rows as (line, {column: text}), empty fields left out, and notes for people."""

    columns: tuple[str, ...]
    rows: Iterator[tuple[int, dict[str, str]]]
    notes: tuple[str, ...]


def read_csv(path: Path, known: Collection[str], *, refuse: Refuse | None = None) -> CsvTable:
    """Open a CSV file; rows are read while they are taken.

    Args:
        known: the names of columns that are used.
        refuse: gets the fault of a row that does not fit the header, and reading continues; None: it is raised.

    Raises:
        InputError: the file is no such table, also while rows are taken; the message has the line.
    """
    csv.field_size_limit(_MAX_FIELD)
    text, notes = read_text(path), []
    first, rest = _first_line(text)
    skipped, separator = 0, None
    if first.strip().strip('"').lower().startswith("sep="):
        separator, text, skipped = first.strip().strip('"')[4:] or "\t", rest, 1
        if not separator[1:].strip(",;\t"):  # padded to the width of the table by a spreadsheet program
            separator = separator[0]
        first = _first_line(rest)[0]
    else:
        separator = max(_SEPARATORS, key=lambda each: len(_known(first, each, known)))
    if separator != ",":
        notes.append(f"{path} is separated by {_SEPARATORS.get(separator, repr(separator))}")
    has_blanks = bool(re.search(rf'{re.escape(separator)} +"?\w', first))
    if has_blanks:
        notes.append(f"{path}: blanks behind separators are left out, as in its header")
    try:
        reader = csv.reader(
            io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=has_blanks
        )
    except TypeError:
        raise InputError(f"the separator {separator!r} is no single character").at(path, line=1) from None
    header = next(_lines(reader, path, skipped), (0, []))[1]
    columns = [_known_name(name, known) for name in header]
    changed = [f"{name!r} as {column!r}" for name, column in zip(header, columns, strict=True) if name != column]
    if changed:
        notes.append(f"{path}: columns are read without capitals and spaces: {', '.join(changed)}")
    for column in columns:
        if column and columns.count(column) > 1:
            raise InputError(f"the column {column!r} occurs more than once; rename one").at(path, line=1 + skipped)
    return CsvTable(tuple(columns), _rows(reader, path, skipped, columns, refuse), tuple(notes))


def _first_line(text: str) -> tuple[str, str]:
    """The first line of a text, and the rest."""
    first, *rest = re.split(r"\r\n|\n|\r", text, maxsplit=1)
    return first, "".join(rest)


def _rows(
    reader: Any, path: Path, skipped: int, columns: list[str], refuse: Refuse | None
) -> Iterator[tuple[int, dict[str, str]]]:
    for line, fields in _lines(reader, path, skipped):
        problem = _misfit(fields, columns) or _swallowed(fields, columns, reader.dialect.delimiter)
        if problem is None:
            yield line, {column: field for column, field in zip(columns, fields, strict=False) if field != ""}
        elif refuse is None:
            raise InputError(problem).at(path, line=line)
        else:
            refuse(InputError(problem).at(path, line=line))


def _misfit(fields: list[str], columns: list[str]) -> str | None:
    """Why a row does not fit the header; None where it does."""
    if surplus := [field for field in fields[len(columns) :] if field]:
        return (
            f"{len(fields)} fields, and the header has {len(columns)} columns; beyond them are "
            f"{', '.join(map(repr, surplus))[:200]}. A field that contains the separator needs quotes around it"
        )
    if missing := columns[len(fields) :]:
        return (
            f"{len(fields)} fields, and the header has {len(columns)} columns; {', '.join(map(repr, missing))} "
            f"{'is' if len(missing) == 1 else 'are'} missing. An empty field is written as nothing between two "
            "separators"
        )
    return None


def _swallowed(fields: list[str], columns: list[str], separator: str) -> str | None:
    """Why a field with line breaks is no text but other rows behind a stray quote; None where it is none.

    A line of it would be a row by itself: as many fields as columns, with choices in their place.
    """
    if "choices" not in columns:
        return None
    place = columns.index("choices")
    for field in fields:
        for line in field.splitlines()[1:] if "\n" in field or "\r" in field else ():
            parts = line.split(separator)
            if len(parts) == len(columns) and "|" in parts[place]:
                return (
                    f"a field of it has line breaks and contains what looks like another row, {line[:80]!r}; remove "
                    'the stray quote before it, or write a quote inside a quoted field twice ("")'
                )
    return None


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
                    "a field of the row that begins here opens a quote that never ends; close it, or write a quote "
                    'inside a quoted field twice ("")'
                ).at(path, line=line) from None
            last = reader.line_num + skipped
            row = "" if last <= line else f"in the row that begins here and ends on line {last}: "
            raise InputError(
                f"{row}{error}; a quoted field ends with a quote before the separator, and a quote inside it is "
                'written twice ("")'
            ).at(path, line=line) from None
        if fields:
            yield line, fields


def _known(header: str, separator: str, known: Collection[str]) -> set[str]:
    try:
        names = next(csv.reader([header.strip()], delimiter=separator), [])
    except csv.Error:  # where the rows are read it is told with its line
        return set()
    return {name for name in (_known_name(name, known) for name in names) if name in known}


def _known_name(name: str, known: Collection[str]) -> str:
    """Return the known column that a name means, or the name as it is."""
    plain = name.strip().lower().replace(" ", "_")
    return name if name in known or plain not in known else plain
