"""The columns of a table by our names: renamed where so wanted, and those that are not used counted.

columns = Columns({"question": "text_column", "answer": "label"})
columns.take({"text_column": "Which?", "label": 1, "source": "web"})   # {"question": "Which?", "answer": 1, ...}
columns.require_found()                            # InputError where no table has a column that is named
columns.notes()                                    # ["note: the field 'source' of 1 row is not used"]
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from data_shards.sources.row_samples import FIELDS
from mmcot.errors import InputError

_MISTAKEN = {"picture": "image", "images": "image", "img": "image", "options": "choices", "option": "choices"}
_MISTAKEN |= {"label": "answer", "explanation": "rationale", "reason": "rationale", "cot": "rationale"}
_SAME = ({"qid", "id"}, {"context", "hint"}, {"rationale", "solution"})  # two names of one field
_MOST_NAMED = 40


def check_columns(mapping: Mapping[str, str]) -> None:
    """Check a mapping from our fields to the columns of a data set, as far as the mapping alone tells.

    Raises:
        InputError: a field is unknown or given twice, or two fields are of one column.
    """
    for field, column in mapping.items():
        if field not in FIELDS:
            known = f"expected one of {', '.join(sorted(FIELDS))}"
            if column in FIELDS and not _near(field):
                raise InputError(
                    f"{field!r} is no field; an entry is `field: column of the data`: did you mean {column}: {field}? "
                    f"({known})"
                )
            raise InputError(f"{field!r} is no field{_near(field)} ({known})")
        if not column:
            raise InputError(f"{field} has no column; give the name of one")
        if same := [other for other in mapping if other != field and {other, field} in _SAME]:
            raise InputError(f"{field} and {same[0]} are two names of the same field; keep one")
        if same := [other for other, name in mapping.items() if other != field and name == column]:
            raise InputError(f"{field} and {same[0]} are both of the column {column!r}; give each a column of its own")


class Columns:
    """The columns of one data set, whose tables are read one after the other.

    Attributes:
        known: the columns that are used.
        lack_ids: whether the present table has no column of ids, so that they are made.
    """

    def __init__(self, mapping: Mapping[str, str] | None = None) -> None:
        """Take a mapping from our fields to the columns of the data set.

        Raises:
            InputError: as ``check_columns``.
        """
        self._mapping = {**(mapping or {})}
        check_columns(self._mapping)
        self._field_of = {column: field for field, column in self._mapping.items()}
        replaced = {*self._mapping}.union(*(names for names in _SAME if names & self._mapping.keys()))
        self._replaced = replaced - {*self._field_of}
        self.known: Collection[str] = (FIELDS | {*self._field_of}) - self._replaced
        self.lack_ids = False
        self._unused, self._seen = Counter[str](), dict[str, None]()

    def see(self, names: Iterable[str]) -> None:
        """Learn the columns of a table that names them all."""
        self._seen.update(dict.fromkeys(names))

    def has_ids(self, names: Collection[str]) -> bool:
        """Whether one of a table's columns has the ids."""
        return any(self._field_of.get(name, name) in ("qid", "id") for name in names if name in self.known)

    def of(self, fields: Iterable[str]) -> list[str]:
        """The columns of some fields."""
        return [self._mapping.get(field, field) for field in fields]

    def leave_out(self, names: Iterable[str], num_rows: int) -> None:
        """Count columns that are not read at all."""
        self._unused.update(dict.fromkeys(names, num_rows))

    def take(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row by our names, and count what of it is not used."""
        self._unused.update(row.keys() - self.known)
        if not self._mapping:
            return row
        self._seen.update(dict.fromkeys(row))
        return {self._field_of.get(name, name): value for name, value in row.items() if name not in self._replaced}

    def require_found(self) -> None:
        """Raise where no table of the data set has a column that the mapping names.

        Raises:
            InputError: the message has the columns that exist.
        """
        missing = {field: column for field, column in self._mapping.items() if column not in self._seen}
        if not missing:
            return
        names = [*self._seen]
        shown = ", ".join(names[:_MOST_NAMED]) + (f" and {len(names) - _MOST_NAMED} more" * (len(names) > _MOST_NAMED))
        wrong = "; ".join(f"{column!r} (for {field}){_near(column, names)}" for field, column in missing.items())
        raise InputError(
            f"data.columns: the data set has no column {wrong}; it has {shown or 'none'}. Fields that can be given "
            f"another column: {', '.join(sorted(FIELDS))}"
        )

    def notes(self) -> list[str]:
        """Sentences on columns that are not used."""
        return notes_on_fields(self._unused)


def notes_on_fields(unknown: Counter[str]) -> list[str]:
    """Sentences on fields that are not used, by the number of rows that have them."""
    return [
        f"note: the field {name!r} of {times:,} row{'s' * (times > 1)} is not used"
        + (_near(name) if name not in FIELDS else ", because data.columns gives it another column")
        for name, times in unknown.items()
        if times
    ]


def _near(name: str, names: Collection[str] = ()) -> str:
    """Return "; did you mean X?" with one of names (our fields) like this one, or "" where there is none."""
    known = {each.lower(): each for each in sorted(names or FIELDS)}
    similar = difflib.get_close_matches(name.lower(), known, 1)
    mistaken = None if names else _MISTAKEN.get(name.lower())
    nearest = mistaken or (known[similar[0]] if similar else None)
    return f"; did you mean {nearest!r}?" if nearest else ""
