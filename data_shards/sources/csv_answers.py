"""The meaning of a CSV file's answers: texts of choices, indices or letters.

A value of CSV has no type, so the whole column decides: ``1`` beside the choices ``1|2|3|4`` may be a text (the first
choice) or an index (the second). What fits every row is taken. If two readings fit and differ, the file is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mmcot.errors import InputError
from mmcot.texts.sample import choice_letter

Rows = Sequence[tuple[int, dict[str, Any]]]


def _as_text(answer: str, choices: Sequence[str]) -> int | None:
    return choices.index(answer) if answer in choices else None


def _as_index(answer: str, choices: Sequence[str]) -> int | None:
    digits = (answer.lstrip("0") or "0") if answer.isascii() and answer.isdigit() else ""
    return int(digits) if 0 < len(digits) < 3 and int(digits) < len(choices) else None


def _as_letter(answer: str, choices: Sequence[str]) -> int | None:
    letters = [choice_letter(index) for index in range(len(choices))]
    letter = answer.strip("()").upper()
    return letters.index(letter) if letter in letters else None


_READINGS: dict[str, Callable[[str, Sequence[str]], int | None]] = {
    "texts of choices": _as_text,
    "indices from 0": _as_index,
    "letters": _as_letter,
}


def with_indices(rows: Rows) -> tuple[Rows, str | None]:
    """Return the rows with their answers as indices of choices, and in which way the column was read.

    A row without choices, and a value that has no reading, stay as they are.

    Raises:
        InputError: a value has two readings that differ; the error has the line.
    """
    values = {
        number: (row["answer"].strip(), row["choices"])
        for number, (_, row) in enumerate(rows)
        if isinstance(row.get("answer"), str) and row["answer"].strip() and len(row.get("choices") or ()) > 1
    }
    read = {name: {number: reading(*value) for number, value in values.items()} for name, reading in _READINGS.items()}
    fitting = {name: found for name, found in read.items() if None not in found.values()}
    decided = dict(next(iter(fitting.values()), {}))
    for number, (answer, choices) in values.items():
        meanings = {name: found[number] for name, found in (fitting or read).items() if found[number] is not None}
        if len(set(meanings.values())) > 1:
            shown = "; ".join(f"as {name} it is {choices[index or 0]!r}" for name, index in meanings.items())
            error = InputError(
                f"the answer {answer!r} has two meanings over the choices {choices}: {shown}; in the whole column both "
                'are possible: write letters (A, B, ...), or give the table as .jsonl, where 1 is an index and "1" a '
                "text"
            )
            error.line = rows[number][0]
            raise error
        if meanings and not fitting:
            decided[number] = next(iter(meanings.values()))
    changed = [
        (line, row | {"answer": decided[number]} if number in decided else row)
        for number, (line, row) in enumerate(rows)
    ]
    return changed, next(iter(fitting), None) if values else None


class WrittenAnswers:
    """The answers of a file that are texts in JSON or Parquet: a text that equals a choice is that choice.

    Only if others of the same file are indices or letters, a text such as "1" over the choices 1, 2, 3, 4 is in doubt.
    """

    def __init__(self) -> None:
        self._choice: str | None = None  # the first that equals a choice and would be another as index or letter
        self._other: str | None = None  # the first that is an index or letter and equals no choice

    def see(self, answer: Any, choices: Any, where: str) -> None:
        """Learn a row's answer; others than short texts tell nothing."""
        if type(answer) is not str or len(answer) > 4 or not isinstance(choices, list):
            return
        text, number = answer.strip(), _as_index(answer.strip(), choices)
        other = _as_letter(text, choices) if number is None else number
        if other is None:
            return
        choice = _as_text(answer, choices) if answer in choices else _as_text(text, choices)
        if choice is None:
            self._other = self._other or f"{answer!r} ({where}) is an index or a letter over the choices {choices}"
        elif choice != other:
            self._choice = self._choice or f"{answer!r} ({where}) is a text of the choices {choices}"

    def require_one_meaning(self) -> None:
        """Check that the file's answers are meant in one way.

        Raises:
            InputError: they may be meant in two; the message shows both.
        """
        if self._choice and self._other:
            raise InputError(
                f"the answer {self._other}, and {self._choice} and would be another one as an index or letter; give "
                "all as integers (indices from 0), or all as texts of choices"
            )
