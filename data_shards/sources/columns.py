"""The columns of a table by our names: renamed where so wanted, and those that are not used counted.

columns = Columns({"question": "text_column", "answer": "label"})
columns.take({"text_column": "Which?", "label": 1, "source": "web"})   # {"question": "Which?", "answer": 1, ...}
columns.notes()                                    # ["note: the field 'source' of 1 row is not used"]
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

from data_shards.sources.row_samples import FIELDS

_MISTAKEN = {"picture": "image", "images": "image", "img": "image", "options": "choices", "option": "choices"}
_MISTAKEN |= {"label": "answer", "explanation": "rationale", "reason": "rationale", "cot": "rationale"}


class Columns:
    """The columns of one data set, whose tables are read one after the other."""

    def __init__(self) -> None:
        self.known: Collection[str] = FIELDS  # the columns that are used
        self.lack_ids = False  # whether the present table has none, so that they are made
        self._unused = Counter[str]()

    def see(self, names: Iterable[str]) -> None:
        """Learn the columns of a table that names them all."""

    def has_ids(self, names: Collection[str]) -> bool:
        """Whether one of a table's columns has the ids."""
        return "qid" in names or "id" in names

    def leave_out(self, names: Iterable[str], num_rows: int) -> None:
        """Count columns that are not read at all."""
        self._unused.update(dict.fromkeys(names, num_rows))

    def take(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row by our names, and count what of it is not used."""
        self._unused.update(row.keys() - FIELDS)
        return row

    def notes(self) -> list[str]:
        """Sentences on columns that are not used."""
        return notes_on_fields(self._unused)


def notes_on_fields(unknown: Counter[str]) -> list[str]:
    """Sentences on fields that are not used, by the number of rows that have them."""
    return [
        f"note: the field {name!r} of {_rows(times)} is not used{_near(name)}"
        for name, times in unknown.items()
        if times
    ]


def _rows(number: int) -> str:
    return f"{number:,} row{'s' * (number > 1)}"


def _near(name: str) -> str:
    """Return "; did you mean X?" with a field of a similar name or meaning, or "" where there is none."""
    similar = difflib.get_close_matches(name.lower(), sorted(FIELDS), 1)
    nearest = _MISTAKEN.get(name.lower()) or (similar[0] if similar else None)
    return f"; did you mean {nearest!r}?" if nearest else ""
